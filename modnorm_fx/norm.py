"""The modular norm of one model: what ``convert`` returns.

Immutable: every change returns a new norm. It holds the norm tree, the convention and the names and shapes of the
model's parameters; all numbers of the leaves follow from the tree by the paper's recursion.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import tree as T
from ._updates import check_measurable
from .atoms import Atom, Slice, Tied
from .binding import Binding
from .conventions import Convention
from .errors import MassError, ModelMismatchError, ModnormError, NonFiniteError
from .explain import Conversion
from .initialization import padding_rows, thawed, zero_branches

if TYPE_CHECKING:
    from .normalizer import Normalizer

__all__ = ["Leaf", "ModularNorm"]

logger = logging.getLogger("modnorm_fx")


@dataclass(frozen=True)
class Leaf:
    """One weight, or one slice of a packed weight.

    Attributes:
        key: the parameter's qualified name, with the slice in Python notation when packed.
        weight: the parameter's qualified name. slices: which part of it, () for all.
        atom: how it is used, and with it its norm.
        mass: its part of the network's mass.
        sensitivity: change of the network's output (relative to its scale) per change of the output of the op that
        uses it.
        scale: RMS of what it multiplies (1 for what is added), times √heads if it makes their queries or keys
        (``Convention.heads``).
        target: the atom norm that a unit update gives it: ``share(mass) / (sensitivity · scale)``.
        initial: the norm it is declared to have, which ``initialize_`` gives it.
        status: ``sampled`` where the op that uses it has no rule and its gain is an estimate, else ``rules``.
    """

    key: str
    weight: str
    slices: tuple[Slice, ...]
    atom: Atom
    mass: float
    sensitivity: float
    scale: float
    target: float
    initial: float
    status: str = "rules"

    def read(self, tensor: Tensor) -> Tensor:
        """The leaf's part of a tensor of the parameter's shape: a view when contiguous, else a copy."""
        for part in self.slices:
            tensor = part.read(tensor)
        return tensor

    def write_(self, tensor: Tensor, part: Tensor) -> None:
        """Puts a changed ``read(tensor)`` back; nothing happens if it was a view."""
        if part.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            _write_(tensor, self.slices, part)


def _write_(tensor: Tensor, slices: tuple[Slice, ...], part: Tensor) -> None:
    if not slices:
        tensor.copy_(part)
    elif len(slices) == 1:
        slices[0].write_(tensor, part)
    else:
        inner = slices[0].read(tensor)
        _write_(inner, slices[1:], part)
        if inner.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            slices[0].write_(tensor, inner)


@dataclass(frozen=True, eq=False)
class ModularNorm:
    """The modular norm of a model (arXiv 2405.14813, section 3).

    ``‖ΔW‖ = max over leaves of atom.norm(ΔW_leaf) / target_leaf``: an update of norm η changes the output by at most
    (paper) or typically (tracked) η relative to its scale.

    Attributes:
        tree: the norm tree. convention: how contributions add up.
        shapes: every parameter's canonical name and shape. aliases: other names of tied parameters.
        slices: leaf key -> (parameter, slices). unused: parameters that reach no output and have no leaf.
        stages: name of a stage -> function that prints it, for ``explain`` (empty on a loaded norm).
        conversion: how it came about: route, operations by status (None on a loaded norm).
    """

    tree: T.Node
    convention: Convention
    shapes: Mapping[str, tuple[int, ...]]
    slices: Mapping[str, tuple[str, tuple[Slice, ...]]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    stages: Mapping[str, Callable[[], str]] = field(default_factory=dict, repr=False)
    conversion: Conversion | None = field(default=None, repr=False)
    _binding: Binding = field(default_factory=Binding, repr=False)

    # --- reading ----------------------------------------------------------------------------------------------------

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """Every weight, in order of first use, from the recursion on the tree."""
        parts: dict[str, list[T.Allotment]] = defaultdict(list)
        for part in T.allot(self.tree, self.convention):
            parts[part.node.key].append(part)
        return tuple(self._leaf(key, parts[key]) for key in self.slices)

    def _leaf(self, key: str, uses: list[T.Allotment]) -> Leaf:
        mass = math.fsum(u.node.own_mass for u in uses)
        share = self.convention.share(mass, self.tree.mass)
        status = "sampled" if any(u.node.status == "sampled" for u in uses) else "rules"
        uses = self.convention.binding(uses)
        uses = [u for u in uses if u.gain > 0] or uses
        gains: dict[Atom, list[float]] = defaultdict(list)
        for u in uses:
            gains[u.node.atom].append(u.gain)
        by_atom = {atom: self.convention.add(values) for atom, values in gains.items()}
        gain = math.fsum(by_atom.values())
        atom, initial = uses[0].node.atom, uses[0].node.initial
        if len(by_atom) > 1 and gain > 0:
            atom = Tied(atom.shape, tuple(by_atom), tuple(g / gain for g in by_atom.values()))
            initial = math.fsum(u.gain * u.node.initial for u in uses) / math.fsum(u.gain for u in uses)
        sensitivity, scale = (uses[0].sensitivity, uses[0].node.gain) if len(uses) == 1 else (gain, 1.0)
        weight, slices = self.slices[key]
        return Leaf(
            key, weight, slices, atom, mass, sensitivity, scale, share / gain if gain > 0 else 0.0, initial, status
        )

    @property
    def targets(self) -> dict[str, float]:
        """Leaf key -> the atom norm that a unit update gives it."""
        return {leaf.key: leaf.target for leaf in self.leaves}

    @property
    def mass(self) -> float:
        return self.tree.mass

    @property
    def sensitivity(self) -> float:
        """Sensitivity of the whole network's output to its input."""
        return self.tree.sensitivity(self.convention)

    @property
    def empty(self) -> tuple[str, ...]:
        """Parameters without entries (of ``nn.Linear(0, n)``, say): they have no leaf and need none."""
        return tuple(name for name, shape in self.shapes.items() if not math.prod(shape))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the parameters' names and shapes: two models with equal digests can share a norm."""
        text = json.dumps(sorted((name, list(shape)) for name, shape in self.shapes.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def _by_weight(self) -> dict[str, list[Leaf]]:
        found: dict[str, list[Leaf]] = defaultdict(list)
        for leaf in self.leaves:
            found[leaf.weight].append(leaf)
        return dict(found)

    def __deepcopy__(self, memo: dict[int, object]) -> ModularNorm:
        """Itself, as it is immutable; where the model was copied before it, one that is bound to the copy."""
        binding = self._binding.copied(memo)
        return self if binding is None else replace(self, _binding=binding)

    def __getstate__(self) -> dict[str, object]:
        """For pickling: without the stages and without the binding, which is by identity: ``bind`` the copy anew."""
        return self.__dict__ | {"stages": {}, "_binding": Binding()}

    # --- binding to a model -----------------------------------------------------------------------------------------

    def bind(self, model: nn.Module) -> ModularNorm:
        """This norm for ``model``, whose parameters it then knows by identity.

        Raises:
            ModelMismatchError: names or shapes differ from those the norm was inferred for; the differences are listed.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if shapes != dict(self.shapes):
            raise ModelMismatchError(
                f"This norm was inferred for another model than this {type(model).__name__}.",
                why=_differences(dict(self.shapes), shapes),
                do="Convert this model, or build it with the configuration it was saved with.",
            )
        return replace(self, _binding=Binding.of(model))

    def parameter_name(self, parameter: Tensor) -> str | None:
        """The qualified name of a parameter of the bound model, by identity; None for any other tensor.

        Raises:
            ModelMismatchError: it was tied since the model was converted.
        """
        return self._binding.name(parameter)

    # --- changing ---------------------------------------------------------------------------------------------------

    def tare(self, path: str, mass: float) -> ModularNorm:
        """A norm in which everything at or below the module or parameter ``path`` has total mass ``mass``; other
        masses stay. A tied weight lies at every one of its names.

        Raises:
            MassError: no leaf lies at ``path``, its mass is zero now and so cannot be scaled, or ``mass`` is not a
            finite number >= 0.
        """
        if not (isinstance(mass, int | float) and 0 <= mass < math.inf):
            raise MassError(f"The mass of {path!r} is {mass!r}.", why="a mass is a finite number, zero or more")
        everything = path == ""
        below = {self.aliases.get(n, n) for n in (*self.shapes, *self.aliases) if f"{n}.".startswith(f"{path}.")}

        def hit(key: str) -> bool:
            return everything or key == path or self.slices[key][0] in below

        now = math.fsum(node.mass for node in T.leaves(self.tree) if hit(node.key))
        if not any(hit(key) for key in self.slices):
            raise MassError(
                f"Nothing in the norm lies at {path!r}.",
                do=f"Use a module path or parameter name, such as {_near(path, self._paths())!r}.",
            )
        if now == 0 and mass > 0:
            raise MassError(
                f"Everything at {path!r} has mass 0, which cannot be scaled to {mass}.",
                do="Convert again with masses=.",
            )
        factor = mass / now if now else 0.0
        tree = T.map_atoms(self.tree, lambda n: replace(n, own_mass=n.own_mass * factor) if hit(n.key) else n)
        if tree.mass <= 0:
            raise MassError("All masses would be zero.", why="then no weight may move")
        return replace(self, tree=tree)

    def _paths(self) -> list[str]:
        """Everything that ``tare`` can be given: module paths, parameters, leaves."""
        used = [weight for weight, _ in self.slices.values()]
        names = [name.split(".") for name in [*used, *(a for a, weight in self.aliases.items() if weight in used)]]
        return [*{".".join(parts[:i]): None for parts in names for i in range(1, len(parts) + 1)}, *self.slices]

    # --- measuring and scaling updates ------------------------------------------------------------------------------

    @torch.no_grad()
    def norm(self, updates: Mapping[str, Tensor]) -> Tensor:
        """The modular norm of updates (parameter name -> tensor of its shape), exact; float32, no dimensions.

        Raises ModelMismatchError for names or shapes that the norm does not know, NonFiniteError for NaN or infinity,
        ModnormError for what is no dense floating-point tensor.
        """
        ratios = []
        for name, tensor in self._checked(updates).items():
            for leaf in self._by_weight[name]:
                size = leaf.atom.norm(leaf.read(tensor))
                ratios.append(size / leaf.target if leaf.target > 0 else torch.where(size > 0, math.inf, 0.0).to(size))
        return torch.stack([r.cpu() for r in ratios]).max() if ratios else torch.zeros(())

    @torch.no_grad()
    def normalize_(self, updates: Mapping[str, Tensor], target: float = 1.0) -> None:
        """Scales updates in place so that every leaf has norm ``target`` times its own target; zero stays zero. Exact
        norms.

        Raises as ``norm`` does, before anything is changed.
        """
        self._each(updates, lambda leaf, part: leaf.atom.normalize_(part, target * leaf.target))

    @torch.no_grad()
    def dualize_(self, updates: Mapping[str, Tensor], target: float = 1.0) -> None:
        """Replaces updates in place by the steepest-descent step of norm ``target``: the dual of each leaf (modular
        duality)."""
        self._each(updates, lambda leaf, part: leaf.atom.dualize_(part, target * leaf.target))

    def normalizer(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        mode: str = "normalize",
        backend: str = "auto",
    ) -> Normalizer:
        """The generated code of this norm at work on stacked updates; its text is ``.source``.

        ``normalizer.normalize_(updates)`` does what ``normalize_`` does here for a dict of all updates, in a few
        batched operations, with spectral norms estimated by power iteration.

        Args:
            device, dtype: where and in what type updates are stacked.
            mode: "normalize" or "dualize". backend: as in ``ModularOptimizer``.

        Raises OptimizerError for another mode or backend, and for a device or type that cannot hold updates here.
        """
        from .codegen import make, usable

        placement = usable(device, dtype)
        return make(self, {name: placement for name in self._by_weight}, mode, backend)

    @torch.no_grad()
    def initialize_(self, model: nn.Module, generator: torch.Generator | None = None) -> None:
        """Gives every weight of ``model`` the norm it is declared to have: semi-orthogonal matrices, gains of one size,
        zero biases.

        Scalars and unused parameters stay as they are, and so do frozen parameters (``requires_grad=False``) and gains
        and matrices that are zero: their author starts residual branches from nothing (last gains of a ResNet,
        adaLN-zero, LoRA's B), and deep nets need it (see docs/design-decisions.md). Both are named in log messages.
        If every matrix is zero, nobody has initialised the model (``to_empty``), and all are drawn. Rows for padding
        (``padding_idx``) are zero, as torch has them.

        Raises ModelMismatchError if the model has other parameters than the norm, ModnormError if all are frozen.
        """
        self.bind(model)
        tensors = thawed(model, self._by_weight)
        kept = zero_branches(self.leaves, tensors)

        def fill(leaf: Leaf, part: Tensor) -> None:
            if leaf.key not in kept:
                leaf.atom.initialize_(part, leaf.initial, generator)

        self._each(tensors, fill, check=False)
        for name, row in padding_rows(model):
            table = tensors.get(self.aliases.get(name, name))
            if table is not None:
                table[row].zero_()

    @torch.no_grad()
    def project_(self, model: nn.Module, bound: float = 1.0) -> None:
        """Shrinks weights of ``model`` whose norm exceeds ``bound`` times what they are declared to have; others
        stay, and so do frozen ones. Raises as ``initialize_`` does."""
        self.bind(model)
        self._each(
            {
                k: v
                for k, v in thawed(model, self._by_weight).items()
                if any(leaf.initial > 0 for leaf in self._by_weight[k])
            },
            lambda leaf, part: leaf.atom.project_(part, bound * leaf.initial) if leaf.initial > 0 else None,
        )

    def _each(
        self, updates: Mapping[str, Tensor], change: Callable[[Leaf, Tensor], object], check: bool = True
    ) -> None:
        for name, tensor in (self._checked(updates) if check else updates).items():
            for leaf in self._by_weight.get(name, ()):
                part = leaf.read(tensor)
                change(leaf, part)
                leaf.write_(tensor, part)

    def _checked(self, updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Updates by canonical name; nothing is changed before all are found good."""
        out: dict[str, Tensor] = {}
        names: dict[str, str] = {}
        if not isinstance(updates, Mapping):
            raise ModnormError(
                f"Updates are a mapping from parameter names to tensors; this is a {type(updates).__name__}.",
                do="Pass, for example, {name: p.grad.clone() for name, p in model.named_parameters()}.",
            )
        for given, tensor in updates.items():
            name = self.aliases.get(given, given)
            if name not in self.shapes:
                raise ModelMismatchError(
                    f"The norm knows no parameter {given!r}.", do=f"Did you mean {_near(given, self.shapes)!r}?"
                )
            check_measurable(given, tensor)
            if name in out:
                if tensor.is_set_to(out[name]):  # one update under two names, as in state_dict()
                    continue
                raise ModelMismatchError(
                    f"{names[name]!r} and {given!r} are one tied weight, and their updates are different tensors.",
                    why="a weight has one update",
                    do="Give it once, under either name: the gradient of a tied weight is the sum over its uses.",
                )
            if tuple(tensor.shape) != tuple(self.shapes[name]):
                raise ModelMismatchError(
                    f"The update of {given!r} has shape {list(tensor.shape)}.",
                    why=f"the parameter had shape {list(self.shapes[name])} when the model was converted",
                )
            if not tensor.numel():
                continue
            if name not in self._by_weight:
                raise ModelMismatchError(
                    f"{given!r} reaches no output of the model, so it has no norm.", do="Leave it out of the update."
                )
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    f"The update of {given!r} holds NaN or infinity.",
                    why="no scaling makes it finite; nothing was changed",
                )
            out[name], names[name] = tensor, given
        return out

    # --- showing and keeping ----------------------------------------------------------------------------------------

    def explain(self, stage: str) -> str:
        """One stage of the conversion as text: one of ``stages``. Raises ModnormError for others, and on a loaded
        norm."""
        if stage not in self.stages:
            raise ModnormError(
                f"There is no stage {stage!r} to explain.",
                why=None if self.stages else "a loaded norm keeps the tree but not the stages that led to it",
                do=f"Use one of {', '.join(self.stages)}." if self.stages else "Convert the model again.",
            )
        return self.stages[stage]()

    def save(self, path: str | Path) -> None:
        """Writes the norm as JSON: data only, the same bytes for the same norm. See ``norm_json`` for the schema."""
        from .norm_json import to_json

        Path(path).write_text(json.dumps(to_json(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path, model: nn.Module | None = None) -> ModularNorm:
        """Reads a saved norm, and binds it to ``model`` if one is given.

        Raises FormatError for anything that is not a norm of a known schema version, ModelMismatchError for another
        model.
        """
        from .norm_json import read

        norm = read(Path(path))
        return norm.bind(model) if model is not None else norm

    def __str__(self) -> str:
        from .report import text

        return text(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from .report import html_fragment

        return html_fragment(self)

    def to_html(self, path: str | Path) -> None:
        """Writes the tree as one self-contained HTML page."""
        from .report import html

        Path(path).write_text(html(self), encoding="utf-8")


def _near(name: str, known: Iterable[str]) -> str:
    import difflib

    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.0)), "")


def _differences(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], most: int = 5) -> str:
    lines = [f"{n} is missing" for n in expected if n not in found]
    lines += [f"{n} is new" for n in found if n not in expected]
    lines += [
        f"{n} has shape {list(found[n])}, not {list(s)}" for n, s in expected.items() if n in found and found[n] != s
    ]
    rest = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + rest
