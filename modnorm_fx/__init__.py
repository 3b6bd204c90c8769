"""modnorm_fx: the modular norm of an existing PyTorch model, inferred from its dataflow.

``norm = convert(model)``, ``print(norm)``, ``ModularOptimizer(base_optimizer, norm, lr=...)``. See the README.
"""

from ._torchvision import declare_missing_ops

declare_missing_ops()

from .aten_rules import ATEN  # noqa: E402
from .compile import compiled_norm  # noqa: E402
from .errors import ModnormError  # noqa: E402
from .norm import Leaf, ModularNorm  # noqa: E402
from .optim import ModularOptimizer  # noqa: E402
from .pipeline import convert  # noqa: E402

__all__ = ["ATEN", "Leaf", "ModnormError", "ModularNorm", "ModularOptimizer", "compiled_norm", "convert"]
__version__ = "0.1.0"
