"""The norm tree for people: plain text, a rich tree for terminals, one self-contained HTML page.

All three show the same rows (see `report_rows`), in order of application. In text a fork (`├─ └─`) is a Tuple and a bar
(`┃`) a Power, whose copies are shown once.
"""

from __future__ import annotations

import html as _html
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from . import tree as T
from .report_rows import COLUMNS, Row, lay_out, leaf_row, number, pattern

if TYPE_CHECKING:
    from rich.tree import Tree

    from .norm import ModularNorm

__all__ = ["flat", "html", "html_fragment", "rich_tree", "text"]

#: a name longer than this (in the tree) gets a line of its own, so that the columns stay on a screen
WIDEST_NAME = 76

# Words around the tree ------------------------------------------------------------------------------------------------


def _header(norm: ModularNorm) -> list[str]:
    size = sum(math.prod(shape) for shape in norm.shapes.values())
    matrices = sum(leaf.atom.is_matrix for leaf in norm.leaves)
    sampled = sum(node.status == "sampled" for node in _nodes(norm.tree))
    return [
        f"modular norm · {norm.convention.name} convention · total mass {number(norm.mass)} · "
        + (f"~ {sampled} sampled number{'s' * (sampled > 1)}" if sampled else "no sampled numbers"),
        f"{size:,} parameters in {len(norm.shapes)} tensors · {len(norm.leaves)} leaves: {matrices} matrices, "
        f"{len(norm.leaves) - matrices} vectors",
    ]


def _listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _nodes(node: T.Node) -> Iterator[T.AtomNode | T.Bond]:
    if isinstance(node, T.AtomNode | T.Bond):
        yield node
    for child in node.children:
        yield from _nodes(child)


LEGEND = {
    "×": "×a: sensitivity to the input",
    "┃": "┃: one row for all copies",
    "…": "a…b: first to last copy",
    "–": "a–b: smallest to largest",
    "~": "~: sampled on random inputs",
    "by rows": "by rows: per RMS of a row, as lookups are",
}


def _footer(norm: ModularNorm, shown: str) -> list[str]:
    """Names without a row of their own, and a legend of the signs in `shown`."""
    also: dict[str, list[str]] = defaultdict(list)
    for alias, name in norm.aliases.items():
        also[name].append(alias)
    lines = [f"tied: {name} is also {_listed(pattern(aliases))}" for name, aliases in also.items()]
    lines += [f"unused, so without a norm: {_listed(pattern(norm.unused))}"] if norm.unused else []
    lines += [f"empty, so without a norm: {_listed(pattern(norm.empty))}"] if norm.empty else []
    quadrature = norm.convention.quadrature
    share = "√(mass / total mass)" if quadrature else "mass / total mass"
    how = " (in quadrature for uses of one kind)" if quadrature else ""
    scale = "scale: of what the weight multiplies"
    scale += " (queries, keys: × √heads)" if norm.convention.heads(4) > 1 else ""
    return [
        *lines,
        f"sensitivity: of the network's output to that of the weight's op · {scale}",
        f"target: {share} / (sensitivity · scale), the norm of the weight's update in a step of lr 1",
        *[f"a weight of several uses: its masses add up, and its sensitivity · scale where counted{how}"]
        * ("(use " in shown or " uses)" in shown),
        " · ".join(meaning for sign, meaning in LEGEND.items() if sign in shown),
    ]


# Plain text -----------------------------------------------------------------------------------------------------------


def text(norm: ModularNorm) -> str:
    """The norm tree as plain text: what `print(norm)` shows. Deterministic, no colours, no trailing spaces."""
    return _page(norm, list(_lines(lay_out(norm))))


def flat(norm: ModularNorm) -> str:
    """Every leaf on a line of its own, nothing folded."""
    rows = [leaf_row(leaf) for leaf in norm.leaves]
    return _page(norm, [(row.label, row) for row in rows])


def _page(norm: ModularNorm, lines: list[tuple[str, Row | None]]) -> str:
    table = _table(lines)
    return "\n".join([*_header(norm), "", *table, "", *_footer(norm, "\n".join(table[1:]))])


def _lines(sequence: Sequence[Row]) -> Iterator[tuple[str, Row | None]]:
    """(name with the lines of the tree before it, row); None for the further names of the row above."""
    for row in sequence:
        yield " ".join(filter(None, (row.label, row.note))), row
        yield from ((name, None) for name in row.more)
        for n, branch in enumerate(row.branches, start=1):
            final = n == len(row.branches)
            first, rest = ("┃ ", "┃ ") if row.kind == "power" else ("└─ ", "   ") if final else ("├─ ", "│  ")
            for i, (name, line) in enumerate(_lines(branch)):
                yield (rest if i else first) + name, line


def _table(lines: Sequence[tuple[str, Row | None]]) -> list[str]:
    rows = [row for _, row in lines if row]
    columns = _Columns(rows)
    names = [len(name) for name, row in lines if row and row.kind == "atom"]
    width = max((n for n in names if n <= WIDEST_NAME), default=0)
    out = [f"{'':{width}}  {columns.title}"]
    for name, row in lines:
        if row is None or not row.cells:
            out.append(name)
            continue
        if len(name) > width and row.atom:
            out.append(name)
            name = _STEM.match(name)[0].translate(_CONTINUED)  # type: ignore[index]
        label = f"{name:{width}}  {row.atom}"
        out.append("  ".join([f"{label:{width + 2 + columns.atom}}", *columns.cells(row)]).rstrip())
    return out


