"""The command line, through `main` and once as a process: output, exit codes, and what people read when it fails."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modnorm_fx.models_zoo import build

from modnorm_fx import ModularNorm, __version__, cli, commands, convert, report

TINY = ["--layers", "2", "--width", "16"]
TINY_GPT = ["zoo:gpt", *TINY, "--context", "16"]

USER_FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, x):
        return self.second(self.first(x).relu())

class Described(Net):
    def example_inputs(self):
        return (torch.randn(3, 4),)

class Odd(Net):
    def forward(self, x):
        return super().forward(x[:, :4])

    def example_inputs(self):
        return (torch.randn(3, 5),)

class Named(Net):
    def example_inputs(self):
        return {"x": torch.randn(3, 4)}

class Both(nn.Module):  # sees later tokens
    def __init__(self, vocab=256):
        super().__init__()
        self.token, self.head = nn.Embedding(vocab, 8), nn.Linear(8, vocab)

    def forward(self, tokens):
        x = self.token(tokens)
        return self.head(x + x.mean(1, keepdim=True))

    def example_inputs(self):
        return (torch.zeros(2, 16, dtype=torch.long),)

class Bigram(Both):
    def forward(self, tokens):
        return self.head(self.token(tokens))

def broken():
    raise ZeroDivisionError("no luck")
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def user_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user") / "nets.py"
    path.write_text(USER_FILE)
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


# inspect and explain --------------------------------------------------------------------------------------------------


def test_inspect_prints_the_tree_of_the_model_in_that_size(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "inspect", "zoo:resmlp", "--layers", 5, "--width", 16)
    model = build("zoo:resmlp", layers=5, width=16)
    assert (code, err) == (0, "")
    assert out == report.text(convert(model, model.example_inputs())) + "\n"
    assert "×5 copies of blocks.{0…4}" in out


def test_inspect_writes_files_that_can_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = ["--json", tmp_path / "norm.json", "--html", tmp_path / "tree.html"]
    options = ["--convention", "paper", "--mass", "stacks=5", "--mass", "final=2.5", "--flat"]
    code, out, err = run(capsys, "inspect", "zoo:resmlp", "--width", 16, *files, *options)
    assert code == 0
    norm = ModularNorm.load(tmp_path / "norm.json", build("zoo:resmlp", width=16))
    assert norm.convention.name == "paper"
    assert norm.mass == pytest.approx(1 + 5 + 2.5)
    assert (tmp_path / "tree.html").read_text(encoding="utf-8") == report.html(norm)
    assert out == report.flat(norm) + "\n"
    assert err.splitlines() == [f"wrote {tmp_path / 'norm.json'}", f"wrote {tmp_path / 'tree.html'}"]


def test_inspect_costs_no_memory_for_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """Sixteen terabytes of weights, if they were made."""
    code, out, _ = run(capsys, "inspect", "zoo:resmlp", "--layers", 1, "--width", 1_000_000)
    assert code == 0
    assert "1000000→1000000" in out


@pytest.mark.parametrize("stage", ["capture", "mass", "timing"])
def test_explain_prints_a_stage(capsys: pytest.CaptureFixture[str], stage: str) -> None:
    code, out, err = run(capsys, "explain", "zoo:resmlp", "--width", 16, "--stage", stage)
    assert (code, err) == (0, "")
    assert {"capture": "aten.", "mass": "blocks.2.linears.1.weight", "timing": "fold_tree"}[stage] in out


def test_emit_writes_what_the_norm_generates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["hf:gpt2", "--layers", "1", "--width", "16", "--mode", "dualize", "--dtype", "bfloat16"]
    assert cli.main(["emit", *options, "--out", str(tmp_path / "normalizer.py")]) == 0
    capsys.readouterr()
    assert cli.main(["emit", *options]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "normalizer.py").read_text(encoding="utf-8") == printed
    norm = convert(build("hf:gpt2", layers=1, width=16, device="meta"))
    assert printed == norm.normalizer(dtype=torch.bfloat16, mode="dualize").source


def test_emit_for_a_device_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "emit", *TINY_GPT, "--device", "abacus")
    assert (code, out) == (1, "") and "--device 'abacus' is no device" in err and "defect" not in err


@pytest.mark.parametrize("function", ["Described", "Named"])
def test_a_model_in_a_file_says_its_inputs(capsys: pytest.CaptureFixture[str], user_file: Path, function: str) -> None:
    code, out, _ = run(capsys, "inspect", f"{user_file}:{function}", "--width", 12, "--flat")
    assert code == 0
    assert "first.weight   Linear 4→12" in out


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("hf:gpt3", "hf:gpt2"),
        ("timm:resnet81", "timm:resnet18"),
        ("zoo:gtp", "zoo:gpt"),
        ("gpt2", "hf:NAME"),
        ("missing.py:net", "missing.py"),
    ],
)
def test_a_wrong_name_gets_a_suggestion(capsys: pytest.CaptureFixture[str], spec: str, hint: str) -> None:
    code, out, err = run(capsys, "inspect", spec)
    assert (code, out) == (1, "")
    assert err.startswith("modnorm-fx: error: ") and hint in err
    assert "Traceback" not in err


def test_a_model_without_inputs_is_told_how_to_say_them(capsys: pytest.CaptureFixture[str], user_file: Path) -> None:
    code, _, err = run(capsys, "inspect", f"{user_file}:Net")
    assert code == 1
    assert "example_inputs()" in err


def test_an_error_in_the_users_file_is_shown(capsys: pytest.CaptureFixture[str], user_file: Path) -> None:
    code, _, err = run(capsys, "inspect", f"{user_file}:broken")
    assert code == 1
    assert "ZeroDivisionError: no luck" in err and "Traceback" not in err


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_file_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str) -> None:
    code, _, err = run(capsys, "inspect", "zoo:resmlp", "--width", 16, option, tmp_path / "no" / "file")
    assert code == 1
    assert err.startswith(f"modnorm-fx: error: Cannot write {tmp_path / 'no' / 'file'}.")


@pytest.mark.parametrize(
    "argv",
    [
        ["coordcheck", "zoo:gpt", "--json", "nowhere/file.json"],
        ["coordcheck", "zoo:gpt", "--json", "."],
        ["coordcheck", "zoo:gpt", "--json", "taken/file.json"],
        ["inspect", *TINY_GPT, "--json", "nowhere/file.json"],
        ["inspect", *TINY_GPT, "--html", "."],
        ["emit", *TINY_GPT, "--out", "nowhere/file.py"],
        ["transfer", "zoo:gpt", "--out", "taken"],
        ["transfer", "zoo:gpt", "--out", "taken/deeper"],
        ["coverage", "--out", "taken/coverage.json"],
    ],
    ids=" ".join,
)
def test_places_that_cannot_be_written_are_found_before_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argv: list[str]
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    (tmp_path / "taken").write_text("something of the user's")
    monkeypatch.chdir(tmp_path)
    for module, name in ((commands, "build"), (commands.coordcheck, "measure"), (commands.coverage, "cover")):
        monkeypatch.setattr(module, name, work)
    monkeypatch.setattr(commands.transfer, "sweep", work)
    code, out, err = run(capsys, *argv)
    assert code == 1 and out == ""
    assert "Cannot write" in err and argv[-1].split("/")[0] in err and "defect" not in err
    assert (tmp_path / "taken").read_text() == "something of the user's"
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_file_in_a_folder_that_is_there_is_written_anew(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "norm.json").write_text("old")
    code, _, _ = run(capsys, "inspect", *TINY_GPT, "--json", tmp_path / "norm.json")
    assert code == 0
    assert ModularNorm.load(tmp_path / "norm.json").targets


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without CUDA")
def test_a_device_that_is_not_there_is_no_matter_of_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "train", *TINY_GPT, "--device", "cuda", "--steps", 1)
    assert code == 1
    assert "device='cuda' cannot be used here" in err and "sizes" not in err and "defect" not in err


def test_a_mass_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "inspect", "zoo:resmlp", "--width", 16, "--mass", "finale=2")
    assert code == 1
    assert "'finale'" in err and "'final'" in err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["inspect"],
        ["inspekt", "zoo:gpt"],
        ["inspect", "zoo:gpt", "--layers", "0"],
        ["inspect", "zoo:gpt", "--layers", "two"],
        ["inspect", "zoo:gpt", "--mass", "stacks"],
        ["inspect", "zoo:gpt", "--mass", "stacks=-1"],
        ["inspect", "zoo:gpt", "--mass", "stacks=nan"],
        ["inspect", "zoo:gpt", "--convention", "linear"],
        ["explain", "zoo:gpt"],
        ["explain", "zoo:gpt", "--stage", "everything"],
        ["train", "zoo:gpt", "--optimizer", "magic"],
        ["train", "zoo:gpt", "--lr", "inf"],
        ["transfer", "zoo:gpt", "--optimizers", ""],
        ["transfer", "zoo:gpt", "--optimizers", ","],
    ],
)
def test_wrong_usage_has_its_own_exit_code(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == "" and err.startswith("usage: modnorm-fx")


def test_a_defect_is_one_message_and_a_traceback_only_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("wires crossed")

    monkeypatch.setattr(commands, "build", fail)
    code, out, err = run(capsys, "inspect", "zoo:gpt")
    assert (code, out) == (1, "")
    assert err.startswith("modnorm-fx: error: RuntimeError: wires crossed\n") and "--debug" in err
    with pytest.raises(RuntimeError, match="wires crossed"):
        cli.main(["inspect", "zoo:gpt", "--debug"])


def test_parameters_without_a_norm_are_named_in_the_tree(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, user_file: Path
) -> None:
    (tmp_path / "idle.py").write_text(
        USER_FILE + "\nclass Idle(Described):\n    def forward(self, x):\n        return self.first(x)\n"
    )
    code, out, _ = run(capsys, "inspect", f"{tmp_path / 'idle.py'}:Idle")
    assert code == 0
    assert "unused, so without a norm: second.weight, second.bias" in out


# train ----------------------------------------------------------------------------------------------------------------


def table(out: str) -> dict[str, list[str]]:
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if "train loss" in line)
    assert re.split(" {2,}", lines[head].strip()) == ["lr", "train loss", "val loss", "val accuracy", "s/step"]
    rows = [re.split(" {2,}", line) for line in lines[head + 1 :]]
    return {row[0]: row[1:] for row in rows}


def test_train_learns_to_predict_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "abc.txt").write_text("abcd" * 5000)
    options = ["--data", tmp_path / "abc.txt", "--steps", 40, "--batch", 4, "--compare", "--base-lr", 0.0]
    code, out, err = run(capsys, "train", *TINY_GPT, *options)
    assert (code, err) == (0, "")
    rows = table(out)
    assert list(rows) == ["modular adamw", "plain adamw"]
    assert float(rows["modular adamw"][2]) < 0.2
    assert float(rows["plain adamw"][2]) > math.log(4) - 0.3  # lr 0: no better than a guess among four letters
    assert "40 steps of 4" in out and "abc.txt" in out


def test_train_on_images(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--layers", 1, "--width", 16, "--image-size", 8, "--channels", 1]
    code, out, _ = run(capsys, "train", "zoo:resmlp", *sizes, "--steps", 40, "--batch", 32, "--optimizer", "sgd")
    assert code == 0
    lr, _, loss, accuracy, _ = table(out)["modular sgd"]
    assert float(lr) == 0.5
    assert float(loss) < math.log(10)
    assert float(accuracy.rstrip("%")) > 30


def test_train_repeats_itself(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", 3, "--batch", 2, "--seed", 7, "--mode", "dualize", "--keep-init", "--weight-decay", 0.1]
    results = [table(run(capsys, "train", *TINY_GPT, *options)[1])["modular adamw"][:-1] for _ in range(2)]
    assert results[0] == results[1]
    other = table(run(capsys, "train", *TINY_GPT, *options, "--seed", 8)[1])["modular adamw"][:-1]
    assert other != results[0]


def test_a_run_that_diverges_fails(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--layers", 1, "--width", 16, "--image-size", 8, "--channels", 1]
    code, out, err = run(capsys, "train", "zoo:rescnn", *sizes, "--steps", 30, "--batch", 4, "--lr", 1e30)
    assert code == 1
    assert "diverged at step" in out
    assert "lower --lr" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("Both", "its predictions look at later tokens"),
        ("Described", "its output has shape [16, 4], for labels of shape [16] and 10 classes"),
        ("Odd", "it takes a tensor of shape [3, 5]"),
    ],
)
def test_what_cannot_be_trained(capsys: pytest.CaptureFixture[str], user_file: Path, function: str, why: str) -> None:
    code, _, err = run(capsys, "train", f"{user_file}:{function}", "--steps", 1)
    assert code == 1
    assert "cannot be trained here" in err and why in err


def test_a_causal_model_in_a_file_can_be_trained(capsys: pytest.CaptureFixture[str], user_file: Path) -> None:
    code, out, _ = run(capsys, "train", f"{user_file}:Bigram", "--steps", 2, "--batch", 2)
    assert code == 0
    assert "modular adamw" in table(out)


def test_a_vocabulary_too_small_for_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "train", *TINY_GPT, "--vocab", 8, "--steps", 1)
    assert code == 1
    assert "--vocab 8 is too small" in err


# As a process ---------------------------------------------------------------------------------------------------------


def test_the_process_returns_the_exit_code(tmp_path: Path) -> None:
    code = (
        "import json, sys; from modnorm_fx.cli import main\n"
        "good = main(['explain', 'zoo:resmlp', '--width', '8', '--stage', 'mass'])\n"
        "print(json.dumps([good, main(['inspect', 'x'])]))\n"
        "sys.argv = ['modnorm-fx', '--version']; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert lines[-1] == f"modnorm-fx {__version__}"
    assert json.loads(lines[-2]) == [0, 1]
    assert done.stderr.startswith("modnorm-fx: error: 'x' does not name a model.") and "Traceback" not in done.stderr
