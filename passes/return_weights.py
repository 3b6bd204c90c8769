"""Pass (rewrite): a weight that the model returns gets a use, as an output of its own.

The logarithm of a policy's deviation, a temperature, a table of codes: no layer reads them on the way to the output,
and what a graph returns is a signal.

Assumes the flow. Promises the same outputs.
"""

from __future__ import annotations

from torch import fx

from modnorm_fx.slices import returned

from .flow import Flow


def return_weights(module: fx.GraphModule, flow: Flow) -> int:
    """Rewrites ``module`` in place and returns how many weights it returns. ``flow`` is stale afterwards."""
    output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    weights = [n for n in output.all_input_nodes if flow.weight(n)]
    for weight in weights:
        with module.graph.inserting_before(output):
            node = module.graph.call_function(returned, (weight,))
        node.meta = dict(weight.meta)
        output.replace_input_with(weight, node)
    return len(weights)
