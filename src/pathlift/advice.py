"""``advise``: is conditioning worth it here, with which settings, and why.

The module is not called ``advise``: importing a module of that name would put it in the place of
the function ``pathlift.advise``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from pathlift.cautions import few_values
from pathlift.conditioner import Conditioner
from pathlift.curvature import Curvature, Loss, curvature
from pathlift.errors import ArgumentError
from pathlift.surroundings import apart
from pathlift.verdict import (
    LIKELY,
    NARROW,
    NORMALISED,
    WIDE,
    Facts,
    facts_of,
    judged,
    optimizer_kind,
)

# Batches that stand for the data.
_BATCHES = 4
# Best rate with continuous scales over that without: the smallest and the largest that were
# measured, without norms and convolutions, and with SGD behind batch norms (docs/reproduced,
# when.json and left-out*.csv; a test compares).
RATE_RATIOS = {"sgd": (0.12, 2.0), "adaptive": (0.5, 2.0), "norms": (0.5, 5.07)}

Data = tuple[Iterable[tuple[Tensor, Tensor]], Loss]


@dataclass(frozen=True)
class Advice:
    """The result of :func:`advise`; ``print(advice)`` shows it in words.

    Attributes:
        verdict: ``"likely to help"``, ``"nothing to do"`` or ``"don't"``.
        reasons: sentences, the weightiest first.
        settings: keyword arguments for :func:`pathlift.condition_`.
        frozen: what is to be known of parameters that are not trained, a sentence.
        rate: how to set the learning rate, a sentence.
        rate_ratio: best rate with over that without, the smallest and largest measured with this
            kind of optimiser, or with SGD behind batch norms; None where none was.
        facts: what the verdict rests on.
        before: curvature of the model as it is; None without data.
        after: the same once conditioned.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> advice = pathlift.advise(model, x, "sgd")
    >>> report = pathlift.condition_(model, x, **advice.settings)
    >>> advice.facts.num_scales, advice.rate_ratio
    (32, (0.12, 2.0))
    """

    verdict: str
    reasons: list[str]
    settings: dict[str, Any]
    frozen: str
    rate: str
    rate_ratio: tuple[float, float] | None
    facts: Facts
    before: Curvature | None = None
    after: Curvature | None = None

    @property
    def rate_factor(self) -> float | None:
        """Largest stable rate of gradient descent, conditioned over as it is; None without data."""
        if self.before is None or self.after is None:
            return None
        return self.after.stable_rate / self.before.stable_rate

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, ready for JSON."""
        return asdict(self) | {"rate_factor": self.rate_factor}

    def __str__(self) -> str:
        given = ", ".join(f"{k}={v!r}" for k, v in self.settings.items())
        whether = "" if self.verdict == LIKELY else "if you try it all the same: "
        rows = [
            ("conditioning", self.verdict),
            ("because", self.reasons[0]),
            *(("note", reason) for reason in self.reasons[1:]),
            ("settings", f"{whether}condition_(model, example_inputs, {given})"),
            ("frozen", self.frozen),
            ("rate", self.rate),
        ]
        return "\n".join(f"{title:<13} {text}" for title, text in rows)


