"""Model and example inputs -> :class:`Program`: flat graphs of ATen calls with named tensors.

Everything later reads the graph, never the modules: what a module is called or how it is
written has no influence, only the operations it performs.
"""

from __future__ import annotations

import inspect
import operator
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pathlift.errors import ArgumentError, CaptureError
from pathlift.sharded import local_part

# Modules of torch itself whose dependence on ``training`` is a flag of the operation they call,
# so that both modes give the same graph for our purposes.
_MODE_IS_A_FLAG = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
)


# Larger constants are not evaluated: what reads them is treated as unknown.
_MAX_CONSTANT = 20_000_000


# Name -> the values of a parameter, read when they are asked for.
Source = Callable[[str], Tensor]


@dataclass(frozen=True)
class Inputs:
    """Example inputs in the one form used inside: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Graph:
    """One traced execution of the model.

    Attributes:
        nodes: the ATen calls, placeholders and the output, in execution order.
        training: the mode the model was in.
        tensors: placeholder name -> name of the parameter or buffer it stands for; tied tensors
            stand under the first of their names.
        constants: node -> value, for what depends on neither inputs nor parameters (buffers,
            masks, index tables, position ids).
        state_outputs: outputs that are updated buffers.
    """

    nodes: tuple[fx.Node, ...]
    training: bool
    tensors: dict[str, str]
    constants: dict[fx.Node, Any]
    state_outputs: frozenset[str] = frozenset()

    def outputs(self) -> list[fx.Node]:
        """The nodes the model returns (updated buffers, which the graph returns too, left out)."""
        found: list[fx.Node] = []
        fx.node.map_arg(self.nodes[-1].args, found.append)
        return [n for n in found if n.name not in self.state_outputs]


@dataclass(frozen=True)
class Program:
    """What the rest of the pipeline knows of a model.

    Attributes:
        graphs: one graph, or one per mode (evaluation, training) where the module's code looks
            at ``training`` and may thus run other operations.
        parameters: name -> parameter, each tensor once, under its first name.
        buffers: name -> buffer, each tensor once.
        aliases: further name -> first name, of tensors registered more than once.
        inputs: the example inputs.
        source: name -> values, for a model whose parameters are on the meta device.
    """

    graphs: tuple[Graph, ...]
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    aliases: dict[str, str]
    inputs: Inputs
    source: Source | None = None

    def value(self, name: str) -> Tensor:
        """The values of a parameter, to be read and then let go; not to be written to."""
        if self.source is not None:
            return self.source(name)
        return self.parameters[name].detach()

    @property
    def device(self) -> torch.device:
        """Where the values are worked on: with the model if it lies on one device that computes
        in float64, else on the host."""
        tensors = [*self.parameters.values(), *self.buffers.values(), *tensors_in(self.inputs)]
        found = {t.device for t in tensors if not t.is_meta}
        host = torch.device("cpu")
        device = found.pop() if len(found) == 1 else host
        return host if device.type == "mps" else device

    @property
    def training(self) -> bool:
        """The mode the model was in when it was captured."""
        return self.graphs[0].training

    def graph(self, training: bool) -> Graph:
        """The graph of the given mode."""
        return next((g for g in self.graphs if g.training == training), self.graphs[0])


def operation(node: fx.Node) -> str:
    """The name of the ATen operation without namespace, overload and in-place underscore."""
    target = node.target
    if target is operator.getitem:
        return "getitem"
    name = getattr(target, "_opname", None) or getattr(
        getattr(target, "_schema", None), "name", str(target)
    )
    name = str(name).split("::")[-1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def in_place(node: fx.Node) -> bool:
    """Whether the call overwrites its first argument."""
    return _writes(node.target)


@cache
def _writes(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    info = schema.arguments[0].alias_info if schema and schema.arguments else None
    return bool(info and info.is_write)


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that ran the node ('' for the model itself)."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    return str(entries[-1][0]) if entries else ""


def shape_of(node: fx.Node) -> torch.Size:
    """The shape of the node's output (empty for what is not one tensor)."""
    value = node.meta.get("val")
    return torch.Size(int(n) for n in value.shape) if isinstance(value, Tensor) else torch.Size()


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def as_inputs(example_inputs: object) -> Inputs:
    """Normalise a tensor, a tuple or list of arguments, or a dict of keyword arguments."""
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,), {})
    if isinstance(example_inputs, (tuple, list)):
        return Inputs(tuple(example_inputs), {})
    if isinstance(example_inputs, Mapping):
        if not all(isinstance(k, str) for k in example_inputs):
            raise ArgumentError(
                "example_inputs is a dict whose keys are not all strings; a dict is passed as "
                "keyword arguments. Wrap it in a tuple to pass it as one positional argument."
            )
        return Inputs((), dict(example_inputs))
    raise ArgumentError(
        f"example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments; "
        f"found {type(example_inputs).__name__}. Pass one batch as the model's forward takes it."
    )


