"""Optimiser state after a rescaling is what the optimiser would hold in the new coordinates."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pathlift
from pathlift.errors import ArgumentError, RangeError
from pathlift.tensors.rescale import multiply_
from pathlift.tensors.state import holding_state
from pathlift.training import declare_state, rescale_average_, state_changes
from training.formulas import FORMULAS, History

Optimizers = list[optim.Optimizer]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)
    ).double()


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 2)
    ).double()


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.ReLU(), nn.Linear(4, 2)).double()


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(8, 4, dtype=torch.float64)),
    "conv": (convnet, lambda: torch.randn(4, 2, 6, 6, dtype=torch.float64)),
    "embedding": (embedding, lambda: torch.randint(0, 7, (5,))),
}


def single(name: str, **options: Any) -> Callable[[nn.Module], Optimizers]:
    return lambda model: [getattr(optim, name)(model.parameters(), **options)]


def muon_and_sgd(model: nn.Module) -> Optimizers:
    weights = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() != 2]
    return [optim.Muon(weights, lr=0.02), optim.SGD(biases, lr=0.05, momentum=0.9)]


def sparse_and_adam(model: nn.Module) -> Optimizers:
    return [
        optim.SparseAdam([model[0].weight], lr=0.01),
        optim.Adam(model[2].parameters(), lr=0.01),
    ]


CASES: dict[str, tuple[str, Callable[[nn.Module], Optimizers]]] = {
    "sparse adam and adam": ("embedding", sparse_and_adam),
    "adafactor": ("conv", single("Adafactor")),
    "adafactor maximize": ("conv", single("Adafactor", maximize=True)),
}
if hasattr(optim, "Muon"):
    CASES["muon and sgd"] = ("mlp", muon_and_sgd)
for _name, _options in {
    "sgd": {"lr": 0.05},
    "sgd momentum": {"lr": 0.05, "momentum": 0.9},
    "sgd dampening maximize": {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "maximize": True},
    "sgd nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "adam": {},
    "adam amsgrad": {"amsgrad": True},
    "adam amsgrad maximize": {"amsgrad": True, "maximize": True},
    "adamw": {"weight_decay": 0.1},
    "adamw amsgrad": {"amsgrad": True},
    "nadam": {},
    "nadam decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "radam": {},
    "adamax": {},
    "adagrad": {},
    "rmsprop": {},
    "rmsprop momentum": {"momentum": 0.9},
    "rmsprop centered": {"centered": True},
    "rmsprop centered momentum maximize": {
        "centered": True,
        "momentum": 0.5,
        "maximize": True,
    },
    "adadelta": {"eps": 1e-4},
    "adadelta maximize": {"maximize": True},
    "asgd": {"t0": 2},
    "rprop": {},
    "rprop maximize": {"maximize": True},
}.items():
    _class = next(n for n in FORMULAS if n.lower() == _name.split()[0])
    for _kind in ("single", "foreach", "fused"):
        if _kind == "fused" and _class not in ("SGD", "Adam", "AdamW", "Adagrad"):
            continue
        _flags = {"foreach": _kind == "foreach"} | ({"fused": True} if _kind == "fused" else {})
        CASES[f"{_name} {_kind}"] = ("mlp", single(_class, **_options, **_flags))


@functools.cache
def group_of(net: str) -> pathlift.RescalingGroup:
    make, batch = NETS[net]
    return pathlift.rescaling_group(make(), batch())


class Run:
    """A training run that writes down what every parameter goes through."""

    def __init__(self, net: str, optimizers: Callable[[nn.Module], Optimizers]) -> None:
        torch.manual_seed(0)
        make, self.batch = NETS[net]
        self.model = make()
        self.optimizers = optimizers(self.model)
        self.group = group_of(net)
        self.names = {p: n for n, p in self.model.named_parameters()}
        self.sign = -1.0 if self.optimizers[0].param_groups[0].get("maximize") else 1.0
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.units: list[dict[str, Tensor]] = []

    def weights(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def train(self, steps: int) -> None:
        for _ in range(steps):
            x = self.batch()
            self.batches.append((x, torch.randn_like(self.model(x))))
            self.before.append(self.weights())
            gradients(self.model, *self.batches[-1], self.sign)
            for optimizer in self.optimizers:
                optimizer.step()
            self.after.append(self.weights())
            self.units.append({n: torch.zeros_like(w) for n, w in self.weights().items()})

    def changes(self, scales: Tensor) -> list[tuple[str, Tensor, list[Tensor]]]:
        exponents = self.group.parameter_exponents(self.group.variables(scales))
        return [(n, p, exponents[n]) for n, p in self.model.named_parameters() if n in exponents]

    def rescale(self, scales: Tensor) -> None:
        changes = self.changes(scales)
        for tensor, factors, power in state_changes(self.optimizers, changes):
            multiply_(tensor, factors, power)
        for _, parameter, factors in changes:
            multiply_(parameter.data, factors)
        for name, parameter, factors in changes:
            k = sum(factors).expand(parameter.shape)
            for moment in range(len(self.units)):
                self.units[moment][name] = self.units[moment][name] + k

    def transported(self, weights: dict[str, Tensor], moment: int) -> dict[str, Tensor]:
        return {n: w * torch.exp2(self.units[moment][n]) for n, w in weights.items()}

    def expected(self) -> dict[str, dict[str, Tensor]]:
        """State by definition: past steps replayed in the coordinates of today."""
        replay = copy.deepcopy(self.model)
        past = []
        for moment, batch in enumerate(self.batches):
            replay.load_state_dict(self.transported(self.before[moment], moment))
            past.append(gradients(replay, *batch, self.sign))
        after = [self.transported(w, t) for t, w in enumerate(self.after)]
        found = {}
        for optimizer in self.optimizers:
            for options in optimizer.param_groups:
                for name in (self.names[p] for p in options["params"]):
                    sparse = past[0][name].is_sparse
                    history = History(
                        [self.sign * g[name].to_dense() for g in past],
                        [w[name] for w in after],
                        [u[name] for u in self.units],
                        [rows(g[name]) if sparse else None for g in past],
                        options,
                    )
                    found[name] = FORMULAS[type(optimizer).__name__](history)
        return found

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {
            self.names[p]: {
                key: torch.as_tensor(v) for key, v in o.state.get(p, {}).items() if v is not None
            }
            for o in self.optimizers
            for p in self.names
            if any(p is q for g in o.param_groups for q in g["params"])
        }

    def check(self) -> None:
        found, expected = self.state(), self.expected()
        assert found.keys() == expected.keys()
        for name, state in found.items():
            assert state.keys() == expected[name].keys(), name
            for key, value in state.items():
                torch.testing.assert_close(
                    value.double(),
                    expected[name][key].double(),
                    rtol=1e-6 if value.dtype == torch.float32 else 1e-9,
                    atol=0.0,
                    msg=lambda m, where=f"{name} {key}": f"{where}: {m}",
                )


def gradients(model: nn.Module, x: Tensor, y: Tensor, sign: float) -> dict[str, Tensor]:
    model.zero_grad()
    (sign * (model(x) - y).square().mean()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def rows(gradient: Tensor) -> Tensor:
    mask = torch.zeros(gradient.shape, dtype=torch.bool)
    mask[gradient.coalesce().indices()[0]] = True
    return mask


def whole_scales(group: pathlift.RescalingGroup, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randint(-3, 4, (group.num_scales,), generator=generator)
    assert int(scales.count_nonzero()) > 1
    return scales


@pytest.mark.parametrize("case", CASES)
def test_state_is_that_of_the_rescaled_network(case: str) -> None:
    run = Run(*CASES[case])
    run.train(4)
    run.check()  # the formulas themselves
    run.rescale(whole_scales(run.group))
    run.check()
    run.train(3)
    run.rescale(whole_scales(run.group, 2) * 0.7)
    run.check()


def test_a_rescaled_gradient_is_that_of_the_rescaled_network() -> None:
    run = Run("mlp", single("SGD", lr=0.1))
    run.train(1)
    before = gradients(run.model, *run.batches[0], 1.0)
    run.rescale(whole_scales(run.group))
    after = gradients(run.model, *run.batches[0], 1.0)
    for name, k in run.units[0].items():
        assert torch.equal(after[name], before[name] * torch.exp2(-k))


@pytest.mark.parametrize("case", CASES)
def test_whole_scales_and_back_keep_every_bit(case: str) -> None:
    run = Run(*CASES[case])
    run.train(3)
    weights, state = run.weights(), copy.deepcopy(run.state())
    scales = whole_scales(run.group)
    run.rescale(scales)
    run.rescale(-scales)
    for name, found in run.state().items():
        assert torch.equal(run.weights()[name], weights[name])
        for key, value in found.items():
            assert torch.equal(value, state[name][key])


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_path_of_momentum_after_a_rescaling(nesterov: bool) -> None:
    """In the old coordinates: the same buffer, and a learning rate ``lr * 4^-k`` per entry."""
    lr, momentum = 0.02, 0.9
    run = Run("mlp", single("SGD", lr=lr, momentum=momentum, nesterov=nesterov))
    probe = run.batch()
    run.train(4)
    plain = copy.deepcopy(run.model)
    buffers = {n: s["momentum_buffer"].clone() for n, s in run.state().items()}
    run.rescale(whole_scales(run.group))
    rates = {n: lr * torch.exp2(-2 * k) for n, k in run.units[-1].items()}
    for _ in range(5):
        run.train(1)
        g = gradients(plain, *run.batches[-1], 1.0)
        for name, weight in plain.named_parameters():
            buffers[name] = momentum * buffers[name] + g[name]
            step = g[name] + momentum * buffers[name] if nesterov else buffers[name]
            weight.data -= rates[name] * step
        torch.testing.assert_close(run.model(probe), plain(probe), rtol=1e-12, atol=1e-14)


def test_forgetting_the_buffer_gives_another_path() -> None:
    """What the rule is for: without it, the step after a rescaling is not the one above."""
    run = Run("mlp", single("SGD", lr=0.02, momentum=0.9))
    probe = run.batch()
    run.train(4)
    carried = copy.deepcopy(run)
    carried.rescale(whole_scales(run.group))
    run.group.rescale_(run.model, whole_scales(run.group))
    torch.manual_seed(3)
    run.train(1)
    torch.manual_seed(3)
    carried.train(1)
    assert not torch.allclose(run.model(probe), carried.model(probe), rtol=1e-3)


def test_an_optimiser_that_has_not_stepped_keeps_its_constants() -> None:
    run = Run("mlp", single("Adagrad", initial_accumulator_value=0.5))
    assert state_changes(run.optimizers, run.changes(whole_scales(run.group))) == []
    assert state_changes(None, run.changes(whole_scales(run.group))) == []
    assert holding_state(None) is None and holding_state(run.optimizers) is None
    run.train(1)
    assert holding_state(run.optimizers) is run.optimizers[0]
    assert holding_state(run.optimizers * 2) == run.optimizers * 2


class Wrapper(optim.Optimizer):
    """As Accelerate's: an optimiser that hands everything to the one it holds."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_wrappers_and_subclasses() -> None:
    class Mine(optim.Adam):
        pass

    run = Run("mlp", lambda model: [Mine(model.parameters())])
    run.train(2)
    changes = run.changes(whole_scales(run.group))
    found = state_changes(run.optimizers, changes)
    assert sorted({power for _, _, power in found}) == [-2, -1]
    wrapped = state_changes(Wrapper(run.optimizers[0]), changes)
    assert [id(t) for t, _, _ in wrapped] == [id(t) for t, _, _ in found]


