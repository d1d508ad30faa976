"""Criteria of the methods, against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pathlift
from pathlift.errors import ArgumentError
from pathlift.experiments.architectures import mlp
from pathlift.experiments.data import Data
from pathlift.experiments.methods import (
    equal_spectral_norms_,
    first_powers,
    method_named,
    start,
)

EXAMPLE = torch.zeros(2, 5)


def _absolute(model: torch.nn.Sequential) -> dict[str, Tensor]:
    """``sum_p |dPhi_p / dtheta_i|``: the gradient of the network of ``|theta|``, fed ones."""
    leaves = {n: p.detach().abs().double().requires_grad_() for n, p in model.named_parameters()}
    value = torch.ones(5, dtype=torch.float64)
    for k in (0, 2, 4):
        value = leaves[f"{k}.weight"] @ value + leaves[f"{k}.bias"]
    value.sum().backward()
    return {n: leaf.grad for n, leaf in leaves.items()}


def test_first_powers_are_sums_over_paths() -> None:
    torch.manual_seed(0)
    model = mlp((5, 7, 3, 4))
    before = {n: p.clone() for n, p in model.named_parameters()}
    expected = _absolute(model)
    for name, value in first_powers(model, EXAMPLE).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=0)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["path-root", "path-first"])
def test_first_powers_are_balanced_where_they_should_be(name: str) -> None:
    """At the optimum each channel's share of what enters it is that of what leaves it."""
    torch.manual_seed(1)
    data = Data("made", torch.randn(8, 5), torch.zeros(8, dtype=torch.int64), 4)
    model = mlp((5, 7, 3, 4))
    start(method_named(name), model, data)
    if name == "path-first":
        c = {n: v.double() for n, v in first_powers(model, EXAMPLE).items()}
    else:
        diagonal = pathlift.path_kernel_diagonal(model, EXAMPLE)
        c = {n: v.double().sqrt() for n, v in diagonal.items()}
    total = sum(float(v.sum()) for v in c.values())
    count = sum(v.numel() for v in c.values())
    for k, width in ((0, 7), (2, 3)):
        entering = c[f"{k}.weight"].sum(1) + c[f"{k}.bias"]
        leaving = c[f"{k + 2}.weight"].sum(0)
        numbers = c[f"{k}.weight"].shape[1] + 1 - c[f"{k + 2}.weight"].shape[0]
        # dF/ds = 0: p (entering - leaving) / total = number entering - number leaving.
        residual = count * (entering - leaving) / total - numbers
        assert residual.shape == (width,) and float(residual.abs().max()) < 1e-3 * count


def test_continuous_is_nearer_the_optimum_than_powers_of_two() -> None:
    torch.manual_seed(2)
    data = Data("made", torch.randn(8, 5), torch.zeros(8, dtype=torch.int64), 4)
    found = {}
    for name in ("baseline", "path", "path-continuous"):
        torch.manual_seed(3)
        found[name] = start(method_named(name), mlp((5, 40, 3, 4)), data)
    values = [found[n].imbalance for n in ("path-continuous", "path", "baseline")]
    assert values[0] < values[1] < values[2]
    scales = found["path"].log2_scales
    assert scales is not None and scales.dtype == torch.int64


def test_spectral_norms_are_made_equal_and_the_function_kept() -> None:
    torch.manual_seed(4)
    data = Data("made", torch.randn(8, 5), torch.zeros(8, dtype=torch.int64), 4)
    model = mlp((5, 40, 3, 4))
    before = model(data.inputs)
    start(method_named("spectral"), model, data)
    norms = [float(torch.linalg.matrix_norm(model[k].weight.detach(), 2)) for k in (0, 2, 4)]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
    torch.testing.assert_close(model(data.inputs), before)
    with pytest.raises(ArgumentError, match="linear layers and ReLU only; found BatchNorm1d"):
        equal_spectral_norms_(mlp((5, 4, 3), batch_norm=True))


def test_batch_norms_are_read_with_the_statistics_of_a_batch() -> None:
    """Two samples say little of a variance: the imbalance would be several times as large."""
    torch.manual_seed(5)
    data = Data("made", torch.randn(256, 30), torch.zeros(256, dtype=torch.int64), 4)
    found = {}
    for name in ("baseline", "path-continuous"):
        model = _fresh(6)
        found[name] = start(method_named(name), model, data).imbalance
        # Nothing but the weights is changed: a network before its first step has seen no batch.
        assert all(int(m.num_batches_tracked) == 0 for m in model if hasattr(m, "running_var"))
    report = pathlift.condition_(
        _fresh(6), data.inputs[:128], exact=False, verify=False, batch_norm="pinned"
    )
    assert found["baseline"] == pytest.approx(report.imbalance_before, rel=0.02)
    assert found["path-continuous"] == pytest.approx(report.imbalance_after, rel=0.02)
    assert found["path-continuous"] < found["baseline"]


def _fresh(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return mlp((30, 40, 20, 4), batch_norm=True)
