"""What the tests of the Triton kernels share. They work on the device that `KERNELS_TESTED_ON` names (see
`inner_pytest`), the CPU unless it is set."""

from __future__ import annotations

import os
from types import ModuleType

import pytest
import torch

torch.set_num_threads(1)  # the tensors are tiny
if "KERNELS_TESTED_ON" in os.environ:
    torch.set_default_device(os.environ["KERNELS_TESTED_ON"])


@pytest.fixture
def gpu() -> ModuleType:
    from modnorm_fx.kernels import gpu

    return gpu


@pytest.fixture
def fused() -> ModuleType:
    from modnorm_fx.kernels import gpu_adamw

    return gpu_adamw


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return numbers.to(torch.get_default_device())


def products(w: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    v = u.double() @ w.double().mT
    return v, v @ w.double()


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 3e-6) -> None:
    """Largest error against the largest entry, as for sums that cancel."""
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
