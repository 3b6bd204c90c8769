"""Every atom against a brute force that knows nothing of pieces: explicit operators, SVDs, random competitors."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modnorm_fx import atoms as A
from modnorm_fx.errors import FormatError, WeightError

F = torch.nn.functional
torch.set_num_threads(1)  # the tensors are tiny

ATOMS = [
    A.Linear((4, 6)),
    A.Linear((6, 4), transposed=True),
    A.Linear((1, 5)),
    A.Linear((10, 14)),
    A.Linear((20, 12), transposed=True),
    A.Conv((9, 12, 2, 1)),
    A.Conv((20, 12, 2), groups=2),
    A.Conv((20, 12, 3), groups=2, transposed=True, stride=(2,)),
    A.Conv((4, 6, 3, 3)),
    A.Conv((6, 2, 3), groups=3),
    A.Conv((8, 1, 2, 3), groups=8),
    A.Conv((8, 1, 3), groups=4),
    A.Conv((4, 3, 3, 2), groups=2, transposed=True),
    A.Conv((4, 3, 2, 2, 2), transposed=True),
    A.PatchConv((8, 3, 2, 2)),
    A.PatchConv((9, 3, 2, 2)),
    A.Experts((2, 9, 12)),
    A.Experts((3, 4, 5)),
    A.Experts((3, 4, 5), transposed=True),
    A.Gates((27, 12), gates=3),
    A.Gates((8, 5), gates=2),
    A.Embedding((9, 4)),
    A.Table((1, 5, 4)),
    A.Table((4, 5, 3), feature_axes=(0,)),
    A.Bias((7,)),
    A.Bias((2, 7)),
    A.GateBias((12,), gates=4),
    A.Gain((7,)),
    A.LogitBias((3, 4)),
    A.Scalar(()),
    A.Scalar((4, 2)),
    A.Reshaped(A.Linear((4, 6)), (2, 3, 4), permute=(2, 0, 1)),
    A.Reshaped(A.Linear((3, 8)), (6, 4), permute=(1, 0, 2), stored=(2, 3, 4)),
    A.Reshaped(A.Embedding((2, 12)), (6, 4), stored=(2, 12)),
    A.Tied((6, 4), (A.Embedding((6, 4)), A.Linear((6, 4))), (0.5, 2.0)),
    A.Tied((12, 9), (A.Embedding((12, 9)), A.Linear((12, 9))), (0.5, 2.0)),
    A.Reshaped(A.Linear((12, 10)), (10, 3, 4), permute=(1, 2, 0)),
    A.Tied((5,), (A.Gain((5,)), A.Bias((5,))), (1.0, 3.0)),
]
MATRICES = [a for a in ATOMS if a.is_matrix]
each_atom = pytest.mark.parametrize("atom", ATOMS, ids=[f"{i}-{a.describe()}" for i, a in enumerate(ATOMS)])


def draw(atom, seed=0, dtype=torch.float32):
    return torch.randn(atom.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sigma(m):
    return torch.linalg.svdvals(m.double())[..., 0].max().item()


# Norms against explicit operators ------------------------------------------------------------------------------------


def test_linear_norm_is_the_operator_norm_between_rms_norms():
    w = draw(A.Linear((4, 6)))
    assert A.Linear((4, 6)).norm(w).item() == pytest.approx(math.sqrt(6 / 4) * sigma(w), rel=1e-5)
    assert A.Linear((6, 4), transposed=True).norm(w.T).item() == pytest.approx(math.sqrt(6 / 4) * sigma(w), rel=1e-5)
    x = torch.linalg.svd(w)[2][0] * math.sqrt(6)  # the worst input of RMS 1
    assert (w @ x).square().mean().sqrt().item() == pytest.approx(A.Linear((4, 6)).norm(w).item(), rel=1e-5)


CONVS = [
    (A.Conv((4, 6, 3, 3)), dict(padding=1)),
    (A.Conv((6, 2, 3), groups=3), dict(dilation=2)),
    (A.Conv((8, 1, 3, 3), groups=8), dict(stride=2)),
    (A.Conv((8, 1, 3), groups=4), {}),
    (A.Conv((4, 3, 3, 2), groups=2, transposed=True, stride=(2, 2)), dict(stride=2)),
    (A.Conv((4, 6, 6), transposed=True, stride=(3,)), dict(stride=3, dilation=2)),
    (A.Conv((2, 3, 2, 2, 2), transposed=True), {}),
]


def convolution(atom, w, x, options):
    dims = len(atom.shape) - 2
    name = f"conv_transpose{dims}d" if atom.transposed else f"conv{dims}d"
    return getattr(F, name)(x, w, groups=atom.groups, **options)


def channels(atom):
    """(out, in) of the whole convolution."""
    other = atom.shape[1] * atom.groups
    return (other, atom.shape[0]) if atom.transposed else (atom.shape[0], other)


def one_tap(atom, w, tap):
    """The linear operator [out, in] of one kernel position, read off the convolution by feeding it unit vectors."""
    out, into = channels(atom)
    only = torch.zeros_like(w)
    index = (slice(None), slice(None), *tap)
    only[index] = w[index]
    size = (3,) * (len(atom.shape) - 2)
    x = torch.zeros(into, into, *(5 * s for s in size))
    centre = tuple(2 * s for s in size)
    x[(torch.arange(into), torch.arange(into), *centre)] = 1.0
    y = convolution(atom, only, x, {})
    return y.flatten(2).sum(-1).T  # one position responds; the sum picks it


@pytest.mark.parametrize("atom, options", CONVS, ids=[a.describe() for a, _ in CONVS])
def test_conv_norm_is_the_taps_that_meet_times_the_worst_group_of_the_worst_tap(atom, options):
    w = draw(atom)
    out, into = channels(atom)
    o, i, g = out // atom.groups, into // atom.groups, atom.groups
    worst = 0.0
    for tap in (
        torch.cartesian_prod(*(torch.arange(k) for k in atom.shape[2:])).reshape(-1, len(atom.shape) - 2).tolist()
    ):
        operator = one_tap(atom, w, tap)
        blocks = [operator[b * o : (b + 1) * o, b * i : (b + 1) * i] for b in range(g)]
        assert torch.equal(torch.block_diag(*blocks), operator)
        worst = max(worst, *(math.sqrt(i / o) * sigma(block) for block in blocks))
    ones = torch.ones(1, into, *(5 * k for k in atom.shape[2:]))
    meeting = convolution(atom, torch.ones_like(w), ones, options).max().item() / i
    assert atom.norm(w).item() == pytest.approx(meeting * worst, rel=1e-5)


@pytest.mark.parametrize("atom, options", CONVS, ids=[a.describe() for a, _ in CONVS])
def test_conv_norm_bounds_the_gain_of_the_convolution(atom, options):
    """The activation norm is max over positions and groups of the RMS over the group's channels."""
    out, into = channels(atom)
    for seed in range(20):
        w = draw(atom, seed)
        x = torch.randn(2, into, *(7 for _ in atom.shape[2:]), generator=torch.Generator().manual_seed(seed))
        y = convolution(atom, w, x, options)
        norms = [t.unflatten(1, (atom.groups, -1)).square().mean(2).sqrt().max() for t in (x, y)]
        assert norms[1] / norms[0] <= atom.norm(w) * (1 + 1e-5)


