"""Small nets as graph, codec, segmentation and diffusion libraries write them: what once came out wrong in one of
them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GraphAttention(nn.Module):
    """GAT: an attention vector per head, `(x * a).sum(-1)`, and a softmax over the edges that end in a node."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.lin = heads, nn.Linear(5, heads * width, bias=False)
        self.att_src = nn.Parameter(torch.randn(1, heads, width))
        self.att_dst = nn.Parameter(torch.randn(1, heads, width))
        self.bias = nn.Parameter(torch.zeros(heads * width))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.lin(x).view(len(x), self.heads, -1)
        scores = (h * self.att_src).sum(-1)[edges[0]] + (h * self.att_dst).sum(-1)[edges[1]]
        weights = F.leaky_relu(scores, 0.2).exp()
        index = edges[1][:, None].expand_as(weights)
        weights = weights / (torch.zeros(len(x), self.heads).scatter_add(0, index, weights)[edges[1]] + 1e-9)
        out = torch.zeros_like(h).index_add(0, edges[1], h[edges[0]] * weights[..., None])
        return out.flatten(1) + self.bias


class Snake(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * x).pow(2)


class Codec(nn.Module):
    """A neural codec: snake activations, weight-normed convolutions, residual vector quantisers, straight through."""

    def __init__(self, channels: int = 8, quantisers: int = 3) -> None:
        super().__init__()
        weight_norm = nn.utils.parametrizations.weight_norm
        self.encoder = nn.Sequential(
            weight_norm(nn.Conv1d(1, channels, 7, padding=3)), Snake(channels), nn.Conv1d(channels, channels, 4, 2, 1)
        )
        self.books = nn.ModuleList(nn.Embedding(16, channels) for _ in range(quantisers))
        self.decoder = nn.Sequential(
            Snake(channels),
            weight_norm(nn.ConvTranspose1d(channels, channels, 4, 2, 1)),
            nn.Conv1d(channels, 1, 7, 1, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        z = rest = self.encoder(x).mT
        total = torch.zeros_like(z)
        for book in self.books:
            q = book(torch.cdist(rest, book.weight[None]).argmin(-1))
            q = rest + (q - rest).detach()
            total, rest = total + q, rest - q
        return self.decoder(total.mT).tanh()


class FiniteScalar(nn.Module):
    """FSQ: every feature rounded to a few levels, `round` straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        z = self.into(x).tanh() * 3.5
        return self.out((z + (z.round() - z).detach()) / 4)


class HardChoice(nn.Module):
    """Gumbel-softmax as torch has it, without its noise: a hard choice forwards, the soft one backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        soft = self.router(x).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        gate = hard - soft.detach() + soft
        weights = torch.stack([e.weight for e in self.experts])
        biases = torch.stack([e.bias for e in self.experts])
        return (torch.einsum("bd,efd->bef", x, weights) + biases).mul(gate[..., None]).sum(1)


class SpatialGate(nn.Module):
    """CBAM: a map of places from the mean and the largest of all channels."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem, self.gate = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(2, 1, 7, padding=3)
        self.norm, self.head = nn.BatchNorm2d(channels), nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x))
        pooled = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
        return self.head(y * self.gate(pooled).sigmoid())


class Highway(nn.Module):
    """`(1 - g) x + g f(x)` and `x + a (f(x) - x)`, many times over."""

    def __init__(self, width: int = 8, blocks: int = 4) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.alpha = nn.Parameter(torch.zeros(blocks, width))

    def forward(self, x: Tensor) -> Tensor:
        for gate, layer, alpha in zip(self.gates, self.layers, self.alpha.sigmoid(), strict=True):
            g = gate(x).sigmoid()
            x = (1 - g) * x + g * layer(x).relu()
            x = x + alpha * (layer(x) - x)
        return x


class PaddedBias(nn.Module):
    """RegionViT: biases of relative positions by lookup, padded for a token without a place."""

    def __init__(self, width: int = 8, heads: int = 2, size: int = 2) -> None:
        super().__init__()
        self.heads, self.table = heads, nn.Embedding((2 * size - 1) ** 2, heads)
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
        offset = grid[:, :, None] - grid[:, None] + size - 1
        self.register_buffer("places", offset[0] * (2 * size - 1) + offset[1])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        bias = F.pad(self.table(self.places).permute(2, 0, 1)[None], (1, 0, 1, 0))
        attention = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1)
        return x + self.out((attention @ v).transpose(1, 2).flatten(2))


class Differential(nn.Module):
    """Differential attention: the difference of two maps, weighed by a learned number made of dot products."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        for name in ("q1", "k1", "q2", "k2"):
            self.register_parameter(name, nn.Parameter(0.1 * torch.randn(width // 2)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        maps = [
            (a @ b.mT / math.sqrt(a.shape[-1])).softmax(-1) for a, b in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True)
        ]
        share = (self.q1 * self.k1).sum().exp() - (self.q2 * self.k2).sum().exp() + 0.8
        return x + self.out((maps[0] - share * maps[1]) @ v)
