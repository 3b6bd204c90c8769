"""Capture: an existing model becomes one functional, executable ATen graph.

The graph is traced from a copy, on inputs without values where possible, by the first of the routes of `_trace` that
gives a graph with every parameter in it. It returns the outputs that count: those that the user names, or else every
floating-point output that depends on a parameter.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ._copies import dry_run, forget_fake_tensors, seed, undisturbed
from ._failures import LIBRARIES, advice, check_runs, part, reason
from ._outputs import matching
from ._trace import ROUTES, Kind, RouteClosed, Trace, canonical_names, without_checks
from .errors import CaptureError, ModelMismatchError, ModnormError, WeightError
from .inputs import example_inputs, input_names, without_cache

__all__ = ["Captured", "Input", "capture", "where"]

#: routes that are for what cannot be exported, and the export that each is taken instead of
WITH_VALUES = {
    "make_fx(eval)": "export(eval)",
    "make_fx(train)": "export(train)",
    "make_fx(below autograd)": "export(eval)",
}
#: the route that finds parameters which only training uses
IN_TRAINING = "export(train)"


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
            it returns the flat tuple of the outputs that count.
        inputs: one row per placeholder, in order. Every distinct parameter has exactly one, even if it is unused.
        shapes: canonical name -> shape, for every parameter of the model.
        aliases: other name -> canonical name, for tied parameters.
        modules: module path -> qualified name of its class.
        route: how the graph was captured, e.g. `export(eval)`.
        unused: canonical names of parameters from which no floating-point path leads to an output that counts.
        constants: tensors that the model holds or makes and that are neither parameters nor buffers.
        outputs: names of the outputs that count, in order: `logits`, `aux_outputs[0].pred_boxes`, `[1]`, or `output`.
    """

    graph_module: fx.GraphModule
    inputs: tuple[Input, ...]
    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    modules: dict[str, str]
    route: str
    unused: tuple[str, ...]
    constants: dict[str, Tensor]
    outputs: tuple[str, ...]

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Runs the graph on the CPU, without gradients, with the parameters and buffers of `model`.

        Returns the outputs that `self.outputs` names.
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
        with torch.no_grad(), _AnyStrides():
            return self.graph_module(*(values[entry.kind][entry.name] for entry in self.inputs))


