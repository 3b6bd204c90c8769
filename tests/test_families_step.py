"""Whole families: the captured graph computes what the model does, and one optimizer step moves every leaf by its
target, measured in numpy by the geometry of its atom."""

from __future__ import annotations

import geometry
import pytest
import torch
from families import TIMM, Family, family

from modnorm_fx import ModularOptimizer, convert
from modnorm_fx.atoms import PIECE_CAP
from modnorm_fx.norm import ModularNorm
from modnorm_fx.runtime import TINY

TEXT = """
    albert apertus bart bert bloom codegen convbert deberta deepseek_v3 doge falcon gemma2 gpt2 gpt_bigcode gpt_neox
    gpt_oss lfm2 llama llama4_text mamba mixtral modernbert mpnet mpt nemotron nystromformer olmo2 perceiver persimmon
    phi3 qwen2_moe squeezebert t5 xlnet
""".split()
VISION = "clip convnextv2 detr dinov2 regnet siglip wav2vec2".split()
SLOW = {"efficientformer", "hiera"}
NAMES = [*TEXT, *VISION, *sorted(TIMM.keys() - SLOW)]
LR = 0.5
#: the optimizer's spectral norms are estimates from below that stop when they gain less than 1e-3
TOLERANCE = 2e-3


def compare(found: tuple, expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        size = b.detach().abs().max().clamp(min=1.0).item() if b.numel() else 1.0
        torch.testing.assert_close(a, b.detach(), rtol=1e-3, atol=2e-5 * size)


def gradients(f: Family, outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the product with a random cotangent, for every parameter that has one."""
    f.model.zero_grad()
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(o.shape, generator=generator) for o in outputs]
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    torch.autograd.backward([o for o, _ in pairs], [c for _, c in pairs])
    return {name: p.grad for name, p in f.model.named_parameters() if p.grad is not None}


def check_step(f: Family, norm: ModularNorm, outputs: list[torch.Tensor]) -> None:
    """A step with real gradients, against the pieces of every leaf; the model is as before afterwards."""
    moved = gradients(f, outputs)
    leaves = {leaf.weight for leaf in norm.leaves}
    assert {n for n, g in moved.items() if g.any()} <= leaves  # what has a gradient has a norm
    kept = {n: p.detach().clone() for n, p in f.model.named_parameters()}
    try:
        f.model.double()  # in place: the difference of the weights is exact
        before = {n: p.detach().clone() for n, p in f.model.named_parameters()}
        grads = {n: p.grad.clone().numpy() for n, p in f.model.named_parameters() if p.grad is not None}
        trained = [p for n, p in f.model.named_parameters() if n in leaves]
        ModularOptimizer(torch.optim.SGD(trained, lr=1.0), norm, lr=LR).step()
        change = {n: (p.detach() - before[n]).numpy() for n, p in f.model.named_parameters()}
    finally:
        f.model.float()
        f.model.zero_grad()
        with torch.no_grad():
            for n, p in f.model.named_parameters():
                p.copy_(kept[n])

    for leaf in norm.leaves:
        delta = geometry.part(change[leaf.weight], leaf.slices)
        grad = grads.get(leaf.weight)
        wanted = geometry.pieces(leaf.atom, geometry.part(grad, leaf.slices)) if grad is not None else [0.0]
        largest = max(wanted)
        if largest < TINY:
            assert not delta.any(), leaf.key
            continue
        target = LR * leaf.target
        expected = [target * min(1.0, PIECE_CAP * size / largest) for size in wanted]
        assert geometry.pieces(leaf.atom, delta) == pytest.approx(expected, rel=TOLERANCE, abs=1e-9 * target), leaf.key
        assert geometry.norm(leaf.atom, delta) == pytest.approx(target, rel=TOLERANCE), leaf.key
    for weight, delta in change.items():
        assert weight in leaves or not delta.any(), weight


@pytest.mark.parametrize("name", NAMES)
def test_graph_and_step(name: str) -> None:
    f = family(name)
    outputs = f.eager()
    compare(f.traced, outputs)
    compare(f.rewritten(), outputs)  # the passes change nothing either
    check_step(f, f.norm, outputs)


def test_tied_weights_count_every_use() -> None:
    """Under `paper` an embedding that is also the head has the sum of both norms."""
    f = family("gpt2")
    norm = convert(f.model, f.args, f.kwargs, convention="paper")
    (tied,) = (leaf for leaf in norm.leaves if leaf.weight == "transformer.wte.weight")
    assert [atom.kind for atom in tied.atom.atoms] == ["Embedding", "Linear"]
    assert sum(tied.atom.weights) == pytest.approx(1.0)
    check_step(f, norm, f.eager())
