"""What is known of optimisers: how each entry of their state transforms, and which are refused.

Those of ``torch.optim`` stand by their class, those of other libraries by their full name, so that
nothing has to be imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import optim

WHOLE = "whole"  # a mean over all entries, or over an axis that only the optimiser knows


@dataclass(frozen=True)
class Rule:
    """Multiply by ``2^(power k)``.

    Attributes:
        power: see :mod:`pathlift.tensors.state`.
        averaged: the axis of ``theta`` the state is a mean over, or :data:`WHOLE`. A mean of
            entries with different factors is not a multiple of the old mean, so such a rule holds
            only where ``k`` is constant along the axis.
        beside: a key that the state must hold too, where one key means two things.
    """

    power: int
    averaged: int | str | None = None
    beside: str | None = None


Rules = dict[str, Rule]
RULES: dict[type[optim.Optimizer], Rules] = {}
NAMED: dict[str, Rules] = {}


def _rules(powers: Mapping[str, int | Rule]) -> Rules:
    return {k: p if isinstance(p, Rule) else Rule(p) for k, p in powers.items()}


def _know(name: str, powers: Mapping[str, int | Rule]) -> None:
    """Enter an optimiser of ``torch.optim``, if this torch has it."""
    found = getattr(optim, name, None)
    if found is not None:
        RULES[found] = _rules(powers)


def _know_named(names: str, powers: Mapping[str, int | Rule]) -> None:
    """Enter optimisers of other libraries: full names, with blanks between them."""
    NAMED.update({name: _rules(powers) for name in names.split()})


_ADAM = {"exp_avg": -1, "exp_avg_sq": -2, "step": 0}
_AMSGRAD = {**_ADAM, "max_exp_avg_sq": -2}
_MEAN = Rule(-2, averaged=WHOLE)

_know("SGD", {"momentum_buffer": -1})
_know("Muon", {"momentum_buffer": -1})
_know("Adam", _AMSGRAD)
_know("AdamW", _AMSGRAD)
_know("RAdam", _ADAM)
_know("SparseAdam", _ADAM)
# mu_product is a product of the momentum coefficients of past steps.
_know("NAdam", {**_ADAM, "mu_product": 0})
_know("Adamax", {"exp_avg": -1, "exp_inf": -1, "step": 0})
_know("Adagrad", {"sum": -2, "step": 0})
# The buffer sums gradients divided by the root of square_avg: no factor is left.
_RMSPROP = {"square_avg": -2, "grad_avg": -1, "momentum_buffer": 0, "step": 0}
_know("RMSprop", _RMSPROP)
# acc_delta is the mean of squared changes of theta, which change like theta squared. Its
# recurrence holds for any power (the update is proportional to its root), so it is what the
# quantity means that decides: the next update is the old one times 2^k.
_know("Adadelta", {"square_avg": -2, "acc_delta": 2, "step": 0})
_know("ASGD", {"ax": 1, "eta": 0, "mu": 0, "step": 0})
# Only signs of gradients enter step_size.
_know("Rprop", {"prev": -1, "step_size": 0, "step": 0})
_know(
    "Adafactor",
    {
        "row_var": Rule(-2, averaged=-1),
        "col_var": Rule(-2, averaged=-2),
        "variance": -2,
        "step": 0,
    },
)

_know_named(
    "timm.optim.adamw.AdamWLegacy timm.optim.nadamw.NAdamW timm.optim.radam.RAdamLegacy "
    "timm.optim.adamp.AdamP timm.optim.lamb.Lamb "
    "apex.optimizers.fused_adam.FusedAdam apex.optimizers.fused_lamb.FusedLAMB "
    "deepspeed.ops.adam.fused_adam.FusedAdam deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam "
    "deepspeed.ops.lamb.fused_lamb.FusedLamb",
    _AMSGRAD,
)
_know_named("timm.optim.nadam.NAdamLegacy", {**_ADAM, "m_schedule": 0})
_know_named("timm.optim.mars.Mars", {**_ADAM, "last_grad": -1})
# The Hessian's diagonal changes like a squared gradient.
_know_named(
    "timm.optim.adahessian.Adahessian",
    {"exp_avg": -1, "exp_hessian_diag_sq": -4, "step": 0, "hessian step": 0},
)
_know_named("timm.optim.adan.Adan", {**_ADAM, "exp_avg_diff": -1, "neg_pre_grad": -1})
_know_named(
    "timm.optim.adabelief.AdaBelief",
    {"exp_avg": -1, "exp_avg_var": -2, "max_exp_avg_var": -2, "step": 0},
)
_know_named("timm.optim.lion.Lion lion_pytorch.lion_pytorch.Lion", {"exp_avg": -1})
_know_named(
    "timm.optim.sgdw.SGDW timm.optim.lars.Lars apex.optimizers.fused_sgd.FusedSGD",
    {"momentum_buffer": -1},
)
_know_named("timm.optim.sgdp.SGDP", {"momentum": -1})
_know_named("apex.optimizers.fused_adagrad.FusedAdagrad", {"sum": -2})
_know_named("timm.optim.rmsprop_tf.RMSpropTF", _RMSPROP)
# Means of gradients divided by the root of their second moment: no factor is left.
_know_named("timm.optim.adopt.Adopt", {"exp_avg": 0, "exp_avg_sq": -2, "step": 0})
_know_named(
    "timm.optim.laprop.LaProp",
    {"exp_avg": 0, "exp_avg_sq": -2, "exp_avg_lr_1": 0, "exp_avg_lr_2": 0, "step": 0},
)
# exp_avg averages updates; RMS is read off the weights anew at every step.
_know_named(
    "timm.optim.adafactor.Adafactor transformers.optimization.Adafactor",
    {
        "exp_avg": 0,
        "exp_avg_sq": -2,
        "exp_avg_sq_row": _MEAN,
        "exp_avg_sq_col": _MEAN,
        "RMS": 0,
        "step": 0,
    },
)
_know_named(
    "timm.optim.adafactor_bv.AdafactorBigVision",
    {"exp_avg": 0, "exp_avg_sq": -2, "exp_avg_sq_r": _MEAN, "exp_avg_sq_c": _MEAN, "step": 0},
)
# One second moment for all entries of a tensor; exp_avg averages gradients divided by its root.
_know_named("timm.optim.nvnovograd.NvNovoGrad", {"exp_avg": 0, "exp_avg_sq": _MEAN, "step": 0})
# exp_avg_sq is Adam's where Adam takes over; beside a momentum_buffer (AdaMuon) it averages squares
# of orthogonal matrices, which follow no factor.
_know_named(
    "timm.optim.muon.Muon",
    {
        "use_muon": 0,
        "momentum_buffer": -1,
        "exp_avg": -1,
        "exp_avg_sq": Rule(-2, beside="exp_avg"),
        "step": 0,
    },
)
# z is the sequence of plain steps, a point among the weights.
_FREE = "schedulefree."
_know_named(
    f"{_FREE}sgd_schedulefree.SGDScheduleFree {_FREE}adamw_schedulefree.AdamWScheduleFree "
    f"{_FREE}radam_schedulefree.RAdamScheduleFree {_FREE}adopt_schedulefree.AdoptScheduleFree "
    f"{_FREE}sgd_schedulefree_reference.SGDScheduleFreeReference "
    f"{_FREE}adamw_schedulefree_reference.AdamWScheduleFreeReference",
    {"z": 1, "exp_avg_sq": -2, "step": 0},
)
# Lookahead keeps slow weights in the state of whatever optimiser it wraps.
ANYWHERE = _rules({"lookahead_slow_buff": 1})

# Beginnings of full names -> why the state can't follow. What of it exists only after a step.
BLOCKS = (
    "keeps its state in blocks of few bits that share one scale, and entries of a block scale apart"
)
NO_STATE_FOLLOWS = {
    "bitsandbytes.": BLOCKS,
    "torchao.": BLOCKS,
    "timm.optim.madgrad.": "puts the weights at a distance from where they started that no "
    "rescaling of its sums keeps",
    "timm.optim.kron.": "keeps factors of a matrix that mixes all channels",
}
# The same for those that are refused before the first step, too, with what to do. Who trains copies
# of the weights would undo a rescaling at any time.
COPIES = (
    "trains copies of the weights, which a rescaling of the model does not reach. Condition the "
    "model before this optimiser is made, without optimizer="
)
NEVER = {
    "keras.": "is an optimiser of Keras, whose state is not carried along. Condition before the "
    "first step, without optimizer=",
    "deepspeed.runtime.": COPIES,
    "apex.fp16_utils.": COPIES,
    "apex.contrib.optimizers.": COPIES,
}


def names_of(kind: type) -> list[str]:
    """Full names of a class and its bases, itself first."""
    return [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]


def reason(kind: type, reasons: Mapping[str, str]) -> str | None:
    """Why a class is refused, by the beginning of its own or a base's full name."""
    names = names_of(kind)
    return next((why for b, why in reasons.items() if any(n.startswith(b) for n in names)), None)


def rule_for(kind: type, state: Mapping[str, object], key: str) -> Rule | None:
    """How an entry of an optimiser's state transforms; None: not known."""
    tables = [RULES.get(base, {}) for base in kind.__mro__]
    tables += [NAMED.get(name, {}) for name in names_of(kind)]
    rule = next((t[key] for t in (*tables, ANYWHERE) if key in t), None)
    return None if rule is None or (rule.beside or key) not in state else rule
