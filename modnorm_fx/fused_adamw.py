"""AdamW in C++: its update written straight into the normaliser's buffers, or the whole normalised step in one pass.

`torch.optim.AdamW` steps on zeros: they are written, then read and written again. `write_updates` reads gradient and
averages, and writes averages and update: six words of memory for each weight, not eight. It is used where it gives what
the optimizer would (to rounding): see `takes`. The first step of a parameter is always torch's own, which makes the
averages.

`FusedStep` goes further for parameters that consist of matrices whose power vectors are warm: update, norm and step are
computed while the parameter is in the cache, so that AdamW's own seven words are all that moves. A weight is then
changed before the update of the next one is known, so it must be certain beforehand that all updates are finite. They
are, if averages and gradients are: averages are looked at once, and again when anyone else has written to them.

`OfMatrices` says which parameters these are; on a GPU `fused_triton` steps them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import spectral_norm
from .atoms import Atom, Conv, Experts, Gates, Linear, PatchConv
from .buckets import Bucket, Line, Placement, buckets
from .codegen import make
from .kernels import cpu
from .normalizer import COLD_STEPS, Normalizer

if TYPE_CHECKING:
    from .norm import ModularNorm

__all__ = ["FusedStep", "OfMatrices", "Part", "plain", "takes", "write_updates"]

KNOWN = (torch.optim.Adam, torch.optim.AdamW)
KINDS = (Linear, PatchConv, Conv, Experts, Gates)

LARGE = 1e15
"""With finite averages and gradients below this, no entry of an update of AdamW overflows, nor does its square."""

Groups = list[dict[str, Any]]
Active = list[tuple[int, str, Tensor]]


def takes(base: Optimizer, groups: Groups, active: Active) -> bool:
    """Whether the kernels can stand in for `base.step()` with the settings `groups`: plain Adam or AdamW without hooks,
    float32 on the CPU, contiguous gradients and averages, no amsgrad, and every parameter has been stepped before."""
    if not plain(base, groups) or not active:
        return False
    for _, _, p in active:  # a plain loop: this runs for every parameter in every step
        state, gradient = base.state.get(p), p.grad
        if not state or gradient is None:
            return False
        average, square = state["exp_avg"], state["exp_avg_sq"]
        if not (gradient.is_contiguous() and average.is_contiguous() and square.is_contiguous() and p.is_contiguous()):
            return False
        if not cpu.takes(p, gradient, average, square, state["step"]):
            return False
    return True


def plain(base: Optimizer, groups: Groups) -> bool:
    """Whether the base is Adam or AdamW without hooks, with settings that the kernels know."""
    if type(base) not in KNOWN or base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        return False
    betas = [beta for group in groups for beta in group["betas"]]
    good = all(group["eps"] > 0 and not group["amsgrad"] for group in groups)
    return good and not any(isinstance(beta, Tensor) for beta in betas)


def write_updates(base: Optimizer, groups: Groups, active: Active, into: Mapping[str, Tensor]) -> None:
    """What `base.step()` with lr 1 would add to zeros, written `into`; its state moves on as if it had stepped."""
    alike: dict[tuple[int, torch.Size], list[tuple[str, Any]]] = defaultdict(list)
    for index, name, p in active:
        alike[index, p.shape].append((name, p))
    for (index, _), those in alike.items():
        states = [base.state[p] for _, p in those]
        counts = cpu.counted([state["step"] for state in states])
        settings = {count: cpu.Adam.of(groups[index], count) for count in set(counts)}
        cpu.adamw(
            [p.grad for _, p in those],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [into[name] for name, _ in those],
            [settings[count] for count in counts],
        )


class Part(NamedTuple):
    """The same part of the n parameters of a bucket, made of equal matrices.

    Attributes:
        names, keys: its parameters and leaves. line, spectral: its number among the lines of the normaliser, and that
        of its set of power vectors. atom: of all of them. offset: entries before it.
        shape: groups, taps, rows, c and ld, as in cpu.cpp. apart: entries from one group to the next.
        dense: whether it is contiguous, or columns at multiples of 16, and groups follow each other.
        over_unit: the singular values that the norms of the updates of a step of lr 1 come to.
        shrinkage: what weight decay multiplies, see `runtime.Line`.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]
    line: int
    spectral: int
    atom: Atom
    offset: int
    shape: tuple[int, int, int, int, int]
    apart: int
    dense: bool
    over_unit: tuple[float, ...]
    shrinkage: tuple[float, ...]


