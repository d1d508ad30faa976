"""Continuous scales or powers of two: which are applied, and why.

Over 20 seeds, each method at its own best rate, continuous scales trained better than powers of
two, or no difference was shown (docs/reproduced/exact.md). They change outputs by rounding errors,
so they are for weights in float32 or wider that are still to be trained. Once training has begun,
or where a weight has few bits, whole scales keep every one of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from pathlift.tensors.state import Optimizers, holding_state

# Bytes of the narrowest format in which one rounding of a weight is far below a training step.
_WIDE = torch.float32.itemsize


@dataclass(frozen=True)
class Rounding:
    """What is done to the continuous optimum before it is applied.

    Attributes:
        exact: scales are rounded to integers, and outputs keep their bits.
        why: in a few words.
        asked: the user decided; what was asked for is done or refused, never replaced.
    """

    exact: bool
    why: str
    asked: bool = False

    def __str__(self) -> str:
        return f"{'powers of two' if self.exact else 'none, continuous scales'} ({self.why})"


def rounding(
    exact: bool | None,
    *,
    optimizer: Optimizers = None,
    dtypes: Iterable[torch.dtype] = (),
    midway: bool = False,
) -> Rounding:
    """The rounding of a call of :func:`pathlift.condition_`.

    Args:
        exact: what the user asked for; None: not said.
        optimizer: whose state is carried along.
        dtypes: of the tensors that would be scaled.
        midway: the call is known to be made during training (a later call of a schedule).
    """
    if exact is not None:
        return Rounding(exact, f"exact={exact}", asked=True)
    if holding_state(optimizer) is not None:
        return Rounding(True, "the optimizer holds state: training has begun")
    if midway:
        return Rounding(True, "a later call of a schedule: training has begun")
    narrow = [d for d in dtypes if d.itemsize < _WIDE]
    if narrow:
        name = str(min(narrow, key=lambda d: d.itemsize)).removeprefix("torch.")
        return Rounding(True, f"the weights are {name}, in which factors would round them")
    return Rounding(False, "the default before training")


def instead(times: float) -> Rounding:
    """What follows when continuous scales that nobody asked for change outputs too much.

    Args:
        times: the change, in units of what rounding may change.
    """
    return Rounding(
        True,
        f"continuous scales changed outputs by {times:.2g} times what rounding explains, and were "
        f"taken back",
    )
