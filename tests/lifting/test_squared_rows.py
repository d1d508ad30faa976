"""Large weights are squared a few rows at a time; the diagonal does not depend on it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pathlift.capture import capture
from pathlift.lifting import parameters
from pathlift.lifting.squared import stream_diagonal


class Network(nn.Module):
    """Plain, skipped, reused and rescaled linear maps; a convolution's weight is never by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.first = nn.Linear(7, 9)
        self.skipped = nn.Linear(9, 9)
        self.reused = nn.Linear(9, 9, bias=False)
        self.last = nn.Linear(9, 5)
        with torch.no_grad():
            self.last.weight *= 1e6
            self.last.weight[0] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.conv(x.unsqueeze(-2)).squeeze(-2)).relu()
        x = x + self.skipped(x).relu()
        return self.last(self.reused(self.reused(x).relu()))


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from([(1, 7), (3, 7), (2, 4, 7), (9, 7)]),
    piece=st.integers(1, 100),
    seed=st.integers(0, 1000),
    double=st.booleans(),
)
def test_diagonal(shape: tuple[int, ...], piece: int, seed: int, double: bool) -> None:
    torch.manual_seed(seed)
    model = Network()
    if len(shape) > 2:
        model.conv = nn.Identity()
        model.forward = lambda x: model.last(model.skipped(model.first(x).relu()).relu())  # type: ignore[method-assign]
    program = capture(model, torch.randn(shape))
    dtype = torch.float64 if double else torch.float32

    def run(large: int) -> tuple[dict[str, Tensor], int]:
        found: dict[str, Tensor] = {}
        made = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parameters, "_LARGE", large)
            patch.setattr(parameters, "_PIECE", piece)
            init = parameters.SquaredRows.__init__

            def count(self: parameters.SquaredRows, *args: object) -> None:
                made.append(1)
                init(self, *args)  # type: ignore[arg-type]

            patch.setattr(parameters.SquaredRows, "__init__", count)
            stream_diagonal(program, True, found.__setitem__, dtype=dtype)
        return found, len(made)

    whole, none = run(1 << 40)
    by_rows, some = run(1)
    assert none == 0 and some == 3  # all but the convolution's and the reused one
    assert whole.keys() == by_rows.keys()
    for name, expected in whole.items():
        tolerance = 1e-13 if double else 1e-5
        torch.testing.assert_close(by_rows[name], expected, rtol=tolerance, atol=0)
