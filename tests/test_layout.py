"""Dependencies point down: no circle, none hidden in a function, and arithmetic knows no group."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pathlift

ROOT = Path(pathlift.__file__).parent
# The roof: commands and experiments start fast by importing late.
ROOF = ("pathlift.cli", "pathlift.experiments")


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


TREES = modules()


def imported(node: ast.AST) -> set[str]:
    """The modules of the package that an import statement asks for."""
    if isinstance(node, ast.Import):
        return {a.name for a in node.names if a.name in TREES}
    if isinstance(node, ast.ImportFrom) and node.module in TREES:
        return {
            inner if (inner := f"{node.module}.{a.name}") in TREES else str(node.module)
            for a in node.names
        }
    return set()


def at_import(tree: ast.Module) -> set[str]:
    """What is imported while the module itself is; type checkers' imports are not."""
    found: set[str] = set()
    for node in tree.body:
        checked = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not checked and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found |= set().union(*(imported(inner) for inner in ast.walk(node)))
    return found


def test_no_circle() -> None:
    order = list(TopologicalSorter({n: at_import(t) for n, t in TREES.items()}).static_order())
    assert order.index("pathlift.tensors.rescale") < order.index("pathlift.symmetry.group")
    assert order.index("pathlift.symmetry.group") < order.index("pathlift.condition")


def test_no_import_inside_a_function() -> None:
    late = [
        f"{name}: {function.name} imports {', '.join(imported(node))}"
        for name, tree in TREES.items()
        if not name.startswith(ROOF)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if imported(node)
    ]
    assert late == []


def test_arithmetic_knows_no_group() -> None:
    for name, tree in TREES.items():
        if name.startswith("pathlift.tensors"):
            others = {m for m in at_import(tree) if not m.startswith("pathlift.tensors")}
            assert others <= {"pathlift.errors"}, name


# What is about no single part: documentation, programs, other people's models, slow definitions.
CROSS_CUTTING = {"docs", "examples", "operators", "reference", "zoo"}
# Beside the modules at the top: the whole of the package, from outside.
WHOLE = {"cuda", "device", "dist", "layout", "misuse", "names", "truth", "unusual_models"}


def test_tests_mirror_the_source() -> None:
    tests = Path(__file__).parent
    parts = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    folders = {p.parent.name for p in tests.glob("*/test_*.py")}
    assert folders - CROSS_CUTTING <= parts
    modules = {p.stem for p in ROOT.glob("*.py")}
    files = {p.stem.removeprefix("test_") for p in tests.glob("test_*.py")}
    assert files - WHOLE <= modules
