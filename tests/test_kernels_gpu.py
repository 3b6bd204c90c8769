"""The Triton kernels against float64 on the CPU, in Triton's interpreter, and through the compiler for Hopper.

The interpreter is chosen by an environment variable before triton is first imported, which torch may already have done
here. So the tests proper, named `check_…`, run in a second pytest that a test of this one starts on the same file; as
do those named `hopper_…`, which need the compiler instead. To run one: `TRITON_INTERPRET=1 pytest -o
python_functions=check_* tests/test_kernels_gpu.py -k name`.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

torch.set_num_threads(1)  # the tensors are tiny

ROOT = Path(__file__).resolve().parent.parent
HALVES = (torch.bfloat16, torch.float16)
SECONDS = 600


def inner_run(prefix: str, **environment: str) -> None:
    """Runs the functions of this file whose names start with `prefix` in a pytest of their own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "-o", f"python_functions={prefix}_*", str(Path(__file__).resolve())],
        cwd=ROOT, env=clean | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    wanted = {name for name in globals() if name.startswith(f"{prefix}_")}
    passed = {line.split("::")[1].partition("[")[0] for line in done.stdout.splitlines() if line.startswith("PASSED")}
    assert passed == wanted, "some did not run"


def test_the_kernels_in_the_interpreter() -> None:
    inner_run("check", TRITON_INTERPRET="1")


def test_the_kernels_compile_for_hopper(tmp_path: Path) -> None:
    inner_run("hopper", TRITON_CACHE_DIR=str(tmp_path))


@pytest.fixture
def gpu() -> ModuleType:
    from modnorm_fx.kernels import gpu

    return gpu


@pytest.fixture
def fused() -> ModuleType:
    from modnorm_fx.kernels import gpu_adamw

    return gpu_adamw


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def products(w: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    v = u.double() @ w.double().mT
    return v, v @ w.double()


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 3e-6) -> None:
    """Largest error against the largest entry, as for sums that cancel."""
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


# Power products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (2, 70, 200, 8), (3, 5, 5000, 3), (1, 300, 1, 8), (5, 1, 37, 1), (1, 129, 130, 7), (140, 3, 5, 2)],
    ids=str,
)
def check_power_products(gpu, shape):
    pieces, rows, columns, count = shape
    w, u = normal(pieces, rows, columns), normal(pieces, count, columns, seed=1)
    squares = torch.empty(pieces, rows)
    found = gpu.power_products(w, u, squares)
    for one, wanted in zip(found, products(w, u), strict=True):
        close(one, wanted)
    close(squares, w.double().square().sum(-1))


@given(st.integers(1, 3), st.integers(1, 90), st.integers(1, 150), st.integers(1, 8), st.integers(1, 4))
@settings(max_examples=15, deadline=None, database=None)
def check_power_products_of_any_shape(pieces, rows, columns, count, programs):
    from modnorm_fx.kernels import gpu

    w, u = normal(pieces, rows, columns), normal(pieces, count, columns, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "MULTIPROCESSORS", programs)
        found = gpu.power_products(w, u)
    for one, wanted in zip(found, products(w, u), strict=True):
        close(one, wanted)


@pytest.mark.parametrize("programs", [1, 2, 3])
def check_programs_that_loop_over_row_blocks(gpu, monkeypatch, programs):
    monkeypatch.setattr(gpu, "MULTIPROCESSORS", programs)
    w, u = normal(2, 333, 70), normal(2, 8, 70, seed=1)
    squares = torch.empty(2, 333)
    for one, wanted in zip(gpu.power_products(w, u, squares), products(w, u), strict=True):
        close(one, wanted)
    close(squares, w.double().square().sum(-1))


@pytest.mark.parametrize("dtype", HALVES)
def check_power_products_of_half_precision_are_summed_in_single(gpu, dtype):
    w, u = normal(2, 40, 300).to(dtype), normal(2, 8, 300, seed=1)
    for one, wanted in zip(gpu.power_products(w, u), products(w, u), strict=True):
        close(one, wanted)


def check_power_products_of_views(gpu):
    packed = normal(3, 20, 300)
    same = packed[:1].expand(4, 20, 300)
    for w in (packed[:, :, 100:237], packed.transpose(0, 1), same, packed[::2, 1::3], packed.mT):
        u = normal(w.shape[0], 4, w.shape[2], seed=1)
        for one, wanted in zip(gpu.power_products(w, u), products(w, u), strict=True):
            close(one, wanted)
    assert torch.equal(packed, normal(3, 20, 300))


