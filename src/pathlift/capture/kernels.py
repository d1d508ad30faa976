"""Fused kernels that PyTorch takes on accelerators for what it composes of operations on a host.

Each is written out as those operations, so that a model means the same wherever it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def _biased(gates: Tensor, bias: Tensor | None) -> Tensor:
    return gates if bias is None else gates + bias


def _lstm_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    cx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden state, cell state, and what the backward pass keeps."""
    gates = _biased(hidden_gates, hidden_bias) + _biased(input_gates, input_bias)
    enters, stays, new, leaves = gates.chunk(4, 1)
    cell = stays.sigmoid() * cx + enters.sigmoid() * new.tanh()
    return leaves.sigmoid() * cell.tanh(), cell, gates


def _gru_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    hx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden state, and what the backward pass keeps."""
    of_input = _biased(input_gates, input_bias).chunk(3, 1)
    of_hidden = _biased(hidden_gates, hidden_bias).chunk(3, 1)
    reset = (of_hidden[0] + of_input[0]).sigmoid()
    stays = (of_hidden[1] + of_input[1]).sigmoid()
    new = (of_input[2] + of_hidden[2] * reset).tanh()
    return (hx - new) * stays + new, of_hidden[2]


# Name -> the same of operations that the table knows.
PARTS: dict[str, Callable[..., Any]] = {
    "_thnn_fused_lstm_cell": _lstm_cell,
    "_thnn_fused_gru_cell": _gru_cell,
}
