"""The rules of recurrent layers against torch's own layers, with semi-orthogonal weights of norm 1 per gate.

Jacobians are those of ``nn.LSTM`` and the like on random inputs: ``√(E‖J‖²/n_y)``, by random cotangents.
"""

import math

import pytest
import torch
from op_calls import Example, T, W, build
from torch import nn

import modnorm_fx as mn
from modnorm_fx import ATEN

aten = torch.ops.aten
HIDDEN, INTO, BATCH, DRAWS = 32, 24, 3, 4
#: what "typical" may be off by; a bias, and the smooth output of a layer below, change slowly and add up over time
FACTOR, SLOW = 1.5, 2.0


def layer(kind: str, **options) -> nn.Module:
    """Of double precision, every gate's matrix of norm 1, biases zero."""
    torch.manual_seed(0)
    module = getattr(nn, kind)(INTO, HIDDEN, **options).double()
    redraw(module, torch.Generator().manual_seed(0))
    return module


def redraw(module: nn.Module, g: torch.Generator) -> None:
    for name, p in module.named_parameters():
        with torch.no_grad():
            p.copy_(unit(name, p, g) if p.dim() > 1 else torch.zeros_like(p))


def unit(name: str, p: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """A random weight of norm 1 in every gate."""
    gates = 1 if "_hr_" in name else p.shape[0] // HIDDEN
    if p.dim() == 1:
        x = torch.randn(gates, p.shape[0] // gates, generator=g, dtype=p.dtype)
        return (x / x.square().mean(-1, keepdim=True).sqrt()).flatten()
    return torch.cat([W("linear", (p.shape[0] // gates, p.shape[1])).sample(g) for _ in range(gates)])


def claim(kind: str, module: nn.Module, length: int, scale: float):
    """What the rule says of the module, on an input of this scale and zero first states."""
    rows = (2 if module.bidirectional else 1) * module.num_layers
    x = T((length, BATCH, INTO), scale)
    states = [T((rows, BATCH, n), 0.0) for n in (module.proj_size or HIDDEN, HIDDEN)[: 2 if kind == "LSTM" else 1]]
    params = [W("bias" if p.dim() == 1 else "gates", tuple(p.shape), groups=max(p.shape[0] // HIDDEN, 1))
              for p in module.parameters()]  # fmt: skip
    name = {"LSTM": "lstm", "GRU": "gru"}.get(kind) or f"rnn_{module.nonlinearity}"
    op = getattr(aten, name).input
    rest = (module.bias, module.num_layers, 0.0, False, module.bidirectional, False)
    call, _ = build(op, Example((x, states if len(states) > 1 else states[0], params, *rest)))
    return ATEN[op].function(call)


def measured(kind: str, module: nn.Module, length: int, scale: float):
    """RMS of the output, √(E‖J‖²/n_y) for input and first states, and the RMS of the change per unit of each weight."""
    g = torch.Generator().manual_seed(1)
    out, into, moves = 0.0, [], {}
    rows = (2 if module.bidirectional else 1) * module.num_layers
    for _ in range(DRAWS):
        redraw(module, g)
        x = scale * torch.randn(length, BATCH, INTO, generator=g, dtype=torch.double)
        states = tuple(torch.zeros(rows, BATCH, n, dtype=torch.double) for n in (module.proj_size or HIDDEN, HIDDEN))
        states = states if kind == "LSTM" else states[:1]
        leaves = [t.requires_grad_() for t in (x, *states)]
        run = lambda: module(x, states if kind == "LSTM" else states[0])[0]  # noqa: B023, E731
        y = run()
        cotangent = torch.randn(y.shape, generator=g, dtype=y.dtype)
        slopes = torch.autograd.grad(y, leaves, cotangent)
        out += float(y.detach().square().mean()) / DRAWS
        into.append([float(s.square().sum()) / y.numel() for s in slopes])
        for name, p in module.named_parameters():
            with torch.no_grad():
                step, eps = unit(name, p, g), 1e-4
                p.add_(eps * step)
                change = (run() - y) / eps
                p.sub_(eps * step)
                moves[name] = moves.get(name, 0.0) + float(change.square().mean()) / DRAWS
    squares = torch.tensor(into).mean(0)
    return math.sqrt(out), squares.sqrt().tolist(), {name: math.sqrt(v) for name, v in moves.items()}


def near(said: float, found: float, factor: float = FACTOR) -> bool:
    return found / factor <= said <= found * factor if found > 1e-9 else said < 1e-9


LAYERS = [
    ("LSTM", {}),
    ("LSTM", {"bidirectional": True}),
    ("LSTM", {"proj_size": 24, "bias": False}),
    ("LSTM", {"num_layers": 2}),
    ("GRU", {}),
    ("GRU", {"num_layers": 2}),
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu", "bidirectional": True}),
]


@pytest.mark.parametrize("length", (1, 8, 64))
@pytest.mark.parametrize("kind, options", LAYERS, ids=str)
def test_claims_hold_on_real_layers(kind, options, length):
    module = layer(kind, **options)
    factor = SLOW if module.num_layers > 1 else FACTOR
    for scale in (0.5, 2.0):
        said = claim(kind, module, length, scale)
        found, slopes, moves = measured(kind, module, length, scale)
        states = said.sensitivity["hx"]
        assert near(said.scale, found, factor), (said.scale, found)
        for value, slope in zip(
            [said.of(("input", None)), *(states if isinstance(states, list) else [states])], slopes, strict=True
        ):
            assert near(value, slope, factor), (scale, value, slope)
        for value, (name, move) in zip(said.sensitivity["params"], moves.items(), strict=True):
            slow = SLOW**module.num_layers if "bias" in name else factor
            assert near(value, move, slow), (scale, name, value, move)


def test_a_long_sequence_costs_no_more_than_a_short_one_and_says_the_same():
    module = layer("LSTM")
    short, long = claim("LSTM", module, 512, 1.0), claim("LSTM", module, 4096, 1.0)
    assert short.sensitivity["params"] == pytest.approx(long.sensitivity["params"], rel=1e-2)


# End to end: atoms and numbers of converted models -------------------------------------------------------------------


class Reads(nn.Module):
    """A layer between two matrices, on padded or packed sequences."""

    def __init__(self, rnn: nn.Module, packed: bool = False):
        super().__init__()
        self.into, self.rnn, self.packed = nn.Linear(6, INTO), rnn, packed
        width = (rnn.proj_size or rnn.hidden_size) * (2 if rnn.bidirectional else 1)
        self.out = nn.Linear(width, 5)

    def forward(self, x, lengths=None):
        x = self.into(x)
        if self.packed:
            x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=self.rnn.batch_first)
        y = self.rnn(x)[0]
        if self.packed:
            y = nn.utils.rnn.pad_packed_sequence(y, batch_first=self.rnn.batch_first)[0]
        return self.out(y)


def atoms(norm) -> dict[str, str]:
    assert not [leaf.key for leaf in norm.leaves if leaf.status == "sampled"]
    return {leaf.key.removeprefix("rnn."): leaf.atom.describe() for leaf in norm.leaves if leaf.key.startswith("rnn.")}


def test_every_gate_is_a_matrix_of_its_own():
    rnn = nn.LSTM(INTO, HIDDEN, num_layers=2, proj_size=8, bidirectional=True, dropout=0.1, batch_first=True)
    found = atoms(mn.convert(Reads(rnn), (torch.randn(2, 7, 6),)))
    assert len(found) == len(list(rnn.parameters()))
    assert found["weight_ih_l0"] == "Gates 4× 24→32" and found["weight_hh_l0"] == "Gates 4× 8→32"
    assert found["weight_hr_l0"] == "Linear 32→8" and found["weight_ih_l1_reverse"] == "Gates 4× 16→32"
    assert found["bias_hh_l1"] == "Bias 4× 32"


def test_an_rnn_is_plain_matrices_and_a_gru_has_three_gates():
    found = atoms(mn.convert(Reads(nn.RNN(INTO, HIDDEN, nonlinearity="relu")), (torch.randn(7, 2, 6),)))
    assert list(found.values()) == ["Linear 24→32", "Linear 32→32", "Bias 32", "Bias 32"]
    found = atoms(mn.convert(Reads(nn.GRU(INTO, HIDDEN)), (torch.randn(7, 2, 6),)))
    assert list(found.values()) == ["Gates 3× 24→32", "Gates 3× 32→32", "Bias 3× 32", "Bias 3× 32"]


@pytest.mark.parametrize("kind", ("LSTM", "GRU", "RNN"))
def test_packed_sequences_have_the_numbers_of_padded_ones(kind):
    torch.manual_seed(0)
    rnn = getattr(nn, kind)(INTO, HIDDEN, batch_first=True)
    x, lengths = torch.randn(2, 7, 6), torch.tensor([7, 7])
    padded, packed = mn.convert(Reads(rnn), (x,)), mn.convert(Reads(rnn, packed=True), (x, lengths))
    assert atoms(packed) == atoms(padded)
    assert packed.targets == pytest.approx(padded.targets, rel=1e-6)
