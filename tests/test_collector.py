"""The collector is as it was after a call, whether the call came back or raised."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import pathlift
from pathlift.collector import uncollected


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_before(enabled: bool) -> None:
    inside = []

    @uncollected
    def work(fails: bool) -> None:
        inside.append(gc.isenabled())
        if fails:
            raise KeyError

    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        work(False)
        with pytest.raises(KeyError):
            work(True)
        assert gc.isenabled() == enabled and inside == [False, False]
        with pytest.raises(pathlift.CaptureError):
            pathlift.condition_(nn.Linear(3, 2), torch.zeros(1, 4))
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
