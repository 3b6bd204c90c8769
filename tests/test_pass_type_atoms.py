"""Which atom a use makes of a weight; matrices against the singular values of the operation itself."""

import math

import pytest
import torch
import torch.nn.functional as F
from modnorm_fx.passes.type_atoms import Weight
from staged import REWRITES, With, stage
from torch import Tensor, nn

from modnorm_fx import atoms as A
from modnorm_fx import convert
from modnorm_fx.errors import WeightError

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
IDS = torch.zeros(2, 6, dtype=torch.long)


def weights(model: nn.Module, *inputs: Tensor, unknown: str = "error") -> dict[str, Weight]:
    staged = stage(model, *(inputs or (X,)))
    staged.rewrite(*REWRITES)
    return staged.typed(unknown)


def atoms(model: nn.Module, *inputs: Tensor) -> dict[str, list[A.Atom]]:
    return {key: [atom for _, _, atom in w.uses] for key, w in weights(model, *inputs).items()}


def one(function, *inputs, **own) -> A.Atom:
    """The atom of the only use of the only parameter."""
    ((found,),) = atoms(With(function, **own), *inputs).values()
    return found


#: name -> (f(s, x) with parameter s.w, its shape, input); f is linear in w and in x
MATRICES = {
    "linear": (lambda s, x: F.linear(x, s.w), (8, 16), X),
    "product": (lambda s, x: x @ s.w, (16, 8), X),
    "product with the transpose": (lambda s, x: x @ s.w.t(), (8, 16), X),
    "from the left": (lambda s, x: s.w @ x.mT, (8, 16), X),
    "transposed linear": (lambda s, x: F.linear(x, s.w.t()), (16, 8), X),
    "addmm": (lambda s, x: torch.addmm(torch.zeros(8), x.view(-1, 16), s.w), (16, 8), X),
    "heads": (lambda s, x: F.linear(x, s.w.view(8, 16)), (2, 4, 16), X),
    "a matrix stored as a vector": (lambda s, x: F.linear(x, s.w.view(8, 16)), (128,), X),
    "1x1 convolution": (lambda s, x: F.conv2d(x, s.w), (8, 4, 1, 1), IMAGE),
    "patches": (lambda s, x: F.conv2d(x, s.w, stride=2), (8, 4, 2, 2), IMAGE),
}


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """[outputs, inputs] of one position, features only."""
    j = torch.autograd.functional.jacobian(model, x)
    return j.reshape(math.prod(model(x).shape), x.numel())


@pytest.mark.parametrize("name", MATRICES)
def test_the_norm_is_that_of_the_operation(name: str):
    """√(in/out)·σ_max of what one position of the output is computed from."""
    function, shape, x = MATRICES[name]
    model = With(function, w=shape)
    ((atom,),) = atoms(model, x).values()
    patch = x[:1, :, : (2 if name == "patches" else 1), : (2 if name == "patches" else 1)] if x is IMAGE else x[:1, :1]
    j = jacobian(model, patch)
    assert j.shape == (8, patch.numel())
    expected = math.sqrt(j.shape[1] / j.shape[0]) * torch.linalg.matrix_norm(j, 2)
    assert atom.is_matrix
    assert float(atom.norm(model.w.detach())) == pytest.approx(float(expected), rel=1e-5)


CONVOLUTIONS = {
    "3x3": ((8, 4, 3, 3), dict(padding=1), A.Conv((8, 4, 3, 3))),
    "strided": ((8, 4, 3, 3), dict(stride=2, padding=1), A.Conv((8, 4, 3, 3))),
    "depthwise": ((4, 1, 3, 3), dict(groups=4), A.Conv((4, 1, 3, 3), groups=4)),
    "dilated patches are none": ((8, 4, 2, 2), dict(stride=2, dilation=2), A.Conv((8, 4, 2, 2))),
    "padded patches are none": ((8, 4, 2, 2), dict(stride=2, padding=1), A.Conv((8, 4, 2, 2))),
    "overlapping patches are none": ((8, 4, 3, 3), dict(stride=2), A.Conv((8, 4, 3, 3))),
    "grouped patches are none": ((8, 2, 2, 2), dict(stride=2, groups=2), A.Conv((8, 2, 2, 2), groups=2)),
    "patches": ((8, 4, 2, 2), dict(stride=2), A.PatchConv((8, 4, 2, 2))),
    "patches by name": ((8, 4, 2, 2), dict(stride=(2, 2), padding="valid"), A.PatchConv((8, 4, 2, 2))),
    "uneven patches": ((8, 4, 2, 4), dict(stride=(2, 4)), A.PatchConv((8, 4, 2, 4))),
    "padding by name": ((8, 4, 3, 3), dict(padding="same"), A.Conv((8, 4, 3, 3))),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str):
    shape, options, expected = CONVOLUTIONS[name]
    assert one(lambda s, x: F.conv2d(x, s.w, **options), IMAGE, w=shape) == expected


