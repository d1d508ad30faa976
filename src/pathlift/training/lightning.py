"""A Lightning callback that conditions at the start of a fit, and again every few epochs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from pathlift.tensors.state import holding_state
from pathlift.training._examples import example_from, imported
from pathlift.training.schedule import Schedule

if TYPE_CHECKING:
    Callback = object  # Lightning is optional, for type checking too
else:
    # Lightning comes under two names whose classes differ; the user's is imported already.
    _OLD = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
    Callback = imported(
        "pytorch_lightning" if _OLD else "lightning.pytorch",
        "pytorch-lightning" if _OLD else "lightning",
        "pathlift.training.lightning",
    ).Callback


class ConditioningCallback(Callback):
    """Conditions the LightningModule before its first epoch and, if asked, every few epochs.

    Conditioning takes place at the start of an epoch, after checkpoints of the one before were
    written; a fit resumed from a checkpoint does what it would have done uninterrupted. The state
    of the optimisers is carried along. Imbalances go to the trainer's loggers as
    ``pathlift/imbalance_before`` and ``pathlift/imbalance_after``.

    Parameters must be whole on every process (one device, DDP), not sharded.

    Args:
        example_inputs: one batch as forward takes it. None: the module's ``example_input_array``,
            or else the first samples of the training dataloader: of a batch ``(inputs, ...)``
            the inputs, of a dict the arguments of forward.
        every: condition every so many epochs; None: before the first only.
        until: first epoch, from 0, at which nothing is done any more; None: no end.
        condition_kwargs: passed on to :func:`pathlift.condition_`.

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

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        if trainer.current_epoch == 0 and trainer.global_step == 0:
            self.schedule.calls = 0  # a new fit, possibly with a callback that was in another

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
        if not self.schedule.reach(trainer.current_epoch):
            return
        inputs = self._inputs(trainer, pl_module) if self.schedule.due else None
        report = self.schedule.step(pl_module, inputs, holding_state(trainer.optimizers))
        if report is not None:
            metrics = {
                "pathlift/imbalance_before": report.imbalance_before,
                "pathlift/imbalance_after": report.imbalance_after,
            }
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the schedule's progress."""
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.schedule.load_state_dict(state_dict)

    def _inputs(self, trainer: Any, pl_module: nn.Module) -> Any:
        """Example inputs on the module's device and in the trainer's precision."""
        inputs = self.example_inputs
        if inputs is None:
            inputs = getattr(pl_module, "example_input_array", None)
        if inputs is None:
            inputs = example_from(trainer.train_dataloader, pl_module)
        inputs = trainer.strategy.batch_to_device(inputs)
        return trainer.precision_plugin.convert_input(inputs)
