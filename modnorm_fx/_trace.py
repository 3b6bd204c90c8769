"""The ways to trace a model to a functional ATen graph: each gives the graph and what is passed to its placeholders.

1. `export(eval)`: `torch.export.export(strict=False)` of a fake copy; needs no weights, so a 70B model on `meta` works;
2. `export(train)`: the same in training mode, when (1) fails or loses parameters (caches that evaluation keeps);
3. `make_fx(eval)`: the model runs on values, for code that branches on data or makes sizes from it;
4. `make_fx(train)`: the same in training mode, for models that only run in it (detectors that return losses);
5. `make_fx(below autograd)`: what (3) runs in the end, for `torch.vmap` and the transforms of `torch.func`, which end
   above that level; layers come apart there (`linear` is `addmm`).

Such a graph still writes in place and wraps parts in sub-graphs. Tracing the graph once more makes it functional. That
gives what `run_decompositions({})` gives (`linear`, `layer_norm`, attention stay whole) in less than half the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import _trace_wrapped_higher_order_op as indexing
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from ._composites import COMPOSITES
from ._copies import MAX_REAL_BYTES, fake_copy, fake_inputs, real_bytes, real_copy, real_inputs
from ._flex_attention import flex_attention, written_out
from ._outputs import Flatten
from .inputs import input_names

__all__ = ["KINDS", "ROUTES", "Key", "Kind", "RouteClosed", "Trace", "canonical_names", "without_checks"]

Kind = Literal["parameter", "buffer", "constant", "user"]
Key = tuple[Kind, str]

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


#: random zeros, given (input, probability, whether training)
DROPOUTS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
)


@dataclass(frozen=True)
class Trace:
    """A traced model.

    Attributes:
        module: its functional graph, which returns a flat tuple.
        entries: placeholder -> what it is.
        constants: tensors that are neither parameters nor buffers, by name.
        outputs: what the model returns: names of the leaves, and types of those that a graph cannot return.
    """

    module: fx.GraphModule
    entries: dict[fx.Node, Key]
    constants: dict[str, Tensor]
    outputs: Flatten


class RouteClosed(Exception):
    """This route gives no faithful graph; another may."""


@dataclass(frozen=True)
class _Literal:
    """An argument that is not a tensor: the graph is specialised to it."""

    value: Any


class _Called(nn.Module):
    """A GraphModule as any other module, with its parameters, parts and hooks: `torch.export` runs the graph of one
    itself, without the hooks."""

    def __init__(self, whole: fx.GraphModule) -> None:
        super().__init__()
        self.__dict__ |= {**vars(whole), "forward": whole.forward, "whole": whole}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["whole"], name)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool) -> Trace:
    copy, mode = fake_copy(model, training=training)
    if isinstance(copy, fx.GraphModule):
        copy = _Called(copy)
    copy.register_forward_hook(returned := Flatten())
    program = torch.export.export(copy, *fake_inputs((args, kwargs), mode), strict=False)
    exported, signature = program.graph_module, program.graph_signature
    constants = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
    kinds: dict[InputKind, Kind] = {
        InputKind.PARAMETER: "parameter",
        InputKind.BUFFER: "buffer",
        InputKind.CONSTANT_TENSOR: "constant",
    }
    canonical: dict[str, dict[str, str]] = {
        "parameter": canonical_names(model.named_parameters(remove_duplicate=False)),
        "buffer": canonical_names(model.named_buffers(remove_duplicate=False)),
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
            raise RouteClosed(f"the graph has an input of the kind {spec.kind.name}")
        if not isinstance(feed[-1], _Literal):
            tensors[feed[-1]] = node.meta["val"]
    outputs = [index for index, spec in enumerate(signature.output_specs) if spec.kind is OutputKind.USER_OUTPUT]
    with mode:
        return Trace(*_functional(exported, feed, tensors, outputs), constants, returned)


def _make_fx(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool, whole: bool = True
) -> Trace:
    if (size := real_bytes(model)) > MAX_REAL_BYTES:
        raise RouteClosed(
            f"a copy with values takes {size / 2**30:.0f} GiB, and {MAX_REAL_BYTES / 2**30:.0f} GiB are allowed"
        )
    copy, returned = real_copy(model, training=training), Flatten()
    names = input_names(model, args, kwargs)
    leaves, spec = pytree.tree_flatten(real_inputs((args, kwargs)))
    tensors: dict[Key, Tensor] = {("parameter", name): value.detach() for name, value in copy.named_parameters()}
    tensors |= {("buffer", name): value for name, value in copy.named_buffers()}
    tensors |= {("user", name): value for name, value in zip(names, leaves, strict=True) if isinstance(value, Tensor)}

    def run(*values: Tensor) -> list[Any]:
        given = dict(zip(tensors, values, strict=True))
        state = {name: value for (kind, name), value in given.items() if kind != "user"}
        inputs = [given.get(("user", name), leaf) for name, leaf in zip(names, leaves, strict=True)]
        value = torch.func.functional_call(copy, state, *pytree.tree_unflatten(inputs, spec), tie_weights=True)
        return returned(copy, inputs, value)

    run._orig_mod = copy  # type: ignore[attr-defined]  # where make_fx looks for modules, to record their paths
    trace = make_fx(
        run, pre_dispatch=whole, record_module_stack=True, record_stack_traces=True, _error_on_data_dependent_ops=False
    )
    # what transformers' masks index with under vmap is an autograd function, which cannot be traced; it does no more
    with (
        mock.patch.object(indexing, "mod_index", torch.ops.aten.index.Tensor, create=True),
        sdpa_kernel(SDPBackend.MATH),
    ):
        traced = trace(*tensors.values())
    _refuse_saved_tensors(traced, tensors.values())
    return Trace(*_functional(traced, list(tensors), tensors), {}, returned)


def _refuse_saved_tensors(traced: fx.GraphModule, inputs: Iterable[Tensor]) -> None:
    """Raises RouteClosed if a graph holds a parameter, buffer or input as a constant, as it does where the model takes
    a gradient: what autograd saves for that is not recorded, so the gradient would not depend on it."""
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs if tensor.numel()}
    for node in traced.graph.find_nodes(op="get_attr"):
        held = getattr(traced, node.target, None)
        if isinstance(held, Tensor) and held.numel() and held.untyped_storage().data_ptr() in known:
            raise RouteClosed("its graph holds values of the inputs, as where a model calls torch.autograd.grad")


ROUTES: dict[str, Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Trace]] = {
    "export(eval)": partial(_export, training=False),
    "export(train)": partial(_export, training=True),
    "make_fx(eval)": partial(_make_fx, training=False),
    "make_fx(train)": partial(_make_fx, training=True),
    "make_fx(below autograd)": partial(_make_fx, training=False, whole=False),
}
"""In the order in which they are tried."""


class _Replay(fx.Interpreter):
    """Runs a graph with the sub-graphs of wrappers in line, composite operations by their parts, and without dropout
    that is off: it returns its input."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in DROPOUTS and not (args[1] and args[2]):
            return args[0]
        if isinstance(target, HigherOrderOperator) and target.name() in WRAPPERS:
            position = next(index for index, value in enumerate(args) if isinstance(value, fx.GraphModule))
            return _Replay(args[position]).run(*args[position + 1 :])
        if target is torch.ops.aten.glu.default:
            return _glu(*args, **kwargs)
        if target is flex_attention:
            query, key, value, score_mod, (*blocks, mask_mod), *rest = args
            mask = (*blocks, _Replay(mask_mod).run)
            return written_out(query, key, value, _Replay(score_mod).run, mask, *rest, **kwargs)
        if target in COMPOSITES:
            with torch._C.DisableTorchFunction():  # the mode that would record it as it is
                return target.decompose(*args, **kwargs)
        return super().call_function(target, args, kwargs)


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    """`glu` by its parts: the halves come from two layers in one, which a rule for the whole could not tell apart."""
    values, gates = x.chunk(2, dim)
    return values * gates.sigmoid()