def test_transposed_and_one_dimensional_convolutions():
    found = one(lambda s, x: F.conv_transpose2d(x, s.w, stride=2), IMAGE, w=(4, 8, 2, 2))
    assert found == A.Conv((4, 8, 2, 2), transposed=True, stride=(2, 2))
    assert one(lambda s, x: F.conv_transpose2d(x, s.w), IMAGE, w=(4, 8, 2, 2)) == A.Conv((4, 8, 2, 2), transposed=True)
    assert one(lambda s, x: F.conv1d(x.mT, s.w, padding=1), w=(8, 16, 3)) == A.Conv((8, 16, 3))


VECTORS = {
    "gain": (lambda s, x: x * s.w, (16,), A.Gain((16,))),
    "1 + gain": (lambda s, x: F.layer_norm(x, (16,)) * (1 + s.w), (16,), A.Gain((16,))),
    "gain of a norm": (lambda s, x: F.layer_norm(x, (16,), s.w), (16,), A.Gain((16,))),
    "decay": (lambda s, x: x * -torch.exp(s.w), (16,), A.Scalar((16,))),
    "temperature": (lambda s, x: x * s.w, (), A.Scalar(())),
    "one entry": (lambda s, x: x * s.w, (1,), A.Scalar((1,))),
    "bias": (lambda s, x: x + s.w, (16,), A.Bias((16,))),
    "subtracted bias": (lambda s, x: x - s.w, (16,), A.Bias((16,))),
    "bias of a broadcast shape": (lambda s, x: x + s.w, (1, 1, 16), A.Bias((1, 1, 16))),
    "positions": (lambda s, x: x + s.w, (1, 6, 16), A.Table((1, 6, 16), feature_axes=(2,))),
    "positions without batch": (lambda s, x: x + s.w, (6, 16), A.Table((6, 16), feature_axes=(1,))),
    "more positions than used": (lambda s, x: x + s.w[:, :6], (1, 32, 16), A.Table((1, 32, 16), feature_axes=(2,))),
    "class token": (
        lambda s, x: torch.cat([s.w.expand(2, -1, -1), x], 1), (1, 1, 16), A.Table((1, 1, 16), feature_axes=(2,))
    ),
    "attention bias": (
        lambda s, x: (x @ x.mT + s.w).softmax(-1) @ x, (6, 6), A.LogitBias((6, 6))
    ),
    "attention mask": (
        lambda s, x: F.scaled_dot_product_attention(x, x, x, attn_mask=s.w), (6, 6), A.LogitBias((6, 6))
    ),
    "PReLU": (lambda s, x: F.prelu(x, s.w), (1,), A.Gain((1,))),
}  # fmt: skip


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_and_tables(name: str):
    function, shape, expected = VECTORS[name]
    assert one(function, w=shape) == expected


def test_positions_of_an_image_have_channel_features():
    found = one(lambda s, x: F.conv2d(x, torch.ones(4, 4, 1, 1)) + s.w, IMAGE, w=(1, 4, 8, 8))
    assert found == A.Table((1, 4, 8, 8), feature_axes=(1,))
    assert one(lambda s, x: F.conv2d(x, torch.ones(4, 4, 1, 1)) * s.w[:, None, None], IMAGE, w=(4,)) == A.Gain((4,))


@pytest.mark.parametrize(
    "look_up", [lambda w, i: F.embedding(i, w), lambda w, i: w[i], lambda w, i: w.index_select(0, i[0])]
)
def test_lookups(look_up):
    """Whatever the atom is called, its norm is the largest RMS of a row, and rows are pieces."""
    model = With(lambda s, i: s.layer(look_up(s.w, i)), w=(11, 16), layer=nn.Linear(16, 16))
    (atom,) = atoms(model, IDS)["w"]
    w = model.w.detach().clone()
    assert atom.is_matrix
    assert float(atom.norm(w)) == pytest.approx(float(w.square().mean(1).sqrt().max()))
    atom.normalize_(w, 2.0)
    assert torch.allclose(w.square().mean(1).sqrt(), torch.full((11,), 2.0))


def test_relative_position_tables_are_logit_biases():
    """Swin: a table looked up at fixed places, rearranged, added to the logits."""
    index = (torch.arange(6)[:, None] - torch.arange(6) + 5).view(-1)

    def function(s, x):
        q = x.view(2, 6, 4, 4).transpose(1, 2)
        bias = s.w[index].view(6, 6, 4).permute(2, 0, 1)
        return ((q @ q.mT) + bias.unsqueeze(0)).softmax(-1) @ q

    assert one(function, w=(11, 4)) == A.LogitBias((11, 4))


def test_experts():
    assert one(lambda s, x: torch.bmm(x, s.w), w=(2, 16, 8)) == A.Experts((2, 16, 8), transposed=True)
    assert one(lambda s, x: torch.bmm(s.w, x.mT), w=(2, 8, 16)) == A.Experts((2, 8, 16))


def test_a_learned_source_is_a_table():
    """Latents that go through a layer as a signal would."""
    model = With(lambda s, x: s.layer(s.latent) @ x.mT, latent=(5, 16), layer=nn.Linear(16, 16))
    assert atoms(model)["latent"] == [A.Table((5, 16), feature_axes=(1,))]


