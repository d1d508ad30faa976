"""Folders and devices of the experiments, checked before the work."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import torch

from pathlift.errors import ArgumentError


def check_folder(path: Path) -> None:
    """Make the output folder, and be sure that files can be written there.

    Raises:
        OSError: it can't be made or written.
    """
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def check_device(name: str) -> None:
    """The device exists on this machine.

    Raises:
        ArgumentError: it does not.
    """
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        cuda = f"{torch.cuda.device_count()} CUDA devices"
        raise ArgumentError(
            f"--device {name!r} can't be used here: torch {torch.__version__} sees {cuda}. Give "
            f"cpu, or install a build of torch for the device."
        ) from error


def check_scheduler(address: str | None, seconds: float = 3.0) -> None:
    """Something listens at the address of a Dask scheduler, if one is given.

    Raises:
        ArgumentError: the address has no host and port.
        OSError: nothing listens there.
    """
    if address is None or address.startswith("local:"):
        return
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port:
        raise ArgumentError(
            f"--dask {address!r} is no cluster. Give tcp://host:port of a scheduler, or local:3 to "
            f"start three workers here."
        )
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError as error:
        raise OSError(
            f"the Dask scheduler at {address} does not answer: {error}. Start it with: dask "
            f"scheduler"
        ) from error
