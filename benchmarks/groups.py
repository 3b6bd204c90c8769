"""Which weights move too far, and which not far enough: the loss when the learning rate of one group alone is changed.

    python benchmarks/groups.py hf:gpt2 --width 128 --depth 2 --head-size 32 --lrs 0.25 --factors 0.5 --out FILE

Trains a small model in the modular norm, as `modnorm-fx transfer` does, and once for each group of weights
(biases, gains, and matrices of one role, like `h.#.mlp.c_fc.weight`) with that group's learning rate times a factor.
A loss below that of the first row says that the group's target should be multiplied so. Quicker than a sweep, and
unlike it, it tells where to look; a difference smaller than that of two seeds says nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import statistics
from pathlib import Path

import torch
from modnorm_fx.models_zoo.recipes import RECIPES
from modnorm_fx.models_zoo.train import evaluate, train
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


def loss(plan: Plan, lr: float, seed: int, group: str, factor: float) -> tuple[float, float]:
    """The final training loss with the learning rate of the group multiplied, and the loss on held-out data."""
    size = Size(plan.widths[0], plan.depths[0])
    task, model, optimizer = begin(plan.trial(plan.recipes[0], size, lr, seed))
    member = groups_of(optimizer.norm)  # type: ignore[attr-defined]
    names = {p: name for name, p in model.named_parameters()}
    chosen = [p for p, name in names.items() if member.get(name) == group]
    if chosen:
        for owner in (optimizer.base, optimizer):  # type: ignore[attr-defined]
            (everything,) = owner.param_groups
            everything["params"] = [p for p in everything["params"] if member.get(names[p]) != group]
        optimizer.add_param_group({"params": chosen, "lr": lr * factor})
    curve = train(model, optimizer, task.batches(seed), plan.steps, loss=logits_loss, warmup=plan.warmup)
    held_out = math.inf if curve.diverged is not None else evaluate(model, task.validation, loss=logits_loss)
    return curve.final, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec")
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--head-size", type=int)
    parser.add_argument("--optimizer", default="modnorm-adamw", choices=[r for r in RECIPES if r.startswith("modnorm")])
    parser.add_argument("--lrs", type=float, nargs="+", required=True)
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5])
    parser.add_argument("--groups", default="", help="a regular expression; default: all")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=0)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(
        args.spec, (args.width,), (args.depth,), (args.optimizer,), {}, args.steps, args.batch,
        head_size=args.head_size, warmup=args.warmup, weight_decay=args.weight_decay,
    )  # fmt: skip
    _, _, made = begin(plan.trial(args.optimizer, Size(args.width, args.depth), args.lrs[0], 0))
    names = [name for name in dict.fromkeys(groups_of(made.norm).values()) if re.search(args.groups, name)]  # type: ignore[attr-defined]
    rows = []
    for group, factor in tqdm([(EVERYTHING, 1.0), *((n, f) for n in names for f in args.factors)], leave=False):
        found = {lr: [loss(plan, lr, seed, group, factor) for seed in range(args.seeds)] for lr in args.lrs}
        losses, held_out = (
            {lr: statistics.fmean(pair[which] for pair in pairs) for lr, pairs in found.items()} for which in (0, 1)
        )
        rows.append({"group": group, "factor": factor, "losses": losses, "held_out": held_out})
        shown = "  ".join(f"lr {lr:g}: {losses[lr]:.4f} ({held_out[lr]:.4f})" for lr in args.lrs)
        tqdm.write(f"{group if factor == 1.0 else f'{group} × {factor:g}':50} {shown}")
    if args.out:
        given = {key: value for key, value in vars(args).items() if key != "out"}
        made_on = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
        args.out.write_text(json.dumps(made_on | given | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
