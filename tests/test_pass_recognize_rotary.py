"""Rotary position embeddings in their spellings: recognised, the same numbers, and a rotation indeed."""

import pytest
import torch
from staged import Staged, stage

H = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
K = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(1))
ANGLE = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.1, 0.01, 0.001]))
COS, SIN = torch.cat([ANGLE, ANGLE], -1).cos(), torch.cat([ANGLE, ANGLE], -1).sin()
C, S = ANGLE.cos(), ANGLE.sin()
POLAR = torch.polar(torch.ones_like(ANGLE), ANGLE)


def half_by_chunk(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def half_by_slices(x):
    return torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)


def every_two(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def rotate(x):
    return x * COS + half_by_slices(x) * SIN


def halves(x):
    a, b = x.chunk(2, -1)
    return torch.cat([a * C - b * S, b * C + a * S], -1)


def interleaved(x):
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * C - b * S, b * C + a * S], -1).flatten(-2)


def partial(x):
    a, b = x[..., :4], x[..., 4:]
    cos, sin = torch.cat([C[:, :2]] * 2, -1), torch.cat([S[:, :2]] * 2, -1)
    return torch.cat([a * cos + half_by_slices(a) * sin, b], -1)


def as_complex(x):
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * POLAR
    return torch.view_as_real(z).flatten(-2)


def from_positions(x):
    angle = torch.arange(x.shape[-2])[:, None] * torch.cat([torch.tensor([1.0, 0.1, 0.01, 0.001])] * 2)
    return x * angle.cos() + half_by_slices(x) * angle.sin()


SPELLINGS = {
    "rotate_half by chunk": lambda x: x * COS + half_by_chunk(x) * SIN,
    "rotate_half by slices": rotate,
    "rotate_every_two": lambda x: x * C.repeat_interleave(2, -1) + every_two(x) * S.repeat_interleave(2, -1),
    "two halves": halves,
    "interleaved": interleaved,
    "partial": partial,
    "complex": as_complex,
    "angles computed in the graph": from_positions,
    "in float32": lambda x: (x.float() * COS + half_by_slices(x.float()) * SIN).to(x.dtype),
}
OTHERS = {
    "difference of two gates": lambda x: x * COS - x * SIN,
    "two signals": lambda x: x * COS - x.roll(1, 0).relu() * SIN,
    "not linear": lambda x: x * COS + torch.relu(-x) * SIN,
    "one product": lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1) * COS,
    "no sign": lambda x: x * COS + torch.cat([x[..., 4:], x[..., :4]], -1) * SIN,
    "split and joined": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
}


def found(function, *inputs) -> Staged:
    staged = stage(function, *(inputs or (H,)))
    staged.rewrite("rotary")
    assert staged.error() == 0.0
    return staged


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str):
    staged = found(SPELLINGS[name])
    assert staged.kinds() == ["rotary"]
    x = SPELLINGS[name](H)
    assert torch.allclose(x.norm(dim=-1), H.norm(dim=-1), rtol=1e-5)  # the spelling is a rotation
    products = (torch.ops.aten.mul.Tensor, torch.ops.aten.neg.default)
    assert not [t for t in staged.targets() if t in products and name != "angles computed in the graph"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_rotation_stays(name: str):
    staged = stage(OTHERS[name], H)
    before = staged.targets()
    assert staged.rewrite("rotary") == {"rotary": 0}
    assert staged.targets() == before


def test_queries_and_keys():
    assert found(lambda q, k: rotate(q) @ rotate(k).mT, H, K).kinds() == ["rotary", "rotary"]


def test_queries_and_keys_share_their_tables():
    def function(q, k):
        cos, sin = COS[None, None], SIN[None, None]
        return q * cos + half_by_slices(q) * sin, k * cos + half_by_slices(k) * sin

    assert found(function, H, K).kinds() == ["rotary", "rotary"]


def test_the_signal_has_other_users():
    staged = found(lambda x: x + rotate(x) + torch.relu(x))
    assert staged.kinds() == ["rotary"]


def test_the_result_has_several_users():
    assert found(lambda x: (lambda r: r + torch.relu(r))(rotate(x))).kinds() == ["rotary"]


def test_one_after_the_other():
    assert found(lambda x: rotate(torch.relu(rotate(x)))).kinds() == ["rotary", "rotary"]


def test_what_comes_before_stays_outside():
    staged = found(lambda x, y: rotate(x + y), H, K)
    (call,) = (n for n in staged.module.graph.nodes if n.op == "call_module")
    assert call.args[0].target is torch.ops.aten.add.Tensor
