"""A captured model, to be conditioned many times, or in another's place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from pathlift.capture.likeness import check, likeness, rebound
from pathlift.capture.program import Program
from pathlift.capture.stored import load, save
from pathlift.condition import Understood, condition_home, understood
from pathlift.criteria import Criterion, as_criterion
from pathlift.homes.module import ModuleHome
from pathlift.homes.sharded import home_of, whole_home
from pathlift.report import ConditioningReport
from pathlift.settings import Settings
from pathlift.surroundings import apart
from pathlift.symmetry.group import RescalingGroup, infer_group
from pathlift.tensors.state import Optimizers
from pathlift.timing import timed


class Conditioner:
    """A captured model and its group, to condition it many times at the cost of the solve.

    Args:
        model, example_inputs, batch_norm: see :func:`pathlift.condition_`.

    Raises:
        ArgumentError, CaptureError: see :func:`pathlift.condition_`.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> conditioner = pathlift.Conditioner(model, x)
    >>> first = conditioner.condition_(exact=False)
    >>> again = conditioner.condition_(exact=False)  # no second capture, and nothing left to do
    >>> abs(first.imbalance_after - again.imbalance_before) < 1e-6
    True
    """

    @apart
    def __init__(
        self, model: nn.Module, example_inputs: object, *, batch_norm: str = "pinned"
    ) -> None:
        seconds: dict[str, float] = {}
        home = home_of(model)
        self._take(home, understood(home, example_inputs, batch_norm, seconds), seconds)

    def _take(self, home: ModuleHome, known: Understood, seconds: dict[str, float]) -> None:
        self._home, self.known, self._seconds = home, known, seconds
        self.model, self.group, self.batch_norm = home.model, known.group, known.batch_norm
        # As it was captured: on another day its modes and attributes may be others.
        self._like = likeness(home.structure, known.program.folded)

    @apart
    def on(self, model: nn.Module) -> Conditioner:
        """A conditioner of another model of the same architecture, without capturing it.

        For seeds, folds and sweeps: the operations are those of the captured model, the weights and
        the running statistics are the other's. Compared are classes and their forward methods,
        attributes, modes, names, shapes, dtypes, devices, what is tied and what requires a
        gradient, and the values of buffers that the operations depend on (index tables, masks). Not
        seen are globals, and the code of what forward calls; verification runs the model as always.

        Raises:
            ArgumentError: the model differs, and in what; or its parameters are sharded.

        >>> import pathlift, torch
        >>> from torch import nn
        >>> def network():
        ...     return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> conditioner = pathlift.Conditioner(network(), torch.zeros(2, 4))
        >>> for seed in range(3):
        ...     report = conditioner.on(network()).condition_()
        """
        home, program = whole_home(model), self.known.program
        check(home.model, self._like, program.folded)
        # What was compared decides the group; no weight does.
        return self._of(home, rebound(program, home.model), self.group, self.batch_norm, {})

    def save(self, path: str | Path) -> None:
        """Write what was captured to a ``.safetensors`` file; no weights, and no code.

        Raises:
            CheckpointError: example inputs or arguments that are no plain values, or the file can't
                be written.
        """
        save(Path(path), self.known.program, self._like)

    @classmethod
    @apart
    def load(cls, path: str | Path, model: nn.Module, *, batch_norm: str = "pinned") -> Conditioner:
        """A conditioner of ``model`` from a file that :meth:`save` has written.

        Raises:
            CheckpointError: not such a file, or of another version of torch, Python or pathlift.
            ArgumentError: the model is not like the captured one; see :meth:`on`.
        """
        seconds: dict[str, float] = {}
        home = whole_home(model)
        program = load(Path(path), home.model)
        with timed(seconds, "symmetry"):
            group = infer_group(program, batch_norm)
        return cls._of(home, program, group, batch_norm, seconds)

    @classmethod
    def _of(
        cls,
        home: ModuleHome,
        program: Program,
        group: RescalingGroup,
        batch_norm: str,
        seconds: dict[str, float],
    ) -> Conditioner:
        made = cls.__new__(cls)
        made._take(home, Understood(home, program, group, batch_norm), seconds)
        return made

    def condition_(
        self,
        *,
        criterion: str | Criterion | Mapping[str, Tensor] = "path-kernel",
        exact: bool | None = None,
        optimizer: Optimizers = None,
        solver: str = "newton",
        tol: float | None = None,
        verify: bool = True,
        on_nothing: str = "warn",
        reference: Mapping[str, Tensor] | None = None,
    ) -> ConditioningReport:
        """Condition the model as it is now; see :func:`pathlift.condition_`.

        The report's seconds of capture and symmetry stand in the first report only.
        """
        chosen = as_criterion(criterion, reference)
        settings = Settings(chosen, exact, solver, tol, optimizer, verify, on_nothing)
        return self.conditioned(settings)

    @apart
    def conditioned(self, settings: Settings) -> ConditioningReport:
        """:meth:`condition_` with its arguments as one object."""
        self._home.refresh()
        self.group.check_tensors(self._home.tensors())
        seconds, self._seconds = self._seconds, {}
        return condition_home(self.known, settings, seconds)