class _AnyStrides(TorchFunctionMode):
    """Views that copy where they must: kernels may lay out their results otherwise than tracing foresaw."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.view.default:
            return torch.reshape(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def capture(
    model: nn.Module,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: str | Sequence[str] | None = None,
) -> Captured:
    """Traces `model` to a graph; the model itself is neither run nor changed.

    Hooks of the model are part of it: they run, on the copy. What they write outside of the model are traced tensors.

    Args:
        model: any module; its weights may be real, on `meta`, or fake.
        args: positional arguments of `model`, or the only one; tensors may be real, on `meta`, or fake.
        kwargs: keyword arguments. Without `args` and `kwargs`, inputs are made up for models whose library says what
            they eat (see `modnorm_fx.inputs`).
        outputs: names of the outputs that count, or of containers around them (`aux_outputs` for all that is in it);
            None for every floating-point output that depends on a parameter.

    Raises:
        CaptureError: the model does not run on the inputs, or no route leads to a graph (each route's reason is given),
            or it returns no output of that name.
        WeightError: there is no parameter, or none reaches an output that counts.
    """
    if next(model.parameters(), None) is None:
        raise WeightError(
            f"{type(model).__name__} has no parameters, so there is nothing to normalise.",
            why="its weights, if it has any, are buffers or packed, as those of a quantised model",
            do="convert the model whose weights are trained",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__} was compiled by TorchScript, which cannot be traced.",
            why="no hook and no other parameters can be given to it",
            do="convert the Python model that it was made from; their parameters have the same names",
        )
    if getattr(model.forward, "__name__", "") == "_forward_unimplemented":
        raise CaptureError(
            f"{type(model).__name__} has no forward method, so there is nothing to convert.",
            why="it only holds parameters or other models",
            do=part(model),
        )
    if args is None and kwargs is None:
        args, kwargs = example_inputs(model)
    args = () if args is None else tuple(args) if isinstance(args, list | tuple) else (args,)
    with undisturbed(model):
        return _capture(model, args, without_cache(model, dict(kwargs or {})), outputs)


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


def _capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: str | Sequence[str] | None
) -> Captured:
    """The first graph that every parameter is part of, else the one with most."""
    failures: dict[str, Exception] = {}
    best: tuple[str, Trace, set[str]] | None = None
    for route, trace in ROUTES.items():
        if best is not None and (not best[2] or route in WITH_VALUES and WITH_VALUES[route] not in failures):
            continue
        if best is not None and route == IN_TRAINING and not _reads_in_training(model, args, kwargs, best[2]):
            continue
        seed()
        try:
            found = trace(model, args, kwargs)
            if _floats(found) and all(map(_empty, _floats(found).values())):
                raise RouteClosed("every floating-point output is empty on these inputs")
            _lift_constants(found)
            _check_constants(model, found.constants)
            _tidy(found)
        except ModnormError:
            raise
        except Exception as error:
            if best is None and not failures:
                check_runs(model, args, kwargs)
            failures[route] = error
            forget_fake_tensors()  # in the caches of functions, which the next route would make constants of
        else:
            unused = _unused(found)
            if failures and len(unused) == len({id(p) for p in model.parameters()}):
                failures[route] = RouteClosed("in its graph no parameter reaches an output")
            elif best is None or unused < best[2]:
                best = route, found, unused
    if best is None:
        reasons: dict[str, list[str]] = {}
        for route, failure in failures.items():
            reasons.setdefault(_reason(failure), []).append(route)
        raise CaptureError(
            f"{type(model).__name__} could not be traced to a graph.",
            why="every route failed" + "".join(f"\n    {', '.join(some)}: {text}" for text, some in reasons.items()),
            do=advice(model, list(failures.values())),
        ) from list(failures.values())[-1]
    route, found, _ = best
    _select(model, found, outputs)
    return _captured(model, route, found)


def _reads_in_training(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: set[str]) -> bool:
    """Whether the model reads any of the parameters in training; a call takes a tenth of the time that a graph does."""
    touched: set[str] = set()
    try:
        if dry_run(model, args, kwargs, training=True, touched=touched) is None:
            return True  # not known: it could not be called without values
    except Exception:
        return True
    return bool(touched & parameters)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, RouteClosed) else reason(error)


def _select(model: nn.Module, trace: Trace, wanted: str | Sequence[str] | None) -> None:
    """Makes the graph return the outputs that count, and nothing else."""
    names, leaves = trace.outputs.names, _floats(trace)
    floats = set(leaves)
    if not floats:
        other = ", ".join(dict.fromkeys(trace.outputs.other))
        raise CaptureError(
            f"{type(model).__name__} returns no floating-point tensor on these inputs.",
            why="a norm measures how far the outputs of a model can move, and integers do not move"
            + (f" (it returns objects that cannot be looked into: {other})" if other else ""),
            do="pass arguments with which the model returns logits, features or a loss (tensors, or tuples, lists, "
            "dicts or dataclasses)",
        )
    if wanted is not None:
        chosen = matching(names, wanted)
        if not floats & set(chosen):
            raise CaptureError(
                f"None of the chosen outputs is a floating-point tensor: {', '.join(names[i] for i in chosen)}.",
                why="a norm measures how far the outputs of a model can move, and integers do not move",
                do=f"choose among {', '.join(names[i] for i in sorted(floats))}",
            )
        floats &= set(chosen)
    moved = _dependent(trace)
    counted = [index for index in sorted(floats) if leaves[index] in moved and not _empty(leaves[index])]
    if not counted:
        raise WeightError(
            f"No parameter of {type(model).__name__} reaches its outputs on these inputs.",
            why="the outputs are computed from inputs and constants alone: "
            + ", ".join(names[index] for index in sorted(floats)),
            do="pass arguments that use the parameters" + (", or choose other outputs" if wanted is not None else ""),
        )
    _output(trace.module.graph).args = (tuple(leaves[index] for index in counted),)
    trace.outputs.names = [names[index] for index in counted]
    _tidy(trace)


# --- from a traced graph to a Captured --------------------------------------------------------------------------------


def _captured(model: nn.Module, route: str, trace: Trace) -> Captured:
    graph, entries = trace.module.graph, dict(trace.entries)
    for node, (kind, _) in list(entries.items()):
        if kind in ("buffer", "constant") and not node.users:
            graph.erase_node(node)
            del entries[node]
    inputs = tuple(Input(node, *entries[node]) for node in graph.find_nodes(op="placeholder"))
    for entry in inputs:
        _rename(entry.node, f"{entry.kind[0]}_{entry.name}")
    graph.lint()
    trace.module.recompile()
    canonical = canonical_names(model.named_parameters(remove_duplicate=False))
    unused = _unused(trace)
    return Captured(
        graph_module=trace.module,
        inputs=inputs,
        shapes={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        aliases={alias: name for alias, name in canonical.items() if alias != name},
        modules={path: _qualified_name(type(m)) for path, m in model.named_modules(remove_duplicate=False)},
        route=route,
        unused=tuple(entry.name for entry in inputs if entry.kind == "parameter" and entry.name in unused),
        constants={entry.name: _known(trace.constants[entry.name]) for entry in inputs if entry.kind == "constant"},
        outputs=tuple(trace.outputs.names),
    )


def _lift_constants(trace: Trace) -> None:
    """Makes placeholders, before those of the user, of tensors that the graph holds."""
    graph, entries = trace.module.graph, trace.entries
    following = next((node for node, key in entries.items() if key[0] == "user"), None)
    if following is None:
        following = next(node for node in graph.nodes if node not in entries)
    lifted: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(trace.module, node.target, None)
        if not isinstance(value, Tensor):
            continue
        name = f"held{node.target}" if node.target.startswith("_") else node.target
        if name not in lifted:
            with graph.inserting_before(following):
                lifted[name] = graph.placeholder(name)
            lifted[name].meta = dict(node.meta)
            entries[lifted[name]] = ("constant", name)
            trace.constants[name] = value
        node.replace_all_uses_with(lifted[name])
        graph.erase_node(node)


def _known(constant: Tensor) -> Tensor:
    """Without its values, if they were made up."""
    return constant.to("meta") if hasattr(constant, "made_up") else constant


def _check_constants(model: nn.Module, constants: dict[str, Tensor]) -> None:
    own = {
        parameter.data_ptr(): name
        for name, parameter in model.named_parameters()
        if parameter.numel() and not parameter.is_meta and not isinstance(parameter, FakeTensor)
    }
    for value in constants.values():
        if value.numel() and value.data_ptr() in own:
            raise RouteClosed(f"{own[value.data_ptr()]} is used through a closure that refers to the original model")


def _tidy(trace: Trace) -> None:
    """Removes whatever no output needs (nothing writes in place, so all of it is dead)."""
    without_checks(trace.module.graph)
    trace.module.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def _rename(node: fx.Node, name: str) -> None:
    node._rename("".join(c if c.isalnum() else "_" for c in name))
    node.target = node.name


def _unused(trace: Trace) -> set[str]:
    """Parameters from which no path of floating-point values leads to a floating-point output."""
    reached: set[fx.Node] = set()
    todo = [node for node in _output(trace.module.graph).all_input_nodes if _is_float(node)]
    while todo:
        node = todo.pop()
        if node not in reached:
            reached.add(node)
            todo.extend(source for source in node.all_input_nodes if _is_float(source))
    return {name for node, (kind, name) in trace.entries.items() if kind == "parameter" and node not in reached}


def _dependent(trace: Trace) -> set[fx.Node]:
    """Nodes to which a path of floating-point values leads from a parameter."""
    found = {node for node, (kind, _) in trace.entries.items() if kind == "parameter"}
    for node in trace.module.graph.nodes:
        if _is_float(node) and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _floats(trace: Trace) -> dict[int, fx.Node]:
    """The floating-point outputs, by position."""
    leaves: Any = _output(trace.module.graph).args[0]
    return {index: leaf for index, leaf in enumerate(leaves) if isinstance(leaf, fx.Node) and _is_float(leaf)}


def _empty(node: fx.Node) -> bool:
    """Whether a node is known to give no entry; sizes that depend on values are symbols, not numbers."""
    sizes = [leaf.numel() for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
    return all(isinstance(size, int) and size == 0 for size in sizes)


def _is_float(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()) for leaf in leaves)


def _output(graph: fx.Graph) -> fx.Node:
    return next(iter(graph.find_nodes(op="output")))


# --- names and lines --------------------------------------------------------------------------------------------------


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
