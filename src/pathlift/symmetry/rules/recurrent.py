"""Recurrent cells and layers that the export keeps whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from pathlift.capture import shape_of
from pathlift.symmetry.inference import Inference, Result, refuse, rule
from pathlift.symmetry.scales import Form, Value, add_forms


def _columns(inf: Inference, weight: Value, x: Value, rows: Tensor | None = None) -> None:
    """The weight undoes its input's scales; its rows carry ``rows`` (pinned where None)."""
    if x.zero:  # an initial state: this use of the weight says nothing
        return
    rank = len(x.shape)
    tied = inf.tie(inf.form(x), range(rank - 1))
    count = x.shape[-1]
    columns = tied.map(lambda t: t.reshape(1, count), (1, count)).expand(weight.shape).scaled(-1)
    if rows is not None:
        columns = add_forms(Form(weight.shape, ((1, rows[:, None].expand(weight.shape)),)), columns)
    inf.bind(weight, columns)


@rule("rnn_relu_cell")
def relu_cell(
    inf: Inference, node: fx.Node, x: Value, h: Value, w: Value, u: Value, *biases: Value | None
) -> Result:
    """``relu(W x + b + U h + c)``."""
    shape = shape_of(node)
    out = inf.fresh((shape[-1],))
    _columns(inf, w, x, out)
    _columns(inf, u, h, out)
    for bias in biases:
        if bias is not None:
            inf.bind(bias, Form(bias.shape, ((1, out),)))
    return Form(shape, ((1, out.expand(shape)),))


@rule("rnn_tanh_cell", "gru_cell", "lstm_cell")
def gated_cell(
    inf: Inference, node: fx.Node, x: Value, h: Any, w: Value, u: Value, *biases: Value | None
) -> Result:
    """Saturating gates pin the state and the biases; the input's scales are undone by ``W``."""
    _columns(inf, w, x)
    states = h if isinstance(h, (list, tuple)) else [h]
    for value in (*states, *biases, u):
        inf.pin(value, "gates of a recurrent cell")
    meta = node.meta["val"]
    if isinstance(meta, (list, tuple)):
        return [Form(m.shape) for m in meta]
    return Form(shape_of(node))


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def layer(
    inf: Inference, node: fx.Node, x: Value, states: Any, weights: Any, *rest: Any, **_: Any
) -> Result:
    """A stack of gated layers: only the first layer's columns can undo a scale of the input."""
    if not isinstance(weights, (list, tuple)) or not isinstance(rest[0], bool):
        refuse()  # packed sequences
    given: Sequence[Any] = states if isinstance(states, (list, tuple)) else [states]
    has_biases, layers, _dropout, _train, bidirectional = rest[:5]
    step = (4 if has_biases else 2) + (len(weights) % (4 if has_biases else 2) != 0)
    first = [0, step] if bidirectional else [0]
    for k in first:
        _columns(inf, weights[k], x)
    for k, weight in enumerate(weights):
        if k not in first:
            inf.pin(weight, "gates of a recurrent layer")
    for state in given:
        inf.pin(state, "state of a recurrent layer")
    return [Form(m.shape) for m in node.meta["val"]]