def test_patch_conv_is_a_linear_on_flattened_patches():
    atom = A.PatchConv((8, 3, 2, 2))
    w = draw(atom)
    assert atom.norm(w).item() == pytest.approx(math.sqrt(12 / 8) * sigma(w.reshape(8, 12)), rel=1e-5)
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    patches = F.unfold(x, 2, stride=2)
    torch.testing.assert_close(F.conv2d(x, w, stride=2).flatten(2), w.reshape(8, 12) @ patches)


def test_norms_of_the_other_atoms():
    w = draw(A.Embedding((9, 4)))
    assert A.Embedding((9, 4)).norm(w).item() == pytest.approx(max(r.square().mean().sqrt().item() for r in w))
    t = draw(A.Table((4, 5, 3)))
    by_hand = max(t[:, i, j].square().mean().sqrt().item() for i in range(5) for j in range(3))
    assert A.Table((4, 5, 3), feature_axes=(0,)).norm(t).item() == pytest.approx(by_hand)
    assert A.Bias((4, 5, 3)).norm(t).item() == pytest.approx(t.square().mean().sqrt().item())
    for cls in (A.Gain, A.LogitBias, A.Scalar):
        assert cls((4, 5, 3)).norm(t) == t.abs().max()
    e = draw(A.Experts((3, 4, 5)))
    assert A.Experts((3, 4, 5)).norm(e).item() == pytest.approx(max(math.sqrt(5 / 4) * sigma(m) for m in e), rel=1e-5)
    tied = A.Tied((9, 4), (A.Embedding((9, 4)), A.Linear((9, 4))), (0.5, 2.0))
    by_hand = 0.5 * A.Embedding((9, 4)).norm(w) + 2.0 * A.Linear((9, 4)).norm(w)
    torch.testing.assert_close(tied.norm(w), by_hand)


