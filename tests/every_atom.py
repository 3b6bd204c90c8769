"""One small model that uses weights in every way there is, and norms of atoms written out with numpy."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modnorm_fx as mn
from modnorm_fx import atoms as A
from modnorm_fx.norm import ModularNorm

WIDTH, HEADS, TOKENS, WORDS = 16, 4, 4, 11


class EveryAtom(nn.Module):
    """A patch embedding, a table of positions, attention with packed weights per head and a learned bias, a depthwise
    convolution, GPT-2's kind of linear layer, experts, gains, a temperature, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=g))

        self.word = nn.Embedding(WORDS, WIDTH)
        self.patch = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.position = parameter(1, TOKENS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.bias = parameter(HEADS, TOKENS, TOKENS)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.transposed, self.shift = parameter(WIDTH, WIDTH), parameter(WIDTH)
        self.experts = parameter(2, WIDTH, WIDTH)
        self.layer_scale = parameter(WIDTH)
        self.temperature = parameter()
        self.reshaped = parameter(HEADS, WIDTH // HEADS, WIDTH)
        self.unused = parameter(3, 3)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.word.weight

    def forward(self, image: Tensor, words: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2) + self.position + self.word(words)
        h = self.norm(x)
        per_head = self.qkv(h).view(*h.shape[:-1], HEADS, -1).split(WIDTH // HEADS, -1)
        q, k, v = (t.transpose(1, 2) for t in per_head)
        x = x + ((q @ k.mT / 2 + self.bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.layer_scale * self.conv(self.mix(x.mT)).mT
        x = torch.addmm(self.shift, x.reshape(-1, WIDTH), self.transposed).view(x.shape)
        x = x + torch.bmm(F.gelu(x), self.experts) * self.temperature.exp()
        x = x + F.linear(x, self.reshaped.flatten(0, 1))
        return self.head(F.layer_norm(x, (WIDTH,)))


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 4, 4), torch.zeros(2, TOKENS, dtype=torch.long)


def sigma(m: np.ndarray) -> float:
    return float(np.linalg.svd(m, compute_uv=False)[0])


def pieces(atom: A.Atom, w: Tensor) -> list[float]:
    """The norms of an atom's pieces, written out: operator norm between RMS norms, the RMS, or the largest entry."""
    if isinstance(atom, A.Tied):
        return [sum(c * max(pieces(a, w)) for c, a in zip(atom.weights, atom.atoms, strict=True))]
    if isinstance(atom, A.Reshaped):
        w = w.reshape(atom.stored or atom.shape)
        w = w.permute(atom.permute) if atom.permute else w
        return pieces(atom.inner, w.reshape(atom.inner.shape))
    x = w.detach().double().numpy()
    match atom:
        case A.Linear():
            out, into = x.shape[::-1] if atom.transposed else x.shape
            return [math.sqrt(into / out) * sigma(x)]
        case A.PatchConv():
            return [math.sqrt(x[0].size / x.shape[0]) * sigma(x.reshape(x.shape[0], -1))]
        case A.Experts():
            out, into = x.shape[:0:-1] if atom.transposed else x.shape[1:]
            return [math.sqrt(into / out) * sigma(m) for m in x]
        case A.Conv():
            taps = x.reshape(*x.shape[:2], -1)
            stride = atom.stride or (1,) * len(x.shape[2:])
            met = math.prod(len(range(0, k, s)) for k, s in zip(x.shape[2:], stride, strict=True))
            found = []
            for group in np.split(taps, atom.groups):
                for t in range(taps.shape[2]):
                    tap = group[:, :, t].T if atom.transposed else group[:, :, t]
                    found.append(met * math.sqrt(tap.shape[1] / tap.shape[0]) * sigma(tap))
            return found
        case A.Gates():
            return [math.sqrt(m.shape[1] / m.shape[0]) * sigma(m) for m in np.split(x, atom.gates)]
        case A.GateBias():
            return [float(np.sqrt((b**2).mean())) for b in np.split(x, atom.gates)]
        case A.Embedding():
            return list(np.sqrt((x**2).mean(1)))
        case A.Table():
            axes = tuple(a % x.ndim for a in atom.feature_axes)
            return list(np.sqrt((x**2).mean(axes)).ravel())
        case A.Bias():
            return [float(np.sqrt((x**2).mean()))]
        case A.Gain() | A.LogitBias() | A.Scalar():
            return [float(np.abs(x).max())]
    raise AssertionError(atom)


def written_out(atom: A.Atom, w: Tensor) -> float:
    return max(pieces(atom, w))


CONVENTIONS = ("paper", "tracked")


def converted(convention: str) -> tuple[EveryAtom, ModularNorm]:
    model = EveryAtom()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, mn.convert(model, inputs(), convention=convention)


CASES = {name: converted(name) for name in CONVENTIONS}


def updates(norm: ModularNorm, seed: int = 0, dtype=torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    names = dict.fromkeys(leaf.weight for leaf in norm.leaves)
    return {name: (10 * torch.randn(norm.shapes[name], generator=g)).to(dtype) for name in names}
