"""Pass: the scale of every signal, forward, and with it each op's local sensitivities.

Assumes typed weights. Promises, for every signal node, its expected RMS and, for each of its signal or weight
operands, the change of the node per change of the operand. Under ``paper`` every scale is 1. Weights count as norm 1
by declaration, biases and logit biases as 0 (they start there; 1 in a sum of parameters alone), tables at the scale
of what they are added to or joined with; an embedding that is tied to a head is declared at 1/√d, which is its row
norm when the head has norm 1 (and all embeddings of its width with it: a larger one would drown it). An op without a
rule is sampled or refused, and so is one whose rule would divide by an operand of scale zero;
all refusals are raised together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from modnorm_fx import weight_atoms
from modnorm_fx.atoms import Atom, Bias, Embedding, LogitBias, Table
from modnorm_fx.capture import where
from modnorm_fx.conventions import Convention
from modnorm_fx.errors import UnknownOpError
from modnorm_fx.rules import Call, Local, Operand, Rule, RuleTable, arguments, operands

from .canonicalize import aten
from .flow import Flow, is_float
from .measure_constants import measure_constants
from .sample import SamplingError, sample
from .type_atoms import Weight

#: roles in which a rule takes an operand for a parameter of norm 1
MATRICES = frozenset({weight_atoms.linear, weight_atoms.linear_transposed, weight_atoms.conv, weight_atoms.embedding})
#: ops whose output rows are averages, and what keeps them so
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
AVERAGE_KEEPERS = frozenset(
    {aten.clone.default, aten.dropout.default, aten._to_copy.default, aten.masked_fill.Scalar, aten.where.self}
)


@dataclass(frozen=True)
class Scales:
    """Facts of the forward sweep.

    Attributes:
        scale: signal node -> expected RMS of its features.
        local: signal node -> (operand, operand node) -> sensitivity.
        status: signal node -> status of its rule (``sampled`` where there was none).
        initial: (weight key, use index) -> the norm the weight is declared to have at that use.
    """

    scale: dict[fx.Node, float] = field(default_factory=dict)
    local: dict[fx.Node, dict[Operand, float]] = field(default_factory=dict)
    status: dict[fx.Node, str] = field(default_factory=dict)
    initial: dict[tuple[str, int], float] = field(default_factory=dict)


def propagate_scales(
    module: fx.GraphModule,
    flow: Flow,
    weights: Sequence[Weight],
    axes: Mapping[fx.Node, frozenset[int]],
    *,
    rules: RuleTable,
    convention: Convention,
    unknown: str,
) -> Scales:
    """The forward sweep. Raises UnknownOpError naming every op that has no rule and may not, or cannot, be sampled."""
    facts = Scales()
    atoms: dict[tuple[fx.Node, Operand], tuple[str, int, Atom]] = {
        (node, operand): (w.key, i, atom) for w in weights for i, (node, operand, atom) in enumerate(w.uses)
    }
    sampled_weights = {node for w in weights if w.sampled for node, _, _ in w.uses}
    tied = _tied_widths(weights)
    constants = measure_constants(module, flow)
    averages: set[fx.Node] = set()
    failures: list[str] = []
    for node in module.graph.nodes:
        if not flow.signal(node):
            continue
        if node.op == "placeholder":
            facts.scale[node], facts.local[node], facts.status[node] = 1.0, {}, "declared"
            continue
        key, args = arguments(node, module)
        wanted = [(op, n) for op, n in operands(args) if is_float(n) and (flow.signal(n) or flow.weight(n))]
        scales = _operand_scales(node, operands(args), facts, atoms, tied, constants, convention, flow)
        call = Call(
            node,
            args,
            scales,
            axes,
            convention,
            frozenset(op[0] for op, n in wanted if flow.weight(n)),
            frozenset(averages & set(node.all_input_nodes)),
        )
        names = [op for op, _ in wanted]
        local, status, failure = _local(module, call, names, rules, unknown, estimate=node in sampled_weights)
        found = {op: local.of(op) for op in names}
        missing = [str(op[0]) for op, value in found.items() if value is None]
        if failure is None and missing and status != "sampled":
            failure = f"its rule says nothing of operand {', '.join(missing)}"
        if failure is not None:
            failures.append(_failure(node, failure))
        facts.local[node] = {op: value or 0.0 for op, value in found.items()}
        facts.scale[node] = local.scale if convention.tracks_scales else 1.0
        facts.status[node] = status
        if key in SOFTMAX or (call.averages and (key in AVERAGE_KEEPERS or (key in rules and rules[key].view))):
            averages.add(node)
    if failures:
        raise UnknownOpError(
            f"{len(failures)} operation{'s have' if len(failures) > 1 else ' has'} no rule:"
            + "".join(f"\n    {line}" for line in sorted(set(failures))),
            why="the sensitivity of the output to what lies before such an operation would be a guess",
            do="Add a rule (see CONTRIBUTING.md)"
            + (", or pass unknown='sample' to estimate it by running the op." if unknown == "error" else "."),
        )
    return facts


def _local(
    module: fx.GraphModule, call: Call, wanted: Sequence[Operand], rules: RuleTable, unknown: str, *, estimate: bool
) -> tuple[Local, str, str | None]:
    """What is known of one call, with its status; or, third, why nothing is (the sweep goes on with a stand-in)."""
    node = call.node
    if getattr(node.target, "__name__", "") == "getitem":
        return Local(call.scale("arg0"), {"arg0": 1.0}), "exact", None
    key, _ = arguments(node, module)
    computed = key in rules and _computed_matrix(rules[key], call, wanted)
    if key in rules and not estimate and not computed:
        local = _apply(rules[key], call)
        if local is not None:
            return local, rules[key].status, None
    if unknown == "error":
        return Local(1.0, {}), "sampled", "its matrix is computed, not a parameter" if computed else ""
    try:
        return sample(module, call, wanted), "sampled", None
    except SamplingError as error:
        return Local(1.0, {}), "sampled", f"sampling failed: {error}"


def _operand_scales(
    node: fx.Node,
    found: Iterable[tuple[Operand, fx.Node]],
    facts: Scales,
    atoms: Mapping[tuple[fx.Node, Operand], tuple[str, int, Atom]],
    tied: Mapping[str, float],
    constants: Mapping[fx.Node, float],
    convention: Convention,
    flow: Flow,
) -> dict[fx.Node, float]:
    """Scale of each operand of ``node``, masks of integers included; the declared norms of its weights are recorded."""
    found = list(found)
    scales: dict[fx.Node, float] = {n: facts.scale[n] for _, n in found if n in facts.scale}
    others = [scales[n] for _, n in found if n in scales]
    for op, n in found:
        if flow.exogenous(n):
            scales[n] = constants.get(n, _unmeasured(node)) if convention.tracks_scales else 1.0
        elif flow.weight(n):
            key, index, atom = atoms[node, op]
            initial = _declared(atom, tied.get(key), others, convention)
            facts.initial[key, index] = initial
            scales[n] = initial if convention.tracks_scales else 1.0
    return scales


def _computed_matrix(rule: Rule, call: Call, wanted: Sequence[Operand]) -> bool:
    """Whether the matrix of a layer is a signal: the rule speaks of a parameter of norm 1, and a signal has a scale."""
    return any(rule.weights.get(name) in MATRICES and name not in call.weights for name, _ in wanted)


def _apply(rule: Rule, call: Call) -> Local | None:
    """What the rule says, or None where it divides by the scale of an operand that is zero."""
    try:
        return rule.function(call)
    except ZeroDivisionError:
        return None


def _declared(atom: Atom, width: float | None, others: list[float], convention: Convention) -> float:
    if isinstance(atom, Bias | LogitBias):
        return 0.0 if others else 1.0  # a sum of parameters is a source of its own, not a shift
    if isinstance(atom, Table):
        return max(others, default=1.0)
    if isinstance(atom, Embedding) and width:
        return width
    return 1.0


def _unmeasured(node: fx.Node) -> float:
    """Scale of an exogenous operand whose value is not in the graph: nothing when added (a mask), 1 as a factor."""
    return 0.0 if node.target in (aten.add.Tensor, aten.sub.Tensor) else 1.0


def _tied_widths(weights: Sequence[Weight]) -> dict[str, float]:
    """Embeddings to be declared at 1/√d, by key: those tied to a head, and others of the same width."""
    widths = {w.shape[-1] for w in weights if {type(atom).__name__ for _, _, atom in w.uses} >= {"Embedding", "Linear"}}
    return {
        w.key: w.shape[-1] ** -0.5
        for w in weights
        if len(w.shape) == 2 and w.shape[-1] in widths and any(isinstance(atom, Embedding) for _, _, atom in w.uses)
    }


def _failure(node: fx.Node, why: str) -> str:
    """One line of the error: the op, where it is, and why there is no number for it."""
    place = where(node)
    return f"{node.target}" + (f" at {place}" if place else "") + (f"; {why}" if why else "")
