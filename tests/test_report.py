"""Tables and pictures of a report and of a group."""

from __future__ import annotations

import json
import math
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pathlift
from pathlift import plots
from pathlift.report import histogram, moves_of, parameter_rows

X = torch.zeros(2, 4)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 64),
        nn.ReLU(),
        nn.Linear(64, 3),
        nn.ReLU(),
        nn.Linear(3, 5),
        nn.ReLU(),
        nn.Linear(5, 2, bias=False),
    )


@pytest.fixture(scope="module")
def found() -> tuple[Any, Any, nn.Module, nn.Module]:
    """Report with diagonal, group, model before and after."""
    before, after = network(), network()
    diagonal = pathlift.path_kernel_diagonal(before, X)
    group = pathlift.rescaling_group(before, X)
    report = pathlift.condition_(after, X, exact=True).with_diagonal(diagonal)
    return report, group, before, after


def test_rows_say_what_happened_to_the_weights(found: Any) -> None:
    report, _, before, after = found
    rows = report.table()
    assert [row.name for row in rows] == [name for name, _ in before.named_parameters()]
    new = dict(after.named_parameters())
    for row, move in zip(rows, report.moves, strict=True):
        old = dict(before.named_parameters())[row.name]
        factors = (new[row.name] / old).double().log2()
        assert torch.equal(factors, move.exponents())
        assert row.lowest == factors.min() and row.highest == factors.max()
        for d, (moved, count) in row.moved.items():
            # A slice that did not move may still be touched by the other dimension.
            others = tuple(k for k in range(factors.dim()) if k != d)
            constant = (
                factors.amin(others) == factors.amax(others) if others else factors == factors
            )
            assert count == old.shape[d] and 0 <= moved <= count and constant.numel() == count
    assert any(row.moved for row in rows)


def test_shares_add_up_to_the_imbalance(found: Any) -> None:
    report, _, _, after = found
    rows = report.table()
    assert math.isclose(sum(r.share_before for r in rows), report.imbalance_before, rel_tol=1e-6)
    assert math.isclose(sum(r.share_after for r in rows), report.imbalance_after, rel_tol=1e-6)
    # The diagonal after is that of the model as it is now.
    own = pathlift.path_kernel_diagonal(after, X)
    again = parameter_rows([m._replace(factors=()) for m in report.moves], own)
    for row, fresh in zip(rows, again, strict=True):
        assert math.isclose(row.share_after, fresh.share_before, abs_tol=1e-9)


def test_histogram_counts_every_entry(found: Any) -> None:
    report = found[0]
    spread = histogram(report.moves, report.diagonal)
    positive = sum(int((g > 0).sum()) for g in report.diagonal.values())
    assert sum(spread.before) == sum(spread.after) == positive
    # Moving nothing changes nothing.
    still = histogram([m._replace(factors=()) for m in report.moves], report.diagonal)
    assert still.before == still.after


def test_moves_of_a_parameter_with_one_row_per_scale() -> None:
    group = pathlift.rescaling_group(network(), X)
    scales = np.zeros(group.num_scales)
    scales[0] = 2.0
    moved = {m.name: m for m in moves_of(group, scales) if m.factors}
    rows = {row.name: row for row in parameter_rows(moved.values())}
    counts = {(n, d): c for n, row in rows.items() for d, c in row.moved.items()}
    assert len(counts) == 3 and all(moved == 1 for moved, _ in counts.values())
    assert all(row.share_before is None for row in rows.values())


def test_table_prints_and_report_is_json(found: Any) -> None:
    report = found[0]
    lines = str(report.table()).splitlines()
    assert lines[0].split()[:2] == ["parameter", "shape"] and len(lines) == 1 + len(report.moves)
    assert "imbalance before" in lines[0]
    data = json.loads(json.dumps(report.to_dict()))
    assert data["warnings"] == [] and "moves" not in data and "diagonal" not in data


def test_a_wrong_diagonal_is_named(found: Any) -> None:
    wrong = {"0.weight": torch.ones(3)}
    with pytest.raises(pathlift.ArgumentError, match=r"the diagonal of '0\.weight' has"):
        found[0].with_diagonal(wrong).table()


class _Text(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_html_is_well_formed_and_has_a_bar_per_parameter_that_moved(found: Any) -> None:
    report = found[0]
    page = _Text(report._repr_html_())
    assert not page.open
    moved = [row.name for row in report.table() if row.lowest or row.highest]
    assert moved and all(name in page.words for name in moved)
    assert "imbalance" in page.words and "10.bias" not in page.words
    table = _Text(report.table()._repr_html_())
    assert not table.open and "imbalance before" in table.words


def test_pictures(found: Any) -> None:
    pytest.importorskip("matplotlib")
    report, group, _, _ = found
    left, right = report.plot().axes
    assert [t.get_text() for t in left.get_yticklabels()] == [row.name for row in report.table()]
    assert right.get_title() == "diagonal of the path kernel"
    assert report.plot()._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    bare = pathlift.condition_(network(), X)
    assert len(bare.plot().axes) == 1
    (axes,) = group.plot().axes
    words = [t.get_text() for t in axes.texts]
    assert words[0] == "dim 0: A, 64 scales"
    assert words[1] == "dim 1: its input is pinned by the model's input"
    assert words.count("dim 0: B, 3 scales") == 2 and "dim 1: B, 3 scales" in words


def test_cells_of_a_group(found: Any) -> None:
    cells = plots.group_cells(found[1])
    assert [c.label for c in cells["2.weight"]] == ["B", "A"]
    assert cells["6.weight"][0].reason.startswith("pinned by the model's output")
    assert plots._letters(0) == "A" and plots._letters(27) == "AB"


def test_many_parameters_are_cut_down() -> None:
    pytest.importorskip("matplotlib")
    layers: list[nn.Module] = []
    for _ in range(30):
        layers += [nn.Linear(4, 4), nn.ReLU()]
    model = nn.Sequential(*layers)
    report = pathlift.condition_(model, X, verify=False)
    assert "20 that moved less left out" in report.plot().axes[0].get_title()
    title = pathlift.rescaling_group(model, X).plot().axes[0].get_title(loc="left")
    assert title.endswith("20 further parameters left out")


def test_without_matplotlib(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {"matplotlib", *(n for n in sys.modules if n.split(".")[0] == "matplotlib")}:
        monkeypatch.setitem(sys.modules, name, None)
    for draw in (found[0].plot, found[1].plot):
        with pytest.raises(
            pathlift.MissingDependencyError, match=r"pip install 'pathlift\[plots\]'"
        ):
            draw()


def test_batch_norms_read_from_too_little_are_warned_of() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 6))
    said = "a channel has 2 values: too few"
    assert any(said in w for w in pathlift.condition_(model, torch.randn(2, 6)).warnings)
    report = pathlift.condition_(model, torch.randn(2, 6), criterion="weight-norm")
    assert not any(said in w for w in report.warnings)  # it does not look at them
    assert not any("too few" in w for w in pathlift.condition_(model, torch.randn(16, 6)).warnings)
