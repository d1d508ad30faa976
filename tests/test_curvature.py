"""The power iteration against the dense Gauss-Newton matrix."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy, mse_loss

from pathlift.curvature import curvature
from pathlift.errors import ArgumentError


def _model(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(4)] if norm else []
    return nn.Sequential(nn.Linear(3, 4), *middle, nn.ReLU(), nn.Linear(4, 3)).double()


def _dense(model: nn.Module, batches: list, loss) -> tuple[Tensor, Tensor]:
    """Gauss-Newton matrix and gradient by their definitions, batch by batch."""
    parameters = dict(model.named_parameters())
    total, slope, count = 0.0, 0.0, sum(len(x) for x, _ in batches)
    for x, y in batches:
        buffers = {n: b.clone() for n, b in model.named_buffers()}

        def outputs(p: dict, x: Tensor = x, buffers: dict = buffers) -> Tensor:
            fresh = {n: b.clone() for n, b in buffers.items()}
            return functional_call(model, (p, fresh), (x,))

        jacobians = jacrev(outputs)(parameters)
        out = outputs(parameters)
        flat = torch.cat([j.reshape(out.numel(), -1) for j in jacobians.values()], 1).detach()
        point = out.detach()
        hessian = torch.autograd.functional.hessian(lambda o, y=y: loss(o, y), point)
        grad = torch.autograd.functional.jacobian(lambda o, y=y: loss(o, y), point)
        total = total + flat.T @ hessian.reshape(out.numel(), -1) @ flat * len(x) / count
        slope = slope + flat.T @ grad.flatten() * len(x) / count
    return total, slope


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch-norm"])
@pytest.mark.parametrize("kind", ["classes", "squares"])
def test_it_is_the_largest_eigenvalue(kind: str, norm: bool) -> None:
    model, x = _model(norm), torch.randn(11, 3).double()
    y = torch.randint(3, (11,)) if kind == "classes" else x
    loss = cross_entropy if kind == "classes" else mse_loss
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    before = {n: b.clone() for n, b in model.state_dict().items()}
    found = curvature(model, batches, loss, tol=1e-10, iterations=3000)
    matrix, gradient = _dense(model, batches, loss)
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    assert found.largest == pytest.approx(largest, rel=1e-6)
    assert found.stable_rate == pytest.approx(2 / largest, rel=1e-6)
    assert found.progress == pytest.approx(float(gradient @ gradient) / 2 / largest, rel=1e-6)
    assert all(torch.equal(before[n], b) for n, b in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_frozen_parameters_and_later_batches_do_not_count() -> None:
    model, x = _model(), torch.randn(8, 3).double()
    batches = [(x[:4], x[:4]), (x[4:], x[4:])]
    first = curvature(model, batches, mse_loss, max_batches=1)
    assert first == curvature(model, batches[:1], mse_loss)
    model[0].requires_grad_(False)
    assert curvature(model, batches[:1], mse_loss).largest < first.largest


def test_quadratics_diverge_above_the_stable_rate() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(40, 5).double(), torch.randn(40, 2).double()
    for factor, diverges in ((0.98, False), (1.02, True)):
        model = nn.Linear(5, 2).double()
        rate = factor * curvature(model, [(x, y)], mse_loss, tol=1e-9, iterations=2000).stable_rate
        start = mse_loss(model(x), y).item()
        for _ in range(600):
            model.zero_grad()
            mse_loss(model(x), y).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= rate * p.grad
        assert (mse_loss(model(x), y).item() > start) == diverges


def test_what_is_not_measured_is_refused() -> None:
    model, x = _model(), torch.zeros(2, 3).double()
    with pytest.raises(ArgumentError, match="data has no batches"):
        curvature(model, [], mse_loss)
    with pytest.raises(ArgumentError, match="two tensors each; found dict"):
        curvature(model, [{"x": x}], mse_loss)  # type: ignore[list-item]
    with pytest.raises(ArgumentError, match="came out as 0.0"):
        curvature(model, [(x, x)], lambda out, y: (out * 0).square().sum())
    model.requires_grad_(False)
    with pytest.raises(ArgumentError, match="no trainable parameter"):
        curvature(model, [(x, x)], mse_loss)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


ATTENTION = {
    "attention": lambda: nn.TransformerEncoderLayer(3, 1, 4, dropout=0.0, batch_first=True),
    "recurrent": _Recurrent,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ATTENTION)
def test_kernels_with_second_derivatives_are_taken(name: str, dtype: torch.dtype) -> None:
    """Fused attention and recurrent layers have none; the same sums written out have."""
    torch.manual_seed(0)
    model, x = ATTENTION[name]().to(dtype), torch.randn(5, 4, 3, dtype=dtype)
    before = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = curvature(model, [(x, x)], mse_loss, tol=1e-6, iterations=500)
    assert before == (torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled())
    matrix, _ = _dense(model.double(), [(x.double(), x.double())], mse_loss)
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    assert found.largest == pytest.approx(largest, rel=1e-3)


def test_an_operation_without_second_derivatives_is_refused_in_words() -> None:
    class Binned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.EmbeddingBag(5, 3, mode="max")

        def forward(self, x: Tensor) -> Tensor:
            return self.table(x)

    x, y = torch.randint(5, (4, 2)), torch.randn(4, 3)
    with pytest.raises(ArgumentError, match="second derivatives"):
        curvature(Binned(), [(x, y)], mse_loss)
