"""The whole step of matrices in one kernel: against torch.optim.AdamW and singular values, and when it is used."""

from __future__ import annotations

import copy

import pytest
import torch
from cpu_libraries import ROUNDING
from fake_norm import Leaf, Norm
from torch import Tensor, nn

from modnorm_fx import atoms as A
from modnorm_fx.errors import NonFiniteError
from modnorm_fx.kernels import cpu
from modnorm_fx.normalizer import COLD_STEPS
from modnorm_fx.optim import ModularOptimizer

LR, DECAY = 0.01, 0.1


class Net(nn.Module):
    """One parameter for each way in which matrices are stored, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {
            "a": (40, 24), "b": (40, 24), "odd": (19, 37), "rows": (60, 20), "columns": (20, 96),
            "conv": (24, 20, 3, 3), "grouped": (36, 10, 2), "patch": (17, 3, 4, 4),
            "experts": (3, 12, 21), "gates": (44, 13), "bias": (9,),
        }  # fmt: skip
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))


def leaves_of(net: Net) -> list[Leaf]:
    found = [
        Leaf(n, n, A.Linear(getattr(net, n).shape), t, initial=initial)
        for n, t, initial in (("a", 0.3, 1.0), ("b", 0.7, 0.25), ("odd", 0.2, 2.0))
    ]
    for name, axis, size, part in (("rows", 0, 60, (20, 20)), ("columns", 1, 96, (20, 32))):
        width = part[axis]
        for i in range(3):
            place = (A.Slice(axis, i * width, (i + 1) * width, size),)
            found.append(Leaf(f"{name}{i}", name, A.Linear(part), 0.1 + 0.1 * i, place, initial=0.5 + i))
    return found + [
        Leaf("conv", "conv", A.Conv((24, 20, 3, 3)), 0.4),
        Leaf("grouped", "grouped", A.Conv((36, 10, 2), groups=3), 0.4),
        Leaf("patch", "patch", A.PatchConv((17, 3, 4, 4)), 0.4),
        Leaf("experts", "experts", A.Experts((3, 12, 21)), 0.5),
        Leaf("gates", "gates", A.Gates((44, 13), gates=4), 0.5),
        Leaf("bias", "bias", A.Bias((9,)), 0.5),
    ]


def setup(decay: float = DECAY, **options) -> tuple[Net, ModularOptimizer]:
    net = Net()
    base = torch.optim.AdamW(net.parameters(), weight_decay=0.0)
    return net, ModularOptimizer(base, Norm(net, leaves_of(net)), lr=LR, weight_decay=decay, **options)


def give(net: nn.Module, step: int) -> None:
    g = torch.Generator().manual_seed(step // 3)  # a few steps in one direction, as in training
    noise = torch.Generator().manual_seed(1000 + step)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=g) + 0.1 * torch.randn(p.shape, generator=noise)


def run(net: nn.Module, opt: ModularOptimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        give(net, step)
        opt.step()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry with each call of the kernel."""
    assert cpu.available()  # which tries them, the first time
    found: list[int] = []
    inner = cpu.step_matrices

    def counted(places, settings, *rest):
        found.append(len(settings))
        return inner(places, settings, *rest)

    monkeypatch.setattr(cpu, "step_matrices", counted)
    return found


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def same(net: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_steps_are_adamw_scaled_by_exact_norms(calls: list[int]) -> None:
    net, opt = setup()
    twin = copy.deepcopy(net)
    plain = torch.optim.AdamW(twin.parameters(), lr=1.0, weight_decay=0.0)
    for step in range(COLD_STEPS + 12):
        give(net, step)
        give(twin, step)
        before, twins = weights(net), weights(twin)
        opt.step()
        plain.step()
        assert bool(calls) == (step >= COLD_STEPS)
        for leaf in opt.norm.leaves:
            after = net.get_parameter(leaf.weight).detach()
            kept = 1.0 - LR * DECAY * leaf.target / leaf.initial * leaf.atom.decays
            moved = leaf.read(after).double() - kept * leaf.read(before[leaf.weight]).double()
            update = leaf.read((twin.get_parameter(leaf.weight) - twins[leaf.weight]).detach()).double()
            if leaf.atom.decays:
                size = leaf.atom.norm(moved).item() / (LR * leaf.target)
                assert 0.999 < size < 1.08, leaf.key  # estimates are never high, and a few percent low
                pieces, wanted = leaf.atom.matrices(moved), leaf.atom.matrices(update)
            else:
                pieces, wanted = moved[None], update[None]
            for a, b in zip(pieces, wanted, strict=True):
                torch.testing.assert_close(a / a.norm(), b / b.norm(), rtol=0.0, atol=2e-4)
        for p, other in zip(net.parameters(), twin.parameters(), strict=True):
            for key, value in plain.state[other].items():
                torch.testing.assert_close(opt.state[p][key], value, rtol=1e-5, atol=1e-6)
    assert sum(calls) == 12 * 12  # the matrices; rows of a packed weight are three, columns are stepped together


def test_it_agrees_with_the_generated_source(library: str) -> None:
    """backend="eager" runs the source, operation by operation. Updates that differ in their last bits may be rounded to
    bfloat16 differently."""
    tolerance = 2e-4 if library == "single" else ROUNDING
    (net, opt), (other, eager) = setup(), setup(backend="eager")
    for step in range(COLD_STEPS + 6):
        run(net, opt, 1, step)
        run(other, eager, 1, step)
        for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0.0, atol=tolerance * LR, msg=name)


