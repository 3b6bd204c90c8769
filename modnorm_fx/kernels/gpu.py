"""Triton kernels for normalising updates on a Hopper GPU; `gpu_adamw` adds those that never store the update.

Importing this module imports triton; callers guard. `takes` says which tensors the kernels can work on.

* Inputs are float32, bfloat16 or float16; every sum is taken in float32. Nothing waits for the device or branches on
  values, so that a CUDA graph can hold every call whose pointer tables were made before.
* No atomics: a sum that several programs share is left as one partial sum per program and added up in a fixed order by
  a second, small kernel. The same shapes on the same kind of GPU give the same bits.
* With TRITON_INTERPRET=1 in the environment (before triton is imported) all of it runs on CPU tensors, slowly. That,
  and the compiler for sm_90, is all these kernels have been tested with: no number here was timed. The settings are
  chosen by counting bytes, registers and instructions, and stand together below to be tuned on the hardware.
"""

# mypy: allow-incomplete-defs
# (Triton gives types to the arguments of kernels.)

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["max_abs", "pointer_table", "power_products", "row_rms", "scale_apply_", "sent", "takes"]

VECTORS = 8
"""Most power vectors per matrix (`spectral_norm.BLOCK`): they are the narrow side of every product."""

MULTIPROCESSORS = 132
"""Of an H100 or H200 SXM. A constant, not asked of the device, so that results do not depend on which GPU it is."""

CACHE = 32 * 2**20
"""Bytes of the second-level cache (50 MB on an H100) that row blocks and partial sums of `power_products` may fill."""

PRECISION = "ieee"
"""How float32 is multiplied: "ieee" is true float32, by fused multiply-add. "tf32" would keep 11 bits; "tf32x3" about
22, on the tensor cores. Compiled for sm_90 (8 vectors, float32), "ieee" is 29 instructions per weight, where memory at
its specified 3.35 TB/s leaves time for 35. "tf32x3" (tiles of 64 x 64, 4 warps) is 27, with about a third of the loads
from shared memory, which has bank conflicts under "ieee": worth timing."""

POWER_WARPS, POWER_STAGES = 8, 3  # at most 128 registers a thread (255 if rows do not start at 16 bytes) and 75 KiB
ENTRIES = 4096  # a program of a reduction holds so many at once: 32 in each thread of 4 warps
APPLY_ENTRIES = 1024  # the same where every entry is written: 8 in each thread of 4 warps
REDUCERS = 8 * MULTIPROCESSORS  # programs of a reduction

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these: plain tensors or parameters, in `DTYPES`, on one CUDA device.

    Under the interpreter the device is the CPU.
    """
    plain = (Tensor, torch.nn.Parameter)
    kind = "cpu" if triton.knobs.runtime.interpret else "cuda"
    return len({t.device for t in tensors}) == 1 and all(
        type(t) in plain and t.dtype in DTYPES and t.device.type == kind for t in tensors
    )


def pointer_table(tensors: Sequence[Tensor]) -> Tensor:
    """The addresses of `tensors`, int64 `[n]` on their device, for kernels that work on all of them in one launch.

    It holds for as long as the tensors live where they are now (a gradient that is set to None comes back elsewhere),
    and cannot be made while a CUDA graph is captured.
    """
    addresses = torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device="cpu")
    return sent(addresses, tensors[0].device)


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """`numbers`, on the device; nothing waits for it."""
    if numbers.device == device:
        return numbers
    return numbers.pin_memory().to(device, non_blocking=True)  # from pageable memory the host would wait


# Products of power iteration ------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """How `[P, R, C]` is shared out: `parts` programs for each matrix, each `each` rows in blocks of `rows`."""

    rows: int
    columns: int
    parts: int
    each: int


def split(pieces: int, rows: int, columns: int, row_bytes: int) -> Split:
    """The `Split` for matrices whose rows take `row_bytes` (of everything that is read twice).

    A block of rows is read twice, for v and for z, and should come from the cache the second time. One program runs on
    each multiprocessor, so `MULTIPROCESSORS` blocks and as many partial sums (`VECTORS` rows each, float32) must fit
    `CACHE`: 64 rows of float32 up to 882 columns, 32 up to 1588, 16 up to 2647. For wider matrices a block that fits
    would be so low that partial sums (read and written once for each block) and u (read once for each block) outweigh
    it; there a block has 64 rows again, and its second reading comes from memory.
    """
    tile = 128 if columns > 64 else 64
    fitting = (b for b in (64, 32, 16) if MULTIPROCESSORS * (b * row_bytes + 4 * VECTORS * columns) <= CACHE)
    block = min(next(fitting, 64), max(16, triton.next_power_of_2(rows)))
    blocks = triton.cdiv(rows, block)
    parts = min(blocks, max(1, triton.cdiv(MULTIPROCESSORS, pieces)))
    each = triton.cdiv(blocks, parts) * block
    return Split(block, tile, triton.cdiv(rows, each), each)


@triton.jit
def _power_kernel(
    w, u, v, partial, squares, piece_stride, row_stride, R, C, parts, each,
    K: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SQUARES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: rows `each·part` and on of one matrix. v is stored, z accumulated in the program's partial sum."""
    piece = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    first = part * each
    last = tl.minimum(first + each, R)
    k = tl.arange(0, PADDED)
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    w += piece * piece_stride
    u += (piece * K + k)[:, None] * C
    z = partial + ((piece * parts + part) * K + k)[:, None] * C
    for start in range(first, last, ROWS):
        rows = start + r
        block = w + rows.to(tl.int64)[:, None] * row_stride
        sums = tl.zeros([ROWS, PADDED], tl.float32)
        square = tl.zeros([ROWS, COLUMNS], tl.float32)
        for column in range(0, C, COLUMNS):
            columns = (column + c)[None, :]
            x = tl.load(block + columns, mask=(rows < last)[:, None] & (columns < C), other=0.0).to(tl.float32)
            y = tl.load(u + columns, mask=(k < K)[:, None] & (columns < C), other=0.0)
            sums = tl.dot(x, tl.trans(y), sums, input_precision=PRECISION)
            if SQUARES:
                square += x * x
        place = v + (piece * K + k)[None, :] * R + rows[:, None]
        tl.store(place, sums, mask=(rows < last)[:, None] & (k < K)[None, :])
        if SQUARES:
            tl.store(squares + piece * R + rows, tl.sum(square, 1), mask=rows < last)
        left = tl.trans(sums)
        for column in range(0, C, COLUMNS):
            columns = (column + c)[None, :]
            x = tl.load(block + columns, mask=(rows < last)[:, None] & (columns < C), other=0.0).to(tl.float32)
            inside = (k < K)[:, None] & (columns < C)
            before = tl.load(z + columns, mask=inside & (start > first), other=0.0)
            tl.store(z + columns, tl.dot(left, x, before, input_precision=PRECISION), mask=inside)
        tl.debug_barrier()  # the next block may read an entry of the partial sum in another thread than wrote it


