"""ModularOptimizer as an optimizer, with a norm written by hand (no model analysis takes part)."""

import math

import pytest
import torch
from fake_norm import MAKERS, Leaf, Lion, Net, Norm, backward, moved, named, norm_of, remembered, setup, train, values
from torch import nn
from torch.optim import lr_scheduler as schedules

from modnorm_fx import atoms as A
from modnorm_fx import runtime
from modnorm_fx.normalizer import COLD_STEPS
from modnorm_fx.optim import ModularOptimizer

F = nn.functional


each_base = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@each_base
@pytest.mark.parametrize("mode", ["normalize", "dualize"])
def test_a_step_has_modular_norm_lr_and_every_leaf_meets_its_target(make, mode):
    model, opt = setup(make, lr=0.01, mode=mode)
    for step in range(3):
        before = values(model)
        opt.zero_grad()
        backward(model, step)
        opt.step()
        update = moved(model, before)
        assert opt.norm.norm(update) == pytest.approx(0.01, rel=0.03)
        for leaf in opt.norm.leaves:
            size = leaf.atom.norm(leaf.read(update[leaf.weight])).item()
            assert size == pytest.approx(0.01 * leaf.target, rel=0.03), leaf.key
    assert torch.equal(model.unused, before["unused"])


@each_base
def test_training_lowers_the_loss(make):
    model, opt = setup(make, lr=0.05)
    losses = train(model, opt, 40)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_zero_gradient_moves_nothing_and_starts_no_vectors():
    model, opt = setup()
    before = values(model)
    for name, p in model.named_parameters():
        p.grad = torch.zeros_like(p) if name != "unused" else None
    opt.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not remembered(opt)


def test_decay_is_in_proportion_to_what_a_step_is_of_the_declared_norm():
    model, opt = setup(lr=0.5, weight_decay=0.1)
    twin, plain = setup(lr=0.5)
    before = values(model)
    for net, optimizer in ((model, opt), (twin, plain)):
        backward(net)
        optimizer.step()
    for leaf in opt.norm.leaves:
        declared = leaf.initial or 1.0  # what starts at zero decays as if it were declared at 1
        factor = 1 - 0.5 * 0.1 * leaf.target / declared if leaf.atom.decays else 1.0
        a, b = (leaf.read(named(net)[leaf.weight]) for net in (model, twin))
        torch.testing.assert_close(a, b - (1 - factor) * leaf.read(before[leaf.weight]), msg=leaf.key)


@pytest.mark.parametrize("declared", [0.25, 1.0, 3.0])
def test_steps_that_agree_end_at_the_declared_norm_over_the_weight_decay(declared):
    model = nn.Linear(6, 4, bias=False)
    leaf = Leaf("weight", "weight", A.Linear((4, 6)), 0.5, initial=declared)
    opt = ModularOptimizer(
        torch.optim.SGD(model.parameters()), Norm(model, [leaf]), lr=0.5 * declared, weight_decay=0.5
    )
    direction = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(200):
        model.weight.grad = direction.clone()
        opt.step()
    spectral = torch.linalg.matrix_norm(model.weight.detach(), 2).item()
    assert spectral * (6 / 4) ** 0.5 == pytest.approx(declared / 0.5, rel=1e-3)


def test_entries_that_no_leaf_describes_stay_where_they_are():
    model = Net()
    norm = norm_of(model)
    norm.leaves = tuple(leaf for leaf in norm.leaves if leaf.slices != (A.Slice(0, 12, 24, 36),))
    opt = ModularOptimizer(torch.optim.SGD(model.parameters()), norm)
    before = values(model)
    backward(model)
    opt.step()
    assert torch.equal(model.qkv.weight[12:24], before["qkv.weight"][12:24])
    assert not torch.equal(model.qkv.weight[:12], before["qkv.weight"][:12])
    assert not torch.equal(model.qkv.weight[24:], before["qkv.weight"][24:])


@pytest.mark.parametrize("strided", [False, True])
def test_periodic_slices(strided):
    """Heads interleaved as (q0 k0 q1 k1 ...), in a weight of any strides."""
    model = nn.Linear(5, 12, bias=False)
    if strided:
        model.weight = nn.Parameter(torch.randn(5, 12).T)
    parts = A.Slice(0, 0, 3, 6), A.Slice(0, 3, 6, 6)
    leaves = [
        Leaf(f"w{s.text(12)}", "weight", A.Linear((6, 5)), t, (s,)) for s, t in zip(parts, (0.1, 10.0), strict=True)
    ]
    opt = ModularOptimizer(torch.optim.SGD(model.parameters()), Norm(model, leaves), lr=0.5, weight_decay=0.01)
    before = model.weight.detach().clone()
    model.weight.grad = torch.randn(12, 5)
    opt.step()
    for leaf in leaves:
        step = leaf.read(model.weight.detach()) - (1 - 0.5 * 0.01 * leaf.target) * leaf.read(before)
        assert leaf.atom.norm(step).item() == pytest.approx(0.5 * leaf.target, rel=1e-3)
    assert all("unflatten" in leaf.key for leaf in leaves)


