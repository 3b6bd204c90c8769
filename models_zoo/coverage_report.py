"""What a coverage run found, as a page and as JSON."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .coverage import SAME, Row

__all__ = ["as_json", "markdown"]

KINDS = ("Linear", "Conv", "PatchConv", "Experts", "Embedding", "Table", "Gain", "Bias", "LogitBias", "Scalar", "Tied")


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain data, ordered by family."""
    return [asdict(row) | {"good": row.good} for row in sorted(rows, key=lambda row: row.spec)]


def _versions(rows: Sequence[Row]) -> list[str]:
    """What was run with; of several states of the source only their number (each row of the JSON has its own)."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for name, version in row.versions.items():
            found.setdefault(name, set()).add(version)
    shown = []
    for name, versions in sorted(found.items()):
        base = {version.partition("+")[0] for version in versions}
        if len(versions) > 1 and len(base) == 1:
            shown.append(f"{name} {base.pop()} ({len(versions)} states of its source)")
        else:
            shown += [f"{name} {version}" for version in sorted(versions)]
    return shown


def markdown(rows: Sequence[Row], command: str, without_model: Sequence[str] = (), left: Sequence[str] = ()) -> str:
    """The page: what was run, totals, what went wrong, what was estimated, then a line per family.

    `without_model` are architectures of transformers that are no family (`coverage.without_model`), `left` are families
    that have not been run.
    """
    rows = sorted(rows, key=lambda row: row.spec)
    used = _versions(rows)
    parts = [
        "# What converts\n",
        f"Written by `{command}` on {datetime.date.today().isoformat()} with {', '.join(used)}; nothing here was "
        "written by hand. Hugging Face architectures are built very small (`hf:NAME-tiny`), timm models at their own "
        "size, with random weights. *Good* means: converted, all targets finite and positive, every parameter that "
        "receives a gradient has an atom, and the captured graph computes what the model computes "
        f"(to {SAME:g} of its RMS; where that was checked).\n",
        _totals(rows),
    ]
    if left:
        more = "1 more family has" if len(left) == 1 else f"{len(left)} more families have"
        parts += [f"**{more} not been run**: the command goes on with them.\n"]
    parts += _section("Not good", [f"`{row.spec}`: {_complaint(row)}" for row in rows if not row.good])
    parts += _section(
        "Operations without a rule (their effect was sampled)",
        [f"`{row.spec}`: {_counted(row.sampled)}" for row in rows if row.sampled],
    )
    parts += _section(
        "Weights whose number is an estimate",
        [f"`{row.spec}`: {_listed(row.sampled_leaves)}" for row in rows if row.sampled_leaves],
    )
    parts += _section(
        "Parameters that reach no output on the example inputs",
        [f"`{row.spec}`: {len(row.unused)}: {_listed(row.unused, 4)}" for row in rows if row.unused],
    )
    parts += _section("Not run with weights", [f"`{row.spec}`: {row.unchecked}" for row in rows if row.unchecked])
    if without_model:
        text = ", ".join(f"`{name}`" for name in without_model)
        parts += [
            f"\n## Architectures without a model of their own\n\nParts of others, or configurations alone: {text}."
        ]
    parts += ["\n## Every family\n", _table(rows)]
    return "\n".join(parts)


def _totals(rows: Sequence[Row]) -> str:
    lines = ["| | families | good | ops | of them sampled | leaves | seconds, median | seconds, most | MB, most |",
             "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for library, prefix in (("transformers", "hf:"), ("timm", "timm:")):
        some = [row for row in rows if row.spec.startswith(prefix)]
        if not some:
            continue
        ops, sampled = sum(row.ops for row in some), sum(row.sampled_ops for row in some)
        seconds = sorted(row.seconds for row in some)
        lines.append(
            f"| {library} | {len(some)} | {sum(row.good for row in some)} | {ops:,} | {sampled} "
            f"({sampled / max(1, ops):.2%}) | {sum(row.leaves for row in some):,} | {seconds[len(seconds) // 2]:.1f} | "
            f"{seconds[-1]:.1f} | {max(row.megabytes for row in some)} |"
        )
    return "\n".join(lines) + "\n"


def _complaint(row: Row) -> str:
    if row.stage != "done":
        text = " ".join(row.error.split())
        return f"{row.stage}: {text[:600]}{' …' if len(text) > 600 else ''}"
    found = []
    if row.homeless:
        found.append(f"a gradient but no atom: {_listed(row.homeless)}")
    if row.difference is not None and not row.difference <= SAME:
        found.append(f"graph and model differ by {row.difference:.2g}")
    if row.targets and not all(0 < t < float("inf") for t in row.targets):
        found.append(f"targets from {row.targets[0]:g} to {row.targets[1]:g}")
    return "; ".join(found)


def _counted(places: Sequence[str]) -> str:
    counts = Counter(place.partition(" at ")[0] for place in places)
    first = {place.partition(" at ")[0]: place.partition(" at ")[2] for place in reversed(places)}
    return "; ".join(
        f"{n}× {name}" + (f" (first at {first[name].partition(' (')[0]})" if first[name] else "")
        for name, n in counts.items()
    )


def _listed(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"\n## {title}\n", *(f"- {line}" for line in lines)] if lines else [f"\n## {title}\n\nNone."]


def _table(rows: Sequence[Row]) -> str:
    header = ["family", "class", "route", "s", "MB", "parameters", "leaves", "atoms", "ops", "sampled", "unused",
              "targets", "graph = model"]  # fmt: skip
    lines = [f"| {' | '.join(header)} |", "|---|---|---|" + "---:|" * 4 + "---|" + "---:|" * 3 + "---|---|"]
    for row in rows:
        kinds = sorted(row.atoms.items(), key=lambda pair: KINDS.index(pair[0]) if pair[0] in KINDS else len(KINDS))
        cells = [
            f"`{row.spec}`" + ("" if row.good else " **no**"),
            row.model,
            row.route,
            f"{row.seconds:.1f}",
            str(row.megabytes),
            str(row.parameters),
            str(row.leaves),
            ", ".join(f"{n} {kind}" for kind, n in kinds),
            str(row.ops),
            str(row.sampled_ops or ""),
            str(len(row.unused) or ""),
            "-".join(f"{t:.2g}" for t in row.targets),
            "" if row.difference is None else "yes" if row.difference <= SAME else f"{row.difference:.1g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
