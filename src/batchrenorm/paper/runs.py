"""A run directory, and the workers that fill it.

A job is one arm with one seed. A job's lines are written together, by the main process alone, into a new file that then
takes the old one's name: whatever kills the run, the directory holds whole jobs, and the next run does the others.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import lzma
import multiprocessing
import os
import platform
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from . import data, training
from .experiment import Arm, Preset
from .progress import Progress

Job = tuple[Arm, int]


class Results:
    """The lines of one results.jsonl.

    Args:
        path: the file; it need not exist.

    Raises:
        ValueError: a line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        lines = read(path).splitlines() if exists(path) else []
        for number, line in enumerate(lines, 1):
            try:
                self.records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"expected JSON in line {number} of {path}, got {line[:40]!r}; start over with --fresh"
                ) from error

    def add(self, records: list[dict[str, Any]]) -> None:
        """Add the lines of a finished job."""
        write_atomically(self.path, "".join(json.dumps(r, allow_nan=False) + "\n" for r in self.records + records))
        self.records += records

    def check(self, preset: Preset, versions: bool) -> None:
        """Raise ValueError if what is there was made with other settings or, where they matter, other versions."""
        ignored = () if versions else ("batchrenorm", "torch")
        configs = {arm.name: _without(preset.config(arm), ignored) for arm in preset.arms}
        for record in self.records:
            if configs.get(record["arm"]) != _without(record["config"], ignored):
                raise ValueError(
                    f"expected results of the present settings in {self.path.parent}, got {record['arm']} of other "
                    "settings or versions; start over with --fresh, or choose another directory with --runs"
                )

    def missing(self, preset: Preset, seeds: int) -> list[Job]:
        """The jobs of a preset that are still to do, all arms of a seed before the next seed.

        Raises:
            ValueError: what is there was made with other settings.
        """
        self.check(preset, versions=True)
        done = {(record["arm"], record["seed"]) for record in self.records}
        return [(arm, seed) for seed in range(seeds) for arm in preset.arms if (arm.name, seed) not in done]


def _without(config: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def exists(path: Path) -> bool:
    """Whether the file is there, or its compressed form, in which results are committed."""
    return path.exists() or _compressed(path).exists()


def read(path: Path) -> str:
    """The text of a file, or of its compressed form."""
    if path.exists():
        return path.read_text(encoding="utf-8")
    return lzma.decompress(_compressed(path).read_bytes()).decode()


def _compressed(path: Path) -> Path:
    return path.with_name(path.name + ".xz")


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that at every moment either the old or the new one is there, whole."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def config_hash(preset: Preset, arm: Arm) -> str:
    """Names the settings of an arm: results of another hash are not its results."""
    return hashlib.sha256(json.dumps(preset.config(arm), sort_keys=True).encode()).hexdigest()[:16]


def run_job(preset: Preset, arm: Arm, seed: int, progress: Callable[[int, float | None], None]) -> list[dict[str, Any]]:
    """Train one arm with one seed, on one thread so that the numbers do not depend on the machine's load.

    Args:
        preset: the experiment.
        arm: one of its arms.
        seed: the seed.
        progress: see `training.train`.

    Returns:
        The lines for results.jsonl.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began = time.perf_counter()
        evaluations = training.train(preset, arm, seed, _data(preset.data), progress)
        seconds = round(time.perf_counter() - began, 2)
    finally:
        torch.set_num_threads(threads)
    head = {"preset": preset.name, "arm": arm.name, "regime": arm.regime, "normalizer": arm.normalizer, "seed": seed}
    tail = {
        "config_hash": config_hash(preset, arm),
        "config": preset.config(arm),
        "version": __version__,
        "commit": _commit(),
        "hardware": _hardware(),
        "seconds": seconds,
    }
    return [{**head, **entry, **tail} for entry in evaluations]


_data = functools.cache(data.load)


@functools.cache
def _commit() -> str:
    package = Path(__file__).resolve().parents[1]
    root = package.parents[1]
    # Installed elsewhere, the repository around the package (say, one with a virtual environment in it) is not ours.
    if package != root / "src" / "batchrenorm" or not (root / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@functools.cache
def _hardware() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    return {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__}


def run(preset: Preset, results: Results, jobs: list[Job], workers: int, progress: Progress) -> None:
    """Do the jobs, and add the lines of each to the results as soon as it is done.

    Args:
        preset: the experiment.
        results: where the lines go.
        jobs: what to do.
        workers: processes; 0 does everything in this one.
        progress: told of every step.

    Raises:
        KeyboardInterrupt: Ctrl-C, after what was done has been kept and the workers have ended.
    """
    if workers == 0:
        for arm, seed in jobs:
            shown = functools.partial(progress.step, 0, arm.name, seed, arm.steps or preset.steps)
            records = run_job(preset, arm, seed, shown)
            results.add(records)
            progress.job_done(records)
        return
    spawn = multiprocessing.get_context("spawn")
    stop, events = spawn.Event(), spawn.Queue()
    pool = ProcessPoolExecutor(min(workers, len(jobs)), spawn, _begin_worker, (stop, events))
    # Ctrl-C reaches every process of the terminal. A worker that is born ignoring it has no moment to trip over it.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pending = {pool.submit(_work, preset, arm, seed): (arm, seed) for arm, seed in jobs}
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        while pending:
            done, _ = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
            with contextlib.suppress(queue.Empty):
                while True:
                    progress.step(*events.get_nowait())
            _keep(done, pending, results, progress)
    except BaseException:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        finished = {future for future in pending if future.done() and not future.cancelled() and not future.exception()}
        _keep(finished, pending, results, progress)
        raise
    pool.shutdown()


def _keep(
    done: set[Future[list[dict[str, Any]]]],
    pending: dict[Future[list[dict[str, Any]]], Job],
    results: Results,
    progress: Progress,
) -> None:
    for future in done:
        del pending[future]
        records = future.result()
        results.add(records)
        progress.job_done(records)


# In a worker. Modules are a process's own, so these are one worker's.
_stop: Any = None
_events: Any = None


class _Stopped(Exception):
    """The main process wants no more."""


def _begin_worker(stop: Any, events: Any) -> None:
    global _stop, _events
    _stop, _events = stop, events
    main = multiprocessing.parent_process()
    assert main is not None

    def end_with_main() -> None:
        main.join()
        os._exit(1)  # it was killed, and nobody else would end this process

    threading.Thread(target=end_with_main, daemon=True).start()


def _work(preset: Preset, arm: Arm, seed: int) -> list[dict[str, Any]]:
    steps = arm.steps or preset.steps
    shown = 0.0

    def progress(step: int, accuracy: float | None) -> None:
        nonlocal shown
        if time.monotonic() - shown > 0.2 or step == steps:
            shown = time.monotonic()
            _events.put((os.getpid(), arm.name, seed, steps, step, accuracy))
            if _stop.is_set():
                raise _Stopped

    return run_job(preset, arm, seed, progress)
