"""What a call gives, and what it must not change.

Kept apart from the library's own idea of what an output is, which it is there to test.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import keystr, tree_flatten_with_path

State = dict[str, Any]
_DEPTH = 4


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Every tensor that can be reached from what the model returns."""
    if isinstance(inputs, dict):
        return reachable(model(**inputs))
    return reachable(model(*inputs) if isinstance(inputs, tuple) else model(inputs))


def reachable(value: Any) -> list[Tensor]:
    """Tensors in containers and in plain objects' attributes, each once; no module's parameters."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def visit(item: Any) -> None:
        if id(item) in seen or isinstance(item, (nn.Module, nn.Parameter, type, str, bytes)):
            return
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, dict):
            for entry in item.values():
                visit(entry)
        elif isinstance(item, (list, tuple, set, frozenset)):
            for entry in item:
                visit(entry)
        elif not callable(item):
            names = [*getattr(item, "__dict__", ()), *getattr(item, "__slots__", ())]
            for name in names:
                visit(getattr(item, name, None))

    visit(value)
    return found


def snapshot(model: nn.Module) -> State:
    """Path -> what stands there: values of tensors and plain things, identity of the others."""
    found: State = {
        "torch random state": tuple(torch.get_rng_state().tolist()),
        "numpy random state": repr(np.random.get_state()),
        "python random state": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
    }
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            _note(f"{name or 'model'}.{key}", value, found, _DEPTH)
    return found


def _note(path: str, value: Any, found: State, depth: int) -> None:
    if isinstance(value, Tensor):
        found[path] = _tensor(value)
    elif isinstance(value, dict) and depth:
        found[path] = (type(value), len(value))
        for key, item in value.items():
            _note(f"{path}[{key!r}]" if not isinstance(key, str) else f"{path}.{key}", item, found, depth - 1)  # fmt: skip
    elif isinstance(value, (list, tuple, set, frozenset)) and depth:
        found[path] = (type(value), sum(1 for _ in value))  # some have no len
        if not isinstance(value, (set, frozenset)):
            for k, item in enumerate(value):
                _note(f"{path}[{k}]", item, found, depth - 1)
    elif isinstance(value, (int, float, str, bool, bytes, type(None))):
        found[path] = value
    else:
        found[path] = (type(value), id(value))


def _tensor(value: Tensor) -> Any:
    kind = (type(value), id(value), value.dtype, tuple(value.shape), value.requires_grad)
    if type(value) not in (Tensor, nn.Parameter, nn.Buffer) or value.layout != torch.strided:
        return kind
    if value.device.type != "cpu":
        return kind
    with torch.no_grad():
        flat = value.detach().contiguous().reshape(-1)
        return (*kind, hash(flat.view(torch.uint8).numpy().tobytes()))


def differences(before: State, after: State) -> list[str]:
    """What changed, appeared or vanished, in words; at most five."""
    found = [f"{path} appeared" for path in after if path not in before]
    found += [f"{path} vanished" for path in before if path not in after]
    for path in before.keys() & after.keys():
        a, b = before[path], after[path]
        if a != b and not (a != a and b != b):
            found.append(f"{path} changed")
    return sorted(found)[:5]


def fake_tensors(model: nn.Module) -> list[str]:
    """Where fake tensors are left in a module; at most three places."""
    found = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            leaves = [] if key == "_modules" else tree_flatten_with_path(value)[0]
            for path, leaf in leaves:
                if isinstance(leaf, FakeTensor):
                    found.append(f"{name or 'model'}.{key}{keystr(path)} is fake")
    return found[:3]
