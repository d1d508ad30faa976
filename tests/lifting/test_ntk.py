"""The tangent kernel's spectrum against a dense float64 Jacobian."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.lifting import ntk
from pathlift.lifting.ntk import condition_number, ntk_spectrum


class Pair(nn.Module):
    """Two inputs, two outputs, one frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)
        self.right.requires_grad_(False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.left(x) + self.right(y))
        return h, self.head(h)


def convolutional(tracked: bool = True) -> nn.Module:
    norm = nn.BatchNorm2d(4, track_running_stats=tracked)
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def zero_head() -> nn.Module:
    model = convolutional(tracked=False)
    nn.init.zeros_(model[-1].weight)
    return model


CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), [(7, 5)]),
    "two inputs and outputs": (Pair, [(6, 3), (6, 2)]),
    "batch norm, eval": (lambda: convolutional().eval(), [(4, 1, 4, 4)]),
    "batch norm, train": (convolutional, [(4, 1, 4, 4)]),
    "batch norm, no statistics": (lambda: convolutional(tracked=False), [(4, 1, 4, 4)]),
    "outputs that say nothing": (zero_head, [(4, 1, 4, 4)]),
    "tokens": (lambda: nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2)), [(4, 3)]),
}


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    make, shapes = CASES[name]
    torch.manual_seed(0)
    draw = (lambda s: torch.randint(0, 5, s)) if name == "tokens" else torch.randn
    return make(), tuple(draw(s) for s in shapes)


def dense_spectrum(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    model = copy.deepcopy(model).double()
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    out = model(*wide)
    flat = torch.cat([t.flatten() for t in (out if isinstance(out, tuple) else (out,))])
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for value in flat:
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(parameters, grads, strict=True)
                ]
            )
        )
    jacobian = torch.stack(rows)
    return torch.linalg.eigvalsh(jacobian @ jacobian.T).flip(0).clamp(min=0)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_jacobian(name: str) -> None:
    model, inputs = build(name)
    expected = dense_spectrum(model, inputs)
    found = ntk_spectrum(model, inputs)
    assert found.shape == expected.shape and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected[0]))
    torch.testing.assert_close(ntk_spectrum(model, inputs, 3), expected[:3])


@pytest.mark.parametrize("name", ["mlp", "batch norm, train"])
@pytest.mark.parametrize("entries", [1, 600])
def test_blocks_of_rows_give_the_same(
    name: str, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build(name)
    expected = dense_spectrum(model, inputs)
    monkeypatch.setattr(ntk, "_MAX_BLOCK_ENTRIES", entries)
    found = ntk_spectrum(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected[0]))


@pytest.mark.parametrize("name", ["mlp", "batch norm, train", "tokens"])
def test_lanczos_gives_the_largest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build(name)
    monkeypatch.setattr(ntk, "MAX_DENSE_ROWS", 2)
    monkeypatch.setattr(ntk, "_DEFAULT_COUNT", 4)
    torch.testing.assert_close(ntk_spectrum(model, inputs), dense_spectrum(model, inputs)[:4])


def test_conditioning_changes_the_spectrum_and_not_the_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 4), nn.ReLU(), nn.Linear(4, 6)
    )
    x = torch.randn(8, 20)
    outputs, before = model(x), ntk_spectrum(model, x)
    report = pathlift.condition_(model, x, exact=True)
    after = ntk_spectrum(model, x)
    assert torch.equal(model(x), outputs)
    assert report.imbalance_after < report.imbalance_before
    assert float((after[0] - before[0]).abs() / before[0]) > 0.1


def test_the_model_is_left_as_found() -> None:
    model, inputs = build("batch norm, train")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    ntk_spectrum(model, inputs)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_condition_number() -> None:
    assert condition_number(torch.tensor([8.0, 2.0, 4.0])) == 4.0
    assert condition_number(torch.tensor([8.0, 2.0, 0.0])) == math.inf
    assert condition_number(torch.tensor([8.0, 2.0, 1e-16]), on_range=True) == 4.0
    assert condition_number(torch.zeros(2), on_range=True) == math.inf


@pytest.mark.parametrize(
    "values", [torch.zeros(0), torch.ones(2, 2), torch.tensor([-1.0]), torch.tensor([math.nan])]
)
def test_eigenvalues_are_checked(values: Tensor) -> None:
    with pytest.raises(pathlift.ArgumentError, match="eigenvalues"):
        condition_number(values)


@pytest.mark.parametrize("k", [0, 22, True, 2.0])
def test_k_is_checked(k: object) -> None:
    model, inputs = build("mlp")
    with pytest.raises(pathlift.ArgumentError, match="k must be an integer from 1 to 21"):
        ntk_spectrum(model, inputs, k)


def test_what_has_no_kernel_is_refused() -> None:
    x = torch.randn(3, 2)
    with pytest.raises(pathlift.ArgumentError, match="no trainable parameter"):
        ntk_spectrum(nn.ReLU(), x)
    with pytest.raises(pathlift.ArgumentError, match="Call model.eval"):
        ntk_spectrum(nn.Sequential(nn.Linear(2, 8), nn.Dropout()), x)
    with pytest.raises(pathlift.ArgumentError, match="not all finite"):
        ntk_spectrum(nn.Linear(2, 2), x * math.nan)