@pytest.mark.parametrize(
    "make",
    [
        lambda opt: schedules.LambdaLR(opt, lambda step: 1 / (1 + step)),
        lambda opt: schedules.OneCycleLR(opt, max_lr=0.5, total_steps=10),
        lambda opt: schedules.CosineAnnealingLR(opt, T_max=10),
        lambda opt: schedules.SequentialLR(
            opt, [schedules.LinearLR(opt, 0.1, total_iters=3), schedules.CosineAnnealingLR(opt, 7)], [3]
        ),
    ],
    ids=["lambda", "one cycle", "cosine", "sequential"],
)
def test_schedulers_drive_the_size_of_steps(make):
    model, opt = setup(torch.optim.AdamW, lr=0.2, settings=dict(weight_decay=0.0))
    assert isinstance(opt, torch.optim.Optimizer)
    scheduler = make(opt)
    seen = []
    for step in range(6):
        before = values(model)
        opt.zero_grad()
        backward(model, step)
        opt.step()
        seen.append(opt.param_groups[0]["lr"])
        assert opt.norm.norm(moved(model, before)) == pytest.approx(seen[-1], rel=0.03)
        scheduler.step()
    assert len(set(seen)) > 3
    assert opt.base.param_groups[0]["lr"] == 1e-3


def test_lr_may_be_a_tensor():
    model, opt = setup(lr=torch.tensor(0.01))
    before = values(model)
    backward(model)
    opt.step()
    assert opt.norm.norm(moved(model, before)) == pytest.approx(0.01, rel=0.03)


def test_groups_mirror_the_base_and_have_their_own_lr_and_decay():
    model = Net()
    groups = [
        {"params": [model.embed.weight, model.gain], "betas": (0.5, 0.9)},
        {"params": list(model.qkv.parameters())},
    ]
    base = torch.optim.AdamW(groups, weight_decay=0.0)
    opt = ModularOptimizer(base, norm_of(model), lr=0.1)
    opt.add_param_group({"params": [model.down.weight], "lr": 0.3, "weight_decay": 1.0})
    assert [len(g["params"]) for g in base.param_groups] == [len(g["params"]) for g in opt.param_groups] == [2, 2, 1]
    assert [g["betas"][0] for g in opt.param_groups] == [0.5, 0.9, 0.9]
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.1, 0.3]
    assert base.param_groups[2]["lr"] == 1e-3 and base.param_groups[2]["weight_decay"] == 0.0
    opt.param_groups[1]["lr"] = 0.0
    before = values(model)
    backward(model)
    opt.step()
    update = moved(model, before)
    assert torch.equal(model.qkv.weight, before["qkv.weight"])
    tied, down = opt.norm.leaves[0], opt.norm.leaves[-1]
    assert tied.atom.norm(update["embed.weight"]).item() == pytest.approx(0.1 * 0.3, rel=1e-3)
    decayed = before["down.weight"] * (1 - 0.3 * 1.0 * 0.25)
    assert down.atom.norm(model.down.weight.detach() - decayed).item() == pytest.approx(0.3 * 0.25, rel=1e-3)


def test_closures_and_accumulation_and_hooks():
    model, opt = setup()
    calls, hooks = [], []

    def closure():
        opt.zero_grad()
        calls.append(1)
        return backward(model)

    opt.register_step_pre_hook(lambda *args: hooks.append("pre"))
    opt.register_step_post_hook(lambda *args: hooks.append("post"))
    assert isinstance(opt.step(closure), torch.Tensor)
    assert len(calls) == 1 and hooks == ["pre", "post"]
    assert opt.step() is None

    whole, opt_whole = setup(torch.optim.Adam)
    parts, opt_parts = setup(torch.optim.Adam)
    sums = {name: torch.zeros_like(p) for name, p in named(whole).items()}
    for step in (1, 2):
        backward(parts, step)
        backward(whole, step)
        for name, p in whole.named_parameters():
            sums[name] += p.grad if p.grad is not None else 0.0
            p.grad = None
    for name, p in whole.named_parameters():
        p.grad = sums[name] if name != "unused" else None
    for net, optimizer in ((whole, opt_whole), (parts, opt_parts)):
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


@pytest.mark.parametrize("make", [torch.optim.AdamW, Lion, torch.optim.Adafactor])
def test_bfloat16_parameters(make):
    model, opt = setup(make, dtype=torch.bfloat16, lr=0.1)
    before = values(model)
    losses = train(model, opt, 30)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name != "unused")
    assert losses[-1] < losses[0]
    assert all(v.dtype == torch.float32 for entry in remembered(opt).values() for v in entry["vectors"])


