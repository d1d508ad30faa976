"""Folding batch norms and absorbing high biases: what cross-layer equalization is used with.

Nagel, van Baalen, Blankevoort, Welling, "Data-free quantization through weight equalization and
bias correction" (ICCV 2019), sections 4.1.1 and 4.1.2: batch norms are folded into the layers in
front of them, ranges are equalised (``condition_(model, x, criterion="range")``), and what a
pre-activation exceeds zero by almost always is moved from a layer's bias into the next one's.

Unlike everything else here this may change the function: where a pre-activation is below what was
taken from it, ReLU cuts off a different part. With ``sigmas=3`` that is 0.13 % of a Gaussian.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pathlift.capture.model import capture
from pathlift.capture.names import check_model, named_tensors
from pathlift.capture.program import Call, Graph, Program, Symbol, symbols_in
from pathlift.errors import ArgumentError
from pathlift.operations.normalization import epsilon, is_batch_norm
from pathlift.surroundings import apart
from pathlift.symmetry.group import RescalingGroup

# Name of a bias -> mean and standard deviation of the pre-activation it is part of, per channel.
Statistics = dict[str, tuple[Tensor, Tensor]]

_CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d", "convolution"))
_LINEAR = _CONVOLUTIONS | {"linear"}
_TRANSPARENT = frozenset(
    ("dropout", "feature_dropout", "alpha_dropout", "clone", "detach", "alias")
)
_OPERANDS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class _Layer:
    """A linear layer or convolution whose weight and bias are parameters used nowhere else."""

    call: Call
    weight: str
    bias: str | None


@apart
def fold_batch_norms_(model: nn.Module, example_inputs: object) -> Statistics:
    """Fold every batch norm into the layer in front of it, in place, in evaluation mode.

    ``w' = w gamma / sqrt(var + eps)`` and ``b' = beta + (b - mean) gamma / sqrt(var + eps)``. An
    ``nn.Identity`` takes the batch norm's place, and a layer without bias gets one. A batch norm
    that does not directly follow a linear layer or convolution of its own stays.

    Args:
        model: in evaluation mode.
        example_inputs: as for :func:`pathlift.condition_`.

    Returns:
        bias name -> mean ``beta`` and deviation ``|gamma|`` of the folded layer's output, per
        channel, of the bias's dtype: what the batch norm says of its own output.

    Raises:
        ArgumentError: the model is in training mode.
        ArgumentError, CaptureError: see :func:`pathlift.condition_`.
    """
    model = check_model(model)
    if model.training:
        raise ArgumentError(
            "batch norms can be folded in evaluation mode only, and the model is in training "
            "mode. Call model.eval() first."
        )
    return fold_captured_(model, capture(model, example_inputs, both=False))[0]


@dataclass(frozen=True)
class Fold:
    """One batch norm that goes into the layer in front of it.

    Attributes:
        weight, bias: names of the layer's, the bias's as it will be.
        has_bias: whether it has one already.
        place: path of the batch norm.
        factor: (O,), by which the rows of the weight are multiplied.
        folded: (O,), the bias that the layer gets.
        mean, deviation: (O,), of the layer's output as the batch norm says.
    """

    weight: str
    bias: str
    has_bias: bool
    place: str
    factor: Tensor
    folded: Tensor
    mean: Tensor
    deviation: Tensor

    @property
    def host(self) -> str:
        """Path of the layer."""
        return self.weight.rpartition(".")[0]

    def fold(self, rows: Tensor) -> Tensor:
        """Some rows of the weight, folded, in their dtype; ``factor`` must be theirs."""
        return (rows * self.factor.reshape(-1, *(1,) * (rows.dim() - 1))).to(rows.dtype)


def find_folds(model: nn.Module, program: Program, value: Callable[[str], Tensor]) -> list[Fold]:
    """The batch norms that can be folded.

    Args:
        value: the values of a parameter or buffer by its name; vectors alone are asked for.
    """
    graph = program.graphs[0]
    reads = _reads(graph)
    layers = _layers(graph, reads)
    found = []
    for call in graph.calls:
        layer = layers.get(call["input"]) if is_batch_norm(call) else None
        if layer is None or len(graph.uses[call["input"]]) > 1 or call["input"] in graph.leaving:
            continue
        place = _owner(model, graph, call, reads)
        path = layer.weight.rpartition(".")[0]
        host = model.get_submodule(path)
        if place is None or (layer.bias is None and host._parameters.get("bias", 0) is not None):
            continue
        gamma, beta, mean, var = (_operand(graph, call[k], value) for k in _OPERANDS)
        assert mean is not None and var is not None
        gamma = torch.ones_like(mean) if gamma is None else gamma
        beta = torch.zeros_like(mean) if beta is None else beta
        bias = value(layer.bias).detach() if layer.bias else torch.zeros_like(mean)
        factor = gamma / (var + epsilon(call)).sqrt()
        name = layer.bias or ".".join(filter(None, [path, "bias"]))
        one = Fold(
            layer.weight,
            name,
            layer.bias is not None,
            place,
            factor,
            folded=beta + (bias - mean) * factor,
            mean=beta.clone(),
            deviation=gamma.abs(),
        )
        found.append(one)
    return found


def fold_captured_(model: nn.Module, program: Program) -> tuple[Statistics, Program]:
    """:func:`fold_batch_norms_` of a model whose program is known.

    Returns:
        The statistics, and the program of the folded model: what a new capture would find but for
        the counters of batches, which nothing reads.
    """
    tensors: dict[str, Tensor] = {**program.parameters, **program.buffers}
    # Everything is computed before anything is changed.
    folds = find_folds(model, program, tensors.__getitem__)
    weights = [one.fold(program.parameters[one.weight].detach()) for one in folds]
    with torch.no_grad():
        for one, weight in zip(folds, weights, strict=True):
            program.parameters[one.weight].copy_(weight)
            if one.has_bias:
                tensors[one.bias].copy_(one.folded)
    put_folded_(model, folds)
    parameters, buffers, aliases = named_tensors(model)
    biases = {one.weight: one.bias for one in folds}
    graphs = tuple(_folded(g, biases, parameters) for g in program.graphs)
    named = replace(program, parameters=parameters, buffers=buffers, aliases=aliases)
    statistics = {one.bias: (one.mean, one.deviation) for one in folds}
    return statistics, replace(named, graphs=graphs)


def put_folded_(model: nn.Module, folds: Sequence[Fold]) -> None:
    """Give layers without a bias theirs, and put ``nn.Identity`` in the place of batch norms."""
    for one in folds:
        host = model.get_submodule(one.host)
        if not one.has_bias:
            weight = host._parameters[one.weight.rpartition(".")[2]]
            assert weight is not None
            values = one.folded.to(weight.device, weight.dtype)
            host.bias = nn.Parameter(values, weight.requires_grad)
        parent, _, child = one.place.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())


def _folded(graph: Graph, biases: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Graph:
    """The graph with the batch norms behind these layers' weights taken out.

    ``biases``: name of the layer's weight -> of its bias; one that the graph does not know gets a
    symbol.
    """
    layers = {s: one for s, one in _layers(graph, _reads(graph)).items() if one.weight in biases}
    gone = {c: layers[c["input"]] for c in graph.calls if is_batch_norm(c) and c["input"] in layers}
    behind = {layer.call: norm for norm, layer in gone.items()}
    names = dict(graph.tensors)
    calls = []
    for call in graph.calls:
        if call in gone:
            continue
        if call in behind:
            # The layer itself makes what the batch norm made.
            bias = call["bias"]
            if bias is None:
                name = biases[names[call["weight"]]]
                bias = Symbol(tensors[name].shape, tensors[name].dtype)
                names[bias] = name
            outputs = (behind[call].output,)
            call = replace(call, arguments={**call.arguments, "bias": bias}, outputs=outputs)
        calls.append(call)
    made = {s for c in gone for s in symbols_in(c.outputs)} - {c.output for c in gone}
    leaving = {s: why for s, why in graph.leaving.items() if s not in made}
    return replace(graph, calls=tuple(calls), tensors=names, leaving=leaving)


def rescaled_statistics(
    statistics: Mapping[str, tuple[Tensor, Tensor]], group: RescalingGroup, log2_scales: Tensor
) -> Statistics:
    """The statistics after ``group.rescale_``: a pre-activation is scaled like its bias."""
    exponents = group.parameter_exponents(group.variables(log2_scales))
    found = {}
    for name, (mean, deviation) in statistics.items():
        factor = torch.ones((), dtype=torch.float64)
        for exponent in exponents.get(name, ()):
            factor = factor * torch.exp2(exponent)
        found[name] = (mean * factor.to(mean), deviation * factor.to(deviation))
    return found


@apart
def absorb_biases_(
    model: nn.Module,
    example_inputs: object,
    statistics: Mapping[str, tuple[Tensor, Tensor]],
    sigmas: float = 3.0,
    padding: str = "refuse",
) -> dict[str, int]:
    """Move what pre-activations exceed zero by from a layer's bias into the next layers' biases.

    ``c = max(0, mean - sigmas deviation)`` per channel; ``b -= c`` in front of the ReLU and
    ``b += W c`` (summed over kernel positions) in every layer that reads it. Exact for inputs with
    all pre-activations of the channel at ``c`` or above.

    Args:
        model, example_inputs: as for :func:`pathlift.condition_`.
        statistics: bias name -> mean and deviation per channel, as :func:`fold_batch_norms_` and
            :func:`rescaled_statistics` return them.
        sigmas: deviations that stay above zero, non-negative.
        padding: ``"refuse"`` leaves layers alone that feed a convolution padded with zeros (its
            border would be wrong), ``"ignore"`` takes the border's error, as the publication does.

    Returns:
        bias name -> channels that were changed, for every layer of ``statistics`` that qualifies.

    Raises:
        ArgumentError: a wrong argument, or statistics of something that is not a layer's bias.
    """
    model = check_model(model)
    if isinstance(sigmas, bool) or not isinstance(sigmas, (int, float)) or not sigmas >= 0:
        raise ArgumentError(f"sigmas must be a number of at least 0; found {sigmas!r}.")
    if padding not in ("refuse", "ignore"):
        raise ArgumentError(f"padding must be 'refuse' or 'ignore'; found {padding!r}.")
    return absorb_captured_(capture(model, example_inputs, both=False), statistics, sigmas, padding)


def absorb_captured_(
    program: Program,
    statistics: Mapping[str, tuple[Tensor, Tensor]],
    sigmas: float = 3.0,
    padding: str = "refuse",
) -> dict[str, int]:
    """:func:`absorb_biases_` of a model whose program is known."""
    graph, parameters = program.graphs[0], program.parameters
    behind = _layers(graph, _reads(graph))
    layers = {layer.bias: layer for layer in behind.values() if layer.bias}
    for name, (mean, deviation) in statistics.items():
        if name not in layers:
            raise ArgumentError(
                f"statistics has an entry '{name}', which is not the bias of one linear layer or "
                f"convolution. Give the names that fold_batch_norms_ returns."
            )
        shape = parameters[name].shape
        if mean.shape != shape or deviation.shape != shape:
            raise ArgumentError(
                f"statistics['{name}'] has shapes {tuple(mean.shape)} and "
                f"{tuple(deviation.shape)}; the bias has {tuple(shape)}."
            )
    changes: dict[str, Tensor] = {}
    found: dict[str, int] = {}
    for name, (mean, deviation) in statistics.items():
        readers = _readers(graph, behind, layers[name], padding)
        if readers is None:
            continue
        excess = (mean - sigmas * deviation).clamp(min=0).to(torch.float64)
        found[name] = int(torch.count_nonzero(excess))
        taken = changes.get(name, torch.zeros_like(excess))
        changes[name] = taken - excess
        for reader in readers:
            assert reader.bias is not None
            weight = parameters[reader.weight].detach().to(torch.float64)
            moved = _through(weight, excess)
            changes[reader.bias] = changes.get(reader.bias, torch.zeros_like(moved)) + moved
    with torch.no_grad():
        for name, change in changes.items():
            bias = parameters[name]
            bias.copy_(bias.to(torch.float64) + change.to(bias.device))
    return found


def _through(weight: Tensor, constant: Tensor) -> Tensor:
    """What a layer makes of an input that is ``constant`` per channel, everywhere."""
    outputs, inputs = weight.shape[:2]
    groups = constant.numel() // inputs
    summed = weight.flatten(2).sum(-1) if weight.dim() > 2 else weight
    parts = summed.reshape(groups, outputs // groups, inputs)
    return torch.einsum("goi,gi->go", parts, constant.reshape(groups, inputs)).reshape(-1)


def _layers(graph: Graph, reads: Mapping[str, int]) -> dict[Symbol, _Layer]:
    """Output -> the layer that makes it. ``reads``: see :func:`_reads`."""
    found = {}
    for call in graph.calls:
        if call.name not in _LINEAR or call.arguments.get("transposed"):
            continue
        weight, bias = call["weight"], call["bias"]
        name, other = graph.tensors.get(weight), graph.tensors.get(bias)
        names = [n for n in (name, other) if n is not None]
        if name is None or (bias is not None and other is None):
            continue
        if sum(reads[n] for n in names) == len(names):
            found[call.output] = _Layer(call, name, other)
    return found


def _reads(graph: Graph) -> Counter[str]:
    """Name of a tensor -> how many times it is read."""
    found: Counter[str] = Counter()
    for symbol, name in graph.tensors.items():
        found[name] += len(graph.uses.get(symbol, ()))
    return found


def _readers(
    graph: Graph, layers: Mapping[Symbol, _Layer], layer: _Layer, padding: str
) -> list[_Layer] | None:
    """The layers that read ``relu`` of this one's output, or None if anything else does."""
    found: list[_Layer] = []
    waiting = [(layer.call.output, False)]
    while waiting:
        symbol, rectified = waiting.pop()
        if symbol in graph.leaving:
            return None
        for user in graph.uses.get(symbol, ()):
            reader = layers.get(user.output)
            if user.name in _TRANSPARENT:
                waiting.append((user.output, rectified))
            elif user.name == "relu":
                waiting.append((user.output, True))
            elif rectified and reader and reader.bias and user["input"] is symbol:
                if padding == "refuse" and _is_padded(user):
                    return None
                found.append(reader)
            else:
                return None
    return found or None


