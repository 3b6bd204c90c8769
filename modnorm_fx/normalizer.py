"""A generated normaliser at work: stacked updates, targets and power vectors, and the step that they make.

The buffers are stacks of updates, one for each bucket, which the normaliser owns; optimizers write into views of them.
"""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels, runtime
from .errors import OptimizerError
from .kernels import cpu

__all__ = ["BACKENDS", "COLD_STEPS", "Normalizer", "Rates"]

BACKENDS = ("auto", "eager", "compile", "triton", "cudagraph", "cudagraph-triton")

COLD_STEPS = 8
"""In a leaf's first steps power iteration runs to convergence, from a cold start. While the base warms up, its updates
turn too fast to follow: in a small GPT under Adam a single warm iteration was up to 26% low in steps 2 to 6."""


class Rates(NamedTuple):
    """How the parameters of one bucket step: `places` in the stack, their learning rates `[n, 1, …]`, and what weight
    decay takes away at lr 1, broadcastable against the stack (None without decay)."""

    places: tuple[int, ...]
    lrs: Tensor
    decays: Tensor | None

    def withhold(self, fine: Tensor) -> Rates:
        """These where `fine` (one bool, on the device), else without decay."""
        return self if self.decays is None else self._replace(decays=torch.where(fine, self.decays, 0.0))


