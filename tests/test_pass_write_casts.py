"""Casts to the type of another tensor: the outputs stay the same, and nobody is read for a type."""

import pytest
import torch
from staged import stage
from torch import Tensor

aten = torch.ops.aten
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()

CASTS = {
    "type_as": lambda x, y: 2 * x.type_as(y),
    "to": lambda x, y: 2 * x.to(y),
    "type_as of the same type": lambda x, y: x.type_as(2 * x),
}


@pytest.mark.parametrize("name", CASTS)
def test_outputs_stay_the_same(name: str) -> None:
    staged = stage(CASTS[name], X, Y)
    staged.rewrite("casts")
    assert staged.error() == 0
    assert not {aten.type_as.default, aten.to.other} & set(staged.targets())


def test_what_lends_its_type_alone_is_not_used() -> None:
    """A layer whose output is cut and lends its type is cut all the same."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        both = 3 * x
        return both[:, :2] * y.type_as(both)[:, 2:]

    staged = stage(function, X, Y)
    staged.rewrite("casts")
    (both,) = [n for n in staged.module.graph.nodes if n.target is aten.mul.Tensor and 3 in n.args]
    assert {str(u.target) for u in both.users} == {"aten.slice.Tensor"}