def named_tensors(
    model: nn.Module,
) -> tuple[dict[str, nn.Parameter], dict[str, Tensor], dict[str, str]]:
    """Parameters and buffers once each under their first name, and the other names' aliases."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}

    def visit(named: Iterator[tuple[str, Any]], into: dict[str, Any]) -> None:
        for name, tensor in named:
            original = first.setdefault(id(tensor), name)
            if original == name:
                into[name] = tensor
            else:
                aliases[name] = original

    visit(model.named_parameters(remove_duplicate=False), parameters)
    visit(model.named_buffers(remove_duplicate=False), buffers)
    return parameters, buffers, aliases


def check_model(model: object, meta: bool = False) -> nn.Module:
    """Raise unless ``model`` is a module with real, initialised, separately stored parameters.

    ``meta``: parameters on the meta device are allowed (their values come from elsewhere).
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model must be a torch.nn.Module; found {type(model).__name__}. "
            f"Pass the module itself, not its state dict or its output."
        )
    model = unwrap(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"the model is a {type(model).__name__}; TorchScript modules can't be exported. "
            f"Pass the eager module it was made from."
        )
    parameters, buffers, _ = named_tensors(model)
    for name, tensor in [*parameters.items(), *buffers.items()]:
        if nn.parameter.is_lazy(tensor):
            raise CaptureError(
                f"'{name}' is not initialised: its module is lazy. Run the model once on an "
                f"example batch, then call again."
            )
        if tensor.is_meta and not (meta and name in parameters):
            raise CaptureError(
                f"'{name}' is on the meta device and holds no values. Materialise the model "
                f"(model.to_empty(device=...) and load or initialise weights), then call again."
            )
        if tensor.layout != torch.strided:
            raise CaptureError(
                f"'{name}' has layout {tensor.layout}; only strided (dense) tensors are "
                f"supported. Convert it with .to_dense()."
            )
    _check_storage(parameters)
    return model


