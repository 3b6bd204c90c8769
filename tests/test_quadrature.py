"""Gaussian moments against closed forms, and against a finer grid with finite differences."""

import math

import pytest
import torch
from op_calls import grid_moments

from modnorm_fx.errors import ModnormError
from modnorm_fx.quadrature import NODES, Sign, gaussian_moments, joint_moments

SCALES = (1e-3, 0.1, 1.0, 4.0)


@pytest.mark.parametrize("scale", SCALES)
def test_polynomials_are_exact(scale: float):
    assert gaussian_moments(lambda x: 3 * x, scale) == pytest.approx((3 * scale, 3.0), rel=1e-12)
    assert gaussian_moments(lambda x: x**2, scale) == pytest.approx((math.sqrt(3) * scale**2, 2 * scale), rel=1e-12)
    assert gaussian_moments(lambda x: x**3, scale) == pytest.approx(
        (math.sqrt(15) * scale**3, math.sqrt(27) * scale**2)
    )


@pytest.mark.parametrize("scale", SCALES)
def test_smooth_functions_in_closed_form(scale: float):
    value, slope = gaussian_moments(torch.sin, scale)
    assert value == pytest.approx(math.sqrt((1 - math.exp(-2 * scale**2)) / 2), rel=1e-8)
    assert slope == pytest.approx(math.sqrt((1 + math.exp(-2 * scale**2)) / 2), rel=1e-8)
    if scale <= 1:
        assert gaussian_moments(torch.exp, scale) == pytest.approx((math.exp(scale**2),) * 2, rel=1e-8)


@pytest.mark.parametrize("scale", SCALES)
def test_relu_is_half(scale: float):
    assert gaussian_moments(torch.relu, scale) == pytest.approx((scale / math.sqrt(2), 1 / math.sqrt(2)), rel=1e-12)


def test_nodes_avoid_the_kink_at_zero():
    assert NODES % 2 == 0


KINKED = {
    "leaky_relu": torch.nn.functional.leaky_relu,
    "hardswish": torch.nn.functional.hardswish,
    "hardsigmoid": torch.nn.functional.hardsigmoid,
    "hardtanh": torch.nn.functional.hardtanh,
    "relu6": torch.nn.functional.relu6,
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(-0.3, 1.7),
}
SMOOTH = {
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": torch.nn.functional.softplus,
    "mish": torch.nn.functional.mish,
}


@pytest.mark.parametrize("scale", (0.1, 1.0, 4.0))
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_functions_against_a_grid(name: str, scale: float):
    assert gaussian_moments(SMOOTH[name], scale) == pytest.approx(grid_moments(SMOOTH[name], scale), rel=1e-5)


@pytest.mark.parametrize("scale", (0.1, 1.0, 4.0))
@pytest.mark.parametrize("name", KINKED)
def test_kinked_functions_against_a_grid(name: str, scale: float):
    assert gaussian_moments(KINKED[name], scale) == pytest.approx(grid_moments(KINKED[name], scale), rel=1e-3, abs=1e-9)


def test_points_without_a_value_are_left_out():
    """sqrt on a positive quantity: the half of a Gaussian."""
    value, slope = gaussian_moments(torch.sqrt, 1.0)
    assert value == pytest.approx((2 / math.pi) ** 0.25, rel=1e-3)
    assert math.isfinite(slope)


def test_a_function_without_values_is_an_error():
    with pytest.raises(ModnormError, match="no finite value"):
        gaussian_moments(lambda x: torch.full_like(x, math.nan), 1.0)


def test_constants_and_detached_functions_have_no_slope():
    assert gaussian_moments(lambda x: torch.full_like(x, 2.0), 1.0) == pytest.approx((2.0, 0.0))
    assert gaussian_moments(lambda x: x.detach() * 1.0, 1.0) == pytest.approx((1.0, 0.0))


def test_it_works_under_no_grad_and_leaves_grad_mode_alone():
    with torch.no_grad():
        assert gaussian_moments(torch.tanh, 1.0)[1] > 0
        assert not torch.is_grad_enabled()


def logit(x):
    """As detectors write it."""
    return torch.log(x.clamp(min=1e-5) / (1 - x).clamp(min=1e-5))


@pytest.mark.parametrize("function, x", ((torch.log, 0.7), (torch.reciprocal, 0.7), (logit, 0.55)))
def test_slopes_whose_square_has_no_integral_are_taken_at_the_size_of_the_operand(function, x: float):
    at = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(at), at)
    assert gaussian_moments(function, x, Sign.POSITIVE)[1] == pytest.approx(abs(float(slope)), rel=1e-9)


PAIRS = {
    "product": (lambda a, b: a * b, 0.0, lambda s, t: (s * t, t, s)),
    "square of a difference": (
        lambda a, b: (a - b).square(), 1.0, lambda s, t: (math.sqrt(3) * (s * s + t * t), *[2 * math.hypot(s, t)] * 2),
    ),
    "largest": (torch.maximum, None, lambda s, t: (math.sqrt((s * s + t * t) / 2), *[math.sqrt(0.5)] * 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("scales", ((1.0, 1.0), (0.3, 2.0)))
def test_functions_of_two_operands_in_closed_form(name: str, scales):
    function, mean, expected = PAIRS[name]
    found, rms, slopes = joint_moments(function, scales)
    assert (rms, *slopes) == pytest.approx(expected(*scales), rel=0.02)
    if mean is not None:
        assert found == pytest.approx(mean * (scales[0] ** 2 + scales[1] ** 2), abs=1e-6)


def test_a_function_of_two_operands_without_a_value_is_refused():
    with pytest.raises(ModnormError, match="no finite value"):
        joint_moments(lambda a, b: (a - a) / (b - b), (1.0, 1.0))


@pytest.mark.parametrize("scale", (3.0, 6.0))
def test_moments_of_entries_that_are_never_met_do_not_count(scale: float):
    """exp of a Gaussian of scale 6 has RMS e^36; a million draws of it have less than e^33."""
    value, slope = gaussian_moments(torch.exp, scale)
    assert value == slope == pytest.approx(math.sqrt(math.cosh(2 * scale)))


@pytest.mark.parametrize("scale", [60.0, 1e3, 1e6])
def test_a_saturated_function_keeps_the_slope_that_it_has_near_zero(scale: float) -> None:
    """E sech⁴(s z) = ∫ sech⁴(x) dx · φ(0) / s = 4 / (3 s √(2π)) for large s; tanh itself is ±1."""
    size, slope = gaussian_moments(torch.tanh, scale)
    assert size == pytest.approx(1.0, rel=0.02)
    assert slope == pytest.approx(math.sqrt(4 / 3 / scale / math.sqrt(2 * math.pi)), rel=1e-3)


@pytest.mark.parametrize("scale", [30.0, 1e3, 1e5])
def test_exp_has_its_own_size_as_slope_however_large_its_operand(scale: float) -> None:
    """exp' = exp; what float32 cannot hold does not occur, and nothing is infinite or zero."""
    size, slope = gaussian_moments(torch.exp, scale)
    assert 0 < size <= torch.finfo(torch.float32).max
    assert slope == pytest.approx(size)