class OfMatrices:
    """Those parameters of a normaliser that consist of matrices; `rest` is a normaliser of the others.

    Args:
        norm, placements: what the normaliser was made from. whole: the normaliser; its power vectors are stepped.

    Attributes:
        parts: the parts of each bucket of the normaliser that is made of them, by its number. names: the parameters.
    """

    def __init__(self, norm: ModularNorm, placements: Mapping[str, Placement], whole: Normalizer):
        self.whole = whole
        self.parts: dict[int, list[Part]] = {}
        first = 0
        for index, bucket in enumerate(buckets(norm, placements)):
            parts = [_part(bucket, line, whole, first + i) for i, line in enumerate(bucket.lines)]
            first += len(parts)
            found = [part for part in parts if part is not None and self._fits(part)]
            complete = sum(math.prod(part.shape[:4]) for part in found) == math.prod(bucket.shape)
            if complete and self._takes(whole.buffers[index]):
                self.parts[index] = found
        every = [part for parts in self.parts.values() for part in parts]
        self.names = {name for part in every for name in part.names}
        others = {name: placement for name, placement in placements.items() if name not in self.names}
        self.rest = make(norm, others, whole.mode, whole.backend)
        self.rest.adopt([buffer for i, buffer in enumerate(whole.buffers) if i not in self.parts], whole.steps)
        taken = {part.spectral for part in every}
        self._shared = [index for index in range(len(whole.vectors)) if index not in taken]

    def _fits(self, part: Part) -> bool:
        """Whether the kernels can work on a part that lies so."""
        raise NotImplementedError

    def _takes(self, buffer: Tensor) -> bool:
        """Whether they can work on such tensors."""
        raise NotImplementedError

    def is_warm(self) -> bool:
        """Whether one step of power iteration is enough for all of them."""
        steps, vectors = self.whole.steps, self.whole.vectors
        return all(
            vectors[part.spectral] is not None and min(map(steps.__getitem__, part.keys)) >= COLD_STEPS
            for parts in self.parts.values()
            for part in parts
        )

    def others(self, active: Active) -> Active:
        """What `rest` is for."""
        return [item for item in active if item[1] not in self.names]

    def share(self) -> Normalizer:
        """`rest`, with the power vectors of now."""
        self.rest.vectors = [self.whole.vectors[index] for index in self._shared]
        return self.rest

    def keep(self, *, in_place: bool = False) -> None:
        """`rest.keep`, and the whole normaliser has the same power vectors."""
        self.rest.keep(in_place=in_place)
        for index, vectors in zip(self._shared, self.rest.vectors, strict=True):
            self.whole.vectors[index] = vectors