def check_power_products_are_the_same_twice(gpu):
    w, u = normal(2, 200, 333), normal(2, 8, 333, seed=1)
    for one, two in zip(gpu.power_products(w, u), gpu.power_products(w.clone(), u.clone()), strict=True):
        assert torch.equal(one, two)


def check_power_products_of_nonfinite_matrices(gpu):
    w, u = normal(3, 20, 150), normal(3, 8, 150, seed=1)
    w[1, 2, 3], w[2, 4, 140] = torch.nan, torch.inf
    v, z = gpu.power_products(w, u)
    assert v[0].isfinite().all() and z[0].isfinite().all()
    assert v[1, :, 2].isnan().all() and v[1].isnan().sum() == 8 and z[1].isnan().all()
    assert v[2, :, 4].isinf().all() and not z[2].isfinite().any()


def check_too_many_vectors_are_refused(gpu):
    with pytest.raises(ValueError, match="9 power vectors"):
        gpu.power_products(normal(1, 20, 20), normal(1, 9, 20))


def check_every_row_is_in_one_part_and_blocks_fit_the_cache(gpu):
    heights = {}
    for pieces in (1, 2, 12, 131, 132, 500):
        for rows in (1, 15, 16, 17, 64, 65, 1000, 4096, 50257):
            for columns in (1, 64, 65, 768, 882, 883, 1588, 1589, 2647, 2648, 50000):
                how = gpu.split(pieces, rows, columns, 4 * columns)
                assert how.each % how.rows == 0
                assert (how.parts - 1) * how.each < rows <= how.parts * how.each
                assert how.parts * pieces < gpu.MULTIPROCESSORS + pieces
                if rows >= 64:
                    heights[columns] = how.rows
    assert [heights[c] for c in (882, 883, 1588, 1589, 2647, 2648)] == [64, 32, 32, 16, 16, 64]


# Reductions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 1), (2, 1, 9001), (2, 5, 5000), (4, 70, 33), (1, 300, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def check_row_rms(gpu, shape, dtype):
    x = normal(*shape).to(dtype)
    wanted = torch.linalg.vector_norm(x.double(), dim=-1) / shape[-1] ** 0.5
    torch.testing.assert_close(gpu.row_rms(x).double(), wanted, rtol=2e-6, atol=0.0)


def check_row_rms_of_views_and_nonfinite_rows(gpu):
    whole = normal(3, 20, 60)
    whole[1, 2, 30], whole[2, 3, 31] = torch.nan, torch.inf
    for x in (whole[:, :, 20:37], whole.transpose(0, 1), whole.mT):
        wanted = torch.linalg.vector_norm(x.double(), dim=-1) / x.shape[-1] ** 0.5
        torch.testing.assert_close(gpu.row_rms(x).double(), wanted, rtol=2e-6, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("entries", [1, 5, 4096, 4097, 30001])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def check_max_abs_is_exact(gpu, entries, dtype):
    x = normal(3, entries).to(dtype)
    x[1] = 0.0
    assert torch.equal(gpu.max_abs(x), x.float().abs().amax(1))


def check_max_abs_lets_nan_and_infinity_through(gpu):
    x = normal(6, 9000)
    x[0, 8999], x[1, 0], x[2, 5000], x[3, 4] = torch.nan, -torch.inf, torch.inf, -torch.nan
    x[2, 100] = torch.nan
    x[4] = 1e-42  # below the smallest normal number
    found = gpu.max_abs(x)
    torch.testing.assert_close(found, x.abs().amax(1), rtol=0.0, atol=0.0, equal_nan=True)
    assert found.isnan().tolist() == [True, False, True, True, False, False]
    assert torch.equal(gpu.max_abs(x[4:, 10:50]), x[4:, 10:50].abs().amax(1))


# Applying an update ---------------------------------------------------------------------------------------------------

BROADCASTS = [(1, 1, 1, 1), (3, 1, 1, 1), (3, 4, 1, 1), (4, 1, 1), (3, 1, 1, 6), (3, 1, 5, 1), (3, 4, 5, 6), (6,), ()]


@pytest.mark.parametrize("factor", BROADCASTS, ids=str)
@pytest.mark.parametrize("decay", [None, (3, 1, 1, 1), (3, 4, 1, 1), (1, 1, 1, 6)], ids=str)
def check_scale_apply(gpu, factor, decay):
    params, update = list(normal(3, 4, 5, 6)), normal(3, 4, 5, 6, seed=1)
    by = normal(*factor, 2, seed=2)[..., 1]  # with strides of its own
    kept = None if decay is None else normal(*decay, 3, seed=3)[..., 1]
    wanted = torch.stack(params).double() * (1.0 if kept is None else kept.double()) + by.double() * update.double()
    versions = [p._version for p in params]
    gpu.scale_apply_(params, update, by, kept)
    torch.testing.assert_close(torch.stack(params).double(), wanted, rtol=3e-7, atol=3e-7)
    assert all(p._version > before for p, before in zip(params, versions, strict=True))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2100,), (3, 0), (70, 33), (1, 1030), (2, 3, 4, 5)], ids=str)
