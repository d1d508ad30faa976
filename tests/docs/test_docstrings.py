"""Every public name has an example in its docstring, and all of them run."""

from __future__ import annotations

import doctest
import importlib

import pytest

import pathlift

# Modules, beside the top level, whose functions and classes people call.
MODULES = (
    *("lifting.paths", "lifting.ntk", "theory", "streaming", "curvature"),
    *("criteria", "training", "report"),
)
# Parts that come with what has an example.
PARTS = {
    *("Coefficients", "Sink", "as_criterion", "path_kernel", "squared_gradients", "weight_range"),
    *("Progress", "parameters_on_meta", "Curvature"),
    *("Move", "moves_of", "ParameterRow", "ParameterTable", "parameter_rows"),
    *("Histogram", "histogram"),
}


def public() -> dict[str, object]:
    found = {name: getattr(pathlift, name) for name in pathlift.__all__}
    for path in MODULES:
        module = importlib.import_module(f"pathlift.{path}")
        own = [
            n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__
        ]
        names = getattr(module, "__all__", [n for n in own if not n.startswith("_")])
        found |= {n: getattr(module, n) for n in names if callable(getattr(module, n))}
    return {name: value for name, value in found.items() if name not in PARTS}


@pytest.mark.parametrize("name", sorted(public()))
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    value = public()[name]
    tests = doctest.DocTestFinder(exclude_empty=True).find(value, name, globs={})
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in tests:
        runner.run(test)
    found = runner.summarize(verbose=False)
    assert found.attempted and not found.failed, capsys.readouterr().out


def test_every_part_is_there() -> None:
    """A name in PARTS that is gone would excuse a new one."""
    modules = [importlib.import_module(f"pathlift.{path}") for path in MODULES]
    assert all(any(hasattr(m, name) for m in modules) for name in PARTS)
