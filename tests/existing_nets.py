"""An ordinary transformer, written as users write one, for tests of the conversion."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PreNorm(nn.Module):
    """An ordinary pre-norm residual net with attention, as users write it."""

    def __init__(self, depth: int = 4, width: int = 32, heads: int = 4, layer_scale: float | None = None):
        super().__init__()
        self.token = nn.Embedding(23, width)
        self.blocks = nn.ModuleList(Block(width, heads, layer_scale) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 23)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, layer_scale: float | None):
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.mlp = (
            nn.LayerNorm(width),
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
        )
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), layer_scale or 1.0)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.scale1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.scale2 * self.mlp(self.norm2(x))


TOKENS = torch.randint(23, (2, 8), generator=torch.Generator().manual_seed(0))
