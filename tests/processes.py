"""Real processes for tests of replicas: a pool that serves many cases, and its hard end.

A case is a function at the top of a test file; `Pool.run` has it called in each process of a gloo group of the wanted
size and returns what each of them returned. The workers are forked from a server that has imported torch once. Nothing
here waits without a limit: who is late is killed, and the test fails.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

PATIENCE = 120
"""Seconds for a case: these machines can be slow, and may be stopped for a while."""
LARGEST = 4

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "numpy", "batchrenorm", "torch.distributed._functional_collectives"])


class Workers:
    """Processes that do what they are told, one thing at a time."""

    def __init__(self, number: int, setup: Callable[..., Any], *args: Any) -> None:
        self.setup, self.args = setup, args
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        for rank in range(number):
            here, there = _context.Pipe()
            process = _context.Process(target=_serve, args=(there, rank, sys.path[:]), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)
        self.call(setup, *args)

    def send(self, case: Callable[..., Any], *args: Any) -> None:
        for pipe in self.pipes:
            pipe.send((case, args))

    def receive(self, patience: float = PATIENCE, grace: float = PATIENCE) -> list[tuple[str, Any]]:
        """("returned", value), ("raised", text), ("died", None) or ("late", None) of each.

        Once one has raised or died the others, who may wait for it, have only `grace` seconds more.
        """
        end = time.monotonic() + patience
        outcomes: dict[Connection, tuple[str, Any]] = {}
        while len(outcomes) < len(self.pipes):
            left = [pipe for pipe in self.pipes if pipe not in outcomes]
            ready = wait(left, max(0.0, end - time.monotonic()))
            if not ready:
                outcomes |= dict.fromkeys(left, ("late", None))
            for pipe in ready:
                try:
                    outcomes[pipe] = pipe.recv()  # type: ignore
                except (EOFError, OSError):
                    outcomes[pipe] = "died", None  # type: ignore
                if outcomes[pipe][0] != "returned":  # type: ignore
                    end = min(end, time.monotonic() + grace)
        return [outcomes[pipe] for pipe in self.pipes]

    def call(self, case: Callable[..., Any], *args: Any, patience: float = PATIENCE) -> list[Any]:
        self.send(case, *args)
        outcomes = self.receive(patience, grace=3)
        wrong = [f"process {rank} {how}: {what}" for rank, (how, what) in enumerate(outcomes) if how != "returned"]
        if wrong:
            self.end()
            pytest.fail("\n".join(wrong))
        return [what for _, what in outcomes]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes):
            process.join(PATIENCE)
            pipe.close()


class Pool:
    """`LARGEST` workers with a group of each size from 1 on; new ones where a test has ended the last."""

    def __init__(self) -> None:
        self.workers: Workers | None = None

    def run(self, size: int, case: Callable[..., Any], *args: Any) -> list[Any]:
        """case(group, *args) on each of the first `size` workers."""
        if self.workers is None or not self.workers.alive:
            self.workers = started(LARGEST)
        return self.workers.call(_in_group, size, case, args)[:size]

    def end(self) -> None:
        if self.workers is not None:
            self.workers.end()


def started(number: int, timeout: float = PATIENCE) -> Workers:
    """Workers of one gloo group, whose collectives end with an error after `timeout` seconds."""
    with tempfile.NamedTemporaryFile(delete=False) as file:
        pass
    os.unlink(file.name)
    return Workers(number, _join, file.name, number, timeout)


def _serve(pipe: Connection, rank: int, path: list[str]) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    _serve.rank = rank  # type: ignore[attr-defined]
    while True:
        try:
            case, args = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                # torch's own, while it compiles, the first where it meets an autograd.Function.
                warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
                warnings.filterwarnings("ignore", ".*script_method` is deprecated", DeprecationWarning)
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
                outcome = "returned", case(*args)
        except Exception:
            outcome = "raised", traceback.format_exc()
        pipe.send(outcome)


_GROUPS: dict[int, dist.ProcessGroup] = {}


def _join(store: str, number: int, timeout: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        rank = _serve.rank  # type: ignore[attr-defined]
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=number,
            timeout=timedelta(seconds=timeout),
        )
        for size in range(1, number + 1):
            _GROUPS[size] = dist.new_group(list(range(size)), timeout=timedelta(seconds=timeout))
        dist.barrier()
        if rank == 0:
            Path(store).unlink(missing_ok=True)


def _in_group(size: int, case: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.manual_seed(0)
    return case(_GROUPS[size], *args) if dist.get_rank() < size else None


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
