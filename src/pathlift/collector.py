"""Python's garbage collector, kept still while a call makes tens of thousands of small objects."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def uncollected(function: Callable[P, R]) -> Callable[P, R]:
    """A function during which there is no automatic collection; after it, all is as it was before.

    A captured network is a hundred thousand objects that live on, and the collector looks through
    all of them again and again as their number grows. What is let go without a cycle is freed at
    once all the same.
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        enabled = gc.isenabled()
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            if enabled:
                gc.enable()

    return called
