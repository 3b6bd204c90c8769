"""Pass: the scale of every signal, forward, and with it each op's local sensitivities.

Assumes typed weights. Promises, for every signal node, its expected RMS and, for each of its signal or weight
operands, the change of the node per change of the operand. Under ``paper`` every scale is 1. Weights count as norm 1
by declaration, biases and logit biases as 0 (they start there; 1 in a sum of parameters alone), tables at the scale
of what they are added to or joined with; an embedding that is tied to a head is declared at 1/√d, which is its row
norm when the head has norm 1 (and all embeddings of its width with it: a larger one would drown it), one whose rows
are multiplied by a number right away (√d, in many) at one over that number, which is what the number is for. Last
weights of residual branches are declared at what the convention says for the number of branches of a stream. An op
without a rule is sampled or refused, and so is one whose rule would divide by an operand of scale zero; all refusals
are raised together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from modnorm_fx import weight_atoms
from modnorm_fx.atoms import Atom, Bias, Embedding, Gain, LogitBias, Table
from modnorm_fx.capture import where
from modnorm_fx.conventions import Convention
from modnorm_fx.errors import UnknownOpError
from modnorm_fx.quadrature import Sign
from modnorm_fx.rules import Call, Local, Operand, Rule, RuleTable, arguments, operand_at, operands, shape_of

from .bind_weights import IDENTITY, Affine
from .canonicalize import CASTS, aten, number
from .flow import Flow, is_float
from .masks import masks
from .measure_constants import measure_constants
from .sample import SamplingError, sample
from .type_atoms import Weight

#: roles in which a rule takes an operand for a parameter of norm 1
MATRICES = frozenset(
    {
        weight_atoms.linear,
        weight_atoms.linear_transposed,
        weight_atoms.conv,
        weight_atoms.embedding,
        weight_atoms.gates,
    }
)
#: kind of a region that computes a matrix from parameters
COMPUTED = "computed_weight"
PADS = frozenset({aten.constant_pad_nd.default, aten.pad.default})
#: ops whose output rows are averages, and what keeps them so: copies, masks, and what mixes rows (talking heads) or
#: divides them by their sum
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
AVERAGE_KEEPERS = frozenset(
    {
        *CASTS, aten.dropout.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self,
        aten.where.ScalarOther, aten.where.ScalarSelf, aten.linear.default, aten.addmm.default, aten.conv2d.default,
        aten.mul.Tensor, aten.add.Tensor, *PADS, "shares",
    }
)  # fmt: skip

#: what keeps entries of a running sum, besides views
RUNNING_KEEPERS = frozenset(
    {
        *CASTS, aten.sub.Tensor, aten.neg.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.tril.default,
        aten.triu.default, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.constant_pad_nd.default,
        aten.pad.default, aten.repeat.default, aten.repeat_interleave.self_int, aten.index_select.default,
    }
)  # fmt: skip


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


@dataclass(frozen=True)
class _Use:
    """One use of a weight.

    Attributes:
        key, index: of the weight and the use. atom, affine: its atom, and what is done to it before.
        width: scale that is declared for an embedding, if not 1.
        branch: part of its norm that the convention leaves the last weight of a residual branch.
        heads: what its sensitivity is multiplied by if it makes queries or keys.
    """

    key: str
    index: int
    atom: Atom
    affine: Affine
    width: float | None
    branch: float
    heads: float

    @property
    def factor(self) -> float:
        """What the op's sensitivity to its operand is multiplied by, to be that to the weight as it is stored."""
        return abs(self.affine.factor) * self.heads

    def scale(self, others: list[float]) -> float:
        """The scale that the weight is declared to have where it meets ``others``."""
        if isinstance(self.atom, Bias | LogitBias):
            return 0.0 if others else 1.0  # a sum of parameters is a source of its own, not a shift
        if isinstance(self.atom, Table):
            return max(others, default=1.0)
        if isinstance(self.atom, Embedding) and self.width:
            return self.width
        return 1.0

    def stored(self, declared: float) -> float:
        """Norm of what is stored where the map gives something of the declared norm: ``1 + w`` starts at 0."""
        factor, shift = self.affine
        if isinstance(self.atom, Gain) and shift:
            return max((declared - shift) / factor, 0.0)
        return declared / abs(factor)


