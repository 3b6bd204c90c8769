"""Pass: how much each weight should contribute to the change of the output.

Stem 1, head 1, all stacks together ``stacks``; within the stacks equal shares per stack, per block, per weight. A net
without stacks gives every matrix mass 1, as the paper does. Doubling the depth leaves every total as it is (arXiv
2405.14813, section 3.1).

Several stacks (encoder and decoder, two towers, a backbone under a transformer) share equally, however deep each is:
only then does deepening one of them leave the budget of the others, and the rates between them, as they are.
A fusion of two layers beside a tower of 24 thus takes as much as the tower, and more per block; where that is unwanted,
``tare`` gives a stack another mass.

Biases of the same role in a stack (``blocks.#.mlp.fc2.bias``) move alike: those that are added to one residual stream
all have the gradient of that stream. Where shares add in quadrature, n of them would move the output √n times as far as
their mass says, so each is given an n-th of one bias's share: together they then do what one alone would.

Assumes places. Promises finite, non-negative masses, not all zero.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from modnorm_fx.atoms import Bias
from modnorm_fx.errors import MassError

from .find_stacks import Place
from .type_atoms import Weight

#: Share of a gain relative to a matrix of the same block. Vectors are a few per block and steer all features
#: at once; a tenth keeps their part of the budget small without freezing them. A choice, not a derivation.
VECTOR_SHARE = 0.1
#: Share of the biases of a role relative to a vector, where shares add in quadrature. A bias's update points one way
#: for all positions, the way that they all want to go: it changes the output up to 6 times as much as the sensitivity
#: to any direction says, and does so step after step. Targets a tenth as large, so a hundredth in squares; measured,
#: between 1/4 and 1/30 the losses are flat, and mostly lower than at 1 (docs/design-decisions.md).
BIAS_SHARE = 0.01
#: Names of shares, as ``masses`` takes them.
SHARES = ("vectors", "biases")
#: Total mass of stem, head and stacks. Equal parts: the measured optimum of the stacks' mass for the tracked
#: convention lies between 0.5 and 2 and is flat. The paper's own nets use 1 (MLP), 20 (CNN) and 5 (GPT).
TOTALS = {"stem": 1.0, "stacks": 1.0, "head": 1.0}


def assign_mass(
    weights: Sequence[Weight],
    places: Mapping[str, tuple[Place, ...]],
    masses: Mapping[str, float] | None = None,
    quadrature: bool = True,
) -> dict[str, float]:
    """Mass of every weight by key.

    Args:
        masses: overrides: ``stem``, ``stacks``, ``head`` (totals), ``vectors`` (share of a vector relative to a
            matrix), ``biases`` (share of the biases of a role relative to a vector).
        quadrature: whether shares of a unit update add as squares.

    Raises:
        MassError: a mass is negative or not finite, or all are zero.
    """
    given = dict(masses or {})
    for name, value in given.items():
        if not (isinstance(value, int | float) and 0 <= value < float("inf")):
            raise MassError(
                f"The mass of {name!r} is {value!r}.",
                why="a mass is a finite number, zero or more",
                do="Correct masses=.",
            )
    vectors = given.get("vectors", VECTOR_SHARE)
    bias = vectors * given.get("biases", BIAS_SHARE if quadrature else 1.0)
    totals = TOTALS | {k: v for k, v in given.items() if k in TOTALS}
    share = {w.key: 1.0 if any(atom.is_matrix for _, _, atom in w.uses) else vectors for w in weights}
    roles = {w.key: _role(w, places[w.key][0]) for w in weights if all(isinstance(a, Bias) for _, _, a in w.uses)}
    alike = Counter(roles.values())
    share |= {key: bias / (alike[role] if quadrature else 1) for key, role in roles.items()}
    groups: dict[Place, list[str]] = defaultdict(list)
    for w in weights:
        for place in places[w.key]:
            groups[place].append(w.key)
    blocks = [place for place in groups if place.region == "stacks"]
    out = dict.fromkeys(share, 0.0)
    for place, keys in groups.items():
        whole = sum(share[k] for k in keys)
        if place.region == "net":
            total = whole
        elif place.region == "stacks":
            stacks = len({b.stack for b in blocks})
            total = totals["stacks"] / stacks / sum(1 for b in blocks if b.stack == place.stack)
        else:  # a region of vectors alone (a final norm without head) weighs as much as its vectors
            total = totals[place.region] * min(1.0, whole)
        for k in keys:
            out[k] += total * share[k] / whole if whole else 0.0
    if not any(out.values()):
        raise MassError("All masses are zero.", why="then no weight may move", do="Give some part a positive mass.")
    return out


def _role(weight: Weight, place: Place) -> tuple[str, ...]:
    """What the biases that move alike have in common: stack, path without numbers, and shape (a stage's width)."""
    if place.region != "stacks":
        return (weight.key,)
    path = re.sub(r"(?<=\.)\d+(?=\.)", "#", weight.key.removeprefix(place.block))
    return place.stack, path, str(weight.shape)
