"""Totals, equal shares, and that depth changes neither."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modnorm_fx.passes.assign_mass import BIAS_SHARE, SHARES, TOTALS, VECTOR_SHARE, assign_mass
from modnorm_fx.passes.find_stacks import Place
from modnorm_fx.passes.type_atoms import Weight

from modnorm_fx import convert
from modnorm_fx.atoms import Bias, Embedding, Linear
from modnorm_fx.errors import MassError

MATRIX, VECTOR, TABLE = Linear((4, 4)), Bias((4,)), Embedding((9, 4))


def weight(key: str, *atoms) -> Weight:
    return Weight(key, key, (), atoms[0].shape, tuple((None, ("weight", None), a) for a in atoms))


def net(depths: list[int], per_block: int = 2) -> tuple[list[Weight], dict[str, tuple[Place, ...]]]:
    """A stem, stacks of the given depths with matrices and one bias per block, and a head."""
    weights = [weight("stem", MATRIX), weight("head", MATRIX), weight("head.bias", VECTOR)]
    places = {"stem": (Place("stem"),), "head": (Place("head"),), "head.bias": (Place("head"),)}
    for s, depth in enumerate(depths):
        for b in range(depth):
            for i in range(per_block + 1):
                key = f"s{s}.{b}.{i}"
                weights.append(weight(key, VECTOR if i == per_block else MATRIX))
                places[key] = (Place("stacks", f"s{s}", f"s{s}.{b}"),)
    return weights, places


depths = st.lists(st.integers(1, 6), min_size=1, max_size=3)
totals = st.fixed_dictionaries({}, optional={k: st.floats(0.1, 20) for k in (*TOTALS, *SHARES)})


@given(depths, totals, st.integers(1, 4))
def test_totals(depths, given_masses, per_block):
    weights, places = net(depths, per_block)
    masses = assign_mass(weights, places, given_masses)
    wanted = TOTALS | {k: v for k, v in given_masses.items() if k in TOTALS}
    for region, total in wanted.items():
        keys = [k for k, (p,) in places.items() if p.region == region]
        assert math.fsum(masses[k] for k in keys) == pytest.approx(total)
    for s, depth in enumerate(depths):  # equal shares per stack and block, whatever the depth of the others
        for b in range(depth):
            block = math.fsum(m for k, m in masses.items() if k.startswith(f"s{s}.{b}."))
            assert block == pytest.approx(wanted["stacks"] / len(depths) / depth)
    vectors = given_masses.get("vectors", VECTOR_SHARE)
    biases = vectors * given_masses.get("biases", BIAS_SHARE)
    assert masses["head.bias"] == pytest.approx(biases * masses["head"])
    assert masses["s0.0.0"] == pytest.approx(masses[f"s0.0.{per_block}"] / biases * depths[0])
    linear = assign_mass(weights, places, given_masses, quadrature=False)
    assert linear["s0.0.0"] == pytest.approx(linear[f"s0.0.{per_block}"] / vectors / given_masses.get("biases", 1.0))


def test_a_net_without_stacks_gives_every_matrix_one():
    weights = [weight("a", MATRIX), weight("a.bias", VECTOR), weight("b", TABLE)]
    masses = assign_mass(weights, {w.key: (Place("net"),) for w in weights})
    assert masses == {"a": 1.0, "a.bias": VECTOR_SHARE * BIAS_SHARE, "b": 1.0}


def test_a_tied_weight_has_a_share_of_each_of_its_places():
    weights, places = net([2])
    weights.append(weight("token", TABLE, MATRIX))
    places["token"] = (Place("stem"), Place("head"))
    masses = assign_mass(weights, places)
    assert masses["token"] == pytest.approx(0.5 + 1 / (2 + VECTOR_SHARE * BIAS_SHARE))
    assert math.fsum(masses.values()) == pytest.approx(3.0)


def test_a_region_of_vectors_alone_weighs_as_much_as_its_vectors():
    weights, places = net([2])
    weights, places = [w for w in weights if w.key != "head"], {k: v for k, v in places.items() if k != "head"}
    assert assign_mass(weights, places)["head.bias"] == pytest.approx(VECTOR_SHARE * BIAS_SHARE)


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan, "5", None])
def test_masses_that_are_none_are_refused(bad):
    with pytest.raises(MassError, match="'stacks'"):
        assign_mass(*net([2]), {"stacks": bad})


def test_all_zero_is_refused():
    with pytest.raises(MassError, match="All masses are zero"):
        assign_mass(*net([2]), {"stem": 0, "stacks": 0, "head": 0})


def test_some_zero_is_fine():
    masses = assign_mass(*net([2]), {"stem": 0, "vectors": 0})
    assert masses["stem"] == 0 and masses["head.bias"] == 0 and masses["head"] == 1


def test_biases_are_alike_by_role_stack_and_shape():
    """Of a convolutional net, whose stages are blocks: counted by hand."""
    counts = {
        "layer1.0.bn1.bias": 3, "layer1.1.bn1.bias": 3, "layer1.2.bn1.bias": 3, "layer1.0.bn2.bias": 1,
        "layer2.0.bn1.bias": 1, "layer2.0.bn2.bias": 2, "layer2.1.bn2.bias": 2, "tower.0.bn1.bias": 1, "bn1.bias": 1,
    }  # fmt: skip
    weights, places = [], {}
    for key in counts:
        stack, block = ("", "") if key == "bn1.bias" else (key[:5], key[: key.index(".")])
        weights.append(weight(key, Bias((8,) if "layer2" in key else (4,))))
        places[key] = (Place("stacks" if stack else "stem", stack, block),)
    for block in ("layer1", "layer2", "tower"):
        weights.append(weight(f"{block}.conv", MATRIX))
        places[f"{block}.conv"] = (Place("stacks", block[:5], block),)
    masses = assign_mass(weights, places)
    for key, n in counts.items():
        if key != "bn1.bias":
            block = key[: key.index(".")]
            assert masses[key] == pytest.approx(VECTOR_SHARE * BIAS_SHARE / n * masses[f"{block}.conv"]), key
    assert masses["bn1.bias"] == pytest.approx(VECTOR_SHARE * BIAS_SHARE)


class Branch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(8, elementwise_affine=False)
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(self.norm(x))


def test_biases_of_one_residual_stream_move_it_alike_at_every_depth():
    """Updates that all point one way, through the real network; its output has scale √(1 + n b²).

    By hand: n branches have scale b = min(1, 2/√n), the stream has scale √(1 + k b²) behind branch k, so that by the
    linear layers with norm b what is added there grows to the output by √((1 + n b²)/(1 + k b²)), and the bias's target
    is one over that. In quadrature alone, n targets would move it √n times as far. Here the layers are zero and pass on
    nothing.
    """
    for n in (2, 8, 32):
        net = torch.nn.Sequential(*(Branch() for _ in range(n)))
        x = torch.randn(4, 8)
        norm = convert(net, (x,))
        updates = {name: torch.ones(8) for name, p in net.named_parameters() if p.dim() == 1}
        norm.normalize_(updates, 1.0)
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
            before = net(x)
            for name, update in updates.items():
                net.get_parameter(name).copy_(update)
            change = (net(x) - before).pow(2).mean().sqrt().item()
        alone = VECTOR_SHARE * BIAS_SHARE / (1 + VECTOR_SHARE * BIAS_SHARE / n)
        b = min(1, 4 / n)  # squared
        shrunk = math.fsum(math.sqrt((1 + k * b) / (1 + n * b)) for k in range(1, n + 1)) / n
        assert change / math.sqrt(1 + n * b) == pytest.approx(math.sqrt(alone) * shrunk, rel=1e-4)
