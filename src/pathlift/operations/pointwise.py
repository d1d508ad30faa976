"""Operations on single elements: ReLU and its kin, casts, masks, signs, draws, constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pathlift.capture.program import Call, symbols_in
from pathlift.lifting.tables import UNKNOWN, Listing, Table
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.gains import lifted, magnitude, ones, table
from pathlift.operations.kinds import degree_zero, identity, shapes_only, smooth
from pathlift.operations.table import NoPaths, Operation, Undescribed, define
from pathlift.symmetry.scales import Form, Value

# ------------------------------------------------------------------------------- degree 1

# A random slope or mask is drawn alike whatever the scale; a second result is such a mask.
define("relu leaky_relu rrelu rrelu_with_noise rrelu_with_noise_functional", identity)
define("dropout native_dropout feature_dropout _fused_dropout", identity)
define("_to_copy", identity)
define("_conj _conj_physical _neg_view", identity)


def _abs_squares(c: Squares, call: Call, x: Lifted) -> Lifted:
    return Lifted(x.tensor, x.shift, magnitude(x))


def _neg_squares(c: Squares, call: Call, x: Lifted) -> Lifted:
    return Lifted(x.tensor, x.shift)


def _neg_listing(c: Listing, call: Call, x: Table) -> Table:
    return x.times(-1.0)


define("abs", identity.but(squares=_abs_squares))
define("neg", identity.but(squares=_neg_squares, listing=_neg_listing))


def _prelu_scales(inf: Any, call: Call, x: Value, weight: Value) -> Value:
    """The slopes themselves are not rescaled."""
    inf.pin(weight, "prelu slope")
    return x


def _prelu_squares(c: Squares, call: Call, x: Any, weight: Any) -> Lifted:
    return lifted(c, x)


def _prelu_listing(c: Listing, call: Call, x: Any, weight: Any) -> Table:
    return table(c, x)


define("prelu _prelu_kernel", Operation(_prelu_scales, _prelu_squares, _prelu_listing))


def _identity_if(holds: Callable[[Call], bool]) -> Operation:
    """Homogeneous for some values of its numbers: ``holds`` looks at all of them."""

    def scales(inf: Any, call: Call, x: Value, **_: Any) -> Value:
        if not holds(call):
            raise Undescribed
        return x

    def squares(c: Squares, call: Call, x: Lifted, **_: Any) -> Lifted:
        if not holds(call):
            c.approximate()
        return x

    def listing(c: Listing, call: Call, x: Table, **_: Any) -> Table:
        if not holds(call):
            raise c.refuse("with these bounds it starts no path of degree one")
        return x

    return Operation(scales, squares, listing)


_INFINITE = (float("inf"), -float("inf"))


def _all_of(allowed: tuple[Any, ...], *names: str) -> Operation:
    return _identity_if(lambda call: all(call[n] in allowed for n in names))


define("threshold", _all_of((0,), "threshold", "value"))
define("hardtanh", _all_of((0, *_INFINITE), "min_val", "max_val"))
define("hardshrink softshrink", _all_of((0,), "lambd"))
# What is not finite stays so under every scale; only what replaces it has none.
define("nan_to_num", _all_of((0, None), "nan", "posinf", "neginf"))
# In training the dropped entries become a constant.
define(
    "alpha_dropout feature_alpha_dropout",
    _identity_if(lambda call: not call["train"] or call["p"] == 0),
)

# ------------------------------------------------------------------------------- no scale

define(
    "hardsigmoid hardswish celu elu silu gelu mish softplus log_sigmoid_forward "
    "sigmoid tanh exp exp2 expm1 log log2 log10 log1p logit sin cos tan asin acos atan sinh cosh "
    "asinh acosh atanh sinc erf erfc erfinv lgamma digamma polygamma i0 special_erfcx "
    "special_i0e special_i1 special_i1e special_ndtri special_log_ndtr special_entr special_zeta "
    "floor ceil round trunc frac",
    smooth,
)
define("_log_softmax logsumexp logcumsumexp cumprod", smooth)


def _ones_squares(c: Squares, call: Call, **arguments: Any) -> Lifted:
    return ones(c, call.shape)


def _fixed_scales(inf: Any, call: Call, **arguments: Any) -> Any:
    return inf.fixed(call.shape)


def _unknown_listing(c: Listing, call: Call, **arguments: Any) -> Any:
    return UNKNOWN


# Zero or not, finite or not: any scale. In squares a mask keeps every path.
mask = Operation(_fixed_scales, _ones_squares, _unknown_listing, changes_dtype=True)

define("isnan isinf isfinite isposinf isneginf signbit", mask)
define(
    "logical_not logical_and logical_or logical_xor bitwise_not bitwise_and bitwise_or "
    "bitwise_xor __and__ __or__ __xor__ any all count_nonzero",
    mask,
)


def _sign_squares(c: Squares, call: Call, **arguments: Any) -> Lifted:
    """A number without a scale: 1."""
    c.approximate()
    return ones(c, call.shape)


CONSTANT = NoPaths("it is piecewise constant in the network's input")
_sign = degree_zero.but(squares=_sign_squares, listing=CONSTANT)
define("sign sgn angle", _sign)


def _heaviside_scales(inf: Any, call: Call, x: Value, values: Value) -> Any:
    inf.pin(values, "value at zero")
    return inf.fixed(call.shape)


define("heaviside", _sign.but(scales=_heaviside_scales))


def _position_scales(
    inf: Any, call: Call, x: Value, dim: int | None = None, keepdim: bool = False
) -> Any:
    """An order along a dimension does not change if all its entries have one scale."""
    inf.tie(inf.form(x), range(len(x.shape)) if dim is None else [dim] if x.shape else [])
    return inf.fixed(call.shape)


def _no_squares(c: Squares, call: Call, **arguments: Any) -> None:
    return None


define(
    "argmax argmin",
    Operation(_position_scales, _no_squares, _unknown_listing, changes_dtype=True),
)

# ------------------------------------------------------------------------------- constants


def _filled(value_of: Callable[[Call], Any]) -> Operation:
    """A shape, filled with one number."""

    def tensor(call: Call) -> Tensor:
        return torch.tensor(value_of(call), dtype=call.output.dtype).expand(call.shape)

    def scales(inf: Any, call: Call, **arguments: Any) -> Value:
        made = tensor(call)
        zero = bool(value_of(call) == 0)
        return Value(made.shape, Form(made.shape, why="a constant"), constant=made, zero=zero)

    def squares(c: Squares, call: Call, **arguments: Any) -> Any:
        return c.placed(tensor(call))

    def listing(c: Listing, call: Call, **arguments: Any) -> Any:
        return tensor(call)

    return Operation(scales, squares, listing, changes_dtype=True)


define("zeros zeros_like new_zeros zero", _filled(lambda call: 0))
define("ones ones_like new_ones", _filled(lambda call: 1))
define("full full_like new_full", _filled(lambda call: call["fill_value"]))
define("scalar_tensor", _filled(lambda call: call["s"]))


def _drawn(mean: Callable[[Call], float]) -> Operation:
    """A draw that takes a shape and numbers; in squares, its expectation."""

    def squares(c: Squares, call: Call, **arguments: Any) -> Tensor:
        return mean(call) * c.ones(call.shape)

    return shapes_only.but(scales=_fixed_scales, squares=squares, changes_dtype=True)


define("rand rand_like", _drawn(lambda call: 0.5))
define("randn randn_like empty empty_like new_empty empty_strided", _drawn(lambda call: 0.0))
define("new_empty_strided", _drawn(lambda call: 0.0))
define("uniform", _drawn(lambda call: (call["from"] + call["to"]) / 2))
define("exponential", _drawn(lambda call: 1 / call["lambd"]))
define("normal_functional", _drawn(lambda call: call["mean"]))
define("randint randint_like randperm random geometric", _drawn(lambda call: 1.0))
define("arange eye tril_indices triu_indices", shapes_only)


def _bernoulli_scales(inf: Any, call: Call, x: Value, p: Any = None) -> Any:
    """Without ``p`` the values themselves are the probabilities."""
    inf.pin(x if p is None else p if isinstance(p, Value) else None, "probability of a draw")
    return inf.fixed(call.shape)


define(
    "bernoulli",
    Operation(_bernoulli_scales, _ones_squares, _unknown_listing, changes_dtype=True),
)

# ------------------------------------------------------------------------------- gates


def _glu_scales(inf: Any, call: Call, x: Value, dim: int = -1) -> Any:
    """``a * sigmoid(b)`` of the two halves: b is pinned."""
    half = x.shape[dim] // 2
    form = inf.form(x)
    inf.zero(form.map(lambda t: t.narrow(dim, half, half), call.shape))
    return form.map(lambda t: t.narrow(dim, 0, half), call.shape)


def _glu_squares(c: Squares, call: Call, x: Lifted, dim: int = -1) -> Lifted:
    """The gate's stand-in is that of a sigmoid, as where it is written apart."""
    c.approximate()
    a, b = x.tensor.chunk(2, dim)
    gate = c.gate(Lifted(b, x.shift))
    return Lifted(a * gate.tensor, x.shift + gate.shift).normalised()


