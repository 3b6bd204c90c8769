"""Pass (rewrite): a matrix that is computed from parameters before it meets data becomes one call.

Weight normalisation, spectral normalisation, standardised convolutions, ``w / √fan_in``, masks, ``W + s·B @ A``: the
matrix that a layer applies is not the one stored. Nor is it where ``expand`` puts an entry at several places (one
filter for all channels), or an index does (hashed and Toeplitz matrices, codebooks). The piece between the parameters
and the layer is cut out as a region ``computed_weight``, whose scale is the norm of the matrix in units of the
layer's atom (``measure_matrix``). What each parameter is follows from how its entries arrive: entry by entry (the
*carrier*, which gets the atom of the layer), row by row (a gain), or as a factor of a product (a layer of its own).

Runs first: a weight that is standardised is not a norm layer. Assumes a functional graph. Promises the same outputs; a
matrix that depends on data, and one that no parameter carries, is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from modnorm_fx import weight_atoms
from modnorm_fx.atoms import Atom, Bias, Embedding, Scalar, Table
from modnorm_fx.capture import Input
from modnorm_fx.conventions import Convention
from modnorm_fx.errors import WeightError
from modnorm_fx.regions import Region, extract
from modnorm_fx.rules import AtomFunction, Operand, RuleTable, arguments, op_key, operands
from modnorm_fx.slices import take_slice
from modnorm_fx.weight_atoms import Site

from .canonicalize import aten, cone, is_call, shape
from .flow import COPIES, is_float
from .layout import GATHERS, PLACEWISE, TRANSPOSES, Arrangement, follow, replay
from .measure_matrix import Part, measure_matrix
from .recognize_straight_through import passed_on
from .type_atoms import feeds_softmax

#: roles in which an operand is the matrix of a layer, whatever it was computed from
LAYERS = frozenset(
    {
        weight_atoms.linear,
        weight_atoms.linear_transposed,
        weight_atoms.conv,
        weight_atoms.embedding,
        weight_atoms.gates,
    }
)
#: roles in which it is one if a parameter arrives entry by entry: products also join signals
PRODUCTS = frozenset({weight_atoms.matmul_left, weight_atoms.matmul_right})
#: roles whose operand is stored [in, out]
TRANSPOSED = frozenset({weight_atoms.linear_transposed, weight_atoms.matmul_right})
MATMULS = frozenset({aten.mm.default, aten.matmul.default, aten.bmm.default})


@dataclass(frozen=True)
class _Layer:
    """The op that uses a computed matrix: the node, its arguments by name, and the role of the matrix there."""

    node: fx.Node
    args: Mapping[str, Any]
    role: AtomFunction

    def atom(self, site: Site) -> Atom:
        """The atom of a weight that arrives at this layer as ``site.view`` says."""
        return self.role(replace(site, node=self.node, args=self.args))

    def gathered(self, site: Site) -> Atom:
        """The atom of a weight whose entries are taken by an index: rows of a codebook, a kernel whose taps go to
        several places, or one row of numbers."""
        if self.role is weight_atoms.conv and len(site.shape) > 2:
            return self.atom(site)
        if len(site.shape) == 2:
            return Embedding(site.shape)
        return Table(site.shape, feature_axes=tuple(range(len(site.shape))))

    def shared(self, site: Site) -> Atom:
        """The atom of a weight whose entries go to several places each: that of the matrix without repetitions."""
        view = site.view
        sizes = [1 if s == 0 else n for n, s in zip(view.shape, view.stride(), strict=True)]
        once = view.as_strided(sizes, [s or 1 for s in view.stride()])
        one_filter = self.role is weight_atoms.conv and sizes[0] == 1
        args = {**self.args, "groups": 1} if one_filter else self.args
        return self.role(replace(site, node=self.node, args=args, view=once))


def computed_weights(
    module: fx.GraphModule,
    inputs: tuple[Input, ...],
    held: Mapping[fx.Node, torch.Tensor],
    *,
    rules: RuleTable,
    convention: Convention,
) -> int:
    """Rewrites ``module`` in place and returns how many matrices were cut out.

    Args:
        held: inputs whose values the graph itself holds (``measure_constants.made_of_numbers``).
        convention: says what norm a matrix is declared to have.
    """
    learned = _learned(module, inputs)
    views = _views(module, inputs, rules)
    known: dict[Any, Any] = {}
    count = 0
    for node in reversed(list(module.graph.nodes)):
        if node.op == "call_function" and not getattr(node, "_erased", False):
            key, args = arguments(node, module)
            roles = rules[key].weights if key in rules else {}
            for operand, source in list(operands(args)):
                role = roles.get(operand[0])
                computed = source not in views or _repeats(views[source], role)
                if learned.get(source) and computed and role in LAYERS | PRODUCTS:
                    layer = _Layer(node, args, roles[operand[0]])
                    count += _cut(module, layer, operand, source, views, held, rules, convention, known)
    return count


def _learned(module: fx.GraphModule, inputs: tuple[Input, ...]) -> dict[fx.Node, bool | None]:
    """Of every node whether it depends on parameters (True), on neither them nor data (False), or on data (None)."""
    kinds = {"parameter": True, "user": None}
    out: dict[fx.Node, bool | None] = {i.node: kinds.get(i.kind, False) for i in inputs}
    for node in module.graph.nodes:
        if node not in out:
            found = [out[s] for s in node.all_input_nodes]
            out[node] = None if None in found else any(found)
    return out


def _views(module: fx.GraphModule, inputs: tuple[Input, ...], rules: RuleTable) -> dict[fx.Node, Any]:
    """What is one parameter, seen through views, copies and lookups of rows: no computed matrix."""
    rows: set[fx.Node] = set()
    views: dict[fx.Node, Any] = {
        i.node: torch.empty(shape(i.node), device="meta") for i in inputs if i.kind == "parameter"
    }
    for node in module.graph.nodes:
        source = node.args[0] if node.args else None
        if node.op == "call_function" and isinstance(source, fx.Node) and source in views:
            found = replay(node, views[source], rules)
            if is_call(node, aten.index.Tensor):
                found = torch.empty(shape(node), device="meta") if _takes_rows(node) else None
                rows |= {node} if found is not None else set()
            elif source in rows and found is not None:
                if node.target in TRANSPOSES or node.target in COPIES or shape(node)[-1:] == shape(source)[-1:]:
                    rows.add(node)
                else:  # rows in pieces are rows no more
                    found = None
                    while source in rows:
                        views.pop(source, None)
                        source = source.all_input_nodes[0]
            if found is not None:
                views[node] = found
    return views


def _takes_rows(node: fx.Node) -> bool:
    """Whether what is taken by an index from a matrix, a stack of them or a table is made of its rows (or, one for
    each, its columns): not single entries, and not an axis of a kernel in another arrangement."""
    args: Any = node.args
    table, indices = args[:2]
    axes = [a for a, i in enumerate(indices) if i is not None]
    return len(shape(table)) > 1 and len(axes) == 1 and (axes == [0] or len(shape(node)) == len(shape(table)))


def _repeats(view: Any, role: AtomFunction | None) -> bool:
    """Whether a matrix has the same entry at several places; along the axes of a batch that is what products do."""
    if not isinstance(view, torch.Tensor) or view.dim() < 2:
        return False
    axes = range(view.dim()) if role in LAYERS else (-2, -1)
    return any(view.shape[a] > 1 and view.stride(a) == 0 for a in axes)


def _gathers(nodes: Sequence[fx.Node], start: fx.Node, rules: RuleTable) -> bool:
    """Whether entries of ``start``, in other places or several, are all that is computed from it: an index takes them,
    and nothing on the way mixes them."""
    after, taken = {start}, False
    for node in nodes:
        if node.op != "call_function" or not after.intersection(node.all_input_nodes):
            continue
        row = rules.get(op_key(node.target))
        taken |= node.target in GATHERS
        if not (node.target in GATHERS or node.target in COPIES or node.target in PLACEWISE or (row and row.view)):
            return False
        after.add(node)
    return taken


def _cut(
    module: fx.GraphModule,
    layer: _Layer,
    operand: Operand,
    source: fx.Node,
    views: Mapping[fx.Node, Any],
    held: Mapping[fx.Node, torch.Tensor],
    rules: RuleTable,
    convention: Convention,
    known: dict[Any, Any],
) -> int:
    inside, outside = cone(source, lambda n: n.op == "placeholder" or (n in views and _is_part(n)))
    sources = [n for n in outside if n in views]
    carried = [follow(inside, n, Arrangement.of(shape(n)), rules).get(source) for n in sources]
    whole = any(c is not None and c.is_whole for c in carried)
    shared = not whole and len(carried) == 1 and carried[0] is not None and _repeats(carried[0].view, layer.role)
    gathered = not whole and len(sources) == 1 and _gathers(inside, sources[0], rules)
    if layer.role in PRODUCTS and gathered:  # rows looked up (of positions) are features
        gathered = len(shape(sources[0])) < 2 or shape(sources[0])[-1] != shape(source)[-1]
    if layer.role in PRODUCTS:
        if any(feeds_softmax(u) for u in layer.node.users) or not (whole or shared or gathered):
            return 0
    elif not (whole or shared or gathered) and not any(
        shape(n) == shape(source) or _factors(inside, n, rules) for n in sources
    ):
        return 0
    with module.graph.inserting_before(layer.node):  # each layer has a matrix of its own, in units of its own atom
        output = module.graph.call_function(aten.alias.default, (source,))
    output.meta = dict(source.meta)
    _replace(layer.node, operand, source, output)
    named = {f"w{i}": n for i, n in enumerate(sources)}
    values = [held.get(n) for n in outside if n not in views]
    call = extract(module, "computed_weight", [*inside, output], output, named)
    region: Any = module.get_submodule(str(call.target))
    roles = _roles(region, layer, list(named), shared, rules)
    extras = dict(zip(region.inputs[len(named) :], values, strict=True))
    atom = layer.atom(_site(layer.node, shape(source)))
    found = measure_matrix(region, roles, atom, extras, convention.declared(atom), known)
    region.facts.update(found)
    region.facts["weights"] = {name: part.role if found else _unmeasured for name, part in roles.items()}
    return 1


def _is_part(node: fx.Node) -> bool:
    """Whether a view of a parameter is a part of what it is taken from: a slice of a parameter is a weight of its
    own."""
    if is_call(node, aten.index.Tensor):
        return True
    source: Any = node.args[0]
    value = source.meta["val"]
    if isinstance(value, list | tuple):
        return sum(v.numel() for v in value) > node.meta["val"].numel()
    return not isinstance(node.meta["val"], list | tuple) and value.numel() > node.meta["val"].numel()


def _replace(node: fx.Node, operand: Operand, old: fx.Node, new: fx.Node) -> None:
    """Puts ``new`` at one operand of ``node``; the same value elsewhere among its arguments stays."""
    name, index = operand
    schema: Any = node.target
    names = [a.name for a in schema._schema.arguments]
    place = names.index(name)
    value: Any = node.args[place] if place < len(node.args) else node.kwargs[name]
    put: Any = new if index is None else [new if i == index else v for i, v in enumerate(value)]
    if place < len(node.args):
        node.update_arg(place, put)
    else:
        node.update_kwarg(name, put)


def _site(node: fx.Node, size: tuple[int, ...]) -> Site:
    """A weight that is stored as it is used."""
    return Site(node, {}, size, torch.empty(size, device="meta"), (), frozenset(), logits=False)


# --- what each parameter is -----------------------------------------------------------------------------------------


def _roles(region: Region, layer: _Layer, names: Sequence[str], shared: bool, rules: RuleTable) -> dict[str, Part]:
    """The part that each parameter has in the matrix; ``shared``: there is one, and it has fewer entries."""
    nodes = list(region.body.graph.nodes)
    inputs = {n.name: n for n in nodes if n.op == "placeholder"}
    (output,) = next(n for n in nodes if n.op == "output").all_input_nodes
    return {name: _part(name, nodes, inputs[name], output, layer, shared, rules) for name in names}


def _part(
    name: str,
    nodes: Sequence[fx.Node],
    start: fx.Node,
    output: fx.Node,
    layer: _Layer,
    shared: bool,
    rules: RuleTable,
) -> Part:
    def arrive(site: Site) -> dict[fx.Node, Arrangement]:
        return follow(nodes, start, Arrangement(site.view), rules)

    def carrier(site: Site) -> Atom:
        make = layer.shared if shared else layer.atom
        return arrive(site)[output].wrap(site.shape, lambda size, v: make(replace(site, shape=size, view=v)))

    places = follow(nodes, start, Arrangement.of(shape(start)), rules)
    if _becomes_integer(start, nodes):  # its entries say more than their size
        return Part(name, lambda site: Scalar(site.shape), "number")
    found = places.get(output)
    if found is not None and (found.is_whole or shared):
        return Part(name, carrier, "matrix")
    if found is None and _gathers(nodes, start, rules):
        return Part(name, lambda site: layer.gathered(site), "matrix")
    if found is not None and found.added:
        return Part(name, lambda site: Bias(site.shape), "shift", found.view)
    if found is not None:
        return Part(name, weight_atoms.multiplied, "gain", found.view)
    factors = _factors(nodes, start, rules)
    if factors:
        product, right = factors[0]
        role = _factor_role(nodes, product, right, output, layer, rules)

        def factor(site: Site) -> Atom:
            where: Any = product.args[right]
            return arrive(site)[where].wrap(site.shape, lambda size, v: role(replace(site, shape=size, view=v)))

        return Part(name, factor, "factor")
    if shape(start) == shape(output):
        return Part(name, lambda site: layer.atom(site), "matrix")
    return Part(name, _unknown, "number")


def _unknown(site: Site) -> Atom:
    raise WeightError(
        "its entries are mixed on the way into a computed matrix",
        why="neither a matrix nor a row factor of the layer is stored there",
        do="pass unknown='sample' to take it for a number",
    )


def _unmeasured(site: Site) -> Atom:
    raise WeightError(
        "the matrix that is computed from it cannot be evaluated at random values of its parameters",
        why="an operation on the way fails, or gives zero or infinity",
        do="pass unknown='sample' to estimate its effect",
    )


def _becomes_integer(start: fx.Node, nodes: Sequence[fx.Node]) -> bool:
    """Whether entries are cast to integers (the signs that a Householder parametrisation keeps on a diagonal), other
    than on the way to what a straight-through estimator rounds to."""
    straight = passed_on(start.graph)
    todo: list[fx.Node] = list(nodes[-1:])
    counted: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in counted:
            counted.add(node)
            todo += [straight[node]] if node in straight else node.all_input_nodes
    after = {start}
    for node in nodes:
        if node in counted and after.intersection(node.all_input_nodes):
            after.add(node)
            if is_call(node, aten._to_copy.default, aten.to.dtype) and not is_float(node):
                return True
    return False


def _factors(nodes: Sequence[fx.Node], start: fx.Node, rules: RuleTable) -> list[tuple[fx.Node, int]]:
    """Products inside a computed matrix whose operand the parameter is, entry by entry; and which operand (0 or 1)."""
    places = follow(nodes, start, Arrangement.of(shape(start)), rules)
    return [
        (n, i)
        for n in nodes
        if n.target in MATMULS
        for i, a in enumerate(n.args[:2])
        if isinstance(a, fx.Node) and a in places and places[a].is_whole
    ]


def _factor_role(
    nodes: Sequence[fx.Node], product: fx.Node, right: int, output: fx.Node, layer: _Layer, rules: RuleTable
) -> AtomFunction:
    """What a factor of the matrix is: ``W = B A`` is two layers in a row, both stored as W is, or both the other way
    where their product is transposed before it is used."""
    arrived = follow(nodes, product, Arrangement.of(shape(product)), rules).get(output)
    flipped = arrived is not None and arrived.view.dim() == 2 and arrived.view.stride(-1) != 1
    if layer.role is weight_atoms.embedding:  # rows looked up, then a layer
        rows = right if flipped else 1 - right
        if rows:
            return lambda site: weight_atoms.embedding(replace(site, view=site.view.mT) if flipped else site)
    backwards = (layer.role in TRANSPOSED or layer.role is weight_atoms.embedding) != flipped
    return weight_atoms.matmul_right if backwards else weight_atoms.matmul_left


# --- joined vectors -------------------------------------------------------------------------------------------------


def parts_of_joined(module: fx.GraphModule, *, rules: RuleTable) -> int:
    """Rewrites, in place, what is cut out of joined vectors and lies in one of them as that vector.

    The bias of a fused projection is often made of a parameter for q, zeros for k and a parameter for v; the projection
    has become one layer per part. Returns how many pieces it was.
    """
    count = 0
    for node in list(module.graph.nodes):
        if is_call(node, aten.cat.default) and len(shape(node)) == 1:
            for user, view in list(_pieces(node, torch.empty(shape(node), device="meta"), rules)):
                count += _pick(module, node, user, view)
    if count:
        module.graph.eliminate_dead_code()
    return count


def _pieces(node: fx.Node, view: torch.Tensor, rules: RuleTable) -> Iterator[tuple[fx.Node, torch.Tensor]]:
    """Runs of entries of a vector that its users cut out."""
    for user in node.users:
        found: Any = user.target(view, *user.args[1:]) if user.target is take_slice else replay(user, view, rules)
        for pick in user.users if isinstance(found, list | tuple) else ():
            yield pick, found[pick.args[1]]
        if isinstance(found, torch.Tensor):
            yield user, found


def _pick(module: fx.GraphModule, joined: fx.Node, piece: fx.Node, view: torch.Tensor) -> int:
    vectors: Any = joined.args[0]
    start = 0
    for vector in vectors:
        size = shape(vector)[0]
        first = view.storage_offset() - start
        if view.dim() == 1 and view.stride() == (1,) and first >= 0 and first + len(view) <= size:
            if len(view) == size:
                piece.replace_all_uses_with(vector)
            else:
                with module.graph.inserting_after(piece):
                    part = module.graph.call_function(take_slice, (vector, 0, first, first + len(view), size))
                part.meta = dict(piece.meta)
                piece.replace_all_uses_with(part)
            return 1
        start += size
    return 0
