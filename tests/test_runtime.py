"""The tensor functions against torch.linalg on explicit matrices."""

import math

import pytest
import torch
from cpu_libraries import ROUNDING
from hypothesis import given, settings
from hypothesis import strategies as st

from modnorm_fx import runtime

torch.set_num_threads(1)  # the tensors are tiny

SHAPES = [(1, 1, 1), (1, 64, 64), (3, 7, 40), (3, 40, 7), (5, 1, 6), (5, 6, 1), (2, 5, 5)]


def matrices(shape, kind="gauss", seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    pieces, out, into = shape
    if kind == "low rank":
        left = torch.randn(pieces, out, 2, generator=generator)
        m = left @ torch.randn(pieces, 2, into, generator=generator)
    else:
        m = torch.randn(shape, generator=generator)
    if kind == "decaying":
        u, s, vt = torch.linalg.svd(m, full_matrices=False)
        m = u * torch.arange(1, s.shape[-1] + 1) ** -0.7 @ vt
    return m.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-16, 1.0, 1e15])
@pytest.mark.parametrize("kind", ["gauss", "low rank", "decaying"])
def test_spectral_norms_are_the_largest_singular_values(shape, scale, kind):
    m = matrices(shape, kind) * scale
    torch.testing.assert_close(runtime.spectral_norms(m), torch.linalg.svdvals(m)[:, 0], rtol=1e-5, atol=0.0)


