"""Whole nets as other libraries and papers write them, small: nobody tuned the conversion for them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# --- a diffusion U-Net ------------------------------------------------------------------------------------------------


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice; the time gives a scale and a shift."""

    def __init__(self, into: int, out: int, time: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, into), nn.Conv2d(into, out, 3, padding=1)
        self.time = nn.Linear(time, 2 * out)
        self.norm2, self.conv2 = nn.GroupNorm(4, out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(into, out, 1) if into != out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(t))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class CrossAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int = 2):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(4, width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(context, width), nn.Linear(context, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (m(s).view(b, -1, self.heads, c // self.heads).transpose(1, 2)
                   for m, s in ((self.q, tokens), (self.k, context), (self.v, context)))  # fmt: skip
        attention = (q @ k.transpose(-1, -2) / math.sqrt(c // self.heads)).softmax(-1)
        y = (attention @ v).transpose(1, 2).reshape(b, h * w, c)
        return x + self.out(y).transpose(1, 2).view(b, c, h, w)


class DiffusionUNet(nn.Module):
    def __init__(self, width: int = 8, context: int = 12):
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList([ResBlock(width, width, 4 * width), ResBlock(width, 2 * width, 4 * width)])
        self.shrink = nn.ModuleList([nn.Conv2d(w, w, 3, stride=2, padding=1) for w in (width, 2 * width)])
        self.middle = ResBlock(2 * width, 2 * width, 4 * width)
        self.attention = CrossAttention(2 * width, context)
        self.up = nn.ModuleList([ResBlock(4 * width, 2 * width, 4 * width), ResBlock(3 * width, width, 4 * width)])
        self.grow = nn.ModuleList([nn.Conv2d(2 * width, 2 * width, 3, padding=1) for _ in range(2)])
        self.out = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> dict[str, Tensor]:
        t = self.time(timestep_embedding(timestep, self.width))
        h, kept = self.conv_in(sample), []
        for block, conv in zip(self.down, self.shrink, strict=True):
            h = block(h, t)
            kept.append(h)
            h = conv(h)
        h = self.attention(self.middle(h, t), encoder_hidden_states)
        for block, conv in zip(self.up, self.grow, strict=True):
            h = conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
            h = block(torch.cat([h, kept.pop()], dim=1), t)
        return {"sample": self.out(h)}


# --- a decoder in the style of x-transformers -------------------------------------------------------------------------


class TalkingAttention(nn.Module):
    """Heads that talk before and after the softmax, ALiBi with learned slopes, normalised q and k, memory keys."""

    def __init__(self, width: int, heads: int = 4, memories: int = 3):
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.to_q, self.to_kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.talk1, self.talk2 = (nn.Conv2d(heads, heads, 1, bias=False) for _ in range(2))
        self.memory_k, self.memory_v = (nn.Parameter(torch.randn(heads, memories, self.size)) for _ in range(2))
        self.slopes = nn.Parameter(torch.tensor([2.0 ** -(i + 1) for i in range(heads)]).log().view(heads, 1, 1))
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.to_out = nn.Sequential(nn.Linear(width, 2 * width), nn.GLU())

    def rotary(self, x: Tensor) -> Tensor:
        n, half = x.shape[-2], self.size // 2
        angles = torch.arange(n).float()[:, None] * (10000.0 ** (-torch.arange(half).float() / half))[None]
        angles = torch.cat([angles, angles], dim=-1)
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * angles.cos() + turned * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in (self.to_q(x), *self.to_kv(x).chunk(2, -1)))
        q, k = self.rotary(F.normalize(q, dim=-1)), self.rotary(F.normalize(k, dim=-1))
        k = torch.cat([self.memory_k.expand(b, -1, -1, -1), k], dim=-2)
        v = torch.cat([self.memory_v.expand(b, -1, -1, -1), v], dim=-2)
        logits = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale.exp()
        distance = (torch.arange(n)[:, None] - torch.arange(-3, n)[None]).abs()
        logits = self.talk1(logits - self.slopes.exp() * distance)
        mask = torch.ones(n, n + 3, dtype=torch.bool).triu(4)
        logits = logits.masked_fill(mask, -torch.finfo(logits.dtype).max)
        y = torch.einsum("bhij,bhjd->bhid", self.talk2(logits.softmax(dim=-1)), v)
        return self.to_out(y.transpose(1, 2).reshape(b, n, -1))


class ScaleNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1) * width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5) * self.g


class XDecoder(nn.Module):
    """Memory tokens in front, gated feed-forward layers, ScaleNorm, a scaled residual."""

    def __init__(self, width: int = 16, depth: int = 2, tokens: int = 19):
        super().__init__()
        self.embed, self.memory = nn.Embedding(tokens, width), nn.Parameter(torch.randn(2, width))
        self.layers = nn.ModuleList(
            nn.ModuleList([ScaleNorm(width), TalkingAttention(width), ScaleNorm(width), nn.Linear(width, 4 * width),
                           nn.Linear(2 * width, width)])
            for _ in range(depth)
        )  # fmt: skip
        self.residual = nn.Parameter(torch.ones(depth, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.memory.expand(ids.shape[0], -1, -1), self.embed(ids)], dim=1)
        for i, (norm1, attention, norm2, wide, narrow) in enumerate(self.layers):
            x = x * self.residual[i] + attention(norm1(x))
            value, gate = wide(norm2(x)).chunk(2, dim=-1)
            x = x + narrow(value * F.gelu(gate))
        return self.head(self.norm(x)[:, self.memory.shape[0] :])


# --- a detector -------------------------------------------------------------------------------------------------------


class FrozenBatchNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("mean", 0.0), ("var", 1.0)):
            self.register_buffer(name, torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.mean * scale).view(1, -1, 1, 1)


class Detector(nn.Module):
    """A feature pyramid, one head for all levels with a learned scale a level, boxes from anchors: dict and lists."""

    def __init__(self, width: int = 8, classes: int = 3):
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), FrozenBatchNorm(o), nn.ReLU())
            for i, o in zip((3, *widths), widths, strict=False)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(w, width, 1) for w in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in widths)
        self.tower = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU())
        self.cls, self.box = nn.Conv2d(width, classes, 3, padding=1), nn.Conv2d(width, 4, 3, padding=1)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in widths)

    def forward(self, images: list[Tensor]) -> dict[str, Any]:
        x, features = torch.stack(images), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        top = self.lateral[-1](features[-1])
        levels = [self.smooth[-1](top)]
        for i in (1, 0):
            top = self.lateral[i](features[i]) + F.interpolate(top, size=features[i].shape[-2:], mode="bilinear")
            levels.insert(0, self.smooth[i](top))
        towers = [self.tower(level) for level in levels]
        boxes = []
        for scale, tower in zip(self.scales, towers, strict=True):
            distances = (self.box(tower) * scale).exp().flatten(2).transpose(1, 2)
            h, w = tower.shape[-2:]
            ys, xs = torch.meshgrid(torch.arange(h).float(), torch.arange(w).float(), indexing="ij")
            centre = torch.stack([xs, ys], dim=-1).view(1, -1, 2)
            boxes.append(torch.cat([centre - distances[..., :2], centre + distances[..., 2:]], dim=-1))
        return {"logits": [self.cls(t) for t in towers], "boxes": torch.cat(boxes, dim=1)}


