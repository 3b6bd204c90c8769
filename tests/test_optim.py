"""ModularOptimizer against plain optimizers, with a norm written by hand (no model analysis takes part)."""

import copy
import io
import logging
import math
import pickle
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from modnorm_fx import atoms as A
from modnorm_fx.errors import FormatError, ModelMismatchError, NonFiniteError, OptimizerError
from modnorm_fx.optim import ModularOptimizer

F = nn.functional
torch.set_num_threads(1)  # the tensors are tiny


@dataclass(frozen=True)
class Leaf:
    key: str
    weight: str
    atom: A.Atom
    target: float
    slices: tuple = ()

    def read(self, tensor):
        for part in self.slices:
            tensor = part.read(tensor)
        return tensor

    def write_(self, tensor, part):
        if self.slices and part.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            (only,) = self.slices
            only.write_(tensor, part)


class Norm:
    """The part of ModularNorm that the optimizer uses."""

    def __init__(self, model, leaves, unused=(), digest="digest"):
        self.leaves, self.unused, self.digest = tuple(leaves), tuple(unused), digest
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.aliases = {}
        self._names = {p: name for name, p in model.named_parameters()}

    def parameter_name(self, p):
        return self._names.get(p)

    def norm(self, updates):
        return max(leaf.atom.norm(leaf.read(updates[leaf.weight])).item() / leaf.target for leaf in self.leaves)