def test_spectral_norms_accumulate_in_float32_and_keep_float64():
    m = matrices((2, 300, 20), dtype=torch.bfloat16)
    exact = torch.linalg.svdvals(m.double())[:, 0]
    assert runtime.spectral_norms(m).dtype == torch.float32
    torch.testing.assert_close(runtime.spectral_norms(m).double(), exact, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(runtime.spectral_norms(m.double()), exact, rtol=1e-12, atol=0.0)


def test_zero_and_nonfinite_pieces_are_told_apart():
    m = matrices((4, 6, 5))
    m[1] = 0.0
    m[2, 0, 0] = math.nan
    m[3, 0, 0] = math.inf
    for norms in (runtime.spectral_norms(m), runtime.polar_factor(m)[1]):
        assert norms[0] > 0 and norms[1] == 0
        assert norms[2:].isnan().all()
    factor = runtime.polar_factor(m)[0]
    assert (factor[1] == 0).all() and factor[2:].isnan().all()
    runtime.start_vectors(m)  # terminates


@pytest.mark.parametrize("shape", [(8, 64, 64), (8, 9, 9), (4, 300, 10), (4, 10, 300), (2, 256, 256)])
@pytest.mark.parametrize("kind", ["gauss", "low rank", "decaying"])
def test_cold_start_converges_from_below(shape, kind, library):
    highest = 1e-5 if library == "single" else ROUNDING
    m = matrices(shape, kind)
    vectors = runtime.start_vectors(m)
    assert vectors.dtype == torch.float32 and vectors.shape == (shape[0], 8, shape[2])
    estimate, after = runtime.power_iteration(m, vectors)
    quality = estimate / torch.linalg.svdvals(m)[:, 0]
    assert quality.min() > 0.98 and quality.max() < 1 + highest
    assert torch.equal(vectors, runtime.start_vectors(m))
    assert after.shape == vectors.shape and after.dtype == torch.float32


@given(seed=st.integers(0, 10**6), out=st.integers(1, 12), into=st.integers(1, 12), count=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_power_iteration_never_overestimates_and_never_falls_below_the_longest_row(seed, out, into, count):
    m = matrices((2, out, into), seed=seed)
    vectors = torch.randn(2, min(count, out, into), into, generator=torch.Generator().manual_seed(seed))
    estimate, _ = runtime.power_iteration(m, vectors)
    assert (estimate <= torch.linalg.svdvals(m)[:, 0] * (1 + 1e-5)).all()
    assert (estimate >= torch.linalg.vector_norm(m, dim=-1).amax(-1) * (1 - 1e-5)).all()


def test_one_vector_is_the_iteration_of_modula():
    m = matrices((1, 40, 30))
    u = torch.randn(30, generator=torch.Generator().manual_seed(1))
    v = m[0] @ u
    after = m[0].T @ (v / v.norm())
    estimate, vectors = runtime.power_iteration(m, u.view(1, 1, 30))
    torch.testing.assert_close(estimate[0], after.norm())
    assert abs(torch.cosine_similarity(vectors.flatten(), after, dim=0)) > 1 - 1e-5


def test_power_iteration_ignores_the_scale_of_its_vectors_and_keeps_those_of_zero_pieces():
    m = matrices((2, 6, 5))
    m[1] = 0.0
    vectors = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    estimate, after = runtime.power_iteration(m, vectors)
    rescaled, _ = runtime.power_iteration(m, vectors * 1e6)
    torch.testing.assert_close(estimate, rescaled)
    assert estimate[1] == 0 and torch.equal(after[1], vectors[1])


@pytest.mark.parametrize("old, new", [(slice(0, 16), slice(16, 32)), (slice(16, 32), slice(0, 16))])
def test_a_vector_recovers_when_the_update_moves_to_features_that_were_dead(old, new):
    """Plain power iteration stays in the span of the old features for ever and sees nothing but the small block."""
    m = torch.zeros(1, 32, 32)
    m[0, old, old] = matrices((1, 16, 16), "decaying")[0]
    vectors = runtime.start_vectors(m)
    m[0, new, new] = 100 * matrices((1, 16, 16), "decaying", seed=1)[0]
    estimate, _ = runtime.power_iteration(m, vectors)
    assert estimate / torch.linalg.svdvals(m)[:, 0] > 0.3  # the longest row
    for _ in range(5):
        estimate, vectors = runtime.power_iteration(m, vectors)
    assert estimate / torch.linalg.svdvals(m)[:, 0] > 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_factor(shape):
    m = matrices(shape)
    factor, sigma = runtime.polar_factor(m)
    u, s, vt = torch.linalg.svd(m, full_matrices=False)
    torch.testing.assert_close(factor, u @ vt, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sigma, s[:, 0])


def test_polar_factor_leaves_out_directions_that_are_rounding_noise():
    factor, _ = runtime.polar_factor(matrices((1, 9, 7), "low rank"))
    assert torch.linalg.matrix_rank(factor) == 2


def test_piece_factors_cap_the_blow_up_and_keep_zero():
    factors = runtime.piece_factors(torch.tensor([2.0, 1.0, 1e-6, 0.0]), 6.0)
    torch.testing.assert_close(factors, torch.tensor([3.0, 6.0, 30.0, 30.0]))
    assert (runtime.piece_factors(torch.zeros(3), 1.0) == 0).all()
    assert (runtime.piece_factors(torch.tensor([1e-30, 0.0]), 1.0) == 0).all()
    assert runtime.piece_factors(torch.tensor([1.0, math.inf]), 1.0).isnan().all()
    assert runtime.piece_factors(torch.tensor([1.0, math.nan]), 1.0).isnan().all()


@pytest.mark.parametrize("axes", [(-1,), (0,), (0, 2), (-3, -1)])
def test_row_rms(axes):
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = x.double().square().mean(dim=axes, keepdim=True).sqrt().float()
    torch.testing.assert_close(runtime.row_rms(x, axes), expected)


@pytest.mark.parametrize("out, into", [(5, 5), (3, 8), (8, 3), (1, 4)])
def test_semi_orthogonal_has_all_singular_values_one_and_follows_the_generator(out, into):
    draws = [runtime.semi_orthogonal(3, out, into, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    torch.testing.assert_close(torch.linalg.svdvals(draws[0]), torch.ones(3, min(out, into)))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_probe_is_a_unit_vector_without_structure():
    for size in (1, 2, 7, 768, 70000):
        assert abs(torch.linalg.vector_norm(runtime.probe(size)) - 1) < 1e-5
    block = runtime.probe(768 * 8).view(768, 8)
    assert torch.linalg.cond(block) < 2
    spectrum = torch.fft.rfft(runtime.probe(1024)).abs()
    assert spectrum.max() < 6 * spectrum.square().mean().sqrt()