# Properties of every atom --------------------------------------------------------------------------------------------


@each_atom
@given(seed=st.integers(0, 10**6), exponent=st.floats(-9, 9), target=st.floats(1e-6, 1e6), power=st.booleans())
@settings(max_examples=10, deadline=None)
def test_norm_is_homogeneous_and_normalize_reaches_its_target(atom, seed, exponent, target, power):
    w = draw(atom, seed)
    scaled = w * 10**exponent
    assert atom.norm(scaled).item() == pytest.approx(10**exponent * atom.norm(w).item(), rel=1e-4)
    assert atom.norm(-w) == atom.norm(w)
    atom.normalize_(scaled, target, atom.start_vectors(scaled) if power else None)
    assert atom.norm(scaled).item() == pytest.approx(target, rel=2e-2 if power else 1e-3)


@each_atom
@given(seeds=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)))
@settings(max_examples=5, deadline=None)
def test_triangle_inequality(atom, seeds):
    a, b = draw(atom, seeds[0]), draw(atom, seeds[1])
    assert atom.norm(a + b) <= (atom.norm(a) + atom.norm(b)) * (1 + 1e-5)


@each_atom
def test_zero_stays_zero(atom):
    w = torch.zeros(atom.shape)
    assert atom.norm(w) == 0
    for vectors in (None, atom.start_vectors(w)):
        atom.normalize_(w, 1.0, vectors)
        assert (w == 0).all()
    atom.dualize_(w, 1.0)
    assert (w == 0).all()
    atom.project_(w)
    assert (w == 0).all()


@each_atom
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept_and_norms_are_float32(atom, dtype):
    w = draw(atom, dtype=dtype)
    assert atom.norm(w).dtype == torch.float32 and atom.norm(w).shape == ()
    atom.normalize_(w, 0.5, atom.start_vectors(w))
    assert w.dtype == dtype and atom.norm(w).item() == pytest.approx(0.5, rel=0.02)
    atom.dualize_(w, 2.0)
    assert w.dtype == dtype and atom.norm(w).item() == pytest.approx(2.0, rel=0.01)
    atom.project_(w, 0.25)
    assert w.dtype == dtype and atom.norm(w).item() == pytest.approx(0.25, rel=0.01)


@each_atom
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_entries_stay_visible(atom, bad):
    w = draw(atom)
    w.view(-1)[0] = bad
    assert not atom.norm(w).isfinite()
    vectors = atom.start_vectors(w)
    for change in (
        lambda w: atom.normalize_(w, 1.0),
        lambda w: atom.normalize_(w, 1.0, vectors),
        lambda w: atom.dualize_(w, 1.0),
    ):
        changed = w.clone()
        change(changed)
        assert not changed.isfinite().all()


