"""Averages of values written as products and sums: which are one call, which are not, and what they count."""

import math

import pytest
import torch
import torch.nn.functional as F
from staged import Staged, With, stage
from torch import Tensor, nn

from modnorm_fx import ATEN, convert
from modnorm_fx.atoms import Gain
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


# --- smoothing: x + g (pool(x) - x) -----------------------------------------------------------------------------------

IMAGE = torch.randn(2, 8, 24, 24, generator=G)


def pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


SMOOTHED = {
    "PoolFormer": lambda s, x: x + (pool(x) - x) * s.w.view(-1, 1, 1),
    "the other way round": lambda s, x: s.w.view(-1, 1, 1) * (pool(x) - x) + x,
    "alone": lambda s, x: (x + (pool(x) - x)) * s.w.view(-1, 1, 1),
}
NOT_SMOOTHED = {
    "another value": lambda s, x: x.exp() + (pool(x) - x) * s.w.view(-1, 1, 1),
    "another's average": lambda s, x: x + (pool(x.exp()) - x) * s.w.view(-1, 1, 1),
    "subtracted": lambda s, x: x - (pool(x) - x) * s.w.view(-1, 1, 1),
}


@pytest.mark.parametrize("name", [*SMOOTHED, *NOT_SMOOTHED])
def test_a_value_and_its_difference_from_its_averages(name: str) -> None:
    model = With({**SMOOTHED, **NOT_SMOOTHED}[name], w=(8,))
    staged = stage(model, IMAGE)
    staged.rewrite("averages")
    kind = "smoothing" if name in SMOOTHED else "interpolation"
    assert staged.kinds() == [kind] * (name in SMOOTHED or name == "another's average")
    torch.testing.assert_close(staged.captured(model, IMAGE)[0], model(IMAGE))
    if name == "PoolFormer":
        (weight,) = staged.typed().values()
        assert [atom for _, _, atom in weight.uses] == [Gain((8,))]


def test_the_rule_for_smoothing_against_the_jacobian() -> None:
    """At a gain of 1, of white noise: what the input passes is at most 1, and a change of the gain √(8/9)."""
    x, w = IMAGE[:1, :2, :8, :8], torch.ones(2)
    model = With(SMOOTHED["PoolFormer"], w=(2,))
    staged = stage(model, x)
    staged.rewrite("averages")
    (node,) = [n for n in staged.module.graph.nodes if n.op == "call_module"]
    region = staged.module.get_submodule(str(node.target))
    args = dict(zip(region.inputs, node.args, strict=True)) | {"region": region}
    claim = ATEN["smoothing"].function(Call(node, args, dict.fromkeys(node.args, 1.0), {}, TRACKED))

    def run(x: Tensor, w: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"w": w}, (x,))

    by_input, by_gain = torch.autograd.functional.jacobian(run, (x, w))
    assert torch.linalg.matrix_norm(by_input.reshape(x.numel(), -1), 2) <= claim.sensitivity["input"] * 1.2  # borders
    change = (by_gain @ torch.tensor([1.0, -1.0])).square().mean().sqrt() / x.square().mean().sqrt()
    assert change == pytest.approx(claim.sensitivity["gain"], rel=0.1)
    assert run(x, w).square().mean().sqrt() <= claim.scale * x.square().mean().sqrt()


def test_a_stream_that_is_pooled_does_not_grow() -> None:
    """Twelve blocks of it: no weight of a branch may move three times as far as that of the block before."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gains = nn.ParameterList(nn.Parameter(torch.ones(8)) for _ in range(12))
            self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(12))
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for gain, layer, norm in zip(self.gains, self.layers, self.norms, strict=True):
                x = x + (pool(x) - x) * gain.view(-1, 1, 1)
                x = x + norm(layer(x))
            return x

    targets = {leaf.key: leaf.target for leaf in convert(Net(), (IMAGE,)).leaves}
    assert targets["layers.11.weight"] < 20 * targets["layers.0.weight"]


# --- part of the way -------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """Blocks ``x + a (f(x) - x)`` as EfficientViM and highway nets have them."""

    def __init__(self, how: str, blocks: int = 8, width: int = 64):
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(blocks))
        self.gate = nn.Parameter(torch.zeros(blocks, width))

    def forward(self, x):
        for block, gate in zip(self.blocks, self.gate.sigmoid(), strict=True):
            y = block(x)
            x = {
                "gate": lambda x=x, y=y, gate=gate: x + gate * (y - x),
                "number": lambda x=x, y=y: (y - x) * 0.3 + x,
                "written out": lambda x=x, y=y: (1 - (x * 9).sigmoid()) * x + (x * 9).sigmoid() * y,
            }[self.how]()
        return x


@pytest.mark.parametrize("how, fired", [("gate", 8), ("number", 8), ("written out", 0)])
def test_a_part_of_the_way_keeps_its_size(how: str, fired: int):
    """Scales against those of the net itself with weights of norm 1; as independent terms they would grow by √3."""
    net, x = Mixer(how), torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    staged = stage(net, x)
    staged.rewrite("averages")
    assert staged.error() < 1e-6
    assert sum(region.kind == "interpolation" for region in staged.regions()) == fired
    norm = convert(net, (x,))
    norm.initialize_(net, torch.Generator().manual_seed(0))
    net.gate.data.zero_()
    with torch.no_grad():
        for leaf in norm.leaves:
            if leaf.atom.kind == "Linear":
                measured = x
                for block, gate in zip(net.blocks, net.gate.sigmoid(), strict=True):
                    if leaf.weight == f"blocks.{list(net.blocks).index(block)}.weight":
                        break
                    measured = Mixer.forward(_one(net, block, gate), measured)
                assert leaf.scale == pytest.approx(float(measured.square().mean().sqrt()), rel=0.6)


def _one(net: Mixer, block: nn.Module, gate: Tensor) -> Mixer:
    one = Mixer(net.how, 1)
    one.blocks[0] = block
    one.gate.data.copy_(gate.logit()[None])
    return one


def test_weighted_rows_average_what_they_weigh():
    """``(softmax(dt) · b) @ x`` over n rows: as large as b·x whatever n is, and not √n times."""

    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.dt, self.b, self.x, self.out = (nn.Linear(16, 16, bias=False) for _ in range(4))

        def forward(self, u):
            weights = self.dt(u).mT.softmax(-1) * self.b(u).mT
            return self.out(weights @ self.x(u))

    scales = [convert(Mix(), (torch.randn(1, n, 16),)).leaves[-1].scale for n in (4, 400)]
    assert scales == pytest.approx([1.0, 1.0], rel=1e-6)
