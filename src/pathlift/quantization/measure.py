"""How much an error of every weight, bias and activation matters at the output, and ranges.

With independent errors of variance v_i the output's expected squared error is ``sum_i G_i v_i``,
``G_i = E |d out / d theta_i|^2`` over samples. One backward pass per sample with random signs ``u``
at the output gives ``(d u.out / d theta_i)^2``, whose expectation over u is that sum over outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathlift.capture.by_name import differentiable
from pathlift.capture.inputs import tensors_in
from pathlift.capture.program import Inputs, Program
from pathlift.capture.shown import seed
from pathlift.errors import ArgumentError
from pathlift.quantization.layers import Convolution, Weight
from pathlift.surroundings import plain_arithmetic

# Samples of the example inputs that sensitivities are averaged over at most, and how many
# derivatives are affordable in all (one sample always is). A longer search takes twice as many.
_MOST, _AFFORDABLE = 8, 1 << 23


@dataclass
class Measured:
    """What the objective is made of.

    Attributes:
        power: mean over samples of the output's squared norm.
        sensitivity: parameter name -> ``G``, of its shape, float32.
        inputs: weight name of a linear layer or convolution -> sensitivity and range (largest
            minus smallest value, zero included) of its input, per channel.
    """

    power: float = 0.0
    sensitivity: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@contextmanager
def _running(model: nn.Module) -> Iterator[None]:
    """Buffers are put back: what else a call may change, a capture has refused.

    Random numbers are those of a capture's first run.
    """
    kept = [(b, b.detach().clone()) for b in model.buffers()]
    tensors = (*model.parameters(), *model.buffers())
    cuda = {t.device for t in tensors if t.device.type == "cuda"}
    try:
        with plain_arithmetic(), torch.random.fork_rng(devices=cuda):
            seed(model)
            yield
    finally:
        with torch.no_grad():
            for buffer, values in kept:
                if not torch.equal(buffer, values):
                    buffer.copy_(values)


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The floating-point tensors that the model returns; the model is left as it was."""
    with torch.no_grad(), _running(model):
        out = model(*inputs.args, **inputs.kwargs)
        return [t.detach().clone() for t in floats(out)]


