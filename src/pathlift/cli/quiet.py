"""Silence for what torch and its friends log and warn of while a command runs."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """No warnings and no log records, in this process and in those it starts; all if verbose."""
    if verbose:
        yield
        return
    # Read by torch's C++ side when it is first imported, and by child processes.
    settings = {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    before = {name: os.environ.get(name) for name in settings}
    level = logging.root.manager.disable
    os.environ.update(settings)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
