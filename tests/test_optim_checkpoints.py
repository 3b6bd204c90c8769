"""Saving, loading, copying: a resumed run continues bit for bit, and foreign checkpoints are refused."""

import copy
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fake_norm import MAKERS, Lion, norm_of, remembered, setup, train, values
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler as schedules

import modnorm_fx as mn
from modnorm_fx.errors import FormatError, OptimizerError
from modnorm_fx.normalizer import COLD_STEPS
from modnorm_fx.optim import ModularOptimizer

MAKERS_WITH_LR = {
    "AdamW": torch.optim.AdamW,
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "Lion": Lion,
    "Adafactor": torch.optim.Adafactor,
}
each_base = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def test_deepcopy_and_pickle_continue_like_the_original():
    model, opt = setup(torch.optim.AdamW, lr=0.1)
    schedules.LambdaLR(opt, lambda step: 1.0)  # patches opt.step on the instance
    train(model, opt, 3)
    copies = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
    train(model, opt, 3, start=3)
    for net, optimizer in copies:
        assert optimizer.state is optimizer.base.state
        train(net, optimizer, 3, start=3)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), net.parameters(), strict=True))
    assert "lr: 0.1" in repr(opt)


@pytest.mark.parametrize("mode", ["normalize", "dualize"])
@each_base
def test_resume_is_bit_for_bit(make, mode):
    model, opt = setup(make, lr=0.1, mode=mode, weight_decay=0.1)
    scheduler = schedules.CosineAnnealingLR(opt, 20)
    for step in range(COLD_STEPS + 2):
        train(model, opt, 1, start=step)
        scheduler.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "schedule": scheduler.state_dict()}, file)
    for step in range(20, 24):
        train(model, opt, 1, start=step)
        scheduler.step()

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, resumed = setup(make, lr=0.7, mode=mode, seed=1)
    schedule = schedules.CosineAnnealingLR(resumed, 20)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    schedule.load_state_dict(saved["schedule"])
    for step in range(20, 24):
        train(again, resumed, 1, start=step)
        schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert resumed.state is resumed.base.state
    assert remembered(resumed).keys() == remembered(opt).keys()


