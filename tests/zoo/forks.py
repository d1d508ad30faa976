"""One process per model, forked from one per library, so that each library is imported once."""

from __future__ import annotations

import multiprocessing as mp
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

Row = dict[str, Any]
FORK = mp.get_context("fork")


def rows(
    names: list[str], survey: Callable[[str], Row], preload: Callable[[str], object], limit: int, jobs: int
) -> Iterator[Row]:  # fmt: skip
    """``survey(name)`` of every name ``library:model``, as they finish; a row even if it dies."""
    waiting = list(reversed(_by_library(names)))
    running: dict[Connection, list[str]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            group = waiting.pop()
            receiver, sender = FORK.Pipe(duplex=False)
            FORK.Process(target=_library, args=(group, survey, preload, limit, sender)).start()
            sender.close()
            running[receiver] = group
        for connection in wait(list(running)):
            assert isinstance(connection, Connection)
            try:
                row = connection.recv()
                running[connection].remove(row["name"])
                yield row
            except EOFError:
                lost = running.pop(connection)
                yield from ({"name": n, "crashed": "the library's process died"} for n in lost)


def _by_library(names: list[str]) -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.partition(":")[0], []).append(name)
    return list(found.values())


def _library(
    names: list[str], survey: Callable[[str], Row], preload: Callable[[str], object], limit: int, out: Connection
) -> None:  # fmt: skip
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    with suppress(Exception):  # its models will say so
        preload(names[0])
    for name in names:
        out.send(_forked(name, survey, limit))


def _forked(name: str, survey: Callable[[str], Row], limit: int) -> Row:
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: sender.send(survey(name)))
    process.start()
    sender.close()
    try:
        if receiver.poll(limit):
            return dict(receiver.recv())
        return {"name": name, "crashed": f"no answer within {limit} s"}
    except EOFError:
        process.join()
        return {"name": name, "crashed": f"its process died, exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        receiver.close()
