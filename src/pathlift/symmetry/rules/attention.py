"""Attention: the product of queries and keys is pinned by the softmax, values pass through."""

from __future__ import annotations

from typing import Any

from torch import fx

from pathlift.capture import shape_of
from pathlift.symmetry.inference import Inference, Result, refuse, rule
from pathlift.symmetry.scales import Value, add_forms


@rule("scaled_dot_product_attention")
def attention(
    inf: Inference,
    node: fx.Node,
    q: Value,
    k: Value,
    v: Value,
    mask: Any = None,
    *_: Any,
    enable_gqa: bool = False,
    **__: Any,
) -> Result:
    """``softmax(q k^T) v``: ``s(q) + s(k) = 0`` per contracted channel; values tied over tokens."""
    if enable_gqa or q.shape[:-2] != k.shape[:-2] or k.shape[:-2] != v.shape[:-2]:
        refuse()
    if isinstance(mask, Value):
        inf.pin(mask, "attention mask")
    batch = q.shape[:-2]
    grid = (*batch, q.shape[-2], k.shape[-2], q.shape[-1])
    left = inf.form(q).map(lambda t: t.unsqueeze(-2), (*batch, q.shape[-2], 1, q.shape[-1]))
    right = inf.form(k).map(lambda t: t.unsqueeze(-3), (*batch, 1, k.shape[-2], k.shape[-1]))
    inf.zero(add_forms(left.expand(grid), right.expand(grid)))
    return inf.tie(inf.form(v), [len(v.shape) - 2]).expand(shape_of(node))