@apart
def advise(
    model: nn.Module,
    example_inputs: object,
    optimizer: torch.optim.Optimizer | str | None = None,
    data: Data | None = None,
) -> Advice:
    """Whether conditioning ``model`` before training is worth it, why, and with which settings.

    Args:
        model: as for :func:`pathlift.condition_`. It is not changed; a copy of it is conditioned.
        example_inputs: as for :func:`pathlift.condition_`.
        optimizer: what will train it: a ``torch.optim.Optimizer`` or its name (``"sgd"``,
            ``"adamw"``); None: not known, the advice is that for SGD and says so.
        data: ``(loader, loss)`` to measure the largest curvature before and after, see
            :func:`pathlift.curvature.curvature`; a few batches are read.

    Returns:
        The advice.

    Raises:
        ArgumentError: an argument has the wrong type or value, or the model can't be copied.
        CaptureError: the model can't be captured.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4), nn.ReLU(),
    ...                       nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 32))
    >>> pathlift.advise(model, torch.zeros(1, 32), "sgd").verdict
    'likely to help'
    >>> pathlift.advise(model, torch.zeros(1, 32), "adamw").verdict
    'nothing to do'
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module; found {type(model).__name__}.")
    kind = optimizer_kind(optimizer)
    measured = _checked(data)
    conditioned = _copied(model)
    conditioner = Conditioner(conditioned, example_inputs)
    report = conditioner.condition_(exact=False, verify=False, on_nothing="ignore")
    advice = judge(facts_of(model, conditioner.group, report, report.imbalance_after, kind))
    few = few_values(conditioner.known.program)
    if few:
        sentence = f"{few[0].upper()}{few[1:]}."
        advice = replace(advice, reasons=[*advice.reasons, sentence])
    if measured is None:
        return advice
    batches, loss = measured
    criterion = advice.settings["criterion"]
    if criterion != "path-kernel":  # what is advised is measured
        conditioner.condition_(criterion=criterion, exact=False, verify=False, on_nothing="ignore")
    before, after = (curvature(m, batches, loss) for m in (model, conditioned))
    return _with_curvature(advice, before, after)


def judge(facts: Facts) -> Advice:
    """The advice on what is known."""
    verdict, _, reason = judged(facts)
    settings = {"criterion": _criterion(facts), "exact": False, "batch_norm": "pinned"}
    reasons = [reason, *_remarks(facts)]
    ratio = RATE_RATIOS.get(_kind(facts))
    return Advice(verdict, reasons, settings, _frozen(facts), _rate(facts), ratio, facts)


def _kind(facts: Facts) -> str:
    """Which measured rates are about this model."""
    kind = "sgd" if facts.optimizer == "unknown" else facts.optimizer
    return "norms" if kind == "sgd" and facts.batch_norms >= NORMALISED else kind


def _criterion(facts: Facts) -> str:
    """ENorm's where the path kernel's diagonal is known to say little."""
    normalised = facts.attention or facts.other_norms >= NORMALISED
    return "weight-norm" if normalised or facts.width_ratio >= NARROW else "path-kernel"


def _remarks(facts: Facts) -> list[str]:
    found = [
        f"Imbalance {facts.imbalance_before:.3f} before and {facts.imbalance_after:.3f} after, per "
        f"parameter; {facts.num_scales:,} scales."
    ]
    if facts.optimizer == "unknown":
        found.append(
            f"The optimiser is not known, so this is the advice for SGD; with Adam and its kin "
            f"gains were shown only where outputs are {WIDE:g} times wider than the narrowest "
            f"layer. Pass optimizer=."
        )
    if facts.span > 12:
        found.append(
            f"The scales would span a factor 2^{facts.span:.0f}, which is a sign that the paths "
            f"counted are not the ones that matter."
        )
    return found


def _frozen(facts: Facts) -> str:
    if facts.frozen == 0:
        return "nothing is. Freeze what will not train before conditioning: it then does not count."
    return (
        f"{facts.frozen:.0%} of the parameters: they are rescaled with their neighbours and do not "
        f"count. Weights that must stay as they are (shared, quantised) speak against conditioning."
    )


def _rate(facts: Facts) -> str:
    kind, likely = _kind(facts), judged(facts).verdict == LIKELY
    if not likely and kind != "adaptive":
        return "as without conditioning."
    low, high = RATE_RATIOS[kind]
    if kind == "adaptive":
        again = "search again" if likely else "If you condition all the same, search again"
        return (
            f"{'' if likely else 'as without conditioning. '}{again}: with Adam and AdamW the best "
            f"rate was {low:g} to {high:g} times that without."
        )
    if kind == "norms":
        return (
            f"search again, from half to {high:.0f} times: with SGD behind batch norms the best "
            f"rate was {low:g} to {high:g} times that without conditioning, and at the old one 2 "
            f"of 6 networks ended higher."
        )
    return (
        f"search again, from an eighth to twice: with SGD the best rate was {low:g} to {high:g} "
        f"times that without conditioning. The largest stable rate, which data=(loader, loss) "
        f"measures, said which way (0.28 to 0.63 for autoencoders, 1.5 for a classifier). Without "
        f"a search take criterion='weight-norm': at the old best rate 16 of 21 networks with wide "
        f"outputs ended 3% to 32% lower with it, and the others showed no difference."
    )


def _with_curvature(advice: Advice, before: Curvature, after: Curvature) -> Advice:
    measured = replace(advice, before=before, after=after)
    reason = (
        f"Measured: the largest curvature goes from {before.largest:.3g} to {after.largest:.3g}, "
        f"so the largest stable rate of plain SGD changes by a factor {measured.rate_factor:.2g}."
    )
    rate = advice.rate
    if advice.verdict == LIKELY:
        rate = (
            f"{measured.rate_factor:.2g} times the best rate before, as the largest stable rate of "
            f"plain SGD has changed: there four of six settings that gained kept 7% to 38%, and "
            f"two nothing. Better still, search around it."
        )
    return replace(measured, reasons=[*advice.reasons, reason], rate=rate)


def _checked(data: Any) -> tuple[list[Any], Loss] | None:
    """A few batches, read once: before and after see the same."""
    if data is None:
        return None
    pair = isinstance(data, tuple) and len(data) == 2
    if not pair or not callable(data[1]) or not isinstance(data[0], Iterable):
        raise ArgumentError(
            "data must be (loader, loss): batches (inputs, targets), and loss(outputs, targets). "
            "Write data=(loader, torch.nn.functional.cross_entropy), for instance."
        )
    return list(islice(data[0], _BATCHES)), data[1]


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(
            f"the model can't be copied: {error}. advise() conditions a copy; pass the model as it "
            f"is before the first step."
        ) from error
