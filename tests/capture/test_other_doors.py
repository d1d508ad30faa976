"""Where a record need not stand for a call: values that leave PyTorch, code that looks at what it is
run on, transforms and parts that are run in another way. As in test_strange.py, each keeps its
function or is refused in words.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pathlift
from capture import test_strange as strange
from capture.test_strange import WIDTH, Base

Forward = Callable[[Any, Tensor], Any]


class Clamps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(0, 0.3)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class UsesNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.maximum(x.detach().numpy(), 0.3))


class ClampsRelus(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.clamp(max=0.1) if func is torch.ops.aten.relu.default else out


LIBRARY = torch.library.Library("pathlift_tests", "DEF")
LIBRARY.define("bounded(Tensor x) -> Tensor")
LIBRARY.impl("bounded", lambda x: x.clamp(min=0.2), "CompositeExplicitAutograd")
LIBRARY.define("shapeless(Tensor x) -> Tensor")
LIBRARY.impl("shapeless", lambda x: torch.from_numpy(x.detach().numpy().clip(0.2)), "CPU")
LIBRARY.define("shift_(Tensor(a!) x) -> ()")
LIBRARY.impl("shift_", lambda x: x.add_(0.2).sum() and None, "CompositeExplicitAutograd")


def first(weight: Tensor, self: Any, x: Tensor) -> Tensor:
    """The model with another first weight."""
    return self.second(torch.relu(F.linear(x, weight, self.first.bias)))


def sampled(draw: Callable[[], float], self: Any, x: Tensor) -> Tensor:
    h = self.hidden(x)
    return self.second(h if draw() < 0.5 else h.clamp(max=0.1))


def caught(self: Any, x: Tensor) -> Tensor:
    h = self.hidden(x)
    try:
        if h.sum() > 0:
            h = h.clamp(max=0.1)
    except Exception:
        pass
    return self.second(h)


def gradient_of_a_layer(self: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x.detach().requires_grad_(True)
        return torch.autograd.grad(self.second(self.hidden(y)).sum(), y)[0]


def written_by_an_operation(self: Any, x: Tensor) -> Tensor:
    h = self.hidden(x)
    torch.ops.pathlift_tests.shift_(h)
    return self.second(h)


def under_another_mode(self: Any, x: Tensor) -> Tensor:
    with ClampsRelus():
        h = self.hidden(x)
    return self.second(h)


def out_argument(self: Any, x: Tensor) -> Tensor:
    h = self.hidden(x)
    return self.second(torch.mul(h, 2, out=torch.empty(0)))


def set_memory(self: Any, x: Tensor) -> Tensor:
    y = torch.empty(0)
    y.set_(self.hidden(x).detach())
    return self.second(y)


def of_each(self: Any, x: Tensor) -> Tensor:
    a, b = torch._foreach_mul([self.hidden(x)] * 2, [2.0, 3.0])
    torch._foreach_add_([a], [b])
    return self.second(a)


def packed(self: Any, x: Tensor) -> Tensor:
    h = torch.stack([self.hidden(x)] * 2, 1)
    rows = nn.utils.rnn.pack_padded_sequence(h, torch.tensor([2, 2, 1]), batch_first=True)
    return self.second(nn.utils.rnn.pad_packed_sequence(rows, batch_first=True)[0][:, 0])


def nested(layout: torch.layout, self: Any, x: Tensor) -> Tensor:
    rows = torch.nested.nested_tensor([x[:1], x[1:]], layout=layout)
    return self.second(torch.relu(self.first(rows))).to_padded_tensor(0.0)


def quantised(self: Any, x: Tensor) -> Tensor:
    w = self.first.weight
    return first(w + (torch.round(w * 8) / 8 - w).detach(), self, x)


def standardised(self: Any, x: Tensor) -> Tensor:
    w = self.first.weight
    return first((w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-5), self, x)


def largest_weights(self: Any, x: Tensor) -> Tensor:
    w = self.first.weight
    return first(w * (w.abs() >= w.abs().flatten().topk(10).values[-1]), self, x)


def straight_through_codes(self: Any, x: Tensor) -> Tensor:
    h = self.hidden(x)
    codes = self.first.weight.detach().t().repeat(1, 1)
    q = codes[torch.cdist(h, codes).argmin(-1)]
    return self.second(h + (q - h).detach())


def stacked_copies(self: Any, x: Tensor) -> Tensor:
    state = torch.func.stack_module_state([self.first, self.first])
    call = lambda p, b: torch.func.functional_call(self.first, (p, b), (x,))  # noqa: E731
    return self.second(torch.relu(torch.func.vmap(call)(*state)).sum(0))


def threads(count: int, self: Any, x: Tensor) -> Tensor:
    h = self.hidden(x)
    with ThreadPoolExecutor(count) as pool:
        parts = list(pool.map(lambda k: (h * k).clamp(max=0.3), range(1, count + 1)))
    return self.second(sum(parts))


def counted(count: list[int], self: Any, x: Tensor) -> Tensor:
    count[0] += 1
    return self.second(self.hidden(x) if count[0] < 50 else self.hidden(x).clamp(max=0.1))


def counted_in_a_closure() -> Forward:
    count = 0

    def forward(self: Any, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return counted([count], self, x)

    return forward


def counted_in_a_default(self: Any, x: Tensor, count: list[int] = [0]) -> Tensor:  # noqa: B006
    return counted(count, self, x)


def counted_in_an_attribute(self: Any, x: Tensor) -> Tensor:
    counter: Any = counted_in_an_attribute
    counter.calls = getattr(counter, "calls", 0) + 1
    return counted([counter.calls], self, x)


def counted_in_a_global(self: Any, x: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return counted([CALLS], self, x)


def copied(self: Any, x: Tensor) -> Tensor:
    return copy.deepcopy(self.second)(self.hidden(x))


def hooked_tensor(self: Any, x: Tensor) -> Tensor:
    h = self.hidden(x)
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * 2)
    return self.second(h)


def collects(self: Any, x: Tensor) -> Tensor:
    self.results = []
    self.results.append(self.hidden(x))
    return self.second(torch.relu(self.second(self.hidden(x)) @ self.second.weight))


def checks_padding(self: Any, x: Tensor) -> Tensor:
    if type(x) is Tensor and bool((x[:, [-1, 0]] > 100).any()):
        warnings.warn("large", stacklevel=1)
    return self.second(self.hidden(x))


def other_type(self: Any, x: Tensor) -> Tensor:
    torch.set_default_dtype(torch.float64)
    return self.second(self.hidden(x))


CALLS = 0

FORWARDS: dict[str, Forward] = {
    # values of a parameter, without an ATen call
    "a parameter's list": lambda m, x: m.second(m.hidden(x) * sum(m.first.bias.tolist())),
    "a parameter's item": lambda m, x: m.second(m.hidden(x) * m.first.bias[0].item()),
    "a parameter's array": lambda m, x: first(torch.tensor(m.first.weight.detach().numpy()), m, x),
    "a frozen parameter's array": lambda m, x: first(
        torch.tensor(np.asarray(m.first.weight.requires_grad_(False))), m, x
    ),
    # what a call does depends on how it is made
    "looks at the type": lambda m, x: m.second(
        m.hidden(x).clamp(max=0.1) if type(x) is Tensor else m.hidden(x)
    ),
    "looks at the grad mode": lambda m, x: m.second(
        m.hidden(x).clamp(max=0.1) if torch.is_grad_enabled() else m.hidden(x)
    ),
    "clamps where it has a gradient": lambda m, x: m.second(
        m.hidden(x).clamp(max=0.1) if m.hidden(x).requires_grad else m.hidden(x)
    ),
    "hooks a tensor": hooked_tensor,
    "collects tensors in a list": collects,
    "counts in a closure": counted_in_a_closure(),
    "counts in a default": counted_in_a_default,
    "counts in an attribute of a function": counted_in_an_attribute,
    "counts in a global": counted_in_a_global,
    "writes into a text": lambda m, x: (m.second(m.hidden(x)), f"{m.hidden(x).mean():.3f}")[0],
    "checks values where nothing traces": checks_padding,
    "catches a refusal": caught,
    "random": lambda m, x: sampled(random.random, m, x),
    "NumPy's random": lambda m, x: sampled(np.random.rand, m, x),
    "torch's random": lambda m, x: sampled(lambda: torch.rand([]).item(), m, x),
    "a Python loop on values": lambda m, x: m.second(m.hidden(x)[: int(m.hidden(x).sum() > 0) + 1]),
    # other ways to run
    "its own function": lambda m, x: m.second(Clamps.apply(m.first(x))),
    "its own function in NumPy": lambda m, x: m.second(UsesNumpy.apply(m.first(x))),
    "an operation of its own": lambda m, x: m.second(torch.ops.pathlift_tests.bounded(m.first(x))),
    "an operation without shapes": lambda m, x: m.second(
        torch.ops.pathlift_tests.shapeless(m.first(x))
    ),
    "an operation that writes": written_by_an_operation,
    "a gradient": gradient_of_a_layer,
    "a functional gradient": lambda m, x: torch.func.grad(lambda y: m.second(m.hidden(y)).sum())(x),
    "a directional derivative": lambda m, x: torch.func.jvp(
        lambda y: m.second(m.hidden(y)), (x,), (torch.ones_like(x),)
    )[1],
    "a copy of a layer": copied,
    "inference mode": torch.inference_mode()(lambda m, x: m.second(m.hidden(x))),
    "a functional call": lambda m, x: torch.func.functional_call(
        m.second, {n: p + 1 for n, p in m.second.named_parameters()}, (m.hidden(x),)
    ),
    "stacked copies": stacked_copies,
    "a branch as an operation": lambda m, x: torch.cond(
        x.sum() > 0, lambda h: m.second(h), lambda h: m.second(h.clamp(max=0.1)), (m.hidden(x),)
    ),
    "another mode": under_another_mode,
    "a fork": lambda m, x: m.second(
        torch.jit.wait(torch.jit.fork(lambda z: torch.relu(m.first(z)), x))
    ),
    "another thread": lambda m, x: threads(1, m, x),
    "threads": lambda m, x: threads(2, m, x),
    # memory
    "an output argument": out_argument,
    "memory of another": set_memory,
    "lists of tensors": of_each,
    "strides by hand": lambda m, x: m.second(m.hidden(x).as_strided((3, WIDTH), (1, 1))),
    "bits": lambda m, x: m.second((m.hidden(x).view(torch.int32) & -65536).view(torch.float32)),
    "rows where something holds": lambda m, x: m.second(
        m.hidden(x)[torch.where(m.hidden(x).sum(1) > 0)[0]]
    ),
    "places where something holds": lambda m, x: m.second(
        torch.zeros(3, WIDTH).index_put(tuple((m.hidden(x) > 0).nonzero().t()), torch.ones(()))
    ),
    # tensors of other kinds
    "packed sequences": packed,
    "nested tensors": lambda m, x: nested(torch.strided, m, x),
    "jagged tensors": lambda m, x: nested(torch.jagged, m, x),
    "sparse activations": lambda m, x: m.second(m.hidden(x).to_sparse().to_dense()),
    "complex numbers": lambda m, x: m.second(
        torch.fft.irfft(torch.fft.rfft(m.hidden(x)) * 1j, n=WIDTH)
    ),
    # weights that are made in forward
    "exponentials": lambda m, x: first(m.first.weight.exp(), m, x),
    "absolute values": lambda m, x: first(m.first.weight.abs(), m, x),
    "signs": lambda m, x: first(m.first.weight.sign() * m.first.weight.abs().mean(), m, x),
    "rounded weights": quantised,
    "standardised weights": standardised,
    "the largest weights": largest_weights,
    "the transpose of a weight": lambda m, x: F.linear(m.hidden(x), m.first.weight.t()),
    "an inverse": lambda m, x: first(
        m.first.weight @ torch.linalg.inv(m.first.weight.t() @ m.first.weight + torch.eye(4)), m, x
    ),
    "data": lambda m, x: first(m.first.weight.data, m, x),
    "codes": straight_through_codes,
    # draws that depend on values, and exact comparisons
    "Bernoulli": lambda m, x: m.second(m.hidden(x) * torch.bernoulli(m.hidden(x).clamp(0, 1))),
    "hard Gumbel": lambda m, x: m.second(F.gumbel_softmax(m.hidden(x), hard=True)),
    "alpha dropout": lambda m, x: m.second(F.alpha_dropout(m.hidden(x), 0.5, m.training)),
    "mantissas": lambda m, x: m.second(torch.frexp(m.hidden(x)).mantissa),
    "finite numbers": lambda m, x: m.second(torch.nan_to_num(m.hidden(x), 1e4)),
    "histograms": lambda m, x: (m.second(m.hidden(x)), torch.histc(m.hidden(x), 4, 0, 1)),
    "orders": lambda m, x: (m.second(m.hidden(x)), m.hidden(x).argsort(-1)),
    "attention by hand": lambda m, x: m.second(
        (m.hidden(x) @ m.hidden(x).t()).softmax(-1) @ m.hidden(x)
    ),
}

# Where the reason must be named.
WORDS = {
    "a parameter's list": "the value of a tensor",
    "looks at the type": "looks at what it is run on",
    "catches a refusal": "the value of a tensor",
    "counts in a closure": "every call changes",
    "counts in a default": "every call changes",
    "counts in an attribute of a function": "every call changes",
    "counts in a global": "global 'CALLS'",
    "writes into a text": "the value of a tensor into a text",
    "random": "draws random numbers from Python's random",
    "NumPy's random": "draws random numbers from NumPy's random",
    "an operation without shapes": "register_fake",
    "rows where something holds": "depends on values",
    "a gradient": "derivatives are not followed",
    "a branch as an operation": "higher-order operation 'cond'|rule registered for HOP cond",
    "jagged tensors": "nested tensors|on fake tensors",
    "another thread": "in another thread",
    "threads": "thread",
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_keeps_its_function_or_is_refused(name: str) -> None:
    case = type("Model", (Base,), {"forward": FORWARDS[name]})
    strange.test_keeps_its_function_or_is_refused(case)
    if name in WORDS:
        with pytest.raises(pathlift.CaptureError, match=WORDS[name]):
            pathlift.rescaling_group(case(), torch.randn(3, 4))


# What must not be given up.
MOVES = (
    "collects tensors in a list",
    "a copy of a layer",
    "inference mode",
    "hooks a tensor",
    "looks at the grad mode",
)


@pytest.mark.parametrize("name", MOVES)
def test_these_are_rescaled(name: str) -> None:
    model = type("Model", (Base,), {"forward": FORWARDS[name]})()
    pinned = "clamp" in pathlift.rescaling_group(model, torch.randn(3, 4)).unsupported
    assert pinned == (name == "looks at the grad mode")


def test_the_gradient_makes_a_difference() -> None:
    name = "clamps where it has a gradient"
    model = type("Model", (Base,), {"forward": FORWARDS[name]})()
    assert pathlift.rescaling_group(model, torch.randn(3, 4)).unsupported == {"clamp": 1}


def test_the_default_dtype_is_as_before() -> None:
    model = type("Model", (Base,), {"forward": other_type})()
    assert pathlift.rescaling_group(model, torch.randn(3, 4)).num_scales == WIDTH
    assert torch.get_default_dtype() is torch.float32


class Parts(Base):
    """A part in the middle that is run in another way."""

    def __init__(self, make: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.part = make(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.part(self.hidden(x)))


def hooked(part: nn.Module) -> nn.Module:
    part.register_forward_hook(lambda module, inputs, output: output.clamp(max=0.1))
    return part


PARTS = {
    "scripted": (torch.jit.script, 2 * WIDTH),
    "traced": (lambda part: torch.jit.trace(part, torch.randn(2, WIDTH)), 2 * WIDTH),
    "compiled": (lambda part: torch.compile(part, backend="eager"), 2 * WIDTH),
    "hooked": (hooked, WIDTH),
    "attention": (lambda part: nn.TransformerEncoderLayer(WIDTH, 2, 8, 0.0), WIDTH),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_run_in_another_way(name: str) -> None:
    make, scales = PARTS[name]
    torch.manual_seed(0)
    model, x = Parts(make), torch.randn(3, 4)
    expected = [model.train(mode)(x) for mode in (False, True)]
    group = pathlift.rescaling_group(model, x)
    assert group.num_scales >= scales
    group.rescale_(model, torch.arange(group.num_scales) % 5 - 2)
    for mode, before in zip((False, True), expected, strict=True):
        assert torch.equal(model.train(mode)(x), before)


class WritesAParameter(Base):
    """An average that is kept in a parameter, as codebooks are."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        if self.training:
            self.mean.data.mul_(0.9).add_(h.mean(0).detach(), alpha=0.1)
        return self.second(h - self.mean)


