"""Rules for what sums many entries: sums, norms, variances, running sums, scatters, losses, Fourier transforms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from . import weight_atoms as atom_of
from .quadrature import Sign, joint_moments
from .rules import Call, Local, RuleTable, shape_of

__all__ = ["REDUCTIONS"]

aten = torch.ops.aten
REDUCTIONS = RuleTable()

MEAN_OF_HALF = math.sqrt(2 / math.pi)


def _count(call: Call, name: str = "self") -> int:
    """Entries of the operand per entry of the output."""
    return max(1, math.prod(call.shape(name)) // max(1, math.prod(call.shape())))


def _root(call: Call, n: float) -> float:
    """What n independent terms of size 1 add up to."""
    return math.sqrt(n) if call.convention.tracks_scales else float(n)


def _moment(p: float) -> float:
    """E|z|^p of a standard Gaussian."""
    return 2 ** (p / 2) * math.gamma((p + 1) / 2) / math.sqrt(math.pi)


@REDUCTIONS.rule(
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.nansum.default,
    aten.trace.default,
    status="typical",
    source="n independent terms: √n; of one sign, |z|, they add up to n√(2/π)",
)
def total(call: Call) -> Local:
    n = call.shape("self")[0] if call.node.target is aten.trace.default else _count(call)
    root, s = _root(call, n), call.scale("self")
    if call.convention.tracks_scales and call.sign("self") in (Sign.POSITIVE, Sign.NEGATIVE):
        return Local(s * math.hypot(n * MEAN_OF_HALF, math.sqrt(n * (1 - 2 / math.pi))), {"self": root})
    return Local(root * s, {"self": root})


@REDUCTIONS.rule(
    aten.cumsum.default,
    status="typical",
    source="entry i sums i + 1 independent terms, (n + 1)/2 on average; of one sign, |z|, they add up to "
    "(i + 1)√(2/π), of mean square (n + 1)(2n + 1)/6 · 2/π",
)
def running_sum(call: Call) -> Local:
    shape, s = call.shape("self"), call.scale("self")
    n = shape[int(call["dim"])] if shape else 1
    root = _root(call, (n + 1) / 2)
    if call.convention.tracks_scales and call.sign("self") in (Sign.POSITIVE, Sign.NEGATIVE):
        mean = MEAN_OF_HALF * math.sqrt((n + 1) * (2 * n + 1) / 6)
        return Local(s * math.hypot(mean, root * math.sqrt(1 - 2 / math.pi)), {"self": root})
    return Local(root * s, {"self": root})


@REDUCTIONS.rule(
    aten.prod.default,
    aten.prod.dim_int,
    aten.cumprod.default,
    status="typical",
    source="product rule over n independent factors; entry i of the running product has i + 1",
)
def product(call: Call) -> Local:
    s, shape = call.scale("self"), call.shape("self")
    if call.node.target is aten.cumprod.default:
        counts = list(range(1, (shape[int(call["dim"])] if shape else 1) + 1))
    else:
        counts = [_count(call)]
    scale = math.sqrt(sum(s ** (2 * n) for n in counts) / len(counts))
    return Local(scale, {"self": math.sqrt(sum(_root(call, n) ** 2 * s ** (2 * n - 2) for n in counts) / len(counts))})


@REDUCTIONS.rule(
    aten.var.correction, aten.var_mean.correction, status="typical", source="s² of n entries; ‖2(x - m)/n‖ = 2s/√n"
)
def variance(call: Call) -> Local:
    s = call.scale("self")
    return Local(
        s * s, {"self": 2 * s / _root(call, max(1, _count(call) - 1)) if call.convention.tracks_scales else 2.0}
    )


@REDUCTIONS.rule(
    aten.std.correction, aten.std_mean.correction, status="typical", source="s of n entries; ‖(x - m)/(n·s)‖ = 1/√n"
)
def deviation(call: Call) -> Local:
    return Local(
        call.scale("self"),
        {"self": 1 / _root(call, max(1, _count(call) - 1)) if call.convention.tracks_scales else 1.0},
    )


def _norm(call: Call, s: float, n: int, p: float) -> tuple[float, float]:
    """Size of the p-norm of n Gaussian entries, and the size of its gradient."""
    if math.isinf(p) or p <= 0:  # the largest (smallest) entry
        return s * math.sqrt(max(1.0, 2 * math.log(n))), 1.0
    size = s * (n * _moment(p)) ** (1 / p)
    return size, math.sqrt(n * _moment(2 * p - 2)) * (s / size) ** (p - 1) if 2 * p > 1 else 1.0


@REDUCTIONS.rule(
    aten.linalg_vector_norm.default,
    aten.norm.Scalar,
    aten.norm.ScalarOpt_dim,
    aten.dist.default,
    status="typical",
    source="(n·E|z|^p)^(1/p)·s, its gradient x|x|^(p-2)/‖x‖^(p-1): √n·s and 1 for p = 2",
)
def vector_norm(call: Call) -> Local:
    order = call["ord"] if "ord" in call.args else call["p"]
    p = 2.0 if order is None else float(order)
    if call.is_tensor("other"):
        scale, slope = _norm(
            call, math.hypot(call.scale("self"), call.scale("other")), math.prod(call.shape("self")), p
        )
        return Local(scale, {"self": slope, "other": slope})
    scale, slope = _norm(call, call.scale("self"), _count(call), p)
    return Local(scale, {"self": slope})


@REDUCTIONS.rule(
    aten.cdist.default,
    aten._cdist_forward.default,
    aten.pdist.default,
    aten._pdist_forward.default,
    status="typical",
    source="the p-norm of a difference of two rows of n entries, as of one of size √(a² + b²)",
)
def distances(call: Call) -> Local:
    p = float(call["p"])
    if "x1" not in call.args:
        scale, slope = _norm(call, math.sqrt(2) * call.scale("self"), call.shape("self")[-1], p)
        return Local(scale, {"self": math.sqrt(2) * slope})
    scale, slope = _norm(call, math.hypot(call.scale("x1"), call.scale("x2")), call.shape("x1")[-1], p)
    return Local(scale, {"x1": slope, "x2": slope})


@REDUCTIONS.rule(
    aten.logsumexp.default,
    status="typical",
    source="log n + s²/2, at most the largest entry; its gradient is a softmax row, ‖·‖ = exp(s²/2)/√n, at most 1",
)
def log_sum_exp(call: Call) -> Local:
    s, n = call.scale("self"), _count(call)
    if not call.convention.tracks_scales:
        return Local(1.0, {"self": 1.0})
    scale = math.log(n) + min(s * s / 2, s * math.sqrt(2 * math.log(max(n, 2))))
    return Local(max(scale, s / math.sqrt(n)), {"self": math.exp(min(0.0, s * s / 2 - math.log(n) / 2))})


@REDUCTIONS.rule(
    aten.logcumsumexp.default, status="declared", source="close to the largest entry so far, whose change passes"
)
def running_log_sum_exp(call: Call) -> Local:
    shape = call.shape("self")
    return Local(call.scale("self") + math.log((shape[int(call["dim"])] + 1) / 2 if shape else 1), {"self": 1.0})


@REDUCTIONS.rule(
    aten.index_add.default,
    aten.scatter_add.default,
    aten.index_put.default,
    aten.scatter_reduce.two,
    aten.index_reduce.default,
    aten.segment_reduce.default,
    aten.put.default,
    status="typical",
    source="m terms fall on each entry, as many as there are entries per place: √m; one of them where they are "
    "averaged, picked or written over, in as many places as there are",
)
def scatter_sum(call: Call) -> Local:
    name = next(n for n in ("source", "src", "values", "data") if call.is_tensor(n))
    alpha = 1.0 if call["alpha"] is None else abs(float(call["alpha"]))
    share = math.prod(call.shape(name)) / max(1, math.prod(call.shape()))
    how = call["reduce"] or ("sum" if call["accumulate"] is not False else "written")
    s = call.scale("self") if call.is_tensor("self") else 0.0
    if how == "sum":
        m = alpha * _root(call, share)
        return Local(call.convention.add((s, m * call.scale(name))), {"self": 1.0, name: m})
    if how == "written":
        return _written(call, name, min(1.0, share))
    return Local(max(s, call.scale(name)), {"self": 1.0, name: 1.0})


@REDUCTIONS.rule(
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.diagonal_scatter.default,
    aten.as_strided_scatter.default,
    aten.scatter.src,
    aten.index_copy.default,
    status="declared",
    weights={"self": atom_of.table, "src": atom_of.table},
    source="a share f of the entries is written over: RMS of the whole; √f of what is written along features, in "
    "steps of a loop or at some of the places of a signal; else the position counts that moves most",
)
def write(call: Call) -> Local:
    name = "src" if "src" in call.args else "source"
    return _written(call, name, min(1.0, math.prod(call.shape(name)) / max(1, math.prod(call.shape("self")))))


#: op -> what is written over some entries of ``self``
WRITES: dict[Any, str] = {
    aten.slice_scatter.default: "src", aten.select_scatter.default: "src", aten.diagonal_scatter.default: "src",
    aten.scatter.src: "src", aten.index_copy.default: "source", aten.index_put.default: "values",
}  # fmt: skip
#: tensors that hold nothing yet
EMPTY = frozenset(
    {
        aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.empty.memory_format,
        aten.empty_like.default, aten.new_empty.default,
    }
)  # fmt: skip


def _was_empty(write: fx.Node) -> bool:
    """Whether there was nothing in the places that are written: those of the steps of a loop, of an expert each. So it
    is taken to be where a tensor starts empty, no place is given twice or read before it is written, and no more is
    written than it has entries."""
    entries, places = 0, []
    node: Any = write
    while node.target in WRITES:
        schema = node.target._schema.arguments
        args = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
        before, source = args.pop("self"), args.pop(WRITES[node.target])
        if args.get("accumulate") or _reads(source, before):
            return False
        entries += math.prod(shape_of(source))
        places.append(repr(args))
        node = before
    once = len(places) == len(set(places))
    return node.target in EMPTY and once and entries <= math.prod(shape_of(write))


def _reads(node: Any, source: Any) -> bool:
    """Whether ``node`` is computed from ``source``."""
    todo, seen = [node], {node}
    while todo and source not in seen:
        node = todo.pop()
        before = node.args[1:2] if node.target is aten.copy.default else node.all_input_nodes  # what was there is gone
        new = {n for n in before if n >= source and n not in seen}
        seen |= new
        todo += new
    return source in seen


def _written(call: Call, name: str, share: float) -> Local:
    if not call.convention.tracks_scales:
        return Local(1.0, {"self": 1.0, name: 1.0})
    left = 1.0 if _was_empty(call.node) else 1 - share
    scale = math.sqrt(left * call.scale("self") ** 2 + share * call.scale(name) ** 2)
    dim, rank = call["dim"], len(call.shape())
    along_features = dim is not None and int(dim) % rank in call.features.get(call.node, frozenset())
    parts = along_features or call.node.target is aten.select_scatter.default or call.part(name) is not None
    kept = math.sqrt(1 - share) if along_features or call.part("self") is not None else float(share < 1)
    return Local(scale, {"self": kept, name: math.sqrt(share) if parts else 1.0})


@REDUCTIONS.rule(
    aten.col2im.default,
    aten.unfold_backward.default,
    status="typical",
    source="overlapping windows are added: m entries fall on each place, √m",
)
def fold(call: Call) -> Local:
    name = "self" if "self" in call.args else "grad_in"
    root = _root(call, math.prod(call.shape(name)) / math.prod(call.shape()))
    return Local(root * call.scale(name), {name: root})


@REDUCTIONS.rule(
    aten.embedding_bag.default,
    aten.embedding_bag.padding_idx,
    aten._embedding_bag.default,
    status="typical",
    weights={"weight": atom_of.embedding},
    source="n rows per bag: their average moves as they do, their sum has √n",
)
def embedding_bag(call: Call) -> Local:
    n = math.prod(call.shape("indices")) / max(1, call.shape()[0])
    root, s = (_root(call, n) if int(call["mode"] or 0) == 0 else 1.0), call.scale("weight")
    weights = call.scale("per_sample_weights") if call.is_tensor("per_sample_weights") else 1.0
    return Local(root * weights * s, {"weight": root * weights * s, "per_sample_weights": root * s})


ELEMENTWISE_LOSS = "quadrature of the loss of one entry; an average of parts that move alike, or their sum"


@REDUCTIONS.rule(
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.soft_margin_loss.default,
    aten.binary_cross_entropy_with_logits.default,
    aten.binary_cross_entropy.default,
    status="declared",
    source=ELEMENTWISE_LOSS,
)
def elementwise_loss(call: Call) -> Local:
    op: Any = call.node.target
    extra = {name: call[name] for name in ("beta", "delta") if name in call.args}
    one: Callable[..., Any] = lambda a, b: op(a, b, reduction=0, **extra)  # noqa: E731
    one = {aten.binary_cross_entropy.default: _binary_cross_entropy, aten.soft_margin_loss.default: _soft_margin}.get(
        op, one
    )
    mean, rms, (a, b) = joint_moments(one, (call.scale("self"), call.scale("target")))
    reduction = int(call["reduction"])
    n = math.prod(call.shape("self")) if reduction == 2 else 1
    return Local(n * (abs(mean) if reduction else rms), {"self": n * a, "target": n * b})


def _binary_cross_entropy(p: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of a probability p; elsewhere not a number."""
    return -(target * p.log() + (1 - target) * (1 - p).log())


