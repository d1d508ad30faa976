"""What is asked of :func:`pathlift.quantization.equalize_`, and the search for its scales."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor, nn

from pathlift.capture.program import Program
from pathlift.errors import ArgumentError, unknown
from pathlift.quantization.formats import Format
from pathlift.quantization.layers import Convolution, channel_axis, rounded_weights, weights
from pathlift.quantization.measure import Measured, run, squared_error
from pathlift.quantization.objective import Errors
from pathlift.quantization.terms import Term, input_scales, term
from pathlift.solve.bounds import extent_bounds
from pathlift.solve.matrix import Array
from pathlift.symmetry.group import RescalingGroup
from pathlift.tensors.extents import extents
from pathlift.tensors.rescale import rescale_

_BIASES = ("shrink", "ignore")
_RELU6 = ("keep", "relu", "per-channel")
# From this many steps on hardly an entry becomes 0; below, rounds of the search.
_FINE = 50.0
_ROUNDS = 3


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

    def __post_init__(self) -> None:
        flags: dict[str, object] = {"fold": self.fold, "absorb": self.absorb}
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


def names_of(model: nn.Module, group: RescalingGroup) -> list[str]:
    """The weights, and the biases beside them, that the captured model knows."""
    found = []
    for name, module, _ in weights(model):
        bias = name.rpartition(".")[0] + ".bias" if "." in name else "bias"
        has_bias = isinstance(module._parameters.get("bias"), Tensor)
        found += [n for n in (name, bias if has_bias else "") if n in group.parameters]
    return list(dict.fromkeys(found))


def terms_of(
    model: nn.Module,
    group: RescalingGroup,
    measured: Measured,
    asked: Asked,
    scales: Array | None = None,
) -> list[Term]:
    """One term per weight, and per bias or layer's input where they count.

    ``scales``: those at which entries are looked for that become 0.
    """
    found = []
    both = bool(measured.inputs)
    weigh = 2.0 * (1.0 - asked.strength) if both else 1.0
    steps, relative = asked.format.steps, asked.format.relative
    # Activations are not symmetric: twice as many steps over largest minus smallest.
    plain = 2.0 * steps + 1.0
    factors = None if scales is None else group.factors(scales)
    for name, module, parameter in weights(model):
        if name not in measured.sensitivity:
            continue
        spec, sensitivity = group.parameters[name], measured.sensitivity[name]
        axis = channel_axis(module) if asked.per == "channel" else None
        if weigh:
            one = term(
                group,
                spec,
                "weight",
                parameter,
                sensitivity,
                steps=steps,
                factor=weigh,
                relative=relative,
                axis=axis,
                moved=None if factors is None else factors.get(name, ()),
            )
            found.append(one)
        bias = f"{name.rpartition('.')[0]}.bias".lstrip(".")
        if bias in measured.sensitivity and not both and asked.biases == "shrink":
            values, matters = module._parameters["bias"], measured.sensitivity[bias]
            assert values is not None
            spec = group.parameters[bias]
            found.append(term(group, spec, "bias", values, matters, steps=plain))
        if name in measured.inputs and asked.strength:
            groups = module.groups if isinstance(module, Convolution) else 1
            inner = None if channel_axis(module) == 1 else input_scales(spec, groups)
            if inner is not None:
                matters, span = measured.inputs[name]
                rouse = 2.0 * asked.strength
                found.append(
                    term(group, inner, "activation", span, matters, steps=plain, factor=rouse)
                )
    return found


class Search:
    """The search for the scales of least error.

    Few steps (int4) round many entries to 0, whose errors no longer depend on the step. Which
    those are depends on the scales, so there the search goes on a few rounds, each with the
    entries that become 0 at the last one's scales. Errors are then no longer small, and the
    prediction is a guide only: of what the rounds have found, that is taken whose error, measured
    on the example inputs, is least.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        group: RescalingGroup,
        measured: Measured,
        asked: Asked,
    ) -> None:
        self.make = partial(terms_of, model, group, measured, asked)
        self.model, self.program, self.group, self.asked = model, program, group, asked
        self.coarse = asked.format.steps < _FINE
        self.evaluations = 0

    def errors(self, scales: Array) -> Errors:
        """The errors, with the entries that become 0 at these scales where steps are few."""
        return Errors(self.make(scales if self.coarse else None), self.group.num_scales)

    def least(self, lower: Array, upper: Array, exact: list[Tensor]) -> Array:
        """The best scales found; 0 where none are better. ``exact``: outputs on the example."""
        none = np.zeros(self.group.num_scales)
        plain = Errors(self.make(None), self.group.num_scales)
        if not plain.terms or not len(none):
            return none
        found, self.evaluations = plain.least(none, lower, upper)
        if not self.coarse:
            return found if plain.total(found) < plain.total(none) else none
        candidates = [none, found]
        for _ in range(_ROUNDS):
            found, evaluations = self.errors(found).least(found, lower, upper)
            self.evaluations += evaluations
            candidates.append(found)
        return min(candidates, key=lambda scales: self._measured(scales, exact))

    def _measured(self, scales: Array, exact: list[Tensor]) -> float:
        """Squared error of the outputs on the example, with weights rescaled and rounded."""
        tensors = {**self.program.buffers, **self.program.parameters}
        undo = rescale_(tensors, self.group.factors(scales))
        try:
            rounded = rounded_weights(self.model, self.asked.format, self.asked.per)
            return squared_error(exact, run(self.model, self.program.inputs, rounded))
        finally:
            undo()


def bounds(program: Program, group: RescalingGroup) -> tuple[Array, Array]:
    tensors = {**program.buffers, **program.parameters}
    moving = {n: tensors[n] for n, spec in group.parameters.items() if spec.terms}
    return extent_bounds(group, extents(moving))
