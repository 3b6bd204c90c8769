"""The Triton kernels of AdamW against torch's and float64: run as those of `test_kernels_gpu.py`, which also compiles
them for Hopper."""

from __future__ import annotations

import pytest
import torch
from inner_pytest import inner_run
from kernel_checks import close, fused, gpu, normal, products

__all__ = ["fused", "gpu"]  # fixtures


def test_the_kernels_in_the_interpreter() -> None:
    inner_run(__file__, "check", TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_on_a_gpu() -> None:
    inner_run(__file__, "check", KERNELS_TESTED_ON="cuda")


class Reference:
    """`torch.optim.AdamW` with lr 1 on zeros: the weights after a step are its update."""

    def __init__(self, shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32, **options: object):
        self.params = [torch.zeros(shape, dtype=dtype) for _ in range(count)]
        self.adam = torch.optim.AdamW(self.params, lr=1.0, weight_decay=0.0, **options)

    def step(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        for p, g in zip(self.params, gradients, strict=True):
            p.zero_()
            p.grad = g.clone()
        self.adam.step()
        return torch.stack(self.params)

    def state(self, key: str) -> torch.Tensor:
        return torch.stack([self.adam.state[p][key] for p in self.params])


@pytest.mark.parametrize("shape", [(20, 50), (1, 300), (70, 1), (2, 37, 130), (3, 1500)], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def check_adamw_follows_torch_for_three_steps(fused, shape, maximize):
    options = {"betas": (0.8, 0.95), "eps": 1e-6, "maximize": maximize}
    reference = Reference(shape, 2, **options)
    averages, squares, params = ([torch.zeros(shape) for _ in range(2)] for _ in range(3))
    matrices = (-1, *shape[-2:])
    for step in range(1, 4):
        gradients = list(normal(2, *shape, seed=step))
        update = reference.step(gradients).view(matrices)
        u = normal(len(update), 8, shape[-1], seed=10 + step)
        lengths = torch.empty(len(update), shape[-2])
        corrections = fused.adamw_corrections(torch.full((2,), float(step)), options["betas"])
        found = fused.adamw_products(gradients, averages, squares, corrections, u, row_squares=lengths, **options)
        torch.testing.assert_close(torch.stack(averages), reference.state("exp_avg"), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(torch.stack(squares), reference.state("exp_avg_sq"), rtol=1e-6, atol=1e-7)
        for one, wanted in zip(found, products(update, u), strict=True):
            close(one, wanted)
        close(lengths, update.double().square().sum(-1))

        index = lengths.argmax(1)
        rows = fused.adamw_rows(averages, squares, corrections, index, eps=1e-6)
        torch.testing.assert_close(rows, update.take_along_dim(index[:, None, None], 1)[:, 0], rtol=2e-6, atol=1e-7)

        factor, decay = normal(2, shape[0], *(1 for _ in shape[1:]), seed=5), torch.full((1,), 0.9)
        before = torch.stack(params)
        fused.adamw_apply_(params, averages, squares, corrections, factor, decay, eps=1e-6)
        wanted = 0.9 * before + factor * update.view(before.shape)
        torch.testing.assert_close(torch.stack(params), wanted, rtol=2e-6, atol=2e-6)
        assert all(p._version == step for p in params)


def check_adamw_of_tensors_at_different_steps(fused):
    corrections = fused.adamw_corrections(torch.tensor([1.0, 1000.0, 2e6]), (0.9, 0.999))
    for (first, second), t in zip(corrections.tolist(), (1, 1000, 2_000_000), strict=True):
        assert first == pytest.approx(1 / (1 - 0.9**t), rel=1e-7)
        assert second == pytest.approx((1 - 0.999**t) ** -0.5, rel=1e-7)
    averages, squares = list(normal(3, 5, 7)), list(normal(3, 5, 7, seed=1).square())
    params = [torch.zeros(5, 7) for _ in range(3)]
    fused.adamw_apply_(params, averages, squares, corrections, torch.ones(3, 1, 1), eps=1e-8)
    for p, m, v, (first, second) in zip(params, averages, squares, corrections, strict=True):
        torch.testing.assert_close(p, -first * m / (v.sqrt() * second + 1e-8), rtol=2e-6, atol=0.0)


def check_adamw_in_parts_moves_every_entry_once(fused):
    """A packed weight [in, 3·out] as three matrices side by side, and the rest of it as another call."""
    shape, options = (20, 3 * 24 + 10), {"betas": (0.9, 0.99), "eps": 1e-8}
    reference = Reference(shape, 2, **options)
    gradients = list(normal(2, *shape, seed=1))
    update = reference.step(gradients)
    averages, squares = ([torch.zeros(shape) for _ in range(2)] for _ in range(2))
    corrections = fused.adamw_corrections(torch.ones(2), options["betas"])
    parts = (lambda t: t[:, :72].unflatten(1, (3, 24)).transpose(0, 1), lambda t: t[:, 72:])
    for part in parts:
        wanted = torch.stack([part(x) for x in update]).flatten(0, -3)
        u = normal(*wanted.shape[::2], seed=2)[:, None].expand(-1, 3, -1)
        views = ([part(t) for t in tensors] for tensors in (gradients, averages, squares))
        found = fused.adamw_products(*views, corrections, u, **options)
        for one, exact in zip(found, products(wanted, u), strict=True):
            close(one, exact)
    torch.testing.assert_close(torch.stack(averages), reference.state("exp_avg"), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.stack(squares), reference.state("exp_avg_sq"), rtol=1e-6, atol=1e-7)


def check_adamw_in_parts_of_whole_tensors(fused, gpu):
    """Experts with gate and up side by side, read where they lie: the tensors are given whole."""
    shape, options = (3, 2 * 11, 13), {"betas": (0.9, 0.99), "eps": 1e-8}
    reference = Reference(shape, 2, **options)
    gradients = list(normal(2, *shape, seed=1))
    update = reference.step(gradients)
    averages, squares = ([torch.zeros(shape) for _ in range(2)] for _ in range(2))
    corrections = fused.adamw_corrections(torch.ones(2), options["betas"])
    lists = gradients, averages, squares
    tables = tuple(map(gpu.pointer_table, lists))
    for first in (0, 11):
        where = fused.Matrices(13 * first, 3, 11, 13, 2 * 11 * 13, 13)
        wanted = update[:, :, first : first + 11].flatten(0, 1)
        u = normal(6, 8, 13, seed=2)
        found = fused.adamw_products(*lists, corrections, u, tables=tables, where=where, **options)
        for one, exact in zip(found, products(wanted, u), strict=True):
            close(one, exact)
        index = torch.tensor([0, 10, 3, 5, 7, 2])
        rows = fused.adamw_rows(averages, squares, corrections, index, eps=1e-8, tables=tables[1:], where=where)
        torch.testing.assert_close(rows, wanted.take_along_dim(index[:, None, None], 1)[:, 0], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(torch.stack(averages), reference.state("exp_avg"), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.stack(squares), reference.state("exp_avg_sq"), rtol=1e-6, atol=1e-7)


def check_adamw_with_factor_zero_changes_nothing(fused):
    averages, squares = list(normal(2, 4, 6)), list(normal(2, 4, 6, seed=1).square())
    averages[0][1, 2], averages[0][2, 2] = torch.nan, torch.inf
    params, corrections = list(normal(2, 4, 6, seed=2)), fused.adamw_corrections(torch.ones(2), (0.9, 0.99))
    before, by = torch.stack(params), torch.tensor([0.0, torch.nan])[:, None, None]
    fused.adamw_apply_(params, averages, squares, corrections, by, eps=1e-8)
    assert torch.equal(params[0], before[0]) and params[1].isnan().all()


def check_adamw_in_bfloat16(fused):
    """Averages and update are near torch's (it rounds more often); the products are those of the stored averages."""
    shape, options = (40, 70), {"betas": (0.9, 0.99), "eps": 1e-8}
    reference = Reference(shape, 2, torch.bfloat16, **options)
    gradients = list(normal(2, *shape, seed=1).bfloat16())
    reference.step(gradients)
    averages, squares, params = ([torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2)] for _ in range(3))
    corrections, u = fused.adamw_corrections(torch.ones(2), options["betas"]), normal(2, 8, 70, seed=2)
    found = fused.adamw_products(gradients, averages, squares, corrections, u, **options)
    for ours, key in ((averages, "exp_avg"), (squares, "exp_avg_sq")):
        torch.testing.assert_close(torch.stack(ours).float(), reference.state(key).float(), rtol=0.02, atol=0.0)
    m, v = torch.stack(averages).double(), torch.stack(squares).double()
    first, second = (column[:, None, None].double() for column in corrections.unbind(1))
    update = -first * m / (v.sqrt() * second + 1e-8)
    for one, wanted in zip(found, products(update, u), strict=True):
        close(one, wanted)
    fused.adamw_apply_(params, averages, squares, corrections, torch.full((2, 1, 1), 0.1), eps=1e-8)
    torch.testing.assert_close(torch.stack(params).double(), 0.1 * update, rtol=0.01, atol=0.0)


def check_adamw_loops_repeats_and_survives_eps_zero(fused, gpu, monkeypatch):
    monkeypatch.setattr(gpu, "MULTIPROCESSORS", 2)  # each program loops over several row blocks
    gradients, u = list(normal(2, 200, 90)), normal(2, 5, 90, seed=1)
    runs = []
    for _ in range(2):
        averages, squares = ([torch.zeros(200, 90) for _ in range(2)] for _ in range(2))
        corrections = fused.adamw_corrections(torch.ones(2), (0.9, 0.99))
        lists, options = (gradients, averages, squares), {"betas": (0.9, 0.99), "eps": 0.0}
        tables = tuple(map(gpu.pointer_table, lists))
        runs.append(fused.adamw_products(*lists, corrections, u, tables=tables, **options))
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two) and one.isfinite().all()
    for one, wanted in zip(runs[0], products(-torch.stack(gradients).sign(), u), strict=True):
        close(one, wanted)  # the first update of Adam without eps


def check_adamw_lets_nan_through_to_one_matrix(fused):
    gradients = list(normal(2, 20, 30))
    gradients[1][3, 4] = torch.nan
    averages, squares = ([torch.zeros(20, 30) for _ in range(2)] for _ in range(2))
    corrections, u = fused.adamw_corrections(torch.ones(2), (0.9, 0.99)), normal(2, 8, 30, seed=1)
    v, z = fused.adamw_products(gradients, averages, squares, corrections, u, betas=(0.9, 0.99), eps=1e-8)
    assert v[0].isfinite().all() and z[0].isfinite().all()
    assert v[1].isnan().sum() == 8 and z[1].isnan().all()


def check_adamw_refuses_tensors_laid_out_differently(fused):
    lists = [[normal(4, 6)], [normal(6, 4).T], [normal(4, 6)]]
    corrections = fused.adamw_corrections(torch.ones(1), (0.9, 0.99))
    with pytest.raises(ValueError, match="same strides"):
        fused.adamw_products(*lists, corrections, normal(1, 2, 6), betas=(0.9, 0.99), eps=1e-8)
    with pytest.raises(ValueError, match="last axis"):
        fused.adamw_products(*[[normal(6, 4).T]] * 3, corrections, normal(1, 2, 6), betas=(0.9, 0.99), eps=1e-8)
    with pytest.raises(ValueError, match="9 power vectors"):
        fused.adamw_products(*[[normal(4, 6)]] * 3, corrections, normal(1, 9, 6), betas=(0.9, 0.99), eps=1e-8)
