"""Matrices with one entry of a parameter at several places, by ``expand`` or by an index: claims against singular
values, and that every step of a training runs."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from staged import With, stage
from torch import Tensor, nn

import modnorm_fx
from modnorm_fx import ModularOptimizer
from modnorm_fx.errors import WeightError

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


G = torch.Generator().manual_seed(1)
PLACES, TAPS, ROWS_OF = (
    torch.randint(n, size, generator=G) for n, size in ((64, (16, 16)), (6, (4, 6, 3, 3)), (16, (64,)))
)
CROSS = torch.tensor([[0, 1, 0], [1, 2, 1], [0, 1, 0]])


def offsets(n: int) -> Tensor:
    return torch.arange(n)[:, None] - torch.arange(n)[None] + n - 1


#: name -> (matrix from parameter and buffer, the parameter's shape, the buffer, the layer, inputs, atom)
GATHERED = {
    "hashed": (lambda w, i: w[i], (64,), PLACES, F.linear, ROWS, "Table 64"),
    "hashed, by a number": (lambda w, i: 0.1 * w[i], (64,), PLACES, F.linear, ROWS, "Table 64"),
    "hashed, flat": (
        lambda w, i: w.index_select(0, i.view(-1)).view(16, 16), (64,), PLACES, F.linear, ROWS, "Table 64"),
    "hashed, taken": (lambda w, i: w.take(i), (64,), PLACES, F.linear, ROWS, "Table 64"),
    "hashed kernel": (lambda w, i: w[i], (6,), TAPS, conv(), IMAGE, "Table 6"),
    "Toeplitz": (lambda w, i: w[i], (31,), offsets(16), F.linear, ROWS, "Table 31"),
    "Toeplitz, computed": (lambda w, i: w[offsets(16)], (31,), PLACES, F.linear, ROWS, "Table 31"),
    "Toeplitz, product": (lambda w, i: w[i], (31,), offsets(16), torch.matmul, ROWS, "Table 31"),
    "codebook": (lambda w, i: w[i].view(16, 16), (16, 4), ROWS_OF, F.linear, ROWS, "Embedding 16×4"),
    "codebook, lookup": (
        lambda w, i: F.embedding(i, w).view(16, 16), (16, 4), ROWS_OF, F.linear, ROWS, "Embedding 16×4"),
    "taps by distance": (lambda w, i: w[:, :, i], (4, 6, 3), CROSS, conv(), IMAGE, "Conv 3 6→4"),
}  # fmt: skip


def gathering(name: str) -> tuple[Layer, Callable[[Tensor], Tensor], Tensor]:
    make, shape, index, apply, x, _ = GATHERED[name]
    model = Layer(lambda w: make(w, model.index), shape, apply)
    model.register_buffer("index", index)
    return model, lambda w: make(w, index), x


@pytest.mark.parametrize("name", GATHERED)
def test_a_matrix_of_entries_taken_by_an_index_is_measured(name: str):
    """The index is not read: places are random, each entry as often as others. Where entries really stand makes little
    difference (most in a Toeplitz matrix)."""
    model, make, x = gathering(name)
    staged = stage(model, x)
    assert staged.rewrite("computed") == {"computed": 1} and staged.error() < 1e-6
    (region,) = staged.regions()
    result = modnorm_fx.convert(model, (x,), unknown="error")
    (leaf,) = result.leaves
    assert leaf.atom.describe() == GATHERED[name][-1] and leaf.atom.shape == model.w.shape and leaf.mass == 1.0
    moved = [norm(name, make(step_of_norm_one(leaf, seed))) for seed in range(5)]
    assert sum(moved) / 5 == pytest.approx(region.facts["sensitivity"]["w0"], rel=0.3)
    result.initialize_(model, generator=torch.Generator().manual_seed(0))
    declared = math.sqrt(9) if model.matrix.dim() == 4 else 1.0
    assert norm(name, model.matrix.detach()) == pytest.approx(declared, rel=0.35)


@pytest.mark.parametrize("name", ["hashed", "codebook", "taps by distance"])
def test_steps_of_gathered_entries_have_their_size(name: str):
    """Entries of a gradient add up where an entry is used: a step is more coherent than a random one, not by much."""
    model, make, x = gathering(name)
    result = modnorm_fx.convert(model, (x,))
    optimizer = ModularOptimizer(torch.optim.AdamW(model.parameters(), weight_decay=0.0), result, lr=0.01)
    before = model.w.detach().clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert 0.003 < norm(name, make(model.w.detach() - before)) < 0.03


def test_an_index_that_depends_on_data_is_sampled_or_refused():
    """It may be any matrix: nothing is said of it without a word."""
    for apply, shape, places, x in ((F.linear, (64,), PLACES, ROWS), (F.conv2d, (6,), TAPS, IMAGE)):
        model = With(lambda s, x, i, apply=apply: apply(x, s.w[i]), w=shape)
        with pytest.raises(WeightError, match="w: an index that depends on data makes a matrix of its entries"):
            modnorm_fx.convert(model, (x, places), unknown="error")
        with pytest.warns(UserWarning, match="random inputs.*: w"):
            (leaf,) = modnorm_fx.convert(model, (x, places)).leaves
        assert leaf.status == "sampled" and leaf.atom.kind == "Scalar"


@pytest.mark.parametrize("function", [
    lambda s, x, i: F.linear(x, s.w[i]),
    lambda s, x, i: x @ s.w[i].t(),
    lambda s, x, i: x @ s.w.t()[:, i],
    lambda s, x, i: torch.einsum("bd,nd->bn", x, s.w[i]),
])  # fmt: skip
@pytest.mark.parametrize("buffer", [True, False])
def test_rows_that_are_looked_up_are_outputs_of_one_matrix(function, buffer: bool):
    """Candidates of a sampled softmax: whichever way they are written, the matrix is that of all."""
    model = With(lambda s, x, *i: function(s, x, s.i if buffer else i[0]), w=(40, 16))
    model.register_buffer("i", torch.tensor([3, 1, 7]))
    inputs = (ROWS,) if buffer else (ROWS, model.i)
    (leaf,) = modnorm_fx.convert(model, inputs, unknown="error").leaves
    (plain,) = modnorm_fx.convert(With(lambda s, x: F.linear(x, s.w), w=(40, 16)), (ROWS,)).leaves
    assert leaf.atom == plain.atom and leaf.target == plain.target


TABLES = {
    "positions": (lambda s, x: x + s.w[torch.arange(4)], (40, 16), "Table"),
    "relative positions": (lambda s, x: (x @ x.mT + s.w[offsets(4)]).softmax(-1) @ x, (7,), "LogitBias"),
    "bias of groups": (lambda s, x: F.linear(x, torch.eye(16), s.w[torch.arange(16) // 4]), (4,), "Bias"),
    "gains of groups": (lambda s, x: F.layer_norm(x, (16,), s.w[torch.arange(16) // 4]), (4,), "Gain"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_are_no_matrices_stay_what_they_are(name: str):
    function, shape, kind = TABLES[name]
    staged = stage(With(function, w=shape), ROWS)
    assert staged.rewrite("computed") == {"computed": 0}
    assert staged.typed()["w"].uses[0][2].kind == kind
