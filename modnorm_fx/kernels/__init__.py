"""Kernels behind `spectral_norm` and the normaliser: `cpu` (C++, compiled on first use), `gpu` (Triton).

They are optional: torch does the same. Triton kernels are used within `triton(True)`, which the backends "triton" and
"cudagraph-triton" enter.
"""

from __future__ import annotations

from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["triton", "triton_for"]

_TRITON: ContextVar[bool] = ContextVar("modnorm_fx_triton", default=False)


class triton:
    """A context within which Triton kernels are used where they can be, if it is on. (A class, since every step enters
    it, and contextlib's generators cost several times as much.)"""

    def __init__(self, on: bool):
        self._on = on

    def __enter__(self) -> None:
        self._token = _TRITON.set(self._on)

    def __exit__(self, *_: object) -> None:
        _TRITON.reset(self._token)


def triton_for(*tensors: Tensor) -> ModuleType | None:
    """The module of Triton kernels, if they are on and take these tensors."""
    if torch.compiler.is_compiling() or not _TRITON.get():
        return None
    from . import gpu

    return gpu if gpu.takes(*tensors) else None
