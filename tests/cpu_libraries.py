"""The C++ kernels that users get, which round to bfloat16 where the processor can, and those of other processors."""

from __future__ import annotations

import ctypes
import functools

import pytest

from modnorm_fx.kernels import cpu

ROUNDING = 2.0**-9
"""How far rounding to bfloat16 moves an entry, and so the norm of a matrix, at most."""

NAMES = {"as installed": (), "single": ("-DSINGLE",)}


@functools.cache
def compiled(name: str) -> ctypes.CDLL:
    compiler = cpu._compiler()
    assert compiler, "these tests need a C++ compiler"
    found = cpu._loaded(cpu._built(compiler, *NAMES[name]))
    assert found is not None
    return found


@pytest.fixture(params=list(NAMES))
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with each of them; its name."""
    found = compiled(request.param)
    monkeypatch.setattr(cpu, "library", lambda: found)
    return request.param
