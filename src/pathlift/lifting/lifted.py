"""The lifted network: path norms and diag(G) in one forward and one backward pass.

Every parameter is replaced by ``|theta|^p``, every fixed coefficient ``a`` by ``|a|^p``, max
pooling by a sum over its window and ReLU by the identity. Fed with ones, the sum of the outputs
is ``||Phi||_p^p``; for p = 2 its gradient in the squared parameters is
``g_i = sum_p (dPhi_p / dtheta_i)^2`` (METHOD section 2; Gonon et al., ICLR 2024).

Range: an activation is kept as ``tensor * 2**shift`` with the tensor's largest entry near 1, so no
depth and no initial scale leaves float64. Powers of two are exact, so this costs no accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift import operations
from pathlift.capture.program import Program, symbols_in
from pathlift.capture.walk import walk
from pathlift.collector import uncollected
from pathlift.errors import UnsupportedOperationError
from pathlift.lifting.parameters import (
    DroppedParameters,
    KeptParameters,
    PassingParameters,
    rescaled,
)
from pathlift.lifting.reading import SquaredReading
from pathlift.lifting.samples import Statistics
from pathlift.lifting.values import Lifted, Squares
from pathlift.surroundings import plain_arithmetic
from pathlift.tensors.product import Product, dense

assert operations  # importing the package fills the table


@dataclass
class LiftedPass:
    """One run of the lifted network.

    Attributes:
        total: ``sum of outputs * 2**-shift``, per sample, differentiable in ``parameters``.
        outputs: every output ``* 2**-shift`` of one sample.
        shift: the common power of two taken out of ``total``.
        parameters: name -> ``|theta * 2**-unit|^p`` (requires grad).
        units: name -> the power of two taken out of the parameter.
        approximated: operations where paths are not defined and a stand-in was used, with counts.
    """

    total: Tensor
    outputs: list[Tensor]
    shift: float
    parameters: dict[str, Tensor]
    units: dict[str, int]
    approximated: dict[str, int]


@plain_arithmetic()
@uncollected
def lifted_pass(
    program: Program,
    training: bool,
    p: float = 2,
    strict: bool = True,
    dtype: torch.dtype = torch.float64,
    differentiable: bool = False,
    store: KeptParameters | PassingParameters | None = None,
    statistics: Statistics | None = None,
) -> LiftedPass:
    """Run the lifted network of exponent ``p`` on ones.

    The value is per sample: where every input and every output has at least two dimensions and
    one common leading size, that dimension is taken as the batch and divided out.

    Every parameter is divided by a power of two that brings its largest entry near 1 before it is
    raised to ``p``, so the range of ``dtype`` bounds ratios within one tensor only.

    With ``differentiable`` the result is a function of the model's own parameters, else of the
    leaf tensors in :attr:`LiftedPass.parameters`. ``statistics`` replaces the running statistics of
    some batch norms (:func:`pathlift.lifting.samples.batch_statistics`). ``store`` says where
    lifted parameters come from and how long they stay; by default they are all kept where there
    is something to differentiate.

    Raises:
        UnsupportedOperationError: ``strict`` and the graph has an operation without paths.
    """
    graph = program.graph(training)
    if store is None:
        kept = differentiable or torch.is_grad_enabled()
        passing = PassingParameters(program, p, dtype)
        store = KeptParameters(program, p, dtype, differentiable) if kept else passing
    reading = SquaredReading(program, graph, store, Squares(p, strict, dtype, program.device))
    reading.statistics = statistics or {}
    env = walk(graph, reading)
    outputs = [env[s] for s in graph.outputs if isinstance(env.get(s), Lifted)]
    if not outputs:
        raise UnsupportedOperationError(
            "no output of the model depends on its inputs or parameters through supported "
            "operations; there are no paths. Check that forward returns floating-point tensors."
        )
    top = max(o.shift for o in outputs)
    values = [o.tensor * 2.0 ** max(o.shift - top, -1000) for o in outputs]
    total = torch.stack([v.sum() for v in values]).sum()
    if graph.batch is not None:
        total = total / graph.batch
        values = [v[0] for v in values]
    return LiftedPass(total, values, top, store.leaves, store.units, reading.context.approximated)


def stream_diagonal(
    program: Program,
    training: bool,
    sink: Callable[[str, Tensor | Product], None],
    strict: bool = True,
    dtype: torch.dtype = torch.float64,
    statistics: Statistics | None = None,
    absent: Callable[[str, Tensor | Product], None] | None = None,
) -> tuple[float, dict[str, int]]:
    """``diag(G)`` up to one power of two, parameter by parameter, each handed on once complete.

    A parameter that one path passes m times counts m times. Memory: the activations of one sample
    and a few tensors of the size of the largest parameter.

    Args:
        sink: called with every name and ``g * 2**-shift`` of the parameter's shape, in the order
            of the backward pass (a product for the weight of a linear map that is applied to few
            rows).
        absent: called with expanded zeros for a parameter on no path, in place of ``sink``.

    Returns:
        The shift, and the operations a stand-in was used for.
    """
    store = DroppedParameters(program, dtype, sink)
    with torch.enable_grad():
        with store.saved():
            result = lifted_pass(
                program, training, 2, strict, dtype, store=store, statistics=statistics
            )
        if result.total.requires_grad:
            torch.autograd.grad(result.total, store.token, allow_unused=True)
    store.finish(absent or sink)
    return result.shift, result.approximated


def diagonal(
    program: Program,
    training: bool,
    strict: bool = True,
    dtype: torch.dtype = torch.float64,
    repeats: bool = False,
) -> tuple[dict[str, Tensor], float, dict[str, int]]:
    """``diag(G)`` up to one power of two.

    Args:
        repeats: count a parameter that one path passes m times m^2 times, as the definition says.
            Otherwise the gradient's m is taken, which costs one pass; both transform alike under
            rescaling, and they agree wherever no path meets a parameter twice.

    Returns:
        name -> float64 tensor ``g * 2**-shift`` of the parameter's shape (zeros for a parameter
        on no path), the shift, and the operations a stand-in was used for.
    """
    found: dict[str, Tensor] = {}
    reused = {n for n in program.parameters if repeats and _reused(program, training, n)}
    if not reused:
        shift, approximated = stream_diagonal(
            program, training, lambda n, g: found.update({n: dense(g).contiguous()}), strict, dtype
        )
        ordered = {n: found[n] for n in program.parameters if n in found}
        return ordered, shift, approximated
    with torch.enable_grad():
        result = lifted_pass(program, training, 2, strict, dtype)
        names = list(result.parameters)
        grads: Sequence[Tensor | None] = [None] * len(names)
        if result.total.requires_grad:
            grads = torch.autograd.grad(
                result.total,
                [result.parameters[n] for n in names],
                allow_unused=True,
                create_graph=True,
            )
        for name, gradient in zip(names, grads, strict=True):
            u = result.parameters[name]
            g = torch.zeros_like(u) if gradient is None else gradient.detach()
            if gradient is not None and name in reused:
                g = g + u.detach() * _second_derivatives(gradient, u)
            found[name] = dense(rescaled(g, result.units[name]))
    return found, result.shift, result.approximated


def _reused(program: Program, training: bool, name: str) -> bool:
    """Whether the graph reads the parameter, or a view of it, more than once."""
    graph = program.graph(training)
    chain = [s for s, n in graph.tensors.items() if n == name]
    while chain:
        calls = graph.uses.get(chain.pop(), [])
        if len(calls) > 1:
            return True
        chain += [
            s
            for c in calls
            if len(list(symbols_in(c.arguments))) == 1
            for s in symbols_in(c.outputs)
        ]
    return False


def _second_derivatives(gradient: Tensor, u: Tensor) -> Tensor:
    """``d2F / du_i^2`` for every entry: ``u^m c`` has ``m(m-1) u^(m-2) c``, so that
    ``F_u + u F_uu = m^2 u^(m-1) c``."""
    if not gradient.requires_grad:
        return torch.zeros_like(u)
    # The whole tensor at once tells whether any path meets it twice.
    (along,) = torch.autograd.grad(gradient, u, u.detach(), retain_graph=True, allow_unused=True)
    if along is None or not bool(along.any()):
        return torch.zeros_like(u)
    flat = gradient.reshape(-1)
    entries = [
        torch.autograd.grad(flat[k], u, retain_graph=True)[0].reshape(-1)[k]
        for k in range(u.numel())
    ]
    return torch.stack(entries).reshape(u.shape)
