"""Updates read off base optimizers against the same optimizers run alone; what is said about their settings."""

import copy
import warnings

import pytest
import torch
from fake_norm import Leaf, Lion, Net, Norm, PlainSGD, backward, moved, named, norm_of, setup, values
from torch import nn
from torch.optim import lr_scheduler as schedules

from modnorm_fx import atoms as A
from modnorm_fx.optim import ModularOptimizer

F = nn.functional


KNOWN = [
    (torch.optim.SGD, dict(momentum=0.9, dampening=0.1)),
    (torch.optim.SGD, dict(momentum=0.9, weight_decay=0.3, nesterov=True)),
    (torch.optim.SGD, dict(weight_decay=0.3, maximize=True)),
    (torch.optim.Adam, {}),
    (torch.optim.Adam, dict(weight_decay=0.3, amsgrad=True)),
    (torch.optim.Adam, dict(weight_decay=0.3, maximize=True, foreach=True)),
    (torch.optim.AdamW, dict(weight_decay=0.0, fused=True)),
    (torch.optim.NAdam, dict(weight_decay=0.3)),
    (torch.optim.RAdam, dict(weight_decay=0.3)),
    (torch.optim.Adamax, dict(weight_decay=0.3)),
    (torch.optim.RMSprop, dict(weight_decay=0.3, momentum=0.9, centered=True)),
    (torch.optim.Adagrad, dict(weight_decay=0.3, lr_decay=0.1)),
    (torch.optim.Adadelta, dict(weight_decay=0.3)),
    (torch.optim.Rprop, {}),
]


@pytest.mark.parametrize("make, settings", KNOWN, ids=[f"{m.__name__}-{i}" for i, (m, _) in enumerate(KNOWN)])
def test_the_update_read_off_a_known_base_is_its_own(make, settings):
    """Run the plain optimizer beside the wrapper, from the same weights, in float64: same direction on every leaf."""
    model, opt = setup(make, dtype=torch.float64, settings=settings, lr=1e-3)
    assert not opt._base_step.weight_dependent
    twin = copy.deepcopy(model)
    plain = make(twin.parameters(), **settings, **({} if make is torch.optim.Rprop else dict(lr=1e-6)))
    for step in range(4):
        twin.load_state_dict(model.state_dict())
        before = values(model)
        for net, optimizer in ((model, opt), (twin, plain)):
            optimizer.zero_grad()
            backward(net, step)
            optimizer.step()
        for leaf in opt.norm.leaves:
            a, b = (leaf.read(named(net)[leaf.weight] - before[leaf.weight]) for net in (model, twin))
            torch.testing.assert_close(a / a.norm(), b / b.norm(), rtol=0.0, atol=1e-6, msg=leaf.key)


