"""Data that needs no download."""

from __future__ import annotations

import torch
from torch import Tensor

from pathlift.errors import MissingDependencyError


def digits() -> Tensor:
    """The 1797 handwritten digits of scikit-learn, (1797, 64) float32.

    Each pixel has its mean taken out, and all are divided by one number such that the mean square
    is 1: a squared error is then the share of the variance left unexplained.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "the digits data comes with scikit-learn. Run: pip install 'pathlift[demo]'."
        ) from error
    pixels = torch.tensor(load_digits().data, dtype=torch.float32)
    centred = pixels - pixels.mean(0)
    return centred / centred.square().mean().sqrt()
