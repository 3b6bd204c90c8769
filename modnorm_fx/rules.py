"""What a local rule is: the scale of an op's output and its sensitivity to each tensor operand.

A rule is a short function of a :class:`Call` that returns a :class:`Local`. It lives in a :class:`RuleTable` with its
status and source, and says for operands that can be a weight which atom the weight then is. Arguments go by the names
of the op's schema.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from .atoms import Atom
from .conventions import Convention
from .errors import InternalError, ModnormError
from .quadrature import Sign
from .regions import Region

if TYPE_CHECKING:
    from .weight_atoms import Site

__all__ = ["Call", "Local", "Rule", "RuleTable", "Operand", "STATUSES", "op_key", "operand_at", "operands"]

#: ``exact``: equality, reached. ``bound``: never exceeded. ``typical``: expected value on Gaussian inputs of the
#: tracked scales. ``declared``: a choice, with its reason. ``sampled``: estimated by running the op (never in a
#: table).
STATUSES = ("exact", "bound", "typical", "declared", "sampled")

#: An operand: the schema's argument name, and the index within a list argument (``cat``'s tensors), else None.
Operand = tuple[str, int | None]


@dataclass(frozen=True)
class Local:
    """What a rule says of one call.

    Attributes:
        scale: expected RMS of the output's features.
        sensitivity: per operand name (a list for list arguments), the change of the output per change of the operand,
            each measured in its own norm: RMS over features for activations, the atom's norm for weights.
    """

    scale: float
    sensitivity: Mapping[str, float | list[float]]

    def of(self, operand: Operand) -> float | None:
        name, index = operand
        value = self.sensitivity.get(name)
        if isinstance(value, list):
            return value[index or 0]
        return value


@dataclass(frozen=True)
class Call:
    """One node as a rule sees it: arguments by schema name, shapes, scales of the operands and the convention.

    Attributes:
        node: the fx node.
        args: schema name -> argument (fx nodes, lists of them, numbers, None).
        scales: fx node -> tracked scale, for every float operand.
        features: fx node -> the feature axes of its value.
        convention: the convention in force.
        weights: the operands that are weights.
        averages: nodes whose rows are averages (softmax and views of it).
        signs: fx node -> which signs its entries may have, where that is not any.
        running: nodes whose entries sum a growing number of terms of one sign (running sums and parts of them).
        parts: the operands that hold, or pick, some of the places of a signal, and their share of the places that are
            joined again.
    """

    node: fx.Node
    args: Mapping[str, Any]
    scales: Mapping[fx.Node, float]
    features: Mapping[fx.Node, frozenset[int]]
    convention: Convention
    weights: frozenset[Operand] = frozenset()
    averages: frozenset[fx.Node] = frozenset()
    signs: Mapping[fx.Node, Sign] = field(default_factory=dict)
    running: frozenset[fx.Node] = frozenset()
    parts: Mapping[Operand, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """An argument, None where it was left out."""
        return self.args.get(name)

    def scale(self, name: str, index: int | None = None) -> float:
        """Scale of an operand; numbers count as themselves."""
        value = self.args[name] if index is None else self.args[name][index]
        if isinstance(value, fx.Node):
            if value not in self.scales:
                raise InternalError(f"operand {name} of {self.node} has no scale")
            return self.scales[value]
        return abs(float(value))

    def is_tensor(self, name: str) -> bool:
        return isinstance(self.args.get(name), fx.Node)

    def is_weight(self, name: str, index: int | None = None) -> bool:
        return (name, index) in self.weights

    def part(self, name: str, index: int | None = None) -> float | None:
        """Share of the places of a signal that an operand holds or picks, in quadrature: √f; None where it counts as
        a whole."""
        f = self.parts.get((name, index)) if self.convention.quadrature else None
        return None if f is None else math.sqrt(f)

    def is_average(self, name: str) -> bool:
        return self.args.get(name) in self.averages

    def is_running(self, name: str) -> bool:
        return self.args.get(name) in self.running

    def sign(self, name: str) -> Sign:
        """Which signs the entries of an operand may have."""
        return self.signs.get(self.args[name], Sign.ANY)

    def shape(self, name: str | None = None, index: int | None = None) -> tuple[int, ...]:
        """Shape of an operand, or of the output."""
        value = self.node if name is None else self.args[name] if index is None else self.args[name][index]
        return shape_of(value)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's value (of the first one for ops that return several)."""
    value: Any = node.meta.get("val")
    if isinstance(value, tuple | list):
        value = value[0]
    return tuple(int(n) for n in value.shape)


RuleFunction = Callable[[Call], Local]
#: Makes the atom of a weight from where and how it is used; see ``weight_atoms``.
AtomFunction = Callable[["Site"], Atom]


