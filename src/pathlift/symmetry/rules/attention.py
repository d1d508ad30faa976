"""Attention: the product of queries and keys is pinned by the softmax, values pass through."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pathlift.capture import shape_of
from pathlift.symmetry.inference import Inference, Result, rule
from pathlift.symmetry.rules.product import contraction
from pathlift.symmetry.scales import Form, Value


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
    shape = shape_of(node)
    if isinstance(mask, Value):
        inf.pin(mask, "attention mask")
    if enable_gqa:
        k, v = (_repeat_heads(inf, t, q.shape[-3]) for t in (k, v))
    batch = list(range(len(shape) - 2))
    rows, keys, channels, out = (len(batch) + n for n in range(4))

    def labels(value: Value, *last: int) -> list[int]:
        return [*batch[len(batch) - len(value.shape) + 2 :], *last]

    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    # The softmax pins every score, so also every product that is summed in it.
    scores = contraction(
        inf,
        [(q, labels(q, rows, channels)), (k, labels(k, keys, channels))],
        [*batch[len(batch) - len(lead) :], rows, keys, channels],
        torch.Size((*lead, q.shape[-2], k.shape[-2], q.shape[-1])),
    )
    if isinstance(scores, Form):
        inf.zero(scores)
    weights = inf.fixed((*lead, q.shape[-2], k.shape[-2]))
    return contraction(
        inf,
        [(weights, labels(weights, rows, keys)), (v, labels(v, keys, out))],
        [*batch, rows, out],
        shape,
    )


def _repeat_heads(inf: Inference, value: Value, heads: int) -> Value:
    """Grouped queries: every key and value head serves several query heads."""
    count = heads // value.shape[-3]
    if count == 1:
        return value
    shape = torch.Size((*value.shape[:-3], heads, *value.shape[-2:]))
    form = inf.form(value).map(lambda t: t.repeat_interleave(count, -3), shape)
    return Value(shape, form)
