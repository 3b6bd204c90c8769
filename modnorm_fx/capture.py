"""Capture: an existing model becomes one functional, executable ATen graph.

The graph is traced from a copy, on inputs without values where possible, in three ways, in this order:

1. `export(eval)`: `torch.export.export(strict=False)` of a fake copy; needs no weights, so a 70B model on `meta` works;
2. `export(train)`: the same in training mode, when (1) fails or loses parameters (caches that evaluation keeps);
3. `make_fx(eval)`: the model runs on values, for code that branches on data or makes sizes from it.

Such a graph still writes in place and wraps parts in sub-graphs. Tracing the graph once more makes it functional. That
gives what `run_decompositions({})` gives (`linear`, `layer_norm`, attention stay whole) in less than half the time.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ._copies import (
    LIBRARIES,
    MAX_REAL_BYTES,
    check_runs,
    fake_copy,
    fake_inputs,
    real_bytes,
    real_copy,
    real_inputs,
    short,
    undisturbed,
)
from .errors import CaptureError, ModelMismatchError, ModnormError, WeightError
from .inputs import example_inputs, input_names, without_cache

__all__ = ["Captured", "Input", "capture", "where"]

Kind = Literal["parameter", "buffer", "constant", "user"]
Key = tuple[Kind, str]
Trace = tuple[fx.GraphModule, list[Key], dict[str, Tensor]]

#: the order of placeholders
KINDS: tuple[Kind, ...] = ("parameter", "buffer", "constant", "user")
#: higher-order operations that only run a sub-graph under some setting; the sub-graph takes their place (so autocast
#: within a model is not kept)
WRAPPERS = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast", "tag_activation_checkpoint"})
#: operations that compute nothing: checks that tracing leaves behind
CHECKS = (
    "_assert_",
    "_functional_assert_",
    "sym_constrain_range",
    "_make_dep_token",
    "_functional_sym_constrain_range",
)


@dataclass(frozen=True)
class Input:
    """One placeholder of a captured graph.

    Attributes:
        node: the placeholder.
        kind: what is passed in its place.
        name: qualified name of the parameter or buffer (canonical: the first of its names), key of the constant, or the
            argument of `forward` with the path inside it (`input_ids`, `images[0]`).
    """

    node: fx.Node
    kind: Kind
    name: str


@dataclass(frozen=True, eq=False)
class Captured:
    """A model as a graph.

    Attributes:
        graph_module: functional ATen; its placeholders are parameters, buffers, constants, user inputs, in this order;
            it returns a flat tuple.
        inputs: one row per placeholder, in order. Every distinct parameter has exactly one, even if it is unused.
        shapes: canonical name -> shape, for every parameter of the model.
        aliases: other name -> canonical name, for tied parameters.
        modules: module path -> qualified name of its class.
        route: how the graph was captured, e.g. `export(eval)`.
        unused: canonical names of parameters from which no floating-point path leads to an output.
        constants: tensors that the model holds or makes and that are neither parameters nor buffers.
    """

    graph_module: fx.GraphModule
    inputs: tuple[Input, ...]
    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    modules: dict[str, str]
    route: str
    unused: tuple[str, ...]
    constants: dict[str, Tensor]

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Runs the graph on the CPU, without gradients, with the parameters and buffers of `model`.

        Returns the outputs as `torch.utils._pytree.tree_leaves(model(*args, **kwargs))` orders them.
        """
        values: dict[str, dict[str, Any]] = {
            "parameter": dict(model.named_parameters()),
            "buffer": dict(model.named_buffers()),
            "constant": self.constants,
            "user": dict(zip(input_names(model, args, kwargs), pytree.tree_leaves((args, kwargs)), strict=True)),
        }
        for entry in self.inputs:
            if entry.name not in values[entry.kind]:
                raise ModelMismatchError(
                    f"The graph needs the {entry.kind} {entry.name!r}, which is not there.",
                    do="run it with the model that was captured and the same arguments",
                )
        with torch.no_grad():
            return self.graph_module(*(values[entry.kind][entry.name] for entry in self.inputs))


