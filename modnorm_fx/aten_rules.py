"""The table of local rules: one short function per ATen op, in one file per family.

To add an op, copy its neighbour in the family's file: name the operands as the schema does, say which operand may be a
weight and what atom it then is, and give the status and the source. ``tests/test_aten_rules.py`` walks every row and
checks its claim against sampled Jacobians.
"""

from __future__ import annotations

from .arithmetic_rules import ARITHMETIC
from .attention_rules import ATTENTION
from .layer_rules import LAYERS
from .pointwise_rules import POINTWISE
from .product_rules import PRODUCTS
from .recurrent_rules import RECURRENT
from .reduction_rules import REDUCTIONS
from .rules import RuleTable
from .shape_rules import SHAPES

__all__ = ["ATEN"]

ATEN = RuleTable.joined(LAYERS, ATTENTION, ARITHMETIC, SHAPES, POINTWISE, RECURRENT, PRODUCTS, REDUCTIONS)
