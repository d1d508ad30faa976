"""The stacked optimisers do to every run what torch.optim does to one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pathlift.errors import ArgumentError
from pathlift.experiments.optimizers import OPTIMIZERS, optimizer_named

SHAPES = ((5, 3), (3, 5), (5,), (2, 3, 2, 2))
RATES = (0.1, 0.02, 0.7)


class _Bag(nn.Module):
    """Parameters of every kind of shape."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for k, shape in enumerate(SHAPES):
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(f"p{k}", nn.Parameter(value))


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw", "muon"])
def test_stacked_updates_equal_torch(name: str) -> None:
    rule = optimizer_named(name)
    assert rule.update is not None
    bags = [_Bag(seed) for seed in range(len(RATES))]
    stacked = [
        torch.stack([p.detach() for p in ps])
        for ps in zip(*(b.parameters() for b in bags), strict=True)
    ]
    slots = [{s: torch.zeros_like(p) for s in rule.slots(p)} for p in stacked]
    alone = [rule.torch(bag, rate, torch.empty(0)) for bag, rate in zip(bags, RATES, strict=True)]
    column = torch.tensor(RATES, dtype=torch.float64)
    generator = torch.Generator().manual_seed(9)
    for step in range(1, 6):
        for k, p in enumerate(stacked):
            gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for run, bag in enumerate(bags):
                getattr(bag, f"p{k}").grad = gradient[run].clone()
            rule.update(p, gradient, slots[k], column.reshape(-1, *[1] * (p.dim() - 1)), step)
        for optimizers in alone:
            for each in optimizers:
                each.step()
    # torch's Muon works in bfloat16, whose rounding five steps of 0.7 amplify.
    tolerance = 0.1 if name == "muon" else 1e-12
    for k, p in enumerate(stacked):
        own = torch.stack([getattr(bag, f"p{k}").detach() for bag in bags])
        assert (p - own).abs().max() < (tolerance if p.dim() == 3 else 1e-12), SHAPES[k]
        assert (p - torch.stack([getattr(_Bag(r), f"p{k}") for r in range(3)])).abs().max() > 0.1


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw", "muon"])
def test_slots_have_the_names_torch_gives_them(name: str) -> None:
    rule, bag = optimizer_named(name), _Bag(0)
    optimizers = rule.torch(bag, 0.1, torch.empty(0))
    for parameter in bag.parameters():
        parameter.grad = torch.ones_like(parameter)
    for each in optimizers:
        each.step()
    for each in optimizers:
        for parameter, state in each.state.items():
            assert set(state) - {"step"} == set(rule.slots(parameter[None]))


def test_an_unknown_optimiser_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ArgumentError, match="'lion' is unknown.*'sgd', 'momentum', 'adam', 'adamw', 'muon'"
    ):
        optimizer_named("lion")
    assert set(OPTIMIZERS) == {"sgd", "momentum", "adam", "adamw", "muon", "path-sgd"}
