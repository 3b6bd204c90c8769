"""The sweep over learning rates and sizes: what it runs, what it keeps, and what it says of the runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from modnorm_fx.models_zoo import build, transfer, transfer_report
from modnorm_fx.models_zoo.recipes import RECIPES, Setting
from modnorm_fx.models_zoo.train import schedule
from modnorm_fx.models_zoo.training import logits_loss
from modnorm_fx.models_zoo.transfer import Plan, Run, Size, Trial, check, run
from torch.optim.lr_scheduler import ConstantLR, LinearLR, SequentialLR

from modnorm_fx import convert
from modnorm_fx.errors import FormatError, ModnormError

PLAN = Plan("hf:gpt2", (64, 128), (2, 4), ("adamw",), {"adamw": (0.25, 0.5, 1.0)}, seeds=2)


def ran(trial: Trial, best: float, floor: float = 2.0) -> Run:
    """A run whose loss is a parabola of log2 lr."""
    loss = floor + 0.1 * (math.log2(trial.lr) - best) ** 2
    return Run(trial, loss, loss + 0.1, (3.0, loss), 1000 * trial.width * trial.depth, 1.0, "2.0")


def everything(plan: Plan, best: dict[Size, float], before: Iterable[Run] = ()) -> list[Run]:
    """All that the plan asks for, run to the end."""
    runs: dict[Trial, Run] = {one.trial: one for one in before}
    for recipe in plan.recipes:
        while missing := transfer._wanted(plan, recipe, runs):
            runs |= {trial: ran(trial, best[trial.size]) for trial in missing}
    return list(runs.values())


def test_sizes_are_a_star_or_a_grid() -> None:
    star = [Size(64, 2), Size(64, 4), Size(128, 2)]
    assert PLAN.sizes() == star
    assert set(Plan("x", (64, 128), (2, 4), (), full=True).sizes()) == {*star, Size(128, 4)}


def test_the_grid_grows_while_the_best_lies_at_its_end_and_the_small_models_rate_is_run_everywhere() -> None:
    runs = everything(PLAN, {Size(64, 2): 2.0, Size(64, 4): -1.0, Size(128, 2): -1.0})
    tried = {size: set(transfer.mean_losses(runs, "adamw", size)) for size in PLAN.sizes()}
    assert tried[Size(64, 2)] == {0.25, 0.5, 1.0, 2.0, 4.0, 8.0}  # one past the best
    assert tried[Size(64, 4)] == {0.25, 0.5, 1.0, 4.0}
    assert {run.trial.seed for run in runs} == {0, 1}


def test_with_more_seeds_the_best_rate_has_all_of_them_also_where_the_grid_had_grown() -> None:
    best = {Size(64, 2): 2.0, Size(64, 4): -4.0, Size(128, 2): 1.0}
    runs = everything(PLAN, best, everything(replace(PLAN, seeds=1), best))
    for size, lr in best.items():
        assert transfer.chosen_lr(transfer.mean_losses(runs, "adamw", size)) == 2.0**lr
        assert {run.trial.seed for run in runs if run.trial.size == size and run.trial.lr == 2.0**lr} == {0, 1}


@pytest.mark.parametrize("other", [{"steps": 7}, {"weight_decay": 0.1}, {"seeds": 3}], ids=str)
def test_runs_of_other_plans_in_the_file_choose_nothing(other: dict[str, float]) -> None:
    best, elsewhere = ({size: lr for size in PLAN.sizes()} for lr in (-1.0, 3.0))
    before = [one for one in everything(replace(PLAN, **other), elsewhere) if not PLAN.covers(one.trial)]
    runs = [one for one in everything(PLAN, best, before) if PLAN.covers(one.trial)]
    assert before and {one.trial for one in runs} == {one.trial for one in everything(PLAN, best)}


def test_regret_and_drift_of_parabolas() -> None:
    best = {Size(64, 2): -1.0, Size(64, 4): -1.0, Size(128, 2): -2.25}
    found = {row.size: row for row in transfer_report.rows(everything(PLAN, best))}
    assert found[Size(64, 2)].small_lr == 0.5 and found[Size(64, 2)].regret == 0
    assert found[Size(64, 4)].drift == pytest.approx(0.0)
    wide = found[Size(128, 2)]
    assert wide.best_lr == 0.25
    assert wide.drift == pytest.approx(-1.25)  # the lowest point of the parabola, between the rates tried
    assert wide.regret == pytest.approx(0.1 * (1.25**2 - 0.25**2))


def test_runs_are_kept_as_lines_and_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    runs = [ran(trial, -1.0) for trial in PLAN.trials("adamw", Size(64, 2), (0.5, 1.0))]
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(run.line() + "\n" for run in runs) + runs[0].line()[:40])
    assert transfer.read(path) == runs
    diverged = Run(runs[0].trial, math.inf, math.inf, (), 1, 1.0, "2.0")
    assert Run.from_line(diverged.line()) == diverged
    with pytest.raises(FormatError, match="is not a run"):
        Run.from_line('{"trial": {}}')


def test_the_report_holds_its_pictures(tmp_path: Path) -> None:
    runs = everything(PLAN, {size: -1.0 for size in PLAN.sizes()})
    page, text, picture = transfer_report.write(runs, tmp_path, "modnorm-fx transfer hf:gpt2")
    assert "data:image/png;base64," in page.read_text() and "width 128, depth 2" in page.read_text()
    assert "modnorm-fx transfer hf:gpt2" in text.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    plan = Plan("hf:gpt2", (32,), (1,), ("adamw",), {"adamw": (0.001, 0.002, 0.004)}, 2, 2, 8, seeds=1)
    path = tmp_path / "runs.jsonl"
    done = [ran(trial, math.log2(0.002)) for trial in plan.trials("adamw", Size(32, 1), (0.001, 0.002))]
    path.write_text("".join(run.line() + "\n" for run in done))
    new: list[Trial] = []
    runs = transfer.sweep(plan, path, jobs=1, watch=lambda run, *_: new.append(run.trial) if run else None)
    assert [trial.lr for trial in new][:1] == [0.004]
    assert transfer.read(path)[:2] == done and set(done) < set(runs)
    assert all(math.isfinite(run.train_loss) for run in runs)


def test_the_report_has_the_recipes_in_the_order_they_were_asked_for(tmp_path: Path) -> None:
    grid = (0.001, 0.002, 0.004)
    plan = Plan("hf:gpt2", (32,), (1,), ("mup", "adamw"), {"adamw": grid, "mup": grid}, 2, 2, 8, seeds=1)
    path = tmp_path / "runs.jsonl"
    old = [ran(t, math.log2(0.002)) for recipe in ("adamw", "mup") for t in plan.trials(recipe, Size(32, 1), grid)]
    path.write_text("".join(run.line() + "\n" for run in old))
    runs = transfer.sweep(plan, path, jobs=1, watch=lambda *_: None)
    assert runs == old[3:] + old[:3]


def test_heads_keep_their_size_and_grow_in_number() -> None:
    plan = Plan("hf:llama", (32, 96), (1,), ("mup",), context=8, head_size=16)
    for size in plan.sizes():
        _, model, _ = transfer.begin(plan.trial("mup", size, 0.1, 0))
        assert model.config.num_attention_heads == size.width / 16 and model.config.head_dim == 16
    with pytest.raises(ModnormError, match="Heads of 16 features do not split a width of 40 evenly"):
        transfer.check(Plan("hf:llama", (32, 40), (1,), ("adamw",), head_size=16))


def test_the_common_head_size_is_that_of_the_narrowest_model_if_it_divides_all() -> None:
    size = transfer.common_head_size
    assert size("hf:gpt2", (768, 1536), 1) == 64  # GPT-2's own
    assert size("hf:gpt2", (128, 32), 1) == 32  # narrower than one head
    assert size("hf:gpt2", (48, 72), 1) == 24
    assert size("hf:qwen3", (64, 128), 1) is None  # its configuration gives the size
    assert size("zoo:gpt", (64, 128), 1) is None
    with pytest.raises(ModnormError, match="Widths of 65, 66 have no size of attention heads in common"):
        size("hf:gpt2", (65, 66), 1)


def test_the_learning_rate_rises_and_falls_in_straight_lines() -> None:
    """Against torch's own schedulers, with and without warm-up and fall."""
    for steps, warmup, decay in ((10, 0, True), (10, 3, True), (7, 6, True), (5, 2, False), (5, 0, False)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        rise = LinearLR(optimizer, 1 / (warmup + 1), 1.0, warmup) if warmup else ConstantLR(optimizer, 1.0, 0)
        fall = LinearLR(optimizer, 1.0, 0.0, steps - warmup) if decay else ConstantLR(optimizer, 1.0, 0)
        torch_schedule = SequentialLR(optimizer, [rise, fall], [warmup]) if warmup else fall
        for step in range(steps):
            assert schedule(step, steps, warmup, decay) == pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.step()
            torch_schedule.step()


def test_a_warm_up_changes_the_run_and_one_that_leaves_no_step_is_refused() -> None:
    plan = Plan("zoo:resmlp", (16,), (2,), ("adamw",), steps=6, warmup=6)
    with pytest.raises(ModnormError, match="warm-up of 6 steps does not fit into a training of 6"):
        check(plan)
    losses = [run(replace(plan, warmup=n).trial("adamw", plan.smallest, 0.1, 0)).train_loss for n in (0, 5)]
    assert losses[0] != losses[1]


def test_masses_are_those_of_the_steps_and_are_kept_with_the_runs() -> None:
    plan = Plan("zoo:resmlp", (16,), (2,), ("modnorm-sgd",), steps=1, batch=2, masses=(("head", 0.0), ("stacks", 5.0)))
    trial = plan.trial("modnorm-sgd", plan.smallest, 0.5, 0)
    task, model, optimizer = transfer.begin(trial)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits_loss(model, *next(task.batches(0))).backward()
    optimizer.step()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"initial", "blocks"}  # a part without mass stays where it is
    assert Run.from_line(ran(trial, -1.0).line()).trial == trial
    assert Run.from_line(ran(trial, -1.0).line().replace(', "masses": [["head", 0.0], ["stacks", 5.0]]', "")).trial == (
        replace(trial, masses=())
    )
    check(replace(plan, recipes=("adamw", "modnorm-sgd")))
    with pytest.raises(ModnormError, match="Masses change nothing for adamw, mup"):
        check(replace(plan, recipes=("adamw", "mup")))