def check_scale_apply_to_any_shape(gpu, shape):
    params, update = list(normal(2, *shape)), normal(2, *shape, seed=1)
    by, kept = normal(2, *shape[:1], *(1 for _ in shape[1:]), seed=2), torch.full((2, *(1 for _ in shape)), 0.5)
    wanted = torch.stack(params) * 0.5 + by * update
    gpu.scale_apply_(params, update, by, kept, table=gpu.pointer_table(params))
    torch.testing.assert_close(torch.stack(params), wanted, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("update_dtype", [torch.float32, torch.bfloat16, torch.float16])
def check_scale_apply_in_half_precision_rounds_once(gpu, dtype, update_dtype):
    params, update = list(normal(3, 40, 30).to(dtype)), normal(3, 40, 30, seed=1).to(update_dtype)
    by = normal(3, 40, 1, seed=2)
    exact = torch.stack(params).double() * 0.9 + by.double() * update.double()
    gpu.scale_apply_(params, update, by, torch.full((1, 1, 1), 0.9))
    # The interpreter cuts float32 off to bfloat16 where a GPU rounds (hopper_apply_kernels looks for the rounding).
    unit = torch.finfo(dtype).eps * (1.0 if dtype == torch.bfloat16 else 0.5)
    assert ((torch.stack(params).double() - exact).abs() <= unit * exact.abs() * 1.001 + 1e-6).all()


def check_scale_apply_leaves_the_neighbours_alone(gpu):
    whole = normal(3, 50, 31)
    before = whole.clone()
    params = [whole[i, 10:20] for i in range(3)]  # contiguous, and not at multiples of 16 bytes
    gpu.scale_apply_(params, normal(3, 10, 31, seed=1), torch.ones(3, 1, 1))
    torch.testing.assert_close(whole[:, 10:20], before[:, 10:20] + normal(3, 10, 31, seed=1))
    whole[:, 10:20] = before[:, 10:20]
    assert torch.equal(whole, before)


def check_scale_apply_refuses_what_it_would_get_wrong(gpu):
    update, ones = normal(2, 4, 6), torch.ones(2, 1, 1)
    with pytest.raises(ValueError, match="contiguous"):
        gpu.scale_apply_([normal(6, 4).T, normal(4, 6)], update, ones)
    with pytest.raises(ValueError, match="one shape"):
        gpu.scale_apply_([normal(4, 6), normal(6, 4)], update, ones)
    with pytest.raises(ValueError, match="does not broadcast"):
        gpu.scale_apply_(list(normal(2, 4, 6)), update, torch.ones(3, 2, 1, 1))


def check_scale_apply_makes_nonfinite_weights_visible(gpu):
    params, by = list(normal(2, 4, 6)), torch.ones(2, 4, 1)
    by[1, 2] = torch.nan
    gpu.scale_apply_(params, normal(2, 4, 6, seed=1), by)
    assert torch.stack(params).isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[1, 2]]


def check_what_the_kernels_take(gpu):
    assert gpu.takes(normal(2), torch.nn.Parameter(normal(3)), normal(2).bfloat16())
    assert not gpu.takes(normal(2).double()) and not gpu.takes(torch.empty(2, device="meta"))


# AdamW ----------------------------------------------------------------------------------------------------------------


