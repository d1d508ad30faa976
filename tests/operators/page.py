"""docs/operations.md: one line per operator, from the verdicts of its cases."""

from __future__ import annotations

from collections import Counter
from typing import Any

Row = dict[str, Any]
QUESTIONS = ("bits", "errors", "report")

HEAD = """# Operators

Made by `make operators` from PyTorch's own operator samples (float32). In every case a linear layer
feeds one floating argument and another consumes each floating result, so that every entry of the
argument could have a scale of its own (see tests/operators/cases.py).

- scale: in how many cases a scale passes from the argument to what consumes the results; else what
  pins it, or why the model is refused.
- paths: whether the path lifting goes through the operator, or a stand-in takes its place.
- bits: random integer scales left every output bit for bit as it was.
- errors: nothing but a worded PathliftError was raised.
- report: after a continuous `condition_`, a second call measured what the first one reported, and
  gained nothing.
"""


def page(rows: dict[str, list[Row]]) -> str:
    """The Markdown page; ``rows``: verdicts by operator."""
    verdicts = [v for found in rows.values() for v in found]
    ran = [v for v in verdicts if not v.get("skipped")]
    failing = {q: {name for name, found in rows.items() if any(q in v for v in found)} for q in QUESTIONS}  # fmt: skip
    lines = [
        HEAD,
        f"{len(rows)} operators, {len(ran):,} cases. Operators with a wrong function: "
        f"{len(failing['bits'])}; with errors of the library's own: {len(failing['errors'])}; "
        f"whose report falls short: {len(failing['report'])}.",
        "",
        "| operator | cases | scale | paths | bits | errors | report |",
        "|---|---:|---|---|---|---|---|",
    ]
    for name in sorted(rows):
        found = [v for v in rows[name] if not v.get("skipped")]
        if not found:
            lines.append(f"| {name} | 0 | {cell(_nothing(rows[name]))} | | | | |")
            continue
        answers = " | ".join(cell(_answer(found, q)) for q in QUESTIONS)
        lines.append(
            f"| {name} | {len(found)} | {cell(_scale(found))} | {cell(_paths(found))} | {answers} |"
        )
    return "\n".join(lines) + "\n"


def _nothing(found: list[Row]) -> str:
    return _commonest(v["skipped"] for v in found) if found else "no floating argument"


def _scale(found: list[Row]) -> str:
    passing = sum(bool(v.get("passes")) for v in found)
    parts = [f"passes {passing} of {len(found)}"] if passing else []
    pins = Counter(op for v in found if not v.get("passes") for op in v.get("pinned", ()))
    if pins:
        parts.append("pinned by " + ", ".join(op for op, _ in pins.most_common(3)))
    refused = [v["refused"] for v in found if "refused" in v]
    if refused:
        parts.append(f"refused {len(refused)}: {_commonest(refused)}")
    return "; ".join(parts) or "no scale"


def _paths(found: list[Row]) -> str:
    measured = [v for v in found if "refused" not in v and "errors" not in v and "bits" not in v]
    if not measured:
        return ""
    standins = Counter(op for v in measured for op in v.get("standins", ()))
    if not standins:
        return "yes"
    names = "stand-in for " + ", ".join(op for op, _ in standins.most_common(3))
    through = sum(not v.get("standins") for v in measured)
    return f"yes {through} of {len(measured)}; {names}" if through else names


def _answer(found: list[Row], question: str) -> str:
    wrong = [v[question] for v in found if question in v]
    return f"**{len(wrong)}**: {_commonest(wrong)}" if wrong else "ok"


def _commonest(texts: Any) -> str:
    ((text, _),) = Counter(texts).most_common(1)
    return str(text)


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:160]
