"""`modnorm-fx coverage`: every family has a row, whatever happens to it, and the pages say what the rows say."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from modnorm_fx.models_zoo import build, coverage, coverage_report, from_hf
from modnorm_fx.models_zoo.coverage import Row
from torch import Tensor, nn

from modnorm_fx import ModnormError, cli, convert

NETS = """
import itertools

import torch
from torch import nn

TIMES = itertools.count(1)


class Net(nn.Module):
    pretrained_cfg = {"input_size": (1, 2, 2)}  # says what it takes, as timm's models do

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(self.first(x.flatten(1)))


class Through(torch.autograd.Function):  # its backward reaches what its forward does not use
    @staticmethod
    def forward(ctx, x, mask):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient, (gradient * x).sum(0)


class StraightThrough(Net):
    def __init__(self):
        super().__init__()
        self.mask = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.second(Through.apply(self.first(x.flatten(1)), self.mask))


class Counts(Net):  # every run is another function
    def forward(self, x):
        return super().forward(x) * next(TIMES)


class Two(Net):
    def forward(self, x):
        return torch.zeros(len(x), 3), super().forward(x)


class Broken(Net):
    def forward(self, x):
        raise ZeroDivisionError("no luck")
"""


def quick(spec: str, *_: object) -> Row:
    """What the processes of these tests do: `hang`, `die` and `fail` are the names of families that do."""
    if "hang" in spec:
        time.sleep(60)
    if "die" in spec:
        os.kill(os.getpid(), signal.SIGKILL)
    row = Row(spec, coverage.versions(spec), "done", model=str(os.getpid()), leaves=1, targets=[0.5, 0.5])
    if "fail" in spec:
        row.stage, row.error = "conversion", "UnknownOpError: 1 operation has no rule:\n    aten.magic"
    return row


@pytest.fixture(autouse=True)
def no_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The families of most tests need no library."""
    monkeypatch.setattr(coverage, "_warm_up", lambda specs: None)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "out" / "coverage.work.jsonl"


def cover(specs: list[str], work: Path, **options: Any) -> tuple[dict[str, Row], list[str]]:
    """(row by spec, specs that were made now)"""
    made: list[str] = []

    def watch(row: Row, new: bool) -> None:
        if new:
            made.append(row.spec)

    rows = coverage.cover(specs, work, watch=watch, **{"examine": quick, **options})
    assert [row.spec for row in rows] == specs
    return {row.spec: row for row in rows}, made


# What is covered ------------------------------------------------------------------------------------------------------


def test_every_file_of_timm_that_registers_a_model_has_one() -> None:
    timm = pytest.importorskip("timm")
    covered = {spec.removeprefix("timm:") for spec in coverage.families(hf=False, timm=True)}
    assert covered <= set(timm.list_models())
    for module in timm.list_modules():
        assert covered & set(timm.list_models(module=module)), f"no model of timm.models.{module} is covered"


def test_every_architecture_of_transformers_is_covered_or_part_of_another() -> None:
    transformers = pytest.importorskip("transformers")
    covered = coverage.families(hf=True, timm=False)
    assert {"hf:bert-tiny", "hf:gpt2-tiny", "hf:clip-tiny", "hf:t5-tiny", "hf:mamba-tiny"} <= set(covered)
    assert len(set(covered)) == len(covered)
    known = set(transformers.CONFIG_MAPPING)
    assert {spec.removeprefix("hf:").removesuffix("-tiny") for spec in covered} <= known
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as language_models

    assert {f"hf:{name}-tiny" for name in language_models if name in known} <= set(covered)
    assert "clip_vision_model" not in from_hf.families()  # a part of clip, which is there


# Processes ------------------------------------------------------------------------------------------------------------


def test_every_family_has_a_process_of_its_own(work: Path) -> None:
    rows, _ = cover(["hf:a", "hf:b", "timm:c"], work)
    assert len({row.model for row in rows.values()} | {str(os.getpid())}) == 4


def test_a_family_that_hangs_is_ended(work: Path) -> None:
    start = time.monotonic()
    rows, _ = cover(["hf:hang", "hf:a"], work, timeout=0.5)
    assert time.monotonic() - start < 20
    assert (rows["hf:hang"].stage, rows["hf:a"].stage) == ("timeout", "done")
    assert "not done after 0.5 s" in rows["hf:hang"].error
    assert not rows["hf:hang"].good and rows["hf:a"].good


def test_a_family_that_crashes_costs_one_row(work: Path) -> None:
    rows, _ = cover(["hf:die", "hf:a"], work)
    assert (rows["hf:die"].stage, rows["hf:a"].stage) == ("crash", "done")
    assert not rows["hf:die"].good