def _functional(
    traced: fx.GraphModule, feed: list[Key | _Literal], tensors: dict[Key, Tensor], outputs: list[int] | None = None
) -> tuple[fx.GraphModule, dict[fx.Node, Key]]:
    """Traces a graph once more, with every write made functional; a write into an input is not seen outside.

    Args:
        feed: what each placeholder of `traced` is given.
        tensors: example values of the inputs of the new graph.
        outputs: the outputs to keep, all of them if None.
    """
    without_checks(traced.graph)
    keys = sorted(tensors, key=lambda key: KINDS.index(key[0]))

    def run(*values: Tensor) -> tuple[Any, ...]:
        given = dict(zip(keys, values, strict=True))
        results = _Replay(traced).run(*(entry.value if isinstance(entry, _Literal) else given[entry] for entry in feed))
        return tuple(results if outputs is None else (results[index] for index in outputs))

    def traced_once_more(function: Callable[..., Any]) -> fx.GraphModule:
        functional = dispatch_functionalize(function, FunctionalTensorMode(pre_dispatch=True, export=True))
        return make_fx(functional, pre_dispatch=True, _error_on_data_dependent_ops=False)(*(tensors[k] for k in keys))

    with enable_python_dispatcher(), fx_traceback.preserve_node_meta():
        graph_module = traced_once_more(run)
        while not COMPOSITES.isdisjoint(node.target for node in graph_module.graph.nodes):  # parts that have parts
            graph_module = traced_once_more(_Replay(graph_module).run)
    return graph_module, dict(zip(graph_module.graph.find_nodes(op="placeholder"), keys, strict=True))


def canonical_names(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Every name -> the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def without_checks(graph: fx.Graph) -> None:
    """Removes what only checks something, and what only such checks need."""
    for node in reversed(graph.nodes):
        if isinstance(node.target, OpOverload) and node.target.__name__.startswith(CHECKS) and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
