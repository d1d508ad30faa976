"""What is known of each operation, once: see :mod:`pathlift.operations.table`."""

from pathlift.operations import (  # each enters its operations into the table
    addition,
    attention,
    joins,
    linear,
    matrices,
    normalization,
    pads,
    picks,
    pointwise,
    pools,
    product,
    ranked,
    reduce,
    resize,
    scatters,
    shape,
    spectra,
)
from pathlift.operations.table import TABLE, known

__all__ = [
    "TABLE",
    "addition",
    "attention",
    "joins",
    "known",
    "linear",
    "matrices",
    "normalization",
    "pads",
    "picks",
    "pointwise",
    "pools",
    "product",
    "ranked",
    "reduce",
    "resize",
    "scatters",
    "shape",
    "spectra",
]
