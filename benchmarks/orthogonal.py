"""How near orthogonalisation by matrix products comes to the exact dual, and what it costs.

``python benchmarks/orthogonal.py [--steps N] [--rounds N] [--out FILE]``

Accuracy: Gaussian matrices, singular values spaced from 1 to 1e-4, and updates of a small GPT-2 in training with
several base optimizers. Per method the quantiles of the singular values of the result (1 is exact), of what became of
those that were at least 1e-3 of the largest, and the smallest inner product with the matrix over its nuclear norm.

Times: on one thread, methods in turn, medians of the ratios to the singular value decomposition.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from power_vectors import BASES, EARLY, updates
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, _zeropower_via_newtonschulz

from modnorm_fx import runtime
from modnorm_fx.orthogonal import DEFAULT, SCHEDULES, bounds, orthogonalize, polar_express


def torch_muon(matrices: Tensor) -> Tensor:
    """The function inside torch.optim.Muon (bfloat16, Frobenius norm), matrix by matrix."""
    abc = (DEFAULT_A, DEFAULT_B, DEFAULT_C)
    return torch.stack([_zeropower_via_newtonschulz(m, abc, DEFAULT_NS_STEPS, EPS) for m in matrices])


def exact(matrices: Tensor) -> Tensor:
    return runtime.polar_factor(matrices)[0]


DESIGNS = [(5, 3e-3), (6, 1e-3), (8, 1e-4)]  # (steps, lowest) of polar express, other than the default
METHODS: dict[str, Callable[[Tensor], Tensor]] = {"svd": exact, "torch.optim.Muon": torch_muon}
METHODS |= {name: functools.partial(orthogonalize, schedule=name) for name in SCHEDULES}
METHODS[f"{DEFAULT.name}, bfloat16"] = functools.partial(orthogonalize, dtype=torch.bfloat16)
METHODS |= {
    f"polar express, {steps} steps from {lowest:g}": functools.partial(
        orthogonalize, schedule=polar_express(lowest, steps)
    )
    for steps, lowest in DESIGNS
}
TIMED = ["svd", "torch.optim.Muon", *SCHEDULES, f"{DEFAULT.name}, bfloat16"]
TIMED_SHAPES = [(4, 768, 768), (1, 768, 3072), (192, 64, 64)]


def examples(steps: int) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = {
        f"gaussian {shape[0]}x{shape[1]}x{shape[2]}": [torch.randn(shape, generator=generator)]
        for shape in [(1, 768, 768), (1, 768, 3072), (64, 64, 64)]
    }
    u, v = (torch.linalg.qr(torch.randn(2, 256, 256, generator=generator)).Q for _ in range(2))
    found["singular values 1 to 1e-4, 2x256x256"] = [(u * torch.logspace(0, -4, 256)) @ v]
    for base in BASES:
        runs = updates(base, steps, width=128, layers=2)
        found[f"hf:gpt2, {base}"] = [run[:, EARLY::10].flatten(0, 1) for run in runs]
    return found


def quantiles(values: Tensor) -> dict[str, float]:
    middle = values.double().quantile(torch.tensor([0.01, 0.5]).double()).tolist()
    found = {"min": values.min().item(), "1%": middle[0], "50%": middle[1], "max": values.max().item()}
    return {name: round(value, 6) for name, value in found.items()}


def accuracy(method: Callable[[Tensor], Tensor], batches: list[Tensor]) -> dict[str, Any]:
    results, kept, inner = [], [], []
    for m in batches:
        u, s, vt = torch.linalg.svd(m.double(), full_matrices=False)
        factor = method(m).double()
        results.append(torch.linalg.svdvals(factor).flatten())
        along = (u.mT @ factor @ vt.mT).diagonal(dim1=-2, dim2=-1)  # what each singular value became
        kept.append(along[s >= 1e-3 * s[:, :1]])
        inner.append((factor * m).sum((1, 2)) / s.sum(-1))
    return {
        "all": quantiles(torch.cat(results)),
        "from 1e-3": quantiles(torch.cat(kept)),
        "inner product": round(torch.cat(inner).min().item(), 6),
    }


def ratios(shape: tuple[int, int, int], rounds: int) -> dict[str, float]:
    """Medians over the rounds of the time relative to the SVD's in the same round."""
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in TIMED}
    for done in range(rounds + 1):
        for name in TIMED:
            start = time.perf_counter()
            METHODS[name](m)
            if done:  # the first is warming up
                times[name].append(time.perf_counter() - start)
    relative = {name: [t / svd for t, svd in zip(some, times["svd"], strict=True)] for name, some in times.items()}
    return {name: round(statistics.median(some), 3) for name, some in relative.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/orthogonal.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "model": f"hf:gpt2, 2 layers, width 128, {args.steps} steps",
        "bounds": {name: {"lowest": s.lowest, "interval": bounds(s)} for name, s in SCHEDULES.items()},
        "accuracy": {},
        "time over svd": {},
    }
    for kind, batches in examples(args.steps).items():
        rows = result["accuracy"][kind] = {name: accuracy(method, batches) for name, method in METHODS.items()}
        for name, row in rows.items():
            parts = [
                f"{part} " + " ".join(f"{k} {v:.4f}" for k, v in row[part].items()) for part in ("all", "from 1e-3")
            ]
            print(f"{kind:38} {name:35} {'  '.join(parts)}  inner {row['inner product']:.5f}", flush=True)
    for shape in TIMED_SHAPES:
        times = result["time over svd"]["x".join(map(str, shape))] = ratios(shape, args.rounds)
        print(f"{shape}  " + "  ".join(f"{name} {ratio:.2f}" for name, ratio in times.items()), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
