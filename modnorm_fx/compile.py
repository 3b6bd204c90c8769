"""``torch.compile(model, backend="modnorm_fx")``: keeps what dynamo captures, and lets inductor compile it as ever.

Nothing is inferred while a model compiles: the backend notes each graph and hands it on unchanged.
``compiled_norm(compiled)`` then converts what was noted. A model that dynamo captures in one piece gives the norm that
``convert`` gives. With graph breaks there are several pieces, in the order in which they were first compiled; what is
known of a piece stops at its edges, so a relative change is taken to pass the other pieces as they say, and Python
between the pieces as it is.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import CompileContext
from torch.utils.weak import WeakIdKeyDictionary

from .errors import ModnormError, OptimizerError
from .norm import ModularNorm
from .pipeline import convert
from .tree import compose

__all__ = ["backend", "compiled_norm"]


@dataclass(frozen=True)
class _Piece:
    """A graph from dynamo: its inputs in order, parameters by weak reference, all else as meta tensors or numbers."""

    graph: fx.GraphModule
    inputs: tuple[Any, ...]
    held: frozenset[int]  # places of inputs that the model holds: buffers and other tensors of its modules


#: parameter -> frame of Python code -> the piece compiled for it last; a parameter's pieces die with it
_PIECES: Any = WeakIdKeyDictionary()


def backend(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    then: str | Callable[..., Any] = "inductor",
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """What dynamo calls with each graph: notes it, and returns what the next backend makes of it.

    Args:
        graph, inputs: from dynamo.
        then: the backend that compiles, by name or as a function; ``torch.compile``'s ``options={"then": "eager"}``
            sets it too.
        options, mode: as ``torch.compile`` takes them; passed on to inductor.
    """
    given = dict(options or {})
    then = given.pop("then", then)
    _note(graph, inputs)
    if then == "inductor":
        if mode is not None:
            given = torch._inductor.list_mode_options(mode) | given
        return torch._inductor.compile(graph, list(inputs), options=given or None)
    if given or mode is not None:
        raise ModnormError(
            f"options and mode are inductor's, and then={then!r} compiles.", do="Leave them out, or leave out then."
        )
    if isinstance(then, str):
        return torch._dynamo.lookup_backend(then)(graph, list(inputs))
    return then(graph, list(inputs))


def compiled_norm(compiled: nn.Module, **options: Any) -> ModularNorm:
    """The modular norm of a model that was compiled with this backend and has run at least once.

    Args:
        compiled: what ``torch.compile`` returned (or the model, after ``model.compile(backend="modnorm_fx")``; of
            torch's own classes, as ``nn.Sequential``, that compiles nothing).
        **options: of ``convert``: ``convention``, ``unknown``, ``masses``, ``rules``.

    Returns:
        A norm bound to the original model. Parameters in no graph are named in a warning and in ``.unused``.

    Raises:
        ModnormError: no graph of the model was captured; and whatever ``convert`` raises.
    """
    model: nn.Module = getattr(compiled, "_orig_mod", compiled)
    pieces: dict[Any, _Piece] = {}
    for parameter in model.parameters():
        pieces |= _PIECES.get(parameter, {})
    if not pieces and getattr(model, "_compiled_call_impl", None) is not None and _is_torchs(model):
        raise ModnormError(
            f"No graph of {type(model).__name__} was captured: compiled in place, it still runs as it is.",
            why=f"dynamo skips functions of torch's own modules, and the forward of {type(model).__name__} is one",
            do="Call compiled = torch.compile(model, backend='modnorm_fx') instead, or model.compile() on a module of "
            "your own that holds it.",
        )
    if not pieces:
        raise ModnormError(
            f"No graph of {type(model).__name__} was captured.",
            why="graphs are captured when a compiled model first runs, and only by its own backend",
            do="Call the model compiled with backend='modnorm_fx' once, then ask for its norm.",
        )
    norms = [_convert(model, pieces[frame], options) for frame in sorted(pieces)]
    norm = norms[0] if len(norms) == 1 else _joined(norms)
    norm = replace(
        norm,
        shapes={name: tuple(p.shape) for name, p in model.named_parameters()},
        unused=tuple(
            name
            for name, p in model.named_parameters()
            if p.numel() and not any(w == name for w, _ in norm.slices.values())
        ),
    ).bind(model)
    if norm.unused:
        warnings.warn(
            f"{len(norm.unused)} parameters are in no graph that dynamo captured and get no norm: "
            f"{', '.join(norm.unused[:8])}{', …' if len(norm.unused) > 8 else ''}.",
            stacklevel=2,
        )
    return norm


def _is_torchs(model: nn.Module) -> bool:
    """Whether the model runs torch's own code (``nn.Sequential``), of which ``model.compile()`` compiles nothing."""
    return getattr(type(model).forward, "__module__", "").startswith("torch.nn.")


def _note(graph: fx.GraphModule, inputs: Sequence[Any]) -> None:
    parameters = [value for value in inputs if isinstance(value, nn.Parameter)]
    if not parameters:
        return
    kept: list[Any] = []
    held = set()
    for place, (node, value) in enumerate(zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True)):
        source = getattr(getattr(node, "_dynamo_source", None), "name", "")
        source = source() if callable(source) else source
        if "._buffers[" in source or "._modules[" in source:
            held.add(place)
        if isinstance(value, nn.Parameter):
            kept.append(weakref.ref(value))
        elif isinstance(value, Tensor):
            kept.append(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta"))
        else:
            kept.append(int(value) if isinstance(value, torch.SymInt) else value)
    piece = _Piece(fx.GraphModule(graph, copy.deepcopy(graph.graph)), tuple(kept), frozenset(held))
    compile_id = CompileContext.current_compile_id()
    frame = (compile_id.frame_id or 0) if compile_id is not None else 0
    for parameter in parameters:
        _PIECES.setdefault(parameter, {})[frame] = piece


class _Standalone(nn.Module):
    """A piece as a module: parameters under their names in the user's model, all else an argument or a buffer."""

    def __init__(self, model: nn.Module, piece: _Piece):
        super().__init__()
        names = {id(p): name for name, p in model.named_parameters()}
        self._piece = piece
        self._places: list[tuple[str, Any]] = []
        self.example: list[Any] = []
        for place, value in enumerate(piece.inputs):
            if isinstance(value, weakref.ref):
                parameter = value()
                if parameter is None or id(parameter) not in names:
                    raise OptimizerError(
                        "A graph that was captured uses a parameter that the model no longer has.",
                        do="Compile the model again after changing it, and run it once.",
                    )
                self._places.append(("parameter", names[id(parameter)]))
                _set(self, names[id(parameter)], parameter)
            elif place in piece.held and isinstance(value, Tensor):
                self.register_buffer(f"held_{place}", value)
                self._places.append(("buffer", f"held_{place}"))
            else:
                self._places.append(("argument", len(self.example)))
                self.example.append(value)

    def forward(self, *arguments: Any) -> Any:
        values = [arguments[key] if kind == "argument" else _get(self, key) for kind, key in self._places]
        return fx.Interpreter(self._piece.graph).run(*values)


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    *path, last = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    module.register_parameter(last, parameter)


def _get(module: nn.Module, name: str) -> Any:
    *path, last = name.split(".")
    for part in path:
        module = module._modules[part]  # type: ignore[assignment]
    return getattr(module, last)


def _convert(model: nn.Module, piece: _Piece, options: Mapping[str, Any]) -> ModularNorm:
    standalone = _Standalone(model, piece)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*reach.* no output.*")  # said once, of the whole model
        return convert(standalone, tuple(standalone.example), **options)


def _joined(norms: Sequence[ModularNorm]) -> ModularNorm:
    """One norm of pieces that run one after the other."""
    slices: dict[str, Any] = {}
    for norm in norms:
        slices |= norm.slices
    return replace(norms[0], tree=compose(*(norm.tree for norm in norms)), slices=slices, stages={})
