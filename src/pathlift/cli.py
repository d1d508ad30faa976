"""The command line: ``pathlift inspect | condition | norms | demo …``."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 refused, 2 usage)."""
    args = _parser().parse_args(argv)
    from pathlift.errors import PathliftError

    try:
        result = args.run(args)
    except PathliftError as error:
        print(f"pathlift: error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(result["data"]))
    else:
        print(result["text"])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pathlift",
        description="Rescale a ReLU network without changing its function.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def command(name: str, run: Callable[[Any], dict[str, Any]], about: str) -> Any:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        return sub

    def model_options(sub: Any) -> None:
        sub.add_argument(
            "spec",
            help="torchvision:NAME, timm:NAME, package.module:FACTORY or file.py:FACTORY",
        )
        sub.add_argument(
            "--weights", type=Path, help=".safetensors file, index or folder (or .pt/.pth/.bin)"
        )
        sub.add_argument(
            "--input",
            action="append",
            metavar="SHAPE[:DTYPE]",
            required=True,
            help="shape of one input, such as 1,3,224,224; repeat for several inputs",
        )
        sub.add_argument("--mode", choices=("train", "eval"), default="train")
        sub.add_argument("--seed", type=int, default=0, help="seed before the factory is called")

    sub = command("inspect", _inspect, "Show every scale of a model, and what pins the rest.")
    model_options(sub)
    sub.add_argument("--batch-norm", choices=("pinned", "invariant"), default="pinned")
    sub = command("condition", _condition, "Condition a model and write its weights.")
    model_options(sub)
    sub.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="out.safetensors, or a folder for files with an index",
    )
    sub.add_argument(
        "--stream",
        action="store_true",
        help="read and write tensor by tensor: for weights that do not fit in memory",
    )
    sub.add_argument("--criterion", default="path-kernel")
    sub.add_argument("--solver", default="newton", help="newton or coordinate")
    sub.add_argument("--tol", type=float)
    sub.add_argument("--batch-norm", choices=("pinned", "invariant"), default="pinned")
    sub.add_argument("--no-exact", action="store_true", help="continuous scales, not powers of two")
    sub = command("norms", _norms, "Path norms and the imbalance of the path kernel.")
    model_options(sub)
    sub = command("demo", _demo, "Condition, verify and train on embedded data; write a page.")
    sub.add_argument("--output", type=Path, default=Path("demo-output"))
    sub.add_argument("--quick", action="store_true", help="fewer seeds and epochs")
    about = "Train every (method, architecture, data, optimiser, rate, seed); write a page."
    command("compare", _compare, about).later = _compare_options
    about = "Reproduce the paper's experiments: figures, tables and what they say."
    command("reproduce", _reproduce, about).later = _reproduce_options
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser that may get its options when it is first used.

    What the experiments offer is known to modules that take long to import.
    """

    later: Callable[[Any], None] | None = None

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        fill, self.later = self.later, None
        if fill is not None:
            fill(self)
        return super().parse_known_args(*args, **kwargs)


def _compare_options(parser: Any) -> None:
    from pathlift.experiments.compare import add_arguments

    add_arguments(parser)


def _compare(args: Any) -> dict[str, Any]:
    from pathlift.experiments.compare import run

    return run(args, _progress)


def _reproduce_options(parser: Any) -> None:
    from pathlift.experiments.reproduce import add_arguments

    add_arguments(parser)


def _reproduce(args: Any) -> dict[str, Any]:
    from pathlift.experiments.reproduce import main as reproduce

    return reproduce(args, _progress)


def _progress(text: str) -> None:
    print(f"pathlift: {text} …", file=sys.stderr, flush=True)


def _inspect(args: Any) -> dict[str, Any]:
    import pathlift

    model, inputs = _load(args)
    _progress("finding the rescaling group")
    group = pathlift.rescaling_group(model, inputs, batch_norm=args.batch_norm)
    pinned = {n: group.why_pinned(n) for n in group.parameters}
    data = {
        "num_scales": group.num_scales,
        "parameters": {n: list(s.shape) for n, s in group.parameters.items()},
        "pinned": {n: reasons for n, reasons in pinned.items() if reasons},
        "unsupported": group.unsupported,
    }
    return {"data": data, "text": group.summary()}


def _condition(args: Any) -> dict[str, Any]:
    import pathlift

    _check_output(args.output)
    if args.stream:
        return _condition_stream(args)
    model, inputs = _load(args)
    _progress("conditioning")
    report = pathlift.condition_(
        model,
        inputs,
        criterion=args.criterion,
        solver=args.solver,
        tol=args.tol,
        exact=not args.no_exact,
        batch_norm=args.batch_norm,
    )
    _progress(f"writing {args.output}")
    _save(model, args.output)
    return {
        "data": {**report.to_dict(), "output": str(args.output)},
        "text": f"{report}\nwritten      {args.output}",
    }


def _condition_stream(args: Any) -> dict[str, Any]:
    from pathlift.errors import ArgumentError
    from pathlift.streaming import condition_checkpoint

    if args.weights is None:
        raise ArgumentError("--stream reads weights as they are needed. Add --weights PATH.")

    def build() -> nn.Module:
        import torch

        torch.manual_seed(args.seed)
        return _model(args.spec).train(args.mode == "train")

    _return_freed_memory()
    report = condition_checkpoint(
        build,
        tuple(_example(text) for text in args.input),
        args.weights,
        args.output,
        criterion=args.criterion,
        solver=args.solver,
        tol=args.tol,
        exact=not args.no_exact,
        batch_norm=args.batch_norm,
        progress=_Meter(),
    )
    return {
        "data": {**report.to_dict(), "output": str(args.output)},
        "text": f"{report}\nwritten      {args.output}",
    }


def _return_freed_memory() -> None:
    """Have the C library give every larger block back to the system when it is freed.

    By default glibc keeps blocks of up to 32 MB for later and memory grows with the number of
    tensors read, not with the largest. Elsewhere nothing is done.
    """
    threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(threshold, 1 << 20)


class _Meter:
    """Progress in bytes on stderr: a line when a phase starts, then one every few seconds."""

    def __init__(self, seconds: float = 2.0) -> None:
        self._seconds, self._phase, self._shown = seconds, "", 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase == self._phase and now - self._shown < self._seconds:
            return
        self._phase, self._shown = phase, now
        share = f" of {total / 1e9:.2f}" if total else ""
        _progress(f"{phase}, {done / 1e9:.2f}{share} GB" if done else phase)


def _norms(args: Any) -> dict[str, Any]:
    import pathlift

    model, inputs = _load(args)
    _progress("path norms")
    data = {
        "path_norm_1": pathlift.path_norm(model, inputs, p=1),
        "path_norm_2": pathlift.path_norm(model, inputs, p=2),
        "imbalance": pathlift.imbalance(pathlift.path_kernel_diagonal(model, inputs)),
    }
    return {"data": data, "text": "\n".join(f"{k:<12} {v:.6g}" for k, v in data.items())}


def _demo(args: Any) -> dict[str, Any]:
    from pathlift.experiments.demo import main as demo

    page = demo(args.output, quick=args.quick, progress=_progress)
    return {"data": {"page": str(page)}, "text": f"The page is {page}"}


def _load(args: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    import torch

    torch.manual_seed(args.seed)
    model = _model(args.spec)
    if args.weights is not None:
        _load_weights(model, args.weights)
    model.train(args.mode == "train")
    return model, tuple(_example(text) for text in args.input)


def _example(text: str) -> Tensor:
    import torch

    from pathlift.errors import ArgumentError

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
    return torch.zeros(shape, dtype=getattr(torch, name))


def _model(spec: str) -> nn.Module:
    from torch import nn

    from pathlift.errors import ArgumentError, MissingDependencyError

    source, separator, name = spec.rpartition(":")
    if not separator or not source or not name:
        raise ArgumentError(
            f"{spec!r} is not a model. Give torchvision:resnet18, timm:resnet50, "
            f"package.module:factory or file.py:factory."
        )
    try:
        if source == "torchvision":
            models = importlib.import_module("torchvision.models")
            return _checked(models.get_model(name, weights=None), spec)
        if source == "timm":
            return _checked(importlib.import_module("timm").create_model(name), spec)
        if source.endswith(".py"):
            path = Path(source)
            if not path.is_file():
                raise ArgumentError(f"there is no file {source!r}. Give a path that exists.")
            module_spec = importlib.util.spec_from_file_location(path.stem, path)
            assert module_spec is not None and module_spec.loader is not None
            module = importlib.util.module_from_spec(module_spec)
            module_spec.loader.exec_module(module)
        else:
            sys.path.insert(0, os.getcwd())
            module = importlib.import_module(source)
    except ImportError as error:
        raise MissingDependencyError(
            f"{spec!r} needs a module that can't be imported: {error}. Install it, or run where "
            f"it can be found."
        ) from error
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(
            f"{spec!r} can't be built: {str(error).splitlines()[0]}. Check the name."
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        found = [n for n in vars(module) if not n.startswith("_")][:8]
        raise ArgumentError(
            f"{source!r} has no callable {name!r}; it has {', '.join(found) or 'nothing public'}."
        )
    model = factory() if not isinstance(factory, nn.Module) else factory
    return _checked(model, spec)


def _checked(model: object, spec: str) -> nn.Module:
    from torch import nn

    from pathlift.errors import ArgumentError

    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"{spec!r} gave a {type(model).__name__}; a factory must return a torch.nn.Module."
        )
    return model


def _load_weights(model: nn.Module, path: Path) -> None:
    import torch

    from pathlift.checkpoint import open_checkpoint
    from pathlift.errors import ArgumentError

    if not path.exists():
        raise ArgumentError(f"there is no weights file {str(path)!r}. Give a path that exists.")
    if path.is_dir() or path.suffix in (".safetensors", ".json"):
        with open_checkpoint(path) as checkpoint:
            state = {name: checkpoint.read(name) for name in checkpoint.tensors}
    elif path.suffix in (".pt", ".pth", ".bin"):
        try:
            # Never unpickle arbitrary objects: a checkpoint may come from anywhere.
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ArgumentError(
                f"{str(path)!r} holds more than tensors, and running code from a checkpoint is "
                f"refused. Save the state dict alone, best as .safetensors."
            ) from error
    else:
        raise ArgumentError(
            f"{str(path)!r} has suffix {path.suffix!r}. Supported: .safetensors, an "
            f"index (.json) or the folder of either, .pt, .pth, .bin."
        )
    own = model.state_dict()
    aliases: dict[tuple[int, Any], str] = {}
    for name, tensor in own.items():
        first = aliases.setdefault((tensor.data_ptr(), tensor.shape), name)
        if name not in state and first in state and tensor.numel():
            state[name] = state[first]
    missing = [n for n in own if n not in state]
    unknown = [n for n in state if n not in own]
    shapes = [n for n in own if n in state and own[n].shape != state[n].shape]
    for what, names in (("lack", missing), ("add", unknown), ("change the shape of", shapes)):
        if names:
            raise ArgumentError(
                f"the weights in {str(path)!r} {what} {len(names)} of the model's tensors, "
                f"first {names[0]!r}. Give the weights of this model."
            )
    model.load_state_dict(state)


def _check_output(path: Path) -> None:
    """A file ends in .safetensors; everything else is a folder, but for what means a file."""
    from pathlift.errors import ArgumentError

    file = path.suffix in (".pt", ".pth", ".bin", ".json", ".npz", ".onnx") or path.is_file()
    if path.suffix != ".safetensors" and file:
        raise ArgumentError(
            f"the output {str(path)!r} must end in .safetensors, or be a folder for files with an "
            f"index."
        )
    if path.suffix == ".safetensors" and path.is_dir():
        raise ArgumentError(f"the output {str(path)!r} is a folder. Name a file, or another one.")
    if not path.parent.is_dir():
        raise ArgumentError(f"there is no folder {str(path.parent)!r}. Make it first.")


def _save(model: nn.Module, path: Path) -> None:
    """Write the state dict as one file, or as a folder of one file and an index; atomically.

    A tensor that stands under several names is stored once, under its first name; loading fills
    in the others.
    """
    from pathlift.checkpoint import Shard, as_bytes, write_file, write_folder

    stored: dict[str, Tensor] = {}
    seen: set[tuple[int, Any]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        stored[name] = tensor
    # Wide dtypes first, so that every tensor is aligned.
    order = sorted(stored, key=lambda name: -stored[name].dtype.itemsize)
    shard = Shard(
        [(n, stored[n].dtype, tuple(stored[n].shape)) for n in order],
        lambda: (as_bytes(stored[n]) for n in order),
        {"format": "pt"},
    )
    if path.suffix == ".safetensors":
        write_file(path, shard)
    else:
        write_folder(path, [shard], {})


if __name__ == "__main__":
    sys.exit(main())
