"""A real accelerator: what a call gives is what it gives on the host, and all stays where it was.

Skipped where there is none; ``tests/test_device.py`` pretends one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathlift
from pathlift import quantization
from pathlift.lifting import ntk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 6, 1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        x = F.max_pool2d(x + F.relu(self.b(x)), 2)
        x = F.interpolate(F.relu(self.c(x)), scale_factor=2, mode="bilinear")
        x = F.relu(self.up(x))
        return self.out(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Attention(nn.Module):
    """What lies on the device is made in forward, and attention is a fused kernel there."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 32), nn.LayerNorm(32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.register_buffer("positions", torch.randn(8, 32), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.embed(ids) + self.positions[at])
        q, k, v = (m(x).unflatten(-1, (2, 16)).transpose(1, 2) for m in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(x)))


class Recurrent(nn.Module):
    """One fused kernel over all steps on the device, another operation on the host."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 12), nn.Linear(12, 6)
        self.recurrent = kind(6, 8, num_layers=2, batch_first=True)
        self.third, self.out = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.recurrent(self.second(F.relu(self.first(x))))
        return self.out(F.relu(self.third(x[:, -1])))


class Cell(nn.Module):
    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.first, self.cell = nn.Linear(4, 6), kind(6, 8)
        self.second, self.out = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h: Any = None
        for t in range(x.shape[1]):
            h = self.cell(F.relu(self.first(x[:, t])), h)
        h = h[0] if isinstance(h, tuple) else h
        return self.out(F.relu(self.second(h)))


class Scattered(nn.Module):
    """Sums in an order that the device does not fix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 12), nn.Linear(12, 3)
        self.register_buffer("target", torch.tensor([0, 1, 1, 0, 2, 2, 2]))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        pooled = h.new_zeros(3, 12).index_add(0, self.target, h)
        return self.second(pooled)


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 6, mode="sum")
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(F.relu(self.first(self.bag(ids))))


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(4, 12), nn.Linear(12, 3), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(F.relu(self.first(x))))


class Halves(nn.Module):
    """Part of it computes in a narrower type, as training with autocast does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            h = F.relu(self.second(F.relu(self.first(x))))
        return self.out(h.float())


class Apart(nn.Module):
    """A table that stays on the host, and a result that goes there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 12), nn.Linear(12, 3)
        self.table = torch.linspace(1, 2, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x)) * self.table.to(x.device, non_blocking=True)
        return self.second(h).cpu()


def mlp() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 9), nn.ReLU(), nn.Linear(9, 24), nn.ReLU()),
        nn.Linear(24, 3),
    )


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


Make = Callable[[], tuple[nn.Module, Any]]
NETWORKS: dict[str, Make] = {
    "mlp": lambda: (mlp(), torch.randn(7, 4)),
    "residual": lambda: (Residual(), torch.randn(2, 3, 8, 8)),
    "channels last": lambda: (
        Residual().to(memory_format=torch.channels_last),
        torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
    ),
    "attention": lambda: (Attention(), torch.randint(11, (2, 8))),
    "encoder": lambda: (encoder(), torch.randn(2, 5, 16)),
    "LSTM": lambda: (Recurrent(nn.LSTM), torch.randn(2, 5, 4)),
    "GRU": lambda: (Recurrent(nn.GRU), torch.randn(2, 5, 4)),
    "RNN": lambda: (Recurrent(nn.RNN), torch.randn(2, 5, 4)),
    "LSTM cell": lambda: (Cell(nn.LSTMCell), torch.randn(2, 5, 4)),
    "GRU cell": lambda: (Cell(nn.GRUCell), torch.randn(2, 5, 4)),
    "scattered": lambda: (Scattered(), torch.randn(7, 4)),
    "bags": lambda: (Bags(), torch.randint(11, (3, 4))),
    "dropped": lambda: (Dropped(), torch.randn(7, 4)),
    "halves": lambda: (Halves(), torch.randn(7, 4)),
    "apart": lambda: (Apart(), torch.randn(7, 4)),
    "bfloat16": lambda: (mlp().bfloat16(), torch.randn(7, 4).bfloat16()),
    "float16": lambda: (mlp().half(), torch.randn(7, 4).half()),
    "float64": lambda: (mlp().double(), torch.randn(7, 4).double()),
}
# Without operations that have no paths.
LIFTED = ("mlp", "residual", "channels last", "scattered", "bags", "dropped", "float64")


def network(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)  # type: ignore[operator, union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
    return model, x


def there(name: str) -> tuple[nn.Module, Any]:
    model, x = network(name)
    return model.cuda(), x.cuda()


def seen(model: nn.Module, x: Any, mode: bool) -> Tensor:
    model = copy.deepcopy(model).train(mode)  # running statistics move in train mode
    torch.manual_seed(1)
    with torch.no_grad():
        return model(x).clone()