def test_parameters_that_forward_writes_are_put_back() -> None:
    torch.manual_seed(0)
    model, x = WritesAParameter(), torch.randn(3, 4)
    report = pathlift.condition_(model, x, exact=True, on_nothing="ignore")
    assert not model.mean.any() and report.max_output_change == 0
    assert pathlift.rescaling_group(model.eval(), x).num_scales == 0
    assert not model.mean.any()


class WithoutLength(tuple):
    """A tuple that will not say how long it is."""

    def __len__(self) -> int:
        raise NotImplementedError


def test_odd_attributes_do_no_harm() -> None:
    model, x = Base(), torch.randn(3, 4)
    model.kinds = WithoutLength((1, 2))
    model.register_buffer("places", torch.eye(2).to_sparse())
    assert pathlift.condition_(model, x, exact=True).num_scales == WIDTH


class Passes(Base):
    """Messages along the edges of a graph that are no loops: how many there are, the edges decide."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        edges = edges[:, edges[0] != edges[1]]
        h = self.hidden(x)
        return self.second(torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))


class OnOneGraph(nn.Module):
    def __init__(self, model: nn.Module, edges: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("edges", edges)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, self.edges)


def test_edges_in_a_buffer_decide_sizes() -> None:
    torch.manual_seed(0)
    model, x, edges = Passes(), torch.randn(3, 4), torch.tensor([[0, 1, 2, 2], [1, 1, 0, 1]])
    with pytest.raises(pathlift.CaptureError, match="holds that input in a buffer"):
        pathlift.rescaling_group(model, (x, edges))
    before = model(x, edges)
    assert pathlift.condition_(OnOneGraph(model, edges), x, exact=True).num_scales == WIDTH
    assert torch.equal(model(x, edges), before)
