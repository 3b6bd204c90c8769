"""The modular norm of a model with every kind of weight: every number against singular values by hand."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings

import pytest
import torch
from every_atom import CASES, CONVENTIONS, EveryAtom, pieces, updates, written_out
from torch import Tensor, nn

import modnorm_fx as mn
from modnorm_fx import tree as T
from modnorm_fx.atoms import Bias, Scalar, Slice, Tied
from modnorm_fx.errors import ModelMismatchError, ModnormError, NonFiniteError
from modnorm_fx.norm import Leaf, ModularNorm

both = pytest.mark.parametrize("convention", CONVENTIONS)


def modular(norm: ModularNorm, given: dict[str, Tensor]) -> float:
    """The modular norm from its definition."""
    return max(written_out(leaf.atom, leaf.read(given[leaf.weight])) / leaf.target for leaf in norm.leaves)


# --- what a leaf is ---------------------------------------------------------------------------------------------------


@both
def test_every_parameter_is_a_leaf_in_parts_that_do_not_overlap(convention):
    model, norm = CASES[convention]
    assert norm.unused == ("unused",)
    assert set(norm.shapes) == {name for name, _ in model.named_parameters()}
    for name, shape in norm.shapes.items():
        seen = torch.zeros(shape, dtype=torch.int)
        for leaf in norm.leaves:
            if leaf.weight == name:
                part = leaf.read(seen)
                assert tuple(part.shape) == leaf.atom.shape
                part = part + 1
                leaf.write_(seen, part)
        assert bool((seen == (name != "unused")).all()), name


@both
def test_targets_follow_from_mass_sensitivity_and_scale(convention):
    _, norm = CASES[convention]
    shares = []
    for leaf in norm.leaves:
        share = norm.convention.share(leaf.mass, norm.mass)
        shares.append(share)
        assert leaf.target == pytest.approx(share / (leaf.sensitivity * leaf.scale))
        assert 0 < leaf.target < math.inf and leaf.status == "rules"
    assert norm.convention.add(shares) == pytest.approx(1.0)
    assert norm.targets == {leaf.key: leaf.target for leaf in norm.leaves}
    assert norm.mass == pytest.approx(math.fsum(leaf.mass for leaf in norm.leaves))


def test_all_kinds_of_atoms_are_there():
    kinds = {type(leaf.atom).__name__ for leaf in CASES["paper"][1].leaves}
    wanted = "Linear Conv PatchConv Table Experts Gain Bias LogitBias Scalar Tied"
    assert set(wanted.split()) <= kinds
    assert {type(leaf.atom).__name__ for leaf in CASES["tracked"][1].leaves} >= {"Embedding"}


def test_reading_and_writing_a_periodic_slice():
    leaf = Leaf("w", "w", (Slice(0, 1, 2, 3),), Bias((2, 4)), 1.0, 1.0, 1.0, 1.0, 0.0)
    for tensor in (torch.zeros(6, 4), torch.zeros(4, 6).t(), torch.zeros(6, 8)[:, ::2]):
        part = leaf.read(tensor)
        part = part + 1
        leaf.write_(tensor, part)
        assert tensor.sum(1).tolist() == [0, 4, 0, 0, 4, 0]


def test_reading_a_slice_of_a_slice():
    leaf = Leaf("w", "w", (Slice(0, 2, 6, 6), Slice(0, 0, 1, 2)), Bias((2, 4)), 1.0, 1.0, 1.0, 1.0, 0.0)
    tensor = torch.zeros(6, 4)
    leaf.write_(tensor, leaf.read(tensor) + 1)
    assert tensor.sum(1).tolist() == [0, 0, 4, 0, 4, 0]


# --- norm and normalize_ ----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("eta", [1.0, 0.02, 300.0])
def test_a_normalised_update_has_norm_eta_and_every_leaf_its_target(convention, eta):
    _, norm = CASES[convention]
    given = updates(norm)
    before = {leaf.key: pieces(leaf.atom, leaf.read(given[leaf.weight])) for leaf in norm.leaves}
    norm.normalize_(given, eta)
    for leaf in norm.leaves:
        sizes, largest = pieces(leaf.atom, leaf.read(given[leaf.weight])), max(before[leaf.key])
        assert max(sizes) == pytest.approx(eta * leaf.target, rel=1e-4), leaf.key
        for old, new in zip(before[leaf.key], sizes, strict=True):  # pieces saturate by themselves, up to a factor
            assert new == pytest.approx(eta * leaf.target * min(1.0, 10 * old / largest), rel=1e-4), leaf.key
    assert float(norm.norm(given)) == pytest.approx(eta, rel=1e-4)
    assert modular(norm, given) == pytest.approx(eta, rel=1e-4)


@both
def test_the_norm_is_its_definition(convention):
    _, norm = CASES[convention]
    given = updates(norm, 1)
    assert float(norm.norm(given)) == pytest.approx(modular(norm, given), rel=1e-4)
    for leaf in norm.leaves:  # of one parameter alone
        alone = {leaf.weight: given[leaf.weight]}
        expected = max(
            written_out(other.atom, other.read(given[leaf.weight])) / other.target
            for other in norm.leaves
            if other.weight == leaf.weight
        )
        assert float(norm.norm(alone)) == pytest.approx(expected, rel=1e-4)


@both
def test_it_is_a_norm(convention):
    _, norm = CASES[convention]
    a, b = updates(norm, 2), updates(norm, 3)
    size = float(norm.norm(a))
    assert float(norm.norm({k: -2.5 * v for k, v in a.items()})) == pytest.approx(2.5 * size, rel=1e-4)
    assert float(norm.norm({k: a[k] + b[k] for k in a})) <= (size + float(norm.norm(b))) * (1 + 1e-5)
    assert float(norm.norm({k: 0 * v for k, v in a.items()})) == 0.0
    assert float(norm.norm({})) == 0.0
    assert norm.norm(a).dtype == torch.float32 and norm.norm(a).dim() == 0


@both
def test_doubling_eta_doubles_the_update(convention):
    _, norm = CASES[convention]
    one, two = updates(norm), updates(norm)
    norm.normalize_(one, 0.5)
    norm.normalize_(two, 1.0)
    for name in one:
        assert torch.allclose(2 * one[name], two[name], rtol=1e-5, atol=1e-7)


@both
def test_zero_stays_zero(convention):
    _, norm = CASES[convention]
    given = updates(norm)
    zero = {"word.weight", "norm.bias", "temperature"}
    for name in zero:
        given[name].zero_()
    given["qkv.weight"][::12] = 0  # a row of every head's q
    given["mix.weight"][3] = 0  # a whole tap's group
    norm.normalize_(given)
    for name in zero:
        assert not given[name].any()
    assert not given["qkv.weight"][::12].any() and not given["mix.weight"][3].any()
    assert float(norm.norm(given)) == pytest.approx(1.0, rel=1e-4)
    empty = {name: torch.zeros(shape) for name, shape in norm.shapes.items() if name != "unused"}
    norm.normalize_(empty)
    norm.dualize_(empty)
    assert not any(v.any() for v in empty.values())


@both
def test_a_small_piece_is_not_blown_up(convention):
    _, norm = CASES[convention]
    given = updates(norm)
    given["position"][:, 0] *= 1e-6
    before = given["position"].clone()
    norm.normalize_(given)
    factors = (given["position"] / before).mean(-1).flatten()
    assert float(factors[0]) <= 10.001 * float(factors[1:].min())


@both
@pytest.mark.parametrize("dtype, slack", [(torch.bfloat16, 2e-2), (torch.float16, 5e-3), (torch.float64, 1e-6)])
def test_other_precisions(convention, dtype, slack):
    _, norm = CASES[convention]
    given = updates(norm, dtype=dtype)
    norm.normalize_(given)
    assert all(v.dtype == dtype for v in given.values())
    assert float(norm.norm(given)) == pytest.approx(1.0, rel=slack)


@both
def test_updates_of_any_layout(convention):
    """Transposed, channels last, every second entry of something larger."""
    _, norm = CASES[convention]
    plain = updates(norm)
    odd = {}
    for name, value in plain.items():
        flipped = value.permute(*reversed(range(value.dim()))).contiguous() if value.dim() else value.clone()
        odd[name] = flipped.permute(*reversed(range(value.dim()))) if value.dim() else flipped
    assert not odd["qkv.weight"].is_contiguous()
    spread = {name: torch.stack([v, v], -1)[..., 0] for name, v in plain.items()}
    for given in (plain, odd, spread):
        norm.normalize_(given)
    for name, value in plain.items():
        assert torch.allclose(odd[name], value, atol=1e-6), name
        assert torch.allclose(spread[name], value, atol=1e-6), name


@both
def test_some_parameters_only(convention):
    _, norm = CASES[convention]
    given = {"qkv.weight": updates(norm)["qkv.weight"]}
    norm.normalize_(given, 2.0)
    assert float(norm.norm(given)) == pytest.approx(2.0, rel=1e-4)


def test_a_tied_weight_counts_by_the_triangle_inequality():
    """Under paper: the sum over its uses of gain times norm at that use (theory, section 5)."""
    _, norm = CASES["paper"]
    (leaf,) = (leaf for leaf in norm.leaves if leaf.weight == "word.weight")
    uses = [p for p in T.allot(norm.tree, norm.convention) if p.node.key == leaf.key]
    assert len(uses) == 2 and isinstance(leaf.atom, Tied)
    w = updates(norm)["word.weight"]
    by_hand = math.fsum(p.gain * written_out(p.node.atom, w) for p in uses) * norm.mass / leaf.mass
    assert float(norm.norm({"word.weight": w})) == pytest.approx(by_hand, rel=1e-4)
    assert float(norm.norm({"head.weight": w})) == pytest.approx(by_hand, rel=1e-4)  # by its other name


def test_a_tied_embedding_counts_by_its_rows_under_tracked():
    """Each use by what rows of RMS 1 do to the output: looked up as they are, as a head in quadrature over features."""
    _, norm = CASES["tracked"]
    (leaf,) = (leaf for leaf in norm.leaves if leaf.weight == "word.weight")
    lookup, head = (p.gain for p in T.allot(norm.tree, norm.convention) if p.node.key == leaf.key)
    w = updates(norm)["word.weight"]
    by_hand = math.sqrt(lookup**2 + head**2 * w.shape[1]) * float(w.square().mean(1).sqrt().max())
    share = math.sqrt(leaf.mass / norm.mass)
    assert float(norm.norm({"word.weight": w})) == pytest.approx(by_hand / share, rel=1e-4)


@pytest.mark.parametrize("stored", ["as rows", "as columns"])
def test_a_step_of_a_tied_embedding_moves_the_output_as_far_as_its_target_says(stored):
    """Random updates, and the forward pass itself for what they do."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix = nn.Embedding(512, 256), nn.Linear(256, 256, bias=False)

        def forward(self, ids):
            x = self.mix(nn.functional.layer_norm(self.embed(ids), (256,)))
            return nn.functional.linear(x, self.embed.weight) if stored == "as rows" else x @ self.embed.weight.T

    torch.manual_seed(0)
    model, ids = Net(), torch.randint(512, (4, 64))
    norm = mn.convert(model, (ids,))
    norm.initialize_(model)
    update = {"embed.weight": torch.randn(512, 256)}
    norm.normalize_(update, 0.01)
    leaf = norm.leaves[0]
    with torch.no_grad():
        before = model(ids)
        model.embed.weight += update["embed.weight"]
        change = (model(ids) - before).square().mean().sqrt() / before.square().mean().sqrt()
    assert float(change) == pytest.approx(0.01 * math.sqrt(leaf.mass / norm.mass), rel=0.1)


