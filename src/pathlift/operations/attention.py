"""Attention: what enters a softmax is pinned, values pass with fixed weights.

To the lift, the weights of an attention are constants: the same for every key that is seen. Paths
run through the values alone, whether attention is one call or written as a softmax and two matrix
products; none runs through queries and keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathlift.capture.program import Call
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.contraction import contraction
from pathlift.operations.gains import lifted
from pathlift.operations.kinds import smooth
from pathlift.operations.table import NoPaths, Operation, Undescribed, define
from pathlift.symmetry.scales import Form, Value, compact

_SOFTMAX = NoPaths("its weights come out of a softmax, which is not piecewise linear")

# A mask of additive numbers hides a key from this number down, and a lifted score from this many
# times the smallest of its row up (lifting has lost the sign).
_HIDDEN = -1e4
_FAR = 2.0**20


# ------------------------------------------------------------------------------- in one call


def _attention_scales(
    inf: Any,
    call: Call,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Any:
    """``softmax(q k^T) v``: ``s(q) + s(k) = 0`` per contracted channel; values tied over tokens."""
    shape = call.shape
    inf.pin(attn_mask, "attention mask")
    if enable_gqa:
        key, value = (_repeated(inf, v, query.shape[-3]) for v in (key, value))
    batch = list(range(len(shape) - 2))
    rows, keys, channels, out = (len(batch) + n for n in range(4))

    def labels(x: Value, *last: int) -> list[int]:
        return [*batch[len(batch) - len(x.shape) + 2 :], *last]

    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    # The softmax pins every score, so also every product that is summed in it.
    scores = contraction(
        inf,
        [(query, labels(query, rows, channels)), (key, labels(key, keys, channels))],
        [*batch[len(batch) - len(lead) :], rows, keys, channels],
        torch.Size((*lead, query.shape[-2], key.shape[-2], query.shape[-1])),
    )
    if isinstance(scores, Form):
        inf.zero(scores)
    weights = inf.fixed((*lead, query.shape[-2], key.shape[-2]))
    return contraction(
        inf,
        [(weights, labels(weights, rows, keys)), (value, labels(value, keys, out))],
        [*batch, rows, out],
        shape,
    )


def _repeated(inf: Any, x: Value, heads: int) -> Value:
    """Grouped queries: every key and value head serves several query heads."""
    count = heads // x.shape[-3]
    if count == 1:
        return x
    shape = torch.Size((*x.shape[:-3], heads, *x.shape[-2:]))
    form = inf.form(x).map(lambda t: compact(t.repeat_interleave(count, -3)), shape)
    return Value(shape, form, zero=x.zero)


def _attention_squares(
    c: Squares,
    call: Call,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Lifted:
    c.approximate()
    v = lifted(c, value)
    tensor = v.tensor
    if enable_gqa:
        tensor = tensor.repeat_interleave(call.shape[-3] // tensor.shape[-3], -3)
    rows, keys = call.shape[-2], tensor.shape[-2]
    visible = torch.ones(rows, keys, dtype=torch.bool, device=c.device)
    if is_causal:
        visible = visible.tril()
    if isinstance(attn_mask, Tensor):
        known = attn_mask.to(c.device)
        visible = visible & (known if known.dtype == torch.bool else known > _HIDDEN)
    weights = _uniform(visible, -1, c)
    if bool((weights == weights[..., :1, :1]).all()):  # all keys in all rows
        out = (tensor * weights[..., :1, :1]).sum(-2, keepdim=True)
    else:
        out = torch.matmul(weights, tensor)
    return Lifted(out.expand(call.shape), v.shift).normalised()


def _uniform(visible: Tensor, dim: int, c: Squares) -> Tensor:
    """Equal weights of what is visible along ``dim``, lifted; none where nothing is."""
    count = visible.sum(dim, keepdim=True).clamp_min(1).to(c.dtype)
    return visible.to(c.dtype) * count**-c.p


define("scaled_dot_product_attention", Operation(_attention_scales, _attention_squares, _SOFTMAX))


# ------------------------------------------------------------------------------- written out


def _softmax_scales(
    inf: Any, call: Call, x: Value, dim: int, half_to_float: Any = False, dtype: Any = None
) -> Any:
    return smooth.scales(inf, call)


def _softmax_squares(
    c: Squares, call: Call, x: Any, dim: int, half_to_float: Any = False, dtype: Any = None
) -> Lifted:
    """Weights that no path runs through: equal ones, but 0 where the scores were masked."""
    if not c.weighs(call):  # an output layer: its paths pass as through any smooth operation
        raise Undescribed
    c.approximate()
    scores = lifted(c, x).tensor.detach()
    if not scores.dim():
        return Lifted(c.ones())
    return Lifted(_uniform(_visible(scores, dim, c.p), dim, c))


def _visible(scores: Tensor, dim: int, p: float) -> Tensor:
    """What no mask has hidden: masks leave zeros (filled) or numbers out of range (added)."""
    live = scores > 0
    lowest = torch.where(live, scores, torch.inf).amin(dim, keepdim=True)
    visible = live & (scores <= lowest * _FAR**p)
    return visible | ~visible.any(dim, keepdim=True)


softmax = Operation(_softmax_scales, _softmax_squares, _SOFTMAX)
define("_softmax _safe_softmax", softmax)
