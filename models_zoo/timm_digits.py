"""timm's ViT and ResNet as they are, in sizes that learn small grey images on a CPU.

timm has no flag for some of these sizes. For sweeps: `modnorm-fx transfer models_zoo/timm_digits.py:vit --widths 32 64
--depths 2 4`.
"""

from __future__ import annotations

import timm
from torch import nn

__all__ = ["resnet", "vit"]


def vit(width: int = 64, layers: int = 4, classes: int = 10) -> nn.Module:
    """A pre-norm ViT on 8x8 pixels: 16 patches of 2x2 and a class token, heads of 16 features."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=classes, embed_dim=width,
        depth=layers, num_heads=max(1, width // 16), pretrained_cfg_overlay={"input_size": (1, 8, 8)},
    )  # fmt: skip


def resnet(width: int = 16, layers: int = 2, classes: int = 10) -> nn.Module:
    """A ResNet with basic blocks on 32x32 pixels: four stages of `layers` blocks, `width` channels in the first."""
    return timm.create_model(
        "resnet18", layers=(layers,) * 4, channels=tuple(width * 2**i for i in range(4)), stem_width=width,
        in_chans=1, num_classes=classes, pretrained_cfg_overlay={"input_size": (1, 32, 32)},
    )  # fmt: skip
