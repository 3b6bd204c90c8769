"""Ways to train a model that a learning-rate sweep compares: ours, and the rivals as their authors use them.

A recipe takes a freshly built model and returns the optimizer that trains it; some also change the initialisation.
The rules of mup are relative to the smallest width of the sweep: a recipe is given the means to build that model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from modnorm_fx.atoms import Embedding
from modnorm_fx.errors import ModnormError
from modnorm_fx.norm import ModularNorm
from modnorm_fx.optim import ModularOptimizer

__all__ = ["RECIPES", "Recipe", "Setting"]

BETAS = (0.9, 0.95)
MOMENTUM = 0.9


@dataclass(frozen=True)
class Setting:
    """What a recipe is given.

    Attributes:
        model: the model to train; a recipe may initialise it anew.
        norm: makes its modular norm.
        narrowest: makes the model of this depth in the smallest width of the sweep.
        lr, weight_decay: of the optimizer. seed: of random initial weights.
    """

    model: nn.Module
    norm: Callable[[], ModularNorm]
    narrowest: Callable[[], nn.Module]
    lr: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class Recipe:
    """A way to train: what it is called in reports, the learning rates tried by default, and how it begins."""

    title: str
    lrs: tuple[float, ...]
    begin: Callable[[Setting], Optimizer]


def _octaves(lowest: int, highest: int) -> tuple[float, ...]:
    return tuple(2.0**power for power in range(lowest, highest + 1))


def _adamw(setting: Setting) -> Optimizer:
    return AdamW(setting.model.parameters(), lr=setting.lr, betas=BETAS, weight_decay=setting.weight_decay)


def _adamw_initialized(setting: Setting) -> Optimizer:
    """Tells what the norm does from what its initial weights do."""
    _initialize(setting, setting.norm())
    return _adamw(setting)


def _initialize(setting: Setting, norm: ModularNorm) -> None:
    norm.initialize_(setting.model, torch.Generator().manual_seed(setting.seed))


def _normalised(
    base: Callable[[Iterator[nn.Parameter]], Optimizer], mode: Literal["normalize", "dualize"] = "normalize"
) -> Callable[[Setting], Optimizer]:
    def begin(setting: Setting) -> Optimizer:
        norm = setting.norm()
        _initialize(setting, norm)
        return ModularOptimizer(
            base(setting.model.parameters()), norm, lr=setting.lr, weight_decay=setting.weight_decay, mode=mode
        )

    return begin


def _muon(setting: Setting) -> Optimizer:
    """`torch.optim.Muon` for the matrices of the blocks, AdamW for all else, at one learning rate.

    Sorted as its users sort by hand: matrices with two axes that are neither a lookup nor the head. The updates of Muon
    are brought to the RMS of AdamW's (`match_rms_adamw`), so that one learning rate serves both.
    """
    norm = setting.norm()
    head = _last_matrix(norm)
    lookups = {leaf.weight for leaf in norm.leaves if isinstance(leaf.atom, Embedding)}
    named = dict(setting.model.named_parameters())
    hidden = [
        p for name, p in named.items() if p.dim() == 2 and name not in lookups | {head} and name not in norm.unused
    ]
    if not hidden:
        raise ModnormError(
            "The model has no matrix with two axes between its input and its head.",
            why="Muon takes nothing else",
            do="Leave muon out of --optimizers.",
        )
    chosen = {id(p) for p in hidden}
    rest = [p for p in named.values() if id(p) not in chosen]
    muon = torch.optim.Muon(
        hidden, lr=setting.lr, weight_decay=setting.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adamw = AdamW(rest, lr=setting.lr, betas=BETAS, weight_decay=setting.weight_decay)
    return _Several([muon, adamw])


def _last_matrix(norm: ModularNorm) -> str:
    """The parameter of the last matrix in order of use: the head."""
    return next(leaf.weight for leaf in reversed(norm.leaves) if leaf.atom.is_matrix)


class _Several(Optimizer):
    """Optimizers that step together; their groups are one list, so that a schedule reaches all."""

    def __init__(self, optimizers: list[Optimizer]):
        super().__init__([p for o in optimizers for group in o.param_groups for p in group["params"]], {})
        self.optimizers = optimizers
        self.param_groups = [group for o in optimizers for group in o.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for optimizer in self.optimizers:
            optimizer.step()
        return loss


def _mup(setting: Setting) -> Optimizer:
    """The rules of maximal update parametrisation for Adam, relative to the narrowest model (arXiv 2203.03466).

    Table 8 there. A weight is told by its shape, as in the package `mup`: axes that are longer than in the narrowest
    model are widths.
    Matrices with two of them: the initial weights times 1/√m and the learning rate times 1/m, for m the ratio of the
    inputs. The head's input is divided by m. Heads of attention keep their size here, so logits need no change. Weight
    decay is kept independent of the learning rate of a group, as the paper's authors advise.
    """
    small = {name: p.shape for name, p in setting.narrowest().named_parameters()}
    groups: dict[float, list[Tensor]] = {}
    head = _last_linear(setting.model)
    tied = {id(p) for p in head.parameters(recurse=False)}
    widened = 1.0
    for name, p in setting.model.named_parameters():
        before = small[name]
        wider = [axis for axis, (n, m) in enumerate(zip(p.shape, before, strict=True)) if n > m]
        ratio = 1.0
        if len(wider) >= 2:
            inputs = 0 if _stored_transposed(setting.model, name) else 1
            ratio = p.shape[inputs] / before[inputs]
            with torch.no_grad():
                p.mul_(ratio**-0.5)
        elif id(p) in tied and wider:
            widened = max(p.shape[axis] / before[axis] for axis in wider)
        groups.setdefault(ratio, []).append(p)
    if widened > 1:
        head.register_forward_pre_hook(lambda _module, args: (args[0] / widened, *args[1:]))
    return AdamW(
        [
            {"params": params, "lr": setting.lr / ratio, "weight_decay": setting.weight_decay * ratio}
            for ratio, params in groups.items()
        ],
        lr=setting.lr,
        betas=BETAS,
        weight_decay=setting.weight_decay,
    )


def _last_linear(model: nn.Module) -> nn.Module:
    head = getattr(model, "get_output_embeddings", lambda: None)() or getattr(model, "get_classifier", lambda: None)()
    if isinstance(head, nn.Module) and any(True for _ in head.parameters(recurse=False)):
        return head
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def _stored_transposed(model: nn.Module, name: str) -> bool:
    """transformers' Conv1D keeps its matrix as [in, out]."""
    return type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"


RECIPES: dict[str, Recipe] = {
    "modnorm-adamw": Recipe(
        "AdamW in the modular norm", _octaves(-5, 0), _normalised(lambda p: AdamW(p, betas=BETAS, weight_decay=0.0))
    ),
    "modnorm-sgd": Recipe(
        "SGD with momentum in the modular norm",
        _octaves(-5, 0),
        _normalised(lambda p: SGD(p, lr=1.0, momentum=MOMENTUM)),
    ),
    "modnorm-dualize": Recipe(
        "dual of the momentum (modular duality)",
        _octaves(-6, -1),
        _normalised(lambda p: SGD(p, lr=1.0, momentum=MOMENTUM, nesterov=True), "dualize"),
    ),
    "adamw": Recipe("AdamW", _octaves(-11, -6), _adamw),
    "adamw-initialized": Recipe("AdamW from the norm's initial weights", _octaves(-11, -6), _adamw_initialized),
    "muon": Recipe("Muon, and AdamW for what is not a hidden matrix", _octaves(-11, -6), _muon),
    "mup": Recipe("AdamW under mup", _octaves(-11, -6), _mup),
}
"""Recipes by name; the learning rates are octaves around what people use."""
