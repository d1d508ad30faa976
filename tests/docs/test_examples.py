"""Every example of the documentation runs as written, each page in one namespace, in its order.

A block with ``title="file.py"`` is that file. Blocks of bash are run line by line. A block under
``<!-- not run: why -->`` is left out.
"""

from __future__ import annotations

import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pathlift.cli import main
from pathlift.tensors import rules as optimizers

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]
_FENCE = re.compile(
    r"^(?P<skip><!-- not run: [^\n]*-->\n)?```(?P<kind>\w+)(?P<title> title=\"[\w.]+\")?\n"
    r"(?P<body>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)
# Packages that single pages need.
NEEDS = {"gallery.md": "matplotlib", "checkpoints.md": "safetensors"}


class Block(NamedTuple):
    kind: str
    file: str
    body: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(m["kind"], (m["title"] or "")[8:-1], m["body"])
        for m in _FENCE.finditer(text)
        if not m["skip"] and m["kind"] in ("python", "bash")
    ]


# Its program runs on two processes in tests/training/test_sharded.py.
ELSEWHERE = ("docs/distributed.md",)


def run(block: Block, names: dict[str, Any], page: str) -> None:
    if block.file:
        Path(block.file).write_text(block.body)
    elif block.kind == "python":
        exec(compile(block.body, page, "exec"), names)
    else:
        for line in block.body.splitlines():
            command, *words = shlex.split(line)
            assert command == "pathlift" and main(words) == 0, line


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p) and p not in ELSEWHERE])
def test_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path(page).name in NEEDS:
        pytest.importorskip(NEEDS[Path(page).name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", ":".join(p for p in sys.path if p))
    rules = {c: dict(r) for c, r in optimizers.RULES.items()}
    loaded = set(sys.modules)
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # an example does not warn
            warnings.filterwarnings("ignore", ".*performance drop.*", UserWarning)
            for block in blocks(page):
                run(block, names, page)
    finally:
        optimizers.RULES.clear()
        optimizers.RULES.update(rules)
        for name in set(sys.modules) - loaded:
            if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(
                sys.modules[name].__file__
            ):
                del sys.modules[name]


def test_pages_with_examples() -> None:
    """A page whose fences no longer match would pass in silence."""
    found = {Path(p).stem for p in PAGES if blocks(p)}
    assert found >= {
        *("README", "index", "when", "gallery", "command-line"),
        *("training", "criteria", "checkpoints", "distributed", "quantization"),
    }


def test_links() -> None:
    """Every relative link of README and the documentation leads to a file."""
    pages = [ROOT / p for p in PAGES] + [*ROOT.glob("docs/api/*.md"), ROOT / "CONTRIBUTING.md"]
    pages += [ROOT / "examples" / "README.md"]
    broken = [
        f"{page.name}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert not broken


def test_every_page_is_on_the_site() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": ([\w/.-]+\.md)$", text, flags=re.MULTILINE))
    pages = {str(p.relative_to(ROOT / "docs")) for p in ROOT.glob("docs/*.md")}
    pages |= {str(p.relative_to(ROOT / "docs")) for p in ROOT.glob("docs/api/*.md")}
    assert listed == pages | {"reproduced/README.md"}
