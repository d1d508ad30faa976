"""Before and after: everything the real model shows, and what is to blame when it differs.

Both modes are looked at, the model's own mode over two calls in a row, the second on other values
than the example's: state that a call leaves, and masks that an input decides, are seen too.
Compared is everything that leaves: outputs of any kind, buffers, and tensors left in attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathlift.capture.inputs import tensors_in
from pathlift.capture.program import Inputs, Program
from pathlift.errors import VerificationError
from pathlift.homes.home import Home
from pathlift.homes.snapshot import Snapshot
from pathlift.symmetry.group import RescalingGroup
from pathlift.tensors.rescale import Undo

# Per run, every tensor that can be seen after it.
Outputs = list[list[Tensor]]

# What rounding may change, relative to the largest entry of a tensor, where scales are continuous.
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


def outputs(home: Home, program: Program, moved: frozenset[str] = frozenset()) -> Outputs | None:
    """What the real model shows in both modes; the model is left as it was.

    None if there is no model to run.

    Args:
        moved: names of buffers that the rescaling moves, which are not compared.
    """
    model = home.model
    if model is None:
        return None
    found: Outputs = []
    own = program.training
    with Snapshot(model) as before, torch.no_grad():
        skipped = {id(b) for n, b in program.buffers.items() if n in moved}
        skipped |= {id(p) for p in model.parameters()}
        for mode in dict.fromkeys(g.training for g in program.graphs):
            inputs = program.examples.get(mode, program.inputs)
            rolled = _rolled(inputs)
            for one in [inputs, rolled] if mode == own else [rolled]:
                if mode != own:
                    model.train(mode)
                torch.manual_seed(0)
                out = _run(model, one, inputs)
                left = tensors_in([vars(m) for m in model.modules()])
                seen = [*tensors_in(out), *(t for t in left if id(t) not in skipped)]
                found.append([t.detach().clone() for t in seen if t.layout == torch.strided])
            before.restore()
    home.settle()
    return found


def _run(model: nn.Module, inputs: Inputs, instead: Inputs) -> Any:
    """The model's output; other values may not fit a model (offsets, lengths): then ``instead``."""
    for k, one in enumerate((inputs, instead)):
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: t.detach().clone(), (one.args, one.kwargs)
        )
        try:
            return model(*args, **kwargs)
        except Exception:
            if k or inputs is instead:
                raise
    raise AssertionError


def _rolled(inputs: Inputs) -> Inputs:
    """Other values of the same range: every tensor's entries moved on by one."""

    def rolled(tensor: Tensor) -> Tensor:
        plain = tensor.layout == torch.strided and tensor.numel() > 1 and not tensor.is_quantized
        return tensor.detach().roll(1) if plain else tensor

    args, kwargs = pytree.tree_map_only(Tensor, rolled, (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs)


def compared(
    home: Home,
    program: Program,
    group: RescalingGroup,
    scales: NDArray[Any],
    before: Outputs,
    undo: Undo,
    exact: bool,
    tolerance: float | None,
) -> float:
    """The largest change of an output on any process, now that the scales are applied.

    Args:
        before: what the model showed before.
        undo: takes the scales back; called if anything fails.
        exact: whether every bit has to be kept.
        tolerance: multiple of :data:`TOLERANCES` that a relative change may reach where it is not
            exact; None for no bound.

    Raises:
        VerificationError: the outputs differ by more; the model is as before.
    """
    moved = frozenset(n for n in group.parameters if n in program.buffers)

    def looked() -> tuple[float, float]:
        after = outputs(home, program, moved)
        assert after is not None
        worst = home.worst(largest_change(before, after))
        return worst, home.worst(excess(before, after))

    try:
        worst, beyond = looked()
        fails = worst > 0 if exact else tolerance is not None and beyond > tolerance
    except BaseException:
        undo()
        raise
    if not fails:
        return worst
    undo()
    what = "although all scales are powers of two" if exact else (
        f"{beyond:.3g} times what rounding explains"
    )
    blamed = _blamed(home, group, scales, looked, exact, tolerance)
    raise VerificationError(
        f"the rescaled network's outputs differ by up to {worst:.3g}, {what}. {blamed} The model "
        f"has been restored. An activation may leave the range of its dtype, or forward may not be "
        f"deterministic; try a wider dtype" + (", or exact=False." if exact else ".")
    )


def _blamed(
    home: Home,
    group: RescalingGroup,
    scales: NDArray[Any],
    looked: Callable[[], tuple[float, float]],
    exact: bool,
    tolerance: float | None,
) -> str:
    """Halve the scales that are applied while the outputs still differ; who carries the rest."""

    def differs(kept: NDArray[np.intp]) -> bool:
        part = np.zeros_like(scales)
        part[kept] = scales[kept]
        undo = home.multiply_(group.factors(part))
        try:
            worst, beyond = looked()
        finally:
            undo()
        return worst > 0 if exact else beyond > (tolerance or 1.0)

    kept = np.flatnonzero(scales)
    if differs(kept[:0]):
        return "They also differ with no scale applied: forward is not deterministic."
    while len(kept) > 1:
        half = len(kept) // 2
        part = next((p for p in (kept[:half], kept[half:]) if differs(p)), None)
        if part is None:
            break
        kept = part
    carriers = group.carriers(kept)
    places = group.places(kept)
    return (
        f"{len(kept)} of {np.count_nonzero(scales)} scales are enough for it, in "
        f"{', '.join(carriers[:4])}{' …' if len(carriers) > 4 else ''}"
        + (f", around {', '.join(places[:4])}" if places else "")
        + ". Please report it with these names: an operation there is described wrongly."
    )


def largest_change(before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]) -> float:
    """The largest absolute difference of an output; 0.0 if all bits agree (NaN agrees with NaN)."""
    return _over(before, after, _change)


def excess(before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]) -> float:
    """The largest change of a floating-point tensor, relative to its size and :data:`TOLERANCES`."""

    def relative(a: Tensor, b: Tensor) -> float:
        if a.dtype not in TOLERANCES or not a.numel():
            return 0.0
        finite = a.isfinite()
        size = float(a[finite].abs().max()) if bool(finite.any()) else 0.0
        return _change(a, b) / max(size * TOLERANCES[a.dtype], 1e-300)

    return _over(before, after, relative)


def _over(
    before: Sequence[Sequence[Tensor]],
    after: Sequence[Sequence[Tensor]],
    measure: Callable[[Tensor, Tensor], float],
) -> float:
    if [len(x) for x in before] != [len(x) for x in after]:
        return float("inf")
    pairs = [p for x, y in zip(before, after, strict=True) for p in zip(x, y, strict=True)]
    return max((measure(a, b) for a, b in pairs), default=0.0)


def _change(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if torch.equal(a, b) or (
        (a.is_floating_point() or a.is_complex())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
        and torch.equal(a.isnan(), b.isnan())
    ):
        return 0.0
    wide = torch.complex128 if a.is_complex() else torch.float64
    gap = (a.to(wide) - b.to(wide)).abs()
    return float(gap.nan_to_num(nan=float("inf")).max())
