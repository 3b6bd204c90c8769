"""Saving, loading, copying: a resumed run continues bit for bit, and foreign checkpoints are refused."""

import copy
import io
import pickle

import pytest
import torch
from fake_norm import MAKERS, norm_of, remembered, setup, train, values
from torch.optim import lr_scheduler as schedules

from modnorm_fx.errors import FormatError, OptimizerError
from modnorm_fx.normalizer import COLD_STEPS
from modnorm_fx.optim import ModularOptimizer

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