def _soft_margin(x: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.softplus(-x * sign)


@REDUCTIONS.rule(
    aten.nll_loss_forward.default,
    aten.nll_loss2d_forward.default,
    status="declared",
    source="picks an entry of each row; " + ELEMENTWISE_LOSS,
)
def picked_loss(call: Call) -> Local:
    n = math.prod(call.shape("target")) if int(call["reduction"]) == 2 else 1
    return Local(n * call.scale("self"), {"self": float(n)})


@REDUCTIONS.rule(
    aten.ctc_loss.Tensor, aten.ctc_loss.IntList, status="declared", source="minus a sum of one log-probability per step"
)
def sequence_loss(call: Call) -> Local:
    steps = call.shape("log_probs")[0]
    return Local(steps * call.scale("log_probs"), {"log_probs": float(steps)})


@REDUCTIONS.rule(
    aten._fft_r2c.default,
    aten._fft_c2c.default,
    aten._fft_c2r.default,
    status="typical",
    source="√n times an isometry, over n points; complex sizes are those of the modulus; norms divide by √n or n",
)
def fourier(call: Call) -> Local:
    whole = call.shape() if call.node.target is aten._fft_c2r.default else call.shape("self")
    n = math.prod(whole[axis] for axis in call["dim"])
    factor = math.sqrt(n) / (1.0, math.sqrt(n), float(n))[int(call["normalization"])]
    return Local(factor * call.scale("self"), {"self": factor})
