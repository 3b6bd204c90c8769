"""Where values come from: signals, weights, and what is neither."""

import pytest
import torch
import torch.nn.functional as F
from staged import With, stage
from torch import nn

aten = torch.ops.aten
X = torch.randn(2, 6, 16)


def kinds(model, *inputs) -> dict[str, list[str]]:
    """Op name -> kinds of its calls, in order."""
    staged = stage(model, *(inputs or (X,)))
    flow = staged.flow()
    out: dict[str, list[str]] = {}
    for node in staged.module.graph.nodes:
        if node.op == "call_function":
            out.setdefault(str(node.target).removeprefix("aten."), []).append(flow.kinds[node].value)
        kind = [flow.signal(node), flow.weight(node), flow.exogenous(node)]
        assert sum(kind) == (node.op != "output")  # exactly one each
        assert (node in flow.parameters) == flow.weight(node)
    return out


def test_signals_come_from_inputs_and_from_weights_that_met_them():
    found = kinds(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    assert found == {"linear.default": ["signal"], "relu.default": ["signal"]}


def test_a_lookup_is_a_signal_although_its_input_holds_integers():
    assert kinds(nn.Embedding(10, 4), torch.zeros(2, 3, dtype=torch.long)) == {"embedding.default": ["signal"]}


VIEWS = {
    "t": lambda w: w.t(),
    "narrow": lambda w: w[:8],
    "cast": lambda w: w.to(torch.float64).to(torch.float32),
    "1 + w": lambda w: 1 + w,
    "-exp": lambda w: -torch.exp(w),
    "half": lambda w: w / 2,
    "expand": lambda w: w.unsqueeze(0).expand(2, -1, -1),
    "first of two": lambda w: w.chunk(2, 0)[0],
    "looked up": lambda w: w[torch.tensor([0, 3])],
    "masked": lambda w: w * torch.ones(16, 16).tril(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_and_maps_of_one_weight_are_that_weight(name: str):
    found = kinds(With(lambda s, x: x @ VIEWS[name](s.w).mT, w=(16, 16)))
    assert found.pop("matmul.default") == ["signal"]
    assert {kind for calls in found.values() for kind in calls} <= {"weight", "exogenous"}
    assert any("weight" in calls for calls in found.values())


@pytest.mark.parametrize(
    "join", [lambda a, b: a @ b, lambda a, b: a + b, lambda a, b: a * b, lambda a, b: torch.cat([a, b])]
)
def test_two_parameters_make_a_source(join):
    found = kinds(With(lambda s, x: x @ join(s.a, s.b).mT, a=(16, 16), b=(16, 16)))
    assert {kind for calls in found.values() for kind in calls} == {"signal"}, found


def test_a_weight_that_meets_itself_makes_a_source():
    found = kinds(With(lambda s, x: x @ (s.w + s.w.t()), w=(16, 16)))
    assert found["add.Tensor"] == ["signal"]


def test_masks_positions_and_integers_are_exogenous():
    def function(s, x):
        t = x.shape[1]
        mask = torch.arange(t)[:, None] >= torch.arange(t)
        return s.linear(x + torch.arange(t)[:, None] / t) * mask.sum(-1).sqrt()[:, None]

    found = kinds(With(function, linear=nn.Linear(16, 16)))
    assert set(found["arange.start_step"] if "arange.start_step" in found else found["arange.default"]) == {"exogenous"}
    assert found["sum.dim_IntList"] == found["sqrt.default"] == ["exogenous"]
    assert found["linear.default"] == ["signal"]


def test_comparisons_of_signals_are_exogenous():
    found = kinds(With(lambda s, x: s.linear(x) * (x > 0), linear=nn.Linear(16, 16)))
    assert found["gt.Scalar"] == ["exogenous"]


@pytest.mark.parametrize(
    "make",
    [torch.zeros_like, torch.ones_like, torch.empty_like, torch.randn_like, lambda x: torch.full_like(x, 2.0),
     lambda x: x.new_zeros(16), lambda x: x.new_ones(16), lambda x: x.new_full((16,), 3.0)],
)  # fmt: skip
def test_what_only_has_the_shape_of_a_signal_is_exogenous(make):
    found = kinds(With(lambda s, x: s.linear(x) + make(x), linear=nn.Linear(16, 16)))
    (name,) = set(found) - {"linear.default", "add.Tensor"}
    assert found[name] == ["exogenous"]


def test_buffers_are_exogenous():
    model = nn.BatchNorm1d(16)
    assert {kind for calls in kinds(model, X[0]).values() for kind in calls} == {"signal"}
    with_table = With(lambda s, x: s.linear(x) * s.table.cos(), linear=nn.Linear(16, 16))
    with_table.register_buffer("table", torch.zeros(16))
    assert kinds(with_table)["cos.default"] == ["exogenous"]


def test_an_unknown_op_on_a_weight_makes_a_source():
    found = kinds(With(lambda s, x: F.linear(x, torch.linalg.matrix_exp(s.w)), w=(16, 16)))
    assert found["linalg_matrix_exp.default"] == ["signal"]