# --- a generator ------------------------------------------------------------------------------------------------------


class EqualConv(nn.Module):
    """Equalised learning rate: unit weights times a number in the forward pass."""

    def __init__(self, into: int, out: int, kernel: int, up: bool = False):
        super().__init__()
        self.up, self.scale = up, 1 / math.sqrt(into * kernel**2)
        self.weight = nn.Parameter(torch.randn(*((into, out) if up else (out, into)), kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return F.conv_transpose2d(x, self.weight * self.scale, self.bias, stride=2, padding=1)
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.weight.shape[-1] // 2)


class EqualLinear(nn.Module):
    def __init__(self, into: int, out: int, lr: float = 0.01):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, into) / lr), nn.Parameter(torch.zeros(out))
        self.scale, self.lr = lr / math.sqrt(into), lr

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias * self.lr)


class Generator(nn.Module):
    """A constant grown by transposed convolutions, pixel norm, noise with learned strength, styles as scales."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.mapping = nn.Sequential(EqualLinear(width, width), nn.LeakyReLU(0.2), EqualLinear(width, width))
        self.constant = nn.Parameter(torch.randn(1, width, 4, 4))
        self.convs = nn.ModuleList([EqualConv(width, width, 4, up=True), EqualConv(width, width, 3)])
        self.styles = nn.ModuleList(EqualLinear(width, width, lr=1.0) for _ in range(2))
        self.strength = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(2))
        self.to_rgb = EqualConv(width, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z * (z.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt())
        x = self.constant.repeat(z.shape[0], 1, 1, 1)
        for conv, style, strength in zip(self.convs, self.styles, self.strength, strict=True):
            x = conv(x * (1 + style(w))[:, :, None, None])
            x = F.leaky_relu(x + strength * torch.randn_like(x[:, :1]), 0.2) * math.sqrt(2)
            x = x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
        return self.to_rgb(x).tanh()


class ModulatedConv(nn.Module):
    """StyleGAN2: every example has its own weights, demodulated, run as one grouped convolution."""

    def __init__(self, into: int = 4, out: int = 6, style: int = 5):
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(1, out, into, 3, 3)), nn.Linear(style, into)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weight = self.weight * (self.style(style) + 1).view(b, 1, c, 1, 1)
        weight = weight * (weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        y = F.conv2d(x.reshape(1, b * c, h, w), weight.flatten(0, 1), padding=1, groups=b)
        return y.view(b, -1, h, w)


# --- nets of coordinates, graphs and sets -----------------------------------------------------------------------------


class NeRF(nn.Module):
    def __init__(self, width: int = 16, octaves: int = 4):
        super().__init__()
        self.octaves, size = octaves, 3 + 6 * octaves
        self.points = nn.ModuleList(nn.Linear(i, width) for i in (size, width, width + size, width))
        self.sigma, self.feature = nn.Linear(width, 1), nn.Linear(width, width)
        self.view, self.rgb = nn.Linear(width + size, width), nn.Linear(width, 3)

    def encode(self, x: Tensor) -> Tensor:
        scaled = x[..., None] * 2.0 ** torch.arange(self.octaves) * math.pi
        return torch.cat([x, scaled.sin().flatten(-2), scaled.cos().flatten(-2)], dim=-1)

    def forward(self, points: Tensor, directions: Tensor) -> dict[str, Tensor]:
        h = e = self.encode(points)
        for i, layer in enumerate(self.points):
            h = F.relu(layer(torch.cat([h, e], dim=-1) if i == 2 else h))
        sigma = F.softplus(self.sigma(h)).squeeze(-1)
        rgb = self.rgb(F.relu(self.view(torch.cat([self.feature(h), self.encode(directions)], dim=-1)))).sigmoid()
        alpha = 1 - torch.exp(-sigma * 0.1)
        clear = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha + 1e-10], dim=-1), dim=-1)[:, :-1]
        return {"rgb": ((alpha * clear)[..., None] * rgb).sum(dim=1), "depth": (alpha * clear).sum(dim=1)}


class GraphNet(nn.Module):
    """A graph convolution with degrees by index_add, then attention with a softmax over the edges of each node."""

    def __init__(self, into: int = 5, width: int = 8, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.conv, self.edge = nn.Linear(into, width), nn.Linear(3, width)
        self.project = nn.Linear(width, heads * width, bias=False)
        self.source, self.target = (nn.Parameter(torch.randn(1, heads, width)) for _ in range(2))
        self.eps, self.head = nn.Parameter(torch.zeros(1)), nn.Linear(width, 2)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        source, target = edge_index
        n = x.shape[0]
        degree = torch.zeros(n).index_add(0, target, torch.ones(target.shape[0])).clamp(min=1)
        weight = (degree[source] * degree[target]).rsqrt()[:, None]
        x = self.conv(x)
        messages = F.relu(x[source] + self.edge(edge_attr)) * weight
        x = (1 + self.eps) * x + torch.zeros_like(x).index_add(0, target, messages)
        h = self.project(x).view(n, self.heads, -1)
        logits = F.leaky_relu((h * self.source).sum(-1)[source] + (h * self.target).sum(-1)[target], 0.2)
        index = target[:, None].expand_as(logits)
        peak = torch.full((n, self.heads), -math.inf).scatter_reduce(0, index, logits, "amax")
        share = (logits - peak[target]).exp()
        total = torch.zeros(n, self.heads).scatter_add(0, index, share)
        share = share / (total[target] + 1e-16)
        out = torch.zeros_like(h).index_add(0, target, h[source] * share[..., None])
        return self.head(F.elu(out.mean(dim=1)))


class PointNet(nn.Module):
    """A transform of the points made from them, and the maximum over points."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.transform = nn.Sequential(nn.Conv1d(3, width, 1), nn.BatchNorm1d(width), nn.ReLU())
        self.matrix = nn.Linear(width, 9)
        self.features = nn.Sequential(
            nn.Conv1d(3, width, 1), nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, width, 1)
        )
        self.head = nn.Linear(width, 4)

    def forward(self, points: Tensor) -> Tensor:
        matrix = self.matrix(self.transform(points).amax(dim=-1)).view(-1, 3, 3) + torch.eye(3)
        points = torch.bmm(points.transpose(1, 2), matrix).transpose(1, 2)
        return F.log_softmax(self.head(self.features(points).max(dim=-1).values), dim=-1)


