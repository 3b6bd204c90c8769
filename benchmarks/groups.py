"""Which weights move too far, and which not far enough: the loss when the learning rate of one group alone is changed.

    python benchmarks/groups.py hf:gpt2 --width 128 --depth 2 --head-size 32 --lrs 0.25 --factors 0.5 --out FILE

Trains a small model with AdamW in the modular norm, as `modnorm-fx transfer` does, and once for each group of weights
(biases, gains, and matrices of one role, like `h.#.mlp.c_fc.weight`) with that group's learning rate times a factor.
A loss below that of the first row says that the group's target should be multiplied so. Quicker than a sweep, and
unlike it, it tells where to look; a difference smaller than that of two seeds says nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
from pathlib import Path
from typing import Any

import torch
from modnorm_fx.models_zoo.recipes import BETAS
from modnorm_fx.models_zoo.train import train
from modnorm_fx.models_zoo.training import logits_loss
from modnorm_fx.models_zoo.transfer import Plan, Size, begin
from tqdm import tqdm

import modnorm_fx as mn
from modnorm_fx.atoms import Bias

EVERYTHING = "everything as it is"


def groups_of(norm: mn.ModularNorm) -> dict[str, str]:
    """Parameter -> its group."""
    found = {}
    for leaf in norm.leaves:
        role = re.sub(r"\.\d+(?=\.)", ".#", f".{leaf.weight}").removeprefix(".")
        kind = "biases" if isinstance(leaf.atom, Bias) else "gains"
        found[leaf.weight] = role if leaf.atom.is_matrix else kind
    return found


def loss(plan: Plan, lr: float, seed: int, group: str, factor: float) -> float:
    """The final training loss with the learning rate of the group multiplied."""
    size = Size(plan.widths[0], plan.depths[0])
    task, model, made = begin(plan.trial("modnorm-adamw", size, lr, seed))
    norm: mn.ModularNorm = made.norm  # type: ignore[attr-defined]
    member = groups_of(norm)
    held: list[dict[str, Any]] = [{"params": []}, {"params": []}]
    for name, p in model.named_parameters():
        held[member.get(name) == group]["params"].append(p)
    base = torch.optim.AdamW([g for g in held if g["params"]], betas=BETAS, weight_decay=0.0)
    optimizer = mn.ModularOptimizer(base, norm, lr=lr)
    if group in member.values():
        optimizer.param_groups[-1]["lr"] = lr * factor
    curve = train(model, optimizer, task.batches(seed), plan.steps, loss=logits_loss, warmup=plan.warmup)
    return curve.final


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec")
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--head-size", type=int)
    parser.add_argument("--lrs", type=float, nargs="+", required=True)
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5])
    parser.add_argument("--groups", default="", help="a regular expression; default: all")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(
        args.spec, (args.width,), (args.depth,), ("modnorm-adamw",), {}, args.steps, args.batch,
        head_size=args.head_size, warmup=args.warmup,
    )  # fmt: skip
    _, _, made = begin(plan.trial("modnorm-adamw", Size(args.width, args.depth), args.lrs[0], 0))
    names = [name for name in dict.fromkeys(groups_of(made.norm).values()) if re.search(args.groups, name)]  # type: ignore[attr-defined]
    rows = []
    for group, factor in tqdm([(EVERYTHING, 1.0), *((n, f) for n in names for f in args.factors)], leave=False):
        losses = {
            lr: statistics.fmean(loss(plan, lr, seed, group, factor) for seed in range(args.seeds)) for lr in args.lrs
        }
        rows.append({"group": group, "factor": factor, "losses": losses})
        shown = "  ".join(f"lr {lr:g}: {value:.3f}" for lr, value in losses.items())
        tqdm.write(f"{group if factor == 1.0 else f'{group} × {factor:g}':50} {shown}")
    if args.out:
        given = {key: value for key, value in vars(args).items() if key != "out"}
        made_on = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
        args.out.write_text(json.dumps(made_on | given | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
