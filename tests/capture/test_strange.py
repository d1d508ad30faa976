"""Modules that go where a table of operations does not look: each keeps its function or is refused.

What is asserted for every one of them: random powers of two of its group change no bit of anything
that leaves it, on other inputs than the example's, in both modes, over several calls in a row; or
``rescaling_group`` raises a worded PathliftError. ``moves`` says that scales must have been found.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pathlift
from pathlift.capture.inputs import tensors_in

WIDTH = 6


class Base(nn.Module):
    """Two layers around what the test is about; weights that no scale leaves unchanged."""

    moves = False

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, WIDTH)
        self.second = nn.Linear(WIDTH, 3)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x))

    def forward(self, x: Tensor) -> Any:
        return self.second(self.hidden(x))


# ------------------------------------------------------------------------------ what leaves


class ReturnsASet(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return {self.second(h), h}


class ReturnsAnIterator(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return iter([self.second(h), h])


class ReturnsAGenerator(Base):
    def forward(self, x: Tensor) -> Iterator[Tensor]:
        h = self.hidden(x)
        return (t * 1 for t in [self.second(h), h])


class ReturnsADictView(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return {"a": h, "b": self.second(h)}.values()


class Slotted:
    __slots__ = ("h", "y")

    def __init__(self, h: Tensor, y: Tensor) -> None:
        self.h, self.y = h, y


class ReturnsASlottedObject(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return Slotted(h, self.second(h))


@dataclass
class Nested:
    inner: dict[str, Any]


class ReturnsADataclass(Base):
    moves = True

    def forward(self, x: Tensor) -> Any:
        return Nested({"y": [self.second(self.hidden(x))]})


class ReturnsAClosure(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return lambda: (h, self.second(h))


class ReturnsIntegers(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return self.second(h), (h * 10).to(torch.int64)


class ReturnsComplex(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return self.second(h), torch.complex(h, h)


class ReturnsPositions(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return self.second(h), h.argmax(1)


# ------------------------------------------------------------------------------ what is written


class WritesItsInput(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        x.copy_(h[:, :4])
        return self.second(h)


class WritesABuffer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        self.seen.copy_(h.mean(0))
        return self.second(h)


class RebindsABuffer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        self.seen = h.mean(0).detach()
        return self.second(h)


class AccumulatesInAZeroBuffer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x) + self.memory
        self.memory.add_(1.0)
        return self.second(h)


class LeavesAnAttribute(Base):
    def forward(self, x: Tensor) -> Any:
        self.last = self.hidden(x)
        return self.second(self.last)


class AppendsToAList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        self.kept.append(h)
        return self.second(h)


GLOBAL: dict[str, Tensor] = {}


class LeavesAGlobal(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        GLOBAL["h"] = h
        return self.second(h) + 0 * GLOBAL["h"].sum()


class WritesThroughAView(Base):
    moves = True

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        out = torch.zeros(len(x), WIDTH)
        out[:, : WIDTH // 2] = h[:, : WIDTH // 2]
        out.t()[WIDTH // 2 :].add_(2 * h[:, WIDTH // 2 :].t())
        return self.second(out)


class ReadsAnOldView(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        half = h[:, :3]
        h.add_(1.0)
        return self.second(h), half.clone()


class WritesIntoChunks(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        a, b = h.chunk(2, 1)
        a.mul_(b)
        h.view(len(x), 2, 3)[:, 1].zero_()
        return self.second(h)


# ------------------------------------------------------------------------------ modes and calls


class OverridesTrain(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kind = "train"

    def train(self, mode: bool = True) -> OverridesTrain:
        super().train(mode)
        self.kind = "train" if mode else "eval"
        return self

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return self.second(h if self.kind == "eval" else torch.tanh(h))


def reads_mode(module: nn.Module, h: Tensor) -> Tensor:
    return torch.sigmoid(h) if getattr(module, "train" + "ing") else h


class AsksAFunctionForTheMode(Base):
    def forward(self, x: Tensor) -> Any:
        return self.second(reads_mode(self, self.hidden(x)))


class AHookChangesTheMode(Base):
    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_hook(lambda m, a, y: y + 1 if m.training else y)


class CountsCalls(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        h = self.hidden(x)
        return self.second(torch.tanh(h) if self.calls > 2 else h)


class FirstCallDiffers(Base):
    def __init__(self) -> None:
        super().__init__()
        self.ready = False

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        if not self.ready:
            self.ready = True
            return self.second(h)
        return self.second(torch.tanh(h))


class CarriesAState(Base):
    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        if self.state is not None:
            h = h + self.state
        self.state = h.detach()
        return self.second(h)


class CachesAWeight(Base):
    def __init__(self) -> None:
        super().__init__()
        self.cached: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        if self.cached is None:
            self.cached = self.second.weight.detach() * 2
        return F.linear(self.hidden(x), self.cached)


class HoldsAViewOfAWeight(Base):
    def __init__(self) -> None:
        super().__init__()
        self.turned = [self.second.weight.detach().t()]

    def forward(self, x: Tensor) -> Any:
        return self.second(self.hidden(x)) + self.hidden(x) @ self.turned[0]


@functools.lru_cache
def table(width: int) -> Tensor:
    return torch.arange(1.0, width + 1)


class UsesACache(Base):
    moves = True

    def forward(self, x: Tensor) -> Any:
        return self.second(self.hidden(x) * table(WIDTH))


class BuildsATableLazily(Base):
    moves = True

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        if WIDTH not in self.tables:
            self.tables[WIDTH] = torch.arange(WIDTH).flip(0)
        return self.second(h[:, self.tables[WIDTH]])


# ------------------------------------------------------------------------------ dtypes, randomness


class CastsToIntegers(Base):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.hidden(x).mul(3).long().float())


class CastsToBooleans(Base):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.hidden(x).bool().float())


class CastsToHalf(Base):
    moves = True

    def forward(self, x: Tensor) -> Any:
        return self.second(self.hidden(x).bfloat16().float())


class ReadsBits(Base):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.hidden(x).view(torch.int32).float() / 2**28)


class DrawsFromValues(Base):
    def forward(self, x: Tensor) -> Any:
        return self.second(torch.bernoulli((self.hidden(x) / 10).clamp(0, 1)))


class RoundsAndFloors(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return self.second(h.floor() + torch.floor_divide(h, 0.3))


class ComparesWithAConstant(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return self.second(torch.where(h > 0.5, h, 0.1 * h))


class ClampsByTensors(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return self.second(torch.clamp(h, torch.tensor(0.1), torch.tensor(0.7)))


# ------------------------------------------------------------------------------ regions


class NoGradBlock(Base):
    moves = True

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            h = self.hidden(x)
        return self.second(h)


class Autocast(Base):
    moves = True

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.hidden(x)
        return self.second(h.float())


class Checkpointed(Base):
    moves = True

    def forward(self, x: Tensor) -> Any:
        return self.second(checkpoint(self.hidden, x, use_reentrant=False))


class Vmapped(Base):
    moves = True

    def forward(self, x: Tensor) -> Any:
        return torch.vmap(lambda row: self.second(self.hidden(row)))(x)


class BranchesOnValues(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return self.second(h) if h.sum() > 1 else self.second(torch.tanh(h))


class GoesThroughNumpy(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return self.second(h + torch.from_numpy(h.detach().numpy() + 1))


class GoesThroughLists(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return self.second(torch.tensor(h.tolist()))


class SelectsByValues(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return self.second(h[h.sum(1) > 0.5]).sum(0)


class AssignsData(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        h.data = torch.tanh(h.data)
        return self.second(h)


class RewritesItsWeight(Base):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            self.second.weight.clamp_(-0.2, 0.2)
        return self.second(self.hidden(x))


# ------------------------------------------------------------------------------ second outputs


class UsesIndicesOfTopk(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        values, where = h.topk(2, 1)
        return self.second(h) + values.sum() + where.float().sum()


class UsesAVariance(Base):
    def forward(self, x: Tensor) -> Any:
        variance, mean = torch.var_mean(self.hidden(x), 0)
        return self.second(torch.stack([variance, mean]))


class RoutesToExperts(Base):
    moves = True

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 5)
        self.up = nn.Parameter(torch.randn(5, WIDTH, 4))
        self.down = nn.Parameter(torch.randn(5, 3, WIDTH))

    def forward(self, x: Tensor) -> Any:
        weight, which = self.gate(x).softmax(-1).topk(2, -1)
        h = torch.relu(torch.einsum("nkhi,ni->nkh", self.up[which], x))
        y = torch.einsum("nkoh,nkh->nko", self.down[which], h)
        return (y * weight[..., None]).sum(1)


class PassesMessages(Base):
    moves = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 0], [1, 2, 0, 2]]))

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        source, target = self.edges
        return self.second(torch.zeros_like(h).index_add(0, target % len(x), h[source % len(x)]))


class Recurrent(Base):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, 5, num_layers=2, bidirectional=True, proj_size=3, bias=False)

    def forward(self, x: Tensor) -> Any:
        y, (h, c) = self.rnn(self.hidden(x)[:, None])
        return self.second(y[:, 0]), h, c


class RecurrentRelu(Base):
    moves = True

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(WIDTH, WIDTH, nonlinearity="relu", num_layers=2)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.rnn(self.hidden(x)[:, None])[0][:, 0])


class WeightedBag(Base):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(7, WIDTH, mode="sum")

    def forward(self, x: Tensor) -> Any:
        which = torch.arange(4).expand(len(x), 4)
        return self.second(self.bag(which, per_sample_weights=self.hidden(x)[:, :4]))


class NegatesByMask(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, False] * (WIDTH // 2)))

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        h[:, self.mask] = 0.0
        return self.second(h.masked_fill(~self.mask, -1.0))


class HasAnEmptyParameter(Base):
    moves = True

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, WIDTH))

    def forward(self, x: Tensor) -> Any:
        return self.second(torch.cat([self.hidden(x), self.nothing]))


class ExpandedParameter(Base):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(1).expand(WIDTH))

    def forward(self, x: Tensor) -> Any:
        return self.second(self.hidden(x) * self.shift)


CASES = [cls for cls in globals().values() if isinstance(cls, type) and issubclass(cls, Base)]


def run(model: nn.Module, mode: bool) -> list[Tensor]:
    """Everything seen from outside over three calls."""
    generator = torch.Generator().manual_seed(5)
    model.train(mode)
    found: list[Tensor] = []
    for size in (3, 3, 3):
        x = torch.randn(size, 4, generator=generator)
        torch.manual_seed(1)
        with torch.no_grad():
            out = model(x)
        if callable(out):
            out = out()
        if not isinstance(out, (Tensor, dict, tuple, list, Slotted, Nested)):
            out = sorted(out, key=lambda t: t.shape)
        found += [x, *(t.clone() for t in tensors_in(out))]
        found += [b.clone() for b in model.buffers()]
        own = {
            k: v for k, v in vars(model).items() if k[0] != "_" and k not in ("turned", "cached")
        }
        found += [t.clone() for t in tensors_in(own)]
        found += [t.clone() for t in GLOBAL.values()]
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_keeps_its_function_or_is_refused(case: type[Base]) -> None:
    torch.manual_seed(0)
    GLOBAL.clear()
    model = case()
    before = copy.deepcopy(model)
    try:
        group = pathlift.rescaling_group(model, torch.randn(3, 4))
    except pathlift.PathliftError as error:
        assert not case.moves, error
        assert len(str(error)) > 40
        return
    finally:
        assert not any(type(t) is not Tensor for t in tensors_in(GLOBAL))
    assert vars(model).keys() == vars(before).keys()
    if case.moves:
        assert group.num_scales >= WIDTH // 2
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        scales = torch.randint(-3, 4, (group.num_scales,), generator=generator)
        other = copy.deepcopy(model)
        try:
            group.rescale_(other, scales)
        except pathlift.PathliftError:
            continue
        for mode in (True, False):
            GLOBAL.clear()
            expected = run(copy.deepcopy(model), mode)
            GLOBAL.clear()
            found = run(copy.deepcopy(other), mode)
            assert len(expected) == len(found)
            for a, b in zip(expected, found, strict=True):
                assert torch.equal(a, b), (a, b)