_STEM = re.compile("[┃│├└─ ]*")
_CONTINUED = str.maketrans("├└─", "│  ")


class _Columns:
    """The atom and the numbers of rows, aligned: ranges stand with their `…` below each other."""

    def __init__(self, rows: Sequence[Row]):
        self.atom = max((len(row.atom) for row in rows), default=0)
        cells = [[_halves(row.cells[i]) for row in rows if len(row.cells) > i] for i in range(len(COLUMNS))]
        self.left = [max((len(a) for a, _ in column), default=0) for column in cells]
        self.right = [max((len(b) for _, b in column), default=0) for column in cells]
        for i, title in enumerate(COLUMNS):
            self.left[i] = max(self.left[i], len(title) - self.right[i])
        titles = [title.rjust(a).ljust(a + b) for title, a, b in zip(COLUMNS, self.left, self.right, strict=True)]
        self.title = f"{'':{self.atom}}  {'  '.join(titles)}".rstrip()

    def cells(self, row: Row) -> list[str]:
        halves = map(_halves, row.cells)
        widths = zip(halves, self.left, self.right, strict=False)
        return [a.rjust(left) + b.ljust(right) for (a, b), left, right in widths]


def _halves(cell: str) -> tuple[str, str]:
    at = re.search("[…–]", cell)
    return (cell[: at.start()], cell[at.start() :]) if at else (cell, "")


# Rich -----------------------------------------------------------------------------------------------------------------

STYLES = {"bond": "cyan", "tuple": "magenta", "power": "bold green"}
GUIDE = 4  # columns that a level of a rich tree takes


def rich_tree(norm: ModularNorm) -> Tree:
    """The norm tree for `rich.print`, coloured."""
    from rich.text import Text
    from rich.tree import Tree

    sequence = lay_out(norm)
    rows = list(_walk(sequence, 1))
    columns = _Columns([row for row, _ in rows])
    width = max((GUIDE * depth + len(row.label) + len(row.note) + 1 for row, depth in rows if row.atom), default=0)

    def label(row: Row, depth: int) -> Text:
        out = Text(no_wrap=True)
        if row.kind == "atom":
            module, weight = _split(row.label)
            out.append(module, "dim").append(weight, "bold" if row.matrix else "")
            out.append(f" {row.note}" if row.note else "", "red")
        else:
            out.append(row.label, STYLES.get(row.kind, "yellow"))
        if row.cells:
            cells = [f"  {cell}" for cell in columns.cells(row)]
            cells[-1] = cells[-1].rstrip()
            out.append(" " * max(0, width - GUIDE * depth - len(out)) + "  ")
            out.append(f"{row.atom:{columns.atom}}", "blue")
            out.append("".join(cells[:3])).append("".join(cells[3:]), "bold")
        return out.append("".join(f"\n{name}" for name in row.more), "dim")

    def fill(node: Tree, rows: Sequence[Row], depth: int) -> None:
        for row in rows:
            below = node.add(label(row, depth))
            for branch in row.branches:
                if not _grouped(row, branch):
                    fill(below, branch, depth + 1)
                elif branch[0].kind in ("vertex", "edge"):
                    fill(below, branch[:1], depth + 1)
                    fill(below.children[-1], branch[1:], depth + 2)
                else:
                    fill(below.add(Text("branch", "magenta dim")), branch, depth + 2)

    above = Text("\n".join(_header(norm))).append("\n" + "\n".join(_footer(norm, _signs(sequence))), "dim")
    tree = Tree(above.append(f"\n{'':{width}}  {columns.title}", "default"), guide_style="dim")
    fill(tree, sequence, 1)
    return tree


def _grouped(row: Row, branch: Sequence[Row]) -> bool:
    """Whether the rows of a branch hang below a line of their own, to be told from the next branch."""
    return len(branch) > 1 and (row.kind != "power" or branch[0].kind == "vertex")


def _walk(rows: Sequence[Row], depth: int) -> Iterator[tuple[Row, int]]:
    for row in rows:
        yield row, depth
        for branch in row.branches:
            yield from _walk(branch, depth + 1 + _grouped(row, branch))


def _signs(sequence: Sequence[Row]) -> str:
    """Everything that rows say, to look for signs that need a legend."""
    return "".join("".join((row.label, row.note, *row.more, *row.cells)) for row, _ in _walk(sequence, 0))


def _split(key: str) -> tuple[str, str]:
    """A key as (module path with its dot, the weight's own name with its slices)."""
    at = key.partition("[")[0].rfind(".") + 1
    return key[:at], key[at:]


# HTML -----------------------------------------------------------------------------------------------------------------


