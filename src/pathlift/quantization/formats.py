"""Number formats: how they round, and what error that makes.

Whole numbers are symmetric: a tensor (or a channel) of largest magnitude ``m`` is rounded to
multiples of the step ``m / 127`` (int8) or ``m / 7`` (int4). ``float8_e4m3`` has four bits of
exponent and three of mantissa (largest value 448, smallest step 2^-9) and one factor ``m / 448``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pathlift.errors import unknown

_E4M3_LARGEST, _E4M3_STEP = 448.0, 2.0**-9
# Mean of (ulp / w)^2 / 12 over a binade, for values spread evenly in their logarithm.
_E4M3_RELATIVE = 2.0**-6 / 12 * 0.75 / (2 * 0.6931471805599453)


@dataclass(frozen=True)
class Format:
    """One number format.

    Attributes:
        name: of the format.
        steps: the largest magnitude in units of the smallest step.
        relative: mean error variance of an entry over its square, however large it is (floating
            point; 0 for whole numbers).
    """

    name: str
    steps: float
    relative: float = 0.0

    def rounded(self, values: Tensor, axis: int | None = None, out: Tensor | None = None) -> Tensor:
        """The values that the format can hold, in their own dtype.

        Args:
            values: any floating-point tensor.
            axis: one largest magnitude per slice along it; None: one for the whole tensor.
            out: where they go, of the same shape and dtype (``values`` itself may be); None: into
                a new tensor.
        """
        wide = values.detach().float() if values.dtype.itemsize < 4 else values.detach()
        others = [d for d in range(wide.dim()) if d != axis]
        if axis is None or not wide.dim():
            low, high = wide.aminmax()
            top: Any = max(-float(low), float(high)) or 1.0
        else:
            top = torch.maximum(-wide.amin(others, keepdim=True), wide.amax(others, keepdim=True))
            top = torch.where(top > 0, top, torch.ones_like(top))
        there = out if out is not None and out.dtype == wide.dtype else torch.empty_like(wide)
        if self.relative:
            unit = top / _E4M3_LARGEST
            found = (wide / unit).to(torch.float8_e4m3fn).to(wide.dtype)
            torch.mul(found, unit, out=there)
        else:
            step = top / self.steps
            torch.div(wide, step, out=there).round_().mul_(step)
        return there.to(values.dtype) if out is None else out.copy_(there)


FORMATS = {
    "int8": Format("int8", 127.0),
    "int4": Format("int4", 7.0),
    "float8_e4m3": Format("float8_e4m3", _E4M3_LARGEST / _E4M3_STEP, _E4M3_RELATIVE),
}


def format_of(name: object) -> Format:
    """The format of a name.

    Raises:
        ArgumentError: there is none.
    """
    if not isinstance(name, str) or name not in FORMATS:
        raise unknown("format", name, FORMATS)
    return FORMATS[name]
