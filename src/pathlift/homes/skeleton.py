"""A model without values, and what it needs from a checkpoint to be one with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pathlift.capture.names import named_tensors
from pathlift.checkpoint import Checkpoint
from pathlift.errors import CaptureError, CheckpointError

# Bytes that are worked on at a time where a tensor is not needed as a whole.
PIECE = 8_000_000

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put every floating-point parameter on the meta device as it is registered.

    Unlike under ``torch.device("meta")``, buffers keep their values (masks, frequencies, tables).
    A parameter that is registered twice stays one parameter.
    """

    def strip(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if (
            parameter is None
            or parameter.is_meta
            or not parameter.is_floating_point()
            or nn.parameter.is_lazy(parameter)
        ):
            return None
        stripped = parameter.__dict__.get("_pathlift_stripped")
        if stripped is None:
            empty = torch.empty_like(parameter, device="meta")
            stripped = nn.Parameter(empty, parameter.requires_grad)
            stripped.__dict__.update(parameter.__dict__)
            parameter.__dict__["_pathlift_stripped"] = stripped
        return stripped

    handle = register_module_parameter_registration_hook(strip)
    try:
        yield
    finally:
        handle.remove()


def match(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Name in the checkpoint -> first name in the model of the same tensor.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or of a dtype that is not
            supported, or names that the model ties have different values.
    """
    stored = checkpoint.tensors
    owners = match_names(model, {n: t.shape for n, t in stored.items()}, checkpoint.path)
    parameters, _, _ = named_tensors(model)
    places: dict[str, str] = {}
    for name, first in owners.items():
        if first in parameters and parameters[first].is_floating_point():
            _check_dtype(name, stored[name].dtype, checkpoint)
        other = places.setdefault(first, name)
        if other != name and not _same(checkpoint, other, name):
            raise CheckpointError(
                f"'{other}' and '{name}' are one tensor in the model and differ in "
                f"'{checkpoint.path}'. Untie them in the model, or store them once."
            )
    return owners


def match_names(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], where: object
) -> dict[str, str]:
    """Name among those stored -> first name in the model of the same tensor.

    Tensors that the model ties need be stored once, under any of their names.

    Args:
        shapes: name -> shape of everything that is stored.
        where: the file, for messages.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    parameters, _, aliases = named_tensors(model)
    own = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    owners: dict[str, str] = {}
    for name, shape in shapes.items():
        if name not in own:
            raise CheckpointError(
                f"'{where}' holds '{name}', which the model does not have. Give the weights of "
                f"this model."
            )
        if tuple(shape) != tuple(own[name].shape):
            raise CheckpointError(
                f"'{name}' has shape {tuple(shape)} in '{where}' and {tuple(own[name].shape)} in "
                f"the model. Give the weights of this model."
            )
        owners[name] = aliases.get(name, name)
    held = set(owners.values())
    missing = [n for n in {**own, **parameters} if aliases.get(n, n) not in held]
    if missing:
        raise CheckpointError(
            f"'{where}' lacks {len(missing)} of the model's tensors, first '{missing[0]}'. Give "
            f"the weights of this model."
        )
    return owners


def _check_dtype(name: str, dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    if dtype not in _FLOATS:
        raise CheckpointError(
            f"'{name}' is stored as {str(dtype).removeprefix('torch.')} in '{checkpoint.path}'. "
            f"Parameters can be rescaled in float64, float32, float16 and bfloat16. Convert the "
            f"checkpoint."
        )


def _same(checkpoint: Checkpoint, a: str, b: str) -> bool:
    if checkpoint.tensors[a].dtype != checkpoint.tensors[b].dtype:
        return False
    pairs = zip(checkpoint.raw(a, PIECE), checkpoint.raw(b, PIECE), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def load_buffers(model: nn.Module, checkpoint: Checkpoint, places: Mapping[str, str]) -> None:
    """Fill what has memory (buffers, integer parameters) from the checkpoint."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            parameter.data.copy_(checkpoint.read(places[name]))
    for name, buffer in list(model.named_buffers()):
        path, _, leaf = name.rpartition(".")
        if buffer.is_meta and name in places:
            real = torch.empty(buffer.shape, dtype=buffer.dtype)
            model.get_submodule(path)._buffers[leaf] = real
            buffer = real
        if buffer.is_meta:
            raise CaptureError(
                f"buffer '{name}' is computed from parameters while the model is built and is not "
                f"in the checkpoint, so it has no values. Make it persistent and save it, or "
                f"condition without streaming."
            )
        if name in places:
            with torch.no_grad():
                buffer.copy_(checkpoint.read(places[name]))
