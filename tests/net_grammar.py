"""Random nets from a grammar, as ordinary modules: every block maps `[batch, 16 tokens, 8 features]` to the same shape.

A block is a tuple: its kind, a tag that names its parameters, and the blocks inside it. `Net` builds it; what the
source makes of each parameter is in `expected_norms`, written down from the modules alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import geometry
import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, TOKENS = 8, 16
Block = tuple  # (kind, tag, *blocks)
PLAIN = (
    "linear", "wide", "relu", "gelu", "silu", "tanh", "layer_norm", "rms_norm", "gain", "bias", "table", "conv",
    "depthwise", "grouped", "dilated", "transposed", "conv2d", "conv3d", "batch_norm", "group_norm", "patches",
    "packed_attention", "written_attention", "squeeze", "position_join", "twice",
)  # fmt: skip
AROUND = ("residual", "pre_norm", "gate", "join", "sum", "chain")


def _around(inside: st.SearchStrategy) -> st.SearchStrategy:
    return st.tuples(st.sampled_from(AROUND), st.lists(inside, min_size=2, max_size=3)).map(
        lambda b: (b[0], "", *(b[1][:1] if b[0] in ("residual", "pre_norm") else b[1]))
    )


def letters(number: int) -> str:
    """A name without digits, which would make it a block of a stack."""
    return "".join(chr(ord("a") + int(c)) for c in str(number))


def tagged(block: Block, count: list[int] | None = None) -> Block:
    """The block with a tag of its own for everything in it."""
    count = [0] if count is None else count
    count[0] += 1
    return (block[0], letters(count[0]), *(tagged(b, count) for b in block[2:]))


blocks = st.recursive(st.sampled_from(PLAIN).map(lambda kind: (kind, "")), _around, max_leaves=6).map(tagged)


def permuted(block: Block) -> Block:
    """The same function with the branches of every sum in the reverse order."""
    inside = [permuted(b) for b in block[2:]]
    return (block[0], block[1], *(inside[::-1] if block[0] == "sum" else inside))


def kinds(block: Block) -> set[str]:
    return {block[0]}.union(*(kinds(b) for b in block[2:]))


class Table(nn.Module):
    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))


def _modules(kind: str) -> dict[str, nn.Module]:
    w = WIDTH
    match kind:
        case "linear" | "twice":
            return {"l": nn.Linear(w, w)}
        case "wide":
            return {"l": nn.Linear(w, 2 * w), "m": nn.Linear(2 * w, w, bias=False)}
        case "layer_norm":
            return {"n": nn.LayerNorm(w)}
        case "rms_norm" | "gain":
            return {"g": Table(w)}
        case "bias":
            return {"b": Table(w)}
        case "table":
            return {"t": Table(1, TOKENS, w)}
        case "conv":
            return {"c": nn.Conv1d(w, w, 3, padding=1)}
        case "depthwise":
            return {"c": nn.Conv1d(w, w, 3, padding=1, groups=w)}
        case "grouped":
            return {"c": nn.Conv1d(w, w, 3, padding=1, groups=2)}
        case "dilated":
            return {"c": nn.Conv1d(w, w, 3, padding=2, dilation=2, bias=False)}
        case "transposed":
            return {"c": nn.ConvTranspose1d(w, w, 3, padding=1, groups=2)}
        case "conv2d":
            return {"c": nn.Conv2d(w, w, (3, 1), padding=(1, 0))}
        case "conv3d":
            return {"c": nn.Conv3d(w, w, (1, 3, 1), padding=(0, 1, 0))}
        case "batch_norm":
            return {"n": nn.BatchNorm1d(w)}
        case "group_norm":
            return {"n": nn.GroupNorm(2, w)}
        case "patches":
            return {"p": nn.Conv1d(w, 2 * w, 2, stride=2)}
        case "packed_attention":
            return {"qkv": nn.Linear(w, 3 * w), "o": nn.Linear(w, w)}
        case "written_attention":
            return {"q": nn.Linear(w, w), "k": nn.Linear(w, w), "v": nn.Linear(w, w), "o": nn.Linear(w, w)}
        case "squeeze":
            return {"s": nn.Linear(w, w // 2), "e": nn.Linear(w // 2, w)}
        case "position_join":
            return {"t": Table(1, 4, w), "c": nn.Conv1d(w, w, 5)}
        case "join":
            return {"l": nn.Linear(2 * w, w)}
        case "pre_norm":
            return {"n": nn.LayerNorm(w)}
    return {}


def _apply(kind: str, m: dict[str, nn.Module], x: Tensor, inside: list[Callable[[Tensor], Tensor]]) -> Tensor:
    def channels(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x.transpose(1, 2)).transpose(1, 2)

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (2, -1)).transpose(1, 2)

    match kind:
        case "linear":
            return m["l"](x)
        case "twice":
            return m["l"](F.relu(m["l"](x)))
        case "wide":
            return m["m"](F.gelu(m["l"](x)))
        case "relu" | "gelu" | "silu":
            return getattr(F, kind)(x)
        case "tanh":
            return x.tanh()
        case "layer_norm":
            return m["n"](x)
        case "rms_norm":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * m["g"].weight
        case "gain":
            return x * m["g"].weight
        case "bias":
            return x + m["b"].weight
        case "table":
            return x + m["t"].weight
        case "conv" | "depthwise" | "grouped" | "dilated" | "transposed":
            return channels(m["c"], x)
        case "batch_norm" | "group_norm":
            return channels(m["n"], x)
        case "conv2d":
            return m["c"](x.transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2)
        case "conv3d":
            return m["c"](x.transpose(1, 2).unflatten(2, (2, 4, 2))).flatten(2).transpose(1, 2)
        case "patches":
            return channels(m["p"], x).reshape(x.shape)
        case "packed_attention":
            q, k, v = (heads(t) for t in m["qkv"](x).chunk(3, -1))
            return m["o"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        case "written_attention":
            q, k, v = (heads(m[name](x)) for name in "qkv")
            share = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
            return m["o"]((share @ v).transpose(1, 2).flatten(2))
        case "squeeze":
            return x * torch.sigmoid(m["e"](F.relu(m["s"](x.mean(1, keepdim=True)))))
        case "position_join":
            return channels(m["c"], torch.cat([m["t"].weight.expand(x.shape[0], -1, -1), x], dim=1))
        case "residual":
            return x + inside[0](x)
        case "pre_norm":
            return x + inside[0](m["n"](x))
        case "gate":
            return inside[0](x) * torch.sigmoid(inside[1](x))
        case "join":
            return m["l"](torch.cat([inside[0](x), inside[1](x)], dim=-1))
        case "sum":
            return sum((f(x) for f in inside[1:]), start=inside[0](x))
        case "chain":
            for f in inside:
                x = f(x)
            return x
    raise AssertionError(kind)


class Net(nn.Module):
    """The block between a stem and a head; `prefix` is put before every name."""

    def __init__(self, block: Block, prefix: str = ""):
        super().__init__()
        self.block = block
        self.parts = nn.ModuleDict()
        self.prefix = prefix
        self._build(block)
        self.parts[f"{prefix}head"] = nn.Linear(WIDTH, WIDTH)

    def _build(self, block: Block) -> None:
        if block[0] in AROUND and block[0] not in ("join", "pre_norm"):
            modules: dict[str, nn.Module] = {}
        else:
            modules = _modules(block[0])
        self.parts[self.prefix + block[1]] = nn.ModuleDict(modules)
        for inner in block[2:]:
            self._build(inner)

    def _run(self, block: Block, x: Tensor) -> Tensor:
        modules: Any = self.parts[self.prefix + block[1]]
        inside = [lambda y, b=b: self._run(b, y) for b in block[2:]]
        return _apply(block[0], dict(modules.items()), x, inside)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[f"{self.prefix}head"](self._run(self.block, x))


def expected_norms(net: nn.Module) -> dict[str, Callable[[np.ndarray], float]]:
    """Of every parameter (or third of a packed projection, `name[0:8]`): its norm, by the module that owns it."""

    def largest(w: np.ndarray) -> float:
        return float(np.abs(w).max())

    def row(w: np.ndarray) -> float:
        return max(geometry.rms(r) for r in w.reshape(-1, w.shape[-1]))

    def convolution(m: nn.Module) -> Callable[[np.ndarray], float]:
        if m.stride == m.kernel_size and m.kernel_size[0] > 1:
            return lambda w: geometry.spectral(w.reshape(w.shape[0], -1))
        return lambda w: max(geometry.convolution(w, m.groups, isinstance(m, nn.ConvTranspose1d)))

    out: dict[str, Callable[[np.ndarray], float]] = {}
    for path, m in net.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(m, Table):
            out[f"{path}.weight"] = {"g": largest, "b": geometry.rms, "t": row}[name]
        elif isinstance(m, nn.Linear) and name == "qkv":
            for start in (0, WIDTH, 2 * WIDTH):
                out[f"{path}.weight[{start}:{start + WIDTH}]"] = geometry.spectral
                out[f"{path}.bias[{start}:{start + WIDTH}]"] = geometry.rms
        elif isinstance(m, nn.Linear):
            out |= {f"{path}.weight": geometry.spectral, f"{path}.bias": geometry.rms}
        elif isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d):
            out |= {f"{path}.weight": convolution(m), f"{path}.bias": geometry.rms}
        elif isinstance(m, nn.LayerNorm | nn.BatchNorm1d | nn.GroupNorm):
            out |= {f"{path}.weight": largest, f"{path}.bias": geometry.rms}
    return out