define("glu", Operation(_glu_scales, _glu_squares, NoPaths("its gate is a sigmoid")))


def _weight_norm_scales(inf: Any, call: Call, v: Value, g: Value, dim: int = 0) -> Any:
    """``g v / ||v||``: the scale of ``g``; each slice of ``v`` has one of its own."""
    norms = inf.tie(inf.form(v), _norm_dims(len(v.shape), dim))
    outputs = list(symbols_in(call.outputs))
    weight = inf.form(g).expand(outputs[0].shape)
    if not call.several:
        return weight
    shape = outputs[1].shape
    return [weight, norms.map(lambda t: t.reshape(shape), shape)]


def _norm_dims(rank: int, dim: int) -> list[int]:
    """Dimensions that the norm sums over; -1 means all."""
    return [d for d in range(rank) if dim == -1 or d != dim % rank]


def _weight_norm_squares(c: Squares, call: Call, v: Any, g: Any, dim: int = 0) -> Any:
    """Paths pass through ``g``; of ``v`` only the direction is seen, as a fixed gain."""
    c.approximate()
    v, g = lifted(c, v), lifted(c, g)
    p = c.p or 1.0
    dims = _norm_dims(v.tensor.dim(), dim)
    powers = v.tensor.detach() ** (2 / p)
    total = powers.sum(dims, keepdim=True) if dims else powers
    share = v.tensor.detach() / torch.where(total > 0, total, 1.0) ** (p / 2)
    weight = Lifted(g.tensor * share, g.shift)
    return [weight, None] if call.several else weight


