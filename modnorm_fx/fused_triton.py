"""AdamW's whole step of matrices on a GPU without a stored update: nine words of memory for each weight, not ten.

First the kernels of `kernels.gpu_adamw` read gradients and averages of all matrices, move the averages on, and give the
products of a power iteration on the updates; then all norms are looked at together, as they are without these kernels;
then every weight is changed, by its update computed again. Nothing waits for the device in between, so that a CUDA
graph can hold the step.

A refused step has moved AdamW's state on, as it does with any base. Parameters are taken where the kernels give what
the optimizer would (to rounding): see `TritonMatrices.step`. Convolutions whose taps lie side by side are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import runtime, spectral_norm
from .buckets import Placement
from .fused_adamw import Active, Groups, OfMatrices, Part, plain
from .kernels import gpu, gpu_adamw
from .normalizer import Normalizer, Rates

if TYPE_CHECKING:
    from .norm import ModularNorm

__all__ = ["TritonMatrices", "TritonStep"]

Tables = tuple[Tensor, Tensor, Tensor, Tensor]


class _Stack(NamedTuple):
    """The n parameters of a bucket in one step: four tensors of each, AdamW's settings, and `tables` of the addresses
    of gradients, averages, squares and weights."""

    gradients: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]
    weights: list[Tensor]
    counts: list[Tensor]
    betas: tuple[float, float]
    eps: float
    maximize: bool
    tables: Tables


class TritonMatrices(OfMatrices):
    """Those parameters that consist of matrices which the kernels can read."""

    def __init__(self, norm: ModularNorm, placements: Mapping[str, Placement], whole: Normalizer):
        super().__init__(norm, placements, whole)
        self.spread = {index: self._spread(index) for index in self.parts}
        self._tables: dict[int, tuple[list[int], Tables]] = {}

    def _fits(self, part: Part) -> bool:
        return part.shape[1] == 1  # else the entries of a row are not neighbours

    def _takes(self, buffer: Tensor) -> bool:
        return buffer.dtype == torch.float32 and gpu.takes(buffer)

    def _spread(self, index: int) -> Tensor:
        """For each entry of a parameter of this bucket the number of its matrix, counted over all parts; int64,
        broadcastable against the parameter, on its device."""
        buffer = self.whole.buffers[index]
        lines = [(part, self.whole.lines[part.line]) for part in self.parts[index]]
        axes = {axis for _, line in lines for axis, *_ in line.places}
        numbers: list[Tensor] = []
        total = 0
        for part, _ in lines:
            pieces = part.shape[0]
            own = torch.arange(total, total + pieces, device="cpu")
            numbers.append(part.atom.spread(own) if pieces > 1 else own.view([1] * (buffer.dim() - 1)))
            axes |= {axis for axis, size in enumerate(numbers[-1].shape) if size > 1}
            total += pieces
        sizes = [size if axis in axes else 1 for axis, size in enumerate(buffer.shape[1:])]
        found = torch.zeros(1, *sizes, dtype=torch.int64, device="cpu")
        for (_, line), number in zip(lines, numbers, strict=True):
            runtime.put_(found, line.places, number[None])
        return found[0].to(buffer.device)

    def step(self, base: Optimizer, groups: Groups, active: Active) -> TritonStep | None:
        """The step with the gradients of now, or None where it cannot be done so.

        It can if all of these parameters have gradients and warm power vectors, and the base is plain Adam or AdamW,
        which has stepped all of them before, without amsgrad and without weight decay that is added to gradients.
        Gradients, averages and weights are contiguous and float32, and parameters of one bucket share all settings.
        """
        mine = {name: (index, p) for index, name, p in active if name in self.names}
        if not mine or len(mine) != len(self.names) or not plain(base, groups) or not self.is_warm():
            return None
        if any(group["weight_decay"] and not group.get("decoupled_weight_decay") for group in base.param_groups):
            return None
        stacks = {}
        for index, parts in self.parts.items():
            stack = self._stack(index, base, groups, [mine[name] for name in parts[0].names])
            if stack is None:
                return None
            stacks[index] = stack
        return TritonStep(self, stacks)

    def _stack(self, index: int, base: Optimizer, groups: Groups, held: list[tuple[int, Tensor]]) -> _Stack | None:
        states = [base.state.get(p) for _, p in held]
        if not all(states):
            return None
        settings = [(*groups[i]["betas"], groups[i]["eps"], groups[i]["maximize"]) for i, _ in held]
        keys = ("exp_avg", "exp_avg_sq", "step")
        averages, squares, counts = ([state[key] for state in states] for key in keys)  # type: ignore[index]
        weights = [p for _, p in held]
        gradients: list[Any] = [p.grad for p in weights]
        tensors = [*gradients, *averages, *squares, *weights]
        good = gpu.takes(*tensors) and all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
        if not good or any(s != settings[0] for s in settings) or len({count.device for count in counts}) > 1:
            return None
        beta1, beta2, eps, maximize = settings[0]
        tables = self._tables_of(index, gradients, averages, squares, weights)
        return _Stack(gradients, averages, squares, weights, counts, (beta1, beta2), eps, maximize, tables)

    def _tables_of(self, index: int, *lists: list[Tensor]) -> Tables:
        """The `gpu.pointer_table` of each of the lists, those of the step before if nothing has moved."""
        addresses = [[t.data_ptr() for t in _even(tensors)] for tensors in lists]
        flat = [address for column in addresses for address in column]
        if index not in self._tables or self._tables[index][0] != flat:
            table = gpu.sent(torch.tensor(addresses, dtype=torch.int64, device="cpu"), lists[0][0].device)
            gradients, averages, squares, weights = table.unbind()
            self._tables[index] = flat, (gradients, averages, squares, weights)
        return self._tables[index][1]


class TritonStep:
    """One step, in which these stand in for the normaliser's methods of the same names. The factors are those of all
    buckets of the whole normaliser, which looks at them, names parameters and gives rates.

    It holds the gradients, and the tables of addresses that a captured step reads.
    """

    def __init__(self, matrices: TritonMatrices, stacks: dict[int, _Stack]):
        self.matrices, self.whole, self.rest = matrices, matrices.whole, matrices.share()
        self.others = matrices.others
        self._stacks = stacks
        self._fresh: dict[int, Tensor] = {}
        self._corrections: dict[int, Tensor] = {}

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Within it, the base does not find the gradients of these parameters."""
        for stack in self._stacks.values():
            for p in stack.weights:
                p.grad = None
        try:
            yield
        finally:
            for stack in self._stacks.values():
                for p, gradient in zip(stack.weights, stack.gradients, strict=True):
                    p.grad = gradient

    @torch.no_grad()
    def factors(self, *, learn: bool = True) -> list[Tensor]:
        """Moves the averages on; the base has written the updates of the others to the buffers of `rest` before."""
        self.matrices.share()
        others = iter(self.rest.factors(learn=learn))
        self._corrections = self._counted()
        return [
            self._measured(index, self._stacks[index]) if index in self._stacks else next(others)
            for index in range(len(self.whole.buffers))
        ]

    def _counted(self) -> dict[int, Tensor]:
        """Adds 1 to all step counts; the `gpu_adamw.adamw_corrections` of each bucket."""
        torch._foreach_add_([count for stack in self._stacks.values() for count in stack.counts], 1.0)
        alike: dict[tuple[Any, ...], list[int]] = {}
        for index, stack in self._stacks.items():
            alike.setdefault((stack.betas, stack.weights[0].device, stack.counts[0].device), []).append(index)
        found: dict[int, Tensor] = {}
        for (betas, device, _), those in alike.items():
            counts = [_even(self._stacks[index].counts) for index in those]
            joined = gpu_adamw.adamw_corrections(torch.stack([c for some in counts for c in some]), betas)
            found.update(zip(those, gpu.sent(joined, device).split([len(some) for some in counts]), strict=True))
        return found

    def _measured(self, index: int, stack: _Stack) -> Tensor:
        """The factors of one bucket, from its products."""
        lists = stack.gradients, stack.averages, stack.squares
        corrections = self._corrections[index]
        found = []
        for part in self.matrices.parts[index]:
            groups, _, rows, columns, ld = part.shape
            where = gpu_adamw.Matrices(part.offset, groups, rows, columns, part.apart, ld)
            before: Any = self.whole.vectors[part.spectral]
            lengths = torch.empty(before.shape[0], rows, device=before.device)
            v, z = gpu_adamw.adamw_products(
                *lists, corrections, before, betas=stack.betas, eps=stack.eps, maximize=stack.maximize,
                row_squares=lengths, tables=stack.tables[:3], where=where,
            )  # fmt: skip
            longest, at = lengths.sqrt().max(-1)
            row = gpu_adamw.adamw_rows(
                *lists[1:], corrections, at, eps=stack.eps, tables=stack.tables[1:3], where=where
            )  # fmt: skip
            norms, self._fresh[part.spectral] = spectral_norm.renewed(before, v, z, longest, row[:, None])
            pieces: Any = (part.atom.unit * norms).view(-1, groups)  # type: ignore[attr-defined]
            found.append(runtime.factors(pieces, self.whole.targets[part.line]))
        spread = self.matrices.spread[index]
        return torch.cat(found, 1).index_select(1, spread.flatten()).view(-1, *spread.shape)

    def withhold(self, factors: Sequence[Tensor], fine: Tensor) -> list[Tensor]:
        """See `Normalizer.withhold`."""
        self.rest.withhold([], fine)
        old: Any = self.whole.vectors
        self._fresh = {index: torch.where(fine, new, old[index]) for index, new in self._fresh.items()}
        return [torch.where(fine, factor, 0.0) for factor in factors]

    def keep(self, *, in_place: bool = False) -> None:
        """See `Normalizer.keep`."""
        self.matrices.keep(in_place=in_place)
        if in_place:
            held: Any = [self.whole.vectors[index] for index in self._fresh]
            torch._foreach_copy_(held, list(self._fresh.values()))
        else:
            for index, vectors in self._fresh.items():
                self.whole.vectors[index] = vectors

    @torch.no_grad()
    def apply_(self, factors: Sequence[Tensor], weights: Mapping[str, Tensor], rates: Sequence[Rates | None]) -> None:
        """See `Normalizer.apply_`."""
        others = [index for index in range(len(factors)) if index not in self._stacks]
        self.rest.apply_([factors[i] for i in others], weights, [rates[i] for i in others])
        for index, stack in self._stacks.items():
            rate: Any = rates[index]
            kept = None if rate.decays is None else 1.0 - rate.lrs * rate.decays
            _, averages, squares, addresses = stack.tables
            gpu_adamw.adamw_apply_(
                stack.weights, stack.averages, stack.squares, self._corrections[index], rate.lrs * factors[index], kept,
                eps=stack.eps, tables=(addresses, averages, squares),
            )  # fmt: skip


def _even(tensors: list[Tensor]) -> list[Tensor]:
    """An even number of them, the last twice if need be: so rows of tables start at multiples of 16 bytes, and the
    compiler of kernels sees equal cases."""
    return tensors + tensors[-1:] * (len(tensors) % 2)