@dataclass(frozen=True)
class _Operands:
    """What is known of operands while the sweep goes on; ``facts`` and ``learned``, the nodes that a parameter moves,
    grow with it."""

    facts: Scales
    flow: Flow
    uses: Mapping[tuple[fx.Node, Operand], _Use]
    constants: Mapping[fx.Node, float]
    convention: Convention
    learned: set[fx.Node] = field(default_factory=set)

    def scales(
        self, node: fx.Node, found: Sequence[tuple[Operand, fx.Node]], measured: Mapping[str, float]
    ) -> dict[fx.Node, float]:
        """Scale of each operand of ``node``, masks of integers included (a mask that is added counts as nothing); the
        declared norms of its weights are recorded, those of a computed matrix as they were ``measured``."""
        tracks = self.convention.tracks_scales
        scales: dict[fx.Node, float] = {n: self.facts.scale[n] for _, n in found if n in self.facts.scale}
        masked = masks(node, found, scales, self.learned)
        others = [scales[n] for _, n in found if n in scales and n not in masked]
        scales |= dict.fromkeys(masked, 0.0)
        for op, n in found:
            if self.flow.exogenous(n):
                scales[n] = self.constants.get(n, _unmeasured(node)) if tracks else 1.0
            elif self.flow.weight(n):
                use = self.uses[node, op]
                if op[0] in measured:
                    scale = norm = measured[op[0]]
                else:
                    scale = use.scale(others) * use.branch
                    norm = scale * self.convention.declared(use.atom)
                self.facts.initial[use.key, use.index] = use.stored(norm)
                scales[n] = scale if tracks else 1.0
        if tracks and not _is_empty(node):  # sums over no entries, as of nn.Linear(0, n), are 0
            scales |= {n: 0.0 for n in scales if _is_empty(n)}
        return scales


