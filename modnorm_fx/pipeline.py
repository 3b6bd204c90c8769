"""``convert``: a model in, its modular norm out. The one place that calls the passes, in order.

Each stage's result is a value that can be printed (``ModularNorm.explain``). An error raised inside a pass carries
the pass's name.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from . import explain
from .aten_rules import ATEN
from .capture import Captured, capture, where
from .conventions import Convention
from .conventions import convention as convention_of
from .errors import InternalError, MassError, ModnormError
from .norm import ModularNorm
from .passes.assign_mass import SHARES, TOTALS, assign_mass
from .passes.bind_weights import bind_weights
from .passes.computed_weights import computed_weights, parts_of_joined
from .passes.feature_axes import feature_axes
from .passes.find_branches import find_branches, written
from .passes.find_heads import find_heads
from .passes.find_parts import find_parts
from .passes.find_stacks import find_stacks
from .passes.flow import classify_flow
from .passes.fold_tree import fold_tree
from .passes.fuse_pointwise import fuse_pointwise
from .passes.known_signs import known_signs
from .passes.measure_constants import made_of_numbers, measure_constants
from .passes.propagate_scales import propagate_scales
from .passes.propagate_sensitivity import Sensitivities, propagate_sensitivity, stopped_at
from .passes.recognize_attention import recognize_attention
from .passes.recognize_averages import recognize_averages
from .passes.recognize_dots import recognize_dots
from .passes.recognize_norms import recognize_norms
from .passes.recognize_rotary import recognize_rotary
from .passes.recognize_shares import recognize_shares
from .passes.recognize_straight_through import recognize_straight_through
from .passes.return_weights import return_weights
from .passes.split_packed import split_packed
from .passes.type_atoms import type_atoms
from .passes.unfold_cells import unfold_cells
from .passes.unstack_weights import unstack_weights
from .passes.write_casts import write_casts
from .rules import RuleTable, op_key
from .tree import allot

__all__ = ["convert"]

Result = TypeVar("Result")
#: targets above this are named: a step of lr 1e-3 would change a weight of norm 1 a thousandfold
FAR = 1e6
#: sensitivity · scale above this is named: it is 34 in GPT-2 (embeddings, whose rows are small, have the largest),
#: below 200 in small models of 415 of 416 transformers families (DAC has more), and grows by a factor in each layer
#: where one is not understood
COMPOUNDED = 1e3
#: agreement asked of the tree's recursion and the reverse sweep; both are a few hundred float64 products
AGREEMENT = 1e-6


def convert(
    model: nn.Module,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: str | Sequence[str] | None = None,
    convention: str | Convention = "tracked",
    unknown: str = "sample",
    masses: Mapping[str, float] | None = None,
    rules: RuleTable = ATEN,
) -> ModularNorm:
    """Infers the modular norm of a model from its dataflow. The model is not touched and no weight is read.

    Args:
        model: any nn.Module; real, meta and fake tensors are all fine.
        args, kwargs: example inputs as ``model(*args, **kwargs)`` takes them; they may be left out for Hugging Face
        and timm models.
        outputs: names of the outputs that the loss uses (``"logits"``, ``"[0]"``), or of containers around them
            (``"aux_outputs"`` for all below it). By default every floating-point output that depends on a parameter
            counts, and all count equally: key-value caches are switched off, and hidden states and attention maps are
            outputs only where the model returns them unasked.
        convention: ``"tracked"`` for existing models, ``"paper"`` for nets written the paper's way (see
        ``conventions``).
        unknown: what to do with an op without a rule: ``"sample"`` estimates it by running it on random inputs and
            marks it in every printout, ``"error"`` refuses.
        masses: total mass of ``"stem"``, ``"stacks"``, ``"head"`` (1 each by default), the share of ``"vectors"``
            relative to a matrix (0.1), of ``"biases"`` relative to other vectors (0.01; under ``"paper"`` 1), and the
            mass of any module path or parameter (as ``ModularNorm.tare``, applied in the order given).
        rules: the table of op rules; ``ATEN.extended()`` to add one's own.

    Returns:
        A ModularNorm bound to ``model``. Parameters that reach no output that counts are named in a warning and in
        ``.unused``.

    Raises:
        CaptureError: the model does not run on its inputs, or cannot be traced, or returns no floating-point output,
            or none of a name in ``outputs``.
        UnknownOpError, WeightError: an op has no rule or a weight no atom (all are named at once).
        MassError: ``masses`` names nothing or is not a finite number >= 0.
    """
    if not isinstance(model, nn.Module):
        raise ModnormError(f"A norm is that of an nn.Module; this is {model!r}.", do="Pass the model itself.")
    if masses is not None and not isinstance(masses, Mapping):
        raise MassError(f"masses={masses!r} is not a mapping.", do='Pass names and numbers, as {"stacks": 2.0}.')
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ModnormError(f"kwargs={kwargs!r} is not a mapping.", do='Pass names and values, as {"labels": labels}.')
    if outputs is not None and not (isinstance(outputs, Collection) and all(isinstance(name, str) for name in outputs)):
        raise ModnormError(
            f"outputs={outputs!r} names no outputs.", do='Pass a name or several, as "logits", or "[0]" of a tuple.'
        )
    if not isinstance(rules, RuleTable):
        raise ModnormError(f"rules={rules!r} is no table of rules.", do="Leave it out, or pass ATEN.extended().")
    chosen = convention_of(convention)
    if unknown not in ("sample", "error"):
        raise ModnormError(f"unknown={unknown!r} is not a choice.", do="Pass 'sample' or 'error'.")
    stages: dict[str, Callable[[], str]] = {}
    seconds: dict[str, float] = {}

    def run(name: str, function: Callable[..., Result], *inputs: Any, **options: Any) -> Result:
        start = time.perf_counter()
        try:
            with torch.inference_mode(False):  # slopes are derivatives, which there are none of in inference mode
                return function(*inputs, **options)
        except ModnormError as error:
            error.add_note(f"(while converting {type(model).__name__}, in {name})")
            raise
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    captured: Captured = run(
        "capture", capture, model, args, dict(kwargs) if kwargs is not None else None, outputs=outputs
    )
    module, inputs = captured.graph_module, captured.inputs
    graph_as_captured = explain.graph(captured)  # the text is made now, later passes rewrite the graph
    stages["capture"] = lambda: graph_as_captured
    run("write_casts", write_casts, module)
    found = {"cells": run("unfold_cells", unfold_cells, module)}
    held = made_of_numbers(inputs, captured.constants)
    found["computed"] = run("computed_weights", computed_weights, module, inputs, held, rules=rules, convention=chosen)
    found["norms"] = run("recognize_norms", recognize_norms, module)
    flow = run("flow", classify_flow, module, inputs, rules=rules)
    if run("return_weights", return_weights, module, flow):
        flow = run("flow", classify_flow, module, inputs, rules=rules)
    found["stacked"] = run("unstack_weights", unstack_weights, module, flow)
    found["straight_through"] = run("recognize_straight_through", recognize_straight_through, module, flow)
    found["rotary"] = run("recognize_rotary", recognize_rotary, module, flow)
    flow = run("flow", classify_flow, module, inputs, rules=rules)
    found["attention"] = run("recognize_attention", recognize_attention, module, flow)
    found["averages"] = run("recognize_averages", recognize_averages, module, flow)
    found["shares"] = run("recognize_shares", recognize_shares, module, flow)
    found["dots"] = run("recognize_dots", recognize_dots, module, flow, rules=rules)
    flow = run("flow", classify_flow, module, inputs, rules=rules)
    products_only = not chosen.tracks_scales
    found["pointwise"] = run("fuse_pointwise", fuse_pointwise, module, flow, rules=rules, products_only=products_only)
    flow = run("flow", classify_flow, module, inputs, rules=rules)
    values = {i.node: captured.constants[i.name] for i in inputs if i.kind == "constant"}
    found["packed"] = run("split_packed", split_packed, module, flow, rules=rules, constants=values)
    run("computed_weights", parts_of_joined, module, rules=rules)
    module.graph.lint()
    module.recompile()
    flow = run("flow", classify_flow, module, inputs, rules=rules)
    stages["canonical"] = lambda: explain.canonical(module, found)
    constants = run("measure_constants", measure_constants, module, flow, held)
    uses = run("bind_weights", bind_weights, module, inputs, flow, rules=rules, constants=constants)
    axes = run("feature_axes", feature_axes, module, flow, rules=rules)
    weights = run("type_atoms", type_atoms, module, uses, flow, axes, captured.shapes, rules=rules, unknown=unknown)
    stages["atoms"] = lambda: explain.atoms(weights)
    streams = run("find_branches", find_branches, module.graph, flow, weights, rules=rules)
    stages["branches"] = lambda: explain.branches(streams, chosen)
    heads = run("find_heads", find_heads, module, flow, weights, axes, rules=rules)
    stages["heads"] = lambda: explain.heads(heads, chosen)
    parts = run("find_parts", find_parts, module, flow, axes, rules=rules)
    signs = run("known_signs", known_signs, module, rules=rules)
    scales = run(
        "propagate_scales",
        propagate_scales,
        module,
        flow,
        weights,
        axes,
        rules=rules,
        convention=chosen,
        unknown=unknown,
        signs=signs,
        constants=constants,
        branches=written(streams),
        heads=heads.of,
        parts=parts,
    )
    stages["scales"] = lambda: explain.scales(module, scales)
    sensitivities = run(
        "propagate_sensitivity", propagate_sensitivity, module, flow, weights, scales, convention=chosen
    )
    stages["sensitivities"] = lambda: explain.sensitivities(module, sensitivities)
    stops = {
        w.parameter: [f"{op_key(n.target)} at {where(n)}" for n in stopped_at(w, module, scales, sensitivities)]
        for w in weights
        if not any(sensitivities.gains[w.key, i] > 0 for i in range(len(w.uses)))
    }
    weights = tuple(
        w for w in weights if all(w.shape) and any(sensitivities.gains[w.key, i] > 0 for i in range(len(w.uses)))
    )
    places = run("find_stacks", find_stacks, module.graph, weights, captured.modules)
    named = {k: v for k, v in (masses or {}).items() if k in TOTALS or k in SHARES}
    shares = run("assign_mass", assign_mass, weights, places, named, chosen.quadrature)
    stages["mass"] = lambda: explain.mass(weights, places, shares)
    tree = run("fold_tree", fold_tree, module, flow, weights, scales, sensitivities, shares)
    stages["timing"] = lambda: explain.timing(seconds)
    used = {w.parameter for w in weights}
    norm = ModularNorm(
        tree=tree,
        convention=chosen,
        shapes=dict(captured.shapes),
        slices={w.key: (w.parameter, w.slices) for w in weights},
        aliases=dict(captured.aliases),
        unused=tuple(name for name, shape in captured.shapes.items() if name not in used and all(shape)),
        stages=stages,
        conversion=explain.conversion(captured, scales, seconds),
    ).bind(model)
    run("agreement", _agree, norm, sensitivities)
    stages["tree"] = lambda: str(norm)
    for path, mass in (masses or {}).items():
        if path not in named:
            norm = norm.tare(path, mass)
    selected = captured.outputs if outputs is not None else ()
    stopped = {name: stops[name] for name in norm.unused if stops.get(name)}
    unused = tuple(name for name in norm.unused if name not in stopped)
    for text in (
        _unused(unused, selected),
        _stopped(stopped),
        _partly_used(norm),
        _sampled(norm),
        _far(norm),
        _compounds(norm),
    ):
        if text:
            warnings.warn(text, stacklevel=2)
    return norm


def _agree(norm: ModularNorm, sensitivities: Sensitivities) -> None:
    """The recursion on the tree and the sweep over the graph are separate code and must give the same gains."""
    for part in allot(norm.tree, norm.convention):
        gain = sensitivities.gains[part.node.key, part.node.use]
        if not math.isclose(part.gain, gain, rel_tol=AGREEMENT):
            raise InternalError(
                f"The tree gives {part.node.key!r} a gain of {part.gain:.6g} and the graph {gain:.6g}.",
                do="This is a defect of modnorm_fx: please report it with the model.",
            )


def _listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _sampled(norm: ModularNorm) -> str:
    """Names weights whose number is an estimate, because the op that uses them has no rule."""
    keys = [leaf.key for leaf in norm.leaves if leaf.status == "sampled"]
    if not keys:
        return ""
    return (
        f"The effect of {len(keys)} weight{'s' if len(keys) > 1 else ''} was estimated by running ops on random "
        f"inputs, because no rule or atom describes their use: {_listed(keys)}. Pass unknown='error' to see each "
        "op and its place."
    )


def _far(norm: ModularNorm) -> str:
    """Names weights whose steps would be enormous, because next to nothing of them seems to reach the output."""
    far = {leaf.key: leaf.target for leaf in norm.leaves if leaf.target > FAR}
    if not far:
        return ""
    listed = _listed([f"{key} ({target:.3g})" for key, target in far.items()])
    return (
        f"The target{'s' if len(far) > 1 else ''} of {listed} would make a step enormous: by the norm's numbers the "
        "output hardly depends on "
        + ("them" if len(far) > 1 else "it")
        + ". Where a large number is added to a signal as a mask, write masked_fill or "
        "torch.where; norm.explain('scales') shows where a signal becomes large."
    )


def _compounds(norm: ModularNorm) -> str:
    """Names weights whose steps would be next to nothing, because their effect seems to grow with every layer."""
    grown = {leaf.key: leaf.sensitivity * leaf.scale for leaf in norm.leaves}
    grown = {key: product for key, product in grown.items() if norm.convention.tracks_scales and product > COMPOUNDED}
    if not grown:
        return ""
    key = max(grown, key=lambda key: grown[key])
    return (
        f"By the norm's numbers the output moves {grown[key]:.3g} times as far as {key} (in relative terms; above "
        f"{COMPOUNDED:g} for {len(grown)} weight{'s' if len(grown) > 1 else ''}), so that steps there are next to "
        "nothing. Effects that grow with every layer can be real (sines without norm layers), or a layer is not "
        "understood: norm.explain('scales') shows where they grow; masses or norm.tare give these weights larger steps."
    )


def _unused(names: tuple[str, ...], selected: tuple[str, ...]) -> str:
    if not names:
        return ""
    output = f"selected output ({_listed(selected)})" if selected else "output"
    return (
        f"{len(names)} parameter{'s reach' if len(names) > 1 else ' reaches'} no {output} of the model on these inputs "
        f"and get no norm: {_listed(names)}. "
        "If they should train, pass args/kwargs that use them. (A gradient that only the backward of a custom autograd "
        "function makes is not seen: such parameters need an optimizer of their own.)"
    )


def _stopped(stops: Mapping[str, Sequence[str]]) -> str:
    """Names parameters that are used, and the operations without a derivative that keep them from every output."""
    if not stops:
        return ""
    places = list(dict.fromkeys(place for found in stops.values() for place in found))
    some = (
        f"{len(stops)} parameters move no output and get" if len(stops) > 1 else "1 parameter moves no output and gets"
    )
    return (
        f"{some} no norm: "
        f"{_listed(list(stops))}. The derivative of {_listed(places, 3)} is zero. If a custom autograd function passes "
        "a gradient on there (a straight-through estimator), write it as x + (f(x) - x).detach(), which is followed, "
        "or give these parameters an optimizer of their own."
    )


def _partly_used(norm: ModularNorm) -> str:
    """Names parameters of which some entries are in no leaf; the optimizer leaves those entries as they are."""
    covered: dict[str, int] = defaultdict(int)
    for leaf in norm.leaves:
        covered[leaf.weight] += math.prod(leaf.atom.shape)
    names = [name for name, entries in covered.items() if entries < math.prod(norm.shapes[name])]
    if not names:
        return ""
    keys = [leaf.key for leaf in norm.leaves if leaf.weight in names]
    return (
        f"Only parts of {', '.join(names)} reach an output of the model on these inputs: {', '.join(keys)}. "
        "The other entries get no norm and are not updated."
    )