define(
    "_weight_norm _weight_norm_interface",
    Operation(_weight_norm_scales, _weight_norm_squares, NoPaths("it divides by a norm")),
)

# ------------------------------------------------------------------------------- complex numbers

_COMPLEX = NoPaths("a path has a real weight")


def _complex_scales(inf: Any, call: Call, real: Value, imag: Value) -> Any:
    """Real and imaginary part of a number have one scale."""
    inf.equate(inf.form(real), inf.form(imag))
    return inf.form(real).expand(call.shape)


def _complex_squares(c: Squares, call: Call, real: Any, imag: Any) -> Lifted:
    c.approximate()
    (left, right), shift = c.aligned((lifted(c, real), lifted(c, imag)))
    return Lifted((left + right).expand(call.shape), shift)


def _as_real_scales(inf: Any, call: Call, x: Value) -> Any:
    return inf.form(x).map(lambda t: t.unsqueeze(-1).expand(call.shape), call.shape)


def _as_real_squares(c: Squares, call: Call, x: Lifted) -> Lifted:
    c.approximate()
    return x.map(lambda t: t.unsqueeze(-1).expand(call.shape))


def _as_complex_scales(inf: Any, call: Call, x: Value) -> Any:
    return inf.tie(inf.form(x), [-1]).map(lambda t: t.squeeze(-1), call.shape)


def _as_complex_squares(c: Squares, call: Call, x: Lifted) -> Lifted:
    c.approximate()
    return x.map(lambda t: t.sum(-1))


def _polar_scales(inf: Any, call: Call, abs: Value, angle: Value) -> Any:
    inf.pin(angle, "an angle")
    return inf.form(abs).expand(call.shape)


def _polar_squares(c: Squares, call: Call, abs: Any, angle: Any) -> Lifted:
    c.approximate()
    return lifted(c, abs).map(lambda t: t.expand(call.shape))


define("complex", Operation(_complex_scales, _complex_squares, _COMPLEX))
define("view_as_real view_as_real_copy", Operation(_as_real_scales, _as_real_squares, _COMPLEX))
define(
    "view_as_complex view_as_complex_copy",
    Operation(_as_complex_scales, _as_complex_squares, _COMPLEX),
)
define("polar", Operation(_polar_scales, _polar_squares, _COMPLEX))