def _check_storage(parameters: Mapping[str, Tensor]) -> None:
    """Two parameters over the same memory would be multiplied twice: refuse them."""
    parts = {name: local_part(p) for name, p in parameters.items()}
    spans = sorted(
        (
            p.untyped_storage().data_ptr(),
            p.storage_offset() * p.element_size(),
            p.nbytes,
            name,
        )
        for name, p in parts.items()
        if p.numel() and p.untyped_storage().data_ptr()
    )
    for (base_a, start_a, size_a, a), (base_b, start_b, _, b) in zip(
        spans, spans[1:], strict=False
    ):
        if base_a == base_b and start_b < start_a + size_a:
            a, b = sorted((a, b))
            raise CaptureError(
                f"parameters '{a}' and '{b}' are different tensors over the same memory; "
                f"rescaling one would change the other. Register the same Parameter under both "
                f"names (that is supported), or give each its own storage."
            )


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Keep modes, random state, grad mode, buffers' values and gradients as they are."""
    modes = [(m, m.training) for m in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with (
        torch.random.fork_rng(devices=devices),
        torch.set_grad_enabled(torch.is_grad_enabled()),
    ):
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _looks_at_mode(model: nn.Module) -> bool:
    """Whether any code of the model names ``training``: then both modes must be traced."""
    seen: set[type] = set()
    for module in model.modules():
        cls = type(module)
        if cls in seen or isinstance(module, _MODE_IS_A_FLAG):
            continue
        seen.add(cls)
        if module.__dict__.get("forward") is not None:
            return True
        for base in cls.__mro__:
            if base in (nn.Module, object):
                break
            for member in vars(base).values():
                function = inspect.unwrap(member) if callable(member) else member
                function = getattr(function, "__func__", function)
                if "training" in _names(getattr(function, "__code__", None)):
                    return True
    return False


def _names(code: Any) -> set[str]:
    if code is None:
        return set()
    found = set(code.co_names) | {c for c in code.co_consts if isinstance(c, str)}
    for const in code.co_consts:
        if inspect.iscode(const):
            found |= _names(const)
    return found


def capture(model: nn.Module, example_inputs: object, source: Source | None = None) -> Program:
    """Trace ``model`` on ``example_inputs`` without running it on real data.

    Args:
        model: any module; left as found (modes, random state, buffers).
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        source: where the values of parameters come from, if not from the model. Its parameters
            may then be on the meta device; no memory is taken for them.

    Raises:
        ArgumentError: ``model`` or ``example_inputs`` has the wrong type.
        CaptureError: the model can't be traced; the message says where and why.
    """
    model = check_model(model, meta=source is not None)
    inputs = as_inputs(example_inputs)
    parameters, buffers, aliases = named_tensors(model)
    own_mode = model.training
    states = [(m, m.training) for m in model.modules()]
    mixed = any(training != own_mode for _, training in states)
    modes = [own_mode, not own_mode] if mixed or _looks_at_mode(model) else [own_mode]
    graphs: list[Graph] = []
    with preserved(model), _fake_for_meta(model):
        for mode in modes:
            # The model's own mode is traced as found (a batch norm frozen in eval mode stays so).
            if mode != own_mode:
                model.train(mode)
            graphs.append(_trace(model, inputs, mode, aliases))
    return Program(tuple(graphs), parameters, buffers, aliases, inputs, source)


@contextmanager
def _fake_for_meta(model: nn.Module) -> Iterator[None]:
    """Let fake CPU tensors stand for parameters on the meta device.

    To the tracer they look like the parameters that will be loaded. Meta tensors would not mix
    with the inputs and buffers, and what forward makes on their device would have no values.
    """
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    mode = FakeTensorMode(allow_non_fake_inputs=True) if places else nullcontext()
    fakes: dict[int, nn.Parameter] = {}
    for _, _, parameter in places:
        if id(parameter) not in fakes:
            with mode:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                fakes[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    try:
        for module, name, parameter in places:
            module._parameters[name] = fakes[id(parameter)]
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def _trace(model: nn.Module, inputs: Inputs, mode: bool, aliases: dict[str, str]) -> Graph:
    try:
        return _trace_export(model, inputs, mode, aliases)
    except Exception as error:  # whatever export refuses, the fallback may take
        reason = error
    try:
        return _trace_fx(model, inputs, mode, aliases)
    except Exception as error:
        first = str(reason).strip().splitlines() or [type(reason).__name__]
        second = str(error).strip().splitlines() or [type(error).__name__]
        raise CaptureError(
            f"{type(model).__name__} can't be captured in "
            f"{'train' if mode else 'eval'} mode on inputs {describe(inputs)}. "
            f"torch.export: {type(reason).__name__}: {first[0].rstrip('.')}. "
            f"Plain tracing: {type(error).__name__}: {second[0].rstrip('.')}. "
            f"Check that model(*example_inputs) runs, and that no branch depends on values."
        ) from error


def describe(inputs: Inputs) -> str:
    """Shapes and dtypes of the inputs, for messages."""

    def one(value: object) -> str:
        if isinstance(value, Tensor):
            return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        return type(value).__name__

    parts = [one(a) for a in inputs.args] + [f"{k}={one(v)}" for k, v in inputs.kwargs.items()]
    return "[" + ", ".join(parts) + "]"


def _trace_export(model: nn.Module, inputs: Inputs, mode: bool, aliases: dict[str, str]) -> Graph:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, inputs.args, inputs.kwargs or None, strict=False)
        graph = exported.graph_module.graph
        # Blocks under no_grad or autocast come as nested graphs; the second pass inlines them.
        nested = any(isinstance(n.target, torch._ops.HigherOrderOperator) for n in graph.nodes)
        if nested or mutates_aliases(graph):
            exported = exported.run_decompositions({})
    signature = exported.graph_signature
    tensors: dict[str, str] = {}
    lifted: dict[str, Tensor] = {}
    for spec in signature.input_specs:
        name = spec.arg.name
        if spec.kind in (
            torch.export.graph_signature.InputKind.PARAMETER,
            torch.export.graph_signature.InputKind.BUFFER,
        ):
            assert spec.target is not None
            tensors[name] = aliases.get(spec.target, spec.target)
        elif spec.kind == torch.export.graph_signature.InputKind.CONSTANT_TENSOR:
            assert spec.target is not None
            lifted[name] = exported.constants[spec.target]
    state = frozenset(
        spec.arg.name
        for spec in signature.output_specs
        if spec.kind
        not in (
            torch.export.graph_signature.OutputKind.USER_OUTPUT,
            torch.export.graph_signature.OutputKind.LOSS_OUTPUT,
        )
        and hasattr(spec.arg, "name")
    )
    user = {
        spec.arg.name
        for spec in signature.output_specs
        if spec.kind == torch.export.graph_signature.OutputKind.USER_OUTPUT
        and hasattr(spec.arg, "name")
    }
    module = exported.graph_module
    constants = fold_constants(model, module, tensors, lifted)
    return Graph(tuple(module.graph.nodes), mode, tensors, constants, state - user)


def _trace_fx(model: nn.Module, inputs: Inputs, mode: bool, aliases: dict[str, str]) -> Graph:
    """Fallback: trace with fake tensors through ``make_fx``, parameters passed as arguments."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils import _pytree as pytree

    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    flat, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    is_tensor = [isinstance(leaf, Tensor) for leaf in flat]

    def run(state: dict[str, Tensor], leaves: list[Tensor]) -> Any:
        given = iter(leaves)
        args, kwargs = pytree.tree_unflatten(
            [next(given) if t else leaf for t, leaf in zip(is_tensor, flat, strict=True)],
            spec,
        )
        out = torch.func.functional_call(model, state, args, kwargs)
        return [t for t in tensors_in(out) if t.is_floating_point()]

    leaves = [leaf for leaf in flat if isinstance(leaf, Tensor)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = make_fx(run, tracing_mode="fake", pre_dispatch=True)(named, leaves)
    if mutates_aliases(module.graph):
        raise CaptureError("the model writes into views of its own activations")
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    tensors = {n.name: name for n, name in zip(placeholders, named, strict=False)}
    constants = fold_constants(model, module, tensors, {})
    return Graph(tuple(module.graph.nodes), mode, tensors, constants)


def fold_constants(
    model: nn.Module,
    module: fx.GraphModule,
    tensors: dict[str, str],
    lifted: dict[str, Tensor],
) -> dict[fx.Node, Any]:
    """Evaluate what depends on constants alone; random and in-place operations are left out."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            name = tensors.get(node.name, "")
            if node.name in lifted:
                known[node] = lifted[node.name].detach()
            elif name in buffers:
                known[node] = buffers[name].detach()
            elif name in parameters and not parameters[name].is_floating_point():
                known[node] = parameters[name].detach()
        elif node.op == "get_attr":
            attribute = operator.attrgetter(str(node.target))(module)
            if isinstance(attribute, Tensor):
                known[node] = attribute.detach()
        elif _foldable(node) and all(n in known for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            # An operation that can't run here (another device, a custom one) stays unfolded.
            with suppress(Exception), torch.no_grad():
                known[node] = node.target(*args, **kwargs)
    return known


def _foldable(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    meta = node.meta.get("val")
    sizes = [
        m.numel()
        for m in (meta if isinstance(meta, (list, tuple)) else [meta])
        if isinstance(m, Tensor)
    ]
    return (
        bool(sizes)
        and sum(sizes) <= _MAX_CONSTANT
        and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())
        and not in_place(node)
        and not operation(node).startswith(("empty", "new_empty"))
    )


def mutates_aliases(graph: fx.Graph) -> bool:
    """Whether an in-place operation changes a tensor that is read again under another name.

    Readers of the graph treat ``y = relu_(x)`` as ``y = relu(x)`` and ``x`` as renamed to ``y``.
    That is right unless a view of the same memory made earlier is read later.
    """
    root: dict[fx.Node, fx.Node] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    writes: list[fx.Node] = []
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        source = node.args[0] if node.args else None
        if isinstance(source, (list, tuple)) or not isinstance(source, fx.Node):
            continue
        if schema is None:
            if node.op == "call_function":  # getitem of a list of views
                root[node] = root.get(source, source)
            continue
        info = schema.arguments[0].alias_info if schema.arguments else None
        if info is not None:
            root[node] = root.get(source, source)
            if info.is_write:
                writes.append(node)
    if not writes:
        return False
    members: dict[fx.Node, list[fx.Node]] = {}
    for node, base in root.items():
        members.setdefault(base, [base]).append(node)
    for write in writes:
        for node in members[root[write]]:
            if node is write.args[0] or order[node] >= order[write]:
                continue
            if any(order[user] > order[write] for user in node.users):
                if _renamed(node, write):
                    continue
                return True
    return False


def _renamed(node: fx.Node, write: fx.Node) -> bool:
    """Whether ``node`` reaches the written tensor through in-place calls alone (same tensor)."""
    current = write.args[0]
    while isinstance(current, fx.Node) and current is not node:
        schema = getattr(current.target, "_schema", None)
        info = schema.arguments[0].alias_info if schema and schema.arguments else None
        if info is None or not info.is_write:
            return False
        current = current.args[0]
    return current is node


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors inside nested tuples, lists, mappings and objects with attributes (dataclasses)."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [t for v in value for t in tensors_in(v)]
    if hasattr(value, "__dict__"):
        return [t for v in vars(value).values() for t in tensors_in(v)]
    return []
