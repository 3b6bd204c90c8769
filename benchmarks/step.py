"""What a normalised step costs, beside the optimizers that people use.

``python benchmarks/step.py [--nets NAMES] [--device cpu] [--out FILE]`` steps every optimizer on the same weights with
fixed random gradients, all sides in one run, interleaved, and prints medians as ratios to torch's fused AdamW. `floor`
is the time to move AdamW's seven words for each weight at the bandwidth of a copy on the same machine. On a CPU it uses
one thread unless ``--threads`` says otherwise. ``normalize`` is the normaliser alone, on updates in its buffers: what
it adds to an optimizer that is not fused with it (AdamW on a CPU is, where its matrices are).

Sides: ``adamw`` torch's fused AdamW; ``modnorm`` ours on AdamW as ``backend="auto"`` runs it; ``modnorm, unchecked``
the same without a look at all gradients beforehand, as torch's; ``modnorm, no C++`` with torch's own operations;
``modnorm, compile`` and ``modnorm, cudagraph`` the other backends; ``modnorm, triton`` and ``modnorm,
cudagraph-triton`` those with Triton kernels, which compute the update of matrices twice rather than store it, and with
``stored`` the same without that; ``dualize`` the steepest step (Polar Express);
``muon`` torch.optim.Muon on the matrices with AdamW on the rest; ``modula`` its normalisation of the matrices (one step
of power iteration, matrix by matrix), without an optimizer.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from modnorm_fx.models_zoo import build
from torch import nn
from tqdm import tqdm

import modnorm_fx as mn
from modnorm_fx.kernels import cpu
from modnorm_fx.normalizer import COLD_STEPS


class Layers(nn.Module):
    """Equal linear layers, one after the other."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


def layers(count: int, width: int) -> Callable[[], tuple[nn.Module, mn.ModularNorm]]:
    def make() -> tuple[nn.Module, mn.ModularNorm]:
        model = Layers(count, width)
        return model, mn.convert(model, (torch.zeros(2, width),))

    return make


def known(spec: str, **sizes: int) -> Callable[[], tuple[nn.Module, mn.ModularNorm]]:
    def make() -> tuple[nn.Module, mn.ModularNorm]:
        model = build(spec, **sizes)
        return model, mn.convert(model)

    return make


NETS: dict[str, Callable[[], tuple[nn.Module, mn.ModularNorm]]] = {
    "24 x 768": layers(24, 768),
    "192 x 64": layers(192, 64),
    "400 x 128": layers(400, 128),
    "gpt2 124M": known("hf:gpt2"),
    "vit_base": known("timm:vit_base_patch16_224"),
    "resnet50": known("timm:resnet50"),
    "llama 1B": known("hf:llama", layers=16, width=2048),
}
ON_CPU = "24 x 768,192 x 64,400 x 128,gpt2 124M,vit_base,resnet50"


def sides(net: str, device: torch.device, wanted: set[str]) -> Iterator[tuple[str, Callable[[], object], Any]]:
    """(name, one step, the wrapper or None) for each side; every side has weights of its own."""
    cuda = device.type == "cuda"

    def model_of() -> tuple[nn.Module, mn.ModularNorm]:
        torch.manual_seed(0)
        model, norm = NETS[net]()
        model = model.to(device)
        norm = norm.bind(model)
        for leaf in norm.leaves:
            weight = model.get_parameter(leaf.weight)
            if weight.grad is None:
                weight.grad = torch.randn_like(weight)
        return model, norm

    def trained(model: nn.Module) -> list[nn.Parameter]:
        return [p for p in model.parameters() if p.grad is not None]

    def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0, fused=True, capturable=cuda)

    def ours(**options: Any) -> tuple[Callable[[], object], Any]:
        model, norm = model_of()
        opt = mn.ModularOptimizer(adamw(trained(model)), norm, lr=1e-6, weight_decay=0.01, **options)
        return opt.step, opt

    if "adamw" in wanted:
        yield "adamw", torch.optim.AdamW(trained(model_of()[0]), lr=1e-6, fused=True, capturable=cuda).step, None
    if "modnorm" in wanted:
        yield "modnorm", *ours()
        yield "modnorm, unchecked", *ours(nonfinite="unchecked")
    if "no C++" in wanted and not cuda:
        step, opt = ours()
        yield "modnorm, no C++", without_cpp(step), opt
    if "compile" in wanted:
        yield "modnorm, compile", *ours(backend="compile")
    if "cudagraph" in wanted and cuda:
        yield "modnorm, cudagraph", *ours(backend="cudagraph", nonfinite="unchecked")
        for backend, nonfinite in (("triton", "raise"), ("cudagraph-triton", "unchecked")):
            yield f"modnorm, {backend}", *ours(backend=backend, nonfinite=nonfinite)
            step, opt = ours(backend=backend, nonfinite=nonfinite)
            opt._triton_step = lambda normalizer, active: None
            yield f"modnorm, {backend}, stored", step, opt
    if "dualize" in wanted:
        yield "dualize", *ours(mode="dualize")
    if "muon" in wanted:
        model, norm = model_of()
        matrices = [p for p in trained(model) if p.dim() == 2]
        others = [p for p in trained(model) if p.dim() != 2]
        muon = torch.optim.Muon(matrices, lr=1e-6)
        rest = adamw(others) if others else None
        yield "muon", lambda: (muon.step(), rest.step() if rest else None), None
    if "modula" in wanted:
        yield "modula", modula(model_of()[0]), None


