"""Fixtures that several files share, and which tests share a process."""

from __future__ import annotations

import pytest
from cpu_libraries import library

__all__ = ["library"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one model run in one process (under ``--dist loadgroup``), which then converts it once."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        model = next((params[key] for key in ("name", "spec") if isinstance(params.get(key), str)), None)
        if model is not None:
            item.add_marker(pytest.mark.xdist_group(model))
