"""Averages of values written as products and sums: which are one call, which are not, and what they count."""

import math

import pytest
import torch
import torch.nn.functional as F
from staged import Staged, stage

from modnorm_fx import ATEN, convert
from modnorm_fx.conventions import TRACKED
from modnorm_fx.rules import Call

G = torch.Generator().manual_seed(0)
X, A = torch.randn(2, 3, 8, 40, generator=G), torch.randn(2, 3, 1, 40, generator=G)
Q, K, V = (torch.randn(2, 3, 50, 8, generator=G) for _ in range(3))


def mobilevit(x, a):
    return (x * a.softmax(-1)).sum(-1, keepdim=True)


def branches(x, a):
    """As SKNet and ResNeSt have it: a softmax over three branches, one number per channel."""
    weights = a.expand(2, 3, 8, 40).mean(-1).softmax(1).reshape(2, -1).reshape(2, 3, 8, 1)
    return (x * weights).sum(1)


def lite(q, k, v, fill=1.0):
    """As EfficientViT has it."""
    q, k = torch.relu(q), torch.relu(k)
    out = q @ (k.transpose(-1, -2) @ F.pad(v, (0, 1), value=fill))
    return out[..., :-1] / (out[..., -1:] + 1e-15)


AVERAGES = {
    "positions": (mobilevit, (X, A), "weighted_average"),
    "branches": (branches, (X, A), "weighted_average"),
    "weights first": (lambda x, a: (a.softmax(-1) * x).sum(3), (X, A), "weighted_average"),
    "linear attention": (lite, (Q, K, V), "linear_attention"),
}
OTHERS = {
    "sum over another axis": (lambda x, a: (x * a.softmax(-1)).sum(1), (X, A)),
    "no softmax": (lambda x, a: (x * a.sigmoid()).sum(-1), (X, A)),
    "weights alone": (lambda x, a: a.softmax(-1).sum(-1) + x.sum(-1), (X, A)),
    "columns of zeros": (lambda q, k, v: lite(q, k, v, 0.0), (Q, K, V)),
    "another's last column": (lambda q, k, v: (q @ (k.mT @ v))[..., :-1] / (q @ (k.mT @ k))[..., -1:], (Q, K, V)),
}


def found(function, inputs) -> Staged:
    staged = stage(function, *inputs)
    staged.rewrite("averages")
    assert staged.error() == 0.0
    return staged


@pytest.mark.parametrize("name", AVERAGES)
def test_averages(name: str):
    function, inputs, kind = AVERAGES[name]
    assert found(function, inputs).kinds() == [kind]


@pytest.mark.parametrize("name", OTHERS)
def test_others_stay(name: str):
    function, inputs = OTHERS[name]
    staged = stage(function, *inputs)
    before = staged.targets()
    assert staged.rewrite("averages") == {"averages": 0} and staged.targets() == before


def test_one_after_the_other_with_several_readers():
    staged = found(lambda q, k, v: (lambda y: lite(y, k, y) + torch.tanh(y))(lite(q, k, v)), (Q, K, V))
    assert staged.kinds() == ["linear_attention"] * 2


def test_linear_attention_ignores_the_size_of_queries_and_keys():
    staged = found(lite, (Q, K, V))
    (call,) = (n for n in staged.module.graph.nodes if n.op == "call_module")
    region = staged.module.get_submodule(str(call.target))
    args = dict(zip(region.inputs, call.args, strict=True)) | {"region": region}
    for size in (0.1, 1.0, 30.0):
        claim = ATEN["linear_attention"].function(
            Call(call, args, dict(zip(call.args, (size, size, 2.0), strict=True)), {}, TRACKED)
        )
        assert claim.scale == 2.0 and claim.sensitivity["query"] == pytest.approx(2 / math.sqrt(3) / size)
    assert torch.allclose(lite(30 * Q, K, V), lite(Q, 0.1 * K, V), atol=1e-5)  # and so does the function


def test_the_number_of_positions_does_not_count():
    """Without the pass the update of a layer would shrink with √n."""

    class Pool(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.score, self.value, self.head = (torch.nn.Linear(8, n) for n in (1, 8, 4))

        def forward(self, x):
            return self.head(torch.tanh((self.score(x).softmax(1) * self.value(x)).sum(1)))

    short, long = (
        [leaf.target for leaf in convert(Pool(), (torch.randn(2, n, 8),)).leaves if leaf.atom.is_matrix]
        for n in (4, 400)
    )
    assert long == pytest.approx(short)
