"""AdamW's step of matrices without a stored update: against the eager backend, torch.optim.AdamW and exact norms.

As in `test_kernels_gpu.py` the tests proper are named `check_…` and run in a pytest of their own: in Triton's
interpreter, on CPU tensors and with a stand-in for CUDA graphs; and, where there is a GPU, on it with real graphs. To
run one: `TRITON_INTERPRET=1 pytest -o python_functions=check_* tests/test_fused_triton.py -k name`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from fake_norm import Leaf, Norm
from inner_pytest import inner_run
from torch import Tensor, nn

from modnorm_fx import atoms as A
from modnorm_fx import graph, optim
from modnorm_fx.codegen import make
from modnorm_fx.errors import NonFiniteError
from modnorm_fx.kernels import cpu
from modnorm_fx.normalizer import COLD_STEPS, Normalizer
from modnorm_fx.optim import ModularOptimizer

LR, DECAY = 0.01, 0.3
TRITON = ("triton", "cudagraph-triton")


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_in_the_interpreter() -> None:
    inner_run(__file__, "check", TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    inner_run(__file__, "check")


SHAPES = {
    "a": (40, 24), "b": (40, 24), "rows": (60, 20), "columns": (20, 51), "pointwise": (24, 20, 1, 1),
    "grouped": (36, 12, 1), "patch": (17, 3, 4, 4), "experts": (3, 12, 21), "gate_up": (2, 22, 13), "gates": (44, 13),
}  # fmt: skip
OTHERS = {"conv": (12, 10, 3), "exact": (6, 30), "bias": (9,)}
PARTS = 14
"""How many parts the matrices of `SHAPES` are read in; a and b are stacked."""


class Net(nn.Module):
    """A parameter for each way in which matrices are stored, and some that the kernels leave to the ordinary path."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: str) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=g).to(device)))


def packed(name: str, axis: int, whole: int, count: int, atom: A.Atom) -> list[Leaf]:
    width = whole // count
    places = [(A.Slice(axis, i * width, (i + 1) * width, whole),) for i in range(count)]
    return [Leaf(f"{name}{i}", name, atom, 0.1 + 0.1 * i, place, initial=0.5 + i) for i, place in enumerate(places)]


