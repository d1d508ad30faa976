"""A callback for ``transformers.Trainer`` that conditions before training and every few epochs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pathlift.tensors.state import holding_state
from pathlift.training._examples import device_of, example_from, imported, moved
from pathlift.training.schedule import Schedule

if TYPE_CHECKING:  # transformers is optional, for type checking too

    class TrainerCallback:
        """Stands for transformers' class of that name."""

    class ExportableState:
        """Stands for transformers' class of that name."""
else:
    _MODULE = imported(
        "transformers.trainer_callback", "transformers", "pathlift.training.huggingface"
    )
    TrainerCallback, ExportableState = _MODULE.TrainerCallback, _MODULE.ExportableState


class ConditioningCallback(TrainerCallback, ExportableState):
    """Conditions the Trainer's model before training and, if asked, every few epochs.

    Conditioning takes place at the start of an epoch, after the checkpoint of the one before was
    written; a run resumed from a checkpoint does what it would have done uninterrupted, whether
    or not ``restore_callback_states_from_checkpoint`` is set. The optimiser's state is carried
    along. Imbalances go to ``state.log_history`` as ``pathlift/imbalance_before`` and
    ``pathlift/imbalance_after``.

    Parameters must be whole on every process (one device, DDP), not sharded.

    Args:
        example_inputs: one batch as forward takes it, without labels. None: the first samples
            of the training data, without labels.
        every: condition every so many epochs; None: before the first only.
        until: first epoch, from 0, at which nothing is done any more; None: no end.
        condition_kwargs: passed on to :func:`pathlift.condition_`; numbers and strings.

    Attributes:
        schedule: the :class:`pathlift.training.Schedule`, with the history.
    """

    def __init__(
        self,
        example_inputs: object = None,
        every: int | None = None,
        until: int | None = None,
        **condition_kwargs: Any,
    ) -> None:
        super().__init__()
        self.example_inputs = example_inputs
        self.schedule = Schedule(every, until, "epoch", **condition_kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.schedule.calls = 0  # a new run, possibly with a callback that was in another
            self._reach(0, args, state, **kwargs)
        else:
            self._resume(state)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The fraction of an epoch that was interrupted belongs to an epoch already begun.
        self._reach(int(state.epoch or 0), args, state, **kwargs)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, ready for JSON."""
        schedule = self.schedule
        return {
            "args": {"every": schedule.every, "until": schedule.until, **schedule.condition_kwargs},
            "attributes": {
                "progress": {
                    "schedule": schedule.state_dict(),
                    "example_inputs": _shapes(self.example_inputs),
                }
            },
        }

    @property
    def progress(self) -> dict[str, Any]:
        """What ``state()`` keeps beside the arguments; transformers sets it on a new instance."""
        return dict(self.state()["attributes"]["progress"])

    @progress.setter
    def progress(self, value: Mapping[str, Any]) -> None:
        self.schedule.load_state_dict(value["schedule"])
        if self.example_inputs is None:
            self.example_inputs = _zeros(value["example_inputs"])

    def _resume(self, state: Any) -> None:
        """Read the progress from the checkpoint; transformers by itself does so only if told."""
        stored = (state.stateful_callbacks or {}).get(type(self).__name__)
        stored = stored[0] if isinstance(stored, list) else stored
        if stored:
            self.progress = stored["attributes"]["progress"]

    def _reach(
        self, epoch: int, args: Any, state: Any, model: nn.Module, optimizer: Any, **kwargs: Any
    ) -> None:
        if not self.schedule.reach(epoch):
            return
        inputs = None
        if self.schedule.due:
            inputs = self.example_inputs
            if inputs is None:
                names = args.label_names or _label_names(model)
                inputs = example_from(kwargs["train_dataloader"], model, names)
            device = device_of(model)
            inputs = moved(inputs, lambda tensor: tensor.to(device))
        report = self.schedule.step(model, inputs, holding_state(optimizer))
        if report is not None:
            state.log_history.append(
                {
                    "epoch": float(epoch),
                    "step": state.global_step,
                    "pathlift/imbalance_before": report.imbalance_before,
                    "pathlift/imbalance_after": report.imbalance_after,
                }
            )


def _label_names(model: nn.Module) -> list[str]:
    """Arguments of forward that transformers takes for labels."""
    names = inspect.signature(model.forward).parameters
    return [n for n in names if "label" in n or n in ("start_positions", "end_positions")]


def _shapes(value: Any) -> Any:
    """Example inputs for JSON: shapes and dtypes, which is all that matters of them."""
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"dict": {k: _shapes(v) for k, v in value.items()}}
    if isinstance(value, (tuple, list)):
        return [_shapes(v) for v in value]
    return value


def _zeros(value: Any) -> Any:
    """Inverse of :func:`_shapes`, up to the values and to tuples, which become lists."""
    if isinstance(value, dict) and "tensor" in value:
        return torch.zeros(value["tensor"], dtype=getattr(torch, value["dtype"]))
    if isinstance(value, dict):
        return {k: _zeros(v) for k, v in value["dict"].items()}
    if isinstance(value, list):
        return [_zeros(v) for v in value]
    return value
