"""Fixtures that several files share."""

from __future__ import annotations

from cpu_libraries import library

__all__ = ["library"]