class Normalizer:
    """What `ModularNorm.normalizer` returns.

    Args:
        text, module: the generated source, and what `codegen.load` made of it.
        placements: dtype and device of each bucket's updates.
        backend: "eager" runs the source as it is, "compile" through `torch.compile` once power vectors are warm; "auto"
            is "eager". Both use C++ kernels for float32 on the CPU where a compiler is at hand. "triton" is "eager"
            with Triton kernels on a GPU. "cudagraph" and "cudagraph-triton" are "eager" and "triton" here: the
            optimizer captures its whole step (`graph`).

    Attributes:
        source: the text of the generated code. targets: those of each line, `[n]`, on the device of its updates.
        buffers: a stack `[n, *shape]` for each bucket. updates: parameter -> its part of a buffer.
        vectors: power vectors, one stack `[n·pieces, 8, columns]` for each power iteration in the code.
        steps: leaf key -> how often its power vectors have been renewed, up to `COLD_STEPS`.
    """

    def __init__(
        self,
        text: str,
        module: types.ModuleType,
        placements: Sequence[tuple[torch.dtype, torch.device]],
        backend: str = "auto",
    ):
        if backend not in BACKENDS:
            raise OptimizerError(f"backend={backend!r} is not a choice.", do=f"pass one of {', '.join(BACKENDS)}")
        self.source, self.backend = text, backend
        self._triton = "triton" in backend
        if self._triton and importlib.util.find_spec("triton") is None:
            raise OptimizerError(f"backend={backend!r} needs triton.", do="pip install triton, or use another backend")
        self._tables: dict[tuple[int, ...], Tensor] = {}
        self.rehearsed: Any = None  # the step that the optimizer would capture, once it has been done without capture
        self._code: Any = module
        self.buffers = [
            torch.zeros(len(names), *shape, dtype=dtype, device=device)
            for names, shape, (dtype, device) in zip(module.NAMES, module.SHAPES, placements, strict=True)
        ]
        self._name_updates()
        self.targets = [self._column(line.targets.values(), self.buffers[line.bucket]) for line in module.LINES]
        self._decays = [self._decay(index) for index in range(len(self.buffers))]
        self.vectors: list[Tensor | None] = [None] * len(module.SPECTRAL)
        self._fresh: list[Tensor | None] = self.vectors
        self.steps = {key: 0 for line in set(module.SPECTRAL) for key in module.LINES[line].targets}
        self._grown: set[int] = set()  # power iterations whose leaves are all past `COLD_STEPS`
        self._warm: Callable[..., Any] = module.factors
        if backend == "compile":
            self._warm = torch.compile(module.factors, fullgraph=True, dynamic=False)

    def _name_updates(self) -> None:
        self.updates = {
            name: update
            for names, buffer in zip(self.names, self.buffers, strict=True)
            for name, update in zip(names, buffer, strict=True)
        }

    def adopt(self, buffers: Sequence[Tensor], steps: dict[str, int]) -> None:
        """Works in these buffers, and counts steps there: those of a normaliser of more parameters."""
        self.buffers, self.steps, self._grown = list(buffers), steps, set()
        self._name_updates()

    @property
    def mode(self) -> str:
        """What is done to updates: they are scaled ("normalize"), or turned into steepest steps ("dualize")."""
        return self._code.MODE

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """The parameters of each bucket."""
        return self._code.NAMES

    @property
    def lines(self) -> tuple[runtime.Line, ...]:
        """What is measured, in the order of the code."""
        return self._code.LINES

    @property
    def owners(self) -> tuple[int, ...]:
        """The line that each set of power vectors belongs to."""
        return self._code.SPECTRAL

    @staticmethod
    def _column(numbers: Iterable[float], like: Tensor) -> Tensor:
        dtype = torch.float64 if like.dtype in (torch.float64, torch.complex128) else torch.float32
        return torch.tensor(list(numbers), dtype=dtype, device=like.device)

    def _decay(self, bucket: int) -> Tensor | None:
        """What lr and weight decay multiply: the shrinkage of leaves that decay, broadcastable against the bucket."""
        lines = [line for line in self.lines if line.bucket == bucket]
        if not any(line.decays for line in lines):
            return None
        buffer = self.buffers[bucket]
        sliced = {axis + 1 for line in lines for axis, *_ in line.places}
        sizes = [size if axis == 0 or axis in sliced else 1 for axis, size in enumerate(buffer.shape)]
        found = self._column([], buffer).new_zeros(sizes)
        for line in lines:
            if line.decays:
                shrinkage = self._column(line.shrinkage, buffer)
                runtime.put_(found, line.places, shrinkage.view(-1, *[1] * (buffer.dim() - 1)))
        return found

    # Measuring ------------------------------------------------------------------------------------------------------

    def factors(self, *, learn: bool = True) -> list[Tensor]:
        """The factor of each buffer that brings its updates to their targets, broadcastable against it; NaN where an
        update is not finite. Dualising normalisers turn the buffers into duals first. `keep` keeps the power vectors.

        Without `learn`, which asks the device what has moved, a leaf that moves for the first time is not iterated to
        convergence.
        """
        if torch.is_grad_enabled() and any(buffer.requires_grad for buffer in self.buffers):
            with torch.no_grad():  # entered only where it matters: it takes as long as normalising ten matrices of 64²
                return self.factors(learn=learn)
        with kernels.triton(self._triton):
            return self._factors(learn)

    def _factors(self, learn: bool) -> list[Tensor]:
        young = [index for index in range(len(self.vectors)) if self._has_young(index)] if learn else []
        taught = {index: self._taught(index) for index in young}
        cold = [
            vectors is None or (index in taught and self._is_cold(*taught[index]))
            for index, vectors in enumerate(self.vectors)
        ]
        if any(cold):
            given = [None if c else v for c, v in zip(cold, self.vectors, strict=True)]
            found, fresh = self._code.factors(self.buffers, given, self.targets)
            for index in (i for i, c in enumerate(cold) if c):
                old, (moved, _) = self.vectors[index], taught[index]
                if old is not None and not moved.all():
                    pieces = moved.repeat_interleave(len(old) // len(moved))
                    fresh[index] = torch.where(pieces[:, None, None], fresh[index], old)
        else:
            found, fresh = self._warm(self.buffers, self.vectors, self.targets)
        self._learned = [k for moved, keys in taught.values() for m, k in zip(moved.tolist(), keys, strict=True) if m]
        self._fresh = fresh
        return found

    @property
    def is_warm(self) -> bool:
        """Whether every leaf that has ever moved takes one step of power iteration from now on."""
        learning = any(0 < steps < COLD_STEPS for steps in self.steps.values())
        return not learning and all(vectors is not None for vectors in self.vectors)

    def _line(self, index: int) -> runtime.Line:
        """What a power iteration belongs to."""
        return self._code.LINES[self._code.SPECTRAL[index]]

    def _has_young(self, index: int) -> bool:
        if index not in self._grown and all(self.steps[key] >= COLD_STEPS for key in self._line(index).targets):
            self._grown.add(index)
        return index not in self._grown

    def _is_cold(self, moved: Tensor, keys: list[str]) -> bool:
        return any(m and self.steps[key] < COLD_STEPS for m, key in zip(moved.tolist(), keys, strict=True))

    def _taught(self, index: int) -> tuple[Tensor, list[str]]:
        """Which updates are not zero (a zero update teaches nothing, and need not be followed), and their keys."""
        line = self._line(index)
        return runtime.take(self.buffers[line.bucket], line.places).flatten(1).any(1), list(line.targets)

    def refused(self, factors: Sequence[Tensor]) -> list[str]:
        """Parameters whose update holds NaN or infinity, or is too large for its squares to be finite. One
        synchronisation when there is none."""
        looked_at = self.looked_at(factors)
        if not looked_at or torch.nn.utils.get_total_norm(looked_at).isfinite():
            return []
        return self.named(self.marks(factors))

    def looked_at(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Where an update that is not finite shows: in its factors, or in its dual."""
        return self.buffers if self.mode == "dualize" else list(factors)

    def marks(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """For each bucket which of its updates are finite, bool `[n]`."""
        return [x.flatten(1).isfinite().all(1) if x.dim() > 1 else x.isfinite() for x in self.looked_at(factors)]

    def named(self, marks: Sequence[Tensor]) -> list[str]:
        """The parameters that are not marked."""
        pairs = zip(self.names, marks, strict=True)
        return [name for names, mark in pairs for name, good in zip(names, mark.tolist(), strict=True) if not good]

    def keep(self, *, in_place: bool = False) -> None:
        """Power vectors of the last `factors` are those that the next one starts from; `in_place` they stay where they
        are in memory."""
        if in_place and self.vectors:
            torch._foreach_copy_(self.vectors, self._fresh)  # type: ignore[arg-type]
        else:
            self.vectors = list(self._fresh)
        for key in set(self._learned):
            self.steps[key] = min(self.steps[key] + 1, COLD_STEPS)

    def withhold(self, factors: Sequence[Tensor], fine: Tensor) -> list[Tensor]:
        """These factors where `fine` (one bool, on the device); else `keep` and `apply_` will change nothing, with the
        factors that this returns and rates without decay."""
        for update in self.buffers:  # 0 · infinity is not 0
            update.copy_(torch.where(fine, update, 0.0))
        pairs: Any = zip(self._fresh, self.vectors, strict=True)
        self._fresh = [torch.where(fine, new, old) for new, old in pairs]
        return [torch.where(fine, factor, 0.0) for factor in factors]

    # Stepping -------------------------------------------------------------------------------------------------------

    def rates(self, settings: Mapping[str, tuple[float | Tensor, float]]) -> list[Rates | None]:
        """How each bucket steps, on its device: from parameter -> (lr, weight decay), for parameters that do."""
        found: list[Rates | None] = []
        for names, buffer, decay in zip(self.names, self.buffers, self._decays, strict=True):
            places = [i for i, name in enumerate(names) if name in settings]
            given = [settings[names[i]] for i in places]
            if not places:
                found.append(None)
                continue
            shape = (-1,) + (1,) * (buffer.dim() - 1)
            if any(isinstance(lr, Tensor) for lr, _ in given):
                lrs = torch.stack([torch.as_tensor(lr).to(buffer.device, torch.float32) for lr, _ in given])
            else:
                lrs = self._column([float(lr) for lr, _ in given], buffer)
            decays = None
            if decay is not None and any(amount for _, amount in given):
                amounts = self._column([amount for _, amount in given], buffer).view(shape)
                decays = amounts * (decay if len(places) == len(names) else decay[places])
            found.append(Rates(tuple(places), lrs.view(shape), decays))
        return found

    @torch.no_grad()
    def apply_(self, factors: Sequence[Tensor], weights: Mapping[str, Tensor], rates: Sequence[Rates | None]) -> None:
        """`weight += lr · factor · update`, after decay, for all weights that `rates` names; the buffers may change."""
        for names, buffer, factor, rate in zip(self.names, self.buffers, factors, rates, strict=True):
            if rate is None:
                continue
            if len(rate.places) < len(names):
                buffer, factor = buffer[list(rate.places)], factor[list(rate.places)]
            kept = None if rate.decays is None else 1.0 - rate.lrs * rate.decays
            moving = [weights[names[i]] for i in rate.places]
            with kernels.triton(self._triton):
                _step_(moving, buffer, rate.lrs * factor, kept, self._tables)

    @torch.no_grad()
    def normalize_(self, updates: Mapping[str, Tensor], target: float = 1.0) -> None:
        """Scales (or dualises) a dict of updates in place: every leaf gets `target` times its own target. What belongs
        to no leaf becomes zero.

        Raises, before anything is changed: OptimizerError if updates are missing, unknown or of another shape,
        NonFiniteError if one holds NaN or infinity.
        """
        runtime.check(self.names, self._code.SHAPES, updates)
        for name, stacked in self.updates.items():
            if updates[name].is_complex() and not stacked.is_complex():
                raise OptimizerError(
                    f"The update of {name} is complex, and the normaliser was made for {stacked.dtype}.",
                    do="pass dtype=torch.complex64 to ModularNorm.normalizer",
                )
            stacked.copy_(updates[name])
        found = self.factors()
        if bad := self.refused(found):
            raise runtime.not_finite(bad)
        self.keep()
        for names, buffer, factor in zip(self.names, self.buffers, found, strict=True):
            for name, scaled in zip(names, buffer * (target * factor), strict=True):
                updates[name].copy_(scaled)

    # State ----------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, dict[str, Any]]:
        """Leaf key -> its power vectors (a list, as atoms may have several norms) and steps, for leaves whose vectors
        have been renewed; nothing is copied."""
        found: dict[str, dict[str, Any]] = {key: {"steps": count, "vectors": []} for key, count in self.steps.items()}
        for vectors, line in zip(self.vectors, self._code.SPECTRAL, strict=True):
            if vectors is not None:
                keys = list(self._code.LINES[line].targets)
                for key, part in zip(keys, vectors.chunk(len(keys)), strict=True):
                    found[key]["vectors"].append(part)
        return {key: entry for key, entry in found.items() if entry["steps"]}

    def load_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Continues from a `state`; leaves that it does not name start anew."""
        self.steps = {key: int(state[key]["steps"]) if key in state else 0 for key in self.steps}
        self._grown = set()
        seen: dict[int, int] = {}
        for index, line in enumerate(self._code.SPECTRAL):
            nth = seen[line] = seen.get(line, -1) + 1
            parts = [state[key]["vectors"][nth] if key in state else None for key in self._code.LINES[line].targets]
            known = [part for part in parts if part is not None]
            device = self.buffers[self._code.LINES[line].bucket].device
            blanks = [torch.zeros_like(known[0]) if part is None else part for part in parts] if known else []
            self.vectors[index] = torch.cat(blanks).to(device) if known else None


def _step_(
    weights: list[Tensor],
    updates: Tensor,
    step: Tensor,
    kept: Tensor | None,
    tables: dict[tuple[int, ...], Tensor] | None = None,
) -> None:
    """`weight = kept · weight + step · update` for n tensors of one shape; `updates`, `step`, `kept` are `[n, …]`.

    `tables` keeps tables of addresses for Triton kernels, which cannot be made while a CUDA graph is captured.
    """
    contiguous = all(weight.is_contiguous() for weight in weights)
    if contiguous and (gpu := kernels.triton_for(*weights, updates)) is not None:
        tables = {} if tables is None else tables
        addresses = tuple(weight.data_ptr() for weight in weights)
        if addresses not in tables:
            tables[addresses] = gpu.pointer_table(weights)
        gpu.scale_apply_(weights, updates, step, kept, tables[addresses])
        return
    if contiguous and cpu.takes(*weights, updates):
        flat = _by_row_or_column(updates.shape, step, torch.ones_like(step) if kept is None else kept)
        if flat is not None:
            cpu.scale_apply(weights, list(updates), *flat)
            return
    if kept is not None:
        for weight, part in zip(weights, kept, strict=True):  # not rounded to a low precision first
            weight.mul_(part)
    torch._foreach_add_(weights, list(updates * step))


def _by_row_or_column(whole: torch.Size, *numbers: Tensor) -> list[Tensor] | None:
    """The numbers `[n, …]`, which broadcast against `whole`, as `[n, rows, 1]` or `[n, 1, columns]` if those do."""
    shape = torch.broadcast_shapes(*(x.shape for x in numbers))
    rows, rest = shape[1:2], shape[2:]
    if all(size == 1 for size in rest):
        return [x.expand(shape).reshape(whole[0], -1, 1).contiguous() for x in numbers]
    if rows[0] == 1:
        wide = (whole[0], 1, *whole[2:])
        return [x.expand(wide).reshape(whole[0], 1, -1).contiguous() for x in numbers]
    return None
