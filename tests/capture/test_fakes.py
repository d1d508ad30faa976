"""What is looked up among a real run's results is what the real run would return."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from pathlift import operations
from pathlift.capture.fakes import Fakes
from pathlift.capture.model import capture

aten = torch.ops.aten


def _ask(fakes: Fakes, func: object, *args: object, **kwargs: object) -> object:
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), fakes:
        return func(*args, **kwargs)  # type: ignore[operator]


def _learnt(func: object, *args: object, **kwargs: object) -> tuple[Fakes, object]:
    fakes = Fakes(operations.known)
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        real = fakes.run(func, args, kwargs)
    return fakes, real


X = torch.randn(2, 4, 6, 6)
CASES = {
    "new": (aten.relu.default, X),
    "convolution": (aten.conv2d.default, X, torch.randn(3, 4, 3, 3), None, [2, 2], [1, 1]),
    "channels last": (aten.add.Tensor, X.to(memory_format=torch.channels_last), 1),
    "promoted": (aten.mul.Tensor, torch.ones(3, dtype=torch.int64), 0.5),
    "transposed": (aten.permute.default, X, [0, 2, 3, 1]),
    "strides that do not fit": (aten.reshape.default, X.transpose(1, 3), [2, -1]),
    "several views": (aten.split.Tensor, X, 3, 1),
    "several results": (aten.max_pool2d_with_indices.default, X, [2, 2]),
    "itself": (aten.dropout.default, X, 0.5, False),
    "expanded": (aten.expand.default, torch.randn(1, 4), [5, 4]),
    "a list": (aten.cat.default, [X, X], 1),
}


@pytest.mark.parametrize("case", CASES)
def test_metadata_and_memory_are_those_of_the_real_result(case: str) -> None:
    func, *args = CASES[case]
    fakes, real = _learnt(func, *args)
    given = pytree.tree_map_only(Tensor, fakes.from_tensor, args)
    with pytest.MonkeyPatch.context() as patch:
        # The mode proper works out what is not known.
        patch.setattr(fakes, "_complete", lambda: pytest.fail(f"{func} was not looked up"))
        found = _ask(fakes, func, *given)
    several = isinstance(real, (list, tuple))
    assert isinstance(found, type(real)) or not several
    for one, other in zip(*([real, found] if several else [[real], [found]]), strict=True):
        assert isinstance(other, FakeTensor)
        for what in ("shape", "dtype", "device"):
            assert getattr(other, what) == getattr(one, what), what
        assert other.stride() == one.stride() and other.storage_offset() == one.storage_offset()
        if isinstance(args[0], Tensor):
            assert _shared(other, given[0]) == _shared(one, args[0])


def _shared(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def test_what_is_written_in_place_is_the_same_tensor() -> None:
    x = torch.randn(3)
    fakes, _ = _learnt(aten.add_.Tensor, x.clone(), 1.0)
    fake = fakes.from_tensor(x)
    assert _ask(fakes, aten.add_.Tensor, fake, 1.0) is fake


@pytest.mark.parametrize(
    "other",
    [(X[:, :2], 1.0), (X.double(), 1.0), (X, 1), (X.transpose(2, 3), 1.0)],
    ids=["shape", "dtype", "kind of number", "strides"],
)
def test_other_arguments_are_worked_out(other: tuple[Tensor, float]) -> None:
    fakes = Fakes(operations.known)
    fakes.run(aten.add.Tensor, (X, 1.0), {})
    found = _ask(fakes, aten.add.Tensor, *other)
    assert isinstance(found, FakeTensor)
    real = torch.add(*other)
    assert (found.shape, found.dtype, found.stride()) == (real.shape, real.dtype, real.stride())


def test_shapes_that_follow_from_values_are_never_remembered() -> None:
    fakes = Fakes(operations.known)
    for func, args in (
        (aten.nonzero.default, (torch.tensor([0, 1, 1]),)),
        (aten.index.Tensor, (X, [X > 0])),
        (aten.masked_select.default, (X, X > 0)),
        (aten.repeat_interleave.Tensor, (torch.tensor([1, 2]),)),
    ):
        fakes.run(func, args, {})
    assert not fakes._seen


def test_the_compiler_stays_out_of_plain_networks() -> None:
    """Its import takes longer than everything else; only an unseen operation needs it."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    needed = []
    original = Fakes._complete

    def complete(self: Fakes) -> None:
        needed.append(self)
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fakes, "_complete", complete)
        capture(model, torch.randn(2, 3, 3, 3))
    assert not needed
