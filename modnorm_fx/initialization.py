"""What ``ModularNorm.initialize_`` leaves alone: frozen parameters, branches that start at zero, rows for padding."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .atoms import Conv, Experts, Gain, Gates, Linear, PatchConv, Reshaped
from .errors import ModnormError

if TYPE_CHECKING:
    from .norm import Leaf

__all__ = ["padding_rows", "thawed", "zero_branches"]

logger = logging.getLogger("modnorm_fx")

#: what is left alone where it is zero
MAY_START_AT_ZERO = (Gain, Linear, Conv, PatchConv, Experts, Gates)


def thawed(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of the parameters called ``names`` that are trained. What is frozen (``requires_grad=False``) holds what
    training cannot bring back: sinusoids, random features, the pretrained weights below an adapter. It is named in a
    log message.

    Raises ModnormError if all are frozen.
    """
    known = frozenset(names)
    ours = {name: p for name, p in model.named_parameters() if name in known}
    frozen = [name for name, p in ours.items() if not p.requires_grad]
    if frozen and len(frozen) == len(ours):
        raise ModnormError(
            f"Every parameter of this {type(model).__name__} is frozen.",
            why="Frozen parameters (requires_grad=False) are left as they are, so nothing could be changed.",
            do="Call model.requires_grad_(True) before, and freeze what is to stay afterwards.",
        )
    if frozen:
        logger.info("frozen parameters are left as they are: %s.", ", ".join(frozen))
    return {name: p.data for name, p in ours.items() if p.requires_grad}


def zero_branches(leaves: Iterable[Leaf], tensors: Mapping[str, Tensor]) -> set[str]:
    """Keys of gains and matrices that are zero; none where every matrix is."""
    zero, written = set(), False
    for leaf in leaves:
        atom = leaf.atom.inner if isinstance(leaf.atom, Reshaped) else leaf.atom
        part = leaf.read(tensors[leaf.weight]) if leaf.weight in tensors else None
        if part is None or part.is_meta or not isinstance(atom, MAY_START_AT_ZERO):
            continue
        if not part.any():
            zero.add(leaf.key)
        elif leaf.atom.is_matrix:
            written = True
    if zero and written:
        logger.info("initialize_ leaves at zero what starts there: %s.", ", ".join(sorted(zero)))
    return zero if written else set()


def padding_rows(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Names of embeddings' tables and their rows for padding, which torch keeps at zero and gives no gradient."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None:
            yield f"{path}.weight".removeprefix("."), int(module.padding_idx)
