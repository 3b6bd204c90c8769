"""Numbers of a matrix that is computed from parameters: its norm, and what a step of each parameter does to it.

The map is run at its *declared point*, in double precision: every parameter at a random value of norm 1 in its own
atom, gains at 1. Nothing of the model is read. From there on:

* a map of degree 1 in the carriers of the entries (``w/√n``, masks) is scaled by its author such that the matrix keeps
  the scale: the carriers are declared at the norm that gives it the norm of its layer (``Convention.declared``);
* where gains are the norms of the rows (weight normalisation), they are declared at the norms that the rows of a matrix
  of that norm have;
* any other map fixes the size of the matrix itself (standardised weights, rotations), whose scale then is its gain on
  inputs of independent entries: of a row w that is ‖w‖₂, and the author of such a map has chosen it.

A parameter's sensitivity is the norm, in the layer's atom, of the central difference along a random step of norm 1.
Straight-through estimators (quantised weights) are followed as their gradient is: the rounded matrix counts as the one
that is rounded. What moves only the rounded one (a learned step of its grid) is measured by derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from modnorm_fx.atoms import Atom, Conv, Experts, Gates, Linear, PatchConv, Reshaped
from modnorm_fx.errors import WeightError
from modnorm_fx.regions import Region
from modnorm_fx.rules import AtomFunction
from modnorm_fx.runtime import TINY
from modnorm_fx.weight_atoms import Site

from .canonicalize import aten
from .layout import GATHERS
from .recognize_straight_through import passed_on

#: step of the central difference relative to the parameter; its error is of the order of the square
STEP = 1e-3
#: a matrix with more entries is measured in single precision, with a longer step
LARGE, LARGE_STEP = 1 << 22, 1e-2
#: relative error up to which a map counts as one of degree 1; a stabilising ε makes less
TOLERANCE = 1e-2
#: steps of the iteration that stands for a model's own
ITERATIONS = 50
#: ops whose result is linear in a vector among their operands
CONTRACTIONS = frozenset(
    {aten.mv.default, aten.dot.default, aten.vdot.default, aten.mm.default, aten.matmul.default, aten.linear.default}
)


@dataclass(frozen=True)
class Part:
    """What a parameter is in a computed matrix.

    Attributes:
        name: the region's argument.
        role: its atom, from how it arrives at the region.
        kind: ``matrix`` (entry by entry), ``gain`` (a factor of rows), ``shift`` (added to rows), ``factor`` (of a
            product of matrices), ``number`` (anything else).
        view: for gains and shifts, the matrix with their entries at every place.
    """

    name: str
    role: AtomFunction
    kind: str
    view: Any = None


def measure_matrix(
    region: Region,
    parts: Mapping[str, Part],
    layer: Atom,
    held: Mapping[str, Tensor | None],
    declared: float,
    known: dict[Any, Any],
) -> dict[str, Any]:
    """Facts of the region: ``scale`` of the matrix in the norm of ``layer``, and per parameter ``initial`` (the norm it
    is declared to have) and ``sensitivity``. Empty if the map cannot be run at that point, or is zero there.

    Args:
        held: the other inputs of the region: their values where the graph holds them, None for buffers.
        declared: the norm that the matrix has where a parameter sets its size.
        known: results by what they depend on; layers that repeat are measured once.
    """
    inputs = [n for n in region.body.graph.nodes if n.op == "placeholder"]
    atoms = {name: _atom(part, tuple(_meta(n).shape)) for n, (name, part) in zip(inputs, parts.items(), strict=False)}
    values = tuple(None if t is None else t.double().numpy().tobytes() for t in held.values())
    key = (_text(region.body.graph), repr(layer), tuple((repr(a), parts[n].kind) for n, a in atoms.items()), values)
    if key not in known:
        try:
            known[key] = _Matrix(region.body, parts, atoms, layer, held).measure(declared)
        except Exception:  # whatever an op raises on random values is the answer to "can it be measured"
            known[key] = {}
    return known[key]


def _atom(part: Part, size: tuple[int, ...]) -> Atom | None:
    try:
        return part.role(Site(None, {}, size, torch.empty(size, device="meta"), (), frozenset(), logits=False))  # type: ignore[arg-type]
    except WeightError:
        return None


def _meta(node: fx.Node) -> Tensor:
    return node.meta["val"]


def _text(graph: fx.Graph) -> str:
    """The graph without the names of its nodes."""
    index = {n: i for i, n in enumerate(graph.nodes)}
    lines = []
    for n in graph.nodes:
        args = fx.map_arg((n.args, n.kwargs), lambda a: f"%{index[a]}")
        place = str(tuple(_meta(n).shape)) + str(_meta(n).dtype) if n.op == "placeholder" else str(n.target)
        lines.append(f"{place} {args}")
    return "\n".join(lines)


class _Matrix:
    """The map of one region, and the point at which it is measured."""

    def __init__(
        self,
        body: fx.GraphModule,
        parts: Mapping[str, Part],
        atoms: Mapping[str, Atom | None],
        layer: Atom,
        held: Mapping[str, Tensor | None],
    ):
        self.body, self.parts, self.atoms, self.layer = body, parts, atoms, layer
        self.generator = torch.Generator().manual_seed(0)
        large = math.prod(layer.shape) > LARGE
        self.dtype, self.step = (torch.float32, LARGE_STEP) if large else (torch.float64, STEP)
        self.vectors: dict[fx.Node, Tensor] = {}
        self.straight = passed_on(body.graph)
        self.unread = _unread(body.graph, parts, held)
        self.point: dict[str, Tensor] = {}
        for node in body.graph.nodes:
            if node.op == "placeholder":
                part = parts.get(node.name)
                self.point[node.name] = self.draw(part, _meta(node)) if part else self.buffer(node, held.get(node.name))

    def measure(self, declared: float) -> dict[str, Any]:
        with torch.no_grad():
            matrix = self.run(self.point)
            norm = self.norm(matrix)
            if not math.isfinite(norm) or norm == 0.0:
                return {}
            initial = {name: 0.0 if part.kind == "shift" else 1.0 for name, part in self.parts.items()}
            scale = _typical_gain(matrix, self.layer)
            rows = [p.name for p in self.parts.values() if p.kind == "gain" and _are_row_norms(matrix, p.view)]
            for name in rows or self.homogeneous(matrix):
                self.point[name] *= declared / norm
                initial[name], scale = declared / norm, 1.0
            return {"scale": scale, "initial": initial, "sensitivity": {n: self.slope(n, initial[n]) for n in initial}}

    def homogeneous(self, matrix: Tensor) -> list[str]:
        """The carriers, if the matrix is proportional to them."""
        carriers = [part.name for part in self.parts.values() if part.kind == "matrix"]
        twice = self.run({**self.point, **{name: 2 * self.point[name] for name in carriers}})
        error = torch.linalg.vector_norm(twice - 2 * matrix) / torch.linalg.vector_norm(matrix)
        return carriers if float(error) < TOLERANCE else []

    def slope(self, name: str, size: float) -> float:
        change, h = self.direction(name), self.step * (size or 1.0)
        above, below = (self.run({**self.point, name: self.point[name] + sign * h * change}) for sign in (1, -1))
        moved = self.norm((above - below) / (2 * h))
        return moved if moved > TINY or not self.straight else self.norm(self.derivative(name, change))

    def derivative(self, name: str, change: Tensor) -> Tensor:
        """What autograd has for a change of a parameter, at the values that the matrix really has."""
        self.straight = {}
        with torch.enable_grad():
            at = self.point[name].clone().requires_grad_()
            matrix = self.run({**self.point, name: at})
            cotangent = torch.zeros_like(matrix, requires_grad=True)
            (back,) = torch.autograd.grad(matrix, at, cotangent, create_graph=True)
            (moved,) = torch.autograd.grad(back, cotangent, change)
        self.straight = passed_on(self.body.graph)
        return moved

    def norm(self, matrix: Tensor) -> float:
        """In the layer's atom; of large matrices by power iteration."""
        if max(matrix.shape) <= 512:
            return float(self.layer.norm(matrix))
        return float(self.layer.estimate(matrix, self.layer.start_vectors(matrix))[0])

    # --- the point ---

    def draw(self, part: Part, like: Tensor) -> Tensor:
        atom = self.atoms[part.name]
        if part.kind == "gain":
            return torch.ones(like.shape, dtype=self.dtype)
        if part.kind == "shift":
            return torch.zeros(like.shape, dtype=self.dtype)
        if part.kind == "number" or atom is None:  # as large as the entries of a layer's matrix
            return torch.randn(like.shape, generator=self.generator, dtype=self.dtype) / math.sqrt(like.shape[-1])
        return self.unit(atom)

    def direction(self, name: str) -> Tensor:
        """A random step of norm 1 in the parameter's atom."""
        atom, like = self.atoms[name], self.point[name]
        if atom is None or not atom.is_matrix:
            signs = torch.randint(0, 2, like.shape, generator=self.generator).to(self.dtype) * 2 - 1
            return signs
        return self.unit(atom)

    def unit(self, atom: Atom) -> Tensor:
        """A random value of norm 1, as ``ModularNorm.initialize_`` draws it."""
        w = torch.empty(atom.shape)
        atom.initialize_(w, 1.0, self.generator)
        return w.to(self.dtype)

    def buffer(self, node: fx.Node, value: Tensor | None) -> Tensor:
        """A buffer is not read: a square matrix that multiplies others is a rotation, anything else counts as 1."""
        like = _meta(node)
        if value is not None:
            return value.to(self.dtype) if value.is_floating_point() else value
        if not like.is_floating_point():
            return torch.ones(like.shape, dtype=like.dtype)
        multiplies = any(u.target in (aten.mm.default, aten.matmul.default) for u in node.users)
        if multiplies and like.dim() == 2 and min(like.shape) > 1:
            flat = torch.randn(like.shape, generator=self.generator, dtype=self.dtype)
            left, _, right = torch.linalg.svd(flat, full_matrices=False)
            return left @ right
        return torch.ones(like.shape, dtype=self.dtype)

    # --- the map ---

    def run(self, values: Mapping[str, Tensor]) -> Tensor:
        """The matrix, every op in the working precision."""
        env: dict[fx.Node, Any] = {}
        for node in self.body.graph.nodes:
            if node.op == "placeholder":
                env[node] = values[node.name]
            elif node.op == "output":
                return env[node.all_input_nodes[0]]
            elif node in self.straight:
                value = env[self.straight[node]]
                env[node] = (value, torch.ones_like(value)) if isinstance(node.meta["val"], tuple | list) else value
            else:
                env[node] = self.call(node, env)
        raise AssertionError("a graph has an output")

    def call(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        if node.target is aten.dropout.default:
            return env[node.args[0]]  # type: ignore[index]
        given = {n: env[n] for n in node.all_input_nodes}
        if node.target in GATHERS:
            given |= self.places(node, given)
        for source in node.all_input_nodes if node.target in CONTRACTIONS else ():
            if _is_vector_buffer(source, self.parts):
                if source not in self.vectors:
                    product = partial(self.product, node, given, source)
                    self.vectors[source] = _leading(product, given[source])
                given[source] = self.vectors[source]
        result = self.apply(node, given)
        if not isinstance(result, Tensor):
            return result
        if result.is_floating_point():
            return result.to(self.dtype)
        if result.dtype != torch.bool and any(isinstance(v, Tensor) and v.is_floating_point() for v in given.values()):
            return torch.where(result == 0, 1, result)  # an integer that is read off a weight is a sign: 1
        return result

    def places(self, node: fx.Node, given: Mapping[fx.Node, Any]) -> dict[fx.Node, Tensor]:
        """Random places in the stead of an index that is not read: each as often as others."""
        table: Any = node.args[0]
        index: Any = node.args[GATHERS[node.target]]
        if node.target is aten.index.Tensor:
            sizes = [(i, n) for i, n in zip(index, given[table].shape, strict=False) if i is not None]
        elif node.target is aten.take.default:
            sizes = [(index, given[table].numel())]
        else:
            axis: Any = 0 if node.target is aten.embedding.default else node.args[1]
            sizes = [(index, given[table].shape[axis])]
        out = {}
        for i, n in sizes:
            if i in self.unread and not _meta(i).dtype == torch.bool:
                order = torch.randperm(_meta(i).numel(), generator=torch.Generator().manual_seed(0))
                out[i] = (order % n).reshape(_meta(i).shape)
        return out

    def product(self, node: fx.Node, given: Mapping[fx.Node, Any], source: fx.Node, vector: Tensor) -> Any:
        """The op with another vector at one operand."""
        return self.apply(node, {**given, source: vector})

    def apply(self, node: fx.Node, given: Mapping[fx.Node, Any]) -> Any:
        """The op alone, on the CPU, without casts to lower precision."""
        mapped: Any = fx.map_arg((node.args, node.kwargs), lambda n: given[n])
        args, kwargs = mapped[0], dict(mapped[1])
        if isinstance(kwargs.get("dtype"), torch.dtype) and kwargs["dtype"].is_floating_point:
            kwargs["dtype"] = self.dtype
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        function: Callable[..., Any] = node.target  # type: ignore[assignment]
        return function(*args, **kwargs)


def _unread(graph: fx.Graph, parts: Mapping[str, Part], held: Mapping[str, Tensor | None]) -> set[fx.Node]:
    """What depends on a buffer, whose value the graph does not hold."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        buffer = node.op == "placeholder" and node.name not in parts and held.get(node.name) is None
        if buffer or found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def _typical_gain(matrix: Tensor, layer: Atom) -> float:
    """Root mean square of ``W x`` for inputs x of independent unit entries; of rows that are looked up, their own."""
    while isinstance(layer, Reshaped):
        layer = layer.inner
    if not isinstance(layer, Linear | Conv | PatchConv | Experts | Gates):
        return float(matrix.square().mean().sqrt())
    pieces, out, _ = layer.piece_shape
    rows = pieces * out / (layer.met if isinstance(layer, Conv) else 1)
    return math.sqrt(float(matrix.square().sum()) / rows)


def _are_row_norms(matrix: Tensor, view: Tensor) -> bool:
    """Whether the rows that one entry of a gain multiplies have length 1: the gain is their length."""
    along = tuple(d for d, s in enumerate(view.stride()) if s == 0)
    if not along:
        return False
    lengths = torch.linalg.vector_norm(matrix, dim=along)
    return bool((lengths - 1).abs().max() < 1e-6)


def _is_vector_buffer(node: fx.Node, parts: Mapping[str, Part]) -> bool:
    """Whether the value is a vector that the model stores: what a power iteration keeps from step to step."""
    if sum(n > 1 for n in _meta(node).shape) > 1:
        return False
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "placeholder" and node.name not in parts


def _leading(product: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The unit vector with the largest product: a singular vector of a matrix; a vector's own direction."""
    x = torch.ones_like(like)
    for _ in range(ITERATIONS):
        value, back, *_ = torch.func.vjp(product, x)
        (x,) = back(value)
        x = x / torch.linalg.vector_norm(x).clamp(min=TINY)
    return x
