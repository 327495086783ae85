"""A run directory, and the processes that fill it.

A job is one arm with one seed. A job's lines are written together, by the main process alone, into a new file that then
takes the old one's name: whatever kills the run, the directory holds whole jobs, and the next run does the others, from
their checkpoints where there are some.

Either several processes do a job each (`run` with workers), or all processes that torchrun has started do one job after
the other together, and the first of them writes.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .. import __version__
from . import checkpoints, data, training
from .experiment import Arm, Preset
from .progress import Progress
from .sampling import plan

Job = tuple[Arm, int]


class Place(NamedTuple):
    """Where and with what a run is done: nothing that its numbers depend on, but for rounding."""

    directory: Path  # of the run
    device: str = "cpu"
    root: Path | None = None  # of the data
    cache: Path | None = None
    loaders: int = 0  # processes that decode images
    skip_corrupt: bool = False
    tensorboard: bool = False


class Failed(RuntimeError):
    """Some jobs could not be done; the others were, and are kept."""


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

    def check(self, preset: Preset, versions: bool, others: Sequence[Arm] = ()) -> None:
        """Raise ValueError if what is there was made with other settings or, where they matter, other versions.

        Args:
            preset: with the settings and the arms that are wanted now.
            versions: whether those of torch and of this package matter.
            others: arms that may be there too.
        """
        ignored = () if versions else ("batchrenorm", "torch")
        configs = {arm.name: _without(preset.config(arm), ignored) for arm in (*others, *preset.arms)}
        for record in self.records:
            if configs.get(record["arm"]) != _without(record["config"], ignored):
                raise ValueError(
                    f"expected results of the present settings in {self.path.parent}, got {record['arm']} of other "
                    "settings or versions; start over with --fresh, or choose another directory with --runs"
                )

    def missing(self, preset: Preset, seeds: int, others: Sequence[Arm] = ()) -> list[Job]:
        """The jobs of a preset that are still to do, all arms of a seed before the next seed.

        Raises:
            ValueError: what is there was made with other settings.
        """
        self.check(preset, versions=True, others=others)
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
    checkpoints.write(path, text.encode())


def config_hash(preset: Preset, arm: Arm) -> str:
    """Names the settings of an arm: results of another hash are not its results."""
    return hashlib.sha256(json.dumps(preset.config(arm), sort_keys=True).encode()).hexdigest()[:16]


def run_job(
    preset: Preset, arm: Arm, seed: int, place: Place, progress: Callable[[int, float | None], None]
) -> list[dict[str, Any]]:
    """Train one arm with one seed, on one thread so that the numbers do not depend on the machine's load.

    Args:
        preset: the experiment.
        arm: one of its arms.
        seed: the seed.
        place: where.
        progress: see `training.train`.

    Returns:
        The lines for results.jsonl.
    """
    device = torch.device(place.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began = time.perf_counter()
        with _scalars(place, arm, seed) as watch:
            evaluations = training.train(
                preset, arm, seed, load(preset, place), device, progress, checkpoint(place, arm, seed), watch
            )
        seconds = round(time.perf_counter() - began, 2)
    finally:
        torch.set_num_threads(threads)
    head = {"preset": preset.name, "arm": arm.name, "regime": arm.regime, "normalizer": arm.normalizer, "seed": seed}
    tail = {
        "config_hash": config_hash(preset, arm),
        "config": preset.config(arm),
        "version": __version__,
        "commit": _commit(),
        "hardware": _hardware(device),
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "seconds": seconds,
    }
    return [{**head, **entry, **tail} for entry in evaluations]


def check(preset: Preset, found: data.Data) -> None:
    """Whatever is wrong with the data or the net for this preset shows before the first training.

    Raises:
        ValueError: the net does not take such images, or the labels have too few.
    """
    for split in found[:3]:
        for labels in {preset.test_labels or arm.labels for arm in preset.arms if arm.labels is not None}:
            if labels is not None:
                plan(labels.size, labels, split.y, 1, 0)
    plan(preset.batch_size, None, found.train.y, 1, 0)
    training.build(preset, preset.arms[0], found, 0)


def checkpoint(place: Place, arm: Arm, seed: int) -> Path:
    """The file of a job's checkpoint."""
    return place.directory / "checkpoints" / f"{arm.regime}-{arm.normalizer}-{seed}.pt"


def load(preset: Preset, place: Place) -> data.Data:
    """The preset's data, loaded once in a process."""
    return _load(
        preset.data, place.root, place.cache, preset.image_size, place.device, place.loaders, place.skip_corrupt
    )


@functools.lru_cache(maxsize=1)
def _load(
    name: str, root: Path | None, cache: Path | None, size: int | None, device: str, loaders: int, skip_corrupt: bool
) -> data.Data:
    return data.load(name, root=root, cache=cache, size=size, device=device, workers=loaders, skip_corrupt=skip_corrupt)


