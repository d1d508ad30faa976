"""The transformers callback; a resumed run equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pathlift.errors import ArgumentError
from training.frameworks import importorskip

transformers = importorskip("transformers")
pytest.importorskip("accelerate")

from pathlift.training.huggingface import ConditioningCallback  # noqa: E402


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 2)
        )

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = {"logits": self.net(x)}
        if labels is not None:
            out = {"loss": (out["logits"] - labels).square().mean(), **out}
        return out


def samples() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(4, generator=g), "labels": torch.randn(2, generator=g)} for _ in range(24)
    ]


def trainer(folder: Path, callback: Any, model: nn.Module | None = None, **options: Any) -> Any:
    defaults = {
        "output_dir": str(folder),
        "num_train_epochs": 5,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "remove_unused_columns": False,
    }
    return transformers.Trainer(
        model=model or Net(),
        args=transformers.TrainingArguments(**{**defaults, **options}),
        train_dataset=samples(),
        callbacks=[callback] if callback else [],
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def current(run: Any) -> Any:
    """The callback in use: transformers may have put a new instance in place of the one given."""
    return next(c for c in run.callback_handler.callbacks if isinstance(c, ConditioningCallback))


@pytest.mark.parametrize(
    ("restore", "optim"), [(False, "adamw_torch"), (True, "adamw_torch_fused")]
)
def test_resume_equals_never_having_stopped(tmp_path: Path, restore: bool, optim: str) -> None:
    # Steps 6 and 9 end epochs, step 4 is in the middle of one.
    options = {"optim": optim, "restore_callback_states_from_checkpoint": restore}
    whole = trainer(
        tmp_path,
        ConditioningCallback(every=2, exact=False),
        save_strategy="steps",
        save_steps=1,
        **options,
    )
    whole.train()
    history = current(whole).schedule.history
    assert [entry["step"] for entry in history] == [0, 2, 4]
    assert all(entry["moved"] for entry in history)
    for step in (4, 6, 9, 12):
        part = trainer(tmp_path, ConditioningCallback(every=2, exact=False), **options)
        part.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(part.model, whole.model)
        assert current(part).schedule.history == history


def test_the_checkpoint_keeps_example_inputs_as_shapes(tmp_path: Path) -> None:
    given = {"x": torch.ones(3, 4)}
    run = trainer(
        tmp_path,
        ConditioningCallback(given, every=1, tol=1e-6),
        save_strategy="epoch",
        restore_callback_states_from_checkpoint=True,
        num_train_epochs=2,
    )
    run.train()
    stored = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert stored["stateful_callbacks"]["ConditioningCallback"]["args"] == {
        "every": 1,
        "until": None,
        "tol": 1e-6,
    }
    again = trainer(
        tmp_path,
        ConditioningCallback(given, every=1, tol=1e-6),
        restore_callback_states_from_checkpoint=True,
        num_train_epochs=2,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    found = current(again).example_inputs
    assert found.keys() == {"x"} and found["x"].shape == (3, 4)
    assert same(again.model, run.model)


def test_imbalances_are_logged(tmp_path: Path) -> None:
    callback = ConditioningCallback(every=1, until=2)
    run = trainer(tmp_path, callback, num_train_epochs=3)
    run.train()
    logged = [e for e in run.state.log_history if "pathlift/imbalance_after" in e]
    assert [e["step"] for e in logged] == [0, 3]
    assert [e["pathlift/imbalance_before"] for e in logged] == [
        e["imbalance_before"] for e in callback.schedule.history
    ]


def test_training_with_an_idle_callback_is_unchanged(tmp_path: Path) -> None:
    plain, idle = trainer(tmp_path, None), trainer(tmp_path, ConditioningCallback(until=0))
    plain.train()
    idle.train()
    assert same(plain.model, idle.model)


def test_a_callback_used_again_starts_again(tmp_path: Path) -> None:
    callback = ConditioningCallback()
    for _ in range(2):
        trainer(tmp_path, callback, num_train_epochs=1).train()
    assert [entry["step"] for entry in callback.schedule.history] == [0, 0]


def test_data_from_which_inputs_cannot_be_told(tmp_path: Path) -> None:
    run = trainer(tmp_path, ConditioningCallback(), label_names=["x", "labels"])
    with pytest.raises(ArgumentError, match="from which the inputs of Net.forward can't be told"):
        run.train()
