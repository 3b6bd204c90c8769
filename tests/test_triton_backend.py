"""`backend="triton"` over a training run, on the CPU through Triton's interpreter (which has to be on when triton is
first imported, hence a process of its own)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from fake_norm import Net, backward, norm_of, values
from modnorm_fx import kernels
from modnorm_fx.kernels import cpu, gpu
from modnorm_fx.normalizer import COLD_STEPS
from modnorm_fx.optim import ModularOptimizer

cpu.takes = lambda *tensors: False
calls = dict.fromkeys(("power_products", "scale_apply_", "row_rms", "max_abs"), 0)
for name in calls:
    def counted(*args, name=name, real=getattr(gpu, name), **options):
        calls[name] += 1
        return real(*args, **options)
    setattr(gpu, name, counted)

def train(backend, steps=COLD_STEPS + 6):
    model = Net()
    opt = ModularOptimizer(
        torch.optim.SGD(model.parameters(), momentum=0.9), norm_of(model), lr=0.1, weight_decay=0.1, backend=backend
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for step in range(steps):
        opt.zero_grad()
        backward(model, step)
        opt.step()
        schedule.step()
    return values(model)

wanted = train("eager")
assert not any(calls.values()), calls
found = train("triton")
assert all(calls.values()), calls
for name, w in wanted.items():
    torch.testing.assert_close(found[name], w, rtol=1e-3, atol=1e-4)
assert kernels.triton_for(torch.ones(3)) is None  # off again
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_training_with_triton_kernels_is_training_without() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
