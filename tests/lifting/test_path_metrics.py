"""Gradients of path norms, norms per output, path magnitudes and the masks made of them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

import pathlift
from reference.listing import Listing


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 2), nn.Conv2d(3, 3, 1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.a(x)))
        return self.out((h + F.relu(self.b(h))).amax((2, 3)))


def network(seed: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    if seed % 2:
        model: nn.Module = nn.Sequential(
            nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 2)
        )
        return model.double().eval(), torch.zeros(1, 2, dtype=torch.float64)
    model = Small()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model.double().eval(), torch.zeros(1, 2, 3, 3, dtype=torch.float64)


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("seed", [1, 3, 5])
def test_gradient_and_magnitude_equal_the_listing(seed: int, p: float) -> None:
    model, x = network(seed)
    listing = Listing(model, x)
    sizes = torch.as_tensor(listing.weights()).abs() ** p
    passes = torch.as_tensor(listing.jacobian()) != 0  # no path meets an entry twice here
    through = (sizes[:, None] * passes).sum(0)
    norm = pathlift.path_norm(model, x, p, differentiable=True)
    assert norm.item() == pytest.approx(listing.norm(p), rel=1e-12)
    norm.backward()
    magnitude = pathlift.path_magnitude(model, x, p)
    start = 0
    for name, parameter in model.named_parameters():
        here = through[start : start + parameter.numel()].reshape(parameter.shape)
        start += parameter.numel()
        torch.testing.assert_close(magnitude[name], here / sizes.sum(), rtol=1e-10, atol=0)
        expected = here / parameter.detach() / norm.item() ** (p - 1)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_norms_per_output_add_up(seed: int) -> None:
    model, x = network(seed)
    for p in (1, 2):
        (each,) = pathlift.PathNorm(model, x, p).per_output()
        assert each.shape == (2,)
        whole = pathlift.path_norm(model, x, p)
        assert float((each**p).sum().detach()) ** (1 / p) == pytest.approx(whole, rel=1e-12)
    # One output alone is the network cut to that output.
    last = model[-1] if isinstance(model, nn.Sequential) else model.out
    with torch.no_grad():
        last.weight[1] = 0
        last.bias[1] = 0
    (cut,) = pathlift.PathNorm(model, x).per_output()
    assert float(cut[1]) == 0 and pathlift.path_norm(model, x) == pytest.approx(float(cut[0]))


def test_the_norm_follows_the_parameters_in_training() -> None:
    model, x = network(1)
    norm = pathlift.PathNorm(model, x)
    before = float(norm())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        norm().backward()
        optimizer.step()
    after = float(norm())
    assert after < before and after == pytest.approx(pathlift.path_norm(model, x), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_magnitudes_and_masks_do_not_change_under_rescaling(seed: int) -> None:
    model, x = network(seed)
    twin = copy.deepcopy(model)
    group = pathlift.rescaling_group(twin, x)
    group.rescale_(twin, torch.arange(group.num_scales) % 5 - 2)
    for p in (1, 2):
        before = pathlift.path_magnitude(model, x, p)
        for name, m in pathlift.path_magnitude(twin, x, p).items():
            torch.testing.assert_close(m, before[name], rtol=1e-12, atol=0)
    masks = pathlift.path_magnitude_masks(model, x, 0.5)
    for name, mask in pathlift.path_magnitude_masks(twin, x, 0.5).items():
        assert torch.equal(mask, masks[name])
    size = sum(m.numel() for m in masks.values())
    assert sum(int((m == 0).sum()) for m in masks.values()) == size // 2


def test_pruning_in_the_format_of_torch() -> None:
    model, x = network(1)
    masks = pathlift.path_magnitude_masks(model, x, 0.4)
    pathlift.prune_by_path_magnitude_(model, x, 0.4)
    assert torch.nn.utils.prune.is_pruned(model)
    assert torch.equal(model[0].weight_mask, masks["0.weight"])
    assert torch.equal(model[0].weight, model[0].weight_orig * masks["0.weight"])
    torch.nn.utils.prune.remove(model[0], "weight")
    assert torch.equal(model[0].weight == 0, masks["0.weight"] == 0)


def test_a_wrong_amount_is_refused() -> None:
    model, x = network(1)
    with pytest.raises(pathlift.ArgumentError, match="at least 0 and below 1; found 1.5"):
        pathlift.prune_by_path_magnitude_(model, x, 1.5)
    assert not hasattr(model[0], "weight_mask")


class Dense(nn.Module):
    """Samples stay apart through concatenations, gates and skips of equal sizes everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(6, 3, 2)
        self.gate, self.out = nn.Conv2d(3, 3, 1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.cat((F.relu(self.a(x)), x), -3))
        x = x * F.relu(self.gate(x.mean((-2, -1), keepdim=True))) + x
        return self.out(x.mean((-2, -1)))


def test_one_sample_stands_for_all() -> None:
    torch.manual_seed(0)
    model = Dense().double()
    expected = pathlift.path_kernel_diagonal(model, torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    for shape in ((2, 3, 4, 4), (3, 3, 4, 4), (3, 4, 4)):
        found = pathlift.path_kernel_diagonal(model, torch.zeros(shape, dtype=torch.float64))
        for name, g in expected.items():
            torch.testing.assert_close(found[name], g, rtol=1e-12, atol=0, msg=f"{shape} {name}")


class Mixed(nn.Module):
    """One half of the batch is joined with the other: it has no samples of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.b(torch.cat((y, x.flip(0)), 0))


def test_samples_that_are_joined_are_all_run() -> None:
    torch.manual_seed(0)
    model = Mixed().double()
    found = pathlift.path_kernel_diagonal(model, torch.zeros(3, 3, dtype=torch.float64))
    leaving = model.b.weight.detach().square().sum(0)
    # Three of the six rows go through the first map, all six through the second.
    torch.testing.assert_close(found["a.bias"], 3 * leaving)
    torch.testing.assert_close(found["b.bias"], torch.full((2,), 6.0, dtype=torch.float64))