LEAVES = [
    Leaf("a", "a", A.Linear((40, 24)), 0.3),
    Leaf("b", "b", A.Linear((40, 24)), 0.7, initial=0.25),
    *packed("rows", 0, 60, 3, A.Linear((20, 20))),
    *packed("columns", 1, 51, 3, A.Linear((20, 17), transposed=True)),
    Leaf("pointwise", "pointwise", A.Conv((24, 20, 1, 1)), 0.4),
    Leaf("grouped", "grouped", A.Conv((36, 12, 1), groups=3), 0.4),
    Leaf("patch", "patch", A.PatchConv((17, 3, 4, 4)), 0.4),
    Leaf("experts", "experts", A.Experts((3, 12, 21)), 0.5),
    *packed("gate_up", 1, 22, 2, A.Experts((2, 11, 13))),
    Leaf("gates", "gates", A.Gates((44, 13), gates=4), 0.5),
    Leaf("conv", "conv", A.Conv((12, 10, 3)), 0.4),
    Leaf("exact", "exact", A.Linear((6, 30)), 0.2),
    Leaf("bias", "bias", A.Bias((9,)), 0.5),
]


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        return "cuda"
    monkeypatch.setattr(cpu, "takes", lambda *tensors: False)  # nor would C++ kernels work on a GPU
    monkeypatch.setattr(graph, "record", lambda run: run)
    monkeypatch.setattr(optim, "check_capturable", lambda base, weight_dependent: None)
    return "cpu"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, device: str) -> list[str]:
    """What was done: products of a part, application to the parameters of a bucket, a look at all updates."""
    from modnorm_fx.kernels import gpu_adamw

    found: list[str] = []

    def counting(owner: object, name: str, word: str) -> None:
        inner = getattr(owner, name)

        def counted(*args, **options):
            found.append(word)
            return inner(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    counting(gpu_adamw, "adamw_products", "products")
    counting(gpu_adamw, "adamw_apply_", "apply")
    counting(Normalizer, "refused", "check")
    return found


Made = tuple[Net, ModularOptimizer]


def setup(device: str, backend: str, plain: bool = False, **options) -> Made:
    """`plain`: only parameters that the kernels take. Two groups, the second with settings of its own."""
    shapes = SHAPES if plain else SHAPES | OTHERS
    net = Net(shapes, device)
    leaves = [leaf for leaf in LEAVES if leaf.weight in shapes]
    second = [p for name, p in net.named_parameters() if name in ("columns", "experts", "bias")]
    first = [p for name, p in net.named_parameters() if name not in ("columns", "experts", "bias")]
    groups = [{"params": first}, {"params": second, "betas": (0.8, 0.97), "eps": 1e-6, "maximize": True}]
    if device == "cuda":
        groups = [group | {"capturable": True} for group in groups]
    base = torch.optim.AdamW(groups, weight_decay=0.0)
    opt = ModularOptimizer(base, Norm(net, leaves), lr=LR, weight_decay=DECAY, backend=backend, **options)
    opt.param_groups[1] |= {"lr": 3 * LR, "weight_decay": 0.0}
    return net, opt


def give(net: nn.Module, step: int) -> None:
    """Fixed gradients: a few steps in one direction, as in training."""
    g = torch.Generator().manual_seed(step // 3)
    noise = torch.Generator().manual_seed(1000 + step)
    for p in net.parameters():
        p.grad = (torch.randn(p.shape, generator=g) + 0.1 * torch.randn(p.shape, generator=noise)).to(p.device)


def run(net: nn.Module, opt: ModularOptimizer, steps: int, start: int = 0, schedule=None) -> None:
    for step in range(start, start + steps):
        give(net, step)
        opt.step()
        if schedule is not None:
            schedule.step()


_warmed: dict[bool, tuple[dict, dict]] = {}


def warm(device: str, backend: str, plain: bool = False, **options) -> Made:
    """After the first steps, which the eager backend has taken: a checkpoint fits every backend."""
    if plain not in _warmed:
        net, opt = setup(device, "eager", plain=plain)
        run(net, opt, COLD_STEPS)
        _warmed[plain] = copy.deepcopy((net.state_dict(), opt.state_dict()))
    return resumed(_warmed[plain], device, backend, plain=plain, **options)


def resumed(saved: tuple[dict, dict], device: str, backend: str, **options) -> Made:
    net, opt = setup(device, backend, **options)
    net.load_state_dict(saved[0])
    opt.load_state_dict(copy.deepcopy(saved[1]))
    return net, opt


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def same(net: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def vectors(opt: ModularOptimizer) -> dict[str, list[Tensor]]:
    leaves = opt.state_dict()["modnorm"]["leaves"]
    return {key: [x.clone() for x in entry["vectors"]] for key, entry in leaves.items()}


def close(net: nn.Module, wanted: dict[str, Tensor], steps: int) -> None:
    """Within a few roundings of a step for each step."""
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, wanted[name], rtol=1e-6, atol=2e-5 * LR * steps, msg=name)


@pytest.mark.parametrize("backend", TRITON)
def check_fifty_steps_with_a_schedule_are_those_of_eager(device, calls, backend):
    wanted, eager = warm(device, "eager")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(eager, 50)
    run(wanted, eager, 50, COLD_STEPS, schedule)
    assert "products" not in calls

    net, opt = warm(device, backend)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 50)
    run(net, opt, 25, COLD_STEPS, schedule)
    saved = copy.deepcopy((net.state_dict(), opt.state_dict(), schedule.state_dict()))
    net, opt = resumed(saved[:2], device, backend)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 50)
    schedule.load_state_dict(saved[2])
    run(net, opt, 25, COLD_STEPS + 25, schedule)
    close(net, weights(wanted), 50)
    for p, q in zip(net.parameters(), wanted.parameters(), strict=True):
        for key, value in eager.state[q].items():
            torch.testing.assert_close(opt.state[p][key], value, rtol=1e-5, atol=1e-6)
    launches = 50 if device == "cpu" or backend == "triton" else 4  # a graph replays what was launched at capture
    assert calls.count("products") == launches * PARTS


