"""What conditioning does to a random initialisation, before any weight is drawn.

For independent zero-mean parameters a path's squared weight has the product of variances as its
expectation, so ``E g`` is one pass of the squared network over variances, and it is constant over
a layer of a fully connected or convolutional chain. The solution for ``E g`` then has one log2
scale per hidden layer (METHOD section 5; Lebeurrier, Vayer, Gribonval, ICML 2026).

In a chain without biases that solution has a closed form: every layer gets the same expected
squared Frobenius norm, whatever the scale of the initialisation (see :func:`expected_log2_scales`).
"""

from __future__ import annotations

from pathlift.theory.chains import (
    BIASES,
    INITIALIZATIONS,
    expected_log2_scales,
    weight_variance,
)
from pathlift.theory.graphs import expected_diagonal, mean_squares, predict_log2_scales

__all__ = [
    "BIASES",
    "INITIALIZATIONS",
    "expected_diagonal",
    "expected_log2_scales",
    "mean_squares",
    "predict_log2_scales",
    "weight_variance",
]