@contextlib.contextmanager
def _scalars(place: Place, arm: Arm, seed: int) -> Iterator[Callable[[str, float, int], None] | None]:
    if not place.tensorboard or (dist.is_initialized() and dist.get_rank() > 0):
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter  # an extra

    with SummaryWriter(place.directory / "tensorboard" / f"{arm.regime}-{arm.normalizer}-{seed}") as writer:
        yield writer.add_scalar


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
def _hardware(device: torch.device) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    found = {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__}
    return {**found, "gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else found


def run(preset: Preset, place: Place, results: Results, jobs: list[Job], workers: int, progress: Progress) -> None:
    """Do the jobs, and add the lines of each to the results as soon as it is done.

    Args:
        preset: the experiment.
        place: where.
        results: where the lines go.
        jobs: what to do.
        workers: processes; 0 does everything in this one.
        progress: told of every step.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, after what was done has been kept and the workers have ended.
        Failed: a training diverged; all others were done.
    """
    failures: list[str] = []
    if workers == 0:
        _run_here(preset, place, results, jobs, progress, failures)
    else:
        _run_in_workers(preset, place, results, jobs, workers, progress, failures)
    if failures:
        raise Failed("; ".join(failures))


def _run_here(
    preset: Preset, place: Place, results: Results, jobs: list[Job], progress: Progress, failures: list[str]
) -> None:
    first = not dist.is_initialized() or dist.get_rank() == 0
    with _stopped_by_signals() as stopped:
        for arm, seed in jobs:

            def shown(step: int, accuracy: float | None, arm: Arm = arm, seed: int = seed) -> None:
                progress.step(0, arm.name, seed, arm.steps or preset.steps, step, accuracy)
                if _asked_to_stop(stopped):
                    raise KeyboardInterrupt

            try:
                records = run_job(preset, arm, seed, place, shown)
            except training.Diverged as error:
                failures.append(str(error))
                progress.line(f"failed: {error}")
                continue
            if first:
                _add(records, place, results, progress)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the training between two steps, after a checkpoint; a second one at once."""
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _asked_to_stop(stopped: list[int]) -> bool:
    """Whether this process is to stop or, under torchrun, any: a signal comes to each at another step."""
    asked = torch.tensor(len(stopped))
    if dist.is_initialized():
        dist.all_reduce(asked)
    return bool(asked)


def _run_in_workers(
    preset: Preset,
    place: Place,
    results: Results,
    jobs: list[Job],
    workers: int,
    progress: Progress,
    failures: list[str],
) -> None:
    spawn = multiprocessing.get_context("spawn")
    stop, events = spawn.Event(), spawn.Queue()
    pool = ProcessPoolExecutor(min(workers, len(jobs)), spawn, _begin_worker, (stop, events))
    # Ctrl-C reaches every process of the terminal. A worker that is born ignoring it has no moment to trip over it.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pending = {pool.submit(_work, preset, arm, seed, place): (arm, seed) for arm, seed in jobs}
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        with _stopped_by_signals() as stopped:
            while pending:
                done, _ = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
                with contextlib.suppress(queue.Empty):
                    while True:
                        progress.step(*events.get_nowait())
                _keep(done, pending, place, results, progress, failures)
                if stopped:
                    raise KeyboardInterrupt
    except BaseException:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        finished = {future for future in pending if future.done() and not future.cancelled() and not future.exception()}
        _keep(finished, pending, place, results, progress, failures)
        raise
    pool.shutdown()


def _keep(
    done: set[Future[list[dict[str, Any]]]],
    pending: dict[Future[list[dict[str, Any]]], Job],
    place: Place,
    results: Results,
    progress: Progress,
    failures: list[str],
) -> None:
    for future in done:
        del pending[future]
        try:
            records = future.result()
        except training.Diverged as error:
            failures.append(str(error))
            progress.line(f"failed: {error}")
            continue
        _add(records, place, results, progress)


def _add(records: list[dict[str, Any]], place: Place, results: Results, progress: Progress) -> None:
    results.add(records)
    progress.job_done(records)
    arm, seed = records[0]["arm"].replace("/", "-"), records[0]["seed"]
    (place.directory / "checkpoints" / f"{arm}-{seed}.pt").unlink(missing_ok=True)


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
    # Whoever ends the run ends the main process; that one lets the workers write their checkpoints first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _work(preset: Preset, arm: Arm, seed: int, place: Place) -> list[dict[str, Any]]:
    steps = arm.steps or preset.steps
    shown = 0.0

    def progress(step: int, accuracy: float | None) -> None:
        nonlocal shown
        if time.monotonic() - shown > 0.2 or step == steps:
            shown = time.monotonic()
            _events.put((os.getpid(), arm.name, seed, steps, step, accuracy))
            if _stop.is_set():
                raise _Stopped

    return run_job(preset, arm, seed, place, progress)
