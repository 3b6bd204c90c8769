"""The C++ kernels against float64 and torch.optim.AdamW, and what happens without a compiler."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from cpu_libraries import NAMES, ROUNDING, compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modnorm_fx import fused_adamw, runtime, spectral_norm
from modnorm_fx.kernels import cpu


def matrices(pieces: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(pieces, rows, columns, generator=torch.Generator().manual_seed(seed))


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "takes", lambda *tensors: False)


@pytest.mark.parametrize("name", list(NAMES))
@given(st.integers(1, 4), st.integers(9, 70), st.integers(9, 70), st.floats(-15, 15), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_estimates_stay_below_and_converge(
    name: str, pieces: int, rows: int, columns: int, power: float, seed: int
) -> None:
    w = matrices(pieces, rows, columns, seed) * 10.0**power
    true = torch.linalg.svdvals(w.double())[:, 0]
    vectors = runtime.start_vectors(w)
    for _ in range(10):
        dither = spectral_norm.dither(columns)
        estimate, vectors = cpu._power_step(compiled(name), w, vectors, dither, spectral_norm.DITHER)
    assert (estimate <= true * (1 + (1e-5 if name == "single" else ROUNDING))).all()
    assert (estimate >= true * 0.97).all()


@pytest.mark.parametrize("rank", [1, 3, 20])
@pytest.mark.parametrize("way", [*NAMES, "torch"])
def test_small_updates_have_norms_and_smaller_ones_count_as_zero(
    way: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What AdamW makes of a layer that is dead fades by a constant factor each step, down to nothing."""
    if way == "torch":
        without(monkeypatch)
    for power in range(-44, 13):
        w = (matrices(4, 24, rank) @ matrices(4, rank, 40, seed=1) * 10.0**power).contiguous()
        true = torch.linalg.svdvals(w.double())[:, 0]
        vectors = runtime.start_vectors(w)
        for _ in range(6):
            if way == "torch":
                estimate, vectors = runtime.power_iteration(w, vectors)
            else:
                dither = spectral_norm.dither(40)
                estimate, vectors = cpu._power_step(compiled(way), w, vectors, dither, spectral_norm.DITHER)
            assert vectors.isfinite().all() and estimate.isfinite().all(), power
            assert (estimate <= true * (1 + ROUNDING) + spectral_norm.TINY).all(), power
        counted = true > 10 * spectral_norm.TINY
        assert (estimate >= true * 0.97)[counted].all(), power


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 40, 9), (1, 9, 33), (2, 300, 17), (1, 17, 2500)])
def test_one_step_is_that_of_torch(shape: tuple[int, ...], library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = matrices(*shape)
    vectors = matrices(shape[0], 8, shape[2], seed=1)
    found, fresh = runtime.power_iteration(w, vectors)
    without(monkeypatch)
    wanted, others = runtime.power_iteration(w, vectors)
    single = library == "single"
    torch.testing.assert_close(found, wanted, rtol=1e-5 if single else 2 * ROUNDING, atol=0.0)
    if single:  # else another span, by what v was rounded
        torch.testing.assert_close(fresh, others, rtol=0.0, atol=2e-4)


@pytest.mark.parametrize("shape", [(3, 24, 40), (1, 300, 17), (1, 17, 2500), (2, 1000, 700)])
def test_a_converged_norm_is_that_of_the_rounded_matrix(shape: tuple[int, ...], library: str) -> None:
    w = matrices(*shape)
    w[:, :, 0] *= 3.0  # a gap between the first two singular values
    vectors = runtime.start_vectors(w)
    for _ in range(20):
        found, vectors = runtime.power_iteration(w, vectors)
    rounded = torch.linalg.matrix_norm(w.bfloat16().double(), 2)
    exact = torch.linalg.matrix_norm(w.double(), 2)
    error, moved = (found / rounded - 1).abs().max(), (found / exact - 1).abs().max()
    assert (moved if library == "single" else min(error, moved)) < 2e-5  # not every processor rounds
    assert moved < ROUNDING


def test_slices_of_packed_weights_are_read_in_place(library: str) -> None:
    whole = matrices(3, 20, 60)
    part = whole[:, :, 20:40]
    vectors = matrices(3, 8, 20, seed=1)
    found, fresh = runtime.power_iteration(part, vectors)
    wanted, others = runtime.power_iteration(part.contiguous(), vectors)
    assert torch.equal(found, wanted) and torch.equal(fresh, others)


def test_pieces_do_not_see_each_other_nor_the_number_of_threads(library: str) -> None:
    w, vectors = matrices(5, 30, 20), matrices(5, 8, 20, seed=1)
    w[2] = torch.nan
    whole = runtime.power_iteration(w, vectors)
    assert whole[0].isnan().tolist() == [False, False, True, False, False]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        several = runtime.power_iteration(w, vectors)
    finally:
        torch.set_num_threads(before)
    alone = runtime.power_iteration(w[3:4], vectors[3:4])
    assert torch.equal(whole[0][3:4], alone[0]) and torch.equal(whole[1][3:4], alone[1])
    assert torch.equal(whole[0].nan_to_num(), several[0].nan_to_num())


@pytest.mark.parametrize(("rows", "columns"), [(24, 16), (9, 37)])
def test_neighbours_in_a_register_do_not_see_each_other(rows: int, columns: int, library: str) -> None:
    """What is made of the products of many matrices at once is, for each, that of the matrix alone."""
    w, vectors = matrices(37, rows, columns), matrices(37, 8, columns, seed=1)
    w[3], w[17, 2, 5], w[20, 0, 0], w[36] = 0.0, torch.nan, torch.inf, w[36] * 1e-12
    vectors[5], vectors[6, 3:] = 0.0, 0.0  # no vector at all, and fewer than eight directions
    whole = runtime.power_iteration(w, vectors)
    for i in range(37):
        alone = runtime.power_iteration(w[i : i + 1], vectors[i : i + 1])
        for a, b in zip(whole, alone, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=0.0, atol=0.0, equal_nan=True)
    assert whole[0].isnan().nonzero().flatten().tolist() == [17, 20]
    assert (whole[0][[3, 5]] - w[[3, 5]].norm(dim=2).amax(1)).abs().max() < 1e-6
    fine = [i for i in range(37) if i not in (17, 20)]
    true = torch.linalg.matrix_norm(w[fine].double(), 2)
    found, longest = whole[0][fine], w[fine].norm(dim=2).amax(1)
    assert (found <= true * (1 + ROUNDING)).all() and (found >= 0.999999 * longest).all()


@pytest.mark.parametrize("entry", [torch.inf, -torch.inf, torch.nan])
def test_infinity_is_not_a_norm(entry: float, library: str) -> None:
    w = matrices(1, 20, 20)
    w[0, 17, 3] = entry
    assert runtime.power_iteration(w, matrices(1, 8, 20))[0].isnan().all()


def test_zero_keeps_its_vectors_and_a_lost_row_is_found(library: str) -> None:
    vectors = matrices(2, 8, 30, seed=1)
    w = torch.zeros(2, 20, 30)
    vectors[1, :, 7] = 0.0
    w[1, 5, 7] = 3.0  # no vector knows of it
    estimate, fresh = runtime.power_iteration(w, vectors)
    assert estimate.tolist() == [0.0, 3.0]
    assert torch.equal(fresh[0], vectors[0])
    assert abs(fresh[1, 0, 7].item()) > 0.99


@pytest.mark.parametrize("shape", [(7,), (7, 5), (7, 3, 4), (7, 5, 1, 1)])
def test_factors_are_those_of_one_update_at_a_time(
    shape: tuple[int, ...], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 4  # some are far below the largest
    norms[1], norms[2], norms[3] = 0.0, 1e-19, 1e19
    norms[4].view(-1)[-1], norms[5].view(-1)[0] = torch.nan, torch.inf
    targets = torch.arange(7.0)
    found = runtime.factors(norms, targets)
    wanted = torch.stack([runtime.piece_factors(x, t) for x, t in zip(norms, targets, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.0, equal_nan=True)
    assert found[4:6].isnan().all() and not found[:4].isnan().any() and not found[1:3].any()
    without(monkeypatch)
    torch.testing.assert_close(runtime.factors(norms, targets), found, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("unit", [1.0, 0.3])
@pytest.mark.parametrize("sliced", [False, True])
def test_factors_of_matrices_in_one_call(
    sliced: bool, unit: float, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of the norms that are found one after the other, and bring the exact norms to their targets."""
    w, targets = matrices(7, 24, 40)[:, :, 8 * sliced :], torch.arange(7.0)
    vectors = runtime.start_vectors(w.contiguous())
    w[1], w[2, 3, 5], w[3, 0, 0] = 0.0, torch.nan, torch.inf
    found, fresh = runtime.matrix_factors(w, vectors, targets, unit)
    norms, wanted = runtime.spectral(w, vectors)
    assert found.shape == (7, 1, 1) and torch.equal(fresh, wanted)
    torch.testing.assert_close(found[:, 0, 0], runtime.factors(unit * norms, targets), rtol=0, atol=0, equal_nan=True)
    assert found[1] == 0.0 and found[2:4].isnan().all()
    exact = unit * torch.linalg.matrix_norm(found[4:].double() * w[4:].double(), 2)
    torch.testing.assert_close(exact, targets[4:].double(), rtol=5e-3, atol=0.0)
    without(monkeypatch)
    others, _ = runtime.matrix_factors(w, vectors, targets, unit)
    torch.testing.assert_close(others, found, rtol=5e-3, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_updates_and_averages_are_those_of_adamw(make: type[torch.optim.Optimizer], maximize: bool) -> None:
    torch.manual_seed(0)
    shapes = [(5, 7), (5, 7), (300,), (2, 3, 4), ()]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    base = make(params, lr=1.0, betas=(0.9, 0.97), eps=1e-6, weight_decay=0.0, maximize=maximize)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = make(twins, lr=1.0, betas=(0.9, 0.97), eps=1e-6, weight_decay=0.0, maximize=maximize)
    active = [(0, str(i), p) for i, p in enumerate(params)]
    into = {str(i): torch.empty(shape) for i, shape in enumerate(shapes)}
    for step in range(4):
        for p, other in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            other.grad = p.grad.double().float()
        assert fused_adamw.takes(base, base.param_groups, active) == (step > 0)
        before = [p.detach().clone() for p in twins]
        twin.step()
        if step == 0:
            base.step()
            continue
        fused_adamw.write_updates(base, base.param_groups, active, into)
        for i, (p, other, old) in enumerate(zip(params, twins, before, strict=True)):
            torch.testing.assert_close(into[str(i)], other.detach() - old, rtol=1e-4, atol=2e-6)
            for key, value in base.state[p].items():
                torch.testing.assert_close(value, twin.state[other][key], rtol=1e-6, atol=5e-7)  # sums of terms near 1


def test_the_kernel_stands_back_where_it_would_not_do_what_the_optimizer_does() -> None:
    p = nn.Parameter(torch.randn(3, 4))

    def offered(base: torch.optim.Optimizer) -> bool:
        for _ in range(2):
            p.grad = torch.randn_like(p)
            base.step()
        return fused_adamw.takes(base, base.param_groups, [(0, "p", p)])

    class Own(torch.optim.AdamW):
        pass

    assert offered(torch.optim.AdamW([p]))
    assert not offered(torch.optim.AdamW([p], amsgrad=True))
    assert not offered(torch.optim.AdamW([p], eps=0.0))
    assert not offered(torch.optim.SGD([p]))
    assert not offered(Own([p]))
    hooked = torch.optim.AdamW([p])
    hooked.register_step_post_hook(lambda *_: None)
    assert not offered(hooked)
    strided = torch.optim.AdamW([p])
    assert offered(strided)
    p.grad = torch.randn(4, 3).T
    assert not fused_adamw.takes(strided, strided.param_groups, [(0, "p", p)])


@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6), (2,), (2, 6, 5, 3, 3)])
@pytest.mark.parametrize("by", ["all", "row", "column", "both"])
@pytest.mark.parametrize("decay", [False, True])
def test_scaling_and_applying(shape: tuple[int, ...], by: str, decay: bool) -> None:
    from modnorm_fx.normalizer import _step_

    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape[1:], generator=g) for _ in range(shape[0])]
    updates = torch.randn(shape, generator=g)
    sizes = [
        size if axis == 0 or by == "both" or (by == "row" and axis == 1) or (by == "column" and axis > 1) else 1
        for axis, size in enumerate(shape)
    ]
    step, kept = (torch.rand(sizes, generator=g) for _ in range(2))
    wanted = [
        (kept.double()[i] if decay else 1.0) * w.double() + step.double()[i] * updates.double()[i]
        for i, w in enumerate(weights)
    ]
    _step_(weights, updates.clone(), step, kept if decay else None)
    for w, expected in zip(weights, wanted, strict=True):
        torch.testing.assert_close(w.double(), expected, rtol=1e-5, atol=1e-6)


# Without a compiler ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "library", cpu.library.__wrapped__)
    return tmp_path


def test_the_library_is_built_once_and_kept(fresh: Path) -> None:
    assert cpu.library() is not None
    (built,) = (fresh / "modnorm_fx").iterdir()
    stamp = built.stat().st_mtime_ns
    assert cpu.library() is not None and built.stat().st_mtime_ns == stamp


def test_no_compiler_is_said_and_torch_does_it(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING, logger="modnorm_fx"):
        assert cpu.library() is None
    assert "No C++ compiler was found" in caplog.text
    assert not cpu.takes(torch.randn(3))


def test_a_compiler_that_fails_is_quoted(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = fresh / "broken"
    broken.write_text("#!/bin/sh\necho cannot do this >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with caplog.at_level(logging.WARNING, logger="modnorm_fx"):
        assert cpu.library() is None
    assert "cannot do this" in caplog.text


def test_wrong_machine_code_is_not_used(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copies = [fresh.resolve() / path.name for path in cpu.SOURCES]
    for path, copy in zip(cpu.SOURCES, copies, strict=True):
        copy.write_text(path.read_text(encoding="utf-8").replace("+= row[a] * row[b];", "+= 1.1f * row[a] * row[b];"))
    assert any("1.1f" in copy.read_text(encoding="utf-8") for copy in copies)
    monkeypatch.setattr(cpu, "SOURCES", tuple(copies))
    with caplog.at_level(logging.WARNING, logger="modnorm_fx"):
        assert cpu.library() is None
    assert "wrong code" in caplog.text


def test_it_can_be_switched_off(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODNORM_FX_CPP", "0")
    assert cpu.library() is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("K", spectral_norm.BLOCK),
        ("SQUARINGS", spectral_norm.SQUARINGS),
        ("JITTER", spectral_norm.JITTER),
        ("TINY", spectral_norm.TINY),
        ("CAP", runtime.PIECE_CAP),
    ],
)
def test_constants_are_those_of_the_torch_code(name: str, value: float) -> None:
    lines = [line for path in cpu.SOURCES for line in path.read_text(encoding="utf-8").splitlines()]
    (found,) = (line for line in lines if f" {name} = " in line)
    assert float(found.split("=")[1].split(";")[0].rstrip("f")) == value


def test_the_largest_entry_and_what_is_not_finite() -> None:
    tensors = [matrices(1, 7, n, n) for n in (1, 13, 700)]
    tensors[1][0, 6, 12] = -9.5
    assert cpu.largest_entry(tensors) == 9.5
    tensors[0][0, 3, 0] = -torch.inf
    assert cpu.largest_entry(tensors) == torch.inf
    tensors[2][0, 6, 699] = -torch.nan
    assert cpu.largest_entry(tensors) != cpu.largest_entry(tensors)