@contextlib.contextmanager
def no_cpp() -> Iterator[None]:
    before, cpu.takes = cpu.takes, lambda *tensors: False
    try:
        yield
    finally:
        cpu.takes = before


def without_cpp(step: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with no_cpp():
            step()

    return run


def modula(model: nn.Module) -> Callable[[], object]:
    """modula's normalisation of every matrix: one step of power iteration each, and a division."""
    from modula.atom import Linear

    pairs = []
    for p in model.parameters():
        if p.grad is not None and p.dim() == 2:
            atom = Linear(p.shape[0], p.shape[1])
            atom.initialize(p.device) if hasattr(atom, "initialize") else None
            pairs.append((atom, [p.grad.clone()]))

    def run() -> None:
        for atom, update in pairs:
            atom.normalize(update, target_norm=1.0)

    return run


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy moves (reads and writes)."""
    a = torch.empty(64 * 2**20, device=device)
    b = torch.empty_like(a)
    times = [timed(lambda: b.copy_(a), device) for _ in range(7)]
    return 2 * a.numel() * a.element_size() / statistics.median(times[1:])


def timed(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(net: str, device: torch.device, wanted: set[str], rounds: int) -> dict[str, Any]:
    found, first, wrappers = {}, {}, {}
    for name, step, wrapper in sides(net, device, wanted):
        start = time.perf_counter()
        for _ in range(COLD_STEPS + 3):
            step()
        first[name] = time.perf_counter() - start
        found[name], wrappers[name] = step, wrapper
    if (wrapper := wrappers.get("modnorm")) is not None:  # its parts
        normalizer = wrapper._normalizer
        found["normalize"] = lambda: (normalizer.factors(), normalizer.keep())
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, step in found.items():
            times[name].append(timed(step, device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    weights = 0
    if wrapper is not None:
        weights = sum(buffer.numel() for buffer in wrapper._normalizer.buffers)
    floor = 7 * 4 * weights / bandwidth(device)
    result = {
        "weights": weights,
        "milliseconds": {name: 1e3 * value for name, value in medians.items()},
        "ratio to adamw": {name: value / medians["adamw"] for name, value in medians.items()}
        if "adamw" in medians
        else {},
        "floor, milliseconds": 1e3 * floor,
        "warm-up, seconds": first,
    }
    if wrapper is not None:
        normalizer = wrapper._normalizer
        extra = sum(x.numel() * x.element_size() for x in [*normalizer.buffers, *normalizer.vectors] if x is not None)
        result["extra memory, words per weight"] = extra / 4 / max(weights, 1)
    return result


def show(net: str, result: dict[str, Any]) -> None:
    print(f"\n{net}: {result['weights'] / 1e6:.1f}M weights, floor of AdamW {result['floor, milliseconds']:.2f} ms")
    for name, ms in result["milliseconds"].items():
        ratio = result["ratio to adamw"].get(name, math.nan)
        print(f"  {name:32} {ms:10.2f} ms  {ratio:8.2f} x fused AdamW", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", default=None, help=f"names, separated by commas ({', '.join(NETS)})")
    parser.add_argument("--sides", default="adamw,modnorm,no C++,compile,cudagraph,dualize,muon,modula")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slow-nets", default="24 x 768,192 x 64,400 x 128", help="that dualize and muon step on")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    names = (args.nets or (ON_CPU if device.type == "cpu" else ",".join(NETS))).split(",")
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": args.threads,
        "rounds": args.rounds,
        "C++ kernels": device.type == "cpu" and cpu.available(),
    }
    for net in tqdm(names, desc="nets", leave=False):
        wanted = set(args.sides.split(","))
        if device.type == "cpu" and net not in args.slow_nets.split(","):
            wanted -= {"dualize", "muon", "compile"}
        results[net] = measure(net, device, wanted, args.rounds)
        show(net, results[net])
        torch._dynamo.reset()
    out = args.out or Path(f"benchmarks/results/step_{device.type}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
