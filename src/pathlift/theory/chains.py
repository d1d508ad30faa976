"""Chains of layers: one log2 scale per hidden layer, from widths and variances alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from pathlift.errors import ArgumentError, unknown

Array = NDArray[np.float64]

_LN2 = math.log(2.0)

INITIALIZATIONS = ("pytorch", "kaiming_normal", "kaiming_uniform", "xavier", "orthogonal")
BIASES = ("pytorch", "zero", "none")


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