@pytest.mark.parametrize(
    "name, shape",
    [
        ("paper_digits.py:rescnn", (1, 8, 8)),
        ("timm_digits.py:resnet", (1, 32, 32)),
        ("timm_digits.py:vit", (1, 8, 8)),
    ],
)
def test_models_for_digits_grow_and_take_grey_images(name: str, shape: tuple[int, ...]) -> None:
    spec = str(Path(transfer.__file__).parent / name)
    plan = Plan(spec, (16, 32), (1, 2), ("adamw",), batch=4)
    check(plan)
    parameters = {}
    for size in plan.sizes():
        task, model, _ = transfer.begin(plan.trial("adamw", size, 0.1, 0))
        images, labels = next(task.batches(0))
        assert images.shape == (4, *shape)
        assert torch.isfinite(logits_loss(model, images, labels))
        parameters[size] = sum(p.numel() for p in model.parameters())
    assert parameters[Size(16, 1)] < parameters[Size(16, 2)] < parameters[Size(32, 1)]


def test_unknown_optimizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModnormError, match="There is no optimizer 'adam'"):
        transfer.sweep(Plan("hf:gpt2", (32,), (1,), ("adam",)), tmp_path / "x", jobs=1, watch=lambda *_: None)


def test_mup_scales_what_grows_with_the_width() -> None:
    """Table 8 of arXiv 2203.03466, relative to half the width: hidden matrices lr/2, all else lr."""
    sizes = {"layers": 1, "vocab": 50, "context": 16}
    model, small = build("hf:llama", width=64, **sizes), build("hf:llama", width=32, **sizes)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    setting = Setting(model, lambda: convert(model), lambda: small, 0.01, 0.1, 0)
    optimizer = RECIPES["mup"].begin(setting)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        hidden = p.dim() == 2 and "embed" not in name and "lm_head" not in name
        assert rate[id(p)] == pytest.approx(0.005 if hidden else 0.01), name
        torch.testing.assert_close(p.detach(), before[name] * (0.5**0.5 if hidden else 1.0))
    x = torch.randn(2, 64)
    torch.testing.assert_close(model.lm_head(x), x / 2 @ model.lm_head.weight.T)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_takes_a_step(recipe: str) -> None:
    trial = Trial("hf:llama", recipe, 32, 1, 0.01, 0, steps=2, batch=2, context=8, narrowest=32)
    assert math.isfinite(transfer.run(trial).train_loss)
