"""Why a model can't be recorded, in words, with the line of its code that is the reason."""

from __future__ import annotations

import linecache
import os
import re
from types import CodeType

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from pathlift.capture.inputs import describe
from pathlift.capture.program import Inputs
from pathlift.errors import CaptureError

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

_BRANCHES = (
    "The operations must be the same for every input: use torch.where or masks instead of branches "
    "on values, or condition the part of the model before or after it"
)

ELSEWHERE = (
    "it uses a tensor that was computed where its operations can't be followed, such as in another "
    "thread. Compute it in the thread that calls the model."
)

_SIZES = (
    "Use torch.where or masks of a fixed size; or, where an input of integers decides it (edges of "
    "a graph), wrap the model in a module that holds that input in a buffer, and condition that"
)

# What PyTorch says where a model leaves what can be recorded -> what that is, and what to do.
_KNOWN = (
    (
        r"__torch__\.torch\.classes",
        "it computes with objects of PyTorch's own in place of tensors (packed, quantised weights)",
        "Condition the model before it is quantised",
    ),
    (
        r"passed to FakeTensor.__format__",
        "it writes the value of a tensor into a text",
        "Leave that out, or write the tensor's shape",
    ),
    (
        r"not supported for tensor subclasses",
        "it hands values of a tensor to NumPy or Python, where they can't be followed",
        "Compute with torch's operations instead",
    ),
    (
        r"does not require grad|functorch transforms don't|under the grad transform",
        "it asks autograd for a gradient, and derivatives are not followed",
        "Condition the part of the model before or after it",
    ),
    (
        r"_nested_tensor_from|NestedTensor|nested tensor|All fake tensor modes must be the same"
        r"|self.shape_env must not be None",
        "it computes with nested tensors, which are not supported",
        "Use padded tensors and a mask",
    ),
)


class ValueNeeded(CaptureError):
    """Python asked for the value of a tensor that depends on the inputs."""


class HigherOrder(CaptureError):
    """An operation that takes functions as arguments."""


def explained(model: str, mode: bool, inputs: Inputs, error: BaseException) -> CaptureError | None:
    """What stopped a recording; None if the model's own code may have failed."""
    advice = _BRANCHES
    text = str(error)
    if isinstance(error, ValueNeeded):
        why = "it asks for the value of a tensor that depends on its inputs or parameters"
    elif isinstance(error, HigherOrder):
        why = (
            f"it uses the higher-order operation '{error}', which takes functions as arguments; "
            f"supported are operations on tensors"
        )
        advice = (
            "Write it with plain operations, or condition the part of the model before or after it"
        )
    elif isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        why = "the size of a tensor, or a branch, depends on values"
        advice = _SIZES
    elif isinstance(error, CaptureError):
        why, advice = text.rstrip("."), ""
    else:
        known = ((re.search(p, text), found, advice) for p, found, advice in _KNOWN)
        match, found, advice = next((k for k in known if k[0]), (None, "", advice))
        if match is not None:
            why = match.expand(found)
        else:
            if not isinstance(error, UnsupportedOperatorException):
                return None
            why = (
                f"the operation {error.func} has no implementation for fake tensors, from which "
                f"the shape of its result would be known"
            )
            advice = "Register one with torch.library.register_fake"
    return CaptureError(
        f"{model} can't be captured in {_name(mode)} mode on inputs {describe(inputs)}: "
        f"{why}{_at(error)}." + (f" {advice}." if advice else "")
    )


def failed(model: str, mode: bool, own: bool, inputs: Inputs, error: BaseException) -> CaptureError:
    """The model does not run: ``own`` says whether in the mode that it is in."""
    lines = str(error).strip().splitlines() or [""]
    other = "" if own else " (both modes must run, the model is used in both)"
    return CaptureError(
        f"{model} can't be captured in {_name(mode)} mode on inputs {describe(inputs)}: it does "
        f"not run on them{other}: {type(error).__name__}: {lines[0].rstrip('.')}{_at(error)}. "
        f"Check that model(*example_inputs) runs."
    )


def not_recorded(model: str, mode: bool, inputs: Inputs, error: BaseException) -> CaptureError:
    """The model runs, and its recording fails for a reason that has no words of its own."""
    lines = str(error).strip().splitlines() or [""]
    return CaptureError(
        f"{model} can't be captured in {_name(mode)} mode on inputs {describe(inputs)}: it runs, "
        f"but on fake tensors, which have shapes and no values, it fails: {type(error).__name__}: "
        f"{lines[0].rstrip('.')}{_at(error)}. Condition the part of the model before or after it."
    )


def draws(model: str, what: str) -> CaptureError:
    """Forward draws random numbers that are none of PyTorch's."""
    return CaptureError(
        f"{model} can't be captured: its forward draws random numbers from {what}, so that what "
        f"one call does need not be what the next one does. Draw them with torch (it becomes part "
        f"of what is recorded), or switch that part off."
    )


def differs(model: str, mode: bool, real: list[str], recorded: list[str]) -> CaptureError:
    """What was recorded is not what runs: the names of both runs' calls, in order."""
    k = next((k for k, (a, b) in enumerate(zip(real, recorded, strict=False)) if a != b), None)
    k = min(len(real), len(recorded)) if k is None else k
    names = [calls[k] if k < len(calls) else "nothing more" for calls in (real, recorded)]
    return CaptureError(
        f"{model} can't be captured in {_name(mode)} mode: its forward looks at what it is run on "
        f"(the type of a tensor, or a tracer): call {k + 1} is {names[0]} in a real run and "
        f"{names[1]} on the fake tensors that it is recorded on. Let it do the same for both."
    )


def _name(mode: bool) -> str:
    return "train" if mode else "eval"


def _at(error: BaseException) -> str:
    line = users_line(error)
    return f" ({line})" if line else ""


def in_torch(code: CodeType) -> bool:
    """Whether code is PyTorch's."""
    return code.co_filename.startswith(_TORCH)


def users_line(error: BaseException) -> str:
    """The innermost line of code that is neither torch's nor ours: ``file.py:12: if x > 0:``."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    for file, line in reversed(frames):
        path = os.path.abspath(file)
        if file.startswith("<") or path.startswith((_TORCH, _OWN)) or "contextlib" in file:
            continue
        text = linecache.getline(file, line).strip()
        return f"{os.path.basename(file)}:{line}" + (f": {text}" if text else "")
    return ""
