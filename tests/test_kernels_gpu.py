"""The Triton kernels against float64: on the CPU in Triton's interpreter, on a GPU if there is one; and compiled for
Hopper.

The interpreter is chosen by an environment variable before triton is first imported, which torch may already have done
here. So the tests proper, named `check_…`, run in a second pytest that a test of this one starts on the same file; as
do those named `hopper_…`, which need the compiler instead. To run one: `TRITON_INTERPRET=1 pytest -o
python_functions=check_* tests/test_kernels_gpu.py -k name`.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inner_pytest import inner_run
from kernel_checks import close, fused, gpu, normal, products

__all__ = ["fused", "gpu"]  # fixtures

HALVES = (torch.bfloat16, torch.float16)


def test_the_kernels_in_the_interpreter() -> None:
    inner_run(__file__, "check", TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_on_a_gpu() -> None:
    inner_run(__file__, "check", KERNELS_TESTED_ON="cuda")


def test_the_kernels_compile_for_hopper(tmp_path: Path) -> None:
    inner_run(__file__, "hopper", TRITON_CACHE_DIR=str(tmp_path))


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

BROADCASTS = [
    (1, 1, 1, 1), (3, 1, 1, 1), (3, 4, 1, 1), (4, 1, 1), (3, 1, 1, 6), (3, 1, 5, 1), (3, 4, 5, 1), (1, 4, 5, 1),
    (3, 1, 5, 6), (3, 4, 5, 6), (6,), (),
]  # fmt: skip


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
