"""The forward sweep: scales of random nets by hand, declared norms of weights, ops without a rule."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from random_nets import Net, facts, programs, written_down
from staged import REWRITES, With, stage
from torch import Tensor, nn

from modnorm_fx import ATEN, convert
from modnorm_fx.conventions import PAPER, TRACKED
from modnorm_fx.errors import UnknownOpError
from modnorm_fx.rules import Local

X = torch.randn(2, 6, 16)
IDS = torch.zeros(2, 6, dtype=torch.long)


@settings(max_examples=8, deadline=None)
@given(programs)
def test_scales_of_random_nets(program):
    found = facts(Net(program), TRACKED)
    output = next(n for n in found.staged.module.graph.nodes if n.op == "output").all_input_nodes[0]
    assert found.scales.scale[output] == pytest.approx(written_down(program, TRACKED).scales[-1])
    paper = facts(Net(program), PAPER, staged=found.staged)
    assert set(paper.scales.scale.values()) == {1.0}


def output_scale(model: nn.Module, *inputs, unknown: str = "error", rules=ATEN) -> float:
    staged = stage(model, *(inputs or (X,)), rules=rules)
    staged.rewrite(*REWRITES)
    found = facts(model, TRACKED, unknown=unknown, staged=staged)
    output = next(n for n in staged.module.graph.nodes if n.op == "output").all_input_nodes[0]
    return found.scales.scale[output]


def initial(model: nn.Module, *inputs) -> dict[str, list[float]]:
    found = facts(model, TRACKED, *(inputs or (X,)))
    out: dict[str, list[float]] = {}
    for (key, _), value in found.scales.initial.items():
        out.setdefault(key, []).append(value)
    return out


def test_declared_norms():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.norm, self.linear = nn.Embedding(11, 16), nn.LayerNorm(16), nn.Linear(16, 16)
            self.position = nn.Parameter(torch.zeros(1, 6, 16))

        def forward(self, i):
            return self.linear(self.norm(2 * self.token(i).square() + self.position))

    found = initial(Net(), IDS)
    assert found["token.weight"] == [1.0]
    assert found["position"] == [pytest.approx(2 * math.sqrt(3), rel=1e-3)]  # of the size of what it is added to
    assert found["norm.weight"] == [1.0] and found["linear.weight"] == [1.0]
    assert found["norm.bias"] == [0.0] and found["linear.bias"] == [0.0]


def test_a_tied_embedding_has_the_rows_of_a_head_of_norm_one():
    model = nn.Sequential(nn.Embedding(64, 16), nn.LayerNorm(16), nn.Linear(16, 64, bias=False))
    model[2].weight = model[0].weight
    assert initial(model, IDS)["0.weight"] == [pytest.approx(1 / 4), 1.0]
    head = nn.init.orthogonal_(torch.empty(64, 16), gain=math.sqrt(64 / 16))  # a head of operator norm 1
    assert float(head.square().mean(1).sqrt().mean()) == pytest.approx(1 / 4, rel=0.05)


def test_an_embedding_that_is_multiplied_by_a_number_is_declared_at_one_over_it():
    """√d times rows of 1/√d, as Vaswani et al. have it: a stream of size 1, in which what is added still counts."""

    class Scaled(nn.Module):
        def __init__(self, use):
            super().__init__()
            self.token, self.start, self.use = nn.Embedding(11, 16), nn.Parameter(torch.zeros(16)), use

        def forward(self, i):
            return F.rms_norm(self.use(self.token(i)) + self.start, (16,))

    assert initial(Scaled(lambda x: x * 50), IDS)["token.weight"] == [pytest.approx(1 / 50)]
    assert initial(Scaled(lambda x: x.float() / 0.25), IDS)["token.weight"] == [pytest.approx(1 / 4)]
    assert initial(Scaled(lambda x: x * 50 + x), IDS)["token.weight"] == [1.0]
    targets = [convert(Scaled(lambda x, c=c: x * c), (IDS,)).targets for c in (1.0, 50.0)]
    assert targets[1]["start"] == pytest.approx(targets[0]["start"])
    assert targets[1]["token.weight"] == pytest.approx(targets[0]["token.weight"] / 50)


def test_biases_alone_are_a_source():
    """A sum of parameters is no shift of something else: as a factor it must not silence what it multiplies."""
    found = facts(With(lambda s, x: s.linear(x) * (s.a + s.b), linear=nn.Linear(16, 16), a=(16,), b=(16,)), TRACKED, X)
    assert all(gain > 0 for gain in found.sensitivities.gains.values())


def test_constants_of_the_graph_are_measured():
    assert output_scale(With(lambda s, x: s.l(x) * torch.full((16,), 3.0), l=nn.Linear(16, 16))) == pytest.approx(3.0)
    ramp = math.sqrt(1 + float((torch.arange(16.0) / 16).square().mean()))
    assert output_scale(With(lambda s, x: s.l(x) + torch.arange(16) / 16, l=nn.Linear(16, 16))) == pytest.approx(ramp)


def test_buffers_are_not_read():
    model = With(lambda s, x: s.l(x) * s.table + s.table, l=nn.Linear(16, 16))
    model.register_buffer("table", torch.full((16,), 7.0))
    assert output_scale(model) == 1.0  # 1 as a factor, nothing as a shift


def test_masks_do_not_shift():
    model = With(lambda s, x: s.l(x) + torch.full((6, 16), -math.inf).triu(1), l=nn.Linear(16, 16))
    assert output_scale(model) == pytest.approx(1.0)


def test_softmax_rows_are_averages():
    """Attention with a learned bias is not recognised as a whole; its parts say the same."""
    model = With(lambda s, x: (x @ x.mT / 4 + s.b).softmax(-1) @ s.l(x), b=(6, 6), l=nn.Linear(16, 16))
    assert output_scale(model) == pytest.approx(1.0)


def chunked(value: float = 0.0):
    """Rows of a softmax moved to the diagonal as sliding windows do it (Longformer): padded, and read at an offset."""

    def function(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
        rows = F.pad((x @ x.mT / 4 + s.b).softmax(-1), (0, 7), value=value)
        skewed = rows.view(-1, 6 * 13)[:, :-6].view(-1, 6, 12)
        return torch.einsum("bij,bjf->bif", skewed, torch.cat([s.l(x), s.l(x)], 1))

    return With(function, b=(6, 6), l=nn.Linear(16, 16))


def test_rows_that_are_padded_with_zeros_stay_averages():
    assert output_scale(chunked()) == pytest.approx(1.0)
    x, model = torch.randn(4, 6, 16), chunked()
    shift = torch.randn(16)
    before = model(x)
    with torch.no_grad():
        model.l.bias += shift
    torch.testing.assert_close(model(x) - before, shift.expand_as(before), atol=1e-5, rtol=1e-5)
    assert output_scale(chunked(-1.0)) != pytest.approx(1.0)


@pytest.mark.parametrize("start", [torch.zeros_like, torch.ones_like])
@pytest.mark.parametrize("places", [
    [slice(0, 3), slice(3, 4), slice(4, 8)], [slice(0, 3), slice(3, 4)], [0, 1, 2, 3, 4, 5, 6, 7],
    [torch.tensor([0, 5, 7]), torch.tensor([1, 2, 3, 4, 6])], [torch.arange(8) % 3 == i for i in range(3)],
])  # fmt: skip
def test_writes_to_different_places(places, start):
    """As measured with rotations for the layers: what was written stays, and counts for what it is."""

    def function(s, x):
        y = start(x)
        for layer, place in zip(s.layers, places, strict=True):
            y[place] = layer(x[place])
        return y

    layers = nn.ModuleList(nn.utils.parametrizations.orthogonal(nn.Linear(16, 16, bias=False)) for _ in places)
    for layer in layers:
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
    model, x = With(function, layers=layers), torch.randn(8, 16)
    x /= x.square().mean(-1, keepdim=True).sqrt()
    assert output_scale(model, x) == pytest.approx(float(model(x).detach().square().mean().sqrt()), rel=1e-4)


def test_places_that_were_added_to_before_are_not_empty():
    """Rows 0 and 1, to which two rows each were added, are then written over: not all that came before is left."""

    def function(s, x):
        y = torch.zeros_like(x).index_put((torch.tensor([0, 1, 0, 1]),), s.a(x[:4]), accumulate=True)
        return y.index_put((torch.tensor([0, 1, 2, 3]),), s.b(x[4:]))

    model = With(function, a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    assert output_scale(model, torch.randn(8, 16)) < 1.0


def test_a_place_that_is_written_twice_counts_once():
    def function(s, x):
        y = torch.zeros_like(x)
        y[:4] = s.a(x[:4])
        y[:4] = s.b(x[:4])
        return y

    assert output_scale(With(function, a=nn.Linear(16, 16), b=nn.Linear(16, 16)), torch.randn(8, 16)) < 1.0


@pytest.mark.parametrize("function", [
    lambda x: x / torch.zeros(16), lambda x: F.normalize(0 * x),
])  # fmt: skip
def test_division_by_a_scale_of_zero(function):
    """No rule can say anything: the op is sampled, or refused by name; never a ZeroDivisionError."""
    model = With(lambda s, x: s.l(x) + function(x), l=nn.Linear(16, 16))
    assert math.isfinite(output_scale(model, unknown="sample"))
    with pytest.raises(UnknownOpError):
        output_scale(model, unknown="error")


# --- ops without a rule -----------------------------------------------------------------------------------------------


def custom(name: str, function):
    """An op of a user's own, with a derivative."""
    op = torch.library.custom_op(f"propagate_scales::{name}", function, mutates_args=())
    op.register_fake(torch.empty_like)
    op.register_autograd(lambda ctx, g: g.clone())
    return op


