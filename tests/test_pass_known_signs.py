"""Signs that follow from the ops, held to the values that random inputs give."""

import math

import pytest
import torch
import torch.nn.functional as F
from modnorm_fx.passes.known_signs import known_signs
from op_calls import grid_moments
from staged import With, stage
from torch import fx, nn

import modnorm_fx as mn
from modnorm_fx.quadrature import Sign, gaussian_moments

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
NEGATIVE, POSITIVE, ANY = Sign.NEGATIVE, Sign.POSITIVE, Sign.ANY


def decay(x):
    return -F.softplus(x)


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def last(function, *weights) -> Sign:
    """The sign of the function's value; every sign known on the way is held to the values."""
    own = {f"w{i}": shape for i, shape in enumerate(weights)}
    model = With(lambda self, x: function(x, *(getattr(self, name) for name in own)) * self.out, out=(6,), **own)
    staged = stage(model, X)
    staged.rewrite("pointwise")
    signs = known_signs(staged.module, rules=staged.rules)
    values = run(staged)
    for node, sign in signs.items():
        value = values[node]
        if isinstance(value, torch.Tensor):
            assert (POSITIVE in sign or not (value > 0).any()) and (NEGATIVE in sign or not (value < 0).any()), node
    (out,) = [n for n in staged.module.graph.nodes if n.op == "output"][0].all_input_nodes
    value = next(n for n in out.all_input_nodes if n.op != "placeholder")
    return signs.get(value, ANY)


def run(staged) -> dict[fx.Node, object]:
    values: dict[fx.Node, object] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n):
            values[n] = super().run_node(n)
            return values[n]

    parameters = dict(staged.model.named_parameters())
    with torch.no_grad():
        Keep(staged.module).run(*(X if e.kind == "user" else parameters[e.name] for e in staged.captured.inputs))
    return values


def test_signs_of_products():
    assert [a.times(b) for a in (NEGATIVE, POSITIVE) for b in (NEGATIVE, POSITIVE)] == [
        POSITIVE, NEGATIVE, NEGATIVE, POSITIVE]  # fmt: skip
    assert ANY.times(POSITIVE) is ANY and ANY.times(Sign(0)) == Sign(0) and NEGATIVE.flipped() is POSITIVE