class Reference:
    """`torch.optim.AdamW` with lr 1 on zeros: the weights after a step are its update."""

    def __init__(self, shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32, **options: object):
        self.params = [torch.zeros(shape, dtype=dtype) for _ in range(count)]
        self.adam = torch.optim.AdamW(self.params, lr=1.0, weight_decay=0.0, **options)

    def step(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        for p, g in zip(self.params, gradients, strict=True):
            p.zero_()
            p.grad = g.clone()
        self.adam.step()
        return torch.stack(self.params)

    def state(self, key: str) -> torch.Tensor:
        return torch.stack([self.adam.state[p][key] for p in self.params])


@pytest.mark.parametrize("shape", [(20, 50), (1, 300), (70, 1), (2, 37, 130), (3, 1500)], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def check_adamw_follows_torch_for_three_steps(fused, shape, maximize):
    options = {"betas": (0.8, 0.95), "eps": 1e-6, "maximize": maximize}
    reference = Reference(shape, 2, **options)
    averages, squares, params = ([torch.zeros(shape) for _ in range(2)] for _ in range(3))
    matrices = (-1, *shape[-2:])
    for step in range(1, 4):
        gradients = list(normal(2, *shape, seed=step))
        update = reference.step(gradients).view(matrices)
        u = normal(len(update), 8, shape[-1], seed=10 + step)
        lengths = torch.empty(len(update), shape[-2])
        corrections = fused.adamw_corrections(torch.full((2,), float(step)), options["betas"])
        found = fused.adamw_products(gradients, averages, squares, corrections, u, row_squares=lengths, **options)
        torch.testing.assert_close(torch.stack(averages), reference.state("exp_avg"), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(torch.stack(squares), reference.state("exp_avg_sq"), rtol=1e-6, atol=1e-7)
        for one, wanted in zip(found, products(update, u), strict=True):
            close(one, wanted)
        close(lengths, update.double().square().sum(-1))

        index = lengths.argmax(1)
        rows = fused.adamw_rows(averages, squares, corrections, index, eps=1e-6)
        torch.testing.assert_close(rows, update.take_along_dim(index[:, None, None], 1)[:, 0], rtol=2e-6, atol=1e-7)

        factor, decay = normal(2, shape[0], *(1 for _ in shape[1:]), seed=5), torch.full((1,), 0.9)
        before = torch.stack(params)
        fused.adamw_apply_(params, averages, squares, corrections, factor, decay, eps=1e-6)
        wanted = 0.9 * before + factor * update.view(before.shape)
        torch.testing.assert_close(torch.stack(params), wanted, rtol=2e-6, atol=2e-6)
        assert all(p._version == step for p in params)


def check_adamw_of_tensors_at_different_steps(fused):
    corrections = fused.adamw_corrections(torch.tensor([1.0, 1000.0, 2e6]), (0.9, 0.999))
    for (first, second), t in zip(corrections.tolist(), (1, 1000, 2_000_000), strict=True):
        assert first == pytest.approx(1 / (1 - 0.9**t), rel=1e-7)
        assert second == pytest.approx((1 - 0.999**t) ** -0.5, rel=1e-7)
    averages, squares = list(normal(3, 5, 7)), list(normal(3, 5, 7, seed=1).square())
    params = [torch.zeros(5, 7) for _ in range(3)]
    fused.adamw_apply_(params, averages, squares, corrections, torch.ones(3, 1, 1), eps=1e-8)
    for p, m, v, (first, second) in zip(params, averages, squares, corrections, strict=True):
        torch.testing.assert_close(p, -first * m / (v.sqrt() * second + 1e-8), rtol=2e-6, atol=0.0)


def check_adamw_in_parts_moves_every_entry_once(fused):
    """A packed weight [in, 3·out] as three matrices side by side, and the rest of it as another call."""
    shape, options = (20, 3 * 24 + 10), {"betas": (0.9, 0.99), "eps": 1e-8}
    reference = Reference(shape, 2, **options)
    gradients = list(normal(2, *shape, seed=1))
    update = reference.step(gradients)
    averages, squares = ([torch.zeros(shape) for _ in range(2)] for _ in range(2))
    corrections = fused.adamw_corrections(torch.ones(2), options["betas"])
    parts = (lambda t: t[:, :72].unflatten(1, (3, 24)).transpose(0, 1), lambda t: t[:, 72:])
    for part in parts:
        wanted = torch.stack([part(x) for x in update]).flatten(0, -3)
        u = normal(*wanted.shape[::2], seed=2)[:, None].expand(-1, 3, -1)
        views = ([part(t) for t in tensors] for tensors in (gradients, averages, squares))
        found = fused.adamw_products(*views, corrections, u, **options)
        for one, exact in zip(found, products(wanted, u), strict=True):
            close(one, exact)
    torch.testing.assert_close(torch.stack(averages), reference.state("exp_avg"), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.stack(squares), reference.state("exp_avg_sq"), rtol=1e-6, atol=1e-7)


def check_adamw_in_bfloat16(fused):
    """Averages and update are near torch's (it rounds more often); the products are those of the stored averages."""
    shape, options = (40, 70), {"betas": (0.9, 0.99), "eps": 1e-8}
    reference = Reference(shape, 2, torch.bfloat16, **options)
    gradients = list(normal(2, *shape, seed=1).bfloat16())
    reference.step(gradients)
    averages, squares, params = ([torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2)] for _ in range(3))
    corrections, u = fused.adamw_corrections(torch.ones(2), options["betas"]), normal(2, 8, 70, seed=2)
    found = fused.adamw_products(gradients, averages, squares, corrections, u, **options)
    for ours, key in ((averages, "exp_avg"), (squares, "exp_avg_sq")):
        torch.testing.assert_close(torch.stack(ours).float(), reference.state(key).float(), rtol=0.02, atol=0.0)
    m, v = torch.stack(averages).double(), torch.stack(squares).double()
    first, second = (column[:, None, None].double() for column in corrections.unbind(1))
    update = -first * m / (v.sqrt() * second + 1e-8)
    for one, wanted in zip(found, products(update, u), strict=True):
        close(one, wanted)
    fused.adamw_apply_(params, averages, squares, corrections, torch.full((2, 1, 1), 0.1), eps=1e-8)
    torch.testing.assert_close(torch.stack(params).double(), 0.1 * update, rtol=0.01, atol=0.0)


def check_adamw_loops_repeats_and_survives_eps_zero(fused, gpu, monkeypatch):
    monkeypatch.setattr(gpu, "MULTIPROCESSORS", 2)  # each program loops over several row blocks
    gradients, u = list(normal(2, 200, 90)), normal(2, 5, 90, seed=1)
    runs = []
    for _ in range(2):
        averages, squares = ([torch.zeros(200, 90) for _ in range(2)] for _ in range(2))
        corrections = fused.adamw_corrections(torch.ones(2), (0.9, 0.99))
        lists, options = (gradients, averages, squares), {"betas": (0.9, 0.99), "eps": 0.0}
        tables = tuple(map(gpu.pointer_table, lists))
        runs.append(fused.adamw_products(*lists, corrections, u, tables=tables, **options))
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two) and one.isfinite().all()
    for one, wanted in zip(runs[0], products(-torch.stack(gradients).sign(), u), strict=True):
        close(one, wanted)  # the first update of Adam without eps


def check_adamw_lets_nan_through_to_one_matrix(fused):
    gradients = list(normal(2, 20, 30))
    gradients[1][3, 4] = torch.nan
    averages, squares = ([torch.zeros(20, 30) for _ in range(2)] for _ in range(2))
    corrections, u = fused.adamw_corrections(torch.ones(2), (0.9, 0.99)), normal(2, 8, 30, seed=1)
    v, z = fused.adamw_products(gradients, averages, squares, corrections, u, betas=(0.9, 0.99), eps=1e-8)
    assert v[0].isfinite().all() and z[0].isfinite().all()
    assert v[1].isnan().sum() == 8 and z[1].isnan().all()


def check_adamw_refuses_tensors_laid_out_differently(fused):
    lists = [[normal(4, 6)], [normal(6, 4).T], [normal(4, 6)]]
    corrections = fused.adamw_corrections(torch.ones(1), (0.9, 0.99))
    with pytest.raises(ValueError, match="same strides"):
        fused.adamw_products(*lists, corrections, normal(1, 2, 6), betas=(0.9, 0.99), eps=1e-8)
    with pytest.raises(ValueError, match="last axis"):
        fused.adamw_products(*[[normal(6, 4).T]] * 3, corrections, normal(1, 2, 6), betas=(0.9, 0.99), eps=1e-8)
    with pytest.raises(ValueError, match="9 power vectors"):
        fused.adamw_products(*[[normal(4, 6)]] * 3, corrections, normal(1, 9, 6), betas=(0.9, 0.99), eps=1e-8)


# The compiler for Hopper ----------------------------------------------------------------------------------------------


def compiled(kernel, warps: int, stages: int, types: dict[str, str], aligned: bool = True, **constants: object):
    """A kernel as triton compiles it for sm_90, which needs no GPU. Arguments without a type are int32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(inspect.signature(kernel.fn).parameters)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    sixteen = [i for i, name in enumerate(names) if signature[name] not in ("constexpr", "fp32")] if aligned else []
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in sixteen})
    options = {"num_warps": warps, "num_stages": stages}
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = found.asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", ptx)  # what makes results depend on the order of threads
    assert found.metadata.shared <= 227 * 1024  # a block's limit on sm_90
    return ptx


POWER = dict.fromkeys(("u", "v", "partial", "squares"), "*fp32")
TILE = {"PADDED": 8, "COLUMNS": 128}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def hopper_power_kernel(gpu, dtype):
    for count, rows, squares in ((8, 64, True), (3, 16, False)):
        tile = TILE | {"PADDED": 8 if count == 8 else 4}
        ptx = compiled(
            gpu._power_kernel, gpu.POWER_WARPS, gpu.POWER_STAGES, POWER | {"w": f"*{dtype}"},
            K=count, ROWS=rows, SQUARES=squares, PRECISION=gpu.PRECISION, **tile,
        )  # fmt: skip
        assert "cp.async" in ptx and "mma" not in ptx  # loads run ahead; float32 is not rounded to tf32


def hopper_reductions(gpu):
    ptx = compiled(gpu._row_kernel, 4, 3, {"x": "*fp32", "out": "*fp32"}, ROWS=4, COLUMNS=1024, FINISH=True)
    assert "ld.global.v4" in ptx
    ptx = compiled(gpu._max_kernel, 4, 3, {"x": "*bf16", "out": "*i32"}, ENTRIES=gpu.ENTRIES)
    assert "max.f32" not in ptx  # which would drop NaN


@pytest.mark.parametrize("wide", [False, True])
def hopper_apply_kernels(gpu, fused, wide):
    import triton.language as tl

    pointers = dict.fromkeys(("params", "averages", "squares"), "*i64")
    numbers = dict.fromkeys(("update", "factor", "decay", "corrections"), "*fp32") | {"eps": "fp32", "size": "i64"}
    common = {"WIDE": wide, "ENTRIES": gpu.APPLY_ENTRIES, "DTYPE": tl.bfloat16, "ALIGNED": not wide}
    for factor, decay in ((1, 0), (2, 3), (4, 2)):
        modes = common | {"FACTOR": factor, "DECAY": decay}
        scaled = compiled(gpu._scale_kernel, 4, 3, pointers | numbers, **modes)
        applied = compiled(fused._apply_kernel, 4, 3, pointers | numbers, S_DTYPE=tl.float32, **modes)
        for ptx in (scaled, applied):
            assert "cvt.rn.bf16" in ptx  # rounds to nearest
            assert wide or "ld.global.v4" in ptx  # although the pointers come from a table


def hopper_adamw_kernels(gpu, fused):
    import triton.language as tl

    lists = dict.fromkeys(("gradients", "averages", "squares"), "*i64")
    tensors = dict.fromkeys(("corrections", "u", "z_rows", "partial", "row_squares", "out"), "*fp32")
    floats = dict.fromkeys(("beta2", "rest1", "rest2", "eps"), "fp32")
    ptx = compiled(
        fused._products_kernel, gpu.POWER_WARPS, fused.STAGES, lists | tensors | floats,
        G_DTYPE=tl.bfloat16, DTYPE=tl.float32, ALIGNED=True, MAXIMIZE=True,
        K=8, ROWS=32, SQUARES=True, PRECISION=gpu.PRECISION, **TILE,
    )  # fmt: skip
    assert "cp.async" in ptx and "mma" not in ptx
    constants = {"DTYPE": tl.float32, "ALIGNED": True, "ENTRIES": gpu.APPLY_ENTRIES}
    compiled(fused._rows_kernel, 4, 3, lists | tensors | floats | {"index": "*i64"}, **constants)
