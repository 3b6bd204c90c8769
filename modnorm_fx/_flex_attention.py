"""`flex_attention` as a traced graph holds it, written out: scores, what the user's functions make of them, softmax.

torch has the same for its own eager mode (`torch._higher_order_ops.flex_attention.math_attention`), through `vmap`,
which cannot be traced here. The sub-graphs of the user's functions work on scores and indices entry by entry, so they
also work on whole tensors whose shapes broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention

__all__ = ["flex_attention", "written_out"]


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Any],
    block_mask: Sequence[Any],
    scale: float,
    kernel_options: dict[str, Any],
    score_mod_buffers: tuple[Tensor, ...] = (),
    mask_mod_buffers: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[batch, heads, queries, features]`, and logarithm of the sum and largest of the scores
    `[batch, heads, queries]`, the latter two in base 2 as in the operation; arguments as of the operation.

    Args:
        score_mod: (scores, batch, head, query, key, *score_mod_buffers) -> scores.
        block_mask: sizes and block indices, and at last (batch, head, query, key, *mask_mod_buffers) -> bool.
    """
    groups = query.size(1) // key.size(1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-2, -1) * scale
    places = [
        torch.arange(size, device=query.device).view([-1 if axis == own else 1 for axis in range(4)])
        for own, size in enumerate(scores.shape)
    ]
    allowed = block_mask[-1](*places, *mask_mod_buffers)
    changed = score_mod(scores, *places, *score_mod_buffers)
    masked = torch.where(allowed, changed, -torch.inf)
    order = sorted(range(4), key=query.stride, reverse=True)  # the operation's output lies in memory as the query does
    output = (torch.softmax(masked, -1) @ value).permute(order).contiguous().permute([order.index(i) for i in range(4)])
    return output, masked.logsumexp(-1) / math.log(2), masked.amax(-1) / math.log(2)
