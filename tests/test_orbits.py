"""Members of an orbit end at the same weights; others do not."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.cli import main
from pathlift.solve.levels import level_scales


def mlp(*widths: int) -> nn.Sequential:
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*[m for a, b in pairs for m in (nn.Linear(a, b), nn.ReLU())][:-1])


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False),
        nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip


def with_dead_channels() -> nn.Sequential:
    model = mlp(6, 10, 7, 3)
    with torch.no_grad():
        model[2].weight[:, 2] = 0  # nothing leaves
        model[4].weight[:, 1] = 0
        model[0].weight[5], model[0].bias[5] = 0, 0  # nothing enters
        model[0].weight[6, :3] = 0  # pruned
    return model


def behind_zeros() -> nn.Sequential:
    """A layer that starts at zero: every scale is dead."""
    model = mlp(4, 9, 6, 3)
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    return model


def half_frozen() -> nn.Sequential:
    """What is trained alone would leave a direction open."""
    model = mlp(4, 9, 3)
    model[2].bias = None
    return model.requires_grad_(False)


class Apart(nn.Module):
    """Two networks that share no scale."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = mlp(4, 9, 3), mlp(5, 7, 2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(y)


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "bottleneck": (lambda: mlp(8, 40, 3, 20, 5), ((2, 8),)),
    "batch norms": (convolutions, ((2, 3, 8, 8),)),
    "attention": (attention, ((2, 5, 8),)),
    "dead channels": (with_dead_channels, ((2, 6),)),
    "behind zeros": (behind_zeros, ((2, 4),)),
    "frozen": (half_frozen, ((2, 4),)),
    "apart": (Apart, ((2, 4), (2, 5))),
}


def member(model: nn.Module, x: object, whole: bool) -> nn.Module:
    """Another member of the orbit."""
    other = copy.deepcopy(model)
    group = pathlift.rescaling_group(other, x)
    assert group.num_scales > 0
    scales = torch.randn(group.num_scales, dtype=torch.float64) * 2
    group.rescale_(other, scales.round() if whole else scales)
    return other


def network(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(seed)
    make, shapes = NETWORKS[name]
    return make(), tuple(torch.randn(s) for s in shapes)


@pytest.mark.parametrize(
    "whole", [pytest.param(True, marks=pytest.mark.zoo), False], ids=["integers", "continuous"]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_members_of_an_orbit_have_one_canonical_form(name: str, whole: bool) -> None:
    model, x = network(name)
    other = member(model, x, whole)
    distance = pathlift.orbit_distance(model, other, x)
    assert distance.same and distance.largest < 1e-6 and distance.notes == []
    assert set(distance.distances) >= {n for n, _ in model.named_parameters()}
    for one in (model, other):
        report = pathlift.canonical_(one, x)
        assert report.converged
        if not report.dead_channels:  # placing those may cost imbalance
            assert report.imbalance_after <= report.imbalance_before + 1e-9
        said = " ".join(report.warnings)
        assert ("by the least logarithms of weights" in said) == (report.dead_channels > 0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "name", ["bottleneck", pytest.param("batch norms", marks=pytest.mark.zoo), "dead channels"]
)
def test_what_is_not_in_the_orbit_is_seen(name: str) -> None:
    model, x = network(name)
    other = member(model, x, False)
    with torch.no_grad():
        list(other.parameters())[-2][0, 0] *= 1.01
    before = copy.deepcopy(other.state_dict())
    distance = pathlift.orbit_distance(model, other, x)
    assert not distance.same and 1e-5 < distance.largest < 0.05
    back = pathlift.orbit_distance(other, model, x)
    assert back.largest == pytest.approx(distance.largest, rel=1e-6)
    assert all(torch.equal(before[n], t) for n, t in other.state_dict().items())
    fresh, _ = network(name, seed=1)
    assert pathlift.orbit_distance(model, fresh, x).largest > 0.5


def test_running_statistics_belong_to_the_network() -> None:
    model, x = network("batch norms")
    other = copy.deepcopy(model)
    other[1].running_mean[2] = 0.1
    distance = pathlift.orbit_distance(model, other, x)
    assert not distance.same and distance.distances["1.running_mean"] == 1.0


def test_the_canonical_form_is_the_optimum_where_all_channels_live() -> None:
    model, x = network("bottleneck")
    other = copy.deepcopy(model)
    canonical = pathlift.canonical_(model, x)
    report = pathlift.condition_(other, x, exact=False, tol=1e-10)
    assert canonical.imbalance_after == pytest.approx(report.imbalance_after, abs=1e-10)
    torch.testing.assert_close(canonical.log2_scales, report.log2_scales, rtol=0, atol=1e-7)


def test_level_scales_against_dense_least_squares() -> None:
    model, x = network("dead channels")
    group = pathlift.rescaling_group(model, x)
    tensors = {n: p.detach().double() for n, p in model.named_parameters()}
    rows = torch.cat([group.exponents(n).flatten(0, -2) for n in tensors]).double()
    logs = torch.cat([t.flatten() for t in tensors.values()]).abs().log2()
    live = logs.isfinite()
    expected = torch.linalg.lstsq(rows[live], -logs[live, None], driver="gelsd").solution[:, 0]
    found = torch.from_numpy(level_scales(group, tensors.__getitem__))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_another_structure_is_refused() -> None:
    x = torch.zeros(1, 4)
    with pytest.raises(pathlift.ArgumentError, match=r"the networks differ in '0\.weight'"):
        pathlift.orbit_distance(mlp(4, 3, 2), mlp(4, 5, 2), x)


def test_it_prints_and_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = network("bottleneck")
    paths = [tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "c.pt"]
    torch.save(model.state_dict(), paths[0])
    torch.save(member(model, x, True).state_dict(), paths[1])
    with torch.no_grad():
        model[0].weight[0] *= -1
    torch.save(model.state_dict(), paths[2])
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Linear(8, 40), nn.ReLU(),"
        " nn.Linear(40, 3), nn.ReLU(), nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 5))\n"
    )
    more = ["--model", f"{tmp_path / 'net.py'}:build", "--input", "2,8"]
    assert main(["distance", *map(str, paths[:2]), *more]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("the same network up to rescaling: canonical forms agree to ")
    assert said[1].split() == ["tensor", "distance"] and len(said) == 2 + 8
    assert main(["distance", str(paths[0]), str(paths[2]), *more, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["same"] is False and data["largest"] == max(data["distances"].values()) > 0.01
