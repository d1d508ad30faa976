"""What is asked of :func:`pathlift.quantization.equalize_`, and the search for scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pathlift.capture.program import Program
from pathlift.errors import ArgumentError, unknown
from pathlift.quantization.formats import Format
from pathlift.quantization.layers import Convolution, Weight, channel_axis
from pathlift.quantization.measure import Measured
from pathlift.quantization.objective import STAGES, Errors
from pathlift.quantization.terms import Term, flattened, input_scales, term, thinned
from pathlift.solve.bounds import extent_bounds
from pathlift.solve.matrix import Array
from pathlift.symmetry.group import RescalingGroup
from pathlift.tensors.extents import extents

_BIASES = ("shrink", "ignore")
_RELU6 = ("keep", "relu", "per-channel")
# From this many steps on hardly an entry becomes 0; below, rounds of the search.
_FINE = 50.0
# Whatever weights are rounded to, activations (which range over biases) mostly have 8 bits.
_STEPS_OF_BIASES = 255.0
_ROUNDS = 3
# Powers of the sensitivities that are tried, and parts of the way to the least error; the latter
# also in models of no more entries than this, where one rounding is a draw and trying costs little.
_POWERS, _PARTS, _SMALL = (0.5, 0.0), (0.5, 0.75), 1 << 20
# How many sets of scales are drawn at most, and how many entries may be rounded for that in models
# that are not small, where steps are few or layers' inputs are rounded, too.
_DRAWS, _DRAWN = 32, 1 << 23


@dataclass(frozen=True)
class Asked:
    """The arguments of :func:`equalize_`, checked."""

    fold: bool
    biases: str
    relu6: str
    strength: float
    absorb: bool
    format: Format
    per: str
    thorough: bool = False

    def __post_init__(self) -> None:
        flags: dict[str, object] = {
            "fold": self.fold,
            "absorb": self.absorb,
            "thorough": self.thorough,
        }
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise ArgumentError(f"{name} must be True or False; found {flag!r}.")
        if self.biases not in _BIASES:
            raise unknown("biases", self.biases, _BIASES)
        if self.relu6 not in _RELU6:
            raise unknown("relu6", self.relu6, _RELU6)
        strength: object = self.strength
        number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
        if not number or not 0 <= self.strength <= 1:
            raise ArgumentError(f"strength must be a number from 0 to 1; found {strength!r}.")

    @property
    def coarse(self) -> bool:
        """Whether steps are so few that many entries become 0."""
        return self.format.steps < _FINE

    def further(self, found: Sequence[Weight]) -> bool:
        """Whether the search goes on: where that is asked for, or is cheap."""
        return self.thorough or _entries(found) <= _SMALL


def _entries(found: Sequence[Weight]) -> int:
    return sum(one.parameter.numel() for one in found)


def names_of(found: Sequence[Weight], group: RescalingGroup) -> list[str]:
    """The weights, and the biases beside them, that the captured model knows."""
    names = [n for one in found for n in (one.name, one.bias) if n in group.parameters]
    return list(dict.fromkeys(names))


def terms_of(
    found: Sequence[Weight], group: RescalingGroup, measured: Measured, asked: Asked
) -> list[Term]:
    """One term per weight, and per bias or layer's input where they count."""
    terms = []
    both = bool(measured.inputs)
    weigh = 2.0 * (1.0 - asked.strength) if both else 1.0
    steps, relative = asked.format.steps, asked.format.relative
    # Activations are not symmetric: twice as many steps over largest minus smallest.
    plain = 2.0 * steps + 1.0
    for one in found:
        name = one.name
        if name not in measured.sensitivity:
            continue
        spec, sensitivity = group.parameters[name], measured.sensitivity[name]
        if weigh:
            made = term(
                spec,
                "weight",
                one.parameter,
                sensitivity,
                steps=steps,
                factor=weigh,
                relative=relative,
                axis=one.axis(asked.per),
            )
            terms.append(made)
        if one.bias in measured.sensitivity and not both and asked.biases == "shrink":
            values, matters = one.module._parameters["bias"], measured.sensitivity[one.bias]
            assert values is not None
            spec = group.parameters[one.bias]
            terms.append(term(spec, "bias", values, matters, steps=_STEPS_OF_BIASES))
        if name in measured.inputs and asked.strength:
            groups = one.module.groups if isinstance(one.module, Convolution) else 1
            inner = None if channel_axis(one.module) == 1 else input_scales(spec, groups)
            if inner is not None:
                matters, span = measured.inputs[name]
                rouse = 2.0 * asked.strength
                terms.append(term(inner, "activation", span, matters, steps=plain, factor=rouse))
    return terms


