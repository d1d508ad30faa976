"""The path lifting by definition: every path of a small network, its Jacobian and its kernel.

A path starts at an input coordinate, at a bias or at a constant and ends at an output coordinate;
its weight ``Phi_path`` is the product of the fixed coefficients and parameters along it (METHOD
section 2; Gonon et al., ICLR 2024). Everything here needs memory in proportion to the number of
paths, so it serves small networks: to look at a whole spectrum, or to check what the passes in
:mod:`pathlift.lifting.lifted` compute without listing.

How it lists: an activation is a table of paths, sorted by the element they end in
(:mod:`pathlift.lifting.tables`). Every operation becomes index triples "output element, left
element, right element, coefficient", and one join of two tables on them
(:mod:`pathlift.operations`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from pathlift.capture.model import capture
from pathlift.capture.program import Call, Graph, Program, Symbol
from pathlift.capture.walk import walk
from pathlift.errors import ArgumentError, PathliftError, UnsupportedOperationError
from pathlift.lifting.lifted import lifted_pass
from pathlift.lifting.tables import (
    UNKNOWN,
    Array,
    Indices,
    Listing,
    Table,
    constant,
    first_sample,
    leaf,
    stacked,
)
from pathlift.operations.table import TABLE, NoPaths, Undescribed, described

# A dense Jacobian may have this many entries (2 GiB).
_MAX_DENSE_ENTRIES = 2**28


@dataclass(frozen=True)
class Paths:
    """All paths of a network, one sample.

    Attributes:
        coefficients: ``(paths,)``, product of the fixed coefficients along each path.
        entries: ``(paths, longest)``, indices of the parameter entries along each path; -1 fills
            up. A parameter that the path passes m times stands there m times.
        theta: ``(parameters,)``, all floating-point parameters, flattened and joined, in float64.
        columns: parameter name -> its part of ``theta``; tied parameters stand under their first
            name.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(2), model[2].weight.fill_(3)
    >>> x = torch.zeros(1, 1)
    >>> paths = pathlift.lifting.dense.list_paths(model, x)
    >>> len(paths), paths.theta.tolist(), paths.entries.tolist()
    (1, [2.0, 3.0], [[0, 1]])
    """

    coefficients: Array
    entries: Indices
    theta: Array
    columns: dict[str, slice]

    def __len__(self) -> int:
        return len(self.coefficients)

    def _factors(self) -> Array:
        """``(paths, longest)``: the parameters along each path, 1 where it is filled up."""
        return np.append(self.theta, 1.0)[self.entries]

    def lifting(self) -> Array:
        """``Phi``: ``(paths,)``, with sign."""
        return np.asarray(self.coefficients * self._factors().prod(axis=1))

    def jacobian(self) -> sparse.csr_array:
        """``dPhi``: ``(paths, parameters)``, sparse.

        The derivative of a monomial: a parameter passed m times gives ``m * Phi / theta``. It is
        the product of all the other factors, so a parameter that is 0 is no exception.
        """
        factors = self._factors()
        before, after = np.ones_like(factors), np.ones_like(factors)
        before[:, 1:] = np.cumprod(factors[:, :-1], axis=1)
        after[:, :-1] = np.cumprod(factors[:, :0:-1], axis=1)[:, ::-1]
        others = self.coefficients[:, None] * before * after
        rows, position = np.nonzero(self.entries >= 0)
        triples = (others[rows, position], (rows, self.entries[rows, position]))
        return sparse.csr_array(sparse.coo_array(triples, shape=(len(self), len(self.theta))))


def list_paths(model: nn.Module, example_inputs: object, *, max_paths: int = 100_000) -> Paths:
    """Every path of ``model``, one by one.

    Supported: fully connected layers, convolutions, products with parameters, sums, biases, skips,
    concatenation, shape operations, pooling, resizing, ReLU and its kin (identities on paths), and
    batch norm in affine form ``(x - mu) gamma / sigma + beta`` with its running statistics. Every
    path through a max is kept. A fixed coefficient of 0 holds no path; a parameter of 0 does.

    Where inputs and outputs have one common leading size and at least two dimensions, that is the
    batch, and the paths of the first sample are listed. Pass one sample to save work.

    Args:
        model: a small network, left as found.
        example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
        max_paths: where to stop.

    Raises:
        UnsupportedOperationError: an operation without paths, or that this listing does not know.
        PathliftError: more than ``max_paths`` paths end in one of the activations.
        ArgumentError, CaptureError: see :func:`pathlift.rescaling_group`.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(2), model[2].weight.fill_(3)
    >>> x = torch.zeros(1, 1)
    >>> pathlift.lifting.dense.list_paths(model, x).lifting().tolist()
    [6.0]
    """
    if isinstance(max_paths, bool) or not isinstance(max_paths, int) or max_paths < 1:
        raise ArgumentError(f"max_paths must be a positive integer; found {max_paths!r}.")
    program = capture(model, example_inputs, both=False)
    graph = program.graph(program.training)
    columns, theta = _joined_parameters(program)
    context = Listing(max_paths, graph.batch or 1, lambda: _total(program))
    values = walk(graph, _Tables(program, context, columns))
    outputs = [values[s] for s in graph.outputs if isinstance(values[s], Table)]
    if not outputs:
        raise UnsupportedOperationError(
            "no output of the model depends on its inputs or parameters; there are no paths. "
            "Check that forward returns floating-point tensors."
        )
    found = stacked([first_sample(t, context.batch) for t in outputs])
    return Paths(found.coefficient, found.entries, theta, columns)


def path_lifting(model: nn.Module, example_inputs: object, *, max_paths: int = 100_000) -> Tensor:
    """``Phi``: the weight of every path, with sign, ``(paths,)`` in float64.

    Arguments and errors: :func:`list_paths`. A rescaling does not change it.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(2), model[2].weight.fill_(3)
    >>> x = torch.zeros(1, 1)
    >>> pathlift.lifting.dense.path_lifting(model, x).tolist()
    [6.0]
    """
    return torch.from_numpy(list_paths(model, example_inputs, max_paths=max_paths).lifting())


def path_jacobian(model: nn.Module, example_inputs: object, *, max_paths: int = 100_000) -> Tensor:
    """``dPhi = dPhi_path / dtheta_i``: dense ``(paths, parameters)`` in float64.

    Columns: all floating-point parameters in the order of ``model.named_parameters()``, each
    flattened (``list_paths(...).columns`` names them, ``list_paths(...).jacobian()`` is sparse).

    Raises:
        PathliftError: more than ``2**28`` entries (2 GiB).
        And see :func:`list_paths`.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(2), model[2].weight.fill_(3)
    >>> x = torch.zeros(1, 1)
    >>> pathlift.lifting.dense.path_jacobian(model, x).tolist()
    [[3.0, 2.0]]
    """
    return torch.from_numpy(_dense(list_paths(model, example_inputs, max_paths=max_paths)))


def path_gram(model: nn.Module, example_inputs: object, *, max_paths: int = 100_000) -> Tensor:
    """``G = dPhi^T dPhi``: dense ``(parameters, parameters)`` in float64.

    Its diagonal is :func:`pathlift.path_kernel_diagonal` where no path passes a parameter twice,
    and its non-zero spectrum is that of the path kernel ``K = dPhi dPhi^T``. Rescaling by
    ``theta' = D theta`` makes it ``D^-1 G D^-1``.

    Arguments and errors: :func:`list_paths`, columns as in :func:`path_jacobian`.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(2), model[2].weight.fill_(3)
    >>> x = torch.zeros(1, 1)
    >>> pathlift.lifting.dense.path_gram(model, x).tolist()
    [[9.0, 6.0], [6.0, 4.0]]
    """
    jacobian = list_paths(model, example_inputs, max_paths=max_paths).jacobian()
    count = jacobian.shape[1]
    if count * count > _MAX_DENSE_ENTRIES:
        raise PathliftError(
            f"the Gram matrix of {count:,} parameters has {count * count:,} entries, more than "
            f"{_MAX_DENSE_ENTRIES:,}. Use list_paths(...).jacobian(), which is sparse."
        )
    return torch.from_numpy((jacobian.T @ jacobian).toarray())


def path_kernel_spectrum(
    model: nn.Module, example_inputs: object, *, max_paths: int = 100_000
) -> Tensor:
    """Eigenvalues of the path kernel ``K = dPhi dPhi^T``, descending, float64.

    They are the squared singular values of ``dPhi``, ``min(paths, parameters)`` of them; what is
    left of K's spectrum is 0. Of these too, one per rescaling direction is 0 up to rounding
    (``1e-16`` of the largest singular value, so ``1e-32`` of the largest eigenvalue).

    Arguments and errors: :func:`list_paths` and :func:`path_jacobian`.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(2), model[2].weight.fill_(3)
    >>> x = torch.zeros(1, 1)
    >>> [round(float(v), 6) for v in pathlift.lifting.dense.path_kernel_spectrum(model, x)]
    [13.0]
    """
    jacobian = _dense(list_paths(model, example_inputs, max_paths=max_paths))
    return torch.from_numpy(_singular_values(jacobian) ** 2)


def logdet_divergence(
    model: nn.Module,
    example_inputs: object,
    alpha: float | None = None,
    *,
    max_paths: int = 100_000,
) -> float:
    """Burg divergence of the path kernel from ``alpha I`` on the range of K, in nats.

    With the r non-zero eigenvalues ``l`` of K

        D(K || alpha I) = sum (l / alpha - log(l / alpha) - 1),

    which is 0 exactly when all of them equal ``alpha``. Its minimiser over ``alpha`` is
    ``trace(K) / r``, where ``D = r log(arithmetic mean / geometric mean of l)``.

    This is the exact divergence. The criterion F of METHOD section 3 differs from it: see
    ``docs/theory.md``.

    Args:
        model, example_inputs, max_paths: see :func:`list_paths`.
        alpha: the reference, positive; the best one if None.

    Returns:
        The divergence; 0.0 where K is 0. An eigenvalue counts as 0 where its root is below
        ``eps * max(paths, parameters)`` times the largest root.

    Raises:
        ArgumentError: ``alpha`` is not a positive number.
        And see :func:`list_paths` and :func:`path_jacobian`.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(2), model[2].weight.fill_(3)
    >>> x = torch.zeros(1, 1)
    >>> round(pathlift.lifting.dense.logdet_divergence(model, x), 6)  # one eigenvalue: alpha is it
    0.0
    """
    if alpha is not None and (
        isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf
    ):
        raise ArgumentError(f"alpha must be a positive number or None; found {alpha!r}.")
    jacobian = _dense(list_paths(model, example_inputs, max_paths=max_paths))
    roots = _singular_values(jacobian)
    if not roots.size or roots[0] == 0:
        return 0.0
    threshold = roots[0] * max(jacobian.shape) * np.finfo(np.float64).eps
    eigenvalues = roots[roots > threshold] ** 2
    ratios = eigenvalues / (eigenvalues.mean() if alpha is None else alpha)
    return float((ratios - np.log(ratios) - 1.0).sum())


def _dense(paths: Paths) -> Array:
    count = len(paths) * len(paths.theta)
    if count > _MAX_DENSE_ENTRIES:
        raise PathliftError(
            f"the dense Jacobian of {len(paths):,} paths and {len(paths.theta):,} parameters has "
            f"{count:,} entries, more than {_MAX_DENSE_ENTRIES:,}. Use "
            f"list_paths(...).jacobian(), which is sparse."
        )
    return np.asarray(paths.jacobian().toarray())


def _singular_values(jacobian: Array) -> Array:
    """Descending. Taken from dPhi, not from G: squaring would lose half of the digits."""
    if not jacobian.size:
        return np.zeros(0)
    return np.asarray(np.linalg.svd(jacobian, compute_uv=False))


# --------------------------------------------------------------------------- the run over the graph


class _Tables:
    """The reading of a graph as tables of paths."""

    def __init__(self, program: Program, context: Listing, columns: dict[str, slice]) -> None:
        self.program, self.context, self.columns = program, context, columns

    def source(self, graph: Graph, symbol: Symbol) -> Any:
        """A parameter, buffer, input or constant."""
        name = graph.tensors.get(symbol, "")
        if name in self.columns:
            return leaf(symbol.shape, self.columns[name].start)
        if symbol in graph.constants:
            return graph.constants[symbol]
        if name in self.program.buffers:
            return self.program.buffers[name].detach()
        if symbol.dtype.is_floating_point and symbol in graph.inputs:
            return constant(torch.ones(symbol.shape))
        return UNKNOWN

    def free(self, symbol: Symbol) -> None:
        """Tables are let go by the walk."""

    def call(self, call: Call, arguments: dict[str, Any]) -> list[Any]:
        """The tables of a call's results."""
        context = self.context
        context.node = call
        values = list(_leaves(arguments))
        if not any(isinstance(v, Table) for v in values):
            return [[UNKNOWN] * len(o) if isinstance(o, list) else UNKNOWN for o in call.outputs]
        entry = TABLE.get(call.name)
        if entry is None:
            raise context.refuse("the operation is not known")
        reading = entry.listing
        if isinstance(reading, NoPaths):
            raise context.refuse(f"it has no paths: {reading.why}")
        try:
            out = reading(context, call, **described(reading, call, arguments))
        except Undescribed:
            raise context.refuse("it is called in a way that is not described") from None
        found = list(out) if isinstance(out, (list, tuple)) else [out]
        return found + [UNKNOWN] * (len(call.outputs) - len(found))


def _leaves(nested: Any) -> list[Any]:
    if isinstance(nested, dict):
        return [v for x in nested.values() for v in _leaves(x)]
    if isinstance(nested, (list, tuple)):
        return [v for x in nested for v in _leaves(x)]
    return [nested]


def _total(program: Program) -> str:
    """The number of paths: the lifted pass with exponent 0, where every factor is 1."""
    try:
        with torch.no_grad():
            result = lifted_pass(program, program.training, p=0)
    except UnsupportedOperationError:
        return "as many or more"
    log10 = (math.log2(float(result.total)) + result.shift) * math.log10(2)
    return f"{10**log10:,.0f}" if log10 < 9 else f"10**{log10:.1f}"


def _joined_parameters(program: Program) -> tuple[dict[str, slice], Array]:
    columns: dict[str, slice] = {}
    values = [torch.zeros(0, dtype=torch.float64)]
    start = 0
    for name, q in program.parameters.items():
        if q.is_floating_point():
            columns[name] = slice(start, start + q.numel())
            start += q.numel()
            values.append(q.detach().to("cpu", torch.float64).reshape(-1))
    return columns, torch.cat(values).numpy()
