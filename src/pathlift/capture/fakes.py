"""Fake tensors: shapes, strides and dtypes without values, as the recorder needs them.

PyTorch's own mode works them out operation by operation, a millisecond for each, and its first use
in a process imports PyTorch's compiler (over a second). But the model has just run for real. So
what an operation returned there for arguments of the same shapes, strides, dtypes and devices and
the same numbers is looked up first; only what was not seen is worked out.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorConverter,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.utils._python_dispatch import TorchDispatchMode

from pathlift.capture.refusals import ELSEWHERE
from pathlift.capture.schemas import plan_of, taken_apart
from pathlift.capture.witness import Watch
from pathlift.errors import CaptureError

# Operations whose results have shapes that follow from those of the arguments, never from values,
# and whose results are either new or over the memory of the first argument. With or without "_".
_NAMES = """
    view reshape transpose t permute unsqueeze squeeze slice select expand
    split split_with_sizes unbind detach alias clone
    linear addmm mm bmm baddbmm matmul conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d convolution batch_norm instance_norm layer_norm group_norm rms_norm
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d
    mean sum var amax amin max_pool2d_with_indices cat stack embedding softmax log_softmax
    scaled_dot_product_attention constant_pad_nd dropout feature_dropout channel_shuffle
    pixel_shuffle upsample_nearest2d upsample_bilinear2d roll
    relu add sub rsub mul div neg abs exp log sqrt rsqrt reciprocal pow
    sigmoid tanh silu gelu mish elu celu softplus leaky_relu prelu _prelu_kernel
    hardtanh hardswish hardsigmoid clamp clamp_min clamp_max maximum minimum where lerp
    empty empty_like new_empty rand randn bernoulli uniform normal _grouped_mm
