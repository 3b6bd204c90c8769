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


class Scan(nn.Module):
    """A linear recurrence with decay, step by step: ``h = exp(-exp(a)·softplus(dt))·h + x``."""

    def __init__(self):
        super().__init__()
        self.into, self.dt, self.a, self.out = (
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Parameter(torch.zeros(6)),
            nn.Linear(6, 6),
        )

    def forward(self, x):
        decays = torch.exp(-self.a.exp() * F.softplus(self.dt(x)))
        y, h, states = self.into(x), torch.zeros(x.shape[0], 6), []
        for t in range(x.shape[1]):
            h = decays[:, t] * h + y[:, t]
            states.append(h)
        return self.out(torch.stack(states, 1))


def test_targets_of_a_scan_do_not_depend_on_its_length():
    """Without the sign, every step multiplies the scale by √E exp(2s²)."""
    targets = [mn.convert(Scan(), (torch.randn(2, length, 6),)).targets for length in (8, 32)]
    for key, target in targets[0].items():
        assert targets[1][key] == pytest.approx(target, rel=0.3), key