def test_the_number_of_threads_does_not_matter(calls: list[int]) -> None:
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        net, opt = setup()
        run(net, opt, COLD_STEPS + 3)
        found.append(weights(net))
    torch.set_num_threads(1)
    assert calls and all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))


def test_a_refused_gradient_changes_nothing(calls: list[int]) -> None:
    net, opt = setup()
    run(net, opt, COLD_STEPS + 2)
    before, state, done = weights(net), copy.deepcopy(opt.state_dict()), len(calls)
    give(net, 50)
    net.gates.grad[3, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="The gradient of gates"):
        opt.step()
    assert same(net, before) and len(calls) == done
    for old, new in zip(state["state"].values(), opt.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    run(net, opt, 1, 51)
    assert len(calls) > done and not same(net, before)


@pytest.mark.parametrize("entry", [torch.nan, torch.inf, 1e25])
def test_averages_that_were_tampered_with_change_no_weight(entry: float, calls: list[int]) -> None:
    net, opt = setup()
    run(net, opt, COLD_STEPS + 2)
    before, done = weights(net), len(calls)
    opt.state[net.experts]["exp_avg"][1, 2, 3] = entry
    give(net, 50)
    with pytest.raises(NonFiniteError, match="The update of experts"):
        opt.step()
    assert same(net, before) and len(calls) == done


def test_a_huge_gradient_takes_the_long_way(calls: list[int]) -> None:
    net, opt = setup()
    run(net, opt, COLD_STEPS + 1)
    before, done = weights(net), len(calls)
    give(net, 50)
    net.a.grad[0, 0] = 1e30  # its square is infinite
    opt.step()
    assert len(calls) == done and not same(net, before)
    assert all(p.isfinite().all() for p in net.parameters())


def test_unchecked_steps_show_what_went_wrong(calls: list[int]) -> None:
    net, opt = setup(nonfinite="unchecked")
    run(net, opt, COLD_STEPS + 1)
    give(net, 50)
    net.odd.grad[0, 0] = torch.nan
    opt.step()
    assert calls and net.odd.isnan().all() and net.a.isfinite().all()


def test_it_follows_changes_of_settings_state_and_parameters(calls: list[int]) -> None:
    net, opt = setup(decay=0.0)
    run(net, opt, COLD_STEPS + 1)
    opt.param_groups[0]["lr"] = 0.0
    before = weights(net)
    run(net, opt, 1, 20)
    assert same(net, before)
    opt.param_groups[0] |= {"lr": LR, "betas": (0.0, 0.99)}
    run(net, opt, 1, 21)
    torch.testing.assert_close(opt.state[net.a]["exp_avg"], net.a.grad)
    assert opt.base.param_groups[0]["betas"] == (0.0, 0.99)

    done = len(calls)
    give(net, 22)
    net.b.grad = None  # one of two that are stacked
    before = weights(net)
    opt.step()
    assert len(calls) == done and torch.equal(net.b, before["b"]) and not torch.equal(net.a, before["a"])
    net.b.requires_grad_(False)
    run(net, opt, 1, 23)
    assert len(calls) > done and torch.equal(net.b, before["b"])
    net.b.requires_grad_(True)

    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    average = opt.state[net.a]["exp_avg"].clone()
    run(net, opt, 1, 24)
    assert not torch.equal(opt.state[net.a]["exp_avg"], average)


def test_coupled_decay_takes_the_long_way(calls: list[int]) -> None:
    net = Net()
    opt = ModularOptimizer(torch.optim.Adam(net.parameters(), weight_decay=0.1), Norm(net, leaves_of(net)), lr=LR)
    run(net, opt, COLD_STEPS + 2)
    assert not calls


def test_a_resumed_run_goes_on_bit_for_bit(calls: list[int]) -> None:
    net, opt = setup()
    run(net, opt, COLD_STEPS + 2)
    saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
    run(net, opt, 3, 30)
    again, resumed = setup()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    run(again, resumed, 3, 30)
    assert calls and same(again, weights(net))
