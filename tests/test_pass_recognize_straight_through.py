"""Straight-through estimators as one call: where it fires, that it keeps the numbers, and what it is for."""

import pytest
import torch
import torch.nn.functional as F
from staged import With, stage
from torch import Tensor, nn

import modnorm_fx as mn
from modnorm_fx.regions import Region

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


def one_hot(x: Tensor) -> Tensor:
    return torch.zeros_like(x).scatter(-1, x.argmax(-1, keepdim=True), 1.0)


def found(function, *args: Tensor) -> int:
    staged = stage(function, *(args or (X,)))
    staged.rewrite("straight_through")
    assert staged.error() < 1e-6
    return sum(isinstance(r, Region) and r.kind == "straight_through" for r in staged.regions())


FIRES = {
    "rounded": lambda x: x + (x.round() - x).detach(),
    "the other way round": lambda x: (x.round() - x).detach() + x,
    "gumbel": lambda x: one_hot(p := x.softmax(-1)) - p.detach() + p,
    "gumbel, the other way round": lambda x: (p := x.softmax(-1)) + (one_hot(p) - p.detach()),
    "detached at the end": lambda x: (x + x.round()) - x.detach(),
    "cast": lambda x: x + (x.double().round() - x.double()).float().detach(),
}
LEAVES = {
    "no detach": lambda x: x + (x.round() - x),
    "a part": lambda x: x + 0.5 * (x.round() - x).detach(),
    "another": lambda x: x + (x.round() - 2 * x).detach(),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str):
    assert found(FIRES[name]) == 1


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_others_alone(name: str):
    assert found(LEAVES[name]) == 0


def test_several_in_a_row_with_several_users():
    def residual_quantiser(x: Tensor) -> Tensor:
        total, rest = torch.zeros_like(x), x
        for _ in range(3):
            code = rest + (rest.round() - rest).detach()
            total, rest = total + code, rest - code
        return total

    assert found(residual_quantiser) == 3


class Quantised(nn.Module):
    """Vector-quantised autoencoder: codes are rows of a codebook, gradients pass to the encoder."""

    def __init__(self, width: int = 32, codes: int = 16, steps: int = 1, size: float = 1.0):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.codebook, self.steps, self.size = nn.Embedding(codes, width), steps, size

    def quantise(self, z: Tensor) -> Tensor:
        q = self.codebook(torch.cdist(z, self.codebook.weight).argmin(-1))
        return z + (q - z).detach()

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x) * self.size
        for _ in range(self.steps):
            z = self.quantise(z)
        return self.decoder(z)


@pytest.mark.parametrize("size", (1.0, 30.0))
def test_the_output_is_as_large_as_the_code_and_moves_with_it(size: float):
    """Measured: the decoder's input is a row of the codebook, however large z is; a codebook that moves moves it."""
    net = Quantised(size=size)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    norm = mn.convert(net, (x,))
    norm.initialize_(net, torch.Generator().manual_seed(0))
    leaves = {leaf.weight: leaf for leaf in norm.leaves}
    z = net.quantise(net.encoder(x) * size)
    assert leaves["decoder.weight"].scale == pytest.approx(float(z.detach().square().mean().sqrt()), rel=0.1)
    step = torch.randn(net.codebook.weight.shape, generator=torch.Generator().manual_seed(1)) * 1e-4
    with torch.no_grad():
        before = net(x)
        net.codebook.weight += step
        moved = (net(x) - before).square().mean().sqrt() / before.square().mean().sqrt()
    leaf = leaves["codebook.weight"]
    predicted = leaf.sensitivity * leaf.scale * float(leaf.atom.norm(step))
    assert float(moved) == pytest.approx(predicted, rel=0.6)
    assert leaves["encoder.weight"].sensitivity * leaves["encoder.weight"].scale == pytest.approx(1.0, rel=1e-6)


def test_quantising_again_changes_nothing():
    one, many = (mn.convert(Quantised(steps=n), (torch.randn(8, 32),)) for n in (1, 5))
    assert many.targets["encoder.weight"] == pytest.approx(one.targets["encoder.weight"], rel=1e-6)


# --- quantised weights ----------------------------------------------------------------------------------------------


def straight(x: Tensor, q: Tensor) -> Tensor:
    return x + (q - x).detach()


def ternary(w: Tensor) -> Tensor:
    """BitNet b1.58, as published."""
    scale = 1.0 / w.abs().mean().clamp(min=1e-5)
    return straight(w, (w * scale).round().clamp(-1, 1) / scale)


def int8(w: Tensor) -> Tensor:
    step = w.abs().amax(1, keepdim=True) / 127
    return straight(w, (w / step).round().clamp(-128, 127).to(torch.int8).float() * step)


STEPS, ZEROS = torch.full((24,), 0.05), torch.zeros(24, dtype=torch.int32)
WEIGHTS = {
    "ternary": ternary,
    "integers": int8,
    "signs": lambda w: straight(w, w.sign()),
    "a fine grid": lambda w: straight(w, (w * 64).round() / 64),
    "a coarse grid": lambda w: straight(w, w.round()),  # of norm 1 all entries are rounded to zero
    "an op": lambda w: torch.fake_quantize_per_tensor_affine(w, 1 / 64, 0, -128, 127),
    "an op, per row": lambda w: torch.fake_quantize_per_channel_affine(w, STEPS, ZEROS, 0, -128, 127),
    "an observer": torch.ao.quantization.FakeQuantize(
        torch.ao.quantization.MovingAverageMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_quantised_weight_has_the_norm_of_the_weight(name: str):
    """The rounding is not differentiated: its slope is that of where the steps of a grid happen to be."""
    rows = torch.randn(4, 32)

    def converted(make):
        model = With(lambda s, x: F.linear(torch.relu(F.linear(x, s.make(s.w))), s.v), w=(24, 32), v=(8, 24), make=make)
        return {leaf.key: leaf for leaf in mn.convert(model, (rows,), unknown="error").leaves}

    found, plain = converted(WEIGHTS[name]), converted(lambda w: w)
    assert found["w"].atom == plain["w"].atom
    for key in "wv":
        assert found[key].target == pytest.approx(plain[key].target, rel=1e-3)
        assert found[key].initial == pytest.approx(plain[key].initial, rel=1e-3)


def test_a_learned_step_of_the_grid_moves_the_matrix_as_its_gradient_says():
    """LSQ: only by rounding does the step change the matrix. Held against forward differentiation at the same point."""

    def quantised(w: Tensor, s: Tensor) -> Tensor:
        return straight(w / s, (w / s).round().clamp(-8, 7)) * s

    model = With(lambda s, x: F.linear(x, quantised(s.w, s.step)), w=(24, 32), step=(1,))
    staged = stage(model, torch.randn(4, 32))
    assert staged.rewrite("computed") == {"computed": 1}
    (region,) = staged.regions()
    by_size = dict(zip((tuple(n.meta["val"].shape) for n in region.body.graph.nodes), region.inputs, strict=False))
    (leaf,) = (n for n in mn.convert(model, (torch.randn(4, 32),), unknown="error").leaves if n.key == "w")
    w = torch.empty(24, 32)
    leaf.atom.initialize_(w, 1.0, torch.Generator().manual_seed(0))
    one = torch.ones(1)
    moved = torch.zeros_like(w)
    for i, j in torch.cartesian_prod(torch.arange(24), torch.arange(32)).tolist():
        moved[i, j] = torch.autograd.grad(quantised(w, at := one.clone().requires_grad_())[i, j], at)[0]
    assert region.facts["sensitivity"][by_size[1,]] == pytest.approx(float(leaf.atom.norm(moved)), rel=0.1)
