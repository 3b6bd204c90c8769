"""A convention adds up contributions in one way; shares of a budget add up to 1 in the same way."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modnorm_fx.conventions import PAPER, TRACKED, Convention, convention
from modnorm_fx.errors import ModnormError

BOTH = pytest.mark.parametrize("chosen", [PAPER, TRACKED], ids=lambda c: c.name)
sizes = st.lists(st.floats(0, 1e6), min_size=1, max_size=8)


@BOTH
@given(masses=sizes)
def test_shares_add_up_to_one(chosen: Convention, masses: list[float]):
    total = math.fsum(masses)
    shares = [chosen.share(mass, total) for mass in masses]
    assert all(0 <= share <= 1 + 1e-9 for share in shares)
    assert chosen.add(shares) == pytest.approx(1.0 if total > 0 else 0.0, abs=1e-9)


@BOTH
@given(values=sizes, order=st.randoms())
def test_adding_is_associative_and_ignores_order(chosen: Convention, values: list[float], order):
    shuffled = list(values)
    order.shuffle(shuffled)
    at = order.randrange(len(shuffled) + 1)
    nested = chosen.add([chosen.add(shuffled[:at]), *shuffled[at:]])
    assert nested == pytest.approx(chosen.add(values), rel=1e-9)


@BOTH
def test_nothing_adds_up_to_zero(chosen: Convention):
    assert chosen.add([]) == 0.0
    assert chosen.add(iter([2.5])) == 2.5


def test_what_the_two_conventions_are():
    assert PAPER.add([3.0, 4.0]) == 7.0
    assert TRACKED.add([3.0, 4.0]) == 5.0
    assert PAPER.share(1.0, 4.0) == 0.25
    assert TRACKED.share(1.0, 4.0) == 0.5
    assert not PAPER.tracks_scales and TRACKED.tracks_scales


def test_telescoping_over_a_trunk():
    """Pre-norm branches of unit scale on a stream: the sensitivity of what is downstream is 1/scale of the stream."""
    stream = [1.0]
    for _ in range(50):
        stream.append(TRACKED.add([stream[-1], 1.0]))
    assert stream[-1] == pytest.approx(math.sqrt(51))
    below = 1 / stream[-1]  # the final norm
    for scale in reversed(stream[:-1]):
        below = TRACKED.add([below, below / scale])  # past the branch, and through its norm layer
        assert below == pytest.approx(1 / scale)


def test_by_name():
    assert convention("paper") is PAPER
    assert convention("tracked") is TRACKED
    assert convention(TRACKED) is TRACKED


def test_a_name_that_does_not_exist_is_refused():
    with pytest.raises(ModnormError) as caught:
        convention("papr")
    assert "'papr'" in str(caught.value)
    assert "'paper'" in str(caught.value) and "'tracked'" in str(caught.value)
