"""How well the warm power iteration knows the spectral norm, over a real training run.

``python benchmarks/power_iteration.py [--steps N] [--out FILE]`` trains a small GPT-2 on the built-in text with
several base optimizers and compares, at every step and for every matrix, the change of the weight with its target:
the optimizer scaled the update by target / estimate, so change / (lr · target) is true / estimate. The true norm is
an SVD. Prints the 1st, 50th and 99th percentile of estimate / true and the extremes, with and without the first
steps, and writes JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from pathlib import Path
from typing import Any

import torch
from modnorm_fx.models_zoo import build, data
from torch.nn import functional as F
from tqdm import trange

import modnorm_fx as mn
from modnorm_fx.atoms import Linear

BASES = {
    "adamw": lambda p: torch.optim.AdamW(p, betas=(0.9, 0.95)),
    "sgd, momentum 0.9": lambda p: torch.optim.SGD(p, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p),
}
EARLY = 10  # steps reported apart
LR = 0.125


def ratios(base: str, steps: int, width: int, layers: int) -> list[list[float]]:
    """Estimate / true per step, for every linear leaf."""
    torch.manual_seed(0)
    text = data.text()
    model = build("hf:gpt2", layers=layers, width=width, vocab=text.vocab, context=64)
    norm = mn.convert(model)
    norm.initialize_(model, torch.Generator().manual_seed(0))
    optimizer = mn.ModularOptimizer(BASES[base](model.parameters()), norm, lr=LR)
    weights = dict(model.named_parameters())
    leaves = [leaf for leaf in norm.leaves if isinstance(leaf.atom, Linear)]
    batches = text.batches("train", 16, 64)
    found = []
    for _ in trange(steps, desc=base, leave=False):
        inputs, wanted = next(batches)
        loss = F.cross_entropy(model(input_ids=inputs, use_cache=False).logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        before = {leaf.weight: weights[leaf.weight].detach().clone() for leaf in leaves}
        optimizer.step()
        row = []
        for leaf in leaves:
            change = leaf.read(weights[leaf.weight].detach() - before[leaf.weight]).double()
            true = math.sqrt(leaf.atom.into / leaf.atom.out) * torch.linalg.svdvals(change)[0].item()
            row.append(LR * leaf.target / true)
        found.append(row)
    return found


def summary(values: list[float]) -> dict[str, float]:
    low, middle, high = (
        torch.tensor(values, dtype=torch.double).quantile(torch.tensor([0.01, 0.5, 0.99]).double()).tolist()
    )
    return {"1%": low, "50%": middle, "99%": high, "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/power_iteration.json"))
    args = parser.parse_args()
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "model": f"hf:gpt2, {args.layers} layers, width {args.width}, {args.steps} steps",
    }
    for base in BASES:
        rows = ratios(base, args.steps, args.width, args.layers)
        parts = {f"first {EARLY} steps": rows[:EARLY], "later steps": rows[EARLY:]}
        result[base] = {name: summary([v for row in part for v in row]) for name, part in parts.items()}
        for name, numbers in result[base].items():
            print(f"{base:18} {name:15} " + "  ".join(f"{k} {v:.4f}" for k, v in numbers.items()), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