FUNCTIONS = {
    "exp": (lambda x: x.exp(), POSITIVE),
    "minus softplus": (decay, NEGATIVE),
    "silu": (F.silu, ANY),
    "fused": (lambda x: F.softplus(x).clamp(0.001, 0.1) + 1, POSITIVE),
    "square": (lambda x: x * x, POSITIVE),
    "product with itself": (lambda x: (g := x.mT @ x) @ g, ANY),
    "product": (lambda x: decay(x) * x.sigmoid(), NEGATIVE),
    "sum": (lambda x: decay(x) + decay(x.flip(0)), NEGATIVE),
    "mixed sum": (lambda x: decay(x) + x.sigmoid(), ANY),
    "difference": (lambda x: decay(x) - x.flip(0).exp(), NEGATIVE),
    "running sum": (lambda x: decay(x).cumsum(1)[:, 1:].transpose(0, 1), NEGATIVE),
    "padded": (lambda x: F.pad(decay(x), (1, 1))[..., 1:-1], NEGATIVE),
    "padded with ones": (lambda x: F.pad(decay(x), (1, 1), value=1.0)[..., 1:-1], ANY),
    "masked": (lambda x: decay(x).masked_fill(torch.ones(6, 6).tril()[:4] > 0, -math.inf), NEGATIVE),
    "joined": (lambda x: torch.cat([decay(x), -x.square()], 1), NEGATIVE),
    "joined with zeros": (lambda x: torch.cat([x.new_zeros(3, 1, 6), decay(x)], 1), NEGATIVE),
    "softplus by hand": (lambda x: torch.where(x > 20.0, x, torch.log(1.0 + torch.exp(x))), POSITIVE),
    "less its maximum": (lambda x: x - x.amax(-1, keepdim=True), NEGATIVE),
    "less a maximum of several": (
        lambda x: x + 1 - torch.maximum(x + 1, x.flip(0).max(-1, keepdim=True).values), NEGATIVE),
    "power": (lambda x: decay(x).cumprod(1), ANY),
    "power of decays": (lambda x: decay(x).exp().cumprod(1), POSITIVE),
    "sum with a factor": (lambda x: torch.add(decay(x), decay(x.flip(0)), alpha=-1), ANY),
    "softmax": (lambda x: x.softmax(-1), POSITIVE),
    "any": (lambda x: x + 1, ANY),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_sign_of_a_function(name):
    function, sign = FUNCTIONS[name]
    assert last(function) == sign


def test_a_weight_behind_an_exponential_has_a_sign():
    """Mamba's decay rates: ``A = -exp(A_log)``."""
    assert last(lambda x, a: -a.exp() * F.softplus(x), (6,)) == NEGATIVE
    assert last(lambda x, a: (-a.exp() * F.softplus(x)).exp(), (6,)) == POSITIVE
    assert last(lambda x, a: a * F.softplus(x), (6,)) == ANY


def test_two_places_of_a_running_sum_differ_by_what_lies_between():
    """Mamba-2's segment sums and the gated delta rule's decays, whose half against time is masked out."""

    def between(x):
        total = decay(x).cumsum(-1)
        pairs = total.unsqueeze(-1) - total.unsqueeze(-2)
        return pairs.masked_fill(torch.ones(6, 6).triu(1) > 0, -math.inf).exp().sum(-1)

    def to_the_end(x):
        total = decay(x).cumsum(-1)
        return total[..., -1:] - total

    assert last(to_the_end) == NEGATIVE
    staged = stage(lambda x: between(x), X)
    signs = known_signs(staged.module, rules=staged.rules)
    (difference,) = [n for n in staged.module.graph.nodes if n.target is torch.ops.aten.sub.Tensor]
    assert signs[difference] == NEGATIVE


@pytest.mark.parametrize("sign", (NEGATIVE, POSITIVE))
@pytest.mark.parametrize("function", (torch.exp, torch.tanh, torch.square), ids=lambda f: f.__name__)
def test_moments_over_half_a_line(function, sign):
    """Of ``±|z|``, against the same function of ``-|z|`` on a grid of the whole line."""
    side = 1.0 if sign is POSITIVE else -1.0
    wanted = grid_moments(lambda x: function(side * x.abs()), 0.8)
    assert gaussian_moments(function, 0.8, sign) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("size", (0.3, 1.0, 3.0))
@pytest.mark.parametrize("length", (16, 128))
def test_decays_by_running_sums_move_as_they_do(size: float, length: int):
    """Size of ``exp(-Σ)`` and its change, where all terms change independently: far entries move most and matter least.
    To a factor of 1.4 and 1.7, since a running sum is spread evenly rather than as half a Gaussian; a slope that is the
    same near and far would be 2 to 11 times too large."""
    g = torch.Generator().manual_seed(0)
    terms, changes = torch.randn(2, 2000, length, generator=g, dtype=torch.float64)
    terms = -terms.abs() * size
    decays, moved = torch.func.jvp(lambda t: t.cumsum(1).exp(), (terms,), (changes,))
    scale, slope = gaussian_moments(torch.exp, rms(terms.cumsum(1)), NEGATIVE, growing=True)
    assert 1 / 1.4 < scale / rms(decays) < 1.4
    assert 1 / 1.7 < slope / (rms(moved) / rms(changes.cumsum(1))) < 1.7


class Scan(nn.Module):
    """A linear recurrence with decay, ``h = exp(-exp(a)·softplus(dt))·h + x``: step by step, or by running sums of the
    decays' logarithms, as Mamba-2 and the gated delta rule write it."""

    def __init__(self, by_sums: bool):
        super().__init__()
        self.by_sums = by_sums
        self.into, self.dt, self.out = (nn.Linear(6, 6) for _ in range(3))
        self.a = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        logs, y, length = -self.a.exp() * F.softplus(self.dt(x)), self.into(x), x.shape[1]
        if self.by_sums:
            total = logs.cumsum(1)
            future = torch.ones(length, length).triu(1)[None, :, :, None] > 0
            between = (total[:, :, None] - total[:, None]).masked_fill(future, -math.inf)
            return self.out((between.exp() * y[:, None]).sum(2))
        h, states = torch.zeros(x.shape[0], 6), []
        for t in range(length):
            h = logs[:, t].exp() * h + y[:, t]
            states.append(h)
        return self.out(torch.stack(states, 1))


def scanned(by_sums: bool, length: int) -> dict[str, float]:
    return dict(mn.convert(Scan(by_sums), (torch.randn(2, length, 6),)).targets)


@pytest.mark.parametrize("by_sums", (False, True))
def test_targets_of_a_scan_do_not_depend_on_its_length(by_sums: bool):
    """Without the sign, every step multiplies the scale by √E exp(2s²)."""
    short, long = scanned(by_sums, 8), scanned(by_sums, 32)
    for key, target in short.items():
        assert long[key] == pytest.approx(target, rel=0.3), key


def test_a_scan_by_running_sums_has_the_targets_of_one_step_by_step():
    """To a factor of 1.6 for the decays: 8 with slopes that are the same near and far."""
    by_sums, by_steps = scanned(True, 32), scanned(False, 32)
    for key, target in by_steps.items():
        assert 1 / 1.6 < by_sums[key] / target < 1.6, key
