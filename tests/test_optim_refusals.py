"""What ModularOptimizer refuses, by which words, and that nothing has changed then."""

import copy
import logging
import math

import pytest
import torch
from fake_norm import Leaf, Lion, Net, Norm, backward, norm_of, remembered, setup, train, values
from torch import nn

from modnorm_fx import atoms as A
from modnorm_fx.errors import ModelMismatchError, NonFiniteError, OptimizerError
from modnorm_fx.optim import ModularOptimizer


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
    (old,), (new,) = (saved["modnorm"]["leaves"]["down.weight"]["vectors"] for saved in (state, after))
    assert torch.equal(old, new)
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
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()) and not remembered(opt)


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
    [
        {"mode": "dual"},
        {"backend": "cuda"},
        {"nonfinite": "ignore"},
        *({"lr": bad} for bad in (-1.0, None, "x", "0.1", torch.ones(2), [0.1])),
        *({"weight_decay": bad} for bad in (math.nan, None)),
    ],
    ids=str,
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


@pytest.mark.parametrize("norm", [None, Net(), torch.optim.SGD])
def test_what_is_no_norm_is_refused(norm):
    with pytest.raises(OptimizerError, match=r"must be a ModularNorm, not \w+(.|\n)*modnorm_fx.convert\(model\)"):
        ModularOptimizer(torch.optim.SGD(Net().parameters(), lr=0.1), norm)


@pytest.mark.parametrize("group", [{}, None, {"lr": 0.1}, {"lr": -1.0}, {"lr": None}, {"weight_decay": "x"}], ids=str)
def test_bad_groups_are_refused_and_change_nothing(group):
    model = Net()
    opt = ModularOptimizer(torch.optim.SGD([model.gain], lr=0.1), norm_of(model), lr=0.1)
    if group and group != {"lr": 0.1}:
        group = group | {"params": [model.down.weight]}
    with pytest.raises(OptimizerError):
        opt.add_param_group(group)
    assert len(opt.param_groups) == len(opt.base.param_groups) == 1
    train(model, opt, 1)


def test_sharded_parameters_are_refused(tmp_path):
    model = nn.Linear(3, 2, bias=False)
    norm = Norm(model, [Leaf("weight", "weight", A.Linear((2, 3)), 1.0)])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        torch.distributed.fsdp.fully_shard(model)
        base = torch.optim.AdamW(model.parameters())
        with pytest.raises(OptimizerError, match=r"shape \[2, 3\] in group 0 is sharded \(it is a DTensor\)"):
            ModularOptimizer(base, norm)
    finally:
        torch.distributed.destroy_process_group()
