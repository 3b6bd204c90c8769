"""Triton kernels for normalised AdamW without a stored update: nine words of memory for each weight.

`adamw_products` reads gradient, average and square, writes the last two, and gives the products of a power iteration on
the update; `adamw_apply_` computes the update a second time, from average and square, and changes the weight. A plain
AdamW step moves seven words; with the update stored in between it would be ten (see gpu.py for what the kernels share).
`fused_triton` makes steps of them.

The update is that of `torch.optim.AdamW` with lr 1 and without weight decay (amsgrad is not supported):
`-(m / (1 - beta1^t)) / (√v / √(1 - beta2^t) + eps)`. Divisions and roots are the fast ones, off by a unit or two in the
last place; a state in half precision is rounded once where torch rounds after every operation. Both passes compute from
the rounded state, so they see the same update.
"""

# mypy: allow-incomplete-defs
# (Triton gives types to the arguments of kernels.)

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu import (
    APPLY_ENTRIES,
    DTYPES,
    NONE,
    POWER_WARPS,
    PRECISION,
    VECTORS,
    added,
    aligned,
    entries_of,
    number,
    pointer,
    pointer_table,
    split,
    spread,
    written,
)

__all__ = ["Matrices", "adamw_apply_", "adamw_corrections", "adamw_products", "adamw_rows"]

STAGES = 2  # three tensors are loaded ahead: 68 KiB of shared memory at most, and 127 registers a thread


class Matrices(NamedTuple):
    """Where in each of n tensors the matrices are: `pieces` of `[rows, columns]`, the first of them `offset` entries
    after the beginning; entries of a row are neighbours."""

    offset: int
    pieces: int
    rows: int
    columns: int
    piece_stride: int
    row_stride: int


def adamw_corrections(steps: Tensor, betas: tuple[float, float]) -> Tensor:
    """The bias corrections `(1 / (1 - beta1^t), 1 / √(1 - beta2^t))` of n tensors: float32 `[n, 2]`.

    Args:
        steps: `[n]` on the device, the number t of the step that is taken, counted from 1 (after torch's increment).

    In float64 until the end: in float32 `1 - 0.999^t` would be off by 6e-5 in the first step. A handful of tiny
    launches, so call it once for all tensors that share betas, and slice.
    """
    t = steps.double()
    return torch.stack([1.0 / (1.0 - betas[0] ** t), (1.0 - betas[1] ** t).rsqrt()], dim=1).float()


@triton.jit
def _update(m, v, step, root, eps):
    return -step * m / (tl.sqrt(v) * root + eps)


