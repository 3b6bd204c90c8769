"""Masks that are added as large numbers: the norm is that with ``masked_fill``, and so are steps."""

import pytest
import torch
import torch.nn.functional as F
from modnorm_fx.passes.measure_constants import measure_constants
from staged import With, stage
from torch import nn

import modnorm_fx
from modnorm_fx import ModularOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:.*no output of the model")  # layers that an example leaves alone
ROWS = torch.randn(8, 16)
SEQUENCE = torch.randn(4, 6, 16)
KEPT = torch.ones(4, 6)
KEPT[:, 4:] = 0.0
ALLOWED = (torch.arange(8 * 16).reshape(8, 16) % 3 > 0).float()
EYE, TRIL = torch.eye(8).bool(), torch.ones(8, 8).tril()


def layers() -> dict[str, nn.Module]:
    return {"a": nn.Linear(16, 16, bias=False), "b": nn.Linear(16, 16, bias=False), "c": nn.Linear(16, 1, bias=False)}


def similarities(s, x):
    z = F.normalize(s.a(x), dim=-1)
    return z @ z.T / 0.1


def contrastive(logits):
    return F.cross_entropy(logits, torch.arange(8).roll(4))


def policy(s, x):
    return s.b(torch.relu(s.a(x)))


def pooled(s, x, scores):
    return (scores.softmax(1)[..., None] * s.b(x)).sum(1)