def test_coupled_and_decoupled_decay_are_told_apart():
    """With a zero gradient an L2 penalty still gives a direction; AdamW's decay is the wrapper's and gives none."""
    for make, moves in ((torch.optim.SGD, True), (torch.optim.AdamW, False)):
        model, opt = setup(make, settings=dict(weight_decay=0.1))
        before = values(model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p is not model.unused else None
        opt.step()
        assert torch.equal(model.down.weight, before["down.weight"]) != moves
        assert opt.base.param_groups[0]["weight_decay"] == 0.1


def update_of(opt, model):
    """What the base makes of the gradient of a model's one weight."""
    into = {"weight": torch.empty(model.weight.shape, dtype=opt._base_step.update_type(model.weight))}
    opt._base_step.write_updates(opt.param_groups, opt._active(), into)
    return into["weight"]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_tiny_updates_of_unknown_bases_are_not_lost_beside_the_weights(dtype, tolerance):
    """Gradients of 1e-7 beside weights near 1: plain subtraction keeps few of their bits, none in bfloat16."""
    model = nn.Linear(6, 4, bias=False).to(dtype)
    leaf = Leaf("weight", "weight", A.Linear((4, 6)), 0.0)
    opt = ModularOptimizer(PlainSGD(model.parameters()), Norm(model, [leaf]), lr=0.0)
    gradient = 1e-7 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    for _ in range(4):
        model.weight.grad = gradient.clone()
        update = update_of(opt, model)
        opt.step()
    error = (update / update.norm() + gradient.float() / gradient.float().norm()).norm()
    assert update.dtype == torch.float32
    assert error < tolerance
    assert opt.base.param_groups[0]["lr"] == 1e-3  # as the user set it


def test_the_same_base_is_exact_when_declared_independent_of_the_weights():
    model = nn.Linear(6, 4, bias=False)
    leaf = Leaf("weight", "weight", A.Linear((4, 6)), 1.0)
    opt = ModularOptimizer(PlainSGD(model.parameters()), Norm(model, [leaf]), weight_dependent=False)
    model.weight.grad = 1e-12 * torch.randn(4, 6)
    update = update_of(opt, model)
    assert torch.equal(update, -model.weight.grad)


def test_the_learning_rate_of_the_base_is_left_where_it_is_more_than_a_factor():
    """With a closure (the base may look at the weights it moved), and in Rprop (the first size of its steps)."""
    model = nn.Linear(3, 2, bias=False)
    norm = Norm(model, [Leaf("weight", "weight", A.Linear((2, 3)), 1.0)])
    base = Lion(model.parameters(), lr=0.25)
    seen = []
    base.register_step_pre_hook(lambda optimizer, *args: seen.append(optimizer.param_groups[0]["lr"]))
    opt = ModularOptimizer(base, norm)

    def closure():
        opt.zero_grad()
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    opt.step()
    assert seen == [0.25, 1.0]
    opt = ModularOptimizer(torch.optim.Rprop(model.parameters(), lr=0.25), norm)
    opt.step(closure)
    assert opt.state[model.weight]["step_size"].unique().item() == 0.25


def test_weights_keep_their_storage_and_survive_a_base_that_raises():
    for make in (torch.optim.SGD, Lion):
        model, opt = setup(make, settings=dict(lr=0.3))
        pointers = [p.data_ptr() for p in model.parameters()]
        before = values(model)
        backward(model)
        gradients = [p.grad for p in model.parameters()]

        def explode(*args):
            raise RuntimeError("boom")

        handle = opt.base.register_step_post_hook(explode)
        with pytest.raises(RuntimeError, match="boom"):
            opt.step()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
        assert opt.base.param_groups[0]["lr"] == 0.3
        handle.remove()
        opt.step()
        assert [p.data_ptr() for p in model.parameters()] == pointers


def test_one_cycle_reaches_the_momentum_of_the_base():
    model, opt = setup(torch.optim.AdamW, lr=0.2)
    scheduler = schedules.OneCycleLR(opt, max_lr=0.5, total_steps=10)
    for step in range(3):
        opt.zero_grad()
        backward(model, step)
        opt.step()
        scheduler.step()
    assert opt.base.param_groups[0]["betas"][0] != 0.9
    assert opt.defaults["lr"] == 0.2 and opt.defaults["betas"] == (0.9, 0.999)


def test_lbfgs_with_a_closure():
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    y = x @ torch.randn(6, 4)
    model = nn.Linear(6, 4)
    leaves = [Leaf("weight", "weight", A.Linear((4, 6)), 1.0), Leaf("bias", "bias", A.Bias((4,)), 1.0)]
    opt = ModularOptimizer(torch.optim.LBFGS(model.parameters(), max_iter=4), Norm(model, leaves), lr=1.0)
    schedule = schedules.LambdaLR(opt, lambda step: 0.8**step)
    calls = []

    def closure():
        calls.append(1)
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    losses = []
    for _ in range(30):
        before = values(model)
        losses.append(opt.step(closure).item())
        if losses[-1] > 1e-3:
            assert opt.norm.norm(moved(model, before)) == pytest.approx(opt.param_groups[0]["lr"], rel=0.03)
        schedule.step()
    assert len(calls) > 30 and losses[-1] < 0.01 * losses[0]
    assert opt.base.param_groups[0]["lr"] == 1


@pytest.mark.parametrize("make", [torch.optim.AdamW, Lion])
def test_frozen_parameters_and_those_without_gradient_are_left_alone(make):
    model, opt = setup(make, weight_decay=0.5, settings=dict(weight_decay=0.1))
    backward(model)
    model.down.weight.requires_grad_(False)  # frozen, with a stale gradient
    model.gain.grad = None
    model.qkv.weight.grad = None
    stale, before = model.down.weight.grad, values(model)
    opt.step()
    for name in ("down.weight", "gain", "qkv.weight", "unused"):
        assert torch.equal(named(model)[name], before[name])
    assert not torch.equal(model.embed.weight, before["embed.weight"])
    assert model.down.weight.grad is stale
    assert set(opt.state) == {model.embed.weight, model.qkv.bias}


def test_a_step_without_any_gradient_does_nothing():
    for make in (torch.optim.AdamW, Lion):
        model, opt = setup(make, weight_decay=0.5)
        before = values(model)
        assert opt.step() is None
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def said(make, **options):
    model = Net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ModularOptimizer(make(model), norm_of(model), **options)
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


def test_warnings_name_settings_that_lose_their_effect():
    assert said(lambda m: torch.optim.SGD(m.parameters(), lr=0.3, weight_decay=0.1)) == []
    assert said(lambda m: torch.optim.AdamW(m.parameters(), lr=3e-4), weight_decay=0.01) == []
    (text,) = said(lambda m: torch.optim.AdamW(m.parameters()))
    assert text.startswith("The weight decay of AdamW (0.01) is not used: pass weight_decay to ModularOptimizer")
    (text,) = said(lambda m: Lion(m.parameters(), weight_decay=0.1))
    assert "of Lion stays part of its update" in text
    (text,) = said(lambda m: Lion(m.parameters(), weight_decay=0.1), weight_dependent=False)
    assert "of Lion has no effect" in text
    (text,) = said(lambda m: torch.optim.SGD([{"params": [m.gain], "lr": 1.0}, {"params": [m.down.weight]}], lr=0.1))
    assert "different learning rates" in text

    def scheduled(m):
        base = torch.optim.SGD(m.parameters(), lr=0.1)
        schedules.CosineAnnealingLR(base, 10)
        return base

    (text,) = said(scheduled)
    assert "attach it to the ModularOptimizer" in text
