"""What can be measured by a norm: dense tensors of real or complex numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ModnormError

__all__ = ["check_measurable"]


def check_measurable(name: str, update: object) -> None:
    """Raises ModnormError for what has no norm: None, numbers, integers, sparse tensors."""
    if update is None:
        raise ModnormError(
            f"The update of {name!r} is None.",
            why="a parameter that took no part in the loss has no gradient",
            do="Leave it out: {name: p.grad for name, p in model.named_parameters() if p.grad is not None}.",
        )
    if not isinstance(update, Tensor):
        raise ModnormError(f"The update of {name!r} is no tensor but a {type(update).__name__}.", do="Pass a tensor.")
    if update.layout is not torch.strided:
        raise ModnormError(
            f"The update of {name!r} is sparse ({update.layout}).",
            why="its norm is taken over the whole weight",
            do="Pass update.to_dense(), or build the embedding with sparse=False.",
        )
    if not (update.is_floating_point() or update.is_complex()):
        raise ModnormError(
            f"The update of {name!r} is of type {update.dtype}.",
            why="whole numbers cannot be scaled to a norm",
            do="Pass update.float().",
        )