class Siren(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.layers, self.last = nn.ModuleList([nn.Linear(2, width), nn.Linear(width, width)]), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(30.0 * layer(x))
        return self.last(x)


# --- recommendation, tables -------------------------------------------------------------------------------------------


class Recommender(nn.Module):
    """Bags of embeddings and their pairwise products, as in DLRM."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(13, width, mode="sum") for _ in range(3))
        self.dense = nn.Sequential(nn.Linear(5, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(width + 6, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.dense(dense)
        rows = torch.stack([x, *(bag(sparse[:, i]) for i, bag in enumerate(self.bags))], dim=1)
        products = rows @ rows.transpose(1, 2)
        i, j = torch.tril_indices(4, 4, offset=-1)
        return self.top(torch.cat([x, products[:, i, j]], dim=1)).sigmoid()


class FeatureTokens(nn.Module):
    """FT-Transformer: every numeric column is a token, its number times a row plus a row; torch's own encoder."""

    def __init__(self, columns: int = 6, width: int = 16):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(columns, width)), nn.Parameter(torch.randn(columns, width))
        self.cls = nn.Parameter(torch.randn(width))
        layer = nn.TransformerEncoderLayer(width, 4, 32, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[..., None] * self.weight + self.bias
        tokens = torch.cat([self.cls.expand(x.shape[0], 1, -1), tokens], dim=1)
        return self.head(self.encoder(tokens)[:, 0])