def test_a_tied_head_has_two_atoms():
    model = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 11, bias=False))
    model[1].weight = model[0].weight
    assert atoms(model, IDS) == {"0.weight": [A.Embedding((11, 16)), A.Linear((11, 16))]}


def test_keys_are_python_notation():
    def function(s, x):
        q, k, v = (t.transpose(1, 2) for t in s.qkv(x).view(2, 6, 4, 12).split(4, -1))
        return F.scaled_dot_product_attention(q, k, v)

    model = With(function, qkv=nn.Linear(16, 48))
    for key in atoms(model):
        name, _, notation = key.partition("t" if "weight" in key else "s")  # up to "weight" / "bias"
        part = eval("w" + key.split("qkv.weight")[-1] if "weight" in key else "w" + key.split("qkv.bias")[-1],
                    {"w": model.qkv.weight if "weight" in key else model.qkv.bias})  # fmt: skip
        assert part.numel() == (16 * 16 if "weight" in key else 16)


def test_a_single_number_among_logits_is_a_scalar():
    """A bin for what finds no match, beside the scores (SuperGlue)."""
    assert one(lambda s, x: torch.cat([x, s.w.expand(2, 6, 1)], -1), w=()) == A.Scalar(())


def test_rows_beyond_the_last_are_no_use():
    """RF-DETR joins what it refines of a table with the rest of it, of which nothing is left."""
    found = atoms(With(lambda s, x: torch.cat([x + s.w[:6], s.w[6:].expand(2, 0, 16)], 1), w=(6, 16)))
    assert found == {"w": [A.Table((6, 16), feature_axes=(1,))]}


def test_a_column_times_numbers_keeps_its_place_when_every_second_one_is_taken():
    """Sines and cosines of learned coordinates (SAM 3): the numbers have more entries than the column."""

    def function(s: nn.Module, x: Tensor) -> Tensor:
        angles = s.w[:, 1, None] * torch.arange(1.0, 17.0)
        return x + torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=-1).flatten(1)

    model = With(function, w=(6, 4))
    moved = torch.autograd.functional.jacobian(lambda w: torch.func.functional_call(model, {"w": w}, (X,)), model.w)
    assert (moved.abs().sum((0, 1, 2, 3)) > 0).tolist() == [False, True, False, False]
    found = weights(model)
    assert list(found) == ["w[:, 1:2]"] and len(found["w[:, 1:2]"].uses) == 2


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(function, *inputs, **own) -> str:
    with pytest.raises(WeightError) as caught:
        weights(With(function, **own), *inputs)
    return str(caught.value)


def test_overlapping_uses_are_refused():
    text = refused(lambda s, x: F.linear(x, s.w) * F.linear(x, s.w[:1]), w=(16, 16))
    assert "w: used as w and as w[0:1], which overlap" in text


def queries(w: Tensor, x: Tensor) -> Tensor:
    """Attention of learned queries, which are no layer's matrix."""
    return (w @ x.mT).softmax(-1) @ x


def test_a_matrix_through_a_function_is_refused():
    text = refused(lambda s, x: queries(torch.tanh(s.w), x), w=(16, 16))
    assert "w: a matrix weight passes through tanh" in text


def test_all_failures_are_named_at_once():
    text = refused(lambda s, x: queries(torch.tanh(s.a), x) + queries(torch.exp(s.b), x), a=(16, 16), b=(16, 16))
    assert "these 2 parameters" in text and "a: a matrix" in text and "b: a matrix" in text


def test_sampled_on_request():
    found = weights(With(lambda s, x: queries(torch.tanh(s.w), x), w=(16, 16)), unknown="sample")
    assert found["w"].sampled and found["w"].uses[0][2] == A.Scalar((16, 16))


def test_harmless_maps_of_a_matrix():
    assert one(lambda s, x: F.linear(x, -s.w), w=(8, 16)) == A.Linear((8, 16))


def test_overlapping_uses_are_one_sampled_weight_on_request():
    model = With(lambda s, x: F.linear(x, s.w) * F.linear(x, s.w[:1]), w=(16, 16))
    with pytest.warns(UserWarning, match="estimated by running ops"):
        norm = convert(model, (torch.randn(2, 6, 16),))
    assert [(leaf.key, leaf.atom, leaf.status) for leaf in norm.leaves] == [("w", A.Scalar((16, 16)), "sampled")]
    assert norm.leaves[0].target > 0


def test_a_bias_of_which_a_part_is_zeroed_is_a_bias():
    """torchvision's Swin v2 clones the bias of its qkv layer and sets the part of k to zero."""

    class NoKeyBias(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            bias = self.qkv.bias.clone()
            bias[8:16].zero_()
            return F.linear(x, self.qkv.weight, bias)

    atoms = {leaf.key: leaf.atom for leaf in convert(NoKeyBias(), (torch.randn(2, 8),), unknown="error").leaves}
    assert atoms["qkv.bias"] == A.Bias((24,))
