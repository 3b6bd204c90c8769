"""The nets of "Scalable Optimization in the Modular Norm" (arXiv 2405.14813, section 4), in plain torch.

Each computes the same family of functions as the net of that name in the paper's package. There, a layer stores a
weight of norm 1 and multiplies by a hidden factor in its forward pass (`sqrt(out/in)`, `sqrt(out/in)/k^2`, `sqrt(d)`).
Here nothing is hidden: an `nn.Linear`, `nn.Conv2d` or `nn.Embedding` without bias is all there is, and the factor is
part of the norm of its weight. Fresh weights have norm exactly 1 in that sense. Parameters are registered in the order
in which the forward pass uses them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modnorm_fx.errors import ModnormError

__all__ = ["GPT", "ResCNN", "ResMLP"]


def rms_divide(x: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    return x / x.square().mean(dim=dim, keepdim=True).sqrt()


def mean_subtract(x: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    return x - x.mean(dim=dim, keepdim=True)


def layer_norm(x: Tensor) -> Tensor:
    return rms_divide(mean_subtract(x))


def scaled_gelu(x: Tensor) -> Tensor:
    """GELU times sqrt(2): sensitivity 1 in the paper's accounting."""
    return math.sqrt(2) * F.gelu(x)


def mix(x: Tensor, branch: Tensor, branches: int) -> Tensor:
    """The paper's residual add: a convex combination, so that `branches` of them in a row have sensitivity 1."""
    return (1 - 1 / branches) * x + (1 / branches) * branch


@torch.no_grad()
def initialize_unit_norm(model: nn.Module) -> None:
    """Every weight to norm 1: semi-orthogonal matrices and conv taps, Gaussian embedding rows, the factor folded in."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.is_meta:
            continue
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(weight, gain=math.sqrt(module.out_features / module.in_features))
        elif isinstance(module, nn.Conv2d):
            taps = math.prod(module.kernel_size)
            for row in range(module.kernel_size[0]):
                for column in range(module.kernel_size[1]):
                    tap = torch.empty(weight.shape[:2], device=weight.device)
                    nn.init.orthogonal_(tap, gain=math.sqrt(module.out_channels / module.in_channels) / taps)
                    weight[:, :, row, column] = tap
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(weight)
            weight.copy_(rms_divide(weight))


class MLPResidue(nn.Module):
    """`depth` times: divide by the RMS, linear, absolute value, subtract the mean."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = mean_subtract(linear(rms_divide(x)).abs())
        return x


class CNNResidue(nn.Module):
    """As `MLPResidue` with 3x3 convolutions; statistics over channels and pixels together."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = mean_subtract(conv(rms_divide(x, (1, 2, 3))).abs(), (1, 2, 3))
        return x


class ResMLP(nn.Module):
    """A residual net whose blocks are MLPs; its input is flattened."""

    def __init__(self, width: int = 128, blocks: int = 3, block_depth: int = 2, inputs: int = 3072, classes: int = 10):
        super().__init__()
        self.initial = nn.Linear(inputs, width, bias=False)
        self.blocks = nn.ModuleList(MLPResidue(width, block_depth) for _ in range(blocks))
        self.final = nn.Linear(width, classes, bias=False)
        initialize_unit_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.initial(x.flatten(start_dim=1))
        for block in self.blocks:
            x = mix(x, block(x), len(self.blocks))
        return self.final(x)

    def example_inputs(self, batch: int = 2) -> tuple[Tensor, ...]:
        weight = self.initial.weight
        return (torch.randn(batch, self.initial.in_features, device=weight.device, dtype=weight.dtype),)


class ResCNN(nn.Module):
    """A residual net whose blocks are 3x3 convolutions at one resolution, with average pooling before the head."""

    def __init__(
        self,
        width: int = 64,
        blocks: int = 3,
        block_depth: int = 2,
        channels: int = 3,
        classes: int = 10,
        image_size: int = 32,
    ):
        super().__init__()
        self.image_size = image_size  # of example_inputs; the net itself takes any size
        self.initial = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(CNNResidue(width, block_depth) for _ in range(blocks))
        self.final = nn.Linear(width, classes, bias=False)
        initialize_unit_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.initial(x)
        for block in self.blocks:
            x = mix(x, block(x), len(self.blocks))
        return self.final(F.adaptive_avg_pool2d(x, 1).flatten(start_dim=1))

    def example_inputs(self, batch: int = 2) -> tuple[Tensor, ...]:
        weight = self.initial.weight
        shape = (batch, self.initial.in_channels, self.image_size, self.image_size)
        return (torch.randn(shape, device=weight.device, dtype=weight.dtype),)


class Attention(nn.Module):
    """Causal attention with logits scaled by 1/d_query, on thirds of query, key and value.

    The paper declares sensitivity 1 to each of the three, so 1/3 makes it 1 in all. The factor is on the inputs, as in
    the paper's package: logits carry 1/9 besides 1/d_query, the output 1/3.
    """

    def __init__(self, width: int, heads: int, d_query: int, d_value: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, heads * d_query, bias=False)
        self.key = nn.Linear(width, heads * d_query, bias=False)
        self.value = nn.Linear(width, heads * d_value, bias=False)
        self.out = nn.Linear(heads * d_value, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            (1 / 3) * linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / q.shape[-1])
        return self.out(y.transpose(1, 2).flatten(start_dim=2))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(scaled_gelu(self.up(x)))


class Block(nn.Module):
    """One attention branch and one MLP branch, two of the `branches` that the trunk has in all."""

    def __init__(self, width: int, heads: int, d_query: int, d_value: int, branches: int):
        super().__init__()
        self.branches = branches
        self.attention = Attention(width, heads, d_query, d_value)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = mix(x, self.attention(layer_norm(x)), self.branches)
        return mix(x, self.mlp(layer_norm(x)), self.branches)


class GPT(nn.Module):
    """A causal language model; `d_query` and `d_value` are per head and default to `width / heads`."""

    def __init__(
        self,
        vocab: int = 256,
        context: int = 128,
        heads: int = 4,
        width: int = 128,
        d_query: int | None = None,
        d_value: int | None = None,
        blocks: int = 3,
    ):
        super().__init__()
        if (d_query is None or d_value is None) and width % heads:
            raise ModnormError(
                f"A GPT of width {width} cannot have {heads} heads.",
                why="The width is split evenly over the heads.",
                do="Choose a width that is a multiple of the number of heads, or give d_query and d_value.",
            )
        d_query, d_value = d_query or width // heads, d_value or width // heads
        self.token = nn.Embedding(vocab, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, d_query, d_value, 2 * blocks) for _ in range(blocks))
        self.final = nn.Linear(width, vocab, bias=False)
        initialize_unit_norm(self)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = 1 / 2 * self.token(tokens) + 1 / 2 * self.position(positions)
        for block in self.blocks:
            x = block(x)
        return self.final(layer_norm(x))

    def example_inputs(self, batch: int = 2) -> tuple[Tensor, ...]:
        vocab, context = self.token.num_embeddings, self.position.num_embeddings
        return (torch.randint(vocab, (batch, context), device=self.token.weight.device),)
