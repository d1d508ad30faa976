"""What conditioning does to a random initialisation, before any weight is drawn.

For independent zero-mean parameters a path's squared weight has the product of variances as its
expectation, so ``E g`` is one pass of the squared network over variances, and it is constant over
a layer of a fully connected or convolutional chain. The solution for ``E g`` then has one log2
scale per hidden layer (METHOD section 5; Lebeurrier, Vayer, Gribonval, ICML 2026).

In a chain without biases that solution has a closed form: every layer gets the same expected
squared Frobenius norm, whatever the scale of the initialisation (see :func:`expected_log2_scales`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch import Tensor, nn

from pathlift.capture.model import capture
from pathlift.capture.program import Program
from pathlift.criteria import Coefficients
from pathlift.errors import ArgumentError, PathliftError, unknown
from pathlift.lifting.lifted import diagonal
from pathlift.solve import solve
from pathlift.solve.assemble import assemble
from pathlift.solve.bounds import extent_bounds
from pathlift.symmetry.group import RescalingGroup, infer_group
from pathlift.tensors.extents import extents

Array = NDArray[np.float64]

_LN2 = math.log(2.0)

INITIALIZATIONS = ("pytorch", "kaiming_normal", "kaiming_uniform", "xavier", "orthogonal")
BIASES = ("pytorch", "zero", "none")


# --------------------------------------------------------------------------- chains of layers


def weight_variance(initialization: str, fan_in: int, fan_out: int, gain: float = 1.0) -> float:
    """Expected square of a weight; the standard deviation is multiplied by ``gain``.

    - ``"pytorch"``: ``nn.Linear`` and ``nn.Conv2d`` as constructed, uniform with variance
      ``1 / (3 fan_in)``;
    - ``"kaiming_normal"``, ``"kaiming_uniform"``: ``2 / fan_in`` (fan in, ReLU);
    - ``"xavier"``: ``2 / (fan_in + fan_out)``, normal or uniform;
    - ``"orthogonal"``: ``1 / max(fan_in, fan_out)``: semi-orthogonal, all singular values 1.

    The solution depends on the distribution through this number alone.

    Raises:
        ArgumentError: ``initialization`` is none of these.

    >>> from pathlift.theory import weight_variance
    >>> weight_variance("kaiming_normal", fan_in=64, fan_out=10)
    0.03125
    """
    variances = {
        "pytorch": 1 / (3 * fan_in),
        "kaiming_normal": 2 / fan_in,
        "kaiming_uniform": 2 / fan_in,
        "xavier": 2 / (fan_in + fan_out),
        "orthogonal": 1 / max(fan_in, fan_out),
    }
    if initialization not in variances:
        more = ", or one variance per layer"
        raise unknown("initialization", initialization, INITIALIZATIONS, more)
    return gain**2 * variances[initialization]


def expected_log2_scales(
    widths: Sequence[int],
    initialization: str | Sequence[float] = "pytorch",
    *,
    gain: float = 1.0,
    bias: str | Sequence[float] = "pytorch",
) -> Array:
    """The conditioning of a random fully connected network, one log2 scale per hidden layer.

    With widths ``n_0 … n_L``, weight variances ``v_l`` and bias variances ``u_l``, the expected
    squared path sums into and out of a unit of layer l are

        A_0 = 1,  A_l = n_{l-1} v_l A_{l-1} + u_l,      B_L = 1,  B_{l-1} = n_l v_l B_l,

    so ``E g = A_{l-1} B_l`` for its ``n_l n_{l-1}`` weights and ``B_l`` for its ``n_l`` biases.
    The scales minimise ``F(s) = p log(sum g') - sum log g'`` over the hidden layers, where weights
    take ``g' = g 2^(-2 (s_l - s_{l-1}))``, biases ``g' = g 2^(-2 s_l)``, and ``s_0 = s_L = 0``.

    Without biases ``n_l n_{l-1} A_{l-1} B_l`` is ``||Phi||^2 / v_l``, and the minimiser is

        s_l - s_{l-1} = -1/2 log2( n_l n_{l-1} v_l / geometric mean over layers ):

    all layers end with the same expected squared Frobenius norm, for any gain.

    Args:
        widths: ``n_0 … n_L``: inputs, hidden layers, outputs.
        initialization: a name (see :func:`weight_variance`) or the variances ``v_1 … v_L``.
        gain: factor of the weights' standard deviation (not of the biases').
        bias: ``"pytorch"`` (variance ``1 / (3 fan_in)``), ``"zero"`` (biases that start at 0: no
            path starts there, but they are parameters), ``"none"``, or variances ``u_1 … u_L``.

    Returns:
        ``(L - 1,)`` log2 scales of the hidden layers, as :func:`pathlift.condition_` finds them on
        average: weights of layer l are multiplied by ``2^(s_l - s_{l-1})``.

    Raises:
        ArgumentError: an argument has the wrong type or value.

    >>> from pathlift.theory import expected_log2_scales
    >>> len(expected_log2_scales((64, 128, 8, 64)))  # one for each hidden layer
    2
    """
    layers = _layers(widths, initialization, gain, bias)
    if layers.biases is None:
        return _balanced(layers)
    return _minimised(layers)


@dataclass(frozen=True)
class _Layers:
    """A chain: ``widths`` ``(L + 1,)``, ``weights`` and ``biases`` ``(L,)`` expected squares."""

    widths: Array
    weights: Array
    biases: Array | None

    @property
    def weight_counts(self) -> Array:
        return np.asarray(self.widths[1:] * self.widths[:-1])


def _layers(
    widths: Sequence[int],
    initialization: str | Sequence[float],
    gain: float,
    bias: str | Sequence[float],
) -> _Layers:
    sizes = list(widths)
    if len(sizes) < 2 or not all(isinstance(n, (int, np.integer)) and n > 0 for n in sizes):
        raise ArgumentError(
            f"widths must be at least two positive integers (inputs, hidden layers, outputs); "
            f"found {widths!r}."
        )
    if not isinstance(gain, (int, float)) or not 0 < gain < math.inf:
        raise ArgumentError(f"gain must be a positive number; found {gain!r}.")
    fans = list(itertools.pairwise(sizes))
    weights = (
        np.array([weight_variance(initialization, a, b, gain) for a, b in fans])
        if isinstance(initialization, str)
        else _variances("initialization", initialization, len(fans), positive=True) * gain**2
    )
    biases: Array | None
    if not isinstance(bias, str):
        biases = _variances("bias", bias, len(fans), positive=False)
    elif bias not in BIASES:
        raise unknown("bias", bias, BIASES, ", or variances")
    else:
        share = {"pytorch": 1 / 3, "zero": 0.0, "none": None}[bias]
        biases = None if share is None else np.array([share / a for a, _ in fans])
    return _Layers(np.array(sizes, dtype=np.float64), weights, biases)


def _variances(name: str, values: Sequence[float], count: int, positive: bool) -> Array:
    found = np.asarray(values, dtype=np.float64)
    low = bool((found <= 0).any() if positive else (found < 0).any())
    if found.shape != (count,) or low or not np.isfinite(found).all():
        raise ArgumentError(
            f"{name} must be a name or {count} {'positive' if positive else 'non-negative'} "
            f"variances, one per layer; found {values!r}."
        )
    return found


def _balanced(layers: _Layers) -> Array:
    """No biases: equal expected squared Frobenius norms."""
    norms = np.log2(layers.weight_counts * layers.weights)
    return np.asarray(np.cumsum(0.5 * (norms.mean() - norms))[:-1])


def _log2_diagonal(layers: _Layers) -> tuple[Array, Array]:
    """``log2 E g`` of weights and of biases, per layer. In logarithms no depth overflows."""
    fan_in, fan_out = layers.widths[:-1], layers.widths[1:]
    with np.errstate(divide="ignore"):
        bias = (
            np.log2(layers.biases) if layers.biases is not None else np.full(len(fan_in), -np.inf)
        )
    entering = np.log2(fan_in * layers.weights)
    below = [0.0]
    for gained, started in zip(entering, bias, strict=True):
        below.append(float(np.logaddexp2(below[-1] + gained, started)))
    leaving = np.log2(fan_out * layers.weights)
    above = np.append(np.cumsum(leaving[:0:-1])[::-1], 0.0)
    return np.array(below[:-1]) + above, above


def _minimised(layers: _Layers) -> Array:
    """The layer-wise problem.

    ``sum log g'`` and ``sum g'`` may differ by thousands of bits between layers. So it is
    approached through roots: with ``u = s / 2^k`` and ``g^(1 / 2^k)`` the problem has the same
    form and is easy for large k; each solution, doubled, starts the next one.
    """
    depth = len(layers.weights)
    if depth == 1:
        return np.zeros(0)
    logs = _LN2 * np.concatenate(_log2_diagonal(layers))
    counts = np.concatenate([layers.weight_counts, layers.widths[1:]])
    step = np.eye(depth)
    exponents = np.vstack([step - np.eye(depth, k=-1), step])[:, :-1]
    point = np.zeros(depth - 1)
    for k in range(math.ceil(math.log2(max(float(np.ptp(logs)), 1.0))), -1, -1):
        point = _minimiser(counts, logs * 0.5**k, exponents, 2.0 * point)
    return point


def _minimiser(counts: Array, logs: Array, exponents: Array, start: Array) -> Array:
    """Minimise ``F / p = log sum c g' + 2 ln2 (E^T c) . s / p`` from ``start``.

    ``counts`` c and ``logs`` ln g: ``(kinds,)``, one kind of parameter per layer; ``exponents`` E:
    ``(kinds, H)``.
    """
    shares = counts / counts.sum()
    offsets = logs + np.log(counts)

    def weighted(s: Array) -> tuple[float, Array]:
        terms = offsets - 2 * _LN2 * (exponents @ s)
        top = float(terms.max())
        sizes = np.exp(terms - top)
        return top + math.log(float(sizes.sum())), np.asarray(sizes / sizes.sum())

    def value(s: Array) -> float:
        return weighted(s)[0] + 2 * _LN2 * float(shares @ exponents @ s)

    def gradient(s: Array) -> Array:
        return np.asarray(2 * _LN2 * exponents.T @ (shares - weighted(s)[1]))

    def hessian(s: Array) -> Array:
        w = weighted(s)[1]
        mean = exponents.T @ w
        spread = exponents.T @ (w[:, None] * exponents) - np.outer(mean, mean)
        return np.asarray(4 * _LN2**2 * spread)

    found = optimize.minimize(
        value,
        start,
        jac=gradient,
        hess=hessian,
        method="trust-exact",
        options={"gtol": 1e-11, "maxiter": 500},
    )
    return _polished(np.asarray(found.x), gradient, hessian)


def _polished(
    point: Array, gradient: Callable[[Array], Array], hessian: Callable[[Array], Array]
) -> Array:
    """Newton steps while the gradient falls: near the minimum the value has no digits left."""
    size = float(np.abs(gradient(point)).max())
    for _ in range(4):
        trial = point - np.linalg.lstsq(hessian(point), gradient(point), rcond=None)[0]
        new = float(np.abs(gradient(trial)).max())
        if not new < size:
            break
        point, size = trial, new
    return point


# --------------------------------------------------------------------------- any network


def mean_squares(model: nn.Module) -> dict[str, float]:
    """Mean of the squares of each parameter tensor: the expected squares, read off a sample.

    Exact where all entries are equal (fresh norm layers); elsewhere good to about
    ``sqrt(2 / entries)``. Tied parameters stand under their first name.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(2), model[2].weight.fill_(3)
    >>> x = torch.zeros(1, 1)
    >>> pathlift.theory.mean_squares(model)
    {'0.weight': 4.0, '2.weight': 9.0}
    """
    return {
        n: float(p.detach().to(torch.float64).square().mean()) if p.numel() else 0.0
        for n, p in model.named_parameters()
        if p.is_floating_point()
    }


def expected_diagonal(
    model: nn.Module,
    example_inputs: object,
    squares: Mapping[str, float | Tensor] | None = None,
) -> dict[str, Tensor]:
    """``E g``, the expected diagonal of ``G = dPhi^T dPhi`` over independent random parameters.

    The squared network (METHOD section 2) on expected squares. Exact where entries of different
    tensors are independent and no path passes a tensor twice; within a tensor they may depend on
    each other (orthogonal matrices), because a path takes one entry of it.

    Args:
        model: gives the graph and the shapes; its parameters' values are used only where
            ``squares`` does not name them.
        example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
        squares: parameter name -> expected square, a number or a tensor that broadcasts to the
            parameter. Parameters not named, or all if None: :func:`mean_squares` of the model.

    Returns:
        parameter name -> float64 tensor of the parameter's shape, on the CPU.

    Raises:
        UnsupportedOperationError: an operation without paths (softmax, GELU …).
        PathliftError: the values exceed float64 (:func:`predict_log2_scales` has no such limit).
        ArgumentError: ``squares`` names an unknown parameter or holds a negative value.
        CaptureError: see :func:`pathlift.rescaling_group`.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(2), model[2].weight.fill_(3)
    >>> x = torch.zeros(1, 1)
    >>> expected = pathlift.theory.expected_diagonal(model, x, {"0.weight": 4.0, "2.weight": 9.0})
    >>> {n: float(g) for n, g in expected.items()}
    {'0.weight': 9.0, '2.weight': 4.0}
    """
    captured = capture(model, example_inputs, both=False)
    program = _expected_program(captured, squares)
    values, shift, _ = diagonal(program, program.training)
    peak = max((float(g.max()) for g in values.values() if g.numel()), default=0.0)
    if peak > 0 and math.log2(peak) + shift >= 1024:
        raise PathliftError(
            f"the expected diagonal reaches 2**{math.log2(peak) + shift:.0f}, beyond float64. "
            f"predict_log2_scales works up to a common factor and needs no such number."
        )
    half = int(shift) // 2  # in two steps: either factor alone stays in range
    return {n: g * 2.0**half * 2.0 ** (int(shift) - half) for n, g in values.items()}


def predict_log2_scales(
    model: nn.Module,
    example_inputs: object,
    squares: Mapping[str, float | Tensor] | None = None,
    *,
    tol: float = 1e-8,
) -> Tensor:
    """The log2 scales that conditioning is expected to find, from second moments alone.

    Solves the problem of :func:`pathlift.condition_` for :func:`expected_diagonal` in place of
    ``g``. Channels of one layer that the architecture does not tell apart get one scale. What a
    sample adds to it is its fluctuation around its own second moments, which is larger the fewer
    entries meet in a channel.

    Args:
        model, example_inputs, squares: see :func:`expected_diagonal`. Smooth activations are
            passed like the identity, as in :func:`pathlift.condition_`.
        tol: bound on the certificate ``max |dF/ds| / p``.

    Returns:
        ``(num_scales,)`` float64, not rounded, for ``rescaling_group(model, inputs).rescale_``.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> pathlift.theory.predict_log2_scales(model, x).shape
    torch.Size([32])
    """
    captured = capture(model, example_inputs)
    program = _expected_program(captured, squares)
    values, _, _ = diagonal(program, program.training, strict=False)
    return torch.from_numpy(_solved(infer_group(captured), captured, values, tol))


def _solved(
    group: RescalingGroup, program: Program, values: Mapping[str, Tensor], tol: float
) -> Array:
    moving = {n: program.parameters[n] for n, s in group.parameters.items() if s.terms}
    lower, upper = extent_bounds(group, extents(moving))
    trainable = {n: p.requires_grad for n, p in program.parameters.items()}
    asked = Coefficients(dict(values))
    return solve(
        assemble(group, asked, trainable, lower=lower, upper=upper).problem, "newton", tol
    ).log2_scales


def _expected_program(program: Program, squares: Mapping[str, float | Tensor] | None) -> Program:
    """The same graph with every parameter replaced by the root of its expected square."""
    given = dict(squares or {})
    unknown = sorted(set(given) - set(program.parameters))
    if unknown:
        raise ArgumentError(
            f"squares names '{unknown[0]}', which is no parameter of the model; it has "
            f"{', '.join(map(repr, list(program.parameters)[:5]))} …. Tied parameters stand under "
            f"their first name."
        )
    parameters = {
        name: _root(name, p, given.get(name)) if p.is_floating_point() else p
        for name, p in program.parameters.items()
    }
    return replace(program, parameters=parameters)


def _root(name: str, parameter: nn.Parameter, square: float | Tensor | None) -> nn.Parameter:
    if square is None:
        value = parameter.detach().to("cpu", torch.float64).square().mean()
    else:
        value = torch.as_tensor(square, dtype=torch.float64).detach().cpu()
    if not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
        raise ArgumentError(
            f"the expected square of '{name}' is negative or not finite. Pass a finite, "
            f"non-negative number or tensor."
        )
    try:
        filled = value.sqrt().expand(parameter.shape)
    except RuntimeError as error:
        raise ArgumentError(
            f"the expected square of '{name}' has shape {tuple(value.shape)}, which does not "
            f"broadcast to {tuple(parameter.shape)}."
        ) from error
    return nn.Parameter(filled.clone(), requires_grad=parameter.requires_grad)