#: name -> (as people write it, with a mask of booleans, inputs)
SAME = {
    "similarities, constant subtracted": (
        lambda s, x: contrastive(similarities(s, x) - 1e9 * torch.eye(8)),
        lambda s, x: contrastive(similarities(s, x).masked_fill(EYE, -1e9)),
        (ROWS,),
    ),
    "actions, input": (
        lambda s, x, m: (policy(s, x) + (m - 1) * 1e9).log_softmax(-1),
        lambda s, x, m: policy(s, x).masked_fill(m == 0, -1e9).log_softmax(-1),
        (ROWS, ALLOWED),
    ),
    "actions, subtracted": (
        lambda s, x, m: policy(s, x) - 1e8 * (1 - m),
        lambda s, x, m: policy(s, x).masked_fill(m == 0, -1e8),
        (ROWS, ALLOWED),
    ),
    "pooling, input": (
        lambda s, x, m: pooled(s, x, s.c(x).squeeze(-1) + (1 - m) * -1e9),
        lambda s, x, m: pooled(s, x, s.c(x).squeeze(-1).masked_fill(m == 0, -1e9)),
        (SEQUENCE, KEPT),
    ),
    "pooling, computed from the input": (
        lambda s, x: pooled(s, x, s.c(x).squeeze(-1) - 1e6 * torch.relu(x[..., 0]).sign()),
        lambda s, x: pooled(s, x, s.c(x).squeeze(-1).masked_fill(x[..., 0] > 0, -1e6)),
        (SEQUENCE,),
    ),
    "pointer": (
        lambda s, x, m: (s.c(x).squeeze(-1) + (1 - m) * -1e30).log_softmax(-1),
        lambda s, x, m: s.c(x).squeeze(-1).masked_fill(m == 0, -1e30).log_softmax(-1),
        (SEQUENCE, KEPT),
    ),
    "largest of those kept": (
        lambda s, x, m: s.b((s.a(x) + (m - 1)[..., None] * 1e9).amax(1)),
        lambda s, x, m: s.b(s.a(x).masked_fill((m == 0)[..., None], -1e9).amax(1)),
        (SEQUENCE, KEPT),
    ),
    "smallest of those kept": (
        lambda s, x, m: s.b(torch.where(m[..., None] > 0, s.a(x), (1 - m[..., None]) * 1e9).amin(1)),
        lambda s, x, m: s.b(s.a(x).masked_fill((m == 0)[..., None], 1e9).amin(1)),
        (SEQUENCE, KEPT),
    ),
    "added in a product": (
        lambda s, x, m: torch.baddbmm((m - 1)[:, None] * 1e9, s.a(x), s.b(x).mT).log_softmax(-1),
        lambda s, x, m: (s.a(x) @ s.b(x).mT).masked_fill((m == 0)[:, None], -1e9).log_softmax(-1),
        (SEQUENCE, KEPT),
    ),
    "experts, constant": (
        lambda s, x: s.b(x) * (s.a(x) - 1e9 * (torch.arange(16) > 8).float()).softmax(-1),
        lambda s, x: s.b(x) * s.a(x).masked_fill(torch.arange(16) > 8, -1e9).softmax(-1),
        (ROWS,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_a_large_number_that_is_added_is_a_mask(name: str):
    written, plain, inputs = SAME[name]
    torch.manual_seed(0)
    model = With(written, **layers())
    assert torch.allclose(model(*inputs), With(plain, a=model.a, b=model.b, c=model.c)(*inputs))
    targets = [modnorm_fx.convert(With(f, **layers()), inputs, unknown="error").targets for f in (written, plain)]
    assert targets[0] == pytest.approx(targets[1])


def test_written_over_as_multiplied_and_subtracted():
    """``w * b - 1e10 * (1 - b)``, as the first GPT masks its logits, and a diagonal that is filled: an entry that is
    not there has no size, so by targets they differ from a mask of booleans by the share of those that are."""
    plain = With(lambda s, x: contrastive(similarities(s, x).masked_fill(EYE, -1e9)), **layers())
    (target,) = modnorm_fx.convert(plain, (ROWS,)).targets.values()
    for function in (
        lambda s, x: contrastive(similarities(s, x).fill_diagonal_(-1e9)),
        lambda s, x: contrastive(similarities(s, x) * TRIL - 1e10 * (1 - TRIL)),
    ):
        (found,) = modnorm_fx.convert(With(function, **layers()), (ROWS,), unknown="error").targets.values()
        assert target / 1.5 < found < 1.5 * target


def test_a_step_moves_the_kept_entries_as_far_as_it_says():
    written, _, inputs = SAME["pooling, input"]
    torch.manual_seed(0)
    model = With(written, **layers())
    norm = modnorm_fx.convert(model, inputs)
    norm.initialize_(model, generator=torch.Generator().manual_seed(0))
    optimizer = ModularOptimizer(torch.optim.AdamW(model.parameters(), weight_decay=0.0), norm, lr=0.01)
    before = model(*inputs)
    (before * torch.randn_like(before)).sum().backward()
    optimizer.step()
    moved = float((model(*inputs) - before).detach().norm() / before.detach().norm())
    assert 0.0 < moved < 0.02
    assert float(model.c.weight.detach().square().sum()) < 20.0  # of norm 1 it is 16


def test_signals_that_are_large_are_no_masks():
    """What a parameter moves counts whatever its size, and so does data beside data and in a product."""
    large = With(lambda s, x: s.b(x) + 1e5 * s.a(x), **layers())
    targets = modnorm_fx.convert(large, (ROWS,)).targets
    assert targets["b.weight"] == pytest.approx(1e5 * targets["a.weight"], rel=1e-3)
    factor = With(lambda s, x: s.b(x) * (1e5 * x), **layers())
    assert modnorm_fx.convert(factor, (ROWS,)).targets["b.weight"] == pytest.approx(1.0)
    data = modnorm_fx.convert(With(lambda s, x: s.a(1e5 * x + x), **layers()), (ROWS,))
    assert data.targets["a.weight"] == pytest.approx(1.0) and data.leaves[0].scale == pytest.approx(1e5, rel=1e-3)


def test_what_looks_enormous_all_the_same_is_said():
    """A gate that a parameter moves is no mask, whatever it is multiplied by."""
    model = With(lambda s, x: s.b(x) - 1e9 * torch.sigmoid(s.a(x)), **layers())
    with pytest.warns(UserWarning, match=r"target of b\.weight \(\S+\) would make a step enormous.*masked_fill"):
        norm = modnorm_fx.convert(model, (ROWS,))
    before = model(ROWS).detach()
    with torch.no_grad():
        model.b.weight.zero_()
    moved = (model(ROWS) - before).detach().norm() / before.norm()
    assert float(moved) < 1 / norm.targets["b.weight"] * 10 < 1e-6


@pytest.mark.parametrize("function, expected", [
    (lambda s, x: s.a(x) - torch.full((8, 16), 1e9).triu(1), 0.0),
    (lambda s, x: torch.where(x > 0, s.a(x), torch.full((8, 16), 1e9)), 0.0),
    (lambda s, x: s.a(x) * torch.full((8, 16), 1e9), 1e9),  # a factor is no mask
])  # fmt: skip
def test_constants(function, expected):
    staged = stage(With(function, **layers()), ROWS)
    assert list(measure_constants(staged.module, staged.flow()).values()) == [pytest.approx(expected)]


def test_masks_of_integers_and_booleans():
    """What padding masks are: no norm of their own, and no reason to fail."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, x, mask):
            y = self.body(x) * mask.unsqueeze(-1)
            return y.sum(1) / mask.sum(1, keepdim=True)

    x = torch.randn(2, 5, 4)
    for mask in (torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 5)):
        norm = modnorm_fx.convert(Pooled(), (x, mask))
        assert [leaf.key for leaf in norm.leaves] == ["body.weight", "body.bias"]
