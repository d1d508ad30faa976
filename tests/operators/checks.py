"""What every case must show: no bit changes, no error of another kind, a report that holds.

``check(case)`` gives a verdict per question, ``ok`` or what is wrong:

- bits: random integer scales in [-3, 3] leave every output as it was;
- errors: nothing but a :class:`pathlift.PathliftError` comes out of the library;
- report: after a continuous ``condition_``, a second call measures what the first reported
  and gains nothing.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import pathlift
from operators.cases import INPUT, Case, seed

TOLERANCE = 1e-6
LIMIT = 60  # seconds per case


class TooSlow(BaseException):
    """Not an Exception: the library may not turn it into one of its own."""


@dataclass
class Verdict:
    """One row of the sweep; every text is empty where all is well."""

    operator: str
    case: str
    skipped: str = ""
    refused: str = ""
    scales: int = 0
    passes: bool = False
    pinned: dict[str, int] = field(default_factory=dict)
    standins: dict[str, int] = field(default_factory=dict)
    bits: str = ""
    errors: str = ""
    report: str = ""
    trace: str = ""

    def __post_init__(self) -> None:
        self.reproduce = (
            f"python tests/operators/sweep.py --only {self.operator} --case {self.case}"
        )

    @property
    def sound(self) -> bool:
        return not (self.bits or self.errors or self.report)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value} | (
            {} if self.sound else {"reproduce": self.reproduce}
        )


def check(case: Case, limit: int = LIMIT) -> Verdict:
    """The case's verdict; never raises but for an interrupt."""
    verdict = Verdict(case.operator.name, case.name)
    try:
        with time_limit(limit):
            _check(case, verdict)
    except pathlift.PathliftError as error:
        verdict.refused = first_line(error)
    except TooSlow:
        verdict.errors = f"no answer within {limit} s"
    except Exception as error:
        verdict.errors = f"{where(error)}: {first_line(error)}"
        verdict.trace = traceback.format_exc()
    if not verdict.errors:
        verdict.errors = poisoned()
    return verdict


def _check(case: Case, verdict: Verdict) -> None:
    x = torch.tensor(INPUT)
    try:
        model = case.module()
        before, again = outputs(model, x), outputs(model, x)
    except Exception as error:
        verdict.skipped = f"does not run: {first_line(error)}"
        return
    if difference(before, again):
        verdict.skipped = "not deterministic"
        return
    conditioner = pathlift.Conditioner(model, x)
    group = conditioner.group
    verdict.scales, verdict.pinned = group.num_scales, dict(group.unsupported)
    verdict.passes = any(
        bool(group.exponents(name).count_nonzero())
        for name, _ in model.named_parameters()
        if name.startswith("uses")
    )
    group.rescale_(model, torch.randint(-3, 4, (group.num_scales,)))
    verdict.bits = difference(before, outputs(model, x))
    if verdict.bits:
        return  # the library verifies, and would refuse with good reason
    conditioner.condition_(exact=True)
    verdict.bits = difference(before, outputs(model, x))
    first = conditioner.condition_(exact=False)
    verdict.standins = dict(first.approximated)
    second = pathlift.condition_(model, x, exact=False)
    verdict.report = shortfall(first, second)


def shortfall(first: Any, second: Any) -> str:
    """What a second call finds against the first one's report; empty if they agree."""
    claimed, found = first.imbalance_after, second.imbalance_before
    slack = TOLERANCE * max(1.0, abs(claimed))
    story = f"{first.imbalance_before:.6g} -> {claimed:.6g}, then {found:.6g} -> "
    story += f"{second.imbalance_after:.6g}"
    if not abs(claimed - found) <= slack:
        return f"untrue: {story}"
    if first.converged and not second.imbalance_after >= found - slack:
        return f"gains again: {story}"
    return ""


def outputs(model: nn.Module, x: Tensor) -> list[Any]:
    """What the model returns from one fixed seed; buffers are put back."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    seed()
    try:
        with torch.no_grad():
            found = [t.clone() if isinstance(t, Tensor) else t for t in model(x)]
            return found + [b.clone() for b, _ in buffers]
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)


def difference(before: list[Any], after: list[Any]) -> str:
    """Which outputs differ; NaNs at the same places are equal."""
    if len(before) != len(after):
        return f"{len(before)} outputs, then {len(after)}"
    for k, (a, b) in enumerate(zip(before, after, strict=True)):
        if not isinstance(a, Tensor):
            if a != b and not (a != a and b != b):
                return f"output {k}: {a}, then {b}"[:200]
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"output {k}: {a.dtype} {tuple(a.shape)}, then {b.dtype} {tuple(b.shape)}"
        elif a.layout != torch.strided:
            if not torch.equal(a.to_dense(), b.to_dense()):
                return f"output {k} differs"
        else:
            wrong = ~((a == b) | ((a != a) & (b != b)))
            if wrong.any():
                u, v = a[wrong].flatten()[0].item(), b[wrong].flatten()[0].item()
                return f"output {k}: {int(wrong.sum())} of {a.numel()} differ, {u!r} then {v!r}"
    return ""


def poisoned() -> str:
    """Whether the process still does what it did: an error message, or nothing."""
    try:
        (torch.randn(2) + torch.ones(2)).tolist()
        if not torch.is_grad_enabled():
            return "leaves gradients disabled"
    except Exception as error:
        return f"leaves the process poisoned: {first_line(error)}"
    return ""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow

    earlier: Callable[..., Any] | int | None = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


def where(error: Exception) -> str:
    """The innermost function of the library that the error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if "/pathlift/" in f.filename]
    if not inside:
        return "harness"
    public = next((f.name for f in inside if f.name in ("capture", "infer_group")), "condition_")
    last = inside[-1]
    file = last.filename.split("/pathlift/")[-1]
    return f"{public} ({file}:{last.lineno} {last.name})"


def first_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:300]
