"""Kernels behind `runtime`: `cpu` (C++, compiled on first use), `gpu` (Triton). Optional: torch does the same."""
