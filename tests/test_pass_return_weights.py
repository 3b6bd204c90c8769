"""Weights that a model returns: they get a use and a norm, and the outputs stay the same."""

import pytest
import torch
from modnorm_fx.passes.return_weights import return_weights
from staged import With, stage
from torch import Tensor, nn

import modnorm_fx as mn

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def policy(deviation):
    """A Gaussian policy as in PPO: the mean, and a deviation that depends on no observation."""
    return With(lambda s, x: (s.mean(x), deviation(s.log_std, x)), mean=nn.Linear(8, 2), log_std=(2,))


POLICIES = {
    "itself": lambda w, x: w,
    "exp": lambda w, x: w.exp(),
    "expanded": lambda w, x: w.exp().expand(len(x), 2),
    "transposed": lambda w, x: w[None].t(),
    "half": lambda w, x: 0.5 * w + 1,
    "times ones": lambda w, x: w.exp() * torch.ones(len(x), 2),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_weight_that_is_returned_trains(name: str) -> None:
    model = policy(POLICIES[name])
    staged = stage(model, X)
    return_weights(staged.module, staged.flow())
    staged.module.recompile()
    assert staged.error() == 0
    norm = mn.convert(model, (X,))
    assert norm.unused == () and "log_std" in norm.targets
    opt = mn.ModularOptimizer(torch.optim.SGD(model.parameters()), norm, lr=0.1)
    before = model.log_std.detach().clone()
    mean, deviation = model(X)
    (mean.square().mean() + deviation.sum()).backward()
    opt.step()
    assert not torch.equal(model.log_std, before)


def test_a_step_moves_that_output_by_the_share_of_its_mass() -> None:
    """Of two outputs that count alike, in quadrature; the deviation is its own output, so that its norm is its RMS."""
    norm = mn.convert(policy(lambda w, x: w), (X,))
    mass = {leaf.key: leaf.mass for leaf in norm.leaves}
    share = (mass["log_std"] / sum(mass.values())) ** 0.5
    update: dict[str, Tensor] = {"log_std": torch.randn(2)}
    norm.normalize_(update)
    assert update["log_std"].square().mean().sqrt() == pytest.approx(norm.targets["log_std"], rel=1e-5)
    assert norm.targets["log_std"] == pytest.approx(share)


def test_it_can_be_the_only_output_that_counts() -> None:
    with pytest.warns(UserWarning, match="mean"):
        norm = mn.convert(policy(lambda w, x: w), (X,), outputs="[1]")
    assert list(norm.targets) == ["log_std"]


def test_a_temperature_beside_the_features_it_is_for() -> None:
    """open_clip returns (image features, text features, logit_scale.exp())."""
    model = With(
        lambda s, x, y: (
            nn.functional.normalize(s.image(x), dim=-1), nn.functional.normalize(s.text(y), dim=-1), s.logit_scale.exp()
        ),
        image=nn.Linear(8, 16), text=nn.Linear(8, 16), logit_scale=(),
    )  # fmt: skip
    norm = mn.convert(model, (X, X))
    assert norm.unused == () and norm.targets["logit_scale"] > 0
