"""A snapshot puts a module back exactly, and says what had changed."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pathlift.homes.snapshot import Change, Snapshot


class Bare(nn.Module):
    """A module to hang things on."""

    limits: ClassVar = {"most": 3}
    count = 0

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        for name, value in attributes.items():
            setattr(self, name, value)


class Slotted(nn.Module):
    __slots__ = ("__hidden", "plain")

    def __init__(self) -> None:
        super().__init__()
        self.plain = [1]

    def hide(self, value: object) -> None:
        self.__hidden = value

    def hidden(self) -> object:
        return self.__hidden


@dataclass
class Cache:
    keys: list[Tensor] = field(default_factory=list)
    seen: int = 0


class Helper:
    """Plain code of the same package as the model."""

    def __init__(self) -> None:
        self.seen = 0
        self.inner = {"x": [1, 2]}


class Unequal:
    """An object that refuses every comparison."""

    def __eq__(self, other: object) -> bool:
        raise TypeError("not comparable")

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise TypeError("no truth value")


def whats(snapshot: Snapshot) -> dict[str, str]:
    return {f"{c.path}:{c.attribute}": c.what for c in snapshot.changed()}


def test_nothing_happened() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout(), Bare(x=[1, {2: 3}]))
    snapshot = Snapshot(model)
    assert snapshot.changed() == []
    versions = [t._version for t in model.state_dict(keep_vars=True).values()]
    snapshot.restore()
    assert versions == [t._version for t in model.state_dict(keep_vars=True).values()]
    assert snapshot.changed() == []


def test_attributes_added_changed_deleted() -> None:
    model = nn.Sequential(Bare(a=1, b="x", c=None, d=2.5))
    child = model[0]
    before, order = dict(vars(child)), list(vars(child))
    snapshot = Snapshot(model)
    child.a, child.new, child.c = 2, (1, 2), torch.ones(2)
    del child.b
    child.train(False)
    assert whats(snapshot) == {
        "0:a": "1 -> 2",
        "0:b": "removed: 'x'",
        "0:c": "None -> tensor of shape (2,)",
        "0:new": "added: tuple",
        "0:training": "True -> False",
        "0.layer:training": "True -> False",
    }
    snapshot.restore()
    assert list(vars(child)) == order
    assert all(vars(child)[name] is value for name, value in before.items())
    assert child.training and child.layer.training and snapshot.changed() == []


CONTAINERS = {
    "list": ([1, 2], lambda x: x.append(3)),
    "emptied": ([1, 2], lambda x: x.clear()),
    "dict": ({"a": 1}, lambda x: x.update(b=2)),
    "ordered": (OrderedDict(a=1, b=2, c=3), lambda x: x.pop("a")),
    "moved": (OrderedDict(a=1, b=2), lambda x: x.move_to_end("a")),
    "default": (defaultdict(list, a=[1]), lambda x: x["b"].append(1)),
    "counter": (Counter("ab"), lambda x: x.update("bc")),
    "set": ({1, 2}, lambda x: x.add(3)),
    "deque": (deque([1, 2], maxlen=2), lambda x: x.append(3)),
    "nested": ([{"a": [1, (2, [3])]}], lambda x: x[0]["a"][1][1].append(4)),
    "entry": ([[1], [2]], lambda x: x.__setitem__(0, [9])),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_are_refilled_in_place(name: str) -> None:
    value, change = CONTAINERS[name]
    model = Bare(x=value)
    before = repr(value)
    snapshot = Snapshot(model)
    change(value)
    assert repr(value) != before
    if name != "moved":  # the entries are the same
        assert any(c.path == "" and c.attribute.startswith("x") for c in snapshot.changed())
    snapshot.restore()
    assert model.x is value and repr(value) == before and snapshot.changed() == []


def test_names_lead_to_the_entry() -> None:
    model = nn.Sequential(Bare(cache={"k": [0, 1]}, helper=Helper(), blocks=[Bare(n=1)]))
    snapshot = Snapshot(model)
    model[0].cache["k"][1] = 5
    model[0].helper.seen = 4
    model[0].blocks[0].n = 2
    model[0].blocks[0].layer.weight.data.add_(1)
    with torch.no_grad():
        model[0].layer.bias.mul_(2)
    assert sorted(snapshot.changed()) == [
        Change("0", "blocks[0].n", "1 -> 2"),
        Change("0", "cache['k'][1]", "1 -> 5"),
        Change("0", "helper.seen", "0 -> 4"),
        Change("0.layer", "bias", "tensor written in place"),
    ]


def test_shared_containers_and_cycles() -> None:
    shared: list[object] = [1]
    shared.append({"self": shared})
    model = nn.Sequential(Bare(a=shared), Bare(b=shared, c=(shared, shared)))
    model[0].up = [model]  # a parent that is not registered
    snapshot = Snapshot(model)
    shared.append(2)
    assert [c.attribute for c in snapshot.changed()] == ["a[2]"]  # once
    snapshot.restore()
    assert len(shared) == 2 and shared[1]["self"] is shared
    assert model[0].a is model[1].b is model[1].c[0] is shared


def test_containers_made_anew() -> None:
    """Equal values in a new container are no change; other values are; the old one comes back."""
    cycle: list[object] = [1, 2]
    cycle.append(cycle)
    model = Bare(same=[1, float("nan"), {"a": (1,)}], other=[1], cycle=cycle, shape=(1, 2))
    kept = dict(vars(model))
    snapshot = Snapshot(model)
    again: list[object] = [1, 2]
    again.append(again)
    model.same, model.other, model.cycle = [1, float("nan"), {"a": (1,)}], [2], again
    model.shape = (1, 2)
    assert whats(snapshot) == {":other": "list changed"}
    model.same, model.shape = [1, float("nan"), {"a": (1, 2)}], (1, True + 1.0)
    assert whats(snapshot) == {
        ":other": "list changed",
        ":same": "list changed",
        ":shape": "tuple changed",
    }
    snapshot.restore()
    assert all(vars(model)[name] is value for name, value in kept.items())


def test_a_changed_container_that_is_replaced() -> None:
    model = Bare(x=[1])
    snapshot = Snapshot(model)
    model.x.append(2)
    model.x = [1]
    kept = snapshot.changed()
    snapshot.restore()
    assert model.x == [1] and snapshot.changed() == []
    assert [c.attribute for c in kept] == ["x[1]"]


def test_objects_that_refuse_comparison() -> None:
    odd, array = Unequal(), np.arange(3)
    model = Bare(x=odd, y=[odd], z=(odd,), a=array, s={odd})
    snapshot = Snapshot(model)
    assert snapshot.changed() == []
    model.x, model.y[0] = Unequal(), Unequal()
    model.s.add(Unequal())
    model.a[1] = 7
    model.a = np.zeros(2)
    assert whats(snapshot) == {":a": "ndarray changed", ":s": "added: Unequal"}
    snapshot.restore()
    assert model.x is odd and model.y[0] is odd and len(model.s) == 1
    assert model.a is array and array.tolist() == [0, 1, 2]


def test_slots() -> None:
    model = nn.Sequential(Slotted())
    child = model[0]
    snapshot = Snapshot(model)
    child.hide(5)
    child.plain.append(2)
    assert set(whats(snapshot)) == {"0:_Slotted__hidden", "0:plain[1]"}
    snapshot.restore()
    assert child.plain == [1]
    with pytest.raises(AttributeError):
        child.hidden()
    child.hide(5)
    second = Snapshot(model)
    child.hide(6)
    del child.plain
    second.restore()
    assert child.hidden() == 5 and child.plain == [1]


def test_slotted_record() -> None:
    @dataclass(slots=True)
    class State:
        h: Tensor
        n: int = 0

    state = State(torch.zeros(2))
    model = Bare(state=state)
    snapshot = Snapshot(model)
    state.n, h = 3, state.h.add_(1)
    assert whats(snapshot) == {":state.n": "0 -> 3", ":state.h": "tensor written in place"}
    state.h = h.clone()
    assert Change("", "state.h", "tensor replaced") in snapshot.changed()
    snapshot.restore()
    assert state.n == 0 and not state.h.any() and model.state is state


def test_objects_of_the_models_own_code() -> None:
    cache, helper = Cache(), Helper()
    model = Bare(cache=cache, helper=helper, options=SimpleNamespace(p=1), log=random.Random(3))
    snapshot = Snapshot(model)
    cache.keys.append(torch.ones(2))
    cache.seen = helper.seen = 1
    helper.inner["x"].append(3)
    model.options.q = 2
    draw = model.log.random()
    found = whats(snapshot)
    assert found.keys() == {
        ":cache.keys[0]", ":cache.seen", ":helper.seen", ":helper.inner['x'][2]", ":options.q",
    }  # fmt: skip
    snapshot.restore()
    assert cache == Cache() and helper.seen == 0 and helper.inner == {"x": [1, 2]}
    assert vars(model.options) == {"p": 1} and model.log.random() == draw


def test_an_equal_object_made_anew() -> None:
    model = Bare(cache=Cache(seen=2))
    snapshot = Snapshot(model)
    model.cache = Cache(seen=2)
    assert snapshot.changed() == []
    model.cache = Cache(seen=3)
    assert whats(snapshot) == {":cache": "Cache changed"}


def test_class_attributes() -> None:
    model = nn.Sequential(Bare())
    limits = Bare.limits
    snapshot = Snapshot(model)
    try:
        Bare.count, Bare.extra = 7, 1
        Bare.limits["most"] = 4
        Bare.limits = {}
        assert whats(snapshot) == {
            "0:Bare.count": "0 -> 7",
            "0:Bare.extra": "added: 1",
            "0:Bare.limits": "dict changed",
            "0:Bare.limits['most']": "3 -> 4",
        }
    finally:
        snapshot.restore()
    assert Bare.count == 0 and not hasattr(Bare, "extra")
    assert Bare.limits is limits and limits == {"most": 3}


def test_buffers_and_plain_tensors() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), Bare(plain=torch.zeros(3), held=[torch.ones(2)]))
    model.register_buffer("wide", torch.zeros(1).expand(4))
    norm, bare, held = model[0], model[1], model[1].held[0]
    tensors = [norm.running_mean, norm.num_batches_tracked, bare.plain, held]
    values = [t.clone() for t in tensors]
    snapshot = Snapshot(model)
    model[0](torch.randn(5, 2))
    bare.plain.data.fill_(float("nan"))  # not counted by the version
    held.mul_(2)
    model.wide.data[:1] = 1
    norm.running_var = torch.zeros(2)
    written = [":wide", "0:running_mean", "0:running_var", "0:num_batches_tracked", "1:plain"]
    assert sorted(snapshot.changed()) == sorted(
        [Change(*name.split(":"), "tensor written in place") for name in [*written, "1:held[0]"]]
        + [Change("0", "running_var", "tensor replaced")]
    )
    snapshot.restore()
    assert all(torch.equal(a, b) for a, b in zip(tensors, values, strict=True))
    assert not model.wide.any() and torch.equal(norm.running_var, torch.ones(2))
    assert snapshot.changed() == []


def test_other_memory_under_a_tensor() -> None:
    model = Bare(x=torch.arange(4.0), y=torch.zeros(6).reshape(2, 3))
    x, pointer = model.x, model.layer.weight.data_ptr()
    snapshot = Snapshot(model)
    x.data = torch.zeros(2)
    model.y.t_()
    model.layer.weight.data = torch.zeros(5, 5)
    assert {c.attribute for c in snapshot.changed()} == {"x", "y", "weight"}
    snapshot.restore()
    assert model.x is x and x.tolist() == [0, 1, 2, 3] and model.y.shape == (2, 3)
    assert model.layer.weight.data_ptr() == pointer and model.layer.weight.shape == (2, 2)
    model.x.resize_(100).fill_(3)
    snapshot.restore()
    assert x.tolist() == [0, 1, 2, 3] and snapshot.changed() == []


def test_special_tensors() -> None:
    model = Bare(
        sparse=torch.eye(3).to_sparse(),
        csr=torch.eye(3).to_sparse_csr(),
        conjugate=torch.tensor([1 + 2j]).conj(),
        empty=torch.zeros(0),
        scalar=torch.tensor(3),
        half=torch.zeros(2, dtype=torch.float8_e4m3fn),
    )
    model.register_buffer("meta", torch.zeros(2, device="meta"))
    model.register_buffer("none", None)
    with torch.inference_mode():
        model.frozen = torch.zeros(2)
    snapshot = Snapshot(model)
    assert snapshot.changed() == []
    model.sparse._values().mul_(2)
    model.csr.values().mul_(2)
    model.conjugate.mul_(2)
    model.scalar += 1
    model.half.view(torch.uint8).fill_(3)
    model.meta.add_(1)
    with torch.inference_mode():
        model.frozen.add_(1)
    names = {"sparse", "csr", "conjugate", "scalar", "half", "meta", "frozen"}
    assert {c.attribute for c in snapshot.changed()} == names
    model.meta = torch.zeros(3, device="meta")
    snapshot.restore()
    assert torch.equal(model.sparse.to_dense(), torch.eye(3))
    assert torch.equal(model.csr.to_dense(), torch.eye(3))
    assert model.conjugate.item() == 1 - 2j and model.scalar.item() == 3
    assert not model.half.float().any() and model.meta.shape == (2,)
    assert not model.frozen.any() and snapshot.changed() == []


def test_sharded_tensors() -> None:
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = Bare()
        model.register_buffer("shards", distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
        model.layer.weight = nn.Parameter(distribute_tensor(model.layer.weight, mesh, [Shard(0)]))
        buffer, weight = model.shards, model.layer.weight
        snapshot = Snapshot(model)
        assert snapshot.changed() == []
        buffer.to_local().mul_(2)
        model.layer.weight = nn.Parameter(torch.zeros(2, 2))
        assert whats(snapshot) == {
            ":shards": "tensor written in place",
            "layer:weight": "tensor replaced",
        }
        snapshot.restore()
        assert model.shards is buffer and model.layer.weight is weight
        assert buffer.full_tensor().tolist() == [1, 1, 1, 1] and snapshot.changed() == []
    finally:
        distributed.destroy_process_group()


def test_parameters_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Bare()
    model.view = model.layer.weight.detach()[0]  # plain, over a parameter's memory
    model.plain = torch.ones(2)
    copied = []
    real = torch.UntypedStorage.clone
    monkeypatch.setattr(torch.UntypedStorage, "clone", lambda s: copied.append(s) or real(s))
    Snapshot(model)
    assert [s.data_ptr() for s in copied] == [model.plain.untyped_storage().data_ptr()]


def test_parameters_replaced_frozen_and_with_gradients() -> None:
    model = Bare()
    weight, bias = model.layer.weight, model.layer.bias
    bias.tag = "mine"
    snapshot = Snapshot(model)
    model.layer.weight = nn.Parameter(torch.zeros(2, 2))
    model.layer.extra = nn.Parameter(torch.zeros(1))
    bias.requires_grad_(False)
    weight.grad = torch.ones(2, 2)
    bias.tag, bias.more = "other", 1
    model.other = nn.Linear(1, 1)
    assert whats(snapshot) == {
        ":other": "added: Linear",
        "layer:extra": "added: tensor of shape (1,)",
        "layer:weight": "tensor replaced",
    }
    snapshot.restore()
    assert model.layer.weight is weight and model.layer.bias is bias
    assert [n for n, _ in model.named_parameters()] == ["layer.weight", "layer.bias"]
    assert bias.requires_grad and weight.grad is None and vars(bias) == {"tag": "mine"}


def test_old_gradients_stay() -> None:
    model = Bare()
    model.layer(torch.ones(1, 2)).sum().backward()
    gradient = model.layer.weight.grad
    snapshot = Snapshot(model)
    model.zero_grad()
    snapshot.restore()
    assert model.layer.weight.grad is gradient


def test_hooks() -> None:
    model = Bare()
    kept = model.layer.register_forward_hook(lambda *_: None)
    snapshot = Snapshot(model)
    model.layer.register_forward_hook(lambda *_: None)
    model.register_full_backward_hook(lambda *_: None)
    extra = nn.modules.module.register_module_forward_hook(lambda *_: None)
    kept.remove()
    snapshot.restore()
    assert list(model.layer._forward_hooks) == [kept.id] and not model._backward_hooks
    assert extra.id not in nn.modules.module._global_forward_hooks


def test_random_state_and_grad_mode() -> None:
    model = Bare(generator=torch.Generator().manual_seed(3), numbers=np.random.default_rng(0))
    with Snapshot(model):
        drawn = (random.random(), np.random.rand(), torch.rand(1).item())
        own = (torch.rand(1, generator=model.generator).item(), model.numbers.random())
        torch.set_grad_enabled(False)
    assert torch.is_grad_enabled()
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())
    assert own == (torch.rand(1, generator=model.generator).item(), model.numbers.random())


def test_one_failure_leaves_the_rest_restored() -> None:
    model = nn.Sequential(Bare(array=np.zeros(2), x=1), Bare(x=1))
    snapshot = Snapshot(model)
    model[0].array.flags.writeable = False
    model[0].x = model[1].x = 2
    with pytest.raises(ValueError, match="read-only"):
        snapshot.restore()
    assert model[0].x == model[1].x == 1


def test_lazy_modules_and_replaced_modules() -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.ReLU(), nn.ReLU())
    relu = model[1]
    snapshot = Snapshot(model)
    model[1] = nn.Identity()
    del model._modules["2"]
    assert len(snapshot.changed()) == 2
    snapshot.restore()
    assert model[1] is relu and len(model) == 3


def test_modules_that_forward_changes() -> None:
    """A model that leaves everything behind, run for real."""

    class Messy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.utils.spectral_norm(nn.Linear(3, 3))
            self.norm = nn.BatchNorm1d(3)
            self.calls, self.log, self.table = 0, [], {}
            self.register_buffer("state", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.log.append(x.shape)
            self.table[len(x)] = torch.randn(3)
            self.last = self.norm(self.layer(x))
            self.state = self.state + self.last.detach().mean(0)
            self.train(not self.training)
            return self.last

    model, x = Messy(), torch.randn(4, 3)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    names = {k: list(vars(m)) for k, m in model.named_modules()}
    with Snapshot(model) as snapshot:
        first = model(x)
        found = whats(snapshot)
    assert {":calls", ":log[0]", ":table[4]", ":last", ":state", "layer:weight_u"} <= found.keys()
    assert names == {k: list(vars(m)) for k, m in model.named_modules()}
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.calls == 0 and model.log == [] and model.table == {} and model.training
    assert torch.equal(first, model(x))