@pytest.mark.parametrize("criterion", ["path-kernel", "weight-norm", "range"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_call_is_that_of_the_host(name: str, criterion: str) -> None:
    """The same scales to the bit where they are integers, and every bit of the outputs kept."""
    host, x = network(name)
    expected = pathlift.condition_(host, x, criterion=criterion, exact=True, on_nothing="ignore")
    model, y = there(name)
    before = {mode: seen(model, y, mode) for mode in (True, False)}
    steady = {mode: torch.equal(b, seen(model, y, mode)) for mode, b in before.items()}
    buffers = [b.clone() for b in model.buffers()]
    places = [(p.data_ptr(), p.device) for p in model.parameters()]
    model.train()
    report = pathlift.condition_(model, y, criterion=criterion, exact=True, on_nothing="ignore")
    assert report.num_scales == expected.num_scales
    assert report.num_parameters == expected.num_parameters
    assert report.approximated == expected.approximated
    assert torch.equal(report.log2_scales, expected.log2_scales)
    assert report.imbalance_before == pytest.approx(expected.imbalance_before, rel=1e-6)
    assert report.imbalance_after == pytest.approx(expected.imbalance_after, rel=1e-6)
    assert places == [(p.data_ptr(), p.device) for p in model.parameters()]
    assert all(map(torch.equal, buffers, model.buffers()))
    for p, q in zip(host.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q.cpu())
    for mode, b in before.items():
        if steady[mode]:
            assert torch.equal(b, seen(model, y, mode))


@pytest.mark.parametrize("name", NETWORKS)
def test_continuous_scales(name: str) -> None:
    host, x = network(name)
    expected = pathlift.condition_(host, x, on_nothing="ignore")
    model, y = there(name)
    report = pathlift.condition_(model, y, on_nothing="ignore")
    assert report.rounding == expected.rounding
    torch.testing.assert_close(report.log2_scales, expected.log2_scales, atol=1e-6, rtol=0)
    again = pathlift.condition_(model, y, on_nothing="ignore")
    narrow = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    assert again.imbalance_before == pytest.approx(
        report.imbalance_after, abs=1e-2 if narrow else 1e-5
    )


@pytest.mark.parametrize("name", LIFTED)
def test_path_quantities(name: str) -> None:
    host, x = network(name)
    model, y = there(name)
    host, model = host.double().eval(), model.double().eval()
    x, y = (t.double() if t.is_floating_point() else t for t in (x, y))
    for p in (1, 2):
        expected = pathlift.path_norm(host, x, p=p)
        assert pathlift.path_norm(model, y, p=p) == pytest.approx(expected, rel=1e-10)
    expected_diagonal = pathlift.path_kernel_diagonal(host, x)
    for key, values in pathlift.path_kernel_diagonal(model, y).items():
        torch.testing.assert_close(values.cpu(), expected_diagonal[key], rtol=1e-10, atol=0)
    masks = pathlift.path_magnitude_masks(host, x, 0.5)
    for key, mask in pathlift.path_magnitude_masks(model, y, 0.5).items():
        assert torch.equal(mask.cpu(), masks[key]), key


def test_a_gradient_of_the_path_norm() -> None:
    host, x = network("residual")
    model, y = there("residual")
    for one, z in ((host, x), (model, y)):
        norm = pathlift.PathNorm(one.eval(), z[:1])
        norm().backward()  # type: ignore[operator]
    for p, q in zip(host.parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(q.grad.cpu(), p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "attention", "dropped"])
def test_nothing_is_left_behind(name: str) -> None:
    model, x = there(name)
    model.train()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    flags = (
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cuda.flash_sdp_enabled(),
    )
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    pathlift.condition_(model, x)
    pathlift.rescaling_group(model, x)
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], torch.cuda.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert flags == (
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cuda.flash_sdp_enabled(),
    )
    assert all(p.grad is None for p in model.parameters())


def test_memory_is_given_back() -> None:
    model, x = there("residual")
    pathlift.condition_(model, x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        pathlift.condition_(model, x)
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.parametrize("kind", ["fused", "foreach", "capturable", "momentum"])
def test_state_of_an_optimizer(kind: str) -> None:
    """Midway: what follows is what would have followed, but for the scales."""
    options: dict[str, Any] = {"fused": {"fused": True}, "foreach": {"foreach": True}}.get(kind, {})
    if kind == "capturable":
        options = {"capturable": True}
    model, x = there("mlp")
    other = copy.deepcopy(model)
    made = []
    for one in (model, other):
        if kind == "momentum":
            optimizer: Any = torch.optim.SGD(one.parameters(), 0.1, momentum=0.9)
        else:
            optimizer = torch.optim.Adam(one.parameters(), 1e-3, **options)
        for _ in range(3):
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()
        made.append(optimizer)
    optimizer = made[0]
    report = pathlift.condition_(model, x, optimizer=optimizer)
    assert "powers of two" in report.rounding
    assert torch.equal(model(x), other(x))
    group = pathlift.rescaling_group(model, x)
    key = "momentum_buffer" if kind == "momentum" else "exp_avg"
    back = copy.deepcopy(model)
    group.rescale_(back, -report.log2_scales)
    for p, q in zip(back.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    for p, q, b in zip(model.parameters(), other.parameters(), back.parameters(), strict=True):
        one, two = optimizer.state[p][key], made[1].state[q][key]
        # A gradient's scale is the inverse of its parameter's.
        nonzero = (b != 0) & (two != 0)
        assert torch.equal((one * p)[nonzero], (two * b)[nonzero])
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    assert bool(torch.isfinite(model(x)).all())


def test_on_another_stream() -> None:
    host, x = there("residual")
    expected = pathlift.condition_(host, x)
    model, y = there("residual")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        report = pathlift.condition_(model, y)
    stream.synchronize()
    assert torch.equal(report.log2_scales, expected.log2_scales)
    for p, q in zip(host.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_recorded_graph_sees_the_new_weights() -> None:
    """Parameters are changed in place, so what was recorded over their memory stays good."""
    model, x = there("mlp")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        graph.replay()
        before = out.clone()
        report = pathlift.condition_(model, x, exact=True)
        assert report.log2_scales.any()
        graph.replay()
        assert torch.equal(out, before)


def test_coarse_products_are_the_models_own() -> None:
    """With TF32 the criterion is what it is without, and continuous scales stay."""
    expected = pathlift.condition_(*there("residual"))
    torch.set_float32_matmul_precision("medium")
    try:
        report = pathlift.condition_(*there("residual"))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert report.rounding == expected.rounding
    torch.testing.assert_close(report.log2_scales, expected.log2_scales)


def test_within_autocast_and_a_default_device() -> None:
    model, x = there("mlp")
    expected = pathlift.condition_(model, x)
    model, x = there("mlp")
    with torch.device("cuda"), torch.autocast("cuda", torch.bfloat16):
        report = pathlift.condition_(model, x)
    assert report.imbalance_after == expected.imbalance_after
    torch.testing.assert_close(report.log2_scales, expected.log2_scales)


def test_a_compiled_model() -> None:
    model, x = there("mlp")
    compiled = torch.compile(model)
    with torch.no_grad():
        before = compiled(x)
        pathlift.condition_(compiled, x, exact=True)
        torch.testing.assert_close(compiled(x), before)


def test_inputs_elsewhere_are_refused_in_words() -> None:
    model, _ = there("mlp")
    with pytest.raises(pathlift.PathliftError, match="cuda"):
        pathlift.condition_(model, torch.randn(2, 4))


def test_a_model_on_two_devices() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 12).cuda(), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.first(x)).cpu())

    torch.manual_seed(0)
    model, x = Two(), torch.randn(2, 4).cuda()
    host = copy.deepcopy(model).cpu()
    expected = pathlift.condition_(host, x.cpu(), exact=True)
    report = pathlift.condition_(model, x, exact=True)
    assert torch.equal(report.log2_scales, expected.log2_scales)
    assert model.first.weight.is_cuda and not model.second.weight.is_cuda


def test_a_conditioner_and_its_copies(tmp_path: Any) -> None:
    model, x = there("residual")
    conditioner = pathlift.Conditioner(model, x)
    conditioner.save(tmp_path / "captured.safetensors")
    other = copy.deepcopy(model)
    first, second = conditioner.condition_(), conditioner.on(other).condition_()
    torch.testing.assert_close(first.log2_scales, second.log2_scales)
    third = copy.deepcopy(other)
    loaded = pathlift.Conditioner.load(tmp_path / "captured.safetensors", third)
    assert loaded.condition_().imbalance_before == pytest.approx(second.imbalance_after, abs=1e-6)


def test_orbits() -> None:
    model, x = there("mlp")
    other = copy.deepcopy(model)
    group = pathlift.rescaling_group(other, x)
    group.rescale_(other, torch.arange(group.num_scales) % 5 - 2)
    assert pathlift.orbit_distance(model, other, x).same
    pathlift.canonical_(model, x)
    pathlift.canonical_(other, x)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_advice_with_data() -> None:
    host, x = network("mlp")
    y = torch.randn(7, 3)
    expected = pathlift.advise(host, x, "sgd", data=([(x, y)], F.mse_loss))
    model = copy.deepcopy(host).cuda()
    found = pathlift.advise(model, x.cuda(), "sgd", data=([(x.cuda(), y.cuda())], F.mse_loss))
    assert found.verdict == expected.verdict
    assert found.rate_factor == pytest.approx(expected.rate_factor, rel=1e-2)


def test_quantization() -> None:
    host, x = network("residual")
    expected = quantization.equalize_(host.eval(), x)
    model, y = there("residual")
    report = quantization.equalize_(model.eval(), y)
    assert report.log2_scales.shape == expected.log2_scales.shape
    assert report.sqnr_after == pytest.approx(expected.sqnr_after, abs=0.5)
    assert all(p.is_cuda for p in model.parameters())


def test_the_tangent_kernel() -> None:
    host, x = network("mlp")
    model, y = there("mlp")
    expected = ntk.ntk_spectrum(host.double(), x.double())
    found = ntk.ntk_spectrum(model.double(), y.double())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-8, atol=1e-10)
