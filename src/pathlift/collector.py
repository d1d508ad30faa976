"""Python's garbage collector, kept still while a call makes tens of thousands of small objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No automatic collection inside; whether there is one afterwards is as it was before.

    A captured network is a hundred thousand objects that live on, and the collector looks through
    all of them again and again as their number grows. What is let go without a cycle is freed at
    once all the same. Also a decorator.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
