"""Writes docs/symmetries.md: the group against the oracle on every small network.

python tests/symmetry/table.py
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

import pathlift  # noqa: E402
from reference.oracle import diagonal_symmetries  # noqa: E402
from symmetry.test_oracle import CASES, SHORTFALL  # noqa: E402

HEAD = """# Which rescalings are found

A *symmetry* here is one log2 scale per parameter entry, fixed once and for all, that leaves the
outputs the same for all inputs and all values of the parameters. pathlift finds symmetries from the
operations of the exported graph: one rule per operation, linear equations in the scales, and their
integer solutions. `group.summary()` (or `pathlift inspect`) says for every parameter which
dimensions scale, with which others, and which operation at which module pins the rest.

## What the rules know

- Positively homogeneous maps of one tensor (ReLU and its kin, max, mean, sum, norms of order 1, 2
  and infinity, sort, pooling, resizing, padding with zeros, dropout, Fourier transforms) pass a
  scale on, tied over what they combine. Signs and comparisons with zero take any scale.
- Products add scales: linear layers, convolutions, matrix products, `einsum`, elementwise products,
  attention (queries against keys, values through), bilinear layers. Quotients subtract them, squares
  double them, roots halve them.
- Sums, concatenations along tied dimensions, `where` and comparisons make scales equal.
- A normalisation pins its input; its affine parameters make its output free again. With
  `batch_norm="invariant"` the input of a batch norm is free too, and its running statistics move
  along; that is exact up to `eps`, so it is an option.
- Everything else pins what it reads and is listed. Powers other than -2, -1, -1/2, 1/2, 1, 2, 3 pin
  too: they are computed by logarithms, whose rounding does not commute with powers of two.

## Against the oracle

For every network below the number of *all* symmetries is counted from derivatives alone (the null
space of `J diag(theta)`, stacked over many inputs and many parameters, in both modes;
tests/reference/oracle.py) and compared with the rank of the group on the entries that have an
effect at all. Each direction of the group is checked to be a symmetry, and random integer elements
keep every bit in float32 and bfloat16.

Shortfalls, case by case: `F.normalize`, cosine similarity and spectral norm divide by
`max(norm, eps)`. That is homogeneous only where the norm is above `eps`, so it is not used.

"""


def main() -> None:
    warnings.simplefilter("ignore")
    rows, missing, entries = [], 0, 0
    for name, make in CASES.items():
        torch.manual_seed(0)
        model, inputs = make()
        doubles = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        group = pathlift.rescaling_group(model.double(), doubles)
        found = diagonal_symmetries(model, inputs)
        idle = int((~found.active).sum())
        pinned = ", ".join(group.unsupported)
        short = SHORTFALL.get(name, 0)
        missing += short
        entries += 1
        rows.append(
            f"| {name} | {len(found.active)} | {group.num_scales} | {found.dimension} | {short or ''} | "
            f"{idle or ''} | {pinned} |"
        )
    text = (
        HEAD
        + f"{entries} networks, {sum(1 for n in CASES if n in SHORTFALL)} with a shortfall "
        + f"({missing} scales in all). *scales*: dimension of the group, which may exceed the "
        + "oracle's where a scale moves entries without effect only (*idle entries*).\n\n"
        + "| network | entries | scales | oracle | shortfall | idle entries | pinned by |\n"
        + "|---|---:|---:|---:|---:|---:|---|\n"
        + "\n".join(rows)
        + "\n"
    )
    (ROOT / "docs" / "symmetries.md").write_text(text)


if __name__ == "__main__":
    main()