def _operand(graph: Graph, operand: object, value: Callable[[str], Tensor]) -> Tensor | None:
    """The parameter or buffer that a batch norm reads; None where it has none."""
    return value(graph.tensors[operand]).detach() if isinstance(operand, Symbol) else None


def _owner(model: nn.Module, graph: Graph, call: Call, reads: Mapping[str, int]) -> str | None:
    """Path of the module whose only work is this batch norm, or None if there is none."""
    values = [call[k] for k in _OPERANDS if isinstance(call[k], Symbol)]
    names = [graph.tensors.get(v, "") for v in values]
    paths = {name.rpartition(".")[0] for name in names}
    if len(names) < 2 or len(paths) != 1 or sum(reads[n] for n in names) > len(names):
        return None
    path = paths.pop()
    module = model.get_submodule(path)
    own = [n for n, _ in [*module.named_parameters(), *module.named_buffers()]]
    spare = {n.rpartition(".")[2] for n in names} | {"num_batches_tracked"}
    if not path or not spare.issuperset(own) or any(True for _ in module.children()):
        return None
    return path


def _is_padded(call: Call) -> bool:
    padding = call.arguments.get("padding", 0)
    if isinstance(padding, str):
        return padding != "valid"
    sizes = padding if isinstance(padding, (list, tuple)) else [padding]
    return any(bool(p) for p in sizes)
