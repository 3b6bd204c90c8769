"""The norm tree as rows for people, which `report` writes as text, for terminals and as HTML.

Read downwards, rows are in order of application. The branches of a Tuple see the same input. The copies of a Power are
one row for all, with the numbers of all copies as `first…last` and the block's number in names as `{0…11}`. Nested
Composes, and Tuples of Tuples that join the same way, are laid out flat: the recursion gives the same numbers.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from . import tree as T

if TYPE_CHECKING:
    from .norm import Leaf, ModularNorm

__all__ = ["COLUMNS", "Row", "lay_out", "leaf_row", "number", "pattern", "span"]

COLUMNS = ("mass", "sensitivity", "scale", "target")

#: how ops are called here where ATen's name would puzzle a reader
OP_NAMES = {
    "_native_batch_norm_legit_no_training": "batch_norm",
    "_native_batch_norm_legit_functional": "batch_norm",
    "_native_batch_norm_legit": "batch_norm",
    "native_batch_norm": "batch_norm",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "scaled_dot_product_attention": "attention",
    "_to_copy": "to",
}


@dataclass(frozen=True)
class Row:
    """A line of the report, and what hangs below it.

    Attributes:
        kind: `atom`, `bond`, `tuple`, `power`, `dag`, `vertex` or `edge`.
        label: what it is: names of weights, ops with their sensitivities.
        note: a remark after the name. more: further names, with their notes, of copies that need patterns of their own.
        atom: the atom in words. matrix: whether it is one.
        cells: the columns as printed, () for none. values: the numbers of every copy, one tuple a column.
        branches: sequences of rows below: the branches of a tuple, the block of a power, the vertices of a dag.
    """

    kind: str
    label: str
    note: str = ""
    more: tuple[str, ...] = ()
    atom: str = ""
    matrix: bool = False
    cells: tuple[str, ...] = ()
    values: tuple[tuple[float, ...], ...] = ()
    branches: tuple[tuple[Row, ...], ...] = ()


# Numbers and names of copies ------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three significant digits, without an exponent where a plain number is as short."""
    if value != 0 and not 1e-4 <= abs(value) < 99999.5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def span(values: Sequence[float]) -> str:
    """One number for all copies, `first…last` where they rise or fall, `smallest–largest` where they do neither."""
    shown = [number(v) for v in values]
    if len(set(shown)) == 1:
        return shown[0]
    pairs = list(zip(values, values[1:], strict=False))
    if all(a <= b for a, b in pairs) or all(a >= b for a, b in pairs):
        return f"{shown[0]}…{shown[-1]}"
    return f"{number(min(values))}–{number(max(values))}"


def pattern(names: Iterable[str]) -> list[str]:
    """Names with the numbers that vary in braces: `{0…11}`, `{0,2…10}`, `{1,4}`.

    Exact: the patterns, written out, give the names and no others. So there may be several.
    """
    groups: dict[str, dict[str, list[int]]] = {}
    for name in names:
        groups.setdefault(_NUMBER.sub("#", name), {})[name] = [int(n) for n in _NUMBER.findall(name)]
    return [found for group in groups.values() for found in _patterns(group)]


_NUMBER = re.compile(r"(?<!\d)(?:0|[1-9]\d*)(?!\d)")


def _patterns(group: dict[str, list[int]]) -> Iterator[str]:
    """Patterns for names that differ in numbers only: one if all combinations of their numbers occur, else several."""
    columns = [list(dict.fromkeys(column)) for column in zip(*group.values(), strict=True)]
    if math.prod(map(len, columns)) == len(group):
        parts = iter(columns)
        yield _NUMBER.sub(lambda _: _braces(next(parts)), next(iter(group)))
        return
    varying = next(i for i, column in enumerate(columns) if len(column) > 1)
    for value in columns[varying]:
        yield from _patterns({name: numbers for name, numbers in group.items() if numbers[varying] == value})