def thinned_terms(
    found: Sequence[Weight],
    terms: Sequence[Term],
    group: RescalingGroup,
    measured: Measured,
    asked: Asked,
    scales: Array,
) -> list[Term]:
    """The terms with the entries left out that become 0 at these scales."""
    factors, by_name = group.factors(scales), {one.name: one for one in found}
    weigh = 2.0 * (1.0 - asked.strength) if measured.inputs else 1.0
    made = []
    for known in terms:
        if known.kind != "weight":
            made.append(known)
            continue
        one, name = by_name[known.name], known.name
        thin = thinned(
            known,
            group.parameters[name],
            one.parameter,
            measured.sensitivity[name],
            factors.get(name, ()),
            steps=asked.format.steps,
            factor=weigh,
            axis=one.axis(asked.per),
        )
        made.append(thin)
    return made


@dataclass
class Found:
    """What the search found.

    Attributes:
        scales: those worth trying.
        draws: how many more are worth drawing close by.
        evaluations: of the objective.
        errors: as predicted at given scales, per term.
    """

    scales: list[Array]
    draws: int
    evaluations: int
    errors: Callable[[Array], Errors]


def search(
    found: Sequence[Weight],
    group: RescalingGroup,
    measured: Measured,
    asked: Asked,
    limits: tuple[Array, Array],
) -> Found:
    """Scales of little error.

    Few steps (int4) round many entries to 0, whose errors no longer depend on the step. Which
    those are depends on the scales, so there the second stage counts the entries that become 0 at
    the first one's scales. In small models, and where it is asked for, the search goes on a few
    rounds in the same way. Errors are then no longer small, and the prediction is a guide only; so
    what is found for sensitivities that differ less (and for equal ones, which is about ranges
    alone) is worth trying, too. What one rounding makes of the predicted error is a draw, the wider
    the smaller the model.
    """
    plain = Errors(terms_of(found, group, measured, asked), group.basis)

    def errors(scales: Array) -> Errors:
        if not asked.coarse:
            return plain
        thin = thinned_terms(found, plain.terms, group, measured, asked, scales)
        return plain.replaced(thin)

    none = np.zeros(group.num_scales)
    result = Found([], 0, 0, errors)
    unscaled = plain.total(none)
    if not unscaled > 0 or not len(none):
        return result

    def add(of: Errors, start: Array, stages: Sequence[tuple[float, int]] = STAGES) -> Array:
        scales, evaluations = of.least(start, *limits, stages)
        result.evaluations += evaluations
        result.scales.append(scales)
        return scales

    if asked.coarse:
        scales, result.evaluations = plain.least(none, *limits, STAGES[:1])
        scales = add(errors(scales), scales, STAGES[1:])
    else:
        scales = add(plain, none)
        if plain.total(scales) >= unscaled:
            result.scales.clear()
            return result
    if not asked.further(found):
        return result
    entries = _entries(found)
    small = entries <= _SMALL
    if asked.coarse:
        for _ in range(_ROUNDS):
            scales = add(errors(scales), scales, STAGES[1:])
        for power in _POWERS:
            add(plain.replaced([flattened(t, power) for t in plain.terms]), none)
    if asked.coarse or small:
        result.scales += [part * scales for part in _PARTS]
    if small:
        result.draws = _DRAWS
    elif asked.coarse or measured.inputs:
        result.draws = min(_DRAWS, _DRAWN // entries)
    return result


def bounds(program: Program, group: RescalingGroup) -> tuple[Array, Array]:
    tensors = {**program.buffers, **program.parameters}
    moving = {n: tensors[n] for n, spec in group.parameters.items() if spec.terms}
    return extent_bounds(group, extents(moving))
