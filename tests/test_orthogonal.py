"""Orthogonalisation by matrix products against the singular value decomposition in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from modnorm_fx import runtime
from modnorm_fx.orthogonal import (
    DEFAULT,
    SAFETY,
    SCHEDULES,
    _above_largest_eigenvalue,
    bounds,
    minimax,
    orthogonalize,
    polar_express,
    response,
)

torch.set_num_threads(1)  # the tensors are tiny

SHAPES = [(1, 1, 1), (3, 7, 40), (3, 40, 7), (5, 1, 6), (5, 6, 1), (2, 5, 5), (1, 64, 64), (2, 2, 300), (0, 4, 3)]

# As printed in arXiv 2505.16932, for singular values down to 1e-3, before the safety factor.
PRINTED = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]


def gaussian(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factored(shape, smallest, seed=0, dtype=torch.float64):
    """`(U, s, V)` with `U diag(s) Vᴴ` of the shape; singular values from 1 to `smallest`, evenly in logarithm."""
    generator = torch.Generator().manual_seed(seed)
    pieces, out, into = shape
    few = min(out, into)
    u = torch.linalg.qr(torch.randn(pieces, out, few, generator=generator, dtype=dtype)).Q
    v = torch.linalg.qr(torch.randn(pieces, into, few, generator=generator, dtype=dtype)).Q
    return u, torch.logspace(0, math.log10(smallest), few, dtype=torch.float64), v


def recompose(u, s, v):
    return (u * s) @ v.mH


# Schedules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0.02, 1.0), (0.3, 1.7), (0.9, 1.1), (1e-4, 2.0)])
def test_the_best_polynomial_has_its_largest_error_four_times_with_alternating_sign(low, high):
    a, b, c = minimax(low, high)
    grid = torch.linspace(low, high, 400_001, dtype=torch.float64)
    error = 1 - (a * grid + b * grid**3 + c * grid**5)
    largest = error.abs().max()
    extreme = error[(error.abs() > largest * (1 - 1e-6))]
    signs = extreme.sign()
    assert 1 + int((signs[1:] != signs[:-1]).sum()) == 4
    torch.testing.assert_close(error[[0, -1]], torch.stack([largest, -largest]), rtol=1e-7, atol=0.0)


def test_the_best_polynomial_of_a_point_is_flat_there():
    a, b, c = minimax(2.0, 2.0)
    assert (a, b, c) == (1.875 / 2, -1.25 / 8, 0.375 / 32)


@pytest.mark.parametrize("width", [1e-2, 1e-3, 1e-4])
def test_the_best_polynomial_of_a_short_interval_has_the_error_of_a_cubic(width):
    a, b, c = minimax(1 - width, 1.0)
    grid = torch.linspace(1 - width, 1, 1001, dtype=torch.float64)
    error = (1 - (a * grid + b * grid**3 + c * grid**5)).abs().max().item()
    # the third derivative is 15 there, and the best cubic on an interval of width w errs by w³/32 times a sixth of it
    assert error == pytest.approx(15 / 6 * width**3 / 32, rel=5 * width + 0.01)


def test_the_coefficients_are_those_of_the_paper():
    ours = polar_express(1e-3, 8, safety=1.0).coefficients
    for step, printed in zip(ours, PRINTED, strict=True):
        assert step == pytest.approx(printed, rel=1e-7)
    for step, printed in zip(ours[:6], PRINTED, strict=False):
        assert step == pytest.approx(printed, rel=1e-12)


def test_stored_coefficients_are_what_the_function_computes():
    stored = SCHEDULES["polar-express"]
    computed = polar_express(stored.lowest, len(stored.coefficients))
    for step, again in zip(stored.coefficients, computed.coefficients, strict=True):
        assert step == pytest.approx(again, rel=1e-10)


def test_the_safety_factor_allows_for_singular_values_that_are_too_large():
    schedule = polar_express(1e-3, 6)
    assert response(schedule, torch.tensor([1.001], dtype=torch.float64)).item() == pytest.approx(1.0, abs=0.03)
    values = torch.logspace(-3, 0, 10_001, dtype=torch.float64)
    for a, b, c in schedule.coefficients:
        values = SAFETY * (a * values + b * values**3 + c * values**5)  # each step too large by 1%
    assert ((values / SAFETY - 1).abs() < 0.03).all()


def test_bounds_are_the_documented_numbers():
    expected = {
        "polar-express": (0.99945326, 1.00054674),
        "muon": (0.68183146, 1.20236861),
        "modula": (0.99558891, 0.99933459),
    }
    assert set(expected) == set(SCHEDULES)
    for name, interval in expected.items():
        assert bounds(SCHEDULES[name]) == pytest.approx(interval, abs=1e-8)
    assert DEFAULT is SCHEDULES["polar-express"]


@pytest.mark.parametrize(
    ("steps", "lowest", "error"), [(5, 3e-3, 7.1e-3), (6, 1e-3, 1.8e-3), (7, 3e-4, 6e-4), (8, 1e-4, 7e-5)]
)
def test_what_a_number_of_steps_gives(steps, lowest, error):
    low, high = bounds(polar_express(lowest, steps))
    assert 1 - low == pytest.approx(error, rel=0.1)
    assert high - 1 == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_below_the_lowest_singular_values_grow_in_order_by_at_most_the_slope(name):
    schedule = SCHEDULES[name]
    values = torch.linspace(0, schedule.lowest / 2, 1001, dtype=torch.float64)
    grown = response(schedule, values)
    assert grown[0] == 0 and (grown.diff() > 0).all()
    assert (grown <= schedule.slope * values).all() and (grown < bounds(schedule)[1]).all()


# Matrices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shape", [(2, 20, 20), (2, 12, 50), (2, 50, 12), (1, 96, 96)])
def test_singular_vectors_stay_and_singular_values_land_in_the_bounds(name, shape):
    schedule = SCHEDULES[name]
    few = min(shape[1:])
    u, s, v = factored(shape, schedule.lowest * few ** (1 / 8))  # the worst that the normalisation does
    low, high = bounds(schedule)
    for dtype, slack in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
        factor = orthogonalize(recompose(u, s, v).to(dtype), schedule)
        assert factor.shape == shape and factor.dtype == dtype
        inside = u.mT @ factor.double() @ v
        values = inside.diagonal(dim1=-2, dim2=-1)
        assert (values > low - slack).all() and (values < high + slack).all()
        assert (inside - values.diag_embed()).abs().max() < 5 * slack
        torch.testing.assert_close(u @ inside @ v.mT, factor.double(), rtol=0.0, atol=slack)  # nothing outside


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.integers(1, 4),
    out=st.integers(1, 24),
    into=st.integers(1, 24),
    scale=st.floats(-17, 17),
    smallest=st.floats(0.01, 1.0),
    seed=st.integers(0, 99),
)
def test_it_is_the_polar_factor_at_every_scale(pieces, out, into, scale, smallest, seed):
    u, s, v = factored((pieces, out, into), smallest, seed)
    m = (recompose(u, s, v) * 10.0**scale).float()
    exact, _ = runtime.polar_factor(m.double())
    torch.testing.assert_close(orthogonalize(m).double(), exact, rtol=0.0, atol=1.5e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1.0, 1e18])
def test_inner_product_is_the_nuclear_norm(shape, scale):
    m = gaussian(shape)
    factor = orthogonalize(m * scale)
    assert factor.isfinite().all()
    inner, nuclear = (factor.double() * m).sum((1, 2)), torch.linalg.svdvals(m.double()).sum(-1)
    torch.testing.assert_close(inner, nuclear, rtol=2e-3, atol=0.0)


@pytest.mark.parametrize("kind", ["gaussian", "one", "equal"])
def test_the_normalisation_is_never_too_small_and_exact_for_one_or_equal_singular_values(kind):
    m = gaussian((3, 20, 50), dtype=torch.float64)
    if kind == "one":
        m = m[:, :, :1] * m[:, :1]
    elif kind == "equal":
        m = torch.linalg.qr(m.mT).Q.mT
    gram = m @ m.mT
    bound = _above_largest_eigenvalue(gram @ gram).flatten() ** 0.25
    largest = torch.linalg.svdvals(m)[:, 0]
    assert (bound >= largest * (1 - 1e-12)).all() and (bound <= largest * 20 ** (1 / 8)).all()
    if kind != "gaussian":
        torch.testing.assert_close(bound, largest)
        values = torch.linalg.svdvals(orthogonalize(m, "muon"))[:, 0]
        ends = response(SCHEDULES["muon"], torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(values, ends, rtol=1e-6, atol=0.0)


def test_a_power_of_two_changes_no_bit():
    m = gaussian((3, 10, 14))
    assert torch.equal(orthogonalize(m * 2.0**40), orthogonalize(m))
    assert torch.equal(orthogonalize(-m), -orthogonalize(m))


@pytest.mark.parametrize("shape", [(2, 6, 40), (3, 40, 6), (2, 16, 16), (4, 1, 9)])
def test_the_transpose_gives_the_transpose(shape):
    m = gaussian(shape)
    torch.testing.assert_close(orthogonalize(m.mT).mT, orthogonalize(m), rtol=0.0, atol=1e-5)


def test_a_matrix_of_one_row_is_divided_by_its_length():
    m = gaussian((4, 1, 9))
    torch.testing.assert_close(orthogonalize(m), m / torch.linalg.vector_norm(m, dim=(1, 2), keepdim=True))
    assert torch.equal(orthogonalize(m[:, :, :1]), m[:, :, :1].sign())


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_stays_zero_and_nonfinite_becomes_nan_and_neither_touches_the_rest(name):
    for shape in ((5, 6, 9), (5, 9, 6), (5, 1, 4), (5, 4, 1)):
        m = gaussian(shape)
        clean = orthogonalize(m, name)
        m[1] = 0.0
        m[2, 0, 0], m[3, 0, -1] = math.nan, -math.inf
        factor = orthogonalize(m, name)
        assert (factor[1] == 0).all() and factor[2:4].isnan().all()
        assert torch.equal(factor[[0, 4]], clean[[0, 4]])


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", [(2, 30, 30), (2, 10, 80)])
def test_the_rank_stays_up_to_noise(rank, shape):
    left, right = ((shape[0], shape[1], rank), (shape[0], rank, shape[2]))
    m = gaussian(left, dtype=torch.float64) @ gaussian(right, seed=1, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        values = torch.linalg.svdvals(orthogonalize(m.to(dtype)).double())
        assert ((values[:, :rank] - 1).abs() < 1e-3).all()
        assert (values[:, rank:] < torch.finfo(dtype).eps * DEFAULT.slope).all()


def test_rows_and_columns_of_zeros_stay():
    m = gaussian((2, 12, 20))
    m[:, 3], m[:, :, 5] = 0.0, 0.0
    factor = orthogonalize(m)
    assert (factor[:, 3] == 0).all() and (factor[:, :, 5] == 0).all()


def test_a_piece_does_not_depend_on_the_others():
    m = gaussian((6, 24, 40))
    together = orthogonalize(m)
    others = torch.cat([m[:1], 1e6 * gaussian((5, 24, 40), seed=7)])
    assert torch.equal(orthogonalize(others)[0], together[0])
    assert torch.equal(orthogonalize(m), together)
    torch.testing.assert_close(orthogonalize(m[:1]), together[:1], rtol=0.0, atol=1e-5)


def test_strides_do_not_matter_and_the_input_stays():
    m = gaussian((4, 12, 18))
    wide = gaussian((4, 12, 36))
    wide[:, :, ::2] = m
    kept = wide.clone()
    for view in (wide[:, :, ::2], m.permute(1, 0, 2).contiguous().permute(1, 0, 2), m.mT.contiguous().mT):
        torch.testing.assert_close(orthogonalize(view), orthogonalize(m), rtol=0.0, atol=1e-5)
    assert torch.equal(wide, kept)
    shared = m[:1].expand(3, -1, -1)
    torch.testing.assert_close(orthogonalize(shared), orthogonalize(m[:1]).expand(3, -1, -1), rtol=0.0, atol=1e-5)


# Precisions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_worked_on_in_float32(dtype):
    m = gaussian((2, 9, 30), dtype=dtype)
    assert torch.equal(orthogonalize(m), orthogonalize(m.float()))


def test_products_in_another_precision_are_opt_in():
    m = gaussian((2, 40, 60))
    exact, _ = runtime.polar_factor(m.double())
    for name in SCHEDULES:
        assert orthogonalize(m, name, dtype=torch.bfloat16).dtype == torch.float32
    coarse = (orthogonalize(m, dtype=torch.bfloat16) - exact).abs().max()
    assert 1e-4 < coarse < 2e-2
    fine = orthogonalize(m, dtype=torch.float64)
    assert fine.dtype == torch.float32
    torch.testing.assert_close(fine, orthogonalize(m.double()).float(), rtol=0.0, atol=1e-6)
    with pytest.raises(ValueError, match="float32, float64 or bfloat16"):
        orthogonalize(m, dtype=torch.float16)


def test_bfloat16_keeps_the_largest_singular_values_in_check():
    u, s, v = factored((2, 64, 64), 1e-2)
    values = torch.linalg.svdvals(orthogonalize(recompose(u, s, v).float(), dtype=torch.bfloat16).double())
    assert values.max() < 1.03 and values.min() > 0.5


@pytest.mark.parametrize("shape", [(2, 8, 20), (2, 20, 8), (3, 1, 5)])
def test_complex_matrices_use_the_adjoint(shape):
    u, s, v = factored(shape, 0.01, dtype=torch.complex128)
    m = recompose(u, s, v)
    torch.testing.assert_close(orthogonalize(m), u @ v.mH, rtol=0.0, atol=1e-3)
    single = orthogonalize(m.to(torch.complex64))
    assert single.dtype == torch.complex64
    torch.testing.assert_close(single, (u @ v.mH).to(torch.complex64), rtol=0.0, atol=1.5e-3)
    with pytest.raises(ValueError, match="no complex numbers"):
        orthogonalize(m, dtype=torch.bfloat16)


# Where it runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 6, 10), (3, 10, 6), (3, 1, 4)])
def test_nothing_is_read_back_from_the_device(shape):
    with FakeTensorMode():  # where reading a value raises
        assert orthogonalize(torch.empty(shape)).shape == shape
    assert orthogonalize(torch.empty(shape, device="meta")).shape == shape


@pytest.mark.parametrize("shape", [(2, 6, 10), (2, 10, 6)])
def test_torch_compile_traces_it_in_one_piece(shape):
    compiled = torch.compile(lambda m: orthogonalize(m, "muon") + orthogonalize(m), fullgraph=True, backend="aot_eager")
    m = gaussian(shape)
    torch.testing.assert_close(compiled(m), orthogonalize(m, "muon") + orthogonalize(m), rtol=0.0, atol=1e-5)