def _braces(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    step = values[1] - values[0]
    if len(values) > 2 and step > 0 and list(values) == list(range(values[0], values[-1] + 1, step)):
        return f"{{{values[0]}…{values[-1]}}}" if step == 1 else f"{{{values[0]},{values[1]}…{values[-1]}}}"
    return f"{{{','.join(map(str, values))}}}"


# Rows -----------------------------------------------------------------------------------------------------------------


def lay_out(norm: ModularNorm) -> tuple[Row, ...]:
    """The whole tree, folded."""
    return _Layout(norm).sequence([norm.tree])


def leaf_row(leaf: Leaf) -> Row:
    """A leaf by itself, nothing folded."""
    cells = [number(value) for value in (leaf.mass, leaf.sensitivity, leaf.scale, leaf.target)]
    cells[2] = ("~" if leaf.status == "sampled" else "") + cells[2]
    return Row("atom", leaf.key, atom=leaf.atom.describe(), matrix=leaf.atom.is_matrix, cells=tuple(cells))


class _Layout:
    """Rows from the tree. Copies of a block are laid out together: `lanes` are nodes alike, one for each copy."""

    def __init__(self, norm: ModularNorm):
        self.convention = norm.convention
        self.leaf: dict[str, Leaf] = {leaf.key: leaf for leaf in norm.leaves}
        self.uses: dict[str, list[T.Allotment]] = defaultdict(list)
        for part in T.allot(norm.tree, norm.convention):
            self.uses[part.node.key].append(part)
        #: leaf key -> use -> how the leaf's norm counts it
        self.counted = {
            key: {part.node.use: part for part in self.convention.binding(uses)} for key, uses in self.uses.items()
        }

    def sequence(self, lanes: Sequence[T.Node]) -> tuple[Row, ...]:
        rows: list[Row] = []
        for row in self._flat(lanes):
            if rows and row.kind == rows[-1].kind == "bond":
                rows[-1] = replace(rows[-1], label=f"{rows[-1].label} · {row.label}")
            else:
                rows.append(row)
        return tuple(rows)

    def _flat(self, lanes: Sequence[T.Node]) -> Iterator[Row]:
        first = lanes[0]
        if isinstance(first, T.AtomNode):
            yield self._atom(lanes)  # type: ignore[arg-type]
        elif isinstance(first, T.Bond):
            values = [bond.value for bond in lanes]  # type: ignore[attr-defined]
            mark = "~" if any(bond.status == "sampled" for bond in lanes) else ""  # type: ignore[attr-defined]
            yield Row("bond", f"{OP_NAMES.get(first.name, first.name)} ×{mark}{span(values)}", values=(tuple(values),))
        elif isinstance(first, T.Power):
            yield self._power(lanes)
        elif isinstance(first, T.Tuple):
            yield self._tuple(lanes)
        elif isinstance(first, T.Dag):
            yield self._dag(lanes)  # type: ignore[arg-type]
        else:
            for parts in zip(*(lane.children for lane in lanes), strict=True):
                yield from self._flat(parts)

    def _atom(self, lanes: Sequence[T.AtomNode]) -> Row:
        """A weight's columns are its leaf's; a use of a tied weight shows its own share, sensitivity and scale, in the
        leaf's norm."""
        columns: tuple[list[float], ...] = ([], [], [], [])
        found: dict[str, list[int]] = defaultdict(list)
        for node in lanes:
            leaf, uses = self.leaf[node.key], self.uses[node.key]
            found[node.key].append(next(i for i, part in enumerate(uses) if part.node.use == node.use))
            part = self.counted[node.key].get(node.use, uses[found[node.key][-1]])
            own = (node.own_mass, part.sensitivity, part.node.gain, leaf.target)
            numbers = own if len(uses) > 1 else (leaf.mass, leaf.sensitivity, leaf.scale, leaf.target)
            for column, value in zip(columns, numbers, strict=True):
                column.append(value)
        cells = [span(column) for column in columns]
        if any(node.status == "sampled" for node in lanes):
            cells[2] = "~" + cells[2]
        by_note: dict[str, list[str]] = defaultdict(list)
        for key, those in found.items():
            by_note[self._note(key, those)].append(key)
        (label, note), *more = [(name, note) for note, keys in by_note.items() for name in pattern(keys)]
        rest = tuple(" ".join(filter(None, pair)) for pair in more)
        atom = lanes[0].atom
        return Row("atom", label, note, rest, atom.describe(), atom.is_matrix, tuple(cells), tuple(map(tuple, columns)))

    def _note(self, key: str, those: list[int]) -> str:
        """Which of several uses of a weight are meant, and how its norm counts them."""
        uses = self.uses[key]
        if len(uses) == 1:
            return ""
        some = (
            f"use {_braces([i + 1 for i in those])} of {len(uses)}" if len(those) < len(uses) else f"{len(uses)} uses"
        )
        counted = [self.counted[key].get(uses[i].node.use) for i in those]
        if not any(counted):
            return f"({some}, not counted)"
        by_rows = all(part and part.node.atom != uses[i].node.atom for i, part in zip(those, counted, strict=True))
        return f"({some}, by rows)" if by_rows else f"({some})"

    def _power(self, lanes: Sequence[T.Node]) -> Row:
        copies = [copy for lane in lanes for copy in lane.children]
        places = pattern(_common([leaf.key for leaf in T.leaves(copy)]) for copy in copies)
        place = re.match(r".*\}[^.]*", places[0]) if len(places) == 1 else None  # up to the last number that varies
        label = f"×{len(lanes[0].children)} copies" + (f" of {place[0]}" if place else "")
        return Row("power", label, cells=(span([lane.mass for lane in lanes]),), branches=(self.sequence(copies),))

    def _tuple(self, lanes: Sequence[T.Node]) -> Row:
        branches = [self.sequence(branch) for branch in zip(*(_branches(lane) for lane in lanes), strict=True)]
        join = lanes[0].join  # type: ignore[attr-defined]
        weighted = [any(True for _ in T.leaves(branch)) for branch in _branches(lanes[0])]
        label = "residual" if join == "add" and any(weighted) and not all(weighted) else join
        below = tuple(branch or (IDENTITY,) for branch in branches)
        return Row("tuple", f"{label} ×{self._own(lanes)}", branches=below)

    def _own(self, lanes: Sequence[T.Node]) -> str:
        return span([lane.sensitivity(self.convention) for lane in lanes])

    def _dag(self, lanes: Sequence[T.Dag]) -> Row:
        """Vertex by vertex, each with the edges that lead to it; runs of alike vertices are folded like blocks."""
        dag = lanes[0]
        last = len(dag.vertices) - 1
        branches: list[tuple[Row, ...]] = []
        v = 1
        for period, count in _runs(dag):
            block = [[v + k * period + j for k in range(count)] for j in range(period)]
            found = [self._vertex(lanes, copies) for copies in block]
            if count > 1:
                branches.append((Row("power", f"×{count} copies", branches=tuple(found)),))
            else:
                branches += found
            v += period * count
        label = f"dag of {last + 1} vertices and {len(dag.edges)} edges{_within(lanes)} ×{self._own(lanes)}"
        return Row("dag", label, branches=tuple(branches))

    def _vertex(self, lanes: Sequence[T.Dag], copies: list[int]) -> tuple[Row, ...]:
        last = len(lanes[0].vertices) - 1
        incoming = [[i for i, (_, b, _) in enumerate(lanes[0].edges) if b == v] for v in copies]
        after = self.sequence([lane.vertices[v] for lane in lanes for v in copies])
        name = _vertex_name(copies, last)
        edges: dict[tuple[Row, ...], list[list[int]]] = defaultdict(list)
        for indices in zip(*incoming, strict=True):
            rows = self.sequence([lane.edges[i][2] for lane in lanes for i in indices])
            edges[rows].append([lanes[0].edges[i][0] for i in indices])
        below: list[tuple[Row, ...]] = []
        for rows, sources in edges.items():  # edges of one vertex that say the same share a row
            if len(copies) == 1 and (not rows or _inline(rows)):
                sources = [[source for (source,) in sources]]
            for source in sources:
                below.append((Row("edge", f"from {_vertex_name(source, last)}{_inline(rows)}"), *_rest(rows)))
        if len(below) > 1:
            return (Row("vertex", name, branches=tuple(below)), *after)
        head, *rest = below[0]
        edge = head.label.removeprefix("from ")
        return (Row("vertex", f"{name} ← {edge.removesuffix(': identity') if after else edge}"), *rest, *after)


IDENTITY = Row("bond", "identity")


def _inline(rows: Sequence[Row]) -> str:
    """What an edge does, on the line of the edge, if that is little."""
    if not rows:
        return ": identity"
    return f": {rows[0].label}" if len(rows) == 1 and rows[0].kind == "bond" else ""


def _rest(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return () if _inline(rows) else rows


def _common(keys: Sequence[str]) -> str:
    """The module path that all keys lie below."""
    paths = [key.split("[")[0].split(".")[:-1] for key in keys]
    shared = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _within(lanes: Sequence[T.Node]) -> str:
    """Where the weights of a Dag are, where they lie in one module."""
    places = [_common([leaf.key for leaf in T.leaves(lane)]) for lane in lanes]
    return f" in {', '.join(pattern(dict.fromkeys(places)))}" if all(places) else ""


def _branches(node: T.Node) -> list[T.Node]:
    """The branches of a Tuple, those of Tuples among them that join the same way in their place."""
    found: list[T.Node] = []
    for child in node.children:
        same = isinstance(child, T.Tuple) and child.join == node.join  # type: ignore[attr-defined]
        found.extend(_branches(child) if same else [child])
    return found


def _vertex_name(vertices: Sequence[int], last: int) -> str:
    inner = [v for v in dict.fromkeys(vertices) if 0 < v < last]
    names = [*("input" for v in vertices if v == 0), *("output" for v in vertices if v == last)]
    return ", ".join(dict.fromkeys([*names, f"v{_braces(inner)}"] if inner else names))


def _runs(dag: T.Dag) -> Iterator[tuple[int, int]]:
    """(period, count) of the repetitions among the vertices, in order, (1, 1) for those that stand alone.

    Vertices repeat if they and their edges are alike up to numbers in names, and sources of edges move along or stay.
    """
    last = len(dag.vertices) - 1
    incoming = [[(a, module) for a, b, module in dag.edges if b == v] for v in range(last + 1)]
    kinds = [(_kind(dag.vertices[v]), *(_kind(module) for _, module in incoming[v])) for v in range(last + 1)]

    def repeats(before: int, v: int) -> bool:
        pairs = zip(incoming[before], incoming[v], strict=True)
        return kinds[v] == kinds[before] and all(b == a or b - a == v - before for (a, _), (b, _) in pairs)

    v = 1
    while v <= last:
        best = (1, 1)
        for period in range(1, (last - v) // 2 + 1):
            end = v + period
            while end < last and repeats(end - period, end):
                end += 1
            count = (end - v) // period
            if count > 1 and period * count > best[0] * best[1]:
                best = (period, count)
        yield best
        v += best[0] * best[1]


def _kind(node: T.Node) -> tuple:
    return T.signature(node), tuple(_NUMBER.sub("#", leaf.key) for leaf in T.leaves(node))
