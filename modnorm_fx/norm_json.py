"""A modular norm as JSON: versioned, data only, strict on reading.

Schema 1: ``{"format": "modnorm_fx.norm", "version": 1, "convention", "digest", "parameters": {name: shape},
"aliases", "unused", "leaves": {key: [parameter, [[axis, start, stop, period], ...]]}, "tree": node}``. A node is
``{"atom": key, "use", "of": atom, "gain", "mass", "initial", "status"}``, ``{"bond": name, "sensitivity",
"status"}``, ``{"compose"|"power": [nodes]}``, ``{"tuple": [nodes], "join"}`` or ``{"dag": [nodes], "edges": [[from,
to, node]]}``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from . import tree as T
from .atoms import Atom, Slice
from .conventions import convention
from .errors import FormatError, ModnormError
from .norm import ModularNorm

__all__ = ["to_json", "from_json", "read", "FORMAT", "VERSION"]

FORMAT, VERSION = "modnorm_fx.norm", 1
FIELDS = ("format", "version", "convention", "digest", "parameters", "aliases", "unused", "leaves", "tree")


def to_json(norm: ModularNorm) -> dict[str, Any]:
    """The norm as JSON data."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "convention": norm.convention.name,
        "digest": norm.digest,
        "parameters": {name: list(shape) for name, shape in norm.shapes.items()},
        "aliases": dict(norm.aliases),
        "unused": list(norm.unused),
        "leaves": {
            key: [name, [[s.axis, s.start, s.stop, s.period] for s in parts]]
            for key, (name, parts) in norm.slices.items()
        },
        "tree": _node(norm.tree),
    }


def read(path: Path) -> ModularNorm:
    """Reads a file. Raises FormatError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"Cannot read {path}.", why=str(error)) from error
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{path} is not JSON.", why=str(error), do="Give the file that ModularNorm.save wrote."
        ) from error
    return from_json(data)


def from_json(data: Any) -> ModularNorm:
    """The norm that ``to_json`` described. Raises FormatError for unknown formats, versions, fields and kinds, and
    for damage."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FormatError("This JSON is not a modular norm.", why=f"its format field is not {FORMAT!r}")
    if data.get("version") != VERSION:
        raise FormatError(
            f"This norm has schema version {data.get('version')!r}; this package reads version {VERSION}.",
            do="Install a newer modnorm_fx, or convert the model again.",
        )
    missing, unknown = [f for f in FIELDS if f not in data], [f for f in data if f not in FIELDS]
    if missing or unknown:
        raise FormatError("This norm has the wrong fields.", why=f"missing: {missing}; unknown: {unknown}")
    try:
        norm = ModularNorm(
            tree=_read(data["tree"]),
            convention=convention(data["convention"]),
            shapes={name: tuple(int(n) for n in shape) for name, shape in data["parameters"].items()},
            slices={
                key: (name, tuple(Slice(*part) for part in parts)) for key, (name, parts) in data["leaves"].items()
            },
            aliases=dict(data["aliases"]),
            unused=tuple(data["unused"]),
        )
        complete = {node.key for node in T.leaves(norm.tree)} == set(norm.slices) and all(
            node.atom.shape == _part(norm, node.key) for node in T.leaves(norm.tree)
        )
    except FormatError:
        raise
    except (ModnormError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FormatError("This norm is damaged.", why=f"{type(error).__name__}: {error}") from error
    if norm.digest != data["digest"] or not complete:
        raise FormatError("This norm is damaged.", why="its digest, leaves or parameters do not fit together")
    return norm


def _part(norm: ModularNorm, key: str) -> tuple[int, ...]:
    """The shape of a leaf's part of its parameter."""
    name, parts = norm.slices[key]
    part = torch.empty(norm.shapes[name], device="meta")
    for s in parts:
        part = s.read(part)
    return tuple(part.shape)


def _node(node: T.Node) -> dict[str, Any]:
    if isinstance(node, T.AtomNode):
        return {"atom": node.key, "use": node.use, "of": node.atom.to_json(), "gain": node.gain, "mass": node.own_mass,
                "initial": node.initial, "status": node.status}  # fmt: skip
    if isinstance(node, T.Bond):
        return {"bond": node.name, "sensitivity": node.value, "status": node.status}
    if isinstance(node, T.Tuple):
        return {"tuple": [_node(c) for c in node.parts], "join": node.join}
    if isinstance(node, T.Dag):
        return {"dag": [_node(v) for v in node.vertices], "edges": [[a, b, _node(m)] for a, b, m in node.edges]}
    return {"power" if isinstance(node, T.Power) else "compose": [_node(c) for c in node.children]}


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise FormatError("This norm is damaged.", why=f"{value!r} stands where a finite number >= 0 belongs")
    return float(value)


def _read(d: Any) -> T.Node:
    match d:
        case {
            "atom": str(key),
            "use": int(use),
            "of": dict(atom),
            "gain": gain,
            "mass": mass,
            "initial": initial,
            "status": str(status),
            **rest,
        } if not rest:
            return T.AtomNode(key, use, Atom.from_json(atom), _number(gain), _number(mass), _number(initial), status)
        case {"bond": str(name), "sensitivity": value, "status": str(status), **rest} if not rest:
            return T.Bond(name, _number(value), status)
        case {"tuple": list(parts), "join": str(join), **rest} if not rest:
            return T.Tuple(tuple(_read(p) for p in parts), join)
        case {"dag": list(vertices), "edges": list(edges), **rest} if not rest:
            ordered = tuple((int(a), int(b), _read(m)) for a, b, m in edges)
            if any(not 0 <= a < b < len(vertices) for a, b, _ in ordered):
                raise FormatError("This norm is damaged.", why="a Dag has an edge that does not lead forward")
            return T.Dag(tuple(_read(v) for v in vertices), ordered)
        case {"compose": list(parts), **rest} if not rest:
            return T.Compose(tuple(_read(p) for p in parts))
        case {"power": list(parts), **rest} if not rest:
            return T.Power(tuple(_read(p) for p in parts))
    keys = list(d) if isinstance(d, dict) else type(d).__name__
    raise FormatError("This norm has a tree node of an unknown kind.", why=f"its fields are {keys}")
