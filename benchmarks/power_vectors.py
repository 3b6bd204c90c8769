"""How many power vectors a spectral norm needs, by replaying the updates of a training run.

``python benchmarks/power_vectors.py [--steps N] [--out FILE]`` trains a small GPT-2 on the built-in text with several
base optimizers, keeps the update of every matrix at every step, and then estimates their spectral norms by warm block
power iteration with 1 to 8 vectors and one or two passes a step. Prints quantiles of estimate / true (an SVD) after the
first steps, and writes JSON. The last row carries the true norm of the step before over by Frobenius norms.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from modnorm_fx.models_zoo import build, data
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange

import modnorm_fx as mn
from modnorm_fx.atoms import Linear

BASES = {
    "adamw": lambda p: torch.optim.AdamW(p, betas=(0.9, 0.95), weight_decay=0.0),
    "sgd, momentum 0.9": lambda p: torch.optim.SGD(p, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p),
}
EARLY, WARM, LR = 10, 8, 0.125  # steps left out; steps that start converged; learning rate
RECIPES = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 1), (6, 1), (8, 1)]  # (vectors, passes a step)


def updates(base: str, steps: int, width: int, layers: int) -> list[Tensor]:
    """Per shape, the updates ``[matrices, steps, out, in]`` before they are scaled."""
    torch.manual_seed(0)
    text = data.text()
    model = build("hf:gpt2", layers=layers, width=width, vocab=text.vocab, context=64)
    norm = mn.convert(model)
    norm.initialize_(model, torch.Generator().manual_seed(0))
    base_optimizer = BASES[base](model.parameters())
    optimizer = mn.ModularOptimizer(base_optimizer, norm, lr=LR)
    leaves = [leaf for leaf in norm.leaves if isinstance(leaf.atom, Linear)]
    weights = dict(model.named_parameters())
    batches = text.batches("train", 16, 64)
    found: dict[str, list[Tensor]] = defaultdict(list)
    for _ in trange(steps, desc=base, leave=False):
        inputs, wanted = next(batches)
        loss = F.cross_entropy(model(input_ids=inputs, use_cache=False).logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        before = {leaf.weight: weights[leaf.weight].detach().clone() for leaf in leaves}
        optimizer.step()
        for leaf in leaves:  # an update is scaled as a whole: its direction is what is replayed
            change = leaf.read(weights[leaf.weight].detach() - before[leaf.weight])
            found[leaf.key].append(change.mT if leaf.atom.transposed else change)
    shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for changes in found.values():
        shapes[tuple(changes[0].shape)].append(torch.stack(changes))
    return [torch.stack(some) for some in shapes.values()]


def replay(runs: Tensor, true: Tensor, vectors: int, passes: int) -> Tensor:
    """Estimate / true ``[matrices, steps after the first]``."""
    start = torch.linalg.qr(torch.randn(runs.shape[-1], vectors, generator=torch.Generator().manual_seed(0))).Q
    v = start.expand(len(runs), -1, -1)
    ratios = []
    for step in range(runs.shape[1]):
        w = runs[:, step]
        for _ in range(passes if step >= WARM else 16):
            product = w.mT @ torch.linalg.qr(w @ v).Q
            v = product / torch.linalg.vector_norm(product, dim=1, keepdim=True) + 1e-3 * start
        longest = torch.linalg.vector_norm(w, dim=2).amax(1)
        ratios.append(torch.maximum(torch.linalg.matrix_norm(product, 2), longest) / true[:, step])
    return torch.stack(ratios[EARLY:], 1)


def summary(ratios: list[Tensor]) -> dict[str, float]:
    values = torch.cat([r.flatten() for r in ratios]).double()
    quantiles = values.quantile(torch.tensor([0.01, 0.5, 0.99]).double()).tolist()
    return dict(zip(("1%", "50%", "99%"), quantiles, strict=True)) | {"min": values.min().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/power_vectors.json"))
    args = parser.parse_args()
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "model": f"hf:gpt2, {args.layers} layers, width {args.width}, {args.steps} steps",
    }
    for base in BASES:
        runs = updates(base, args.steps, args.width, args.layers)
        true = [torch.linalg.matrix_norm(r.double(), 2).float() for r in runs]
        size = [torch.linalg.matrix_norm(r) for r in runs]
        rows = {
            f"{k} vectors, {passes} passes": summary([replay(r, t, k, passes) for r, t in zip(runs, true, strict=True)])
            for k, passes in RECIPES
        }
        carried = [(t[:, :-1] * s[:, 1:] / s[:, :-1] / t[:, 1:])[:, EARLY:] for t, s in zip(true, size, strict=True)]
        rows["the last norm carried over"] = summary(carried)
        result[base] = rows
        for name, numbers in rows.items():
            print(f"{base:18} {name:28} " + "  ".join(f"{k} {v:.3f}" for k, v in numbers.items()), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
