"""The coordinate check: its numbers against forward passes of copies of the model, and what it makes of them."""

from __future__ import annotations

import copy
import io
import json
import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from modnorm_fx.models_zoo import coordcheck, coordcheck_report
from modnorm_fx.models_zoo.training import logits, logits_loss
from modnorm_fx.models_zoo.transfer import Plan, Size, begin
from rich.console import Console
from torch import Tensor, nn

from modnorm_fx.cli import main

LR = 0.25
PLAN = Plan("hf:gpt2", (32, 64), (2, 3), ("modnorm-adamw",), steps=2, batch=2, context=16, seeds=1)
SMALL = Size(32, 2)


def shown(*tables: object) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(*tables)
    return console.file.getvalue()


def rms(x: Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


@pytest.fixture(scope="module")
def measured() -> tuple[list[coordcheck.Coordinate], list[coordcheck.Prediction]]:
    return coordcheck.measure(PLAN, LR, lambda size: None)


def test_outputs_move_as_a_copy_says(measured: tuple[list[coordcheck.Coordinate], object]) -> None:
    task, model, optimizer = begin(PLAN.trial("modnorm-adamw", SMALL, LR, 0))
    batches = list(islice(task.batches(0), 2))
    outputs = []
    for batch in [None, *batches]:
        if batch is not None:
            optimizer.zero_grad()
            logits_loss(model, *batch).backward()
            optimizer.step()
        with torch.no_grad():
            outputs.append(logits(copy.deepcopy(model).eval(), batches[0][0]))
    rows = [one for one in measured[0] if one.module == "lm_head" and one.size == SMALL]
    assert [one.step for one in rows] == [0, 1, 2]
    for one, output in zip(rows, outputs, strict=True):
        assert one.rms == pytest.approx(rms(output), rel=1e-4)
        assert one.change == pytest.approx(rms(output - outputs[0]), rel=1e-4, abs=1e-6)


def test_one_leaf_moves_the_output_as_a_copy_says(measured: tuple[object, list[coordcheck.Prediction]]) -> None:
    task, model, optimizer = begin(PLAN.trial("modnorm-adamw", SMALL, LR, 0))
    inputs, labels = next(task.batches(0))
    moved = copy.deepcopy(model).eval()
    with torch.no_grad():
        start = logits(moved, inputs)
    logits_loss(model, inputs, labels).backward()
    optimizer.step()
    name = "transformer.h.1.attn.c_attn.weight"
    with torch.no_grad():
        part = slice(64, 96)  # the values' columns, at width 32
        step = model.get_parameter(name)[:, part] - moved.get_parameter(name)[:, part]
        moved.get_parameter(name)[:, part] += step
        change = rms(logits(moved, inputs) - start) / rms(start)
    (found,) = [one for one in measured[1] if one.leaf == f"{name}, part 3 of 3" and one.size == SMALL]
    assert found.measured == pytest.approx(change, rel=1e-3)
    assert found.ratio == pytest.approx(1.0, abs=0.02)
    (leaf,) = [leaf for leaf in optimizer.norm.leaves if leaf.key == f"{name}[:, 64:96]"]
    norm = float(torch.linalg.matrix_norm(step, 2))
    assert found.predicted == pytest.approx(leaf.sensitivity * leaf.scale * norm, rel=1e-3)


def test_measuring_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    before = copy.deepcopy(model.state_dict())
    with coordcheck._as_measured(model):
        assert not model[2].training and model[1].training
        x = torch.randn(8, 4)
        normal = model(x)
        torch.testing.assert_close(normal.mean(0), torch.zeros(4), atol=1e-5, rtol=0)  # of the batch, and no dropout
    assert all(module.training for module in model) and model[1].momentum == 0.1
    for name in ("running_mean", "running_var"):
        assert torch.equal(model.state_dict()[f"1.{name}"], before[f"1.{name}"])


def test_blocks_are_taken_together() -> None:
    assert coordcheck.together(["h.0.attn", "h.11.attn", "0.conv1", "1.conv1", "conv1"]) == {
        "h.*.attn": ["h.0.attn", "h.11.attn"],
        "*.conv1": ["0.conv1", "1.conv1"],
        "conv1": ["conv1"],
    }


def test_what_counts_as_level() -> None:
    assert coordcheck.spread([1.0, 1.5, 0.75]) == 2.0
    assert coordcheck.spread([0.0, 0.0]) == 1.0
    assert coordcheck.spread([0.0, 1.0]) == coordcheck.spread([1.0, math.nan]) == math.inf
    rows = [
        coordcheck.Coordinate(module, Size(width, 2), step, 1.0, step * change)
        for module, grows in (("steady", 1.0), ("grows", 4.0))
        for width, change in ((32, 1.0), (64, grows))
        for step in (0, 1)
    ]
    (table,) = coordcheck_report.coordinate_tables(rows)
    steady, grows = (line.rstrip() for line in shown(table).splitlines() if "steady" in line or "grows" in line)
    assert steady.endswith("level") and grows.endswith("×4")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--depths", "2", "--steps", "1", "--seeds", "1", "--batch", "2", "--context", "16"]
    file = tmp_path / "found.json"
    assert main(["coordcheck", "hf:gpt2", "--widths", "32", "64", *options, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "transformer.h.*.mlp.c_fc" in printed and "level" in printed
    assert "transformer.h.*.attn.c_attn.weight, part 3 of 3" in printed
    found = json.loads(file.read_text())
    assert {row["size"]["width"] for row in found["coordinates"]} == {32, 64}
    assert main(["coordcheck", "hf:gpt2", "--widths", "32", *options, "--optimizer", "adamw"]) == 0
    assert "measured over predicted" not in capsys.readouterr().out