@dataclass(frozen=True)
class Rule:
    """A row of the table. ``weights`` maps operand names to the atom a weight becomes there; ``view``
    marks ops that only rearrange entries, ``pointwise`` scalar functions of one operand."""

    name: str
    function: RuleFunction
    status: str
    source: str
    weights: Mapping[str, AtomFunction] = field(default_factory=dict)
    view: bool = False
    pointwise: bool = False


def op_key(target: Any) -> Any:
    """The key an op goes by in a table: the overload itself, a region's kind, or the callable."""
    return target.kind if isinstance(target, Region) else target


class RuleTable(Mapping[Any, Rule]):
    """An ordered table of rules: ``table[op]``. Not global state: it is passed to the passes that need it."""

    def __init__(self, rows: Mapping[Any, Rule] | None = None):
        self._rows: dict[Any, Rule] = dict(rows or {})

    def __getitem__(self, op: Any) -> Rule:
        """Ops of libraries that may not be there have rows by name, ``"transformers.grouped_mm_fallback.default"``."""
        return self._rows[str(op) if isinstance(op, OpOverload) and op not in self._rows else op]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def rule(
        self,
        *ops: Any,
        status: str,
        source: str,
        weights: Mapping[str, AtomFunction] | None = None,
        view: bool = False,
        pointwise: bool = False,
    ) -> Callable[[RuleFunction], RuleFunction]:
        """Decorator that adds a row for each op.

        Raises ModnormError for a duplicate, an op packet without overload, an in-place op, an unknown status or an
        empty source.
        """

        def add(function: RuleFunction) -> RuleFunction:
            for op in ops:
                self._check(op, status, source)
                self._rows[op] = Rule(str(op), function, status, source, dict(weights or {}), view, pointwise)
            return function

        return add

    @staticmethod
    def joined(*tables: RuleTable) -> RuleTable:
        """One table of the rows of several. Raises ModnormError for an op that has two rows."""
        whole = RuleTable()
        for table in tables:
            for op, row in table.items():
                whole._check(op, row.status, row.source)
                whole._rows[op] = row
        return whole

    def extended(self) -> RuleTable:
        """A copy to add one's own rules to; the original stays as it is."""
        return RuleTable(self._rows)

    def _check(self, op: Any, status: str, source: str) -> None:
        if isinstance(op, OpOverloadPacket):
            names = ", ".join(f"{op}.{o}" for o in op.overloads())
            raise ModnormError(f"A rule needs one overload, and {op} is a packet.", do=f"Name one of {names}.")
        if isinstance(op, OpOverload) and op._schema.is_mutable:
            raise ModnormError(
                f"{op} writes into its input.", why="Graphs are functional.", do="Give the rule for the functional op."
            )
        if op in self._rows:
            raise ModnormError(f"There is already a rule for {op}.", do="Remove one, or use another table.")
        if status not in STATUSES[:-1]:
            raise ModnormError(f"{status!r} is not a status of a rule.", do=f"Use one of {STATUSES[:-1]}.")
        if not source.strip():
            raise ModnormError(
                f"The rule for {op} has no source.", do="Cite the paper's section or give the derivation."
            )


def arguments(node: fx.Node, module: torch.nn.Module) -> tuple[Any, dict[str, Any]]:
    """The op's key and its arguments by schema name, defaults filled in (export elides them)."""
    if node.op == "call_module":
        region = module.get_submodule(str(node.target))
        if not isinstance(region, Region):
            raise InternalError(f"call_module node {node} is not a region")
        return region.kind, dict(zip(region.inputs, node.args, strict=True)) | {"region": region}
    target = node.target
    if not isinstance(target, OpOverload):
        names = getattr(target, "argument_names", None)
        return target, dict(zip(names, node.args, strict=False)) if names else {
            f"arg{i}": a for i, a in enumerate(node.args)
        }
    out: dict[str, Any] = {}
    for i, arg in enumerate(target._schema.arguments):
        if i < len(node.args):
            out[arg.name] = node.args[i]
        elif arg.name in node.kwargs:
            out[arg.name] = node.kwargs[arg.name]
        else:
            out[arg.name] = arg.default_value
    return target, out


def operand_at(args: Mapping[str, Any], operand: Operand) -> fx.Node:
    """The argument that an operand names."""
    name, index = operand
    return args[name] if index is None else args[name][index]


def operands(args: Mapping[str, Any]) -> Iterator[tuple[Operand, fx.Node]]:
    """Every fx node among the arguments, with the operand it stands at."""
    for name, value in args.items():
        if isinstance(value, fx.Node):
            yield (name, None), value
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                if isinstance(item, fx.Node):
                    yield (name, i), item
