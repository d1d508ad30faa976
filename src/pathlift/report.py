"""What :func:`pathlift.condition_` did, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConditioningReport:
    """The result of :func:`pathlift.condition_`; ``print(report)`` shows a short table.

    Attributes:
        num_scales: dimension of the rescaling group.
        num_parameters: counted parameter entries p (trainable, on some path).
        imbalance_before: ``log(AM/GM)`` of the coefficients, per parameter (natural logarithm).
        imbalance_after: the same after rescaling.
        gradient_norm: certificate of the continuous optimum, ``max |dF/ds| / p``.
        iterations: of the solver.
        dead_channels: scales held at 0 because nothing enters or leaves them.
        log2_scales: tensor (num_scales,), what was applied; int64 if exact, else float64.
        max_output_change: largest absolute difference of the outputs (0.0 when exact; None when
            not verified).
        unsupported: operations that pinned something, with counts.
        approximated: operations without paths for which a stand-in was used, with counts.
        seconds: capture, symmetry, criterion, solve, apply, verify.
        passes: how often the solver read the reduced matrices (a product with each and one with
            its transpose count as one pass).
        reduced_bytes: their size (of a product of thin factors, that of the factors).
        converged: whether the certificate is at most the tolerance asked for. If not, the scales
            are those of the best point found: no worse than none, and not the optimum.
    """

    num_scales: int
    num_parameters: int
    imbalance_before: float
    imbalance_after: float
    gradient_norm: float
    iterations: int
    dead_channels: int
    log2_scales: Tensor
    max_output_change: float | None
    unsupported: dict[str, int]
    approximated: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    passes: int = 0
    reduced_bytes: int = 0
    converged: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, ready for JSON."""
        plain = asdict(self)
        plain["log2_scales"] = self.log2_scales.tolist()
        return plain

    def __str__(self) -> str:
        exact = self.log2_scales.dtype == torch.int64
        moved = int(torch.count_nonzero(self.log2_scales))
        span = f", from {self.log2_scales.min():g} to {self.log2_scales.max():g}" if moved else ""
        if self.max_output_change is None:
            outputs = "not verified"
        elif self.max_output_change == 0:
            outputs = "identical, bit for bit"
        else:
            outputs = f"changed by at most {self.max_output_change:.3g}"
        rows = [
            ("scales", f"{self.num_scales:,} ({moved:,} changed{span})"),
            ("parameters", f"{self.num_parameters:,} counted"),
            ("imbalance", f"{self.imbalance_before:.4f} -> {self.imbalance_after:.4f}"),
            (
                "certificate",
                f"{self.gradient_norm:.1e} after {self.iterations} iterations, "
                f"{self.passes} passes{'' if self.converged else ', above the tolerance'}",
            ),
            ("outputs", outputs),
            ("rounding", "powers of two" if exact else "none (continuous scales)"),
            ("seconds", ", ".join(f"{k} {v:.3f}" for k, v in self.seconds.items())),
        ]
        if self.dead_channels:
            rows.insert(3, ("dead", f"{self.dead_channels:,} channels kept at scale 0"))
        for title, counts in (
            ("pinned by", self.unsupported),
            ("stand-in", self.approximated),
        ):
            if counts:
                rows.append((title, ", ".join(f"{k} x{v}" for k, v in counts.items())))
        return "\n".join(f"{title:<12} {text}" for title, text in rows)
