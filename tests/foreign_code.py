"""Small models that run in an unusual way: custom operators and functions, control flow, containers, other numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.library.custom_op("modnorm_tests::softsign", mutates_args=())
def softsign(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


@softsign.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("modnorm_tests::unfaked", mutates_args=())
def unfaked(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


@torch.library.custom_op("modnorm_tests::underived", mutates_args=())
def underived(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


@underived.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _back(ctx: Any, gradient: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return gradient / (1 + x.abs()).square()


softsign.register_autograd(_back, setup_context=_keep)
unfaked.register_autograd(_back, setup_context=_keep)


class SquareMatmul(torch.autograd.Function):
    """x² W with its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * x @ w.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * x * (gradient @ w), gradient.T @ (x * x)


class Named(NamedTuple):
    y: Tensor
    extra: None = None


@dataclass
class Output:
    y: Tensor
    loss: Tensor | None = None


class Odd(nn.Module):
    """Two linear layers and a function of them and the inputs; further modules by name."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module | nn.Parameter):
        super().__init__()
        self.function = function
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def chosen_rows(m: Odd, x: Tensor) -> Tensor:
    h = m.a(x)
    keep = h.sum(-1) > 0
    out = h.new_zeros(x.shape[0], 3)
    out[keep] = m.b(h[keep])
    return out


def until_large(m: Odd, x: Tensor) -> Tensor:
    steps = 0
    while x.norm() < 1e3 and steps < 3:
        x, steps = x + m.a(x), steps + 1
    return m.b(x)


def forces(m: Odd, x: Tensor) -> dict[str, Tensor]:
    """A potential, and minus its gradient by autograd inside the forward pass."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        energy = m.b(torch.tanh(m.a(x))).sum()
        (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
    return {"energy": energy, "forces": -gradient}


def doubled(m: Odd, x: Tensor) -> Tensor:
    return m.b(torch.func.functional_call(m.a, {k: 2 * v for k, v in m.a.named_parameters()}, (x,)))


def in_bfloat16(m: Odd, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.b(F.gelu(m.a(x)))


def packed(m: Any, x: Tensor) -> Tensor:
    sequence = nn.utils.rnn.pack_padded_sequence(m.a(x), torch.tensor([5, 3]), batch_first=True)
    return m.b(nn.utils.rnn.pad_packed_sequence(m.lstm(sequence)[0], batch_first=True)[0])


def alignment_loss(m: Odd, x: Tensor) -> Tensor:
    log = m.b(m.a(x)).log_softmax(-1)
    return F.ctc_loss(log, torch.tensor([[1, 2], [2, 1]]), torch.tensor([6, 6]), torch.tensor([2, 2]))


def sampled_rows(m: Any, x: Tensor) -> Tensor:
    return m.b(F.gumbel_softmax(m.a(x), hard=True) @ m.rows.weight)


def neighbours(m: Any, x: Tensor) -> Tensor:
    adjacency = torch.eye(4).to_sparse()
    return m.b(F.relu(torch.sparse.mm(adjacency, m.a(x))))


def radial(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.exp(-m.width * torch.cdist(m.a(x), m.centres).square() / x.shape[-1]))


def losses(m: Odd, x: Tensor) -> tuple[Tensor, ...]:
    h = m.a(x)
    return (
        F.cross_entropy(m.b(h), torch.zeros(4, dtype=torch.long)),
        F.triplet_margin_loss(h, h.roll(1, 0), h.roll(2, 0)),
        F.smooth_l1_loss(h, x),
    )


def plain(m: Odd, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x)))


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 8)), generator=torch.Generator().manual_seed(math.prod(shape or (4, 8))))


ODD: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "custom op": lambda: (Odd(lambda m, x: m.b(softsign(m.a(x)))), (x(),)),
    "custom op without a fake": lambda: (Odd(lambda m, x: m.b(unfaked(m.a(x)))), (x(),)),
    "custom function": lambda: (Odd(lambda m, x: m.b(SquareMatmul.apply(x, m.a.weight))), (x(),)),
    "rows by values": lambda: (Odd(chosen_rows), (x(),)),
    "loop by values": lambda: (Odd(until_large), (x(),)),
    "forces": lambda: (Odd(forces), (x(),)),
    "functional call": lambda: (Odd(doubled), (x(),)),
    "autocast": lambda: (Odd(in_bfloat16), (x(),)),
    "packed sequence": lambda: (Odd(packed, lstm=nn.LSTM(8, 8, batch_first=True)), (x(2, 5, 8),)),
    "alignment loss": lambda: (Odd(alignment_loss), (x(6, 2, 8),)),
    "sampled rows": lambda: (Odd(sampled_rows, rows=nn.Embedding(8, 8)), (x(),)),
    "sparse matrix": lambda: (Odd(neighbours), (x(),)),
    "radial basis": lambda: (
        Odd(radial, width=nn.Parameter(torch.ones(8)), centres=nn.Parameter(torch.randn(8, 8))), (x(),)
    ),
    "several losses": lambda: (Odd(losses), (x(),)),
    "named tuple": lambda: (Odd(lambda m, x: Named(plain(m, x))), (x(),)),
    "dataclass out": lambda: (Odd(lambda m, x: Output(plain(m, x))), (x(),)),
    "dataclass in": lambda: (Odd(lambda m, o: plain(m, o.y)), (Output(x()),)),
    "scripted part": lambda: (nn.Sequential(torch.jit.script(nn.Linear(8, 8)), layers()), (x(),)),
    "compiled part": lambda: (nn.Sequential(torch.compile(nn.Linear(8, 8)), layers()), (x(),)),
    "data parallel": lambda: (nn.DataParallel(layers()), (x(),)),
    "bfloat16": lambda: (layers().bfloat16(), (x().bfloat16(),)),
    "double": lambda: (layers().double(), (x().double(),)),
}  # fmt: skip


def conditional(m: Odd, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: m.b(m.a(x)), lambda x: m.b(x), (x,))


def jagged(m: Odd, x: Tensor) -> Tensor:
    rows = torch.nested.nested_tensor([x[:3], x[3:]], layout=torch.jagged)
    return m.b(m.a(rows)).to_padded_tensor(0.0)


def overlapping(m: Any, x: Tensor) -> Tensor:
    turn = torch.matrix_exp(m.w - m.w.mT)
    return m.b(x @ turn[0] @ torch.linalg.inv(torch.eye(8) + m.w[1]))


#: not all of these can be converted; then the error says what can be done
HARD: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "custom op without a derivative": lambda: (Odd(lambda m, x: m.b(underived(m.a(x)))), (x(),)),
    "cond": lambda: (Odd(conditional), (x(),)),
    "nested": lambda: (Odd(jagged), (x(),)),
    "overlapping": lambda: (Odd(overlapping, w=nn.Parameter(torch.randn(2, 8, 8))), (x(),)),
    "lazy": lambda: (nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3)), (x(),)),
    "no parameters": lambda: (nn.ReLU(), (x(),)),
    "wrong shape": lambda: (layers(), (x(4, 7),)),
    "no output": lambda: (Odd(lambda m, x: None), (x(),)),
}
