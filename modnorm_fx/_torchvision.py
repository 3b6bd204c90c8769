"""Lets PyPI's torchvision import beside a CPU-only torch.

That torchvision wheel cannot load its compiled operators there, and its Python part then dies on `operator
torchvision::nms does not exist` - and with it `import timm` and every lazy import of transformers' vision models.
Declaring the two schemas that its Python part refers to is enough; nothing in this package calls them.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

__all__ = ["declare_missing_ops"]

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library takes its schemas away when it is collected


def declare_missing_ops() -> bool:
    """Declares torchvision's operators when they are really missing; says whether it did. Never imports torchvision.

    Leaves everything alone when torch is not a CPU-only build, or torchvision is absent, already imported, or able to
    load its compiled operators (tried in the way torchvision itself does at import).
    """
    if _declared or torch.version.cuda or torch.version.hip or "torchvision" in sys.modules:
        return False
    extension = _compiled_extension()
    if extension is None:
        return False
    try:
        torch.ops.load_library(str(extension))
        return False
    except (ImportError, OSError):
        pass
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
    return True


def _compiled_extension() -> Path | None:
    """torchvision's library of operators, if torchvision is installed and has one."""
    spec = importlib.util.find_spec("torchvision")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for suffix in (".so", ".pyd"):
            path = Path(folder) / f"_C{suffix}"
            if path.exists():
                return path
    return None
