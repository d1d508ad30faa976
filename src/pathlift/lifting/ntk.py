"""The empirical neural tangent kernel of a batch: what a gradient step sees of a network.

With ``J`` the Jacobian of all outputs of a batch in all trainable parameters,
``(samples * outputs, parameters)``, the kernel is ``J J^T`` (Jacot, Gabriel, Hongler, NeurIPS
2018). The path kernel K bounds it from above: ``J = A dPhi`` with the activations and inputs in
``A`` (METHOD section 2), and only ``dPhi`` changes under rescaling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import linalg as sparse_linalg
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathlift.capture.by_name import check_by_name
from pathlift.capture.inputs import as_inputs, tensors_in
from pathlift.capture.names import check_model, named_tensors, preserved
from pathlift.errors import ArgumentError

Parameters = dict[str, Tensor]

# Up to this many rows the kernel is formed; above, Lanczos finds its largest eigenvalues.
MAX_DENSE_ROWS = 2048
# How many of them unless the caller says.
_DEFAULT_COUNT = 64
# A block of Jacobian rows may have this many entries (0.5 GiB in float64).
_MAX_BLOCK_ENTRIES = 2**26
# This many rows of the Jacobian come from one vectorised backward pass.
_CHUNK = 32


def ntk_spectrum(model: nn.Module, inputs: object, k: int | None = None) -> Tensor:
    """Eigenvalues of the empirical neural tangent kernel ``J J^T`` on a batch, descending.

    J holds the derivatives of every entry of every floating-point output in the trainable
    parameters, computed in float64 and in the mode the model is in. Up to 2048 output entries the
    kernel is formed block by block and all eigenvalues are found; above, the ``k`` largest come
    from Lanczos iterations with Jacobian-vector and vector-Jacobian products.

    Args:
        model: any differentiable module; left as found.
        inputs: the batch: a tensor, a tuple of arguments, or a dict of keyword arguments. Unlike
            elsewhere in pathlift its values matter.
        k: how many of the largest eigenvalues to return. None: all of them up to 2048 output
            entries, 64 above.

    Returns:
        ``(k,)`` float64 on the CPU. Values below ``1e-16`` times the number of output entries
        times the largest are rounding, and negative ones among them are returned as 0.

    Raises:
        ArgumentError: ``model``, ``inputs`` or ``k`` has the wrong type or value, there is no
            trainable parameter or no floating-point output, or the model draws random numbers
            (dropout in train mode), so that it has no one Jacobian, or reaches a parameter by
            another way than its name.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> pathlift.lifting.ntk.ntk_spectrum(model, torch.randn(5, 4)).shape  # 5 samples of 2 outputs
    torch.Size([10])
    """
    model = check_model(model)
    with preserved(model), torch.no_grad():
        batch = _Batch.of(model, inputs)
        rows = batch.size
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 0 < k <= rows):
            raise ArgumentError(f"k must be an integer from 1 to {rows} (rows of J); found {k!r}.")
        count = k if k is not None else rows if rows <= MAX_DENSE_ROWS else _DEFAULT_COUNT
        # Lanczos needs fewer eigenvalues than rows.
        if rows <= MAX_DENSE_ROWS or count >= rows - 1:
            found = torch.linalg.eigvalsh(_gram(batch)).flip(0)[:count].cpu()
        else:
            found = torch.from_numpy(_lanczos(batch, count))
    return found.clamp(min=0.0)


def condition_number(eigenvalues: Tensor, *, on_range: bool = False) -> float:
    """Largest over smallest eigenvalue of a positive semidefinite matrix.

    Args:
        eigenvalues: as from :func:`ntk_spectrum` or
            :func:`pathlift.lifting.paths.path_kernel_spectrum`, in any order.
        on_range: leave out the eigenvalues that are 0 up to rounding, at most
            ``2.2e-16 * count`` times the largest. Otherwise they make it infinite.

    Returns:
        At least 1; ``inf`` where the matrix is singular to rounding (or 0).

    Raises:
        ArgumentError: not a non-empty vector of finite, non-negative numbers.

    >>> import pathlift, torch
    >>> pathlift.lifting.ntk.condition_number(torch.tensor([8.0, 4.0, 2.0]))
    4.0
    """
    values = torch.as_tensor(eigenvalues).detach().to("cpu", torch.float64)
    if values.dim() != 1 or not values.numel():
        raise ArgumentError(
            f"eigenvalues must be a non-empty vector; found shape {tuple(values.shape)}."
        )
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ArgumentError(
            "eigenvalues has negative or non-finite entries; the eigenvalues of a kernel are "
            "non-negative. Pass what ntk_spectrum returns."
        )
    largest = float(values.max())
    threshold = largest * values.numel() * torch.finfo(torch.float64).eps
    if on_range:
        values = values[values > threshold]
    if largest == 0 or not values.numel() or float(values.min()) <= threshold:
        return math.inf
    return largest / float(values.min())


# --------------------------------------------------------------------------- batch to outputs


@dataclass(frozen=True)
class _Batch:
    """The outputs on the batch as a function of the trainable parameters, in float64.

    Attributes:
        outputs: parameters -> ``(rows,)``, all outputs of all samples.
        one: parameters and one sample's leaves -> that sample's outputs; None where samples
            influence each other (batch norm in train mode) or have no common leading dimension.
        leaves: the input tensors, batch first, that ``one`` takes.
        parameters: name -> trainable parameter.
        size: number of rows of J.
    """

    outputs: Callable[[Parameters], Tensor]
    one: Callable[[Parameters, list[Tensor]], Tensor] | None
    leaves: list[Tensor]
    parameters: Parameters
    size: int

    @classmethod
    def of(cls, model: nn.Module, inputs: object) -> _Batch:
        named, buffers, _ = named_tensors(model)
        state = {n: _wide(t) for n, t in [*named.items(), *buffers.items()]}
        parameters = {
            n: state.pop(n) for n, p in named.items() if p.requires_grad and p.is_floating_point()
        }
        if not parameters:
            raise ArgumentError(
                "the model has no trainable parameter; its tangent kernel is 0. Set "
                "requires_grad on the parameters that count."
            )
        given = as_inputs(inputs)
        check_by_name(model, given)
        flat, spec = pytree.tree_flatten((given.args, given.kwargs))
        flat = [_wide(v) if isinstance(v, Tensor) else v for v in flat]
        positions = [i for i, v in enumerate(flat) if isinstance(v, Tensor)]
        leaves = [flat[i] for i in positions]

        def run(at: Parameters, tensors: list[Tensor]) -> Tensor:
            filled = list(flat)
            for i, tensor in zip(positions, tensors, strict=True):
                filled[i] = tensor
            args, kwargs = pytree.tree_unflatten(filled, spec)
            # Buffers are copied: a batch norm in train mode writes into them.
            fixed = {n: t.clone() for n, t in state.items()}
            out = torch.func.functional_call(model, {**fixed, **at}, args, kwargs)
            found = [t for t in tensors_in(out) if t.is_floating_point()]
            if not found:
                raise ArgumentError(
                    "the model returns no floating-point tensor; there is nothing to "
                    "differentiate. Check that forward returns its outputs."
                )
            return torch.cat([t.reshape(-1) for t in found])

        value = run(parameters, leaves)
        if not bool(torch.isfinite(value).all()):
            raise ArgumentError(
                "the model's outputs on this batch are not all finite; it has no tangent kernel. "
                "Check inputs and parameters for NaN."
            )
        # At zeros (a head that starts at zero) outputs say nothing about what they depend on.
        generic = _perturbed(parameters)
        reference = run(generic, leaves)
        if not torch.equal(reference, run(generic, leaves)):
            raise ArgumentError(
                "two runs of the model on the same batch differ: it draws random numbers, or is "
                "not deterministic. Call model.eval() first."
            )

        def one(at: Parameters, tensors: list[Tensor]) -> Tensor:
            return run(at, [t[None] for t in tensors])

        return cls(
            lambda at: run(at, leaves),
            one if _separate(one, generic, leaves, reference) else None,
            leaves,
            parameters,
            value.numel(),
        )


def _perturbed(parameters: Parameters) -> Parameters:
    """Parameters with noise of a tenth of their size (0.1 for zeros)."""
    generator = torch.Generator().manual_seed(0)

    def noise(p: Tensor) -> Tensor:
        size = float(p.square().mean().sqrt()) if p.numel() else 0.0
        drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        return 0.1 * (size or 1.0) * drawn.to(p.device)

    return {n: p + noise(p) for n, p in parameters.items()}


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor


def _separate(
    one: Callable[[Parameters, list[Tensor]], Tensor],
    parameters: Parameters,
    leaves: list[Tensor],
    value: Tensor,
) -> bool:
    """Whether every sample run alone gives its part of the batch's outputs.

    Outputs of several tensors are interleaved otherwise, so they are compared as sorted sums: the
    spectrum does not depend on the order of rows.
    """
    sizes = {t.shape[0] if t.dim() else 0 for t in leaves}
    if len(sizes) != 1 or 0 in sizes:
        return False
    try:
        alone = torch.func.vmap(one, in_dims=(None, 0))(parameters, leaves)
    except Exception:  # whatever can't be vectorised is differentiated as a whole batch
        return False
    if alone.numel() != value.numel():
        return False
    left, right = alone.reshape(-1).sort().values, value.sort().values
    return bool(torch.allclose(left, right, rtol=1e-9, atol=1e-12 * float(right.abs().max())))


# --------------------------------------------------------------------------- the kernel, formed


def _gram(batch: _Batch) -> Tensor:
    """``J J^T``, ``(rows, rows)``; J is held in blocks of rows, at most two at a time."""
    width = sum(p.numel() for p in batch.parameters.values())
    step = max(1, min(batch.size, _MAX_BLOCK_ENTRIES // width))
    outputs = batch.size // len(batch.leaves[0]) if batch.one is not None else 0
    source = _batch_rows
    if 0 < outputs <= step:  # blocks of whole samples
        source, step = _sample_rows, step - step % outputs
    starts = range(0, batch.size, step)
    device = next(iter(batch.parameters.values())).device
    gram = torch.zeros((batch.size, batch.size), dtype=torch.float64, device=device)
    for a in starts:
        left = source(batch, a, min(a + step, batch.size))
        for b in range(0, a + 1, step):
            right = left if a == b else source(batch, b, b + step)
            part = left @ right.T
            gram[a : a + len(left), b : b + len(right)] = part
            gram[b : b + len(right), a : a + len(left)] = part.T
    return gram


def _joined(tree: Mapping[str, Tensor], lead: int) -> Tensor:
    """Per-parameter derivatives with ``lead`` leading dimensions -> one matrix of rows."""
    parts = [t.flatten(lead) if t.dim() > lead else t.unsqueeze(-1) for t in tree.values()]
    joined = torch.cat(parts, -1)
    return joined.reshape(-1, joined.shape[-1])


def _sample_rows(batch: _Batch, start: int, stop: int) -> Tensor:
    """Rows ``start:stop`` of J, whole samples: one small backward pass per output."""
    assert batch.one is not None
    outputs = batch.size // len(batch.leaves[0])
    samples = slice(start // outputs, stop // outputs)
    inner = min(outputs, _CHUNK)
    jacobian = torch.func.jacrev(batch.one, chunk_size=inner)
    rows = torch.func.vmap(jacobian, in_dims=(None, 0), chunk_size=max(1, _CHUNK // inner))(
        batch.parameters, [t[samples] for t in batch.leaves]
    )
    return _joined(rows, 2)


def _batch_rows(batch: _Batch, start: int, stop: int) -> Tensor:
    """Rows ``start:stop`` of J by backward passes through the whole batch."""
    pull = torch.func.vjp(batch.outputs, batch.parameters)[1]
    found = []
    for part in torch.arange(start, stop).split(_CHUNK):
        units = torch.nn.functional.one_hot(part, batch.size).to(torch.float64)
        units = units.to(next(iter(batch.parameters.values())).device)
        found.append(_joined(torch.func.vmap(lambda u: pull(u)[0])(units), 1))
    return torch.cat(found)


# --------------------------------------------------------------------------- the kernel, applied


def _lanczos(batch: _Batch, count: int) -> NDArray[np.float64]:
    """The ``count`` largest eigenvalues, descending, from products with J and J^T."""
    device = next(iter(batch.parameters.values())).device
    pull = torch.func.vjp(batch.outputs, batch.parameters)[1]

    def product(vector: NDArray[Any]) -> NDArray[np.float64]:
        cotangent = torch.from_numpy(np.ascontiguousarray(vector).reshape(-1)).to(device)
        (tangent,) = pull(cotangent)
        out = torch.func.jvp(batch.outputs, (batch.parameters,), (tangent,))[1]
        return np.asarray(out.cpu().numpy())

    kernel = sparse_linalg.LinearOperator(
        (batch.size, batch.size), matvec=product, dtype=np.float64
    )
    start = np.random.default_rng(0).standard_normal(batch.size)
    found = sparse_linalg.eigsh(kernel, k=count, which="LA", v0=start, return_eigenvectors=False)
    return np.ascontiguousarray(np.sort(found)[::-1])