class FusedStep(OfMatrices):
    """Their step on a CPU, a matrix at a time."""

    def __init__(self, norm: ModularNorm, placements: Mapping[str, Placement], whole: Normalizer):
        super().__init__(norm, placements, whole)
        self._calls = [call for parts in self.parts.values() for call in ([parts] if _tile(parts) else zip(parts))]
        self._noted: list[tuple[Any, ...]] = []  # what `_note` saw, and
        self._checked = False  # whether it looked for what is not finite
        self._mine: Active = []  # of this step

    def _fits(self, part: Part) -> bool:
        return part.dense

    def _takes(self, buffer: Tensor) -> bool:
        return cpu.takes(buffer)

    def ready(self, base: Optimizer, groups: Groups, active: Active, nonfinite: str, largest: float) -> bool:
        """Whether this step can be done so: all parameters of matrices move, their power vectors are warm, the kernels
        can stand in for the base, nothing is added to gradients, and (unless `nonfinite` is "unchecked") all updates
        will be finite, because no entry of the averages, nor the `largest` of the gradients, reaches `LARGE`."""
        self._mine = [item for item in active if item[1] in self.names]
        if not self._mine or len(self._mine) != len(self.names) or not plain(base, groups):
            return False
        if any(group["weight_decay"] and not group.get("decoupled_weight_decay") for group in base.param_groups):
            return False
        if not self.is_warm():
            return False
        checked = nonfinite != "unchecked"
        if checked and not largest < LARGE:
            return False
        tensors: list[Any] = [x for _, _, p in self._mine for x in (p, p.grad)]
        if not cpu.takes(*tensors) or not all(x.is_contiguous() for x in tensors):
            return False
        if (checked and not self._checked) or not self._unchanged(base):
            self._note(base, groups, checked)
        others = len(active) == len(self._mine) or takes(base, groups, self.others(active))
        return others and len(self._noted) == len(self._mine)

    def _unchanged(self, base: Optimizer) -> bool:
        """Whether the state is what `_note` saw, but for what `step` did to it."""
        states = base.state
        for (_, _, p), (noted, average, square, count, *versions) in zip(self._mine, self._noted, strict=False):
            state = states[p]
            if p is not noted or state.get("exp_avg") is not average or state.get("exp_avg_sq") is not square:
                return False
            if state["step"] is not count or versions != [average._version, square._version]:
                return False
        return len(self._mine) == len(self._noted)

    def _note(self, base: Optimizer, groups: Groups, checked: bool) -> None:
        """Notes the state, if the kernels take it and (if `checked`) no entry of an average is large."""
        self._noted, self._checked = [], checked
        if takes(base, groups, self._mine):
            states = [base.state[p] for _, _, p in self._mine]
            pairs = [(state["exp_avg"], state["exp_avg_sq"]) for state in states]
            if not checked or cpu.largest_entry([x for pair in pairs for x in pair]) < LARGE:
                self._noted = [
                    (p, average, square, state["step"], average._version, square._version)
                    for (_, _, p), state, (average, square) in zip(self._mine, states, pairs, strict=True)
                ]

    def step(self, groups: Groups, *, guarded: bool) -> list[str]:
        """After `ready`: steps the base's state, the power vectors and the weights. Returns, if `guarded`, parameters
        that were left alone because their update is not finite.

        Args:
            groups: settings of the base, with lr and weight decay of the wrapper.
        """
        counts = cpu.counted([noted[3] for noted in self._noted])
        made: dict[tuple[int, float], cpu.Adam] = {}
        known = {}  # of each parameter: its group, settings and addresses
        for (index, name, p), (_, average, square, *_), count in zip(self._mine, self._noted, counts, strict=True):
            adam = made.get((index, count))
            if adam is None:
                adam = made[index, count] = cpu.Adam.of(groups[index], count)
            gradient: Any = p.grad
            known[name] = (
                index, adam, gradient.data_ptr(), average.data_ptr(), square.data_ptr(), p.data_ptr(),
            )  # fmt: skip
        lrs = [float(group["lr"]) for group in groups]
        shrinks = [lr * float(group["weight_decay"]) for lr, group in zip(lrs, groups, strict=True)]
        bad = []
        for parts in self._calls:
            part, *_ = parts
            given, settings, *places = zip(*[known[name] for name in part.names], strict=True)
            for x in parts:
                vectors: Any = self.whole.vectors[x.spectral]
                self.whole.vectors[x.spectral] = vectors.contiguous()
            norms = cpu.step_matrices(
                places if not part.offset else [[address + 4 * part.offset for address in column] for column in places],
                settings,
                [lrs[i] * x.over_unit[at] for at, i in enumerate(given) for x in parts],
                [1.0 - shrinks[i] * x.shrinkage[at] for at, i in enumerate(given) for x in parts],
                [self.whole.vectors[x.spectral] for x in parts],  # type: ignore[misc]
                spectral_norm.dither(part.shape[3]),
                spectral_norm.DITHER,
                part.shape,
                guarded,
            )
            if guarded and not norms.sum().isfinite():
                bad += [name for name, x in zip(part.names, norms, strict=True) if not x.isfinite().all()]
        return bad


def _tile(parts: Sequence[Part]) -> bool:
    """Whether they are equal matrices side by side that make up whole rows: they are stepped together, since rows are
    what memory likes to be read in."""
    first = parts[0]
    groups, taps, rows, c, ld = first.shape
    side_by_side = all(part.shape == first.shape and part.offset == i * c for i, part in enumerate(parts))
    return side_by_side and groups == taps == 1 and ld == len(parts) * c


def _part(bucket: Bucket, line: Line, whole: Normalizer, number: int) -> Part | None:
    """What a kernel needs to know of a line of a bucket, the `number`-th of all of `whole`, or None if its rows are not
    whole in memory, or it is not made of matrices with power vectors."""
    atom, view = line.atom, torch.empty(bucket.shape, device="meta")
    for part in line.slices:
        if view.shape[part.axis] != part.period:
            return None
        view = part.read(view)
    if number not in whole.owners or not isinstance(atom, KINDS):
        return None
    row = 2 if isinstance(atom, Experts) else 1  # the first axis within a row
    if not view[(0,) * row].is_contiguous():
        return None
    pieces, rows, columns = atom.matrices(view).shape
    taps = atom.taps if isinstance(atom, Conv) else 1
    ld = columns * taps if view.is_contiguous() else view.stride(row - 1)
    in_columns = view.dim() == 2 and view.shape[1] % 16 == 0
    return Part(
        names=bucket.names,
        keys=tuple(leaf.key for leaf in line.leaves),
        line=number,
        spectral=whole.owners.index(number),
        atom=atom,
        offset=int(view.storage_offset()),
        shape=(pieces // taps, taps, rows, columns, ld),
        apart=view.stride(0) if row == 2 else rows * ld,
        dense=view.is_contiguous() or in_columns,
        over_unit=tuple(leaf.target / atom.unit for leaf in line.leaves),
        shrinkage=whole.lines[number].shrinkage,
    )
