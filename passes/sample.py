"""The fallback for an op without a rule: run it on random inputs of the tracked scales and known signs and measure.

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

from modnorm_fx.quadrature import Sign
from modnorm_fx.rules import Call, Local, Operand

#: independent draws of input and cotangent that are averaged
DRAWS = 2


class SamplingError(Exception):
    """The op does not run on random inputs or has no derivative."""


def sample(module: fx.GraphModule, call: Call, wanted: Sequence[Operand]) -> Local:
    """Scale and sensitivities of ``call`` by running it. Raises SamplingError. Deterministic: the seed is fixed.

    Masks are true in half of their places and indices are small numbers; where the op does not run on those (a mask
    that decides on a size), masks are true and indices zero.
    """
    try:
        return _sample(module, call, wanted, discrete=True)
    except SamplingError as error:
        if all(t.is_floating_point() or t.is_complex() for t in _tensors(call)):
            raise
        try:
            return _sample(module, call, wanted, discrete=False)
        except SamplingError:
            raise error from None


def _tensors(call: Call) -> list[torch.Tensor]:
    """Values of the operands."""
    values = (n.meta.get("val") for n in call.node.all_input_nodes)
    return [v for v in values if isinstance(v, torch.Tensor)]


def _sample(module: fx.GraphModule, call: Call, wanted: Sequence[Operand], *, discrete: bool) -> Local:
    node = call.node
    smallest = min((n for t in _tensors(call) for n in t.shape), default=1)
    generator = torch.Generator().manual_seed(0)
    squares = {op: 0.0 for op in wanted}
    output = 0.0
    for _ in range(DRAWS):
        leaves: dict[fx.Node, Any] = {}

        def value(n: fx.Node, leaves: dict[fx.Node, Any] = leaves) -> Any:
            if n not in leaves:
                sign, reach = call.signs.get(n, Sign.ANY), smallest if discrete else 0
                leaves[n] = _random(n.meta["val"], call.scales.get(n, 1.0), sign, reach, generator)
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
        if not entries:
            raise SamplingError("its output is empty")
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


def _random(like: object, scale: float, sign: Sign, reach: int, generator: torch.Generator) -> object:
    """Of the size and kind of ``like``; indices are below ``reach``, the size of the smallest axis."""
    if not isinstance(like, torch.Tensor):
        return like
    if like.is_floating_point() or like.is_complex():
        dtype = torch.complex64 if like.is_complex() else torch.float32
        draw = torch.randn(like.shape, generator=generator, dtype=dtype) * (scale or 1.0)
        if sign in (Sign.POSITIVE, Sign.NEGATIVE):
            draw = draw.abs() if sign is Sign.POSITIVE else -draw.abs()
        return draw.to(like.dtype).requires_grad_()
    if like.dtype == torch.bool:
        return torch.rand(like.shape, generator=generator) < (0.5 if reach else 2.0)
    return torch.randint(max(1, reach), like.shape, generator=generator).to(like.dtype)
