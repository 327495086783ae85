"""Signs of life: bars in a terminal, a line a second elsewhere."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

_SILENCE = 0.9  # seconds without a line, where there are no moving bars


class Progress:
    """Shows how far the jobs are; to be used as a context manager.

    Args:
        console: where to; bars if it is a terminal.
        jobs: how many there are.
        done: how many of them were done earlier.
    """

    def __init__(self, console: Console, jobs: int, done: int) -> None:
        self.console = console
        self.jobs = jobs
        self.done = done
        self._began = time.monotonic()
        self._phase = "starting the workers"
        self._workers: dict[int, str] = {}
        self._bars: Bars | None = None
        self._rows: dict[int, TaskID] = {}
        self._ended = threading.Event()
        self._spoke = time.monotonic()
        self._thread = threading.Thread(target=self._speak_regularly, daemon=True)

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._bars = Bars(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            self._total = self._bars.add_task(self._phase, total=self.jobs, completed=self.done, note="")
            self._bars.start()
        else:
            self._speak()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._bars is not None:
            self._bars.stop()
        else:
            self._thread.join()

    def phase(self, name: str) -> None:
        """What is going on now, beside the jobs."""
        self._phase = name
        self._workers = {}
        if self._bars is None:
            self._speak()
            return
        self._bars.update(self._total, description=name)
        for row in self._rows.values():
            self._bars.remove_task(row)
        self._rows = {}

    def step(self, worker: int, arm: str, seed: int, steps: int, step: int, accuracy: float | None) -> None:
        """A worker has come so far.

        Args:
            worker: any number that tells workers apart.
            arm: what it trains.
            seed: with which seed.
            steps: of the whole training.
            step: done.
            accuracy: in percent, on validation images; None before the first evaluation.
        """
        self._phase = "training"
        name = f"{arm}, seed {seed}"
        note = "" if accuracy is None else f"validation {accuracy:.1f} %"
        if self._bars is None:
            self._workers[worker] = f"{name}, step {step}/{steps}{', ' + note if note else ''}"
            return
        self._bars.update(self._total, description=self._phase)
        if worker not in self._rows:
            self._rows[worker] = self._bars.add_task(name, total=steps, note=note)
        if step < self._bars.tasks[self._bars.task_ids.index(self._rows[worker])].completed:
            self._bars.reset(self._rows[worker], total=steps)
        self._bars.update(self._rows[worker], description=name, total=steps, completed=step, note=note)

    def job_done(self, records: list[dict[str, Any]]) -> None:
        """A job's lines have been kept.

        Args:
            records: these lines.
        """
        self.done += 1
        last = [r for r in records if (r["split"], r["statistics"]) == ("val", "averages")][-1]
        about = f"validation {last['accuracy']:.1f} %, {last['seconds']:.1f} s"
        self.line(f"[{self.done}/{self.jobs}] {last['arm']}, seed {last['seed']}: {about}")
        if self._bars is not None:
            self._bars.update(self._total, completed=self.done)

    def line(self, text: str) -> None:
        """A line that stays."""
        self._spoke = time.monotonic()
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _speak(self) -> None:
        self.line(" | ".join([f"{time.monotonic() - self._began:4.0f} s: {self._phase}", *self._workers.values()]))

    def _speak_regularly(self) -> None:
        while not self._ended.wait(0.1):
            if time.monotonic() - self._spoke > _SILENCE:
                self._speak()
