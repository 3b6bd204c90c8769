"""Kernels behind `spectral_norm` and the normaliser: `cpu` (C++, compiled on first use), `gpu` (Triton).

They are optional: torch does the same. Triton kernels are used within `triton(True)`, which the backends "triton" and
"cudagraph-triton" enter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["triton", "triton_for"]

_TRITON: ContextVar[bool] = ContextVar("modnorm_fx_triton", default=False)


@contextlib.contextmanager
def triton(on: bool) -> Iterator[None]:
    """Within it, Triton kernels are used where they can be."""
    token = _TRITON.set(on)
    try:
        yield
    finally:
        _TRITON.reset(token)


def triton_for(*tensors: Tensor) -> ModuleType | None:
    """The module of Triton kernels, if they are on and take these tensors."""
    if torch.compiler.is_compiling() or not _TRITON.get():
        return None
    from . import gpu

    return gpu if gpu.takes(*tensors) else None