@each_atom
def test_dual_has_unit_norm_and_no_competitor_has_a_larger_inner_product(atom):
    g = draw(atom)
    dual = g.clone()
    atom.dualize_(dual, 2.0)
    assert atom.norm(dual).item() == pytest.approx(2.0, rel=1e-4)
    gained = (g * dual).sum()
    assert gained > 0
    if isinstance(atom, A.Tied):
        return  # no closed form: a direction of descent of the right norm is all that is promised
    for seed in range(1, 40):
        other = g + 0.3 * seed * draw(atom, seed)
        atom.normalize_(other, 2.0)
        assert (g * other).sum() <= gained * (1 + 1e-5)


def test_dual_attains_the_dual_norm():
    """For max over pieces of u·σ_max the dual norm is the sum of nuclear norms over u; for rows, √d times 2-norms."""
    w = draw(A.Linear((4, 6)))
    cases = [
        (A.Linear((4, 6)), w, torch.linalg.svdvals(w).sum() / math.sqrt(6 / 4)),
        (A.Embedding((4, 6)), w, torch.linalg.vector_norm(w, dim=1).sum() * math.sqrt(6)),
        (A.Gain((4, 6)), w, w.abs().sum()),
        (A.Bias((4, 6)), w, torch.linalg.vector_norm(w) * math.sqrt(24)),
    ]
    e = draw(A.Experts((3, 4, 6)))
    cases.append((A.Experts((3, 4, 6)), e, torch.linalg.svdvals(e).sum() / math.sqrt(6 / 4)))
    c = draw(A.Conv((4, 3, 2, 2), groups=2))
    blocks = torch.stack([c[g * 2 : g * 2 + 2, :, i, j] for g in range(2) for i in range(2) for j in range(2)])
    cases.append((A.Conv((4, 3, 2, 2), groups=2), c, torch.linalg.svdvals(blocks).sum() / (4 * math.sqrt(3 / 2))))
    for atom, g, expected in cases:
        dual = g.clone()
        atom.dualize_(dual, 1.0)
        torch.testing.assert_close((g * dual).sum(), expected, rtol=1e-4, atol=0.0)


@each_atom
def test_initialize_project_and_generator(atom):
    starts = []
    for seed in (1, 1, 2):
        w = torch.full(atom.shape, 7.0)
        atom.initialize_(w, 1.5, torch.Generator().manual_seed(seed))
        starts.append(w)
    assert torch.equal(starts[0], starts[1])
    if atom.is_matrix:
        assert not torch.equal(starts[0], starts[2])
        assert atom.norm(starts[0]).item() == pytest.approx(1.5, rel=1e-4)
    elif isinstance(atom, A.Gain):
        assert (starts[0] == 1.5).all()
    elif isinstance(atom, A.Scalar):
        assert (starts[0] == 7.0).all()
    elif not isinstance(atom, A.Tied):
        assert (starts[0] == 0.0).all()
    w = draw(atom) * 3
    before = w.clone()
    atom.project_(w, 1.0)
    assert atom.norm(w) <= 1 + 1e-5 and (w.abs() <= before.abs()).all()
    within = w * 0.9
    untouched = within.clone()
    atom.project_(within, 1.0)
    assert torch.equal(within, untouched)


