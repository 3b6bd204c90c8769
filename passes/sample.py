"""The fallback for an op without a rule: run it on random inputs of the tracked scales and measure.

The typical sensitivity to an operand x of n entries is ``√(‖J‖_F² / n_y)``: RMS of the output's change per RMS of an
independent change of x. ``E ‖Jᵀg‖² = ‖J‖_F²`` for a unit Gaussian cotangent g, so one vector-Jacobian product
estimates it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from modnorm_fx.rules import Call, Local, Operand

#: independent draws of input and cotangent that are averaged
DRAWS = 2


class SamplingError(Exception):
    """The op does not run on random inputs or has no derivative."""


def sample(module: fx.GraphModule, call: Call, wanted: Sequence[Operand]) -> Local:
    """Scale and sensitivities of ``call`` by running it. Raises SamplingError. Deterministic: the seed is fixed."""
    node = call.node
    generator = torch.Generator().manual_seed(0)
    squares = {op: 0.0 for op in wanted}
    output = 0.0
    for _ in range(DRAWS):
        leaves: dict[fx.Node, Any] = {}

        def value(n: fx.Node, leaves: dict[fx.Node, Any] = leaves) -> Any:
            if n not in leaves:
                leaves[n] = _random(n.meta["val"], call.scales.get(n, 1.0), generator)
            return leaves[n]

        try:
            with torch.enable_grad():
                args, kwargs = fx.map_arg((node.args, node.kwargs), value)
                target: Any = module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
                result = target(*args, **kwargs)
                results = [
                    r
                    for r in (result if isinstance(result, tuple | list) else (result,))
                    if isinstance(r, torch.Tensor) and r.requires_grad
                ]
                if not results:
                    raise SamplingError("no output has a derivative")
                inputs = [t for t in leaves.values() if t.requires_grad]
                cotangents = [_cotangent(r, generator) for r in results]
                slopes = torch.autograd.grad(results, inputs, cotangents, allow_unused=True)
        except SamplingError:
            raise
        except Exception as error:  # whatever a user's op raises on random inputs is the answer to "can it be sampled"
            raise SamplingError(f"{type(error).__name__}: {error}") from error
        entries = sum(r.numel() for r in results)
        output += sum(_square(r.detach()) for r in results) / entries / DRAWS
        by_tensor = {id(t): s for t, s in zip(inputs, slopes, strict=True)}
        for op in wanted:
            operand = call.args[op[0]] if op[1] is None else call.args[op[0]][op[1]]
            slope = by_tensor.get(id(leaves[operand]))
            if slope is not None:
                squares[op] += _square(slope) / (2 if slope.is_complex() else 1) / entries / DRAWS
    sensitivity: dict[str, float | list[float]] = {}
    for (name, index), square in squares.items():
        if index is None:
            sensitivity[name] = math.sqrt(square)
        else:
            whole: Any = sensitivity.setdefault(name, [0.0] * len(call.args[name]))
            whole[index] = math.sqrt(square)
    scale = math.sqrt(output)
    if not scale or not any(squares.values()):
        raise SamplingError("its output or derivative on random inputs is zero")
    if not math.isfinite(scale) or not all(math.isfinite(v) for v in squares.values()):
        raise SamplingError("its output or derivative on random inputs is not finite")
    return Local(scale, sensitivity)


def _square(values: torch.Tensor) -> float:
    return float(values.abs().double().square().sum())


def _cotangent(result: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Standard normal; real and imaginary part each, so that real inputs see E ‖Re Jᴴg‖² = ‖J‖² and complex ones twice
    that."""
    if not result.is_complex():
        return torch.randn(result.shape, generator=generator).to(result.dtype)
    draw = torch.randn(result.shape, generator=generator, dtype=torch.complex64)
    return (math.sqrt(2) * draw).to(result.dtype)


def _random(like: object, scale: float, generator: torch.Generator) -> object:
    if not isinstance(like, torch.Tensor):
        return like
    if like.is_floating_point() or like.is_complex():
        dtype = torch.complex64 if like.is_complex() else torch.float32
        draw = torch.randn(like.shape, generator=generator, dtype=dtype) * (scale or 1.0)
        return draw.to(like.dtype).requires_grad_()
    if like.dtype == torch.bool:
        return torch.ones(like.shape, dtype=torch.bool)
    return torch.zeros(like.shape, dtype=like.dtype)
