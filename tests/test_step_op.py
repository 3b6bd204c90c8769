"""`torch.compile` around the optimizer's step: one graph, and the same weights as without."""

from __future__ import annotations

import copy

import pytest
import torch
from fake_norm import Lion, backward, setup, values

from modnorm_fx import step_op
from modnorm_fx.errors import OptimizerError

BASES = {"AdamW": lambda p: torch.optim.AdamW(p, weight_decay=0.0), "Lion": Lion}


@pytest.mark.parametrize("base", BASES)
def test_a_compiled_step_is_one_graph_and_does_the_same(base: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = []
    for compiled in (False, True):
        model, opt = setup(BASES[base], lr=0.1, weight_decay=0.1)
        step = torch.compile(lambda opt=opt: opt.step(), fullgraph=True, backend="aot_eager") if compiled else opt.step
        for number in range(12):
            opt.zero_grad()
            backward(model, number)
            opt.param_groups[0]["lr"] = 0.1 / (1 + number)  # a scheduler's own wrapper of step breaks any graph
            step()
        results.append(values(model))
    assert all(torch.equal(results[1][name], w) for name, w in results[0].items())
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]  # the first step may differ


def test_a_compiled_training_step() -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model, opt = setup(BASES["AdamW"], lr=0.1)

        def update(model=model, opt=opt, number: int = 0) -> None:
            backward(model, number)
            opt.step()
            opt.zero_grad()

        step = torch.compile(update, backend="aot_eager") if compiled else update
        for number in range(4):
            step(number=number)
        results.append(values(model))
    for name, w in results[0].items():
        torch.testing.assert_close(results[1][name], w, rtol=1e-4, atol=1e-5)


def test_a_number_is_never_given_twice() -> None:
    numbers = set()
    for _ in range(3):
        _, opt = setup(BASES["AdamW"])
        numbers.add(opt._number)
        del opt
    assert len(numbers) == 3
    with pytest.raises(OptimizerError, match="no longer exists"):
        step_op.step([], [], [], 10**9)


def test_a_copy_steps_its_own_weights() -> None:
    torch._dynamo.reset()
    model, opt = setup(BASES["AdamW"], lr=0.1)
    net, other = copy.deepcopy((model, opt))
    assert other._number != opt._number
    before = values(model)
    backward(net)
    torch.compile(lambda: other.step(), fullgraph=True, backend="aot_eager")()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not torch.equal(net.gain, before["gain"])