def test_initial_matrices_are_semi_orthogonal_piece_by_piece():
    w = torch.empty(4, 6, 3, 3)
    A.Conv((4, 6, 3, 3)).initialize_(w, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(w.permute(2, 3, 0, 1))
    torch.testing.assert_close(singular, torch.full_like(singular, math.sqrt(4 / 6) / 9))
    e = torch.empty(9, 4, dtype=torch.bfloat16)
    A.Embedding((9, 4)).initialize_(e, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(e.float().square().mean(1).sqrt(), torch.ones(9), rtol=0.01, atol=0.0)


@pytest.mark.parametrize(
    "atom",
    [A.Conv((4, 6, 3, 3)), A.Conv((4, 3, 3), groups=2, transposed=True), A.Experts((5, 3, 4)), A.Embedding((6, 4))],
)
def test_pieces_saturate_by_themselves_up_to_the_cap(atom):
    w = draw(atom)
    sizes = torch.ones_like(atom.piece_norms(w))
    sizes.view(-1)[0], sizes.view(-1)[-1] = 0.0, 1e-4
    w *= atom.spread(sizes)
    first = w == 0
    small = w.clone()
    norms = atom.piece_norms(w)
    atom.normalize_(w, 1.0)
    after = atom.piece_norms(w)
    assert (w[first] == 0).all()
    torch.testing.assert_close(after.max(), torch.tensor(1.0), rtol=1e-4, atol=0.0)
    ordinary = norms > norms.max() / A.PIECE_CAP
    torch.testing.assert_close(after[ordinary], torch.ones_like(after[ordinary]), rtol=1e-4, atol=0.0)
    tiny = (norms > 0) & ~ordinary
    assert tiny.any()
    torch.testing.assert_close(after[tiny], norms[tiny] * A.PIECE_CAP / norms.max(), rtol=1e-4, atol=0.0)
    atom.dualize_(small, 1.0)
    dual = atom.piece_norms(small)
    assert dual[tiny].max() < 0.02 and dual.max().item() == pytest.approx(1.0, rel=1e-4)


def test_in_place_methods_work_on_strided_views():
    big = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    for atom, view in ((A.Linear((6, 5)), big[::2, ::2]), (A.Linear((10, 12)), big.T), (A.Bias((12,)), big[:, 3])):
        atom.normalize_(view, 0.5, atom.start_vectors(view))
        assert atom.norm(view).item() == pytest.approx(0.5, rel=0.02)
    conv = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)
    A.Conv((4, 6, 3, 3)).normalize_(conv, 0.5)
    assert A.Conv((4, 6, 3, 3)).norm(conv).item() == pytest.approx(0.5, rel=1e-3)


def test_start_vectors_have_the_promised_shapes():
    # as many columns as the matrices have in storage
    shapes = {
        A.Linear((10, 16)): (1, 8, 16),
        A.Linear((16, 10), transposed=True): (1, 8, 10),
        A.Conv((30, 9, 3, 3), groups=3): (27, 8, 9),
        A.Conv((20, 12, 3), groups=2, transposed=True): (6, 8, 12),
        A.PatchConv((9, 3, 2, 2)): (1, 8, 12),
        A.Experts((3, 9, 15)): (3, 8, 15),
    }
    for atom, shape in shapes.items():
        vectors = atom.start_vectors(draw(atom))
        assert vectors.shape == shape and vectors.dtype == torch.float32
    for atom in (A.Conv((8, 1, 3), groups=8), A.Linear((8, 50)), A.Embedding((30, 40)), A.Gain((3,))):
        assert atom.start_vectors(draw(atom)) is None
    tied = A.Tied((16, 10), (A.Embedding((16, 10)), A.Linear((16, 10))), (1.0, 1.0))
    nothing, vectors = tied.start_vectors(draw(tied))
    assert nothing is None and vectors.shape == (1, 8, 10)


# Slices, JSON, words -------------------------------------------------------------------------------------------------


def test_slices_read_write_and_print():
    w = torch.arange(48.0).view(12, 4)
    contiguous = A.Slice(0, 3, 6, 12)
    assert torch.equal(contiguous.read(w), w[3:6])
    assert contiguous.read(w).data_ptr() == w[3:6].data_ptr()
    assert str(contiguous) == contiguous.text(12) == "[3:6]"
    assert str(A.Slice(1, 0, 2, 4)) == "[:, 0:2]"
    periodic = A.Slice(0, 1, 3, 6)
    assert torch.equal(periodic.read(w), w[[1, 2, 7, 8]])
    assert periodic.text(12) == ".unflatten(0, (-1, 6))[:, 1:3]"
    assert eval("w" + periodic.text(12)).flatten(0, 1).equal(periodic.read(w))
    assert eval("w" + A.Slice(1, 1, 2, 2).text(4)).flatten(1, 2).equal(w[:, [1, 3]])
    for part, tensor in ((periodic, w.clone()), (contiguous, w.clone()), (A.Slice(1, 1, 2, 2), w.T.clone().T)):
        read = part.read(tensor).clone()
        part.write_(tensor, -read)
        assert torch.equal(part.read(tensor), -read)
        assert (tensor != w).sum() == read.count_nonzero()


@each_atom
def test_json_round_trip(atom):
    assert A.Atom.from_json(json.loads(json.dumps(atom.to_json()))) == atom
    assert hash(A.Atom.from_json(atom.to_json())) == hash(atom)


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"kind": "Quadratic", "shape": [1]},
        {"kind": "Linear"},
        {"kind": "Linear", "shape": [1, 2], "extra": 1},
    ],
)
def test_bad_json_is_a_format_error(data):
    with pytest.raises(FormatError):
        A.Atom.from_json(data)


