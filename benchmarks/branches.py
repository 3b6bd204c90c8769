"""How large the branches of a deep residual stream should be together: the loss of short runs for several choices.

    python benchmarks/branches.py hf:gpt2 --sizes 32,2 32,32 --scales 1 2 inf --lrs 0.25 --out FILE

`conventions.BRANCHES` is the scale of all branches of a stream together, beside a stem of scale 1; `inf` leaves every
branch at scale 1. Trains with AdamW in the modular norm from `initialize_`, as `modnorm-fx transfer` does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path

import torch
from modnorm_fx.models_zoo import transfer
from modnorm_fx.models_zoo.transfer import Plan, Size, run
from tqdm import tqdm

from modnorm_fx import conventions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec")
    parser.add_argument("--sizes", nargs="+", required=True, help="as width,depth")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, float("inf")])
    parser.add_argument("--lrs", type=float, nargs="+", required=True)
    parser.add_argument("--head-size", type=int)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for text in tqdm(args.sizes, leave=False):
        size = Size(*map(int, text.split(",")))
        plan = Plan(
            args.spec, (size.width,), (size.depth,), ("modnorm-adamw",), {}, args.steps, args.batch,
            head_size=args.head_size, warmup=args.warmup,
        )  # fmt: skip
        for scale in args.scales:
            conventions.BRANCHES = scale
            transfer.forget_norms()  # those of another choice
            losses = {
                lr: statistics.fmean(
                    run(plan.trial("modnorm-adamw", size, lr, s)).train_loss for s in range(args.seeds)
                )
                for lr in args.lrs
            }
            rows.append({"width": size.width, "depth": size.depth, "scale": str(scale), "losses": losses})
            shown = "  ".join(f"lr {lr:g}: {value:.3f}" for lr, value in losses.items())
            tqdm.write(f"width {size.width}, depth {size.depth}, branches of {scale:g} together:  {shown}")
    if args.out:
        given = {key: value for key, value in vars(args).items() if key not in ("out", "scales", "sizes")}
        made_on = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
        args.out.write_text(json.dumps(made_on | given | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
