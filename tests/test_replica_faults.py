"""What goes wrong among replicas: the right result or one clear error on every one, and no wait beyond the time-out.

Each of these needs processes of its own, since they do not survive it. What the training program makes of lost
processes is in test_paper_faults.py.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn.parallel import DistributedDataParallel

import batchrenorm as brn

TIMEOUT = 6.0
"""Seconds, of the group; gloo's connections notice a death at once, a silence after this."""
SLACK = 30.0
"""For slow machines: an outcome later than both together is a hang."""


@pytest.fixture
def workers() -> Iterator[processes.Workers]:
    workers = processes.started(2, TIMEOUT)
    yield workers
    workers.end()


class Fault(nn.Module):
    """Something happens on rank 1, after some forwards."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.forwards = what, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        if self.forwards < 3 or dist.get_rank() == 0:
            return x
        if self.what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "raises":
            raise KeyError("a label that no rank knows")
        if self.what == "late":
            time.sleep(TIMEOUT + 3)
        return x


def steps(what: str, level: str) -> str:
    """Trains until something is wrong; what it was, and whether the averages are finite and whole."""
    torch.manual_seed(0)
    group = dist.group.WORLD if level == "process_group" else None
    model = nn.Sequential(
        nn.Linear(3, 4),
        brn.BatchRenorm1d(4, process_group=group),
        Fault(what),
        brn.BatchRenorm1d(4, process_group=group),
    )
    sync = brn.keep_in_sync(model) if level == "keep_in_sync" else None
    began = time.monotonic()
    before: list[Tensor] = []
    try:
        for _ in range(5):
            began = time.monotonic()
            before = [b.clone() for b in model[3].buffers()]
            model(torch.randn(8, 3)).square().mean().backward()
            if sync is not None:
                sync.wait()
    except Exception as error:
        # The layer whose collective failed has not moved.
        stayed = level != "process_group" or all(map(torch.equal, before, model[3].buffers()))
        return f"{type(error).__name__} after {time.monotonic() - began:.1f} s, {stayed}: {error}"
    return "nothing"


@pytest.mark.parametrize("level", ["process_group", "keep_in_sync"])
@pytest.mark.parametrize("what", ["killed", "raises", "late"])
def test_one_is_lost(workers: processes.Workers, what: str, level: str) -> None:
    workers.send(steps, what, level)
    (how, first), (how_1, second) = workers.receive(TIMEOUT + SLACK)
    assert how == "returned", first
    assert first.startswith(("RuntimeError", "DistBackendError", "DistNetworkError")), first
    assert ", True: " in first
    if what == "killed":
        assert how_1 == "died"
    elif what == "raises":
        assert second.startswith("KeyError")
    else:
        assert second.startswith(("RuntimeError", "DistBackendError", "DistNetworkError")), second


def other_layers(what: str, level: str) -> str:
    """Layers that differ between the ranks, in order or in size."""
    group = dist.group.WORLD if level == "ddp" else None
    names = ["a", "b"] if dist.get_rank() == 0 else ["b", "a"]
    sizes = {"a": 4, "b": 4 if what == "order" else 7}
    model = nn.ModuleDict({name: brn.BatchRenorm1d(sizes[name], process_group=group) for name in names})
    if what == "more" and dist.get_rank() == 1:
        model["c"] = brn.BatchRenorm1d(50)
    before = [b.clone() for b in model.buffers()]
    try:
        if level == "ddp":
            # Its check is before any forward; gloo would abort the process where messages differ in size.
            DistributedDataParallel(model)
        else:
            brn.sync_running_stats(model)
    except Exception as error:
        return f"{type(error).__name__} {all(map(torch.equal, before, model.buffers()))}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("what", "level"),
    [
        ("order", "sync_running_stats"),
        ("more", "sync_running_stats"),
        ("sizes", "sync_running_stats"),
        ("sizes", "ddp"),
    ],
)
def test_other_layers_elsewhere(workers: processes.Workers, what: str, level: str) -> None:
    workers.send(other_layers, what, level)
    for how, said in workers.receive(TIMEOUT + SLACK):
        assert how == "returned", said
        assert "Error True: " in said
        if level != "ddp":
            assert "expected the same Batch Renormalization layers on all replicas" in said


def save_until_killed(path: str) -> str:
    model = nn.Sequential(nn.Linear(3, 4), brn.BatchRenorm1d(4))
    model(torch.ones(2, 3) * torch.arange(2)[:, None])
    state = {"model": model.state_dict()}
    dcp.save(state, checkpoint_id=f"{path}/1")

    class Dying(dcp.FileSystemWriter):
        def write_data(self, *args: Any) -> Any:
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write_data(*args)

    try:
        dcp.save(state, storage_writer=Dying(f"{path}/2"))
    except Exception as error:
        return type(error).__name__
    return "nothing"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_killed_while_it_saves(workers: processes.Workers, tmp_path: Path) -> None:
    workers.send(save_until_killed, str(tmp_path))
    (how, said), (how_1, _) = workers.receive(TIMEOUT + SLACK)
    assert (how, how_1) == ("returned", "died")
    assert said != "nothing"
    state = {"model": nn.Sequential(nn.Linear(3, 4), brn.BatchRenorm1d(4)).state_dict()}
    with pytest.raises(CheckpointException):
        dcp.load(state, checkpoint_id=str(tmp_path / "2"), no_dist=True)
    dcp.load(state, checkpoint_id=str(tmp_path / "1"), no_dist=True)
    assert state["model"]["1.num_batches_tracked"] == 1