def power_products(w: Tensor, u: Tensor, row_squares: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`(v = u wᵀ [P, K, R], z = v w [P, K, C])` in float32, in one pass over w (see `split` for when it is one).

    Args:
        w: `[P, R, C]` in any of `DTYPES`; strides are free but for the last, which is 1 (else w is copied first).
        u: `[P, K, C]` float32, `K <= VECTORS`.
        row_squares: float32 `[P, R]`, contiguous; gets the squared length of every row, from the same reading.

    Deterministic. Beside the results it needs a buffer of partial sums, less than `MULTIPROCESSORS + P` times `[K, C]`.
    """
    pieces, rows, columns = w.shape
    count = u.shape[1]
    if count > VECTORS:
        raise ValueError(f"modnorm_fx: {count} power vectors, but the kernel holds at most {VECTORS}.")
    if w.stride(-1) != 1 and columns > 1:
        w = w.contiguous()
    u = u.contiguous()
    how = split(pieces, rows, columns, columns * w.element_size())
    v = torch.empty(pieces, count, rows, dtype=torch.float32, device=w.device)
    partial = torch.empty(pieces, how.parts, count, columns, dtype=torch.float32, device=w.device)
    with torch.cuda.device_of(w):
        _power_kernel[(pieces * how.parts,)](
            w, u, v, partial, v if row_squares is None else row_squares,
            w.stride(0), w.stride(1), rows, columns, how.parts, how.each,
            K=count, PADDED=triton.next_power_of_2(count), ROWS=how.rows, COLUMNS=how.columns,
            SQUARES=row_squares is not None, PRECISION=PRECISION,
            num_warps=POWER_WARPS, num_stages=POWER_STAGES,
        )  # fmt: skip
    return v, added(partial)


def added(partial: Tensor) -> Tensor:
    """The sum over the second axis; torch adds in a fixed order."""
    return partial[:, 0] if partial.shape[1] == 1 else partial.sum(1)


# Reductions -----------------------------------------------------------------------------------------------------------


@triton.jit
def _row_kernel(
    x, out, batch_stride, row_stride, R, total, C, each, splits,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """One program: the sum of squares of `ROWS` rows over `each` columns, or with `FINISH` the root of their mean."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * each
    stop = tl.minimum(start + each, C)
    x += ((rows // R) * batch_stride + (rows % R) * row_stride)[:, None]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for column in range(start, stop, COLUMNS):
        columns = (column + tl.arange(0, COLUMNS))[None, :]
        y = tl.load(x + columns, mask=(rows < total)[:, None] & (columns < stop), other=0.0).to(tl.float32)
        sums += y * y
    found = tl.sum(sums, 1)
    if FINISH:
        found = tl.sqrt_rn(found / C)
    tl.store(out + rows * splits + tl.program_id(1), found, mask=rows < total)


def row_rms(x: Tensor) -> Tensor:
    """Root mean square over the last axis of `x` `[N, R, C]`: float32 `[N, R]`.

    Strides are free but for the last, which is 1 (else x is copied first). Rows too few to fill the device are shared
    by several programs. Deterministic.
    """
    batch, rows, columns = x.shape
    if x.stride(-1) != 1 and columns > 1:
        x = x.contiguous()
    width = min(1024, triton.next_power_of_2(columns))
    height = min(64, ENTRIES // width, triton.next_power_of_2(batch * rows))
    programs = triton.cdiv(batch * rows, height)
    splits = max(1, min(REDUCERS // programs, columns // ENTRIES))
    each = triton.cdiv(columns, splits * width) * width
    splits = triton.cdiv(columns, each)
    out = torch.empty(batch, rows, splits, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _row_kernel[(programs, splits)](
            x, out, x.stride(0), x.stride(1), rows, batch * rows, columns, each, splits,
            ROWS=height, COLUMNS=width, FINISH=splits == 1, num_warps=4,
        )  # fmt: skip
    return out[..., 0] if splits == 1 else (out.sum(-1) / columns).sqrt()


@triton.jit
def _max_kernel(x, out, batch_stride, M, each, splits, ENTRIES: tl.constexpr):
    """One program: the largest `|x|` among `each` entries of one row, as an integer.

    The bits of non-negative floats are ordered as the floats are, with infinity above every number and NaN above
    infinity; the GPU's maximum of floats would drop NaN.
    """
    n = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * each
    stop = tl.minimum(start + each, M)
    most = tl.zeros([ENTRIES], tl.int32)
    for first in range(start, stop, ENTRIES):
        i = first + tl.arange(0, ENTRIES)
        y = tl.load(x + n * batch_stride + i, mask=i < stop, other=0.0).to(tl.float32)
        most = tl.maximum(most, y.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(out + n * splits + tl.program_id(0), tl.max(most, 0))


def max_abs(x: Tensor) -> Tensor:
    """The largest absolute entry of each of the rows of `x` `[N, M]`: float32 `[N]`, exact.

    A NaN anywhere gives NaN, an infinity otherwise gives infinity. The last axis has stride 1 (else x is copied first).
    """
    batch, entries = x.shape
    if x.stride(-1) != 1 and entries > 1:
        x = x.contiguous()
    splits = max(1, min(triton.cdiv(REDUCERS, batch), entries // ENTRIES))
    each = triton.cdiv(entries, splits * ENTRIES) * ENTRIES
    splits = triton.cdiv(entries, each)
    out = torch.empty(batch, splits, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        _max_kernel[(splits, batch)](x, out, x.stride(0), entries, each, splits, ENTRIES=ENTRIES, num_warps=4)
    return (out[:, 0] if splits == 1 else out.amax(1)).view(torch.float32)


# Applying an update ---------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """A number for each of n tensors, or for each row, column or entry of them; what `number` needs to find it.

    Entry j of tensor i has the number at `outer·i + stride·(j // inner)` (ROW: of the first axis or the first few),
    `outer·i + stride·(j % inner)` (COLUMN), `outer·i` (ONE) or `outer·i + j` (EVERY). NONE: there is no such tensor.
    """

    values: Tensor
    outer: int
    inner: int
    stride: int
    mode: int


NONE, ONE, ROW, COLUMN, EVERY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)


def spread(values: Tensor | None, shape: Sequence[int], like: Tensor) -> Spread:
    """How `values`, which broadcast against `shape` `[n, …]`, are spread over it; copied out if in no simple way."""
    if values is None:
        return Spread(like, 0, 1, 0, NONE.value)
    values = values.float()
    if torch.broadcast_shapes(values.shape, shape) != torch.Size(shape):
        raise ValueError(f"modnorm_fx: {tuple(values.shape)} does not broadcast against an update {tuple(shape)}.")
    values = values.view((1,) * (len(shape) - values.dim()) + values.shape)
    outer = values.stride(0) if values.shape[0] > 1 else 0
    varying = [axis for axis in range(1, len(shape)) if values.shape[axis] > 1]
    if not varying:
        return Spread(values, outer, 1, 0, ONE.value)
    if varying == [1]:
        return Spread(values, outer, math.prod(shape[2:]), values.stride(1), ROW.value)
    if varying == [len(shape) - 1]:
        return Spread(values, outer, shape[-1], values.stride(-1), COLUMN.value)
    last = varying[-1] + 1
    if last < len(shape):  # leading axes joined: a copy, but a small one
        rows = values.expand(-1, *shape[1:last], *values.shape[last:]).flatten(1).contiguous()
        return Spread(rows, rows.shape[1] if len(rows) > 1 else 0, math.prod(shape[last:]), 1, ROW.value)
    return Spread(values.expand(shape).contiguous(), math.prod(shape[1:]), 1, 1, EVERY.value)


@triton.jit
def number(values, i, j, outer, inner, stride, MODE: tl.constexpr, inside):
    """What a `Spread` has for entries j of tensor i: one number, or as many as there are in j."""
    values += i.to(tl.int64) * outer
    if MODE == ONE:
        found = tl.load(values)
    elif MODE == ROW:
        found = tl.load(values + (j // inner) * stride, mask=inside, other=0.0)
    elif MODE == COLUMN:
        found = tl.load(values + (j % inner) * stride, mask=inside, other=0.0)
    else:
        found = tl.load(values + j, mask=inside, other=0.0)
    return found


@triton.jit
def pointer(table, i, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The i-th address of a pointer table. The compiler cannot see that it is a multiple of 16, so it is told."""
    found = tl.load(table + i).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


def aligned(*lists: Sequence[Tensor]) -> bool:
    """Whether all of these start at a multiple of 16 bytes, so that four floats can be read at a time."""
    return all(t.data_ptr() % 16 == 0 for tensors in lists for t in tensors)


def written(tensors: Sequence[Tensor]) -> None:
    """Tells autograd that a kernel changed these in place."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


@triton.jit
def entries_of(size, WIDE: tl.constexpr, ENTRIES: tl.constexpr):
    """The entries this program works on: `(j [ENTRIES], j < size)`; 64-bit only if `WIDE`, for division is slow."""
    start = tl.program_id(0)
    if WIDE:
        start = start.to(tl.int64)
    j = start * ENTRIES + tl.arange(0, ENTRIES)
    return j, j < size


@triton.jit
def _scale_kernel(
    params, update, size,
    factor, factor_outer, factor_inner, factor_stride, decay, decay_outer, decay_inner, decay_stride,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, ENTRIES: tl.constexpr,
    FACTOR: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """One program: `ENTRIES` entries of one tensor."""
    i = tl.program_id(1)
    j, inside = entries_of(size, WIDE, ENTRIES)
    p = pointer(params, i, DTYPE, ALIGNED) + j
    weight = tl.load(p, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(update + i.to(tl.int64) * size + j, mask=inside, other=0.0).to(tl.float32)
    if DECAY != NONE:
        weight *= number(decay, i, j, decay_outer, decay_inner, decay_stride, DECAY, inside)
    weight += number(factor, i, j, factor_outer, factor_inner, factor_stride, FACTOR, inside) * x
    tl.store(p, weight.to(DTYPE), mask=inside)


def scale_apply_(
    params: Sequence[Tensor],
    update: Tensor,
    factor: Tensor,
    decay: Tensor | None = None,
    table: Tensor | None = None,
) -> None:
    """`p = p·decay + factor·update` in place for n tensors in one launch: in float32, rounded once to p's dtype.

    Args:
        params: n contiguous tensors of one shape, dtype (in `DTYPES`) and device.
        update: `[n, *shape]`, contiguous, in any of `DTYPES`.
        factor: float32, broadcasts against `update`. A number for each tensor (`[n, 1, …]`), row (`[n, R, 1, …]`) or
            entry of the last axis is read where it is; anything else is copied out, to the size of `update` if it
            depends on the last axis and another.
        decay: like factor, or None for 1.
        table: `pointer_table(params)`, if it is at hand; needed while a CUDA graph is captured.
    """
    if not all(p.is_contiguous() and p.shape == update.shape[1:] for p in params) or not update.is_contiguous():
        raise ValueError("modnorm_fx: scale_apply_ takes contiguous tensors of one shape and their stacked updates.")
    size = params[0].numel()
    if not size:
        return
    by, kept = spread(factor, update.shape, update), spread(decay, update.shape, update)
    with torch.cuda.device_of(update):
        _scale_kernel[(triton.cdiv(size, APPLY_ENTRIES), len(params))](
            pointer_table(params) if table is None else table, update, size,
            *by[:4], *kept[:4],
            DTYPE=DTYPES[params[0].dtype], ALIGNED=aligned(params), WIDE=size >= 2**31 - APPLY_ENTRIES,
            ENTRIES=APPLY_ENTRIES, FACTOR=by.mode, DECAY=kept.mode, num_warps=4,
        )  # fmt: skip
    written(params)