def test_one_family_does_not_hold_up_another(work: Path) -> None:
    """No process keeps a pipe of its neighbour: families that are quick are done while one hangs, and saved at once."""
    saved: list[int] = []
    specs = ["hf:hang", *(f"hf:{i}" for i in range(6))]
    rows = coverage.cover(
        specs, work, jobs=2, timeout=1.5, examine=quick, watch=lambda row, new: saved.append(len(coverage.read(work)))
    )
    assert [row.stage for row in rows] == ["timeout", *["done"] * 6]
    assert saved == list(range(1, 8))


def test_a_conversion_survives_a_run_that_hangs(work: Path) -> None:
    def slow(spec: str, tell: coverage.Tell) -> Row:
        row = Row(spec, coverage.versions(spec), "run", leaves=3, targets=[0.5, 0.5])
        tell(row)
        time.sleep(60)
        return row

    (row,) = coverage.cover(["hf:a"], work, timeout=1.0, examine=slow)
    assert (row.stage, row.leaves, row.good) == ("done", 3, True)
    assert row.unchecked == "run with weights: not done after 1 s"


def test_an_interruption_keeps_the_rows_and_ends_the_processes(work: Path, tmp_path: Path) -> None:
    def counted(spec: str, tell: coverage.Tell) -> Row:
        (tmp_path / f"{spec[3:]}.pid").write_text(str(os.getpid()))
        return quick(spec)

    def stop(row: Row, new: bool) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        coverage.cover(["hf:hang", "hf:a", "hf:b"], work, jobs=2, examine=counted, watch=stop)
    assert list(coverage.read(work)) == ["hf:a"]
    if (tmp_path / "hang.pid").exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "hang.pid").read_text()), 0)


# Resuming -------------------------------------------------------------------------------------------------------------


def test_what_is_finished_is_not_done_again(work: Path) -> None:
    cover(["hf:a", "hf:fail"], work)
    rows, made = cover(["hf:a", "hf:fail", "hf:b"], work)
    assert made == ["hf:b"]
    assert rows["hf:fail"].stage == "conversion"
    assert cover(["hf:a"], work, again=True)[1] == ["hf:a"]


def test_another_version_is_another_row(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cover(["hf:a", "timm:b"], work)
    versions = coverage.versions
    newer = {"transformers": "99.0"}
    monkeypatch.setattr(coverage, "versions", lambda spec: {**versions(spec), **(newer if "hf:" in spec else {})})
    assert cover(["hf:a", "timm:b"], work)[1] == ["hf:a"]


def test_rows_survive_the_file(work: Path) -> None:
    rows, _ = cover(["hf:a", "hf:fail"], work)
    assert coverage.read(work) == rows


@pytest.mark.parametrize(
    "left", ['{"spec": "hf:b", "ver', '{"spec": "hf:b"}\n', "[]\n", '{"spec": "hf:b", "old": 1}\n']
)
def test_a_line_that_cannot_be_used_is_made_again(work: Path, left: str) -> None:
    """Cut off by a full disk or a kill, or written by another version of the package."""
    cover(["hf:a"], work)
    with work.open("a") as file:
        file.write(left)
    assert cover(["hf:a", "hf:b"], work)[1] == ["hf:b"]
    assert set(coverage.read(work)) == {"hf:a", "hf:b"}


def test_a_longer_limit_tries_again_what_a_shorter_one_ended(work: Path) -> None:
    assert cover(["hf:hang"], work, timeout=0.3)[1] == ["hf:hang"]
    assert cover(["hf:hang"], work, timeout=0.3)[1] == []
    assert cover(["hf:hang"], work, timeout=0.6)[1] == ["hf:hang"]


def test_doing_some_again_keeps_the_others(work: Path) -> None:
    cover(["hf:a", "hf:b"], work)
    cover(["hf:a"], work, again=True)
    assert set(coverage.read(work)) == {"hf:a", "hf:b"}


def test_a_work_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModnormError, match="Cannot write"):
        coverage.cover(["hf:a"], tmp_path / "file" / "work.jsonl", examine=quick)


# One family, for real -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path


def examined(nets: Path, name: str, work: Path) -> Row:
    spec = f"{nets}:{name}"
    return cover([spec], work, examine=coverage.examine)[0][spec]


def test_a_sound_net_is_good(nets: Path, work: Path) -> None:
    row = examined(nets, "Net", work)
    norm = convert(build(f"{nets}:Net"), (torch.zeros(2, 1, 2, 2),))
    assert row.good and (row.stage, row.error, row.unchecked, row.homeless) == ("done", "", "", [])
    assert (row.model, row.parameters, row.leaves) == ("Net", 4, 4)
    assert row.atoms == {"Linear": 2, "Bias": 2}
    assert row.targets == [min(norm.targets.values()), max(norm.targets.values())]
    assert row.difference is not None and row.difference <= coverage.SAME
    assert row.ops > 0 and row.sampled_ops == 0 and row.megabytes > 0


