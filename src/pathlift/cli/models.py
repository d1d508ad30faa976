"""A model from its name: torchvision:NAME, timm:NAME, module:FACTORY or file.py:FACTORY."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pathlift.cli.exits import first_line
from pathlift.errors import ArgumentError, MissingDependencyError, closest

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32")


def model_and_inputs(args: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model that the options name, in the mode they name, and one example of every input."""
    from pathlift.cli.weights import check_weights, load_weights

    inputs = tuple(example(text) for text in args.input)
    if args.weights is not None:
        check_weights(args.weights)
    model = built(args)
    if args.weights is not None:
        load_weights(model, args.weights)
    return model, inputs


def built(args: Any) -> nn.Module:
    """The model as its factory gives it, seeded and in its mode."""
    torch.manual_seed(args.seed)
    return model_named(args.spec).train(args.mode == "train")


def example(text: str) -> Tensor:
    """Zeros of ``SHAPE[:DTYPE]``.

    Raises:
        ArgumentError: another text, or more bytes than this machine has free.
    """
    sizes, _, name = text.partition(":")
    name = name or "float32"
    try:
        shape = [int(n) for n in sizes.split(",")]
    except ValueError:
        shape = [-1]
    if min(shape) < 1 or name not in _DTYPES:
        raise ArgumentError(
            f"--input {text!r} is not SHAPE[:DTYPE]. Give sizes separated by commas and, if not "
            f"float32, one of {', '.join(_DTYPES)}, such as 1,3,224,224 or 1,128:int64."
        )
    dtype = getattr(torch, name)
    count = dtype.itemsize
    for n in shape:
        count *= n
    if count > _free_bytes():
        raise ArgumentError(
            f"--input {text!r} takes {count / 1e9:.3g} GB, more than this machine has free. Only "
            f"shapes matter: give a batch of 1 and sizes that the model meets."
        )
    return torch.zeros(shape, dtype=dtype)


def _free_bytes() -> int:
    """Memory that is free; 64 GB where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 64_000_000_000


def model_named(spec: str) -> nn.Module:
    """The model of a name.

    Raises:
        ArgumentError: no such name, or its factory can't be called or gives something else.
        MissingDependencyError: a module is missing or broken.
    """
    source, separator, name = spec.rpartition(":")
    if not separator or not source or not name:
        raise ArgumentError(
            f"{spec!r} is not a model. Give torchvision:resnet18, timm:resnet50, "
            f"package.module:factory or file.py:factory."
        )
    if source == "torchvision":
        models = _imported("torchvision.models", spec)
        _check_known(name, models.list_models(), spec)
        return _made(lambda: models.get_model(name, weights=None), spec)
    if source == "timm":
        timm = _imported("timm", spec)
        _check_known(name.split(".")[0], timm.list_models(), spec)
        return _made(lambda: timm.create_model(name), spec)
    module = _from_file(Path(source), spec) if source.endswith(".py") else _from_path(source, spec)
    return _from_module(module, source, name, spec)


def _check_known(name: str, known: Iterable[str], spec: str) -> None:
    names = list(known)
    if name not in names:
        raise ArgumentError(
            f"{spec!r} can't be built: there is no model {name!r} among the {len(names)} of this "
            f"version.{closest(name, names)} Check the name."
        )


def _imported(name: str, spec: str) -> ModuleType:
    """A module by its dotted name; whether it is missing or broken is said."""
    try:
        return importlib.import_module(name)
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        package = name.split(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name in (name, package):
            raise MissingDependencyError(
                f"{spec!r} needs a module that can't be imported: {error}. Install it, or run "
                f"where it can be found."
            ) from error
        if package in ("torchvision", "timm"):
            raise MissingDependencyError(
                f"{package} is installed but broken: {type(error).__name__}: {first_line(error)}. "
                f"It was probably built for another version than torch {torch.__version__}; "
                f"install the two together."
            ) from error
        if isinstance(error, ImportError):
            raise MissingDependencyError(
                f"{spec!r} needs a module that can't be imported: {error}. Install it, or run "
                f"where it can be found."
            ) from error
        raise ArgumentError(f"{spec!r} can't be imported: {_told(error)}.") from error


def _from_path(name: str, spec: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return _imported(name, spec)


def _from_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise ArgumentError(f"there is no file {str(path)!r}. Give a path that exists.")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    # What the file's neighbours are called is known where it stands.
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        module_spec.loader.exec_module(module)
    except (KeyboardInterrupt, MemoryError):
        raise
    except ImportError as error:
        raise MissingDependencyError(
            f"{spec!r} needs a module that can't be imported: {error}. Install it, or run where "
            f"it can be found."
        ) from error
    except BaseException as error:
        raise ArgumentError(f"{str(path)!r} can't be run: {_told(error)}.") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


def _from_module(module: ModuleType, source: str, name: str, spec: str) -> nn.Module:
    factory = getattr(module, name, None)
    if not callable(factory):
        found = [n for n in vars(module) if not n.startswith("_")]
        raise ArgumentError(
            f"{source!r} has no callable {name!r}; it has "
            f"{', '.join(found[:8]) or 'nothing public'}.{closest(name, found)}"
        )
    if isinstance(factory, nn.Module):
        return factory
    needed = _needed_arguments(factory)
    if needed:
        raise ArgumentError(
            f"the factory {name!r} needs arguments ({', '.join(needed)}). Give one that takes "
            f"none, such as: def build(): return {name}(...)"
        )
    return _made(factory, spec)


def _needed_arguments(factory: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def _made(factory: Callable[[], object], spec: str) -> nn.Module:
    try:
        model = factory()
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        raise ArgumentError(f"{spec!r} can't be built: {_told(error)}.") from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"{spec!r} gave a {type(model).__name__}; a factory must return a torch.nn.Module."
        )
    return model


def _told(error: BaseException) -> str:
    """An error of somebody else's code: its class, words and place."""
    if isinstance(error, SyntaxError):
        return f"{error.msg} (line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error).rstrip('.')}{place}"
