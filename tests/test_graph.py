"""The captured step against the step without capture. Without a GPU a stand-in repeats the recorded work on the CPU: it
shows what is captured, kept and copied, not that a GPU can capture it; with one, the same tests use real graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from fake_norm import Net, backward, norm_of, remembered, values

from modnorm_fx import graph, optim
from modnorm_fx.errors import NonFiniteError, OptimizerError
from modnorm_fx.normalizer import COLD_STEPS
from modnorm_fx.optim import ModularOptimizer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
BASES = {
    "SGD": lambda p, device: torch.optim.SGD(p, momentum=0.9),
    "AdamW": lambda p, device: torch.optim.AdamW(p, betas=(0.9, 0.95), capturable=device == "cuda"),
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(graph, "record", lambda run: run)
        monkeypatch.setattr(optim, "check_capturable", lambda base, weight_dependent: None)
    return request.param


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch, device: str) -> list[int]:
    counted: list[int] = []
    record = graph.record

    def counting(run: Callable[[], None]) -> Callable[[], None]:
        counted.append(1)
        return record(run)

    monkeypatch.setattr(graph, "record", counting)
    return counted


def setup(device: str, backend: str, base: str = "AdamW", **options):
    model = Net().to(device)
    model.unused.requires_grad_(False)
    return model, ModularOptimizer(
        BASES[base](model.parameters(), device), norm_of(model), lr=0.1, backend=backend, **options
    )


def train(model, opt, steps: int, start: int = 0, schedule=None) -> None:
    for step in range(start, start + steps):
        opt.zero_grad()
        backward(model, step)
        opt.step()
        if schedule is not None:
            schedule.step()


@pytest.fixture(autouse=True)
def batches_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Net.forward
    monkeypatch.setattr(Net, "forward", lambda self, words: real(self, words.to(self.gain.device)).cpu())


@pytest.mark.parametrize("mode", ["normalize", "dualize"])
@pytest.mark.parametrize("base", BASES)
def test_fifty_steps_with_a_schedule_are_those_without_a_graph(
    device: str, captures: list[int], base: str, mode: str
) -> None:
    results = []
    for backend in ("eager", "cudagraph"):
        model, opt = setup(device, backend, base, weight_decay=0.3, mode=mode)
        train(model, opt, 50, schedule=torch.optim.lr_scheduler.CosineAnnealingLR(opt, 50))
        results.append(values(model))
    assert len(captures) == 1
    for name, w in results[0].items():
        torch.testing.assert_close(results[1][name], w, rtol=1e-3, atol=1e-4)


def test_gradients_may_move(device: str, captures: list[int]) -> None:
    results = []
    for backend in ("eager", "cudagraph"):
        model, opt = setup(device, backend)
        for step in range(COLD_STEPS + 6):
            opt.zero_grad(set_to_none=step % 2 == 0)
            backward(model, step)
            for p in model.parameters():
                if p.grad is not None and step % 3 == 0:
                    p.grad = p.grad.clone()
            opt.step()
        results.append(values(model))
    assert len(captures) == 1
    for name, w in results[0].items():
        torch.testing.assert_close(results[1][name], w, rtol=1e-3, atol=1e-4)


def test_changed_settings_are_captured_again(device: str, captures: list[int]) -> None:
    model, opt = setup(device, "cudagraph", "SGD")
    other, plain = setup(device, "eager", "SGD")
    for net, optimizer in ((model, opt), (other, plain)):
        train(net, optimizer, COLD_STEPS + 2)
        optimizer.param_groups[0]["momentum"] = 0.5
        train(net, optimizer, 3, start=20)
        optimizer.param_groups[0]["weight_decay"] = 0.4
        train(net, optimizer, 3, start=30)
    assert len(captures) == 3
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("mode", ["normalize", "dualize"])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_an_update_that_is_not_finite_changes_nothing(device: str, nonfinite: str, mode: str) -> None:
    model, opt = setup(device, "cudagraph", "SGD", nonfinite=nonfinite, mode=mode, weight_decay=0.3)
    train(model, opt, COLD_STEPS + 2)
    before, knew = values(model), copy.deepcopy(remembered(opt))
    backward(model, 99)
    momentum = opt.state[model.gain]["momentum_buffer"]
    momentum[0] = torch.inf  # a damaged state: the gradients are fine
    if nonfinite == "raise":
        with pytest.raises(NonFiniteError, match="The update of gain"):
            opt.step()
    else:
        opt.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for key, entry in remembered(opt).items():
        assert all(torch.equal(a, b) for a, b in zip(entry["vectors"], knew[key]["vectors"], strict=True))


def test_a_parameter_without_gradient_is_refused_at_capture(device: str) -> None:
    model, opt = setup(device, "cudagraph")
    train(model, opt, COLD_STEPS)
    backward(model)
    model.gain.grad = None
    with pytest.raises(OptimizerError, match="gain has no gradient, so the step cannot be captured"):
        opt.step()


def test_nothing_is_asked_of_the_device_where_a_leaf_has_never_moved(
    device: str, captures: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, opt = setup(device, "cudagraph", base="SGD")
    for step in range(COLD_STEPS + 1):
        opt.zero_grad()
        backward(model, step)
        model.down.weight.grad.zero_()
        if step == COLD_STEPS:
            monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("a capture cannot wait"))
        opt.step()
    assert len(captures) == 1 and opt._normalizer.steps["down.weight"] == 0


def test_vectors_at_another_place_are_captured_again(device: str, captures: list[int]) -> None:
    model, opt = setup(device, "cudagraph")
    train(model, opt, COLD_STEPS + 2)
    opt._normalizer.vectors = [vectors.clone() for vectors in opt._normalizer.vectors]
    train(model, opt, 2, start=COLD_STEPS + 2)
    assert len(captures) == 2


def test_groups_added_later_are_captured_too(device: str, captures: list[int]) -> None:
    results = []
    for backend in ("eager", "cudagraph"):
        model = Net().to(device)
        base = BASES["AdamW"]([p for n, p in model.named_parameters() if n not in ("gain", "unused")], device)
        opt = ModularOptimizer(base, norm_of(model), lr=0.1, backend=backend)
        train(model, opt, COLD_STEPS + 2)
        opt.add_param_group({"params": [model.gain], "lr": 0.05})
        train(model, opt, 5, start=20)
        results.append(values(model))
    assert len(captures) == 2
    for name, w in results[0].items():
        torch.testing.assert_close(results[1][name], w, rtol=1e-3, atol=1e-4)


def test_released_and_resumed(device: str, captures: list[int]) -> None:
    model, opt = setup(device, "cudagraph")
    train(model, opt, COLD_STEPS + 2)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(model, opt, 4, start=20)
    again, resumed = setup(device, "cudagraph")
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, resumed, 2, start=20)
    resumed.release()
    assert resumed._graph is None
    train(again, resumed, 2, start=22)
    assert len(captures) == 3
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_closure_is_called_once_a_step(device: str, captures: list[int]) -> None:
    model, opt = setup(device, "cudagraph")
    calls = []

    def closure() -> torch.Tensor:
        opt.zero_grad()
        calls.append(1)
        return backward(model, len(calls))

    losses = [opt.step(closure) for _ in range(COLD_STEPS + 4)]
    assert len(calls) == len(losses) == COLD_STEPS + 4 and len(captures) == 1


def test_what_cannot_be_captured_says_so() -> None:
    model = Net()
    norm = norm_of(model)
    with pytest.raises(OptimizerError, match="needs all parameters on a GPU"):
        ModularOptimizer(torch.optim.SGD(model.parameters()), norm, backend="cudagraph")
    with pytest.raises(OptimizerError, match="cannot hold a step of Adafactor"):
        ModularOptimizer(torch.optim.Adafactor(model.parameters()), norm, backend="cudagraph")
    on_gpu = torch.optim.AdamW(model.parameters())
    fake = copy.copy(on_gpu)
    fake.param_groups = [group | {"params": []} for group in on_gpu.param_groups]
    with pytest.raises(OptimizerError, match=r"AdamW\(\.\.\., capturable=True\)"):
        graph.check_capturable(fake, weight_dependent=False)