class Net(nn.Module):
    """Packed projection [q; k; v] with one leaf per slice, a gain, a tied embedding and head, an unused parameter."""

    def __init__(self, width=12, words=10, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(words, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.gain = nn.Parameter(torch.ones(width))
        self.down = nn.Linear(width, width, bias=False)
        self.unused = nn.Parameter(torch.zeros(3))
        self.to(dtype)

    def forward(self, words):
        q, k, v = self.qkv(self.embed(words)).chunk(3, -1)
        x = F.layer_norm(torch.tanh(q * k) + v, v.shape[-1:], self.gain)
        return (x + self.down(x).relu()) @ self.embed.weight.T


def norm_of(model, **options):
    width, words = model.down.weight.shape[0], model.embed.weight.shape[0]
    shape = (words, width)
    third = [A.Slice(0, i * width, (i + 1) * width, 3 * width) for i in range(3)]
    leaves = [
        Leaf("embed.weight", "embed.weight", A.Tied(shape, (A.Embedding(shape), A.Linear(shape)), (0.5, 1.0)), 0.3),
        *(
            Leaf(f"qkv.weight{s}", "qkv.weight", A.Linear((width, width)), t, (s,))
            for s, t in zip(third, (0.1, 0.2, 0.4), strict=True)
        ),
        *(Leaf(f"qkv.bias{s}", "qkv.bias", A.Bias((width,)), 0.05, (s,)) for s in third),
        Leaf("gain", "gain", A.Gain((width,)), 0.02),
        Leaf("down.weight", "down.weight", A.Linear((width, width)), 0.25),
    ]
    return Norm(model, leaves, unused=["unused"], **options)


def setup(make=torch.optim.SGD, dtype=torch.float32, seed=0, settings=None, **options):
    model = Net(dtype=dtype, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = ModularOptimizer(make(model.parameters(), **(settings or {})), norm_of(model), **options)
    return model, opt


def backward(model, step=0, scale=lambda loss: loss):
    words = torch.randint(0, 10, (8, 5), generator=torch.Generator().manual_seed(step))
    loss = F.cross_entropy(model(words).flatten(0, 1).float(), words.roll(1, 1).flatten())
    scale(loss).backward()
    return loss.detach()


def named(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def values(model):
    return {name: p.clone() for name, p in named(model).items()}


def moved(model, before):
    return {name: p.float() - before[name].float() for name, p in named(model).items()}


def train(model, opt, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        opt.zero_grad()
        losses.append(backward(model, step).item())
        opt.step()
    return losses


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum, decoupled decay: unknown to the wrapper, linear in lr."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.sign(m.lerp(p.grad, 1 - group["betas"][0])), alpha=-group["lr"])
                m.lerp_(p.grad, 1 - group["betas"][1])
        return loss


class PlainSGD(torch.optim.Optimizer):
    """Gradient descent that the wrapper does not know: its updates are as small as its gradients."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.grad


MAKERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, betas=(0.9, 0.95), weight_decay=0.0),
    "Adam-L2": lambda p: torch.optim.Adam(p, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "Lion": Lion,
    "Adafactor": torch.optim.Adafactor,
    "Muon-like default": lambda p: torch.optim.NAdam(p),
}
each_base = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


# What a step is ------------------------------------------------------------------------------------------------------


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


def test_zero_gradient_moves_nothing_and_starts_no_vectors():
    model, opt = setup()
    before = values(model)
    for name, p in model.named_parameters():
        p.grad = torch.zeros_like(p) if name != "unused" else None
    opt.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not opt._vectors


def test_decay_is_proportional_to_the_targets_of_matrices():
    model, opt = setup(lr=0.5, weight_decay=0.1)
    twin, plain = setup(lr=0.5)
    before = values(model)
    for net, optimizer in ((model, opt), (twin, plain)):
        backward(net)
        optimizer.step()
    for leaf in opt.norm.leaves:
        factor = 1 - 0.5 * 0.1 * leaf.target if leaf.atom.decays else 1.0
        a, b = (leaf.read(named(net)[leaf.weight]) for net in (model, twin))
        torch.testing.assert_close(a, b - (1 - factor) * leaf.read(before[leaf.weight]), msg=leaf.key)


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


# Numerics of the difference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_tiny_updates_of_unknown_bases_are_not_lost_beside_the_weights(dtype, tolerance):
    """Gradients of 1e-7 beside weights near 1: plain subtraction keeps few of their bits, none in bfloat16."""
    model = nn.Linear(6, 4, bias=False).to(dtype)
    leaf = Leaf("weight", "weight", A.Linear((4, 6)), 0.0)
    opt = ModularOptimizer(PlainSGD(model.parameters()), Norm(model, [leaf]), lr=0.0)
    gradient = 1e-7 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    for _ in range(4):
        model.weight.grad = gradient.clone()
        update = opt._base_step.updates(opt.param_groups, opt._active())[0]
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
    update = opt._base_step.updates(opt.param_groups, opt._active())[0]
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


# A torch.optim.Optimizer ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("make", [torch.optim.AdamW, Lion, torch.optim.Adafactor])
def test_bfloat16_parameters(make):
    model, opt = setup(make, dtype=torch.bfloat16, lr=0.1)
    before = values(model)
    losses = train(model, opt, 30)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name != "unused")
    assert losses[-1] < losses[0]
    assert all(v.dtype == torch.float32 for v in opt._vectors.values() if isinstance(v, torch.Tensor))


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


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["normalize", "dualize"])
@each_base
def test_resume_is_bit_for_bit(make, mode):
    model, opt = setup(make, lr=0.1, mode=mode, weight_decay=0.1)
    scheduler = schedules.CosineAnnealingLR(opt, 20)
    for step in range(4):
        train(model, opt, 1, start=step)
        scheduler.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "schedule": scheduler.state_dict()}, file)
    for step in range(4, 8):
        train(model, opt, 1, start=step)
        scheduler.step()

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, resumed = setup(make, lr=0.7, mode=mode, seed=1)
    schedule = schedules.CosineAnnealingLR(resumed, 20)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    schedule.load_state_dict(saved["schedule"])
    for step in range(4, 8):
        train(again, resumed, 1, start=step)
        schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert resumed.state is resumed.base.state
    assert resumed._vectors.keys() == opt._vectors.keys()


def test_resume_needs_the_power_vectors():
    """The test above would notice if they were lost: without them the next step differs."""
    model, opt = setup(torch.optim.SGD, lr=0.1)
    train(model, opt, 5)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    results = []
    for drop in (False, True):
        again, resumed = setup(torch.optim.SGD)
        again.load_state_dict(saved[0])
        state = copy.deepcopy(saved[1])
        if drop:
            state["modnorm"]["vectors"] = {}
        resumed.load_state_dict(state)
        train(again, resumed, 1, start=5)
        results.append(values(again))
    assert not torch.equal(results[0]["down.weight"], results[1]["down.weight"])


def test_state_dict_has_the_layout_that_torch_expects():
    model, opt = setup(torch.optim.AdamW)
    train(model, opt, 1)
    state = opt.state_dict()
    plain = opt.base.state_dict()
    assert state["state"].keys() == plain["state"].keys() and state["base_param_groups"] == plain["param_groups"]
    assert state["param_groups"][0]["params"] == plain["param_groups"][0]["params"]
    assert state["param_groups"][0]["lr"] == 1.0 and state["base_param_groups"][0]["lr"] == 1e-3
    assert state["modnorm"]["version"] == 1 and state["modnorm"]["digest"] == "digest"
    assert isinstance(state["modnorm"]["vectors"]["embed.weight"], list)
    assert state["modnorm"]["vectors"]["down.weight"].shape == (1, 8, 12)


def test_checkpoints_of_others_are_refused():
    model, opt = setup(torch.optim.AdamW)
    train(model, opt, 1)
    state = copy.deepcopy(opt.state_dict())
    fresh_model, fresh = setup(torch.optim.AdamW)
    with pytest.raises(FormatError, match="not saved by a ModularOptimizer"):
        fresh.load_state_dict(opt.base.state_dict())
    with pytest.raises(FormatError, match="has version 2; this package reads version 1"):
        fresh.load_state_dict(state | {"modnorm": state["modnorm"] | {"version": 2}})
    with pytest.raises(OptimizerError, match="saved with another norm"):
        fresh.load_state_dict(state | {"modnorm": state["modnorm"] | {"digest": "other"}})
    with pytest.raises(OptimizerError, match="saved with another norm"):
        fresh.load_state_dict(state | {"modnorm": state["modnorm"] | {"vectors": {"nowhere": torch.ones(1, 1)}}})
    fewer = ModularOptimizer(torch.optim.AdamW([fresh_model.gain]), norm_of(fresh_model), weight_decay=0.1)
    with pytest.raises(OptimizerError, match="other parameter groups"):
        fewer.load_state_dict(state)
    assert not fresh.state and not fresh._vectors


def test_state_dict_hooks_run():
    model, opt = setup()
    seen = []
    opt.register_state_dict_pre_hook(lambda o: seen.append("save"))
    opt.register_load_state_dict_pre_hook(lambda o, s: seen.append("before"))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("after"))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["save", "before", "after"]


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("make", [torch.optim.AdamW, Lion])
def test_nonfinite_gradients_change_nothing(make, bad):
    model, opt = setup(make, weight_decay=0.5, settings=dict(weight_decay=0.0))
    train(model, opt, 2)
    state = copy.deepcopy(opt.state_dict())
    before = values(model)
    model.qkv.weight.grad[3, 2] = bad
    with pytest.raises(NonFiniteError, match=r"The gradient of qkv.weight holds NaN or infinity.*nothing was changed"):
        opt.step()
    opt.nonfinite = "skip"
    assert opt.step() is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    after = opt.state_dict()
    for index, entry in state["state"].items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][index][key]))
    assert torch.equal(state["modnorm"]["vectors"]["down.weight"], after["modnorm"]["vectors"]["down.weight"])
    model.gain.grad[0] = math.nan
    opt.nonfinite = "raise"
    with pytest.raises(NonFiniteError, match="and of 1 other weights"):
        opt.step()


@pytest.mark.parametrize("make", [torch.optim.SGD, Lion, torch.optim.LBFGS])
def test_nonfinite_gradients_found_by_a_closure(make, caplog):
    model = nn.Linear(3, 2, bias=False)
    opt = ModularOptimizer(
        make(model.parameters()), Norm(model, [Leaf("weight", "weight", A.Linear((2, 3)), 1.0)]), nonfinite="skip"
    )
    before = model.weight.detach().clone()

    def closure():
        opt.zero_grad()
        loss = model(torch.full((1, 3), math.inf)).sum()
        loss.backward()
        return loss

    with caplog.at_level(logging.INFO, logger="modnorm_fx"):
        loss = opt.step(closure)
    assert not loss.isfinite() and "step skipped" in caplog.text
    assert torch.equal(model.weight, before)
    opt.nonfinite = "raise"
    with pytest.raises(NonFiniteError):
        opt.step(closure)
    assert torch.equal(model.weight, before)


class Divides(torch.optim.SGD):
    """Divides by its gradient: finite gradients, infinite updates."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p -= 1.0 / p.grad


@pytest.mark.parametrize("mode", ["normalize", "dualize"])
def test_nonfinite_updates_change_no_weight(mode):
    model, opt = setup(Divides, mode=mode, weight_decay=0.5)
    before = values(model)
    backward(model)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.fill_(1.0)
    model.gain.grad[0] = 0.0
    with pytest.raises(NonFiniteError, match="The update of gain holds NaN or infinity.*the weights were not changed"):
        opt.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()) and not opt._vectors


def test_a_huge_finite_update_is_refused_rather_than_turned_into_nan():
    model, opt = setup(torch.optim.SGD)
    before = values(model)
    backward(model)
    model.qkv.weight.grad.mul_(1e25)
    with pytest.raises(NonFiniteError, match="qkv.weight"):
        opt.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_sparse_gradients_unused_weights_and_changed_shapes_are_named():
    model, opt = setup()
    before = values(model)
    backward(model)
    model.unused.grad = torch.ones(3)
    with pytest.raises(OptimizerError, match="unused has a gradient, but the norm lists it as unused"):
        opt.step()
    model.unused.grad = None
    dense = model.embed.weight.grad
    model.embed.weight.grad = dense.to_sparse()
    with pytest.raises(OptimizerError, match="The gradient of embed.weight is sparse"):
        opt.step()
    model.embed.weight.grad = dense
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()) and not opt.state
    model.gain.grad = None
    model.gain.data = torch.ones(13)
    with pytest.raises(ModelMismatchError, match=r"gain has shape \[13\]; the norm was inferred for \[12\]"):
        opt.step()
    assert torch.equal(model.down.weight, before["down.weight"])


def test_unknown_parameters_are_counted_with_shape_and_group():
    model = Net()
    stranger = nn.Parameter(torch.zeros(2, 3))
    base = torch.optim.SGD([{"params": [model.gain]}, {"params": [stranger, nn.Parameter(torch.zeros(1))]}])
    with pytest.raises(OptimizerError, match=r"does not know 2 .*shape \[2, 3\] in group 1; shape \[1\] in group 1"):
        ModularOptimizer(base, norm_of(model))
    opt = ModularOptimizer(torch.optim.SGD([model.gain]), norm_of(model))
    with pytest.raises(OptimizerError, match=r"does not know 1 .*group 1"):
        opt.add_param_group({"params": stranger})
    assert len(opt.param_groups) == len(opt.base.param_groups) == 1
    opt.base.add_param_group({"params": [model.down.weight]})
    with pytest.raises(OptimizerError, match="The base has 2 parameter groups, the wrapper 1"):
        opt.step()


@pytest.mark.parametrize(
    "options",
    [{"mode": "dual"}, {"backend": "cuda"}, {"nonfinite": "ignore"}, {"lr": -1.0}, {"weight_decay": math.nan}],
)
def test_bad_arguments_are_refused(options):
    model = Net()
    with pytest.raises(OptimizerError, match=next(iter(options))):
        ModularOptimizer(torch.optim.SGD(model.parameters()), norm_of(model), **options)


def test_bad_bases_are_refused():
    model, opt = setup()
    for base in (opt, model, None):
        with pytest.raises(OptimizerError, match="must be another torch.optim.Optimizer"):
            ModularOptimizer(base, opt.norm)
    with pytest.raises(OptimizerError, match="differentiable"):
        ModularOptimizer(torch.optim.Adam(model.parameters(), differentiable=True), opt.norm)


# What is said about settings of the base -----------------------------------------------------------------------------


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


# Quality of the warm power iteration ---------------------------------------------------------------------------------


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
    assert min(quality) > 0.85
