"""The rule behind :func:`pathlift.advise` and the last line of a report: does conditioning help?

The rule is one a person can read. It rests on runs whose table is docs/reproduced/when.json; every
number in a reason is from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from pathlift.errors import ArgumentError
from pathlift.report import ConditioningReport
from pathlift.symmetry.group import RescalingGroup

LIKELY, NOTHING, DONT = "likely to help", "nothing to do", "don't"
VERDICTS = (LIKELY, NOTHING, DONT)
# A fall of the imbalance per parameter below this has never shown in a loss.
SMALL_FALL = 0.05
# Widest hidden layer over narrowest, from which on widths count as changing.
CHANGING = 2.0
# The same, from which on a code is so narrow that few paths share most of their weights.
NARROW = 64.0
# Widest output over narrowest layer, from which on outputs count as wide, and from which on so wide
# that Adam's steps of one size don't make up for it.
WIDER, WIDE = 4.0, 16.0
# Norms per weight tensor, from which on a network counts as normalised.
NORMALISED = 0.25
# Share of weights with more than two axes, from which on a network counts as convolutional.
CONVOLUTIONAL = 0.5


@dataclass(frozen=True)
class Facts:
    """What is known of a model before it is trained.

    Attributes:
        num_scales: dimension of its rescaling group.
        imbalance_before: log(AM/GM) of the path kernel's diagonal, per parameter.
        imbalance_after: the same at the continuous optimum.
        width_ratio: widest layer whose channels can be rescaled, over the narrowest; 1 if none.
        output_ratio: widest output over the narrowest layer whose channels can be rescaled;
            infinite where either is not known.
        batch_norms: batch norms per weight tensor.
        other_norms: layer, RMS, group and such norms per weight tensor.
        convolutions: weights with more than two axes, per weight tensor.
        attention: whether attention is computed somewhere.
        optimizer: ``"sgd"``, ``"adaptive"`` (Adam and its kin), ``"muon"`` or ``"unknown"``.
        span: largest minus smallest log2 scale that conditioning applies.
        frozen: share of the parameter entries that are not trained.
    """

    num_scales: int
    imbalance_before: float
    imbalance_after: float
    width_ratio: float
    output_ratio: float = math.inf
    batch_norms: float = 0.0
    other_norms: float = 0.0
    convolutions: float = 0.0
    attention: bool = False
    optimizer: str = "unknown"
    span: float = 0.0
    frozen: float = 0.0

    @property
    def fall(self) -> float:
        """Of the imbalance, per parameter."""
        return self.imbalance_before - self.imbalance_after


class Finding(NamedTuple):
    """A verdict, why in a few words, and why in a sentence with the evidence."""

    verdict: str
    brief: str
    reason: str


def judged(facts: Facts) -> Finding:
    """The verdict on what is known: the first rule that applies decides."""
    for rule in _RULES:
        found = rule(facts)
        if found is not None:
            return found
    if math.isfinite(facts.output_ratio):
        brief = f"outputs {facts.output_ratio:.3g} times wider than a layer"
        what = f"Outputs are {facts.output_ratio:.3g} times wider than the narrowest layer"
    else:
        brief = f"widths change {facts.width_ratio:.3g} times"
        what = f"Widths change {facts.width_ratio:.3g} times"
    if facts.optimizer == "adaptive":
        return Finding(
            LIKELY,
            brief,
            f"{what}, more than Adam's steps of one size make up for: 7 of 7 such networks ended "
            f"5% to 15% lower with Adam or AdamW.",
        )
    return Finding(
        LIKELY,
        brief,
        f"{what}, and SGD has one rate for all layers: 20 of 21 such networks, which reconstruct "
        f"or complete images, ended 3% to 32% lower, each at its own best rate, which in half of "
        f"them is another one than without.",
    )


def in_one_line(facts: Facts, exact: bool) -> str:
    """The verdict and its reason in a few words; ``exact``: whether powers of two were applied."""
    verdict, brief, _ = judged(facts)
    more = ""
    if verdict == LIKELY:
        known = facts.optimizer in ("sgd", "adaptive")
        more = ("" if known else ", with SGD") + ("; exact=False helps more" if exact else "")
    return f"{verdict} ({brief}{more})"


def _nothing_moves(facts: Facts) -> Finding | None:
    if facts.num_scales == 0:
        return Finding(
            NOTHING,
            "no channel can be rescaled",
            "No channel can be rescaled without changing the function; rescaling_group(...)."
            "summary() says what pins each.",
        )
    return None


def _normalised(facts: Facts) -> Finding | None:
    if facts.attention or facts.other_norms >= NORMALISED:
        return Finding(
            DONT,
            "attention or norms decide the size of activations",
            "Attention or norms that act on every sample decide the size of activations here, "
            "which the path kernel does not see: a two-layer transformer on text with AdamW ended "
            "10% higher, at a sixteenth of its old best rate, and 31% higher at the old one, and "
            "with SGD 26% higher. With criterion='weight-norm' it ended where it does without.",
        )
    return None


def _behind_batch_norms(facts: Facts) -> Finding | None:
    if facts.batch_norms < NORMALISED or facts.convolutions >= CONVOLUTIONAL:
        return None
    brief = "batch norms divide a scale out again"
    if facts.width_ratio < CHANGING:
        return Finding(
            DONT,
            brief,
            "Batch norms divide a scale out again, which the path kernel does not see: of 5 "
            "networks of equal widths behind them 4 ended higher (3%, 4%, 35% and 42%), none "
            "lower.",
        )
    if facts.fall < SMALL_FALL:
        return None
    if facts.optimizer in ("adaptive", "muon"):
        return Finding(
            NOTHING,
            brief,
            "Batch norms divide a scale out again; networks behind them were tried with SGD alone.",
        )
    return Finding(
        LIKELY,
        f"widths change {facts.width_ratio:.3g} times behind batch norms: search the rate again",
        "Batch norms divide a scale out again, so that what changes most is the rate that is "
        "needed: 6 of 6 networks whose widths change ended lower (1%, 6%, 7%, 9%, 10% and 36%), "
        "at 0.5 to 5.1 times their old best rate; at the old one 2 ended 32% to 67% higher.",
    )


def _adaptive(facts: Facts) -> Finding | None:
    if facts.optimizer == "adaptive" and not WIDE <= facts.output_ratio < math.inf:
        return Finding(
            NOTHING,
            "Adam and its kin balance by themselves",
            f"Adam and its kin take steps of one size in every parameter, so they have balanced "
            f"most of what conditioning balances, but where outputs are {WIDE:g} times wider than "
            f"the narrowest layer: over 20 seeds at own best rates neither an autoencoder of "
            f"digits (3% lower) nor a classifier (6% higher) showed a difference, nor did 5 of 7 "
            f"others.",
        )
    if facts.optimizer == "muon":
        return Finding(
            NOTHING,
            "Muon takes steps of one size",
            "Muon takes steps of one size in every direction of a layer: an autoencoder showed no "
            "difference; a classifier with a bottleneck ended 98% lower, at training losses below "
            "1e-3 that its test loss did not follow.",
        )
    return None


def _convolutional(facts: Facts) -> Finding | None:
    if facts.convolutions < CONVOLUTIONAL:
        return None
    if facts.batch_norms < NORMALISED:
        return Finding(
            DONT,
            "most weights are convolutions, without norms",
            "Most weights are convolutions, without norms: of three such networks on digits none "
            "gained, one ended higher (3.2 times a loss of 7e-4), and all lost the rate that had "
            "been their best.",
        )
    return Finding(
        NOTHING,
        "most weights are convolutions",
        "Most weights are convolutions behind batch norms: two small ones on digits ended lower (a "
        "ResNet-18 of 6 channels over 3 seeds, a chain of 12 by 19%); none of a usual size has "
        "been tried.",
    )


def _level(facts: Facts) -> Finding | None:
    if facts.fall < SMALL_FALL:
        return Finding(
            NOTHING,
            "little to balance",
            f"The imbalance would fall from {facts.imbalance_before:.3f} to "
            f"{facts.imbalance_after:.3f} only; falls this small have never shown in a loss.",
        )
    return None


def _few_outputs(facts: Facts) -> Finding | None:
    if facts.width_ratio < CHANGING and not WIDER <= facts.output_ratio < math.inf:
        return Finding(
            NOTHING,
            "all widths are about equal",
            "All widths are about equal, so one rate suits all layers: of 6 such networks with "
            "SGD 1 ended lower and 1 higher, both by 1%, each at its own best rate.",
        )
    if facts.output_ratio < WIDER:
        return Finding(
            NOTHING,
            "no layer is much narrower than the outputs",
            f"Widths change {facts.width_ratio:.3g} times, but no layer is much narrower than the "
            f"outputs, as with most classifiers: of 16 such settings with SGD 5 ended lower (1%, "
            f"2%, 3%, 5% and 38%), each at its own best rate, 9 showed no difference, and 2 ended "
            f"higher (2% and 16%).",
        )
    return None


def _narrow(facts: Facts) -> Finding | None:
    if facts.width_ratio >= NARROW:
        return Finding(
            NOTHING,
            f"widths change {facts.width_ratio:.3g} times, to a narrow code",
            f"Widths change {facts.width_ratio:.3g} times: in so narrow a code few paths share "
            f"most of their weights, of which the path kernel's diagonal says least. Of 5 "
            f"autoencoders with codes of 2 and 4, 1 ended lower (5%) and none higher; with "
            f"criterion='weight-norm' 3 of 4 ended 3% to 12% lower, at their old best rates.",
        )
    return None


_RULES = (
    *(_nothing_moves, _normalised, _behind_batch_norms, _adaptive),
    *(_convolutional, _level, _few_outputs, _narrow),
)

_ADAPTIVE = (
    *("adam", "adan", "adopt", "lion", "adafactor", "adabelief", "adabound", "adahessian"),
    *("rmsprop", "adagrad", "adadelta", "lamb", "madgrad", "nadam", "novograd", "rprop", "mars"),
)


def optimizer_kind(optimizer: object) -> str:
    """``"sgd"``, ``"adaptive"``, ``"muon"`` or ``"unknown"``, by an optimiser's name.

    Args:
        optimizer: an optimiser, its name, a list of optimisers (the first with a known name
            counts) or None.

    Raises:
        ArgumentError: something else.
    """
    if optimizer is None:
        return "unknown"
    if isinstance(optimizer, Sequence) and not isinstance(optimizer, str):
        kinds = [optimizer_kind(one) for one in optimizer]
        return next((k for k in kinds if k != "unknown"), "unknown")
    # Accelerate's and Lightning's wrappers keep the optimiser they wrap in this attribute.
    optimizer = getattr(optimizer, "optimizer", optimizer)
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


def facts_of(
    structure: nn.Module,
    group: RescalingGroup,
    report: ConditioningReport,
    imbalance_after: float,
    optimizer: str,
) -> Facts:
    """What a report and the modules' names tell; nothing is run.

    Args:
        structure: the model; its parameters may be on the meta device.
        group: its group.
        report: of the path kernel's criterion.
        imbalance_after: at the continuous optimum, whatever was applied.
        optimizer: see :func:`optimizer_kind`.
    """
    widths, ends = _widths(group)
    names = [type(m).__name__.lower() for m in structure.modules()]
    weights = max(sum(len(s.shape) > 1 for s in group.parameters.values()), 1)
    stand_ins = {**report.approximated, **report.unsupported}
    norms = [type(m).__name__.lower() for m in structure.modules() if _normalises(m)]
    batch = sum("batchnorm" in n for n in norms)
    functional = sum(c for n, c in stand_ins.items() if "rsqrt" in n or n.endswith("_norm"))
    scales = report.log2_scales
    parameters = list(structure.parameters())
    entries = max(sum(p.numel() for p in parameters), 1)
    return Facts(
        num_scales=group.num_scales,
        imbalance_before=report.imbalance_before,
        imbalance_after=imbalance_after,
        width_ratio=max(widths) / min(widths) if widths else 1.0,
        output_ratio=max(ends) / min(widths) if widths and ends else math.inf,
        batch_norms=batch / weights,
        other_norms=max(len(norms) - batch, functional) / weights,
        convolutions=sum(len(s.shape) > 2 for s in group.parameters.values()) / weights,
        attention=any("attention" in n for n in (*names, *stand_ins)),
        optimizer=optimizer,
        span=float(scales.max() - scales.min()) if len(scales) else 0.0,
        frozen=sum(p.numel() for p in parameters if not p.requires_grad) / entries,
    )


def _normalises(module: nn.Module) -> bool:
    """Whether it is a norm, by its name; what only holds one (Conv2dNormActivation) is none."""
    name = type(module).__name__.lower()
    if "norm" not in name or "weightnorm" in name or "spectral" in name:
        return False
    return bool(module._parameters or module._buffers or not module._modules)


def _widths(group: RescalingGroup) -> tuple[list[int], list[int]]:
    """Channels of every weight whose outputs can be rescaled one by one, and of those whose can't.

    Vectors count with the former: behind a batch norm it is its gain and bias that can be, not the
    weight.
    """
    free, pinned = [], []
    for spec in group.parameters.values():
        # A single channel's scale is the whole tensor's.
        channels = (0,) if spec.shape[:1] != (1,) else ()
        if any(axes == channels for axes, _ in spec.components()):
            free.append(spec.shape[0])
        elif len(spec.shape) > 1:
            pinned.append(spec.shape[0])
    return free, pinned