def squared_error(exact: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Sum of squared differences."""
    pairs = zip(exact, found, strict=True)
    return sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)


def floats(out: Any) -> list[Tensor]:
    """The floating-point tensors in what a model has returned."""
    return [t for t in tensors_in(out) if t.is_floating_point()]


def samples_of(inputs: Inputs, batch: int | None, entries: int, times: int = 1) -> list[Inputs]:
    """The first samples of a batch, one by one; the whole where samples can't be told apart.

    1 of them for a model of many ``entries``, up to 8 for a small one; ``times`` as many.
    """
    if batch is None:
        return [inputs]

    def one(tensor: Tensor, k: int) -> Tensor:
        return tensor[k : k + 1] if tensor.dim() and tensor.shape[0] == batch else tensor

    found = []
    number = times * min(_MOST, math.ceil(_AFFORDABLE / max(entries, 1)))
    for k in range(min(batch, number)):
        pick = lambda t, k=k: one(t, k)  # noqa: E731
        args, kwargs = pytree.tree_map_only(Tensor, pick, (inputs.args, inputs.kwargs))
        found.append(Inputs(args, kwargs))
    return found


def measure(
    model: nn.Module,
    program: Program,
    found: Sequence[Weight],
    names: Sequence[str],
    calibration: Sequence[Inputs],
    times: int = 1,
) -> Measured:
    """Sensitivities of the named parameters on the example inputs; with calibration, of inputs too.

    Args:
        model: in evaluation mode; left as it was.
        program: of the model as it is.
        found: its weights.
        names: parameters.
        calibration: batches over which the ranges of layers' inputs are taken; none: layers'
            inputs are not looked at.
        times: as many samples as otherwise.
    """
    measured = Measured()
    layers = layers_of(found) if calibration else []
    entries = sum(program.parameters[n].numel() for n in names)
    samples = samples_of(program.inputs, program.graphs[0].batch, entries, times)
    generator = torch.Generator().manual_seed(0)
    # The parameters themselves: a model may reach them by other ways than their names.
    leaves: dict[str, Tensor] = {n: program.parameters[n] for n in names}
    with torch.enable_grad(), _running(model), differentiable(leaves.values()):
        for sample in samples:
            _add_sample(model, leaves, sample, generator, layers, measured)
    measured.power /= len(samples)
    for gradient in measured.sensitivity.values():
        gradient /= len(samples)
    spans: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in calibration:
        with torch.no_grad(), _running(model), _inputs(layers) as seen:
            model(*batch.args, **batch.kwargs)
        for name, x, axis in seen:
            low, high = _span(x, axis)
            if name in spans:
                low, high = torch.minimum(low, spans[name][0]), torch.maximum(high, spans[name][1])
            spans[name] = low, high
    for name, (low, high) in spans.items():
        if name in measured.inputs:
            measured.inputs[name] = measured.inputs[name][0] / len(samples), high - low
    return measured


def _add_sample(
    model: nn.Module,
    leaves: dict[str, Tensor],
    sample: Inputs,
    generator: torch.Generator,
    layers: Sequence[Weight],
    found: Measured,
) -> None:
    with _inputs(layers) as seen:
        out = floats(model(*sample.args, **sample.kwargs))
    if not all(bool(torch.isfinite(t).all()) for t in out):
        raise ArgumentError(
            "the model's outputs on the example inputs are not all finite. Pass example inputs as "
            "the model gets them in use; their values are measured."
        )
    live = [(n, x, axis) for n, x, axis in seen if x.requires_grad]
    signs = [
        (torch.randint(0, 2, t.shape, generator=generator) * 2 - 1).to(t.device, t.dtype)
        for t in out
    ]
    wanted = [*leaves.values(), *(x for _, x, _ in live)]
    probe = sum((t * s).sum() for t, s in zip(out, signs, strict=True))
    if not isinstance(probe, Tensor) or not probe.requires_grad:
        raise ArgumentError("no weight of the model reaches an output; there is nothing to do.")
    gradients = torch.autograd.grad(probe, wanted, allow_unused=True)
    found.power += sum(float(t.detach().double().square().sum()) for t in out)
    for name, gradient in zip(leaves, gradients, strict=False):
        known = found.sensitivity.get(name)
        if gradient is not None:
            slope = gradient.detach().float()
            found.sensitivity[name] = (
                slope.square() if known is None else known.addcmul_(slope, slope)
            )
        elif known is None:
            found.sensitivity[name] = torch.zeros_like(leaves[name], dtype=torch.float32)
    for (name, _, axis), gradient in zip(live, gradients[len(leaves) :], strict=True):
        if gradient is not None:
            others = [d for d in range(gradient.dim()) if d != axis % gradient.dim()]
            total = gradient.detach().float().square().sum(others)
            old = found.inputs.get(name)
            found.inputs[name] = (total if old is None else old[0] + total, total)


def _span(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    others = [d for d in range(x.dim()) if d != axis % x.dim()]
    values = x.detach().float()
    return values.amin(others).clamp(max=0), values.amax(others).clamp(min=0)


def layers_of(found: Sequence[Weight]) -> list[Weight]:
    """The linear layers and convolutions, whose inputs are quantised where activations are."""
    return [w for w in found if type(w.module) is nn.Linear or isinstance(w.module, Convolution)]


@contextmanager
def _inputs(layers: Sequence[Weight]) -> Iterator[list[tuple[str, Tensor, int]]]:
    """Collects (weight name, input, channel dimension) of these layers."""
    seen: list[tuple[str, Tensor, int]] = []

    def note(one: Weight, x: Tensor) -> None:
        seen.append((one.name, x, 1 if isinstance(one.module, Convolution) else -1))

    with watched(layers, note):
        yield seen


@contextmanager
def watched(
    layers: Sequence[Weight], see: Callable[[Weight, Tensor], Tensor | None]
) -> Iterator[None]:
    """``see`` gets every input of these layers; what it returns takes the input's place."""
    hooks = []

    def watch(one: Weight) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x = args[0] if args else None
            if not isinstance(x, Tensor) or x.dim() < 2 or not x.is_floating_point():
                return None
            now = see(one, x)
            return None if now is None else (now, *args[1:])

        hooks.append(one.module.register_forward_pre_hook(hook))

    for one in layers:
        watch(one)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
