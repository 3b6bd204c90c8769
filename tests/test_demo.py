"""`make demo` in its quick form, its errors, and the training loop under it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modnorm_fx.models_zoo import demo
from modnorm_fx.models_zoo.train import Curve, evaluate, train
from torch import nn

PNG = b"\x89PNG\r\n\x1a\n"


def test_the_quick_demo_leaves_a_picture_a_table_and_falling_losses(tmp_path: Path) -> None:
    out = tmp_path / "new" / "demo"
    command = [sys.executable, "-m", "modnorm_fx.models_zoo.demo", "--quick", "--workers", "1", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr
    assert (out / "loss.png").read_bytes().startswith(PNG)
    for name in ("loss.png", "demo.json", "demo.md", "norm-gpt2-tiny.html"):
        assert (out / name).stat().st_size > 0
        assert str(out / name) in done.stdout, "it does not say where its files are"

    found = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    plan = demo.QUICK
    grid, runs = found["grid"], found["runs"]
    assert [(r["method"], r["lr"], r["seed"]) for r in grid] == [
        (method, lr, seed) for method in plan.lrs for lr in plan.lrs[method] for seed in plan.seeds
    ]
    assert [(r["method"], r["layers"], r["width"]) for r in runs] == [
        (method, size.layers, size.width) for method in plan.lrs for size in plan.sizes
    ]
    for run in grid + runs:
        losses = run["losses"]
        assert len(losses) == plan.steps and all(map(math.isfinite, losses))
        assert run["train_loss"] < losses[0] - 0.5
        assert run["val_loss"] < losses[0] - 0.5
    for method in plan.lrs:
        tried = [r for r in grid if r["method"] == method]
        (lr,) = {r["lr"] for r in runs if r["method"] == method}
        assert lr == min(tried, key=lambda r: r["train_loss"])["lr"], "the lr is not the one that was tuned"

    page = (out / "demo.md").read_text(encoding="utf-8")
    for run in grid + runs:
        assert f"{run['train_loss']:.3f}" in page and f"{run['train_loss']:.3f}" in done.stdout
    assert found["caption"] in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--data", "no/such/file"], "no/such/file cannot be read"), (["--out", "occupied/demo"], "Cannot write to")],
)
def test_what_cannot_work_is_said_at_once(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(demo, "NEEDED", ())
    monkeypatch.chdir(tmp_path)
    Path("occupied").touch()
    assert demo.main(["--quick", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_missing_packages_are_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(demo, "NEEDED", ("torch", "no_such_package", "nor_this_one"))
    assert demo.main(["--quick"]) == 1
    message = capsys.readouterr().err
    assert "needs no_such_package and nor_this_one, which are not installed" in message
    assert "pip install 'modnorm-fx[all]'" in message


# The loop -------------------------------------------------------------------------------------------------------------


def _batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 4, generator=generator), torch.arange(8) % 3) for _ in range(count)]


def test_the_learning_rate_falls_linearly() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.2}], lr=0.4)
    seen: list[tuple[float, float]] = []
    steps: list[int] = []

    def watch(step: int, loss: float) -> None:
        steps.append(step)
        seen.append(tuple(group["lr"] for group in optimizer.param_groups))

    curve = train(model, optimizer, _batches(9), 4, watch=watch)
    assert steps == [1, 2, 3, 4] and len(curve.losses) == 4 and curve.diverged is None
    assert torch.allclose(torch.tensor(seen), torch.tensor([[0.4, 0.2], [0.3, 0.15], [0.2, 0.1], [0.1, 0.05]]))


def test_a_run_stops_at_a_loss_that_is_not_finite() -> None:
    model = nn.Linear(4, 3)
    batches = _batches(5)
    batches[2] = (batches[2][0] * math.nan, batches[2][1])
    curve = train(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, 5)
    assert curve.diverged == 3 and len(curve.losses) == 3 and curve.final == math.inf
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_final_loss_is_the_mean_of_the_last_tenth() -> None:
    assert Curve(tuple(map(float, range(20))), 1.0).final == 18.5
    assert Curve((3.0, 2.0), 1.0).final == 2.0


def test_evaluation_weighs_examples_equally_and_puts_the_mode_back() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9))
    ((inputs, labels),) = _batches(1)
    whole = evaluate(model, [(inputs, labels)])
    assert evaluate(model, [(inputs[:6], labels[:6]), (inputs[6:], labels[6:])]) == pytest.approx(whole)
    assert model.training