def _is_empty(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.numel() == 0


def propagate_scales(
    module: fx.GraphModule,
    flow: Flow,
    weights: Sequence[Weight],
    axes: Mapping[fx.Node, frozenset[int]],
    *,
    rules: RuleTable,
    convention: Convention,
    unknown: str,
    signs: Mapping[fx.Node, Sign] = MappingProxyType({}),
    constants: Mapping[fx.Node, float] | None = None,
    branches: Mapping[tuple[str, int], int] = MappingProxyType({}),
    heads: Mapping[tuple[str, int], int] = MappingProxyType({}),
    parts: Mapping[fx.Node, Mapping[Operand, float]] = MappingProxyType({}),
) -> Scales:
    """The forward sweep; ``constants`` as ``measure_constants`` gives them (measured here if left out), ``branches`` as
    ``find_branches`` does, ``heads`` as ``find_heads`` and ``parts`` as ``find_parts`` does.

    Raises UnknownOpError naming every op that has no rule and may not, or cannot, be sampled.
    """
    facts = Scales()
    tied = (_multiplied(weights) if convention.tracks_scales else {}) | _tied_widths(weights)
    uses = {
        (node, operand): _Use(
            w.key, i, atom, w.affine[i] if w.affine else IDENTITY, tied.get(w.key),
            convention.branch(branches.get((w.key, i), 1)), convention.heads(heads.get((w.key, i), 1)),
        )
        for w in weights
        for i, (node, operand, atom) in enumerate(w.uses)
    }  # fmt: skip
    sampled_weights = {node for w in weights if w.sampled for node, _, _ in w.uses}
    known = _Operands(
        facts, flow, uses, measure_constants(module, flow) if constants is None else constants, convention
    )
    known.learned.update(n for n in module.graph.nodes if flow.weight(n))
    averages: set[fx.Node] = set()
    running: set[fx.Node] = set()
    failures: list[str] = []
    for node in module.graph.nodes:
        if not flow.signal(node):
            continue
        if node.op == "placeholder":
            facts.scale[node], facts.local[node], facts.status[node] = 1.0, {}, "declared"
            continue
        key, args = arguments(node, module)
        wanted = [(op, n) for op, n in operands(args) if is_float(n) and (flow.signal(n) or flow.weight(n))]
        measured = args["region"].facts.get("initial", {}) if key == COMPUTED else {}
        call = Call(
            node,
            args,
            known.scales(node, list(operands(args)), measured),
            axes,
            convention,
            frozenset(op for op, n in wanted if flow.weight(n) or _is_computed(n, module)),
            frozenset(averages & set(node.all_input_nodes)),
            signs,
            frozenset(running & set(node.all_input_nodes)),
            parts.get(node, {}),
        )
        names = [op for op, _ in wanted]
        local, status, failure = _local(module, call, names, rules, unknown, estimate=node in sampled_weights)
        found = {op: local.of(op) for op in names}
        missing = [str(op[0]) for op, value in found.items() if value is None]
        if failure is None and missing and status != "sampled":
            failure = f"its rule says nothing of operand {', '.join(missing)}"
        if failure is not None:
            failures.append(_failure(node, failure))
        facts.local[node] = {
            op: (value or 0.0) * (uses[node, op].factor if (node, op) in uses else 1.0) for op, value in found.items()
        }
        facts.scale[node] = local.scale if convention.tracks_scales else 1.0
        facts.status[node] = status
        if status == "sampled" and key in rules:
            for op in _computed_matrices(rules[key], call, names):
                facts.status[_maker(operand_at(args, op), rules)] = status
        if any(n in known.learned and facts.local[node][op] for op, n in wanted):
            known.learned.add(node)
        if key in SOFTMAX or _keeps_averages(key, call, [n for _, n in wanted if flow.signal(n)], rules):
            averages.add(node)
        if node in signs and _is_running(key, [n for _, n in wanted if flow.signal(n)], running, rules):
            running.add(node)
    if failures:
        raise UnknownOpError(
            f"{len(failures)} operation{'s have' if len(failures) > 1 else ' has'} no rule:"
            + "".join(f"\n    {line}" for line in sorted(set(failures))),
            why="the sensitivity of the output to what lies before such an operation would be a guess",
            do="Add a rule (see CONTRIBUTING.md)"
            + (", or pass unknown='sample' to estimate it by running the op." if unknown == "error" else "."),
        )
    return facts


def _keeps_averages(key: Any, call: Call, signals: Sequence[fx.Node], rules: RuleTable) -> bool:
    """Whether the rows of the output are averages: all signals that the op reads are, and it only moves or mixes
    them; or it multiplies them by values of their own (``(softmax(dt) * b) @ x`` averages b·x)."""
    if key is aten.mul.Tensor and len(signals) == 2 and len({shape_of(n) for n in signals}) == 1:
        return sum(n in call.averages for n in signals) == 1
    if key in PADS and (call["value"] or call["mode"] not in (None, "constant")):
        return False  # only zeros leave the sum of a row as it was
    row = rules.get(key)
    kept = key in AVERAGE_KEEPERS or (row is not None and row.view) or getattr(key, "__name__", "") == "getitem"
    return kept and bool(signals) and call.averages.issuperset(signals)


def _is_running(key: Any, signals: Sequence[fx.Node], running: set[fx.Node], rules: RuleTable) -> bool:
    """Whether a value of known sign is a running sum, shows entries of one, or is the difference of two places in one
    (of which the sign would not be known if they lay in two)."""
    row = rules.get(key)
    kept = key in RUNNING_KEEPERS or (row is not None and row.view) or getattr(key, "__name__", "") == "getitem"
    return key is aten.cumsum.default or (kept and bool(signals) and running.issuperset(signals))


def _local(
    module: fx.GraphModule, call: Call, wanted: Sequence[Operand], rules: RuleTable, unknown: str, *, estimate: bool
) -> tuple[Local, str, str | None]:
    """What is known of one call, with its status; or, third, why nothing is (the sweep goes on with a stand-in)."""
    node = call.node
    if getattr(node.target, "__name__", "") == "getitem":
        part = call.part("arg0")
        return Local(call.scale("arg0"), {"arg0": 1.0 if part is None else part}), "exact", None
    key, _ = arguments(node, module)
    computed = key in rules and bool(_computed_matrices(rules[key], call, wanted))
    if key == COMPUTED and "scale" in call["region"].facts:  # what has no atom there counts as a number
        return rules[key].function(call), "sampled" if estimate else rules[key].status, None
    if key in rules and not estimate and not computed:
        local = _apply(rules[key], call)
        if local is not None:
            return local, rules[key].status, None
    if unknown == "error":
        return Local(1.0, {}), "sampled", "its matrix is computed from data" if computed else ""
    try:
        return sample(module, call, wanted), "sampled", None
    except SamplingError as error:
        return Local(1.0, {}), "sampled", f"sampling failed: {error}"


def _computed_matrices(rule: Rule, call: Call, wanted: Sequence[Operand]) -> list[Operand]:
    """Matrices of a layer that are signals: the rule speaks of a parameter of norm 1, and a signal has a scale."""
    return [op for op in wanted if rule.weights.get(op[0]) in MATRICES and op not in call.weights]


def _maker(node: fx.Node, rules: RuleTable) -> fx.Node:
    """What computes a value that is then only seen through views: its weights share the estimate of what uses it."""
    while node.op == "call_function" and (node.target in CASTS or (node.target in rules and rules[node.target].view)):
        node = node.all_input_nodes[0]
    return node


def _is_computed(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether the value is a matrix computed from parameters alone, whose scale is its norm."""
    return node.op == "call_module" and getattr(module.get_submodule(str(node.target)), "kind", "") == COMPUTED


def _apply(rule: Rule, call: Call) -> Local | None:
    """What the rule says, or None where it divides by the scale of an operand that is zero."""
    try:
        return rule.function(call)
    except ZeroDivisionError:
        return None


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


def _multiplied(weights: Sequence[Weight]) -> dict[str, float]:
    """Embeddings whose rows are multiplied by a number and used in no other way, by key: one over the number."""
    found: dict[str, float] = {}
    for w in weights:
        numbers = {_number_after(node) if isinstance(atom, Embedding) else None for node, _, atom in w.uses}
        if len(numbers) == 1 and (c := numbers.pop()):
            found[w.key] = 1 / c
    return found


def _number_after(node: fx.Node) -> float | None:
    """The size of the number that a value is multiplied by, if nothing else reads it."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar) and number(user.args[1]):
            c = abs(float(user.args[1]))
            return c if user.target in (aten.mul.Tensor, aten.mul.Scalar) or not c else 1 / c
        if user.target not in CASTS:
            return None
        node = user
    return None


def _failure(node: fx.Node, why: str) -> str:
    """One line of the error: the op, where it is, and why there is no number for it."""
    place = where(node)
    return f"{node.target}" + (f" at {place}" if place else "") + (f"; {why}" if why else "")