def check_steps_are_adamw_scaled_by_exact_norms(device, calls):
    net, opt = warm(device, "triton")
    twin = copy.deepcopy(net)
    names = dict(net.named_parameters())
    groups = [
        {"params": [twin.get_parameter(n) for n, p in names.items() if any(p is q for q in group["params"])]}
        | {key: group[key] for key in ("betas", "eps", "maximize")}
        for group in opt.param_groups
    ]
    plain = torch.optim.AdamW(groups, lr=1.0, weight_decay=0.0)
    for name, p in names.items():
        plain.state[twin.get_parameter(name)] = copy.deepcopy(dict(opt.state[p]))
    for step in range(COLD_STEPS, COLD_STEPS + 6):
        give(net, step)
        give(twin, step)
        before, twins = weights(net), weights(twin)
        opt.step()
        plain.step()
        for leaf in opt.norm.leaves:
            group = next(g for g in opt.param_groups if any(names[leaf.weight] is p for p in g["params"]))
            kept = 1.0 - group["lr"] * group["weight_decay"] * leaf.target / leaf.initial * leaf.atom.decays
            after = names[leaf.weight].detach()
            moved = leaf.read(after).double() - kept * leaf.read(before[leaf.weight]).double()
            update = leaf.read((twin.get_parameter(leaf.weight) - twins[leaf.weight]).detach()).double()
            size = leaf.atom.norm(moved).item() / (group["lr"] * leaf.target)
            assert 0.999 < size < 1.08, leaf.key  # estimates are never high, and a few percent low
            pieces, wanted = moved[None], update[None]
            if isinstance(leaf.atom, A.Linear | A.Experts | A.Gates | A.Conv | A.PatchConv):
                pieces, wanted = leaf.atom.matrices(moved), leaf.atom.matrices(update)
            for a, b in zip(pieces, wanted, strict=True):
                torch.testing.assert_close(a / a.norm(), b / b.norm(), rtol=0.0, atol=2e-4)
    assert calls.count("products") == 6 * PARTS


def check_one_look_between_all_products_and_all_applications(device, calls):
    net, opt = warm(device, "triton")
    run(net, opt, 1, COLD_STEPS)
    assert calls == ["products"] * PARTS + ["check"] + ["apply"] * (len(SHAPES) - 1)