def test_bad_values_in_json_are_a_format_error():
    with pytest.raises(FormatError, match="cannot be read"):
        A.Atom.from_json({"kind": "Linear", "shape": ["a", 2]})
    with pytest.raises(FormatError):
        A.Atom.from_json({"kind": "Tied", "shape": [2, 2]})


def test_words():
    words = {
        A.Linear((2304, 768)): "Linear 768→2304",
        A.Linear((768, 2304), transposed=True): "Linear 768→2304",
        A.Conv((128, 64, 3, 3)): "Conv 3×3 64→128",
        A.Conv((96, 1, 7, 7), groups=96): "Conv 7×7 96→96 /96",
        A.Conv((4, 3, 2), groups=2, transposed=True): "Conv 2 4→6 /2 transposed",
        A.PatchConv((768, 3, 16, 16)): "PatchConv 16×16 3→768",
        A.Experts((8, 32, 16)): "Experts 8× 16→32",
        A.Bias((768,)): "Bias 768",
        A.Scalar(()): "Scalar scalar",
    }
    for atom, text in words.items():
        assert atom.describe() == text


def test_a_tensor_of_another_shape_is_refused_by_name():
    with pytest.raises(WeightError, match=r"shape \[3, 4\] was given to Linear 6→4, whose shape is \[4, 6\]"):
        A.Linear((4, 6)).norm(torch.zeros(3, 4))
    with pytest.raises(WeightError, match="Tied needs"):
        A.Tied((4, 6), (A.Linear((6, 4)),), (1.0,))


def test_which_atoms_are_matrices_and_decay():
    for cls in (A.Linear, A.Conv, A.PatchConv, A.Embedding, A.Table, A.Experts):
        assert cls.is_matrix and cls.decays and cls.kind == cls.__name__
    for cls in (A.Gain, A.Bias, A.LogitBias, A.Scalar):
        assert not cls.is_matrix and not cls.decays and cls.kind == cls.__name__
    assert all(a.decays for a in MATRICES)


COMPLEX = [A.Linear((6, 9)), A.Linear((12, 10)), A.Bias((5,)), A.Gain((4, 3)), A.Embedding((7, 5))]


@pytest.mark.parametrize("atom", COMPLEX)
def test_complex_weights_keep_their_imaginary_parts(atom):
    """Norms of complex tensors by SVD and absolute values; both scale and replace them without a loss."""
    g = torch.Generator().manual_seed(0)
    w = torch.complex(torch.randn(atom.shape, generator=g), torch.randn(atom.shape, generator=g))
    match atom:
        case A.Linear():
            true = math.sqrt(atom.into / atom.out) * torch.linalg.svdvals(w)[0]
        case A.Gain():
            true = w.abs().max()
        case _:
            true = w.abs().square().mean(-1).sqrt().max()
    assert atom.norm(w) == pytest.approx(float(true), rel=1e-5)
    scaled = w.clone()
    vectors = atom.start_vectors(scaled)
    atom.normalize_(scaled, 2.0, vectors)
    assert atom.norm(scaled) == pytest.approx(2.0, rel=2e-3)
    if not isinstance(atom, A.Embedding):  # whose rows are scaled one by one
        torch.testing.assert_close(scaled / scaled.abs().max(), w / w.abs().max())
    dual = w.clone()
    atom.dualize_(dual, 1.0)
    assert atom.norm(dual) == pytest.approx(1.0, rel=1e-4)
    assert float((dual.conj() * w).sum().real) > 0