class Own(optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["cubes"] = p.grad**3
                self.state[p]["seen"] = 1
                self.state[p]["unused"] = None


def test_declared_state() -> None:
    run = Run("mlp", lambda model: [Own(model.parameters())])
    run.train(1)
    changes = run.changes(whole_scales(run.group))
    with pytest.raises(
        ArgumentError, match=r"Own keeps state 'cubes' for '0.weight', and how"
    ) as e:
        state_changes(run.optimizers, changes)
    assert "declare_state(Own, {'cubes': power})" in str(e.value)
    declare_state(Own, {"cubes": -3})
    with pytest.raises(ArgumentError, match="Own keeps state 'seen' for '0.weight'"):
        state_changes(run.optimizers, changes)
    declare_state(Own, {"seen": 0})
    found = state_changes(run.optimizers, changes)
    assert [power for _, _, power in found] == [-3] * len(changes)
    declare_state(Own, {"seen": 1})
    with pytest.raises(ArgumentError, match="'seen' for '0.weight', a int; with power 1 it must"):
        state_changes(run.optimizers, changes)


@pytest.mark.parametrize(
    ("optimizer_class", "powers", "message"),
    [
        (optim.Adam, {"exp_avg": 0.5}, "'exp_avg': 0.5"),
        (optim.Adam, {"exp_avg": True}, "'exp_avg': True"),
        (optim.Adam, {1: 1}, "1: 1"),
        (optim.Adam, ["exp_avg"], "powers must be a dict"),
        (nn.Linear, {}, "must be a subclass of torch.optim.Optimizer"),
        ("Adam", {}, "must be a subclass of torch.optim.Optimizer"),
    ],
)
def test_declarations_that_make_no_sense(optimizer_class: Any, powers: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        declare_state(optimizer_class, powers)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.update(curvature=torch.ones(6, 4)), "SGD keeps state 'curvature' for"),
        (lambda s: s.update(momentum_buffer=torch.ones(3)), r"a tensor of shape \(3,\)"),
        (lambda s: s.update(momentum_buffer=[1.0]), "a list; with power -1"),
        (lambda s: s.update(momentum_buffer=torch.ones(6, 4).to_sparse()), "a tensor of layout"),
        (lambda s: s.update(momentum_buffer=torch.ones(6, 4).int()), "a tensor of torch.int32"),
    ],
)
def test_state_that_cannot_be_carried(spoil: Callable[[Any], None], message: str) -> None:
    run = Run("mlp", single("SGD", lr=0.1, momentum=0.9))
    run.train(1)
    spoil(run.optimizers[0].state[run.model[0].weight])
    before = copy.deepcopy(run.optimizers[0].state_dict())
    with pytest.raises(ArgumentError, match=message):
        run.rescale(whole_scales(run.group))
    for key, value in run.optimizers[0].state_dict()["state"][1].items():
        assert torch.equal(value, before["state"][1][key])