@pytest.mark.parametrize("method", ["norm", "normalize_", "dualize_"])
def test_refusals_change_nothing(method):
    model, norm = CASES["tracked"]
    good = updates(norm)

    def refused(error: type, text: str, **bad: object) -> None:
        given = {k: v.clone() for k, v in good.items()} | bad
        with pytest.raises(error, match=text):
            getattr(norm, method)(given)
        for name in good:
            assert name in bad or torch.equal(given[name], good[name])

    refused(ModelMismatchError, "no parameter 'qvk.weight'(.|\n)*'qkv.weight'", **{"qvk.weight": good["qkv.weight"]})
    refused(ModelMismatchError, r"shape \[3, 3\](.|\n)*\[48, 16\]", **{"qkv.weight": torch.zeros(3, 3)})
    refused(ModelMismatchError, "'unused' reaches no output", unused=torch.zeros(3, 3))
    refused(NonFiniteError, "'shift' holds NaN", shift=torch.full((16,), math.nan))
    refused(NonFiniteError, "'shift' holds NaN", shift=torch.full((16,), math.inf))
    refused(ModnormError, r"'unused' is None(.|\n)*if p.grad is not None", unused=model.unused.grad)
    refused(ModnormError, "'shift' is None", shift=None)
    refused(ModnormError, "'shift' is no tensor but a list", shift=[0.0] * 16)
    refused(ModnormError, r"'shift' is of type torch.int64(.|\n)*update.float\(\)", shift=torch.ones(16).long())
    refused(ModnormError, r"'shift' is sparse(.|\n)*to_dense", shift=torch.ones(16).to_sparse())
    with pytest.raises(ModnormError, match="mapping from parameter names to tensors; this is a generator"):
        getattr(norm, method)(model.named_parameters())