def html(norm: ModularNorm) -> str:
    """The norm tree as one self-contained page: blocks fold; under the mouse a number shows its value in every copy."""
    title = f"modular norm, {len(norm.leaves)} leaves"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"</head>\n<body>\n{html_fragment(norm)}</body>\n</html>\n"
    )


def html_fragment(norm: ModularNorm) -> str:
    """What `html` has in its body, for notebooks."""
    sequence = lay_out(norm)
    titles = "".join(f'<span class="n">{title}</span>' for title in COLUMNS)
    toggle = "this.closest('.modnorm').querySelectorAll('.tree details').forEach(d=>d.open={})"
    return "\n".join(
        [
            '<div class="modnorm">',
            f"<style>{_CSS}</style>",
            *(f"<p>{_html.escape(line)}</p>" for line in _header(norm)),
            f'<p><button onclick="{toggle.format("true")}">open all</button>',
            f'<button onclick="{toggle.format("false")}">close all</button></p>',
            '<div class="tree">',
            '<div class="row head"><span class="name"></span><span class="of"></span>',
            f'{titles}<span class="s"></span></div>',
            *map(_html_row, sequence),
            "</div>",
            *(f"<p>{_html.escape(line)}</p>" for line in _footer(norm, _signs(sequence))),
            f"<details><summary>all {len(norm.leaves)} leaves</summary>",
            *(_html_row(leaf_row(leaf)) for leaf in norm.leaves),
            "</details>",
            "</div>\n",
        ]
    )


def _html_row(row: Row) -> str:
    module, name = _split(row.label) if row.kind == "atom" else ("", row.label)
    names = "".join(f"<br>{_html.escape(name)}" for name in row.more)
    note = f" <em>{_html.escape(row.note)}</em>" if row.note else ""
    name = f"<b>{_html.escape(name)}</b>" if row.matrix else _html.escape(name)
    inside = f'<span class="name"><i>{_html.escape(module)}</i>{name}{note}{names}</span>'
    if row.cells:
        values = row.values or ((),) * len(row.cells)
        inside += f'<span class="of">{_html.escape(row.atom)}</span>'
        for cell, every in zip(row.cells, values, strict=False):
            inside += f'<span class="n"{_every(every)}>{_html.escape(cell)}</span>'
        inside += '<span class="n"></span>' * (len(COLUMNS) - len(row.cells))
        inside += f'<span class="s">{_spark(values[-1])}</span>'
    if not row.branches:
        title = _every(row.values[0]) if row.kind == "bond" and row.values else ""
        return f'<div class="row {row.kind}"{title}>{inside}</div>'
    branches = ("\n".join(map(_html_row, branch)) for branch in row.branches)
    below = "\n".join(f'<div class="branch">\n{rows}\n</div>' for rows in branches)
    return f'<details open class="{row.kind}"><summary class="row {row.kind}">{inside}</summary>\n{below}\n</details>'


def _every(values: Sequence[float]) -> str:
    """A title with the values of all copies, where they differ."""
    shown = [number(value) for value in values]
    return f' title="{", ".join(shown)}"' if len(set(shown)) > 1 else ""


def _spark(values: Sequence[float]) -> str:
    """A line through the targets of all copies, in order, on a logarithmic scale."""
    if len({number(value) for value in values}) < 2 or min(values) <= 0:
        return ""
    logs = [math.log(value) for value in values]
    low, high = min(logs), max(logs)
    step = 60 / (len(logs) - 1)
    points = " ".join(f"{step * i:.1f},{13 - 12 * (y - low) / (high - low):.1f}" for i, y in enumerate(logs))
    line = f'<polyline fill="none" stroke="#38c" stroke-width="1.5" points="{points}"/>'
    return f'<svg width="60" height="14" aria-hidden="true">{line}</svg>'


_CSS = """
.modnorm{font:13px/1.5 ui-monospace,Menlo,Consolas,monospace;color-scheme:light dark;min-width:75em;margin:1em}
.modnorm p{margin:.2em 0}
.modnorm .row{display:flex;gap:1em;padding:0 .3em}
.modnorm .row:hover{background:#8883}
.modnorm .head{position:sticky;top:0;background:Canvas;border-bottom:1px solid #8888}
.modnorm .name{flex:1;min-width:0;overflow-wrap:anywhere}
.modnorm .name i{font-style:normal;opacity:.6}
.modnorm .of{width:15em}
.modnorm .n{width:8.5em;text-align:right}
.modnorm .s{width:60px}
.modnorm .n[title],.modnorm .bond[title]{text-decoration:underline dotted #8888}
.modnorm svg{vertical-align:middle}
.modnorm em{color:#c33}
.modnorm summary{cursor:pointer}
.modnorm summary .name::before{content:"▸ "}
.modnorm details[open]>summary .name::before{content:"▾ "}
.modnorm .bond{color:#078}.modnorm .tuple>.name{color:#a3a}.modnorm .power>.name{color:#282;font-weight:bold}
.modnorm .dag>.name,.modnorm .vertex>.name,.modnorm .edge>.name{color:#a70}
.modnorm .branch{border-left:2px solid #8886;margin:.3em 0 .3em 1.2em}
.modnorm .power>.branch{border-left:5px solid #2828}
"""