def test_a_gradient_without_an_atom_is_found(nets: Path, work: Path) -> None:
    row = examined(nets, "StraightThrough", work)
    assert (row.stage, row.homeless, row.unused) == ("done", ["mask"], ["mask"])
    assert not row.good


def test_a_graph_that_computes_something_else_is_found(nets: Path, work: Path) -> None:
    row = examined(nets, "Counts", work)
    assert row.stage == "done" and row.difference is not None and row.difference > coverage.SAME
    assert not row.good


def test_a_model_that_does_not_run_says_why(nets: Path, work: Path) -> None:
    row = examined(nets, "Broken", work)
    assert (row.stage, row.good) == ("inputs", False)
    assert row.error.startswith("CaptureError: ") and "ZeroDivisionError: no luck" in row.error


def test_a_gradient_in_a_part_without_an_atom_is_found() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed, self.head = nn.Parameter(torch.randn(4, 8)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x @ self.packed[:, :4])

    model = Half()
    with pytest.warns(UserWarning, match="Only parts of packed"):
        norm = convert(model, (torch.randn(3, 4),))
    model(torch.randn(3, 4)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert coverage.homeless(gradients, norm) == []  # the other half has none
    assert coverage.homeless({**gradients, "packed": torch.ones(4, 8)}, norm) == ["packed"]


def test_outputs_are_compared_by_name(nets: Path, work: Path) -> None:
    """The first of two outputs of equal shape depends on no parameter, so the graph leaves it out."""
    row = examined(nets, "Two", work)
    assert (row.outputs, row.difference, row.good) == (["[1]"], 0.0, True)


# The pages ------------------------------------------------------------------------------------------------------------

VERSIONS = {"modnorm_fx": "1.2.3", "torch": "4.5.6"}
FINE: dict[str, Any] = {"stage": "done", "leaves": 3, "ops": 100, "targets": [0.1, 0.5], "difference": 0.0}


def rows() -> list[Row]:
    return [
        Row("timm:resnet18", {**VERSIONS, "timm": "7.8"}, **FINE, model="ResNet", seconds=4.0, megabytes=300),
        Row("hf:big-tiny", {**VERSIONS, "transformers": "9.0"}, **FINE, unchecked="not run: 500 million weights"),
        Row("hf:broken-tiny", dict(VERSIONS), "conversion", "UnknownOpError: 2 operations have no rule:\n  magic"),
        Row("hf:differs-tiny", dict(VERSIONS), **{**FINE, "difference": 0.25}),
        Row("hf:guess-tiny", dict(VERSIONS), **FINE, sampled_ops=2, sampled_leaves=["h.0.weight"],
            sampled=["magic at h.0 (a.py:1: f)", "magic at h.1"]),
        Row("hf:idle-tiny", dict(VERSIONS), **FINE, unused=["pooler.weight", "pooler.bias"]),
        Row("hf:lost-tiny", dict(VERSIONS), **FINE, homeless=["mask_embedding"]),
    ]  # fmt: skip


def section(page: str, title: str) -> str:
    return page.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_page_says_what_the_rows_say() -> None:
    page = coverage_report.markdown(rows(), "modnorm-fx coverage")
    head = page.partition("\n## ")[0]
    assert "`modnorm-fx coverage`" in head
    assert all(version in head for version in ("modnorm_fx 1.2.3", "torch 4.5.6", "timm 7.8", "transformers 9.0"))
    assert "| transformers | 6 | 3 | 500 | 2 (0.40%) |" in head
    assert "| timm | 1 | 1 | 100 | 0 (0.00%) |" in head
    bad = section(page, "Not good")
    assert "`hf:broken-tiny`: conversion: UnknownOpError: 2 operations have no rule: magic" in bad
    assert "`hf:differs-tiny`: graph and model differ by 0.25" in bad
    assert "`hf:lost-tiny`: a gradient but no atom: `mask_embedding`" in bad
    assert bad.count("\n- ") == 3
    assert "`hf:guess-tiny`: 2× magic (first at h.0)" in page
    assert "`hf:idle-tiny`: 2: `pooler.weight`, `pooler.bias`" in page
    assert "`hf:big-tiny`: not run: 500 million weights" in page


def test_the_table_has_a_line_for_every_family_and_as_many_cells_in_each() -> None:
    table = section(coverage_report.markdown(rows(), "x"), "Every family").strip().splitlines()
    assert [line.split("`")[1] for line in table[2:]] == sorted(row.spec for row in rows())
    assert len({line.count("|") for line in table}) == 1


def test_the_json_holds_all_rows_in_order_and_is_stable() -> None:
    found = coverage_report.as_json(rows())
    assert [row["spec"] for row in found] == sorted(row.spec for row in rows())
    assert [row["spec"] for row in found if not row["good"]] == ["hf:broken-tiny", "hf:differs-tiny", "hf:lost-tiny"]
    assert json.dumps(found) == json.dumps(coverage_report.as_json(rows()[::-1]))


def test_a_target_that_is_not_positive_and_finite_is_not_good() -> None:
    for target in (0.0, float("inf"), float("nan")):
        assert not Row("hf:a", {}, **{**FINE, "targets": [target, 1.0]}).good


# The command line -----------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = cli.main(["coverage", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = {"hf": ["hf:a-tiny", "hf:b-tiny", "hf:fail-tiny"], "timm": ["timm:c"]}
    monkeypatch.setattr(coverage, "families", lambda *, hf, timm: specs["hf"] * hf + specs["timm"] * timm)
    monkeypatch.setattr(coverage, "cover", partial(coverage.cover, examine=quick))


def test_the_command_writes_both_pages(few: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "coverage.json"
    code, text, _ = run(capsys, "--select", "a-tiny|timm", "--jobs", 2, "--out", out)
    assert code == 0
    assert "2 of 2 families are good" in text
    assert [row["spec"] for row in json.loads(out.read_text())] == ["hf:a-tiny", "timm:c"]
    assert out.with_suffix(".md").read_text().startswith("# ")


def test_a_family_that_fails_fails_the_command(few: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, text, err = run(capsys, "--hf", "--out", tmp_path / "coverage.json")
    assert code == 1
    assert "2 of 3 families are good" in text
    assert "hf:fail-tiny: conversion: UnknownOpError: 1 operation has no rule" in err


@pytest.mark.parametrize(("flag", "specs"), [("--hf", 3), ("--timm", 1), ("--debug", 4)])
def test_libraries_are_chosen_by_flag(
    few: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, flag: str, specs: int
) -> None:
    run(capsys, flag, "--out", tmp_path / "coverage.json")
    assert len(json.loads((tmp_path / "coverage.json").read_text())) == specs


def test_a_narrower_run_keeps_the_other_rows(few: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "coverage.json"
    run(capsys, "--hf", "--select", "a-tiny", "--out", out)
    run(capsys, "--hf", "--select", "b-tiny", "--out", out)
    assert [row["spec"] for row in json.loads(out.read_text())] == ["hf:a-tiny", "hf:b-tiny"]


def test_rows_of_a_published_page_stay_without_its_work_file(
    few: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "coverage.json"
    run(capsys, "--hf", "--select", "a-tiny", "--out", out)
    for left in tmp_path.glob("*.jsonl"):  # a clean clone has the pages only
        left.unlink()
    run(capsys, "--hf", "--select", "b-tiny", "--out", out)
    assert [row["spec"] for row in json.loads(out.read_text())] == ["hf:a-tiny", "hf:b-tiny"]
    assert "**1 more family has not been run**" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize(("pattern", "why"), [("gtp9", "No family matches"), ("(", "not a regular expression")])
def test_a_pattern_that_selects_nothing(
    few: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, pattern: str, why: str
) -> None:
    code, out, err = run(capsys, "--select", pattern, "--out", tmp_path / "coverage.json")
    assert (code, out) == (1, "")
    assert why in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [["--jobs", "0"], ["--jobs", "two"], ["--timeout", "-1"], ["--timeout", "nan"]])
def test_wrong_usage(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["coverage", *argv])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: modnorm-fx")


def test_the_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["coverage", "--help"])
    help_text = capsys.readouterr().out
    for option in ("--hf", "--timm", "--select", "--jobs", "--timeout", "--out", "--again"):
        assert option in help_text


def test_a_family_of_transformers_from_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "coverage.json"
    code, text, _ = run(capsys, "--hf", "--select", "^hf:gpt2-tiny$", "--out", out)
    assert (code, text.splitlines()[0].split(";")[0]) == (0, "1 of 1 families are good")
    (row,) = json.loads(out.read_text())
    model = build("hf:gpt2-tiny", device="meta")
    assert (row["spec"], row["model"], row["parameters"]) == (
        "hf:gpt2-tiny", type(model).__name__, len(list(model.parameters()))
    )  # fmt: skip
    assert sum(row["atoms"].values()) == row["leaves"]
    assert row["atoms"]["Embedding"] == 2 and row["outputs"] == ["logits"] and row["homeless"] == []