"""
_REMEMBERED = frozenset(_NAMES.split())
_DEVICE = torch.ops.prim.device.default
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_VALUE_TAGS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_VALUE_TAGS |= {torch.Tag.inplace_view}


class _New(NamedTuple):
    """A tensor of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _View(NamedTuple):
    """A part of the first argument's memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Same(NamedTuple):
    """The first argument itself."""


class _Parts(Watch):
    """Hands on the operations that another one is composed of."""

    def __init__(self, run: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})


class _Unsuited(Exception):
    """Something that is not looked up."""


class Fakes(FakeTensorMode):
    """The mode of the fake tensors, which knows the results of a real run.

    Args:
        known: whether the recorder records an operation of this name whole.
    """

    def __init__(self, known: Callable[[str], bool]) -> None:
        # What FakeTensor itself reads. The rest is set up by _complete.
        TorchDispatchMode.__init__(self)
        config: Any = torch._functorch.config
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self.shape_env, self.static_shapes = None, True
        self.in_kernel_invocation = False
        self.enter_stack = []
        self.allow_meta = config.fake_tensor_allow_meta
        self._allow_unsafe_data_ptr_access = getattr(
            config, "fake_tensor_allow_unsafe_data_ptr_access", True
        )
        self.fake_tensor_converter = FakeTensorConverter(copy_data=False)
        self.known, self._whole = known, False
        # The state that a mode keeps while it is entered belongs to one thread.
        self._thread, self.elsewhere = threading.get_ident(), False
        self._twins: dict[int, tuple[Tensor, FakeTensor]] = {}
        self._seen: dict[Any, Any] = {}

    def __enter__(self) -> Any:
        if threading.get_ident() != self._thread:
            self.elsewhere = True
            raise CaptureError(ELSEWHERE)
        return super().__enter__()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # wrapping the dispatch would import the compiler

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call an operation for real, and remember what it has returned.

        Of one that the recorder takes apart, what its parts have returned.
        """
        if func.namespace != "aten":
            return func(*args, **kwargs)
        plan = plan_of(func)
        if not self.known(plan.name):
            with _Parts(self.run):
                result = taken_apart(func, plan, args, kwargs, real=True)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        with contextlib.suppress(_Unsuited):
            self._seen[self._key(func, args, kwargs)] = _described(result, args)
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].device
        try:
            found = self._seen.get(self._key(func, args, kwargs))
        except _Unsuited:
            found = None
        if found is not None:
            return self._made(found, args)
        self._complete()
        return self.dispatch(func, types, args, kwargs)

    def from_tensor(self, tensor: Tensor, **options: Any) -> FakeTensor:
        """The fake tensor in a real one's place; the same one every time."""
        twin = self._twin(tensor)
        if twin is not None:
            return twin
        self._complete()
        return super().from_tensor(tensor, **options)

    def _complete(self) -> None:
        """Set up everything that the mode proper needs; what is there already stays."""
        if not self._whole:
            present = dict(vars(self))
            super().__init__(allow_non_fake_inputs=True)
            vars(self).update(present)
            self._whole = True

    def _key(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not _follows_from_shapes(func):
            raise _Unsuited
        return (func, self._look(args), *((k, self._look(v)) for k, v in kwargs.items()))

    def _look(self, value: Any) -> Any:
        """What the result may depend on."""
        kind = type(value)
        if kind is FakeTensor:
            if value.fake_mode is not self or value.constant is not None:
                raise _Unsuited
            return _geometry(value)
        if kind in _PLAIN:
            return _geometry(value)
        if kind is tuple or kind is list:
            return tuple([self._look(v) for v in value])
        if value is None or kind in _NUMBERS:
            return kind, value
        raise _Unsuited

    def _made(self, found: Any, args: Any) -> Any:
        if isinstance(found, _New):
            with torch._C._DisableTorchDispatch():
                return self._fake(found)
        if isinstance(found, (_View, _Same)):
            first = args[0]
            fake = first if type(first) is FakeTensor else self.from_tensor(first)
            if isinstance(found, _Same):
                return fake
            with in_kernel_invocation_manager(self):
                view = torch.as_strided(fake, *found)
            with torch._C._DisableTorchDispatch():
                return FakeTensor(self, view, fake.fake_device)
        return type(found)(self._made(f, args) for f in found)

    def _fake(self, new: _New) -> FakeTensor:
        empty = torch.empty_strided(new.shape, new.stride, dtype=new.dtype, device="meta")
        return FakeTensor(self, empty, new.device)

    def _twin(self, tensor: Tensor) -> FakeTensor | None:
        """The fake tensor of a real one that fills memory of its own; None for any other."""
        held = self._twins.get(id(tensor))
        if held is not None and _geometry(held[1]) == _geometry(tensor):
            return held[1]
        if type(tensor) not in _PLAIN or not _fills_its_memory(tensor):
            return None
        known = self.fake_tensor_converter._get_memo(tensor)
        if known is None:
            with torch._C._DisableTorchDispatch():
                stride = tensor.stride()
                known = self._fake(_New(tensor.shape, stride, tensor.dtype, tensor.device))
            # The mode proper has to find this one.
            self.fake_tensor_converter.set_tensor_memo(tensor, known)
        self._twins[id(tensor)] = (tensor, known)
        return known


_NUMBERS = frozenset(
    {bool, int, float, str, torch.dtype, torch.layout, torch.device, torch.memory_format}
)


def _follows_from_shapes(func: Any) -> bool:
    """Whether what an operation returns is known from the shapes of its arguments."""
    if func.namespace != "aten":
        return False
    name = func._schema.name.removeprefix("aten::")
    if name == "where" and len(func._schema.arguments) == 1:
        return False  # where something holds: how often, values decide
    listed = name in _REMEMBERED or name.removesuffix("_") in _REMEMBERED
    return listed and not _VALUE_TAGS.intersection(func.tags)


def _geometry(tensor: Tensor) -> Any:
    """All of a tensor but its values."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_neg():
        raise _Unsuited
    shape, dtype = tensor.shape, tensor.dtype
    if dtype.is_complex or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise _Unsuited
    return shape, tensor.stride(), tensor.storage_offset(), dtype, tensor.device


def _described(result: Any, args: Any) -> Any:
    """How to make a fake tensor like a result."""
    if isinstance(result, (list, tuple)):
        if type(result) not in (list, tuple):
            raise _Unsuited
        return type(result)(_described(r, args) for r in result)
    if type(result) not in _PLAIN:
        raise _Unsuited
    shape, stride, offset, dtype, device = _geometry(result)
    if result is args[0]:
        return _Same()
    memory = result.untyped_storage().data_ptr()
    if not memory or not isinstance(args[0], (Tensor, list, tuple)):
        raise _Unsuited
    shared = [_memory(a) == memory for a in _flat(args)]
    if not any(shared):
        return _New(shape, stride, dtype, device)
    if isinstance(args[0], Tensor) and _memory(args[0]) == memory and dtype == args[0].dtype:
        return _View(shape, stride, offset)
    raise _Unsuited


def _flat(args: Any) -> list[Tensor]:
    found = []
    for value in args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _flat(value)
    return found


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _fills_its_memory(tensor: Tensor) -> bool:
    """Whether nothing else can lie in a plain tensor's memory; it then needs no further look."""
    try:
        _geometry(tensor)
    except _Unsuited:
        return False
    if tensor.is_inference() or tensor.is_meta or not tensor.is_contiguous():
        return False
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