def capture(model: nn.Module, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None) -> Captured:
    """Traces `model` to a graph; the model itself is neither run nor changed.

    Hooks of the model are part of it: they run, on the copy. What they write outside of the model are traced tensors.

    Args:
        model: any module; its weights may be real, on `meta`, or fake.
        args: positional arguments of `model`, or the only one; tensors may be real, on `meta`, or fake.
        kwargs: keyword arguments. Without `args` and `kwargs`, inputs are made up for models whose library says what
            they eat (see `modnorm_fx.inputs`).

    Raises:
        CaptureError: the model does not run on the inputs, or no route leads to a graph (each route's reason is given).
        WeightError: there is no parameter, or none reaches an output.
    """
    if next(model.parameters(), None) is None:
        raise WeightError(f"{type(model).__name__} has no parameters, so there is nothing to normalise.")
    if args is None and kwargs is None:
        args, kwargs = example_inputs(model)
    args = () if args is None else tuple(args) if isinstance(args, list | tuple) else (args,)
    with undisturbed(model):
        return _capture(model, args, without_cache(model, dict(kwargs or {})))


def where(node: fx.Node) -> str | None:
    """Where in the user's model a node comes from: `transformer.h.0.attn (modeling_gpt2.py:210: attn_output = ...)`.

    The line is the innermost one in a file that defines a module around the node, not counting torch's own files.
    """
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    files = {_defining_file(entry[1]) for entry in stack} - {None}
    frames = [f for f in _frames(node.meta.get("stack_trace") or "") if not f[0].startswith(LIBRARIES)]
    chosen = [f for f in frames if f[0] in files] or frames
    line = "{}:{}: {}".format(Path(chosen[-1][0]).name, *chosen[-1][1:]) if chosen else None
    return f"{path} ({line})" if path and line else path or line


# --- choosing a route -------------------------------------------------------------------------------------------------


class _RouteClosed(Exception):
    """This route gives no faithful graph; another may."""


def _capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """The first graph that every parameter is part of, else the one with most."""
    reasons: list[str] = []
    last: Exception | None = None
    best: Captured | None = None
    for route, trace in ROUTES.items():
        if best is not None and (not best.unused or trace is _make_fx):
            break
        try:
            found = _captured(model, route, *trace(model, args, kwargs))
        except ModnormError:
            raise
        except Exception as error:
            if best is None and not reasons:
                check_runs(model, args, kwargs)
            reasons.append(f"{route}: {error if isinstance(error, _RouteClosed) else short(error)}")
            last = error
        else:
            if best is None or set(found.unused) < set(best.unused):
                best = found
    name = type(model).__name__
    if best is None:
        raise CaptureError(
            f"{name} could not be traced to a graph.",
            why="every route failed" + "".join(f"\n    {reason}" for reason in reasons),
            do="convert the part of the model that can be traced, or report the model's name and these lines",
        ) from last
    if not any(_is_float(node) for node in _output(best.graph_module.graph).all_input_nodes):
        raise CaptureError(
            f"{name} returns no floating-point tensor on these inputs.",
            why="a norm measures how far the outputs of a model can move, and integers do not move",
            do="pass arguments with which the model returns logits, features or a loss",
        )
    if len(best.unused) == len(best.shapes):
        raise WeightError(
            f"No parameter of {name} reaches its outputs on these inputs.",
            why="the outputs are computed from inputs and constants alone",
            do="pass arguments that use the parameters",
        )
    return best


# --- routes: each gives the traced graph, what its placeholders are, and constants ------------------------------------