@both
@pytest.mark.parametrize("method", ["normalize_", "dualize_"])
def test_a_tied_weight_under_both_its_names_is_one_update(convention, method):
    _, norm = CASES[convention]
    update = updates(norm)["word.weight"]
    alone, both_names = {"word.weight": update.clone()}, update.clone()
    getattr(norm, method)(alone, 0.1)
    getattr(norm, method)({"word.weight": both_names, "head.weight": both_names.detach()}, 0.1)  # as state_dict() does
    assert torch.equal(both_names, alone["word.weight"])
    assert float(norm.norm({"head.weight": both_names, "word.weight": both_names})) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("method", ["norm", "normalize_", "dualize_"])
def test_two_updates_of_one_tied_weight_are_refused(method):
    _, norm = CASES["tracked"]
    good = updates(norm)
    given = {"head.weight": good["word.weight"].clone(), **{k: v.clone() for k, v in good.items()}}
    with pytest.raises(ModelMismatchError, match="'head.weight' and 'word.weight' are one tied weight"):
        getattr(norm, method)(given)
    assert all(torch.equal(given[name], good[name]) for name in good)


# --- dualize_, initialize_, project_ ----------------------------------------------------------------------------------


@both
def test_the_dual_is_the_steepest_step_of_its_norm(convention):
    """No update of the same norm has a larger inner product with the gradient (tied weights: no closed form)."""
    _, norm = CASES[convention]
    gradient = updates(norm)
    dual = {name: value.clone() for name, value in gradient.items()}
    norm.dualize_(dual, 0.5)
    assert float(norm.norm(dual)) == pytest.approx(0.5, rel=1e-4)

    def gains(step: dict[str, Tensor]) -> dict[str, float]:
        return {name: float((gradient[name] * step[name]).sum()) for name in step}

    best = gains(dual)
    assert all(value > 0 for value in best.values())
    for seed in range(5):
        rival = {name: value + 20 * updates(norm, seed)[name] * (seed > 0) for name, value in gradient.items()}
        norm.normalize_(rival, 0.5)
        for name, value in gains(rival).items():
            tied = any(isinstance(leaf.atom, Tied) for leaf in norm.leaves if leaf.weight == name)
            assert tied or value <= best[name] * (1 + 1e-4), name


