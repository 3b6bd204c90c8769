"""What the paper's own package says: `modula` nets, the target norms that its recursion hands to each weight, and its
weights as a plain-torch net would store them.

Order: every list is in modula's weight order, the order in which the forward pass uses the weights. The nets of
`modnorm_fx.models_zoo.paper` register their parameters in the same order, so `zip(named_parameters(), targets(...))`
pairs them; `Twins.targets()` does so.
"""

from __future__ import annotations

from dataclasses import dataclass

import modula.abstract
import modula.atom
import modula.compound
import torch
from modnorm_fx.models_zoo import paper
from modula.vector import Vector
from torch import Tensor, nn

import modnorm_fx  # noqa: F401

NETS = ("resmlp", "rescnn", "gpt")


def atoms(net: modula.abstract.Module) -> list[modula.abstract.Module]:
    """The modules that own a weight, in weight order."""
    if not net.children:
        return [net] * net.length
    return [atom for child in net.children for atom in atoms(child)]


def targets(net: modula.abstract.Module, target_norm: float = 1.0) -> list[float]:
    """The `target_norm` that `net.normalize` passes to each atom: modula's code runs, the atoms only record."""
    recorded: dict[int, float] = {}
    owners = atoms(net)
    for index, atom in enumerate(owners):

        def record(w: Vector, target_norm: float, index: int = index) -> None:
            assert index not in recorded and len(w) == 1
            recorded[index] = float(target_norm)

        atom.normalize = record  # on the instance: shadows the method
    try:
        net.normalize(Vector([torch.empty(0)] * net.length), target_norm=target_norm)
    finally:
        for atom in owners:
            del atom.normalize
    assert list(recorded) == list(range(net.length)), "modula did not visit its atoms in weight order"
    return [recorded[index] for index in range(net.length)]


def folded(net: modula.abstract.Module, w: Vector) -> list[Tensor]:
    """modula's weights with the factor of its forward pass multiplied in."""
    return [atom.scale * weight.detach() for atom, weight in zip(atoms(net), w, strict=True)]


@dataclass(frozen=True)
class Twins:
    """A modula net with weights, and a plain-torch net that computes the same function."""

    net: modula.abstract.Module
    weights: Vector
    plain: nn.Module
    inputs: Tensor

    def targets(self, target_norm: float = 1.0) -> dict[str, float]:
        """Parameter name of the plain net -> target norm."""
        names = [name for name, _ in self.plain.named_parameters()]
        return dict(zip(names, targets(self.net, target_norm), strict=True))


def twins(name: str, blocks: int = 3, seed: int = 0, blocks_mass: float | None = None) -> Twins:
    """The small pair `name` (one of `NETS`), modula's weights copied over. `blocks_mass`: of rescnn and gpt."""
    torch.manual_seed(seed)
    mass = {} if blocks_mass is None else {"blocks_mass": blocks_mass}
    if name == "resmlp":
        net = modula.compound.ResMLP(width=24, num_blocks=blocks, block_depth=2, input_dim=3 * 4 * 4, output_dim=10)
        plain: nn.Module = paper.ResMLP(width=24, blocks=blocks, block_depth=2, inputs=3 * 4 * 4, classes=10)
        inputs = torch.randn(5, 3, 4, 4)
    elif name == "rescnn":
        net = modula.compound.ResCNN(width=12, num_blocks=blocks, block_depth=2, input_dim=3, output_dim=10, **mass)
        plain = paper.ResCNN(width=12, blocks=blocks, block_depth=2, channels=3, classes=10)
        inputs = torch.randn(5, 3, 8, 8)
    elif name == "gpt":
        sizes = {"context": 16, "d_query": 6, "d_value": 10}  # unequal on purpose
        net = modula.compound.GPT(vocab_size=37, num_heads=3, d_embed=24, num_blocks=blocks, **sizes, **mass)
        plain = paper.GPT(vocab=37, heads=3, width=24, blocks=blocks, **sizes)
        inputs = torch.randint(37, (5, 16))
    else:
        raise ValueError(f"no twins named {name!r}; there are {NETS}")
    weights = net.initialize(device="cpu")
    with torch.no_grad():
        for parameter, weight in zip(plain.parameters(), folded(net, weights), strict=True):
            parameter.copy_(weight)
    return Twins(net, weights, plain, inputs)
