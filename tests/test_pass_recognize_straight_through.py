"""Straight-through estimators as one call: where it fires, that it keeps the numbers, and what it is for."""

import pytest
import torch
from staged import stage
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