def test_optimizers_that_are_refused() -> None:
    run = Run("mlp", single("LBFGS"))
    changes = run.changes(whole_scales(run.group))
    assert state_changes(run.optimizers, changes) == []  # before the first step
    x = run.batch()
    run.optimizers[0].step(lambda: run.model(x).square().mean())
    # Not even where the parameter that has the history isn't rescaled.
    with pytest.raises(ArgumentError, match="LBFGS scales its first guess"):
        state_changes(run.optimizers, changes[1:])

    run = Run("mlp", single("Adafactor"))
    run.train(1)
    with pytest.raises(ArgumentError, match="'col_var' for '0.weight', a mean over dimension -2"):
        run.rescale(whole_scales(run.group))
    with pytest.raises(ArgumentError, match="or None; found str"):
        state_changes("sgd", changes)  # type: ignore[arg-type]


def test_state_that_would_overflow() -> None:
    run = Run("mlp", single("Adam"))
    run.model.float()
    run.optimizers = [optim.Adam(run.model.parameters())]
    run.batch = lambda: torch.randn(8, 4)
    run.train(2)
    second = run.optimizers[0].state[run.model[0].weight]["exp_avg_sq"]
    second[0, 0] = 2.0**120
    weight = run.model[0].weight
    for k, fits in ((-3.0, True), (-4.0, False)):
        changes = [("w", weight, [torch.full((6, 1), k, dtype=torch.float64)])]
        if fits:
            state_changes(run.optimizers, changes)
            continue
        with pytest.raises(RangeError, match=r"'exp_avg_sq' for 'w'.*overflow float32.*2\*\*128"):
            state_changes(run.optimizers, changes)


