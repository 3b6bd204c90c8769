"""Matrices with one entry of a parameter at several places, by ``expand``: claims against singular values, and that
every step of a training runs."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from staged import With, stage
from torch import Tensor, nn

import modnorm_fx
from modnorm_fx import ModularOptimizer

ROWS = torch.randn(4, 16)
IMAGE, SERIES = torch.randn(2, 6, 8, 8), torch.randn(2, 6, 12)


class Layer(nn.Module):
    """``apply(x, matrix)`` for a matrix that is made of one parameter, and a head."""

    def __init__(self, make: Callable[[Tensor], Tensor], shape: tuple[int, ...], apply: Callable[..., Tensor]):
        super().__init__()
        self.make, self.apply_matrix = make, apply
        self.w = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))

    @property
    def matrix(self) -> Tensor:
        return self.make(self.w)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_matrix(x, self.matrix)


def conv(**options) -> Callable[..., Tensor]:
    """A convolution of as many axes as its kernel has."""
    return lambda x, k: {3: F.conv1d, 4: F.conv2d}[k.dim()](x, k, **options)


def transposed(x: Tensor, k: Tensor) -> Tensor:
    return F.conv_transpose2d(x, k, groups=6)


#: name -> (matrix from parameter, the parameter's shape, the layer, inputs, atom)
EXPANDED = {
    "filter of all channels": (lambda w: w.expand(6, 1, 3, 3), (1, 1, 3, 3), conv(groups=6), IMAGE, "Conv 3×3 1→1"),
    "filter of two axes": (
        lambda w: w[None, None].expand(6, 1, 3, 3), (3, 3), conv(groups=6, padding=1), IMAGE, "Conv 3×3 1→1"),
    "filter times a number": (
        lambda w: (0.5 * w).expand(6, 1, 3, 3), (1, 1, 3, 3), conv(groups=6), IMAGE, "Conv 3×3 1→1"),
    "average per channel": (
        lambda w: w[:, None, None].expand(-1, 1, 3), (6,), conv(groups=6), SERIES, "Conv 1 6→6 /6"),
    "filter of a transposed convolution": (
        lambda w: w.expand(6, 1, 2, 2), (1, 1, 2, 2), transposed, IMAGE, "Conv 2×2 1→1 transposed"),
    "one output of a convolution": (lambda w: w.expand(4, 6, 3, 3), (1, 6, 3, 3), conv(), IMAGE, "Conv 3×3 6→1"),
    "all taps alike": (lambda w: w.expand(4, 6, 3, 3), (4, 6, 1, 1), conv(), IMAGE, "Conv 1×1 6→4"),
    "one output": (lambda w: w.expand(8, 16), (1, 16), F.linear, ROWS, "Linear 16→1"),
    "one input": (lambda w: w.expand(8, 16), (8, 1), F.linear, ROWS, "Linear 1→8"),
    "one number": (lambda w: w.expand(8, 16), (1,), F.linear, ROWS, "Linear 1→1"),
    "rows of a product": (lambda w: w.expand(16, 8), (16, 1), torch.matmul, ROWS, "Linear 16→1"),
}  # fmt: skip


def norm(name: str, matrix: Tensor) -> float:
    """Operator norm between RMS norms: the largest tap times the number of taps, from singular values."""
    if matrix.dim() == 2:
        out, into = matrix.shape if "product" not in name else matrix.shape[::-1]
        return math.sqrt(into / out) * float(torch.linalg.matrix_norm(matrix, 2))
    out, into = (1, 1) if matrix.shape[1] == 1 else matrix.shape[:2]
    taps = matrix.reshape(-1, out, into, matrix[0, 0].numel()).permute(0, 3, 1, 2)
    return matrix[0, 0].numel() * math.sqrt(into / out) * float(torch.linalg.matrix_norm(taps, 2).max())


def step_of_norm_one(leaf, seed: int) -> Tensor:
    step = torch.randn(leaf.atom.shape, generator=torch.Generator().manual_seed(seed))
    leaf.atom.dualize_(step, 1.0)
    return step


@pytest.mark.parametrize("name", EXPANDED)
def test_a_repeated_weight_counts_as_the_matrix_that_it_makes(name: str):
    make, shape, apply, x, atom = EXPANDED[name]
    model = Layer(make, shape, apply)
    staged = stage(model, x)
    assert staged.rewrite("computed") == {"computed": 1} and staged.error() < 1e-6
    (region,) = staged.regions()
    result = modnorm_fx.convert(model, (x,), unknown="error")
    (leaf,) = result.leaves
    assert leaf.atom.describe() == atom and leaf.atom.shape == shape
    claim, moved = region.facts["sensitivity"]["w0"], []
    for seed in range(3):
        moved.append(norm(name, make(step_of_norm_one(leaf, seed))))  # the map is linear
    assert sum(moved) / 3 == pytest.approx(claim, rel=0.05)
    result.initialize_(model, generator=torch.Generator().manual_seed(0))
    declared = math.sqrt(model.matrix[0, 0].numel()) if model.matrix.dim() > 2 and model.matrix.shape[1] > 1 else 1.0
    assert norm(name, model.matrix.detach()) == pytest.approx(declared, rel=0.05)


@pytest.mark.parametrize("name", EXPANDED)
def test_steps_of_a_repeated_weight_have_their_size(name: str):
    make, shape, apply, x, _ = EXPANDED[name]
    model = Layer(make, shape, apply)
    result = modnorm_fx.convert(model, (x,))
    optimizer = ModularOptimizer(torch.optim.AdamW(model.parameters(), weight_decay=0.0), result, lr=0.01)
    before = model.w.detach().clone()
    model(x).square().sum().backward()
    optimizer.step()
    (leaf,) = result.leaves
    step = norm(name, make(model.w.detach() - before))
    assert step == pytest.approx(0.01 * leaf.target * norm(name, make(step_of_norm_one(leaf, 0))), rel=0.05)
    model.zero_grad()
    model(x).square().sum().backward()
    ModularOptimizer(torch.optim.AdamW(model.parameters(), weight_decay=0.0), result, mode="dualize").step()
    assert bool(model.w.isfinite().all())


def test_a_weight_repeated_for_a_batch_is_that_weight():
    """A product with a matrix for each of a batch is no other matrix."""
    model = With(lambda s, x: torch.bmm(x.expand(3, -1, -1), s.w.expand(3, -1, -1)).sum(0), w=(1, 16, 8))
    staged = stage(model, ROWS)
    assert staged.rewrite("computed") == {"computed": 0}
    assert staged.typed()["w"].uses[0][2].describe() == "Experts 1× 16→8"
