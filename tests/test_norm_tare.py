"""``tare``: which masses a path changes, what stays, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from every_atom import CASES, CONVENTIONS, updates
from staged import With
from torch import nn

import modnorm_fx as mn
from modnorm_fx.errors import MassError

both = pytest.mark.parametrize("convention", CONVENTIONS)


@both
def test_tare_sets_one_mass_and_leaves_the_others(convention):
    _, norm = CASES[convention]
    heavier = norm.tare("qkv", 12.0)
    for old, new in zip(norm.leaves, heavier.leaves, strict=True):
        assert (new.mass == old.mass) == (not old.weight.startswith("qkv."))
        assert new.sensitivity * new.scale == pytest.approx(old.sensitivity * old.scale)
        share = norm.convention.share(new.mass, heavier.mass)
        assert new.target == pytest.approx(share / (new.sensitivity * new.scale))
    assert math.fsum(leaf.mass for leaf in heavier.leaves if leaf.weight.startswith("qkv.")) == pytest.approx(12.0)
    ratios = {round(n.mass / o.mass, 9) for o, n in zip(norm.leaves, heavier.leaves, strict=True) if "qkv" in o.key}
    assert len(ratios) == 1  # all in proportion


@both
def test_tare_returns_a_new_norm(convention):
    _, norm = CASES[convention]
    before = norm.targets
    assert norm.tare("qkv", 12.0) is not norm and norm.targets == before
    again = norm.tare("qkv", 12.0).tare("qkv", math.fsum(leaf.mass for leaf in norm.leaves if "qkv" in leaf.key))
    assert again.targets == pytest.approx(before)
    assert norm.tare("", 5.0).targets == pytest.approx(before)  # the whole: nothing changes
    assert norm.tare("", 5.0).mass == pytest.approx(5.0)


@both
def test_a_path_may_be_a_leaf_a_parameter_a_module_or_another_name(convention):
    _, norm = CASES[convention]
    key = next(leaf.key for leaf in norm.leaves if leaf.weight == "qkv.weight")
    for path, hit in (
        (key, {key}),
        ("qkv.weight", {leaf.key for leaf in norm.leaves if leaf.weight == "qkv.weight"}),
        ("qkv", {leaf.key for leaf in norm.leaves if leaf.weight.startswith("qkv.")}),
        ("head.weight", {"word.weight"}),
    ):
        changed = norm.tare(path, 9.0)
        moved = {o.key for o, n in zip(norm.leaves, changed.leaves, strict=True) if o.mass != n.mass}
        assert moved == hit
        assert math.fsum(leaf.mass for leaf in changed.leaves if leaf.key in hit) == pytest.approx(9.0)


@pytest.mark.parametrize("path", ["decoder", "decoder.head", "decoder.head.weight", "encoder", "encoder.embed"])
def test_a_tied_weight_lies_at_every_one_of_its_names(path):
    """As it does for torch: the masses that change are those of the parameters that the module has."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Module(), nn.Module()
            self.encoder.embed, self.encoder.mix = nn.Embedding(7, 4), nn.Linear(4, 4)
            self.decoder.mix, self.decoder.head = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.decoder.head.weight = self.encoder.embed.weight

        def forward(self, ids):
            return self.decoder.head(self.decoder.mix(self.encoder.mix(self.encoder.embed(ids))))

    model, ids = Net(), torch.zeros(2, 3, dtype=torch.long)
    norm = mn.convert(model, (ids,))
    part = model.get_submodule(path) if not path.endswith("weight") else None
    inside = {id(p) for p in (part.parameters() if part is not None else [model.get_parameter(path)])}
    wanted = {name for name, p in model.named_parameters() if id(p) in inside}
    for changed in (norm.tare(path, 9.0), mn.convert(model, (ids,), masses={path: 9.0})):
        pairs = zip(norm.leaves, changed.leaves, strict=True)
        assert {old.weight for old, new in pairs if old.mass != new.mass} == wanted
        assert math.fsum(leaf.mass for leaf in changed.leaves if leaf.weight in wanted) == pytest.approx(9.0)
    with pytest.raises(MassError, match="Nothing in the norm lies at 'decoder.haed'(.|\n)*'decoder.head'"):
        norm.tare("decoder.haed", 1.0)


@both
def test_mass_zero_freezes(convention):
    _, norm = CASES[convention]
    frozen = norm.tare("qkv", 0.0)
    given = updates(frozen)
    assert float(frozen.norm(given)) == math.inf
    frozen.normalize_(given)
    assert not given["qkv.weight"].any() and not given["qkv.bias"].any()
    assert float(frozen.norm(given)) == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(MassError, match="'qkv' has mass 0"):
        frozen.tare("qkv", 1.0)


def test_tare_refusals():
    _, norm = CASES["tracked"]
    with pytest.raises(MassError, match="Nothing in the norm lies at 'qvk'(.|\n)*'qkv"):
        norm.tare("qvk", 1.0)
    with pytest.raises(MassError, match="Nothing in the norm lies at 'qk'"):
        norm.tare("qk", 1.0)  # a prefix of a name is no path
    for bad in (-1.0, math.nan, math.inf, "1"):
        with pytest.raises(MassError, match="'qkv'"):
            norm.tare("qkv", bad)
    with pytest.raises(MassError, match="All masses would be zero"):
        norm.tare("", 0.0)


def test_adapters_can_have_all_of_the_mass():
    """The README's call: what is frozen counts for nothing, and a step of what trains moves the output by all of lr."""

    def adapted(s, x):
        return s.base(x) + s.up(s.down(x))

    model = With(adapted, base=nn.Linear(8, 8), down=nn.Linear(8, 2, bias=False), up=nn.Linear(2, 8, bias=False))
    model.base.requires_grad_(False)
    frozen = {name: 0 for name, p in model.named_parameters() if not p.requires_grad}
    norm = mn.convert(model, (torch.randn(4, 8),), masses=frozen)
    shares = {leaf.key: leaf.target * leaf.sensitivity * leaf.scale for leaf in norm.leaves}
    assert shares["base.weight"] == 0 == shares["base.bias"]
    assert sum(share**2 for share in shares.values()) == pytest.approx(1.0)
    opt = mn.ModularOptimizer(torch.optim.SGD([model.down.weight, model.up.weight], lr=1.0), norm, lr=0.1)
    model(torch.randn(4, 8)).square().sum().backward()
    opt.step()
