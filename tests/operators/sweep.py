"""Every operator of PyTorch's own sample database: bits kept, errors worded, reports true.

    make operators                                   # all of it, then docs/operations.md
    python tests/operators/sweep.py --most 4         # four cases of each operator
    python tests/operators/sweep.py --only rot90 --case 0.0      # one case, with its traceback

Each operator runs in a process of its own, forked from one that has loaded the database; one that
dies or falls silent is started again behind the case it was at. Ends with the failures as JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

import torch  # noqa: E402

from operators.cases import Case, cases, database  # noqa: E402
from operators.checks import LIMIT, Verdict, check, first_line, poisoned  # noqa: E402
from operators.page import QUESTIONS, Row, page  # noqa: E402

TABLE = ROOT / "docs" / "operations.md"
MOST = 32  # cases per operator; a few (pooling, attention) have more than a thousand, all alike
SILENCE = LIMIT + 60  # seconds until a process is given up

FORK = mp.get_context("fork")


def chosen(name: str, most: int) -> list[Case]:
    """At most so many of the operator's cases, spread evenly over all of them."""
    found = list(cases(database()[name]))
    if len(found) <= most:
        return found
    return [found[k * len(found) // most] for k in range(most)]


@dataclass
class Run:
    """One operator in its process: the verdicts so far, and the case it is at."""

    name: str
    most: int
    rows: list[Row] = field(default_factory=list)
    at: str | None = None
    heard: float = 0.0

    def start(self) -> Connection:
        self.at, self.heard = None, time.monotonic()
        self.receiver, sender = FORK.Pipe(duplex=False)
        self.process = FORK.Process(
            target=work, args=(self.name, self.most, len(self.rows), sender)
        )
        self.process.start()
        sender.close()
        return self.receiver

    def hear(self) -> bool:
        """Take what the process says; whether it is still to be listened to."""
        try:
            kind, content = self.receiver.recv()
        except EOFError:
            return False
        self.heard = time.monotonic()
        if kind == "at":
            self.at = content
        else:
            self.at = None
            self.rows.append(content)
        return True

    def finish(self) -> bool:
        """After the process's end: note what it died of; whether to start it again."""
        self.process.kill()
        self.process.join()
        self.receiver.close()
        if self.at is not None:
            silent = time.monotonic() - self.heard > SILENCE
            died = f"no answer within {SILENCE} s" if silent else "the process dies"
            self.rows.append(Verdict(self.name, self.at, errors=died).to_dict())
            return True
        return bool(self.rows) and "process poisoned" in self.rows[-1].get("errors", "")


def work(name: str, most: int, skip: int, out: Connection) -> None:
    """Verdicts of the operator's cases but the first ``skip``; ends early if poisoned."""
    try:
        found = chosen(name, most)
    except Exception as error:
        out.send(("row", Verdict(name, "", skipped=f"no samples: {first_line(error)}").to_dict()))
        return
    for case in found[skip:]:
        out.send(("at", case.name))
        out.send(("row", check(case).to_dict()))
        if poisoned():
            return


def sweep(names: list[str], most: int, jobs: int) -> Iterator[tuple[str, list[Row]]]:
    """Operators and their verdicts, as they finish."""
    waiting, running = list(reversed(names)), dict[Connection, Run]()
    while waiting or running:
        while waiting and len(running) < jobs:
            run = Run(waiting.pop(), most)
            running[run.start()] = run
        ready = set(wait(list(running), timeout=5))
        for connection, run in list(running.items()):
            if connection in ready and run.hear():
                continue
            if connection in ready or time.monotonic() - run.heard > SILENCE:
                del running[connection]
                if run.finish():
                    running[run.start()] = run
                else:
                    yield run.name, run.rows


def failures(rows: dict[str, list[Row]]) -> list[Row]:
    found = [v for name in sorted(rows) for v in rows[name] if any(q in v for q in QUESTIONS)]
    return [{k: v for k, v in row.items() if k != "trace"} for row in found]


def kept(path: Path | None) -> dict[str, list[Row]]:
    """Verdicts of an earlier, interrupted sweep."""
    if path is None or not path.exists():
        return {}
    return dict(json.loads(line) for line in path.read_text().splitlines())


def one_by_one(names: list[str], case: str | None, most: int) -> int:
    """Print the verdicts of some operators with their tracebacks, in this process."""
    wrong = 0
    for name in names:
        found = cases(database()[name]) if case else iter(chosen(name, most))
        for one in found:
            if case not in (None, one.name):
                continue
            verdict = check(one)
            row = verdict.to_dict()
            print(row.pop("trace", ""), end="")
            print(json.dumps(row))
            wrong += not verdict.sound
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these, with tracebacks")
    parser.add_argument("--case", help="SAMPLE.ARGUMENT of the one named by --only")
    parser.add_argument("--most", type=int, default=MOST, help="cases per operator")
    parser.add_argument("--all", action="store_true", help="every case of every operator")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=TABLE, help="where the page goes")
    parser.add_argument("--rows", type=Path, help="verdicts as they come; those in it are kept")
    parser.add_argument("--failures", type=Path, help="where the JSON goes, besides the terminal")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    most = sys.maxsize if args.all else args.most
    if args.only:
        return one_by_one(args.only, args.case, most) > 0
    rows = kept(args.rows)
    start = time.monotonic()
    names = list(database())
    check(next(cases(database()["nn.functional.relu"])))  # what it imports, no process need import
    for name, found in sweep([n for n in names if n not in rows], most, args.jobs):
        rows[name] = found
        if args.rows:
            with args.rows.open("a") as file:
                file.write(json.dumps([name, found]) + "\n")
        wrong = len(failures({name: found}))
        print(f"{len(rows)}/{len(names)} {name}: {wrong} of {len(found)} wrong", flush=True)
    print(f"{time.monotonic() - start:.0f} s", flush=True)
    args.out.write_text(page(rows))
    text = json.dumps(failures(rows), indent=1)
    if args.failures:
        args.failures.write_text(text + "\n")
    print(text)
    return bool(failures(rows))


if __name__ == "__main__":
    sys.exit(main())