@dataclass(frozen=True)
class _Literal:
    """An argument that is not a tensor: the graph is specialised to it."""

    value: Any


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool) -> Trace:
    copy, mode = fake_copy(model, training=training)
    program = torch.export.export(copy, *fake_inputs((args, kwargs), mode), strict=False)
    exported, signature = program.graph_module, program.graph_signature
    constants = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
    kinds: dict[InputKind, Kind] = {
        InputKind.PARAMETER: "parameter",
        InputKind.BUFFER: "buffer",
        InputKind.CONSTANT_TENSOR: "constant",
    }
    canonical: dict[str, dict[str, str]] = {
        "parameter": _canonical(model.named_parameters(remove_duplicate=False)),
        "buffer": _canonical(model.named_buffers(remove_duplicate=False)),
        "constant": {},
    }
    leaves = zip(input_names(model, args, kwargs), pytree.tree_leaves((args, kwargs)), strict=True)
    tensors: dict[Key, Tensor] = {("parameter", name): value for name, value in copy.named_parameters()}
    feed: list[Key | _Literal] = []  # what each placeholder of the exported graph is given
    for node, spec in zip(exported.graph.find_nodes(op="placeholder"), signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            name, value = next(leaves)
            feed.append(("user", name) if isinstance(value, Tensor) else _Literal(value))
        elif spec.kind in kinds and spec.target is not None:
            kind = kinds[spec.kind]
            feed.append((kind, canonical[kind].get(spec.target, spec.target)))
        else:
            raise _RouteClosed(f"the graph has an input of the kind {spec.kind.name}")
        if not isinstance(feed[-1], _Literal):
            tensors[feed[-1]] = node.meta["val"]
    outputs = [index for index, spec in enumerate(signature.output_specs) if spec.kind is OutputKind.USER_OUTPUT]
    with mode:
        return *_functional(exported, feed, tensors, outputs), constants


def _make_fx(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    if (size := real_bytes(model)) > MAX_REAL_BYTES:
        raise _RouteClosed(
            f"a copy with values takes {size / 2**30:.0f} GiB, and {MAX_REAL_BYTES / 2**30:.0f} GiB are allowed"
        )
    copy = real_copy(model)
    names = input_names(model, args, kwargs)
    leaves, spec = pytree.tree_flatten(real_inputs((args, kwargs)))
    tensors: dict[Key, Tensor] = {("parameter", name): value.detach() for name, value in copy.named_parameters()}
    tensors |= {("buffer", name): value for name, value in copy.named_buffers()}
    tensors |= {("user", name): value for name, value in zip(names, leaves, strict=True) if isinstance(value, Tensor)}

    def run(*values: Tensor) -> list[Any]:
        given = dict(zip(tensors, values, strict=True))
        state = {name: value for (kind, name), value in given.items() if kind != "user"}
        inputs = [given.get(("user", name), leaf) for name, leaf in zip(names, leaves, strict=True)]
        return pytree.tree_leaves(
            torch.func.functional_call(copy, state, *pytree.tree_unflatten(inputs, spec), tie_weights=True)
        )

    run._orig_mod = copy  # type: ignore[attr-defined]  # where make_fx looks for modules, to record their paths
    trace = make_fx(
        run, pre_dispatch=True, record_module_stack=True, record_stack_traces=True, _error_on_data_dependent_ops=False
    )
    traced = trace(*tensors.values())
    return *_functional(traced, list(tensors), tensors), {}


ROUTES: dict[str, Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Trace]] = {
    "export(eval)": partial(_export, training=False),
    "export(train)": partial(_export, training=True),
    "make_fx(eval)": _make_fx,
}


class _Replay(fx.Interpreter):
    """Runs a graph with the sub-graphs of wrappers in line."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, HigherOrderOperator) and target.name() in WRAPPERS:
            position = next(index for index, value in enumerate(args) if isinstance(value, fx.GraphModule))
            return _Replay(args[position]).run(*args[position + 1 :])
        return super().call_function(target, args, kwargs)


def _functional(
    traced: fx.GraphModule, feed: list[Key | _Literal], tensors: dict[Key, Tensor], outputs: list[int] | None = None
) -> tuple[fx.GraphModule, list[Key]]:
    """Traces a graph once more, with every write made functional; a write into an input is not seen outside.

    Args:
        feed: what each placeholder of `traced` is given.
        tensors: example values of the inputs of the new graph.
        outputs: the outputs to keep, all of them if None.
    """
    _without_checks(traced.graph)
    keys = sorted(tensors, key=lambda key: KINDS.index(key[0]))

    def run(*values: Tensor) -> tuple[Any, ...]:
        given = dict(zip(keys, values, strict=True))
        results = _Replay(traced).run(*(entry.value if isinstance(entry, _Literal) else given[entry] for entry in feed))
        return tuple(results if outputs is None else (results[index] for index in outputs))

    functional = dispatch_functionalize(run, FunctionalTensorMode(pre_dispatch=True, export=True))
    with enable_python_dispatcher(), fx_traceback.preserve_node_meta():
        graph_module = make_fx(functional, pre_dispatch=True, _error_on_data_dependent_ops=False)(
            *(tensors[key] for key in keys)
        )
    return graph_module, keys


# --- from a traced graph to a Captured --------------------------------------------------------------------------------


def _captured(
    model: nn.Module, route: str, module: fx.GraphModule, keys: list[Key], constants: dict[str, Tensor]
) -> Captured:
    graph = module.graph
    entries = dict(zip(graph.find_nodes(op="placeholder"), keys, strict=True))
    constants = constants | _lift_constants(module, entries)
    _check_constants(model, constants)
    _tidy(graph)
    for node, (kind, _) in list(entries.items()):
        if kind in ("buffer", "constant") and not node.users:
            graph.erase_node(node)
            del entries[node]
    inputs = tuple(Input(node, *entries[node]) for node in graph.find_nodes(op="placeholder"))
    for entry in inputs:
        _rename(entry.node, f"{entry.kind[0]}_{entry.name}")
    graph.lint()
    module.recompile()
    reached = _reaching(_output(graph))
    canonical = _canonical(model.named_parameters(remove_duplicate=False))
    return Captured(
        graph_module=module,
        inputs=inputs,
        shapes={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        aliases={alias: name for alias, name in canonical.items() if alias != name},
        modules={path: _qualified_name(type(m)) for path, m in model.named_modules(remove_duplicate=False)},
        route=route,
        unused=tuple(entry.name for entry in inputs if entry.kind == "parameter" and entry.node not in reached),
        constants={entry.name: _known(constants[entry.name]) for entry in inputs if entry.kind == "constant"},
    )


def _lift_constants(module: fx.GraphModule, entries: dict[fx.Node, Key]) -> dict[str, Tensor]:
    """Makes placeholders, before those of the user, of tensors that the graph holds; returns them by name."""
    graph = module.graph
    following = next((node for node, key in entries.items() if key[0] == "user"), None)
    if following is None:
        following = next(node for node in graph.nodes if node not in entries)
    lifted: dict[str, fx.Node] = {}
    constants = {}
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(module, node.target, None)
        if not isinstance(value, Tensor):
            continue
        name = f"held{node.target}" if node.target.startswith("_") else node.target
        if name not in lifted:
            with graph.inserting_before(following):
                lifted[name] = graph.placeholder(name)
            lifted[name].meta = dict(node.meta)
            entries[lifted[name]] = ("constant", name)
            constants[name] = value
        node.replace_all_uses_with(lifted[name])
        graph.erase_node(node)
    return constants


def _known(constant: Tensor) -> Tensor:
    """Without its values, if they were made up."""
    return constant.to("meta") if hasattr(constant, "made_up") else constant


def _check_constants(model: nn.Module, constants: dict[str, Tensor]) -> None:
    own = {
        parameter.data_ptr(): name
        for name, parameter in model.named_parameters()
        if not parameter.is_meta and not isinstance(parameter, FakeTensor)
    }
    for value in constants.values():
        if value.numel() and value.data_ptr() in own:
            raise _RouteClosed(f"{own[value.data_ptr()]} is used through a closure that refers to the original model")


def _without_checks(graph: fx.Graph) -> None:
    """Removes what only checks something, and what only such checks need."""
    for node in reversed(graph.nodes):
        if isinstance(node.target, OpOverload) and node.target.__name__.startswith(CHECKS) and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _tidy(graph: fx.Graph) -> None:
    """Removes dropout that is off, and whatever no output needs (nothing writes in place, so all of it is dead)."""
    _without_checks(graph)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default):
        if not (node.args[1] and node.args[2]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def _rename(node: fx.Node, name: str) -> None:
    node._rename("".join(c if c.isalnum() else "_" for c in name))
    node.target = node.name


def _reaching(output: fx.Node) -> set[fx.Node]:
    """Nodes from which a path of floating-point values leads to a floating-point output."""
    reached: set[fx.Node] = set()
    todo = [node for node in output.all_input_nodes if _is_float(node)]
    while todo:
        node = todo.pop()
        if node not in reached:
            reached.add(node)
            todo.extend(source for source in node.all_input_nodes if _is_float(source))
    return reached


def _is_float(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()) for leaf in leaves)


def _output(graph: fx.Graph) -> fx.Node:
    return next(iter(graph.find_nodes(op="output")))


# --- names and lines --------------------------------------------------------------------------------------------------


def _canonical(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Every name -> the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _defining_file(cls: Any) -> str | None:
    """The file of a class, given as such or by its qualified name."""
    name = cls.__module__ if isinstance(cls, type) else str(cls)
    while name and name not in sys.modules:
        name = name.rpartition(".")[0]
    return getattr(sys.modules.get(name), "__file__", None)


def _frames(stack_trace: str) -> list[tuple[str, int, str]]:
    """(file, line number, code) of every frame of a formatted stack trace, outermost first."""
    found = re.findall(r'File "(.+?)", line (\d+), in .*\n\s*(.*)', stack_trace)
    return [(file, int(number), code.strip()) for file, number, code in found]