def test_gradient_scaler_skips_overflowing_steps():
    model, opt = setup(torch.optim.AdamW)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    changed = []
    for step in range(3):
        opt.zero_grad()
        backward(model, step, scale=scaler.scale)
        if step == 1:
            model.gain.grad[0] = math.inf
        before = values(model)
        scaler.step(opt)
        scaler.update()
        changed.append(not torch.equal(model.down.weight, before["down.weight"]))
    assert changed == [True, False, True]
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), torch.optim.Adam], ids=["SGD", "Adam"]
)
def test_warm_power_iteration_has_a_thin_tail_over_a_training_run(make):
    """Estimate / true norm of every spectral leaf at every step; an underestimate overshoots the step by as much."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 20))
    leaves = [Leaf(n, n, A.Linear(tuple(p.shape)), 0.1) for n, p in model.named_parameters() if p.dim() == 2]
    leaves += [Leaf(n, n, A.Bias(tuple(p.shape)), 0.1) for n, p in model.named_parameters() if p.dim() == 1]
    norm = Norm(model, leaves)
    opt = ModularOptimizer(make(model.parameters()), norm, lr=0.2)
    teacher = torch.randn(64, 20)
    quality = []
    for _ in range(120):
        x = torch.randn(32, 64)
        opt.zero_grad()
        F.cross_entropy(model(x), (x @ teacher).argmax(1)).backward()
        before = values(model)
        opt.step()
        update = moved(model, before)
        for leaf in leaves:
            if isinstance(leaf.atom, A.Linear):
                true = math.sqrt(leaf.atom.into / leaf.atom.out) * torch.linalg.svdvals(update[leaf.weight].double())[0]
                quality.append(0.2 * leaf.target / true.item())  # the estimate was 0.2·target/true of the true norm
    low, middle, high = torch.tensor(quality).quantile(torch.tensor([0.01, 0.5, 0.99])).tolist()
    print(f"power iteration, estimate/true: 1% {low:.4f}  50% {middle:.4f}  99% {high:.4f}  min {min(quality):.4f}")
    assert low > 0.9 and middle > 0.98 and max(quality) < 1.001
    assert min(quality) > 0.9


def test_frozen_parameters_take_no_memory_and_hold_up_nothing(monkeypatch):
    """A frozen layer among equal ones: its power vectors wait, those of the others warm up."""
    model = torch.nn.Sequential(*(torch.nn.Linear(12, 12, bias=False) for _ in range(3)))
    leaves = [Leaf(f"{i}.weight", f"{i}.weight", A.Linear((12, 12)), 0.1) for i in range(3)]
    opt = ModularOptimizer(torch.optim.SGD(model.parameters()), Norm(model, leaves), lr=0.1)

    def steps(count):
        for _ in range(count):
            for p in model.parameters():
                p.grad = torch.randn_like(p) if p.requires_grad else None
            opt.step()

    steps(2)
    model[1].weight.requires_grad_(False)
    steps(COLD_STEPS)
    assert opt._normalizer.updates.keys() == {"0.weight", "2.weight"}
    assert {key: entry["steps"] for key, entry in remembered(opt).items()} == {
        "0.weight": COLD_STEPS, "1.weight": 2, "2.weight": COLD_STEPS,
    }  # fmt: skip
    monkeypatch.setattr(runtime, "start_vectors", None)  # warm: it is not called any more
    steps(1)
    monkeypatch.undo()
    model[1].weight.requires_grad_(True)
    steps(1)
    assert remembered(opt)["1.weight"]["steps"] == 3


def test_a_layer_that_never_moves_does_not_keep_its_neighbours_cold(monkeypatch):
    model = torch.nn.Sequential(*(torch.nn.Linear(12, 12, bias=False) for _ in range(2)))
    leaves = [Leaf(f"{i}.weight", f"{i}.weight", A.Linear((12, 12)), 0.1) for i in range(2)]
    opt = ModularOptimizer(torch.optim.SGD(model.parameters()), Norm(model, leaves), lr=0.1)
    for step in range(COLD_STEPS + 2):
        model[0].weight.grad, model[1].weight.grad = torch.randn(12, 12), torch.zeros(12, 12)
        if step == COLD_STEPS:
            assert opt._normalizer.is_warm
            monkeypatch.setattr(runtime, "start_vectors", None)
        opt.step()
    monkeypatch.undo()
    before = model[1].weight.detach().clone()
    model[1].weight.grad = torch.randn(12, 12)  # it wakes up, and is cold
    opt.step()
    moved = torch.linalg.matrix_norm(model[1].weight.detach() - before, 2).item()
    assert moved == pytest.approx(0.1 * 0.1, rel=2e-3)