@both
def test_initialisation_gives_declared_norms(convention):
    model, norm = copy.deepcopy(CASES[convention][0]), CASES[convention][1]
    unused, temperature = model.unused.detach().clone(), model.temperature.detach().clone()
    norm.initialize_(model, torch.Generator().manual_seed(3))
    tensors = dict(model.named_parameters())
    for leaf in norm.leaves:
        size = written_out(leaf.atom, leaf.read(tensors[leaf.weight].detach()))
        if isinstance(leaf.atom, Scalar):
            continue
        expected = 0.0 if leaf.atom.kind in ("Bias", "LogitBias") else leaf.initial
        assert size == pytest.approx(expected, rel=1e-4), leaf.key
    assert torch.equal(model.unused, unused) and torch.equal(model.temperature, temperature)
    assert model.head.weight is model.word.weight
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


@both
def test_initialisation_repeats_with_the_generator(convention):
    _, norm = CASES[convention]
    first, second, third = EveryAtom(), EveryAtom(), EveryAtom()
    for model, seed in ((first, 1), (second, 1), (third, 2)):
        norm.initialize_(model, torch.Generator().manual_seed(seed))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.qkv.weight, third.qkv.weight)


@both
def test_projection_only_shrinks(convention):
    _, norm = CASES[convention]
    model = EveryAtom()
    norm.initialize_(model)
    with torch.no_grad():
        model.qkv.weight *= 3
        model.transposed *= 0.5
        model.norm.bias.fill_(7.0)  # starts at zero: there is no ball to project on
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    norm.project_(model, 1.5)
    assert torch.allclose(model.qkv.weight, before["qkv.weight"] / 2, rtol=1e-4)
    for name in ("transposed", "norm.bias", "unused", "shift"):
        assert torch.equal(dict(model.named_parameters())[name], before[name]), name