@triton.jit
def _products_kernel(
    gradients, averages, squares, corrections, u, z_rows, partial, row_squares,
    offset, Q, piece_stride, row_stride, R, C, parts, each,
    beta2, rest1, rest2, eps,
    G_DTYPE: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MAXIMIZE: tl.constexpr,
    K: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SQUARES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`gpu._power_kernel` on the update; the first reading of a row block also moves the averages on."""
    piece = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    i = piece // Q
    base = offset + (piece % Q) * piece_stride
    gradient = pointer(gradients, i, G_DTYPE, ALIGNED) + base
    average = pointer(averages, i, DTYPE, ALIGNED) + base
    square = pointer(squares, i, DTYPE, ALIGNED) + base
    step = tl.load(corrections + 2 * i)
    root = tl.load(corrections + 2 * i + 1)
    first = part * each
    last = tl.minimum(first + each, R)
    k = tl.arange(0, PADDED)
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    u += (piece * K + k)[:, None] * C
    z = partial + ((piece * parts + part) * K + k)[:, None] * C
    for start in range(first, last, ROWS):
        rows = start + r
        block = rows.to(tl.int64)[:, None] * row_stride
        sums = tl.zeros([ROWS, PADDED], tl.float32)
        lengths = tl.zeros([ROWS, COLUMNS], tl.float32)
        for column in range(0, C, COLUMNS):
            columns = (column + c)[None, :]
            inside = (rows < last)[:, None] & (columns < C)
            at = block + columns
            g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
            m = tl.load(average + at, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(square + at, mask=inside, other=0.0).to(tl.float32)
            if MAXIMIZE:
                g = -g
            m = (m + rest1 * (g - m)).to(DTYPE)
            v = (beta2 * v + rest2 * g * g).to(DTYPE)
            tl.store(average + at, m, mask=inside)
            tl.store(square + at, v, mask=inside)
            x = _update(m.to(tl.float32), v.to(tl.float32), step, root, eps)
            x = tl.where(inside, x, 0.0)  # 0 / 0 outside if eps is 0
            y = tl.load(u + columns, mask=(k < K)[:, None] & (columns < C), other=0.0)
            sums = tl.dot(x, tl.trans(y), sums, input_precision=PRECISION)
            if SQUARES:
                lengths += x * x
        place = z_rows + (piece * K + k)[None, :] * R + rows[:, None]
        tl.store(place, sums, mask=(rows < last)[:, None] & (k < K)[None, :])
        if SQUARES:
            tl.store(row_squares + piece * R + rows, tl.sum(lengths, 1), mask=rows < last)
        left = tl.trans(sums)
        tl.debug_barrier()  # averages and squares may be read in other threads than wrote them
        for column in range(0, C, COLUMNS):
            columns = (column + c)[None, :]
            inside = (rows < last)[:, None] & (columns < C)
            at = block + columns
            m = tl.load(average + at, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(square + at, mask=inside, other=0.0).to(tl.float32)
            x = tl.where(inside, _update(m, v, step, root, eps), 0.0)
            kept = (k < K)[:, None] & (columns < C)
            before = tl.load(z + columns, mask=kept & (start > first), other=0.0)
            tl.store(z + columns, tl.dot(left, x, before, input_precision=PRECISION), mask=kept)
        tl.debug_barrier()  # as in _power_kernel


def _matrices(*lists: Sequence[Tensor]) -> Matrices:
    """Those of lists of tensors `[Q, R, C]` or `[R, C]`, all laid out alike."""
    first = lists[0][0]
    if any(t.shape != first.shape or t.stride() != first.stride() for tensors in lists for t in tensors):
        raise ValueError("modnorm_fx: gradients, averages and squares must have one shape and the same strides.")
    if first.stride(-1) != 1 and first.shape[-1] > 1:
        raise ValueError("modnorm_fx: the last axis must have stride 1.")
    rows, columns = first.shape[-2:]
    pieces, stride = (first.shape[0], first.stride(0)) if first.dim() == 3 else (1, 0)
    return Matrices(0, pieces, rows, columns, stride, first.stride(-2))


def adamw_products(
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    corrections: Tensor,
    u: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    maximize: bool = False,
    row_squares: Tensor | None = None,
    tables: tuple[Tensor, Tensor, Tensor] | None = None,
    where: Matrices | None = None,
) -> tuple[Tensor, Tensor]:
    """Moves AdamW's averages on by one step, in place; for its update x, `(v = u xᵀ [P, K, R], z = v x [P, K, C])`.

    Args:
        gradients, averages (`exp_avg`), squares (`exp_avg_sq`): n matrices `[R, C]`, or n tensors or views of Q
            matrices `[Q, R, C]`, all of the same shape and strides, the last of which is 1. P is n or n·Q; the matrices
            of one tensor follow each other. Averages and squares share a dtype, gradients may have another.
        corrections: `adamw_corrections` of the n tensors.
        u: `[P, K, C]` float32, `K <= gpu.VECTORS`.
        row_squares: float32 `[P, R]`, contiguous; gets the squared length of every row of the update.
        tables: the `pointer_table` of each of the three lists, if they are at hand; needed under graph capture.
        where: the matrices in each tensor, if they are not all of it; the tensors are then contiguous, of any shape.

    Every entry of the state moves on once each call: to cover a tensor by several calls, give them disjoint parts.
    Deterministic. Average and square are read again, from the cache where a row block of both fits (`gpu.split`).
    """
    offset, inner, rows, columns, piece_stride, row_stride = where or _matrices(gradients, averages, squares)
    pieces, count = len(gradients) * inner, u.shape[1]
    if count > VECTORS:
        raise ValueError(f"modnorm_fx: {count} power vectors, but the kernel holds at most {VECTORS}.")
    u = u.contiguous()
    state = averages[0]
    how = split(pieces, rows, columns, 2 * columns * state.element_size())
    height = min(32, how.rows)  # three tensors share the registers and the shared memory
    v = torch.empty(pieces, count, rows, dtype=torch.float32, device=u.device)
    partial = torch.empty(pieces, how.parts, count, columns, dtype=torch.float32, device=u.device)
    tables = tables or (pointer_table(gradients), pointer_table(averages), pointer_table(squares))
    with torch.cuda.device_of(u):
        _products_kernel[(pieces * how.parts,)](
            *tables, corrections, u, v, partial, v if row_squares is None else row_squares,
            offset, inner, piece_stride, row_stride, rows, columns, how.parts, how.each,
            betas[1], 1.0 - betas[0], 1.0 - betas[1], eps,
            G_DTYPE=DTYPES[gradients[0].dtype], DTYPE=DTYPES[state.dtype],
            ALIGNED=aligned(gradients, averages, squares), MAXIMIZE=maximize,
            K=count, PADDED=triton.next_power_of_2(count), ROWS=height, COLUMNS=how.columns,
            SQUARES=row_squares is not None, PRECISION=PRECISION, num_warps=POWER_WARPS, num_stages=STAGES,
        )  # fmt: skip
    return v, added(partial)


@triton.jit
def _rows_kernel(
    averages, squares, corrections, index, out, offset, Q, piece_stride, row_stride, C, eps,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One program: `ENTRIES` entries of one row of the update of one matrix."""
    piece = tl.program_id(1).to(tl.int64)
    i = piece // Q
    columns = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    at = offset + (piece % Q) * piece_stride + tl.load(index + piece) * row_stride + columns
    m = tl.load(pointer(averages, i, DTYPE, ALIGNED) + at, mask=columns < C, other=0.0).to(tl.float32)
    v = tl.load(pointer(squares, i, DTYPE, ALIGNED) + at, mask=columns < C, other=0.0).to(tl.float32)
    x = _update(m, v, tl.load(corrections + 2 * i), tl.load(corrections + 2 * i + 1), eps)
    tl.store(out + piece * C + columns, x, mask=columns < C)


def adamw_rows(
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    corrections: Tensor,
    index: Tensor,
    *,
    eps: float,
    tables: tuple[Tensor, Tensor] | None = None,
    where: Matrices | None = None,
) -> Tensor:
    """Row `index[p]` of the update of each of the P matrices of `adamw_products`, after that call: float32 `[P, C]`.

    `index` is int64 `[P]`, on the device. For the row that replaces a power vector which has lost track.
    """
    offset, inner, _, columns, piece_stride, row_stride = where or _matrices(averages, squares)
    out = torch.empty(len(averages) * inner, columns, dtype=torch.float32, device=index.device)
    tables = tables or (pointer_table(averages), pointer_table(squares))
    with torch.cuda.device_of(index):
        _rows_kernel[(triton.cdiv(columns, APPLY_ENTRIES), len(out))](
            *tables, corrections, index, out, offset, inner, piece_stride, row_stride, columns, eps,
            DTYPE=DTYPES[averages[0].dtype], ALIGNED=aligned(averages, squares), ENTRIES=APPLY_ENTRIES, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _apply_kernel(
    params, averages, squares, corrections, size, eps,
    factor, factor_outer, factor_inner, factor_stride, decay, decay_outer, decay_inner, decay_stride,
    DTYPE: tl.constexpr, S_DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, ENTRIES: tl.constexpr,
    FACTOR: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """One program: `ENTRIES` entries of one tensor."""
    i = tl.program_id(1)
    j, inside = entries_of(size, WIDE, ENTRIES)
    p = pointer(params, i, DTYPE, ALIGNED) + j
    weight = tl.load(p, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(pointer(averages, i, S_DTYPE, ALIGNED) + j, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(pointer(squares, i, S_DTYPE, ALIGNED) + j, mask=inside, other=0.0).to(tl.float32)
    x = _update(m, v, tl.load(corrections + 2 * i), tl.load(corrections + 2 * i + 1), eps)
    if DECAY != NONE:
        weight *= number(decay, i, j, decay_outer, decay_inner, decay_stride, DECAY, inside)
    by = number(factor, i, j, factor_outer, factor_inner, factor_stride, FACTOR, inside)
    weight += tl.where(by == 0.0, 0.0, by * x)
    tl.store(p, weight.to(DTYPE), mask=inside)


def adamw_apply_(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    corrections: Tensor,
    factor: Tensor,
    decay: Tensor | None = None,
    *,
    eps: float,
    tables: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """`gpu.scale_apply_` with the update of AdamW, computed from averages and squares as `adamw_products` left them.
    Where the factor is 0, an update that is not finite changes nothing: so a captured step is refused.

    All lists hold n contiguous tensors of one shape; `factor` and `decay` broadcast against `[n, *shape]`. `tables` are
    the `pointer_table` of each list.
    """
    shape = params[0].shape
    if not all(t.is_contiguous() and t.shape == shape for tensors in (params, averages, squares) for t in tensors):
        raise ValueError("modnorm_fx: adamw_apply_ takes contiguous tensors of one shape.")
    size = params[0].numel()
    if not size:
        return
    stacked = (len(params), *shape)
    by, kept = spread(factor, stacked, corrections), spread(decay, stacked, corrections)
    tables = tables or (pointer_table(params), pointer_table(averages), pointer_table(squares))
    with torch.cuda.device_of(corrections):
        _apply_kernel[(triton.cdiv(size, APPLY_ENTRIES), len(params))](
            *tables, corrections, size, eps, *by[:4], *kept[:4],
            DTYPE=DTYPES[params[0].dtype], S_DTYPE=DTYPES[averages[0].dtype],
            ALIGNED=aligned(params, averages, squares), WIDE=size >= 2**31 - APPLY_ENTRIES, ENTRIES=APPLY_ENTRIES,
            FACTOR=by.mode, DECAY=kept.mode, num_warps=4,
        )  # fmt: skip
    written(params)
