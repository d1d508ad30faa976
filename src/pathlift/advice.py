"""``advise``: is conditioning worth it here, with which settings, and why.

The rule is one a person can read. It rests on runs whose table is docs/reproduced/when.json; every
number in a reason is from there, or from METHOD section 6 where it says so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from pathlift.condition import Conditioner
from pathlift.curvature import Curvature, Loss, curvature
from pathlift.errors import ArgumentError
from pathlift.report import ConditioningReport
from pathlift.symmetry.group import RescalingGroup

LIKELY, NOTHING, DONT = "likely to help", "nothing to do", "don't"
VERDICTS = (LIKELY, NOTHING, DONT)
# A fall of the imbalance per parameter below this has never shown in a loss.
SMALL_FALL = 0.05
# Widest hidden layer over narrowest, from which on widths count as changing.
CHANGING = 2.0
# Norms per weight tensor, from which on a network counts as normalised.
NORMALISED = 0.25

# Batches that stand for the data.
_BATCHES = 4

Data = tuple[Iterable[tuple[Tensor, Tensor]], Loss]


@dataclass(frozen=True)
class Facts:
    """What is known of a model before it is trained.

    Attributes:
        num_scales: dimension of its rescaling group.
        imbalance_before: log(AM/GM) of the path kernel's diagonal, per parameter.
        imbalance_after: the same at the continuous optimum.
        width_ratio: widest layer whose channels can be rescaled, over the narrowest; 1 if none.
        batch_norms: batch norms per weight tensor.
        other_norms: layer, RMS, group and such norms per weight tensor.
        convolutions: weights with more than two axes, per weight tensor.
        attention: whether attention is computed somewhere.
        optimizer: ``"sgd"``, ``"adaptive"`` (Adam and its kin), ``"muon"`` or ``"unknown"``.
        span: largest minus smallest log2 scale that conditioning would apply.
    """

    num_scales: int
    imbalance_before: float
    imbalance_after: float
    width_ratio: float
    batch_norms: float = 0.0
    other_norms: float = 0.0
    convolutions: float = 0.0
    attention: bool = False
    optimizer: str = "unknown"
    span: float = 0.0

    @property
    def fall(self) -> float:
        """Of the imbalance, per parameter."""
        return self.imbalance_before - self.imbalance_after


@dataclass(frozen=True)
class Advice:
    """The result of :func:`advise`; ``print(advice)`` shows it in words.

    Attributes:
        verdict: ``"likely to help"``, ``"nothing to do"`` or ``"don't"``.
        reasons: sentences, the weightiest first.
        settings: keyword arguments for :func:`pathlift.condition_`.
        rate: how to set the learning rate, a sentence.
        facts: what the verdict rests on.
        before: curvature of the model as it is; None without data.
        after: the same once conditioned.
    """

    verdict: str
    reasons: list[str]
    settings: dict[str, Any]
    rate: str
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
        lines = [f"conditioning: {self.verdict}"]
        lines += [f"  - {reason}" for reason in self.reasons]
        given = ", ".join(f"{k}={v!r}" for k, v in self.settings.items())
        lines.append(f"  settings: condition_(model, example_inputs, {given})")
        return "\n".join([*lines, f"  rate: {self.rate}"])


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
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module; found {type(model).__name__}.")
    kind = optimizer_kind(optimizer)
    measured = _checked(data)
    conditioned = _copied(model)
    conditioner = Conditioner(conditioned, example_inputs)
    report = conditioner.condition_(exact=False, verify=False)
    facts = _facts(model, conditioner.group, report, kind)
    advice = judge(facts)
    if measured is None:
        return advice
    batches, loss = measured
    before, after = (curvature(m, batches, loss) for m in (model, conditioned))
    return _with_curvature(advice, before, after)


def judge(facts: Facts) -> Advice:
    """The verdict on what is known: the first rule that applies decides."""
    for rule in (
        *(_nothing_moves, _normalised, _behind_batch_norms, _adaptive),
        *(_convolutional, _level, _equal),
    ):
        found = rule(facts)
        if found is not None:
            verdict, reason = found
            break
    else:
        verdict = LIKELY
        reason = (
            f"Widths change ({facts.width_ratio:g} times) and plain SGD has one rate for all "
            f"layers: autoencoders ended 5% to 17% lower and a classifier with a bottleneck 38%, "
            f"each at its own best rate."
        )
    settings: dict[str, Any] = {"criterion": "path-kernel", "exact": False, "batch_norm": "pinned"}
    return Advice(verdict, [reason, *_remarks(facts)], settings, _rate(facts, verdict), facts)


Finding = tuple[str, str] | None


def _nothing_moves(facts: Facts) -> Finding:
    if facts.num_scales == 0:
        return NOTHING, (
            "No channel can be rescaled without changing the function; rescaling_group(...)."
            "summary() says what pins each."
        )
    return None


def _normalised(facts: Facts) -> Finding:
    if facts.attention or facts.other_norms >= NORMALISED:
        return DONT, (
            "Attention or norms that act on every sample decide the size of activations here, "
            "which the path kernel does not see: a two-layer Llama with AdamW ended at 2.17 in "
            "place of 1.25 (METHOD section 6)."
        )
    return None


def _behind_batch_norms(facts: Facts) -> Finding:
    if facts.batch_norms >= NORMALISED:
        return DONT, (
            "Batch norms divide a scale out again, which the path kernel does not see: behind them "
            "a classifier with a bottleneck ended 39% higher, and equal widths gained nothing."
        )
    return None


def _adaptive(facts: Facts) -> Finding:
    if facts.optimizer == "adaptive":
        return NOTHING, (
            "Adam and its kin take steps of one size in every parameter, so they have balanced "
            "most of what conditioning balances: over 20 seeds at own best rates neither an "
            "autoencoder (3% lower) nor a classifier (6% higher) showed a difference."
        )
    if facts.optimizer == "muon":
        return NOTHING, (
            "Muon takes steps of one size in every direction of a layer; no run with it has shown "
            "a gain."
        )
    return None


def _convolutional(facts: Facts) -> Finding:
    if facts.convolutions >= 0.5:
        return NOTHING, (
            "Most weights are convolutions: a fully convolutional network gained nothing, and with "
            "continuous scales ended higher, its largest rates being no longer stable."
        )
    return None


def _level(facts: Facts) -> Finding:
    if facts.fall < SMALL_FALL:
        return NOTHING, (
            f"The imbalance would fall from {facts.imbalance_before:.3f} to "
            f"{facts.imbalance_after:.3f} only; falls this small have never shown in a loss."
        )
    return None


def _equal(facts: Facts) -> Finding:
    if facts.width_ratio < CHANGING:
        return NOTHING, (
            "All widths are about equal, so one rate suits all layers: at own best rates nothing "
            "was gained. At rates far below the best one conditioning is quicker."
        )
    return None


def _remarks(facts: Facts) -> list[str]:
    found = [
        f"Imbalance {facts.imbalance_before:.3f} before and {facts.imbalance_after:.3f} after, per "
        f"parameter; {facts.num_scales:,} scales."
    ]
    if facts.optimizer == "unknown":
        found.append(
            "The optimiser is not known, so this is the advice for SGD; with Adam and its kin "
            "no difference was shown. Pass optimizer=."
        )
    if facts.span > 12:
        found.append(
            f"The scales would span a factor 2^{facts.span:.0f}, which is a sign that the paths "
            f"counted are not the ones that matter."
        )
    return found


def _rate(facts: Facts, verdict: str) -> str:
    if verdict != LIKELY:
        return "as without conditioning."
    return (
        "search again, a factor 2 up and down: the best rate changed by 0.45 to 1 for "
        "autoencoders and by 1.5 for a classifier. The largest stable rate, which data=(loader, "
        "loss) measures, said which way (0.31 to 0.63, and 1.5)."
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
            f"search again around {measured.rate_factor:.2g} times the best rate before: so the "
            f"largest stable rate of plain SGD has changed."
        )
    return replace(measured, reasons=[*advice.reasons, reason], rate=rate)


_ADAPTIVE = ("adam", "lion", "adafactor", "rmsprop", "adagrad", "adadelta", "lamb")


def optimizer_kind(optimizer: torch.optim.Optimizer | str | None) -> str:
    """``"sgd"``, ``"adaptive"``, ``"muon"`` or ``"unknown"``, by an optimiser's name.

    Raises:
        ArgumentError: neither an optimiser, nor a name, nor None.
    """
    if optimizer is None:
        return "unknown"
    if not isinstance(optimizer, (str, torch.optim.Optimizer)):
        raise ArgumentError(
            f"optimizer must be a torch.optim.Optimizer, its name or None; found "
            f"{type(optimizer).__name__}."
        )
    name = (optimizer if isinstance(optimizer, str) else type(optimizer).__name__).lower()
    if "muon" in name:
        return "muon"
    if any(word in name for word in _ADAPTIVE):
        return "adaptive"
    return "sgd" if "sgd" in name or name == "momentum" else "unknown"


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


def _facts(model: nn.Module, group: RescalingGroup, report: ConditioningReport, kind: str) -> Facts:
    widths = _free_widths(group)
    names = [type(m).__name__.lower() for m in model.modules()]
    weights = max(sum(len(s.shape) > 1 for s in group.parameters.values()), 1)
    stand_ins = {**report.approximated, **report.unsupported}
    norms = [n for n in names if "norm" in n and "weightnorm" not in n and "spectral" not in n]
    batch = sum("batchnorm" in n for n in norms)
    functional = sum(c for n, c in stand_ins.items() if "rsqrt" in n or n.endswith("_norm"))
    scales = report.log2_scales
    return Facts(
        num_scales=group.num_scales,
        imbalance_before=report.imbalance_before,
        imbalance_after=report.imbalance_after,
        width_ratio=max(widths) / min(widths) if widths else 1.0,
        batch_norms=batch / weights,
        other_norms=max(len(norms) - batch, functional) / weights,
        convolutions=sum(len(s.shape) > 2 for s in group.parameters.values()) / weights,
        attention=any("attention" in n for n in (*names, *stand_ins)),
        optimizer=kind,
        span=float(scales.max() - scales.min()) if len(scales) else 0.0,
    )


def _free_widths(group: RescalingGroup) -> list[int]:
    """Output channels of every weight whose outputs can be rescaled one by one."""
    return [
        spec.shape[0]
        for spec in group.parameters.values()
        if len(spec.shape) > 1 and any(axes == (0,) for axes, _ in spec.components())
    ]