def test_resume_needs_the_power_vectors():
    """The test above would notice if they were lost: without them the next step differs."""
    model, opt = setup(torch.optim.SGD, lr=0.1, width=30)
    train(model, opt, COLD_STEPS + 3)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    results = []
    for drop in (False, True):
        again, resumed = setup(torch.optim.SGD, lr=0.1, width=30)
        again.load_state_dict(saved[0])
        state = copy.deepcopy(saved[1])
        if drop:
            state["modnorm"]["leaves"] = {}
        resumed.load_state_dict(state)
        train(again, resumed, 1, start=20)
        results.append(values(again))
    assert any(not torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_resume_within_the_cold_steps_is_bit_for_bit_too():
    model, opt = setup(torch.optim.AdamW, lr=0.1)
    train(model, opt, 3)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    again, resumed = setup(torch.optim.AdamW, lr=0.1, seed=1)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for net, optimizer in ((model, opt), (again, resumed)):
        train(net, optimizer, COLD_STEPS, start=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert {entry["steps"] for entry in remembered(opt).values()} == {COLD_STEPS}


def test_state_dict_has_the_layout_that_torch_expects():
    model, opt = setup(torch.optim.AdamW)
    train(model, opt, 1)
    state = opt.state_dict()
    plain = opt.base.state_dict()
    assert state["state"].keys() == plain["state"].keys() and state["base_param_groups"] == plain["param_groups"]
    assert state["param_groups"][0]["params"] == plain["param_groups"][0]["params"]
    assert state["param_groups"][0]["lr"] == 1.0 and state["base_param_groups"][0]["lr"] == 1e-3
    assert state["modnorm"]["version"] == 2 and state["modnorm"]["digest"] == "digest"
    assert [v.shape for v in state["modnorm"]["leaves"]["embed.weight"]["vectors"]] == [(1, 8, 12)]
    assert [v.shape for v in state["modnorm"]["leaves"]["down.weight"]["vectors"]] == [(1, 8, 12)]
    assert state["modnorm"]["leaves"]["down.weight"]["steps"] == 1


def test_checkpoints_of_others_are_refused():
    model, opt = setup(torch.optim.AdamW)
    train(model, opt, 1)
    state = copy.deepcopy(opt.state_dict())
    fresh_model, fresh = setup(torch.optim.AdamW)
    with pytest.raises(FormatError, match="not saved by a ModularOptimizer"):
        fresh.load_state_dict(opt.base.state_dict())
    with pytest.raises(FormatError, match="has version 3; this package reads version 2"):
        fresh.load_state_dict(state | {"modnorm": state["modnorm"] | {"version": 3}})
    with pytest.raises(OptimizerError, match="saved with another norm"):
        fresh.load_state_dict(state | {"modnorm": state["modnorm"] | {"digest": "other"}})
    with pytest.raises(OptimizerError, match="saved with another norm"):
        leaves = {"nowhere": {"steps": 1, "vectors": []}}
        fresh.load_state_dict(state | {"modnorm": state["modnorm"] | {"leaves": leaves}})
    fewer = ModularOptimizer(torch.optim.AdamW([fresh_model.gain]), norm_of(fresh_model), weight_decay=0.1)
    with pytest.raises(OptimizerError, match="other parameter groups"):
        fewer.load_state_dict(state)
    assert not fresh.state and not remembered(fresh)


def test_state_dict_hooks_run():
    model, opt = setup()
    seen = []
    opt.register_state_dict_pre_hook(lambda o: seen.append("save"))
    opt.register_load_state_dict_pre_hook(lambda o, s: seen.append("before"))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("after"))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["save", "before", "after"]


# --- of another norm, or damaged --------------------------------------------------------------------------------------

X = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


def converted(masses=None, convention="tracked", mode="normalize", make=torch.optim.AdamW, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
    norm = mn.convert(model, (X,), masses=masses, convention=convention)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, ModularOptimizer(make(model.parameters(), lr=1e-3), norm, lr=0.05, mode=mode)


def descend(model, opt, steps=1):
    for _ in range(steps):
        opt.zero_grad()
        model(X).square().sum().backward()
        opt.step()


def everything(opt):
    return str(opt.state_dict()), str(opt.param_groups), str(opt.base.param_groups)


@pytest.mark.parametrize(
    "other, text",
    [
        (dict(masses={"0": 50.0}), "saved with another norm"),
        (dict(convention="paper"), "saved with another norm"),
        (dict(mode="dualize"), "saved with mode='normalize'; this optimizer has mode='dualize'"),
        (dict(make=torch.optim.Adamax), "saved with AdamW as the base; this optimizer has Adamax"),
    ],
    ids=["masses", "convention", "mode", "base"],
)
def test_a_state_of_another_norm_is_refused_and_its_base_goes_on_alone(other, text):
    model, opt = converted()
    descend(model, opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    again, resumed = converted(**other, seed=1)
    descend(again, resumed)
    before = everything(resumed)
    with pytest.raises(OptimizerError, match=text) as caught:
        resumed.load_state_dict(saved)
    assert everything(resumed) == before
    if other.keys() & {"masses", "convention"}:
        then, now = opt.norm.targets, resumed.norm.targets
        furthest = max(then, key=lambda key: max(then[key], now[key]) / min(then[key], now[key]))
        assert f"the target of {furthest} was {then[furthest]:.4g} and is {now[furthest]:.4g}" in str(caught.value)
    _, fresh = converted(**other)
    assert "opt.base.load_state_dict(" in str(caught.value)  # what the text advises
    fresh.base.load_state_dict({"state": saved["state"], "param_groups": saved["base_param_groups"]})
    assert torch.equal(fresh.state_dict()["state"][0]["exp_avg"], saved["state"][0]["exp_avg"])


def test_targets_that_differ_in_their_last_digits_are_those_of_one_norm():
    model, opt = converted()
    descend(model, opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    for factor, fits in ((1 + 1e-5, True), (1.01, False)):
        saved["modnorm"]["targets"] = {key: factor * target for key, target in opt.norm.targets.items()}
        _, resumed = converted()
        if fits:
            resumed.load_state_dict(saved)
            assert remembered(resumed).keys() == remembered(opt).keys()
        else:
            with pytest.raises(OptimizerError, match="saved with another norm"):
                resumed.load_state_dict(saved)


def test_a_state_saved_before_targets_were_continues_bit_for_bit():
    model, opt = converted()
    descend(model, opt, 3)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    del saved[1]["modnorm"]["targets"], saved[1]["modnorm"]["base"]
    for group in saved[1]["param_groups"]:
        del group["modnorm"]
    again, resumed = converted(seed=1)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for net, optimizer in ((model, opt), (again, resumed)):
        descend(net, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


DAMAGE = {
    "no base_lr": lambda d: d["modnorm"].pop("base_lr"),
    "base_lr of fewer groups": lambda d: d["modnorm"].update(base_lr=[]),
    "no leaves": lambda d: d["modnorm"].pop("leaves"),
    "a leaf": lambda d: d["modnorm"]["leaves"].update({"0.weight": "x"}),
    "a leaf without vectors": lambda d: d["modnorm"]["leaves"]["0.weight"].pop("vectors"),
    "targets": lambda d: d["modnorm"].update(targets=None),
    "base_extra": lambda d: d["modnorm"].update(base_extra=3),
    "no param_groups": lambda d: d.pop("param_groups"),
    "no params": lambda d: d["param_groups"][0].pop("params"),
    "no state": lambda d: d.pop("state"),
    "more groups of the base": lambda d: d["base_param_groups"].append({}),
    "no group of the base": lambda d: d.update(base_param_groups=[None]),
    "state of the base": lambda d: d["state"].update({0: 3}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_state_is_refused_before_anything_is_changed(damage):
    model, opt = converted()
    descend(model, opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    damage(saved)
    again, resumed = converted(seed=1)
    descend(again, resumed, 2)
    before = everything(resumed)
    with pytest.raises(FormatError):
        resumed.load_state_dict(saved)
    assert everything(resumed) == before
    descend(again, resumed)


def test_what_is_no_state_is_refused():
    _, opt = converted()
    for nothing in (None, [], "x"):
        with pytest.raises(FormatError, match="is no optimizer state"):
            opt.load_state_dict(nothing)
    with pytest.raises(FormatError):
        opt.load_state_dict({})


# --- torch.distributed.checkpoint -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["in memory", "full", "files"])
@pytest.mark.parametrize("make", ["AdamW", "SGD", "Lion", "Adafactor"])
def test_torch_distributed_checkpoint_resumes_bit_for_bit(make, how, tmp_path):
    """It keeps "state" and "param_groups" of an optimizer's state dict, keyed by the names of parameters."""
    options = StateDictOptions(full_state_dict=how == "full")
    model, opt = converted(make=MAKERS_WITH_LR[make])
    descend(model, opt, COLD_STEPS + 2)
    opt.param_groups[0]["lr"] = 0.03
    saved = {"model": copy.deepcopy(model.state_dict()), "opt": get_optimizer_state_dict(model, opt, options=options)}
    assert saved["opt"].keys() == {"state", "param_groups"}
    if how == "files":
        dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    else:
        saved = copy.deepcopy(saved)
    again, resumed = converted(make=MAKERS_WITH_LR[make], seed=1)
    if how == "files":
        saved = {"model": again.state_dict(), "opt": get_optimizer_state_dict(again, resumed)}
        dcp.load(saved, checkpoint_id=tmp_path, no_dist=True)
    again.load_state_dict(saved["model"])
    set_optimizer_state_dict(again, resumed, saved["opt"], options=options)
    assert resumed.param_groups[0]["lr"] == 0.03 and "modnorm" not in resumed.param_groups[0]
    assert [g["lr"] for g in resumed.base.param_groups] == [g["lr"] for g in opt.base.param_groups]
    for net, optimizer in ((model, opt), (again, resumed)):
        descend(net, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert remembered(resumed).keys() == remembered(opt).keys() != set()


def test_torch_distributed_checkpoint_of_another_norm_or_flattened_is_refused():
    model, opt = converted()
    descend(model, opt)
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    other, resumed = converted(masses={"0": 50.0})
    with pytest.raises(OptimizerError, match="saved with another norm"):
        set_optimizer_state_dict(other, resumed, saved)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    with pytest.raises(FormatError, match=r"has lost what one saves(.|\n)*flatten_optimizer_state_dict=True"):
        set_optimizer_state_dict(model, opt, get_optimizer_state_dict(model, opt, options=flat), options=flat)
