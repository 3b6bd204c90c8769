"""Generated normalisers of whole architectures: packed projections in every layout, experts, grouped and depthwise
convolutions, recurrent gates, shared layers. Every leaf's norm, by numpy, is its target."""

from __future__ import annotations

import warnings
from functools import cache

import geometry
import pytest
import torch
from modnorm_fx.models_zoo import build

from modnorm_fx import ModularNorm, codegen, convert

FAMILIES = (
    "hf:gpt2-tiny", "hf:llama-tiny", "hf:bloom-tiny", "hf:gpt_neox-tiny", "hf:t5-tiny", "hf:mixtral-tiny",
    "hf:gpt_oss-tiny", "hf:dbrx-tiny", "hf:mamba2-tiny", "hf:xlnet-tiny", "hf:albert-tiny", "hf:wav2vec2-tiny",
    "hf:swinv2-tiny", "hf:convnext-tiny", "hf:bit-tiny", "hf:clip-tiny",
)  # fmt: skip


@cache
def norm_of(spec: str) -> ModularNorm:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert(build(spec))


@pytest.mark.parametrize("mode", codegen.MODES)
@pytest.mark.parametrize("spec", FAMILIES)
def test_every_leaf_meets_its_target(spec: str, mode: str) -> None:
    norm = norm_of(spec)
    normalizer = norm.normalizer(mode=mode)
    assert len(normalizer.buffers) < len(normalizer.updates)
    g = torch.Generator().manual_seed(0)
    updates = {name: torch.randn(norm.shapes[name], generator=g) for name in normalizer.updates}
    normalizer.normalize_(updates)
    for leaf in norm.leaves:
        found = geometry.norm(leaf.atom, leaf.read(updates[leaf.weight]).numpy())
        assert found == pytest.approx(leaf.target, rel=0.01), (leaf.key, leaf.atom.describe())