# --- binding, copies, printing ----------------------------------------------------------------------------------------


def test_parameters_are_known_by_identity():
    model, norm = CASES["tracked"]
    for name, parameter in model.named_parameters():
        assert norm.parameter_name(parameter) == name
    assert norm.parameter_name(model.head.weight) == "word.weight"
    assert norm.parameter_name(copy.deepcopy(model).shift) is None
    other = EveryAtom()
    assert norm.bind(other).parameter_name(other.shift) == "shift"
    assert norm.parameter_name(other.shift) is None


def test_a_norm_does_not_keep_its_model_alive():
    model = EveryAtom()
    norm = CASES["tracked"][1].bind(model)
    identity = id(model.shift)
    del model
    gc.collect()
    impostor = nn.Parameter(torch.zeros(16))
    assert norm.parameter_name(impostor) is None or id(impostor) != identity


def test_another_model_is_refused_with_the_differences():
    norm = CASES["tracked"][1]
    other = EveryAtom()
    other.shift = nn.Parameter(torch.zeros(5))
    other.extra = nn.Parameter(torch.zeros(5))
    del other.unused
    with pytest.raises(ModelMismatchError) as caught:
        norm.bind(other)
    text = str(caught.value)
    assert "unused is missing" in text and "extra is new" in text and "shift has shape [5], not [16]" in text
    with pytest.raises(ModelMismatchError):
        norm.initialize_(other)
    with pytest.raises(ModelMismatchError):
        norm.project_(other)


def test_the_digest_is_of_names_and_shapes():
    paper, tracked = (CASES[c][1] for c in CONVENTIONS)
    assert paper.digest == tracked.digest and len(paper.digest) == 64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = mn.convert(nn.Linear(3, 4), (torch.zeros(2, 3),))
    assert other.digest != paper.digest


@both
def test_copies_and_pickles(convention):
    _, norm = CASES[convention]
    for twin in (pickle.loads(pickle.dumps(norm)), copy.deepcopy(norm)):
        assert twin.targets == norm.targets and twin.digest == norm.digest
        given = updates(norm)
        twin.normalize_(given)
        assert float(norm.norm(given)) == pytest.approx(1.0, rel=1e-4)


def test_explain():
    _, norm = CASES["tracked"]
    for stage in ("capture", "canonical", "atoms", "branches", "scales", "sensitivities", "mass", "tree", "timing"):
        text = norm.explain(stage)
        assert isinstance(text, str) and text.strip(), stage
    assert "qkv.weight.unflatten(0, (-1, 12))[:, 0:4]" in norm.explain("atoms")
    with pytest.raises(ModnormError, match="no stage 'atom'(.|\n)*atoms"):
        norm.explain("atom")
    assert "word.weight" in str(norm)


def test_an_embedding_whose_lookups_move_nothing_follows_its_head():
    """The norm of a tied embedding is that of its lookups, unless no change of them reaches the output."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids, x):
            return self.head(torch.sign(self.embed(ids)) + x)

    (leaf,) = mn.convert(Net(), (torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 3, 4))).leaves
    assert leaf.target > 0
    assert leaf.atom.describe() == "Linear 4→7"
