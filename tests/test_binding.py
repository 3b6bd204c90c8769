"""How a norm knows the parameters of a model that goes on living: moved, copied, wrapped, tied."""

import copy
import gc

import pytest
import torch
from torch import nn

import modnorm_fx as mn
from modnorm_fx.errors import ModelMismatchError

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


def known(norm, model) -> bool:
    return all(norm.parameter_name(p) == name for name, p in model.named_parameters())


def test_a_model_can_be_moved_by_swapping_its_tensors():
    model = net()
    norm = mn.convert(model, (X,))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model[0].weight.dtype == torch.float64 and known(norm, model)


def test_parameters_that_are_new_objects_in_the_old_places_are_known():
    model = net()
    norm = mn.convert(model, (X,))
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    before = model[0].weight
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert model[0].weight is not before and known(norm, model)
    assert norm.parameter_name(before) is None


def test_the_copy_of_a_norm_knows_the_copy_of_the_model_that_was_copied_with_it():
    model = net()
    norm = mn.convert(model, (X,))
    twin, twin_norm = copy.deepcopy((model, norm))
    assert known(twin_norm, twin) and not known(twin_norm, model) and known(norm, model)
    assert copy.deepcopy(norm) is norm


def test_groups_can_be_added_to_the_copy_of_an_optimizer():
    model = net()
    opt = mn.ModularOptimizer(torch.optim.SGD(model[0].parameters(), lr=1.0), mn.convert(model, (X,)), lr=0.1)
    twin, twin_opt = copy.deepcopy((model, opt))
    twin_opt.add_param_group({"params": list(twin[2].parameters())})
    before = twin[2].weight.detach().clone()
    twin(X).square().sum().backward()
    twin_opt.step()
    assert not torch.equal(before, twin[2].weight)


def test_a_wrapper_that_is_gone_leaves_what_it_wrapped():
    class Loss(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x).square()

    model = net()
    norm = mn.convert(Loss(model), (X,))
    gc.collect()
    assert [norm.parameter_name(p) for p in model.parameters()] == [f"inner.{n}" for n, _ in model.named_parameters()]


def test_a_norm_keeps_no_model_alive():
    norm = mn.convert(net(), (X,))
    gc.collect()
    assert all(place.parameter() is None for place in norm._binding.places)


def test_weights_that_were_tied_since_are_refused_before_a_step():
    model = net()
    norm = mn.convert(model, (X,))
    model[2].weight = model[0].weight
    with pytest.raises(ModelMismatchError, match=r"0\.weight and 2\.weight are one weight now.*") as caught:
        mn.ModularOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), norm, lr=0.1)
    assert "convert the model again" in str(caught.value)
    mn.ModularOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), mn.convert(model, (X,)), lr=0.1)
