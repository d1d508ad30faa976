"""What conditioning asks of the place where parameters live."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import Tensor, nn

from pathlift.tensors.extents import Extent, Factors
from pathlift.tensors.rescale import Undo
from pathlift.tensors.state import Optimizers


class Home(Protocol):
    """Parameters and buffers by name, wherever they are: in a module, in shards, in a file.

    Attributes:
        structure: the module to capture; its parameters may be on the meta device.
        model: the module to run; None where there is none with values.
    """

    @property
    def structure(self) -> nn.Module: ...

    @property
    def model(self) -> nn.Module | None: ...

    def value(self, name: str) -> Tensor:
        """A whole parameter, to be read and then let go; not to be written to."""

    def label(self, name: str) -> str:
        """How messages speak of a parameter."""

    def extents(self, names: Iterable[str]) -> dict[str, Extent]:
        """The magnitudes of these tensors, by name; integer tensors are left out."""

    def store(self, matrix: Tensor) -> Tensor:
        """The same values, where the solver may keep them."""

    def agree(self, scales: NDArray[Any]) -> NDArray[Any]:
        """The scales that all processes take."""

    def multiply_(
        self,
        factors: Mapping[str, Factors],
        known: Mapping[str, Extent] | None = None,
        optimizer: Optimizers = None,
    ) -> Undo:
        """Multiply every tensor by ``2 ** sum(factors)``; all or none.

        Args:
            factors: name -> log2 factors; see :func:`pathlift.tensors.rescale.rescale_`.
            known: the tensors' magnitudes, if they have been looked at.
            optimizer: whose state is carried along.

        Returns:
            A function that takes it back (a file that was written stays).
        """

    def settle(self) -> None:
        """Put away what a forward pass of :attr:`model` has left in memory."""

    def worst(self, change: float) -> float:
        """The largest of a non-negative number over all processes."""
