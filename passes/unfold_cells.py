"""Pass (rewrite): one step of a recurrent layer, which ATen keeps as one op, becomes its equations.

``nn.LSTMCell``, ``nn.GRUCell`` and ``nn.RNNCell`` are called once per time step by a loop in the model. Written out,
each gate is a linear layer of its own that all later passes know (``split_packed`` then cuts the weights by gate), and
the two states of an LSTM have scales of their own. A whole layer over time (``nn.LSTM``) has a rule instead, because
its loop is as long as the sequence.

Assumes a functional ATen graph. Promises the same outputs, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from modnorm_fx.rules import arguments

from .canonicalize import aten, shape

Write = Callable[..., fx.Node]


def unfold_cells(module: fx.GraphModule) -> int:
    """Rewrites ``module`` in place and returns how many cells were written out."""
    cells = [node for node in module.graph.nodes if node.op == "call_function" and node.target in CELLS]
    for node in cells:
        _, args = arguments(node, module)
        with module.graph.inserting_before(node):
            new = CELLS[node.target](_writer(node), args)
        if isinstance(new, fx.Node):
            node.replace_all_uses_with(new)
        else:
            for pick in list(node.users):
                place: Any = pick.args[1]
                pick.replace_all_uses_with(new[place])
                module.graph.erase_node(pick)
        module.graph.erase_node(node)
    return len(cells)


def _writer(node: fx.Node) -> Write:
    """Inserts calls into the graph, each with its value and the place of ``node`` in the user's code."""

    def write(target: Any, *args: Any) -> fx.Node:
        made = node.graph.call_function(target, args)
        made.meta = dict(node.meta) | {"val": target(*fx.map_arg(args, lambda n: n.meta["val"]))}
        return made

    return write


def _gates(write: Write, args: dict[str, Any], side: str, x: fx.Node, count: int) -> list[fx.Node]:
    """What the input (``ih``) or the state (``hh``) adds to the pre-activation of every gate."""
    whole = write(aten.linear.default, x, args[f"w_{side}"], args[f"b_{side}"])
    width = shape(whole)[1] // count
    return [write(aten.slice.Tensor, whole, 1, i * width, (i + 1) * width) for i in range(count)]


def _both(write: Write, args: dict[str, Any], h: fx.Node, count: int) -> tuple[list[fx.Node], list[fx.Node]]:
    return _gates(write, args, "ih", args["input"], count), _gates(write, args, "hh", h, count)


def _lstm(write: Write, args: dict[str, Any]) -> tuple[fx.Node, fx.Node]:
    """``c' = σ(f) c + σ(i) tanh(g)``, ``h' = σ(o) tanh(c')``."""
    h, c = args["hx"]
    i, f, g, o = (write(aten.add.Tensor, x, u) for x, u in zip(*_both(write, args, h, 4), strict=True))
    i, f, o = (write(aten.sigmoid.default, gate) for gate in (i, f, o))
    kept, new = write(aten.mul.Tensor, f, c), write(aten.mul.Tensor, i, write(aten.tanh.default, g))
    c = write(aten.add.Tensor, kept, new)
    return write(aten.mul.Tensor, o, write(aten.tanh.default, c)), c


def _gru(write: Write, args: dict[str, Any]) -> fx.Node:
    """``n = tanh(W_n x + σ(r) U_n h)``, ``h' = σ(-z) n + σ(z) h``, where σ(-z) is 1 - σ(z)."""
    h = args["hx"]
    (xr, xz, xn), (ur, uz, un) = _both(write, args, h, 3)
    r = write(aten.sigmoid.default, write(aten.add.Tensor, xr, ur))
    z = write(aten.add.Tensor, xz, uz)
    n = write(aten.tanh.default, write(aten.add.Tensor, xn, write(aten.mul.Tensor, r, un)))
    new = write(aten.mul.Tensor, write(aten.sigmoid.default, write(aten.neg.default, z)), n)
    return write(aten.add.Tensor, new, write(aten.mul.Tensor, write(aten.sigmoid.default, z), h))


def _rnn(function: Any) -> Callable[[Write, dict[str, Any]], fx.Node]:
    """``h' = f(W x + U h)``."""

    def cell(write: Write, args: dict[str, Any]) -> fx.Node:
        (x,), (u,) = _both(write, args, args["hx"], 1)
        return write(function, write(aten.add.Tensor, x, u))

    return cell


CELLS: dict[Any, Callable[[Write, dict[str, Any]], Any]] = {
    aten.lstm_cell.default: _lstm,
    aten.gru_cell.default: _gru,
    aten.rnn_tanh_cell.default: _rnn(aten.tanh.default),
    aten.rnn_relu_cell.default: _rnn(aten.relu.default),
}