def test_factors_that_cancel_do_not_round_on_the_way() -> None:
    run = Run("mlp", single("Adam"))
    run.train(1)
    weight = run.model[2].weight
    state = run.optimizers[0].state[weight]
    state["exp_avg"] = torch.rand(5, 6) + 1.0
    state["exp_avg"][0, 0] = 2.0**-100
    whole = torch.full((1, 1), 90.0, dtype=torch.float64)
    factors = [whole.expand(5, 1), -whole.expand(1, 6)]
    for tensor, found, power in state_changes(run.optimizers, [("w", weight, factors)]):
        before = tensor.clone()
        multiply_(tensor, found, power)
        assert torch.equal(tensor, before)


@pytest.mark.parametrize("ema", [False, True])
def test_weight_averages(ema: bool) -> None:
    """Averaging, rescaling, averaging on = averaging weights all in the new coordinates."""
    rule = get_ema_multi_avg_fn(0.75) if ema else None
    run = Run("mlp", single("SGD", lr=0.05))
    averaged = AveragedModel(run.model, multi_avg_fn=rule)
    for _ in range(4):
        run.train(1)
        averaged.update_parameters(run.model)
    scales = whole_scales(run.group)
    before = copy.deepcopy(averaged)
    probe = run.batch()
    run.rescale(scales)
    rescale_average_(averaged, run.group, scales)
    assert torch.equal(averaged(probe), before(probe))
    for _ in range(3):
        run.train(1)
        averaged.update_parameters(run.model)
    expected = AveragedModel(copy.deepcopy(run.model), multi_avg_fn=rule)
    for moment, weights in enumerate(run.after):
        replay = copy.deepcopy(run.model)
        replay.load_state_dict(run.transported(weights, moment))
        expected.update_parameters(replay)
    for found, wanted in zip(averaged.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)


def test_averages_of_something_else() -> None:
    run = Run("mlp", single("SGD", lr=0.05))
    scales = whole_scales(run.group)
    with pytest.raises(ArgumentError, match="must be a torch.optim.swa_utils.AveragedModel"):
        rescale_average_(run.model, run.group, scales)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="Pass the model the group was computed for"):
        rescale_average_(AveragedModel(convnet()), run.group, scales)
