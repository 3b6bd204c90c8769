"""A model with a norm written by hand, and bases unknown to the package, for the tests of the optimizer."""

import warnings
from dataclasses import dataclass

import torch
from torch import nn

from modnorm_fx import atoms as A
from modnorm_fx import conventions
from modnorm_fx.optim import ModularOptimizer

F = nn.functional
torch.set_num_threads(1)  # the tensors are tiny


@dataclass(frozen=True)
class Leaf:
    key: str
    weight: str
    atom: A.Atom
    target: float
    slices: tuple = ()
    mass: float = 1.0
    sensitivity: float = 1.0
    scale: float = 1.0
    initial: float = 1.0

    def read(self, tensor):
        for part in self.slices:
            tensor = part.read(tensor)
        return tensor

    def write_(self, tensor, part):
        if self.slices and part.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            (only,) = self.slices
            only.write_(tensor, part)


class Norm:
    """The part of ModularNorm that the optimizer uses."""

    def __init__(self, model, leaves, unused=(), digest="digest"):
        self.leaves, self.unused, self.digest = tuple(leaves), tuple(unused), digest
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.aliases, self.mass, self.convention = {}, 1.0, conventions.TRACKED
        self._names = {p: name for name, p in model.named_parameters()}

    def parameter_name(self, p):
        return self._names.get(p)

    def norm(self, updates):
        return max(leaf.atom.norm(leaf.read(updates[leaf.weight])).item() / leaf.target for leaf in self.leaves)


class Net(nn.Module):
    """Packed projection [q; k; v] with one leaf per slice, a gain, a tied embedding and head, an unused parameter."""

    def __init__(self, width=12, words=10, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(words, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.gain = nn.Parameter(torch.ones(width))
        self.down = nn.Linear(width, width, bias=False)
        self.unused = nn.Parameter(torch.zeros(3))
        self.to(dtype)

    def forward(self, words):
        q, k, v = self.qkv(self.embed(words)).chunk(3, -1)
        x = F.layer_norm(torch.tanh(q * k) + v, v.shape[-1:], self.gain)
        return (x + self.down(x).relu()) @ self.embed.weight.T


def norm_of(model, **options):
    width, words = model.down.weight.shape[0], model.embed.weight.shape[0]
    shape = (words, width)
    third = [A.Slice(0, i * width, (i + 1) * width, 3 * width) for i in range(3)]
    leaves = [
        Leaf(
            "embed.weight",
            "embed.weight",
            A.Tied(shape, (A.Embedding(shape), A.Linear(shape)), (0.5, 1.0)),
            0.3,
            initial=0.25,
        ),
        *(
            Leaf(f"qkv.weight{s}", "qkv.weight", A.Linear((width, width)), t, (s,), initial=initial)
            for s, t, initial in zip(third, (0.1, 0.2, 0.4), (1.0, 2.0, 0.0), strict=True)
        ),
        *(Leaf(f"qkv.bias{s}", "qkv.bias", A.Bias((width,)), 0.05, (s,)) for s in third),
        Leaf("gain", "gain", A.Gain((width,)), 0.02),
        Leaf("down.weight", "down.weight", A.Linear((width, width)), 0.25),
    ]
    return Norm(model, leaves, unused=["unused"], **options)


def setup(make=torch.optim.SGD, dtype=torch.float32, seed=0, width=12, settings=None, **options):
    model = Net(width, dtype=dtype, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = ModularOptimizer(make(model.parameters(), **(settings or {})), norm_of(model), **options)
    return model, opt


def backward(model, step=0, scale=lambda loss: loss):
    words = torch.randint(0, 10, (8, 5), generator=torch.Generator().manual_seed(step))
    loss = F.cross_entropy(model(words).flatten(0, 1).float(), words.roll(1, 1).flatten())
    scale(loss).backward()
    return loss.detach()


def named(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def values(model):
    return {name: p.clone() for name, p in named(model).items()}


def moved(model, before):
    return {name: p.float() - before[name].float() for name, p in named(model).items()}


def remembered(opt):
    """What the optimizer knows of each leaf: its power vectors, and how often they were renewed."""
    return opt.state_dict()["modnorm"]["leaves"]


def train(model, opt, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        opt.zero_grad()
        losses.append(backward(model, step).item())
        opt.step()
    return losses


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum, decoupled decay: unknown to the wrapper, linear in lr."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.sign(m.lerp(p.grad, 1 - group["betas"][0])), alpha=-group["lr"])
                m.lerp_(p.grad, 1 - group["betas"][1])
        return loss


class PlainSGD(torch.optim.Optimizer):
    """Gradient descent that the wrapper does not know: its updates are as small as its gradients."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.grad


MAKERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, betas=(0.9, 0.95), weight_decay=0.0),
    "Adam-L2": lambda p: torch.optim.Adam(p, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "Lion": Lion,
    "Adafactor": torch.optim.Adafactor,
    "NAdam": torch.optim.NAdam,
}
