"""Transfer rules, one function per family of operations; importing this package registers them."""

from pathlift.symmetry.rules import (
    attention,
    linear,
    normalization,
    pointwise,
    product,
    recurrent,
    reduce,
    shape,
)

__all__ = [
    "attention",
    "linear",
    "normalization",
    "pointwise",
    "product",
    "recurrent",
    "reduce",
    "shape",
]
