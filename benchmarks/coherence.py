"""How the effects of a step add up over weights: as if they were independent, or all one way?

Trains a small model in the modular norm for some steps. Then the change of every weight in the next step is applied
alone, and that of all weights of a kind in the blocks together; the printed ratio is the RMS change of the output by
all of them over the root of the sum of squares of each alone: 1 if they are independent, √n if n of them agree.

    python benchmarks/coherence.py --out benchmarks/results/coherence.json
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from pathlib import Path

import torch
from modnorm_fx.models_zoo.train import train
from modnorm_fx.models_zoo.training import logits, logits_loss
from modnorm_fx.models_zoo.transfer import Plan, Size, begin
from torch import Tensor, nn

from modnorm_fx.atoms import Bias
from modnorm_fx.norm import ModularNorm

DIGITS = "models_zoo/timm_digits.py"
#: model, width, depths, learning rate, batch, size of heads
MODELS = [
    (f"{DIGITS}:resnet", 8, (1, 8), 0.25, 32, None),
    (f"{DIGITS}:vit", 32, (2, 16), 0.0625, 32, None),
    ("hf:gpt2", 32, (2, 16), 0.125, 16, 32),
    ("hf:llama", 32, (2, 16), 0.25, 16, 32),
]
STEPS = (0, 20)  # trained before the step that is measured


def measure(spec: str, width: int, depth: int, lr: float, batch: int, head: int | None, steps: int) -> dict[str, dict]:
    """Kind of weight -> how many, RMS change of the output by all, by each in quadrature, and their ratio."""
    plan = Plan(spec, (width,), (depth,), ("modnorm-adamw",), {}, max(STEPS) + 1, batch, head_size=head)
    task, model, optimizer = begin(plan.trial("modnorm-adamw", Size(width, depth), lr, 0))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batches = task.batches(0)
    train(model, optimizer, batches, steps, loss=logits_loss, decay=False)
    inputs, labels = next(batches)
    named = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    train(model, optimizer, iter([(inputs, labels)]), 1, loss=logits_loss, decay=False)
    after = {name: p.detach().clone() for name, p in named.items()}

    @torch.no_grad()
    def output(changed: set[str]) -> Tensor:
        for name, p in named.items():
            p.copy_((after if name in changed else before)[name])
        return logits(model, inputs).double()

    model.train()
    start = output(set())
    groups: dict[str, set[str]] = defaultdict(set)
    for name, kind in _kinds(optimizer.norm).items():  # type: ignore[attr-defined]
        groups[kind].add(name)
    found = {}
    for kind, names in sorted(groups.items()):
        together = _rms(output(names) - start)
        apart = math.hypot(*(_rms(output({name}) - start) for name in names))
        found[kind] = {"weights": len(names), "together": together, "quadrature": apart, "ratio": together / apart}
    return found


def _kinds(norm: ModularNorm) -> dict[str, str]:
    """Parameters of the blocks: matrix, bias or gain."""
    return {
        leaf.weight: "matrices" if leaf.atom.is_matrix else "biases" if isinstance(leaf.atom, Bias) else "gains"
        for leaf in norm.leaves
        if re.search(r"layer\d|\.\d+\.", leaf.weight)
    }


def _rms(x: Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for spec, width, depths, lr, batch, head in MODELS:
        for depth in depths:
            for steps in STEPS:
                kinds = measure(spec, width, depth, lr, batch, head, steps)
                rows.append({"model": spec, "width": width, "depth": depth, "steps": steps, "kinds": kinds})
                shown = ", ".join(f"{kind} ({k['weights']}) {k['ratio']:.2f}" for kind, k in kinds.items())
                print(f"{spec}, depth {depth}, after {steps} steps: {shown}", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
