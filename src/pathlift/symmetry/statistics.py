"""Buffers that may scale: the running statistics of batch norms."""

from __future__ import annotations

from pathlift.capture.program import Program
from pathlift.operations.normalization import is_batch_norm


def running_statistics(program: Program) -> list[str]:
    """Buffers that only batch norms read, as running mean or variance."""
    found: dict[str, bool] = {}
    for graph in program.graphs:
        for symbol, name in graph.tensors.items():
            if name not in program.buffers or symbol not in graph.uses:
                continue
            fits = symbol not in graph.leaving and all(
                is_batch_norm(call) and symbol in (call["running_mean"], call["running_var"])
                for call in graph.uses[symbol]
            )
            found[name] = found.get(name, True) and fits
    return [name for name, fits in found.items() if fits]