def _first(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def _second(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def _hole(x: torch.Tensor) -> torch.Tensor:
    return x / 0.0


first, second, hole = custom("first", _first), custom("second", _second), custom("hole", _hole)
OWN = (torch.ops.propagate_scales.first.default, torch.ops.propagate_scales.second.default)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return second(self.b(first(self.a(x))))


def test_refused_by_name_and_place_all_at_once():
    with pytest.raises(UnknownOpError) as caught:
        output_scale(Odd())
    text = str(caught.value)
    assert text.startswith("2 operations have no rule")
    assert all(str(op) in text for op in OWN)
    assert "test_pass_propagate_scales.py" in text and "unknown='sample'" in text


def test_sampled_and_marked():
    found = facts(Odd(), TRACKED, X, unknown="sample")
    sampled = [n.target for n, status in found.scales.status.items() if status == "sampled"]
    assert sampled == list(OWN)


def test_a_rule_of_ones_own():
    rules = ATEN.extended()
    rules.rule(*OWN, status="declared", source="for the test")(lambda call: Local(2 * call.scale("x"), {"x": 2.0}))
    assert output_scale(Odd(), rules=rules) == pytest.approx(4.0)


def test_what_cannot_be_sampled_is_refused_with_the_reason():
    model = With(lambda s, x: hole(s.l(x)), l=nn.Linear(16, 16))
    with pytest.raises(UnknownOpError, match="hole.*sampling failed: its output or derivative .* not finite"):
        output_scale(model, unknown="sample")


def test_a_rule_that_forgets_an_operand_is_an_error():
    rules = ATEN.extended()
    rules.rule(*OWN, status="declared", source="x")(lambda call: Local(1.0, {}))
    with pytest.raises(UnknownOpError, match="its rule says nothing of operand x"):
        output_scale(Odd(), rules=rules)


def test_a_stream_with_depthwise_convolutions_and_no_norm_layer() -> None:
    """`x + conv(x)`, convolutions as position encodings: the stream of a net with weights of norm 1, as it runs."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, groups=8, bias=False) for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x[..., 1:-1, 1:-1] + layer(x)
            return x

    model, x = Net(), torch.randn(2, 8, 64, 64, generator=torch.Generator().manual_seed(0))
    norm = convert(model, (x,))
    norm.initialize_(model, generator=torch.Generator().manual_seed(0))
    size = {leaf.key: leaf.target for leaf in norm.leaves}
    measured = model(x).square().mean().sqrt().item() / x.square().mean().sqrt().item()
    first, last = size["layers.0.weight"], size["layers.11.weight"]
    # as much of the stream's change as of its size: the same target in every layer, and 1.02 to the 12th in all
    assert measured == pytest.approx((1 + (4 / 12) / 9) ** 6, rel=0.05) and last == pytest.approx(first, rel=1e-6)


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(16, 16, 5), 1),
    "2d": (lambda: nn.Conv2d(16, 16, 3), 2),
    "3d": (lambda: nn.Conv3d(8, 8, 2), 3),
    "grouped": (lambda: nn.Conv2d(16, 16, 3, groups=4), 2),
    "dilated": (lambda: nn.Conv1d(16, 16, 3, dilation=2), 1),
    "transposed": (lambda: nn.ConvTranspose2d(16, 16, 3, padding=2), 2),
    "upsampling": (lambda: nn.ConvTranspose2d(8, 8, 2, stride=2), 2),
    "upsampling, overlapping": (lambda: nn.ConvTranspose1d(16, 16, 4, stride=2, padding=3), 1),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3)), 2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_without_norm_layers_keep_the_scale(name: str) -> None:
    """Four in a row, as `initialize_` leaves them, on noise: the taps of each add up in quadrature."""
    make, axes = CONVOLUTIONS[name]
    model = nn.Sequential(*(make() for _ in range(4)))
    size = 24 if axes < 3 else 10
    features = 8 if name in ("3d", "upsampling") else 16
    x = torch.randn(4, features, *(size,) * axes, generator=torch.Generator().manual_seed(1))
    norm = convert(model, (x,))
    norm.initialize_(model, generator=torch.Generator().manual_seed(0))
    assert model(x).square().mean().sqrt().item() == pytest.approx(1.0, rel=0.2)
