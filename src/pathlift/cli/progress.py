"""Progress on stderr: lines, and on a terminal a bar with the time left."""

from __future__ import annotations

import sys
import time
from typing import Any

from pathlift.progress import Step


class Lines:
    """Prints lines of progress; of a :class:`pathlift.progress.Step` it makes a bar.

    The bar needs tqdm and a terminal. Without a terminal steps are silent; without tqdm they are
    lines.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._unit = ""

    def __call__(self, text: str) -> None:
        if not isinstance(text, Step):
            self.close()
            print(f"pathlift: {text} …", file=sys.stderr, flush=True)
        elif sys.stderr.isatty():
            self._draw(text)

    def _draw(self, step: Step) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            print(f"pathlift: {step} …", file=sys.stderr, flush=True)
            return
        if self._bar is None:
            self._bar = tqdm(
                total=step.total,
                unit=step.unit,
                unit_scale=step.unit == "B",
                file=sys.stderr,
                dynamic_ncols=True,
                mininterval=0,
                leave=False,
            )
        self._bar.update(step.done - self._bar.n)
        if step.done >= step.total:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Meter:
    """Progress in bytes, as streaming tells it: a line when a phase starts, then steps."""

    def __init__(self, lines: Lines, seconds: float = 2.0) -> None:
        self._lines, self._seconds = lines, seconds
        self._phase, self._shown = "", 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._shown = phase, 0.0
            self._lines(phase)
        if total:
            self._lines(Step(phase, done, total, "B"))
        elif done and now - self._shown > self._seconds:
            self._shown = now
            self._lines(f"{phase}, {done / 1e9:.2f} GB")
