"""Kernels that a device fuses mean what their parts mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathlift.capture.kernels import PARTS
from pathlift.capture.model import capture
from pathlift.lifting.lifted import diagonal
from pathlift.symmetry.group import infer_group


class Cell(nn.Module):
    """A cell of torch, or the kernel that it is on an accelerator."""

    def __init__(self, kind: type[nn.RNNCellBase], fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.cell, self.last = nn.Linear(4, 6), kind(6, 8), nn.Linear(8, 3)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_ones(len(x), 8)
        gated = isinstance(self.cell, nn.LSTMCell)
        x = F.relu(self.first(x))
        if not self.fused:
            h = self.cell(x, (h, h))[0] if gated else self.cell(x, h)
        else:
            cell: Any = self.cell
            gates = x @ cell.weight_ih.t(), h @ cell.weight_hh.t()
            ops = torch.ops.aten
            kernel = ops._thnn_fused_lstm_cell if gated else ops._thnn_fused_gru_cell
            h = kernel(*gates, h, cell.bias_ih, cell.bias_hh)[0]
        return self.last(F.relu(h))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_the_kernel_is_read_as_the_cell(kind: type[nn.RNNCellBase]) -> None:
    x = torch.randn(2, 4)
    cell, fused = (capture(Cell(kind, f).eval(), x) for f in (False, True))
    one, other = infer_group(cell), infer_group(fused)
    assert one.num_scales == other.num_scales > 0
    expected, shift, approximated = diagonal(cell, False, strict=False)
    found, again, likewise = diagonal(fused, False, strict=False)
    assert (shift, approximated) == (again, likewise)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_the_parts_compute_the_cell(kind: type[nn.RNNCellBase], bias: bool) -> None:
    torch.manual_seed(0)
    cell: Any = kind(5, 3, bias=bias).double()
    x, h, c = (torch.randn(2, n).double() for n in (5, 3, 3))
    gates = x @ cell.weight_ih.t(), h @ cell.weight_hh.t()
    biases = (cell.bias_ih, cell.bias_hh) if bias else ()
    if kind is nn.LSTMCell:
        found = PARTS["_thnn_fused_lstm_cell"](*gates, c, *biases)
        torch.testing.assert_close(found[:2], cell(x, (h, c)))
    else:
        torch.testing.assert_close(PARTS["_thnn_fused_gru_cell"](*gates, h, *biases)[0], cell(x, h))