@pytest.mark.parametrize("backend,nonfinite", [("triton", "raise"), ("cudagraph-triton", "skip")])
def check_a_refused_gradient_changes_nothing(device, backend, nonfinite):
    net, opt = warm(device, backend, nonfinite=nonfinite)
    run(net, opt, 2, COLD_STEPS)
    before, state = weights(net), copy.deepcopy(opt.state_dict())
    give(net, 50)
    net.gates.grad[3, 2] = torch.nan
    refused(opt, nonfinite, "The gradient of gates")
    assert same(net, before)
    for old, new in zip(state["state"].values(), opt.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    run(net, opt, 1, 51)
    assert not same(net, before)


def refused(opt: ModularOptimizer, nonfinite: str, text: str) -> None:
    if nonfinite == "raise":
        with pytest.raises(NonFiniteError, match=text):
            opt.step()
    else:
        opt.step()


@pytest.mark.parametrize("backend", ["eager", *TRITON])
@pytest.mark.parametrize("nonfinite,entry", [("raise", torch.nan), ("skip", torch.inf), ("raise", 1e25)])
def check_a_refused_update_changes_no_weight_and_no_vector(device, backend, nonfinite, entry):
    """The state of AdamW moves on, with every backend; when it is mended, steps go on."""
    net, opt = warm(device, backend, nonfinite=nonfinite)
    run(net, opt, 2, COLD_STEPS)
    before, knew, count = weights(net), vectors(opt), opt.state[net.b]["step"].clone()
    average = opt.state[net.gate_up]["exp_avg"]
    average[1, 2, 3] = entry
    give(net, 50)
    refused(opt, nonfinite, "The update of gate_up")
    assert same(net, before) and opt.state[net.b]["step"] == count + 1
    for key, found in vectors(opt).items():
        assert all(torch.equal(a, b) for a, b in zip(found, knew[key], strict=True)), key
    average[1, 2, 3] = 0.0
    run(net, opt, 1, 51)
    assert all(p.isfinite().all() and not torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize("backend", TRITON)
def check_unchecked_steps_show_what_went_wrong(device, calls, backend):
    net, opt = warm(device, backend, nonfinite="unchecked")
    run(net, opt, 2, COLD_STEPS)
    give(net, 50)
    net.a.grad[0, 0] = torch.nan
    opt.step()
    assert "products" in calls and "check" not in calls and net.a.isnan().all() and net.b.isfinite().all()
    assert net.experts.isfinite().all() and net.bias.isfinite().all()


def check_it_follows_changes_of_settings_and_parameters(device, calls):
    (net, opt), (other, eager) = warm(device, "triton"), warm(device, "eager")

    def both(change: Callable[[Net, ModularOptimizer], None], step: int, fused: bool) -> None:
        calls.clear()
        for model, optimizer in ((net, opt), (other, eager)):
            give(model, step)
            change(model, optimizer)
            optimizer.step()
        assert ("products" in calls) == fused, step
        close(net, weights(other), step)

    both(lambda model, optimizer: None, COLD_STEPS, fused=True)
    both(lambda model, optimizer: optimizer.param_groups[0].update(lr=0.0), 9, fused=True)
    both(lambda model, optimizer: optimizer.param_groups[0].update(lr=LR, betas=(0.0, 0.99)), 10, fused=True)
    both(lambda model, optimizer: setattr(model.b, "grad", None), 11, fused=False)  # one of two that are stacked
    both(lambda model, optimizer: None, 12, fused=True)

    def of_matrices_only(model: Net, optimizer: ModularOptimizer) -> None:
        for name in OTHERS:
            model.get_parameter(name).grad = None

    both(of_matrices_only, 12, fused=True)
    assert all(p.grad is not None for name, p in net.named_parameters() if name not in OTHERS)
    both(lambda model, optimizer: model.b.requires_grad_(False), 13, fused=True)
    both(lambda model, optimizer: model.b.requires_grad_(True), 14, fused=True)
    both(lambda model, optimizer: optimizer.param_groups[0].update(amsgrad=False, eps=1e-3), 15, fused=True)


def check_vectors_that_have_lost_track_are_replaced(device, calls):
    """Power vectors in eight columns where the update has nothing: its longest row takes over."""
    found = []
    for backend in ("eager", "triton"):
        net, opt = warm(device, backend)
        run(net, opt, 1, COLD_STEPS)
        held = opt.state_dict()["modnorm"]["leaves"]["b"]["vectors"][0]
        held.copy_(torch.eye(8, 24, device=device))
        net.b.grad[:, :8] = 0.0
        opt.state[net.b]["exp_avg"][:, :8] = 0.0
        before = weights(net)
        opt.step()
        found.append((net, vectors(opt)["b"][0]))
        size = torch.linalg.matrix_norm((net.b - before["b"] * (1.0 - LR * DECAY * 0.7)).double(), 2) * (24 / 40) ** 0.5
        assert size > 1.2 * LR * 0.7  # for a row is shorter than the norm
    assert "products" in calls
    close(found[1][0], weights(found[0][0]), 2)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0.0, atol=1e-4)


def check_which_parameters_are_taken(device):
    from modnorm_fx.fused_triton import TritonMatrices

    net = Net(SHAPES | OTHERS, device)
    norm, where = Norm(net, LEAVES), net.a.device
    for dtype, wanted in ((torch.float32, set(SHAPES)), (torch.bfloat16, set()), (torch.float64, set())):
        placements = dict.fromkeys(norm.shapes, (dtype, where))
        matrices = TritonMatrices(norm, placements, make(norm, placements, backend="triton"))
        assert matrices.names == wanted
        assert {name for names in matrices.rest.names for name in names} == set(norm.shapes) - wanted


def check_plain_adam_is_taken(device, calls):
    found = []
    for backend in ("eager", "triton"):
        net = Net({"a": SHAPES["a"]}, device)
        base = torch.optim.Adam(net.parameters(), betas=(0.8, 0.9))
        opt = ModularOptimizer(base, Norm(net, LEAVES[:1]), lr=LR, backend=backend)
        run(net, opt, COLD_STEPS + 4)
        found.append(net)
    assert calls.count("products") == 4
    close(found[1], weights(found[0]), COLD_STEPS + 4)


def check_what_the_kernels_cannot_do_takes_the_long_way(device, calls):
    def by_columns(net: Net, opt: ModularOptimizer) -> None:
        net.rows.grad = net.rows.grad.T.contiguous().T

    def coupled(net: Net, opt: ModularOptimizer) -> None:
        for optimizer in (opt, opt.base):
            optimizer.param_groups[0]["decoupled_weight_decay"] = False
        opt.base.param_groups[0]["weight_decay"] = 0.1

    def stacked_in_groups_that_differ(net: Net, opt: ModularOptimizer) -> None:
        for optimizer in (opt, opt.base):
            first, second = optimizer.param_groups
            place = next(i for i, p in enumerate(first["params"]) if p is net.b)
            second["params"].append(first["params"].pop(place))

    def hooked(net: Net, opt: ModularOptimizer) -> None:
        opt.base.register_step_post_hook(lambda *given: None)

    for change in (by_columns, coupled, stacked_in_groups_that_differ, hooked):
        (net, opt), (other, eager) = warm(device, "triton"), warm(device, "eager")
        for model, optimizer in ((net, opt), (other, eager)):
            give(model, COLD_STEPS)
            change(model, optimizer)
            optimizer.step()
        assert "products" not in calls, change
        close(net, weights(other), 1)


# CUDA graphs ----------------------------------------------------------------------------------------------------------


def check_gradients_may_move_and_rates_are_live(device, monkeypatch):
    captures = []
    record = graph.record
    monkeypatch.setattr(graph, "record", lambda run: (captures.append(1), record(run))[1])
    (net, opt), (other, eager) = warm(device, "cudagraph-triton"), warm(device, "eager")
    kept = []
    for step in range(COLD_STEPS, COLD_STEPS + 8):
        for model, optimizer in ((net, opt), (other, eager)):
            give(model, step)
            kept.append([p.grad for p in model.parameters()] if step % 2 else None)  # so that addresses change
            optimizer.param_groups[0] |= {"lr": LR * (step % 3), "weight_decay": 0.1 * step}
            optimizer.step()
    assert len(captures) == 1
    close(net, weights(other), 8)
    for model, optimizer in ((net, opt), (other, eager)):
        optimizer.param_groups[1] |= {"betas": (0.5, 0.9), "weight_decay": 0.2}
        run(model, optimizer, 3, 30)
    assert len(captures) == 2
    close(net, weights(other), 11)


def check_a_captured_step_reads_nothing_and_makes_no_table(device, monkeypatch):
    """What a real capture would refuse."""
    from modnorm_fx.kernels import gpu, gpu_adamw

    inside = []

    def record(run):
        def replay() -> None:
            inside.append(1)
            run()
            inside.pop()

        return replay

    def forbidden(real):
        def call(*args, **options):
            assert not inside, "not within a capture"
            return real(*args, **options)

        return call

    if device == "cpu":
        monkeypatch.setattr(graph, "record", record)
        for owner in (gpu, gpu_adamw):
            monkeypatch.setattr(owner, "pointer_table", forbidden(gpu.pointer_table))
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, forbidden(getattr(torch.Tensor, name)))
    net, opt = warm(device, "cudagraph-triton", plain=True)
    other, eager = warm(device, "eager", plain=True)
    run(net, opt, 4, COLD_STEPS)
    run(other, eager, 4, COLD_STEPS)
    close(net, weights(other), 4)
