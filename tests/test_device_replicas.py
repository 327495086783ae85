"""Replicas on accelerators: NCCL, a process for each of two GPUs; with `--device cpu` gloo, to try the tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import batchrenorm as brn

SHARDS = (3, 5)


def join(store: str, kind: str) -> None:
    rank = processes._serve.rank  # type: ignore[attr-defined]
    if kind == "cuda":
        torch.cuda.set_device(rank)
    timeout = timedelta(seconds=processes.PATIENCE)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)


@pytest.fixture
def workers(request: pytest.FixtureRequest) -> Iterator[tuple[processes.Workers, str]]:
    kind = request.config.getoption("--device") or "cuda"
    if kind == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with tempfile.TemporaryDirectory() as directory:
        workers = processes.Workers(2, join, os.path.join(directory, "store"), kind)
        yield workers, kind
        workers.end()


def inputs(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(sum(SHARDS), 6, 9, 7, generator=generator) + 1 for _ in range(2))
    return x.to(kind, dtype), dy.to(kind, dtype)


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def sharded(kind: str, dtype: torch.dtype, compiled: bool) -> list[Any]:
    x, dy = inputs(kind, dtype)
    rank = dist.get_rank()
    mine = slice(0, SHARDS[0]) if rank == 0 else slice(SHARDS[0], None)
    layer = brn.BatchRenorm2d(6, momentum=0.3, clip=brn.ClipSchedule.constant(1.5, 0.5), process_group="world")
    layer = layer.to(kind)
    run: Any = torch.compile(layer, fullgraph=True) if compiled else layer
    step(run, x[mine], dy[mine])  # compiles, and makes the communicator
    layer.reset_running_stats()
    if kind == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(run, x[mine], dy[mine])
    finally:
        if kind == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return [v.cpu() for v in (*found, *layer.buffers())]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_is_whole(workers: tuple[processes.Workers, str], dtype: torch.dtype, compiled: bool) -> None:
    pool, kind = workers
    first, second = pool.call(sharded, kind, dtype, compiled)
    x, dy = inputs("cpu", dtype)
    layer = brn.BatchRenorm2d(6, momentum=0.3, clip=brn.ClipSchedule.constant(1.5, 0.5)).double()
    whole = [v.detach() for v in (*step(layer, x.double(), dy.double()), *layer.buffers())]
    found = [torch.cat([a, b]) for a, b in zip(first[:2], second[:2])]
    found += [a + b for a, b in zip(first[2:4], second[2:4])]
    half = dtype != torch.float32
    # y and dx are rounded to x's dtype, up to three times.
    for k, (got, wanted) in enumerate(zip(found, whole)):
        scale = wanted.abs().max()
        limit = 3 * 2**-8 if half and k < 2 else 1e-5
        assert (got.double() - wanted).abs().max() <= limit * scale
    for a, b, wanted in zip(first[4:], second[4:], whole[4:]):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.double(), wanted.double(), rtol=1e-5, atol=1e-6)


def shared(kind: str) -> list[Tensor]:
    layer = brn.BatchRenorm2d(6, momentum=0.3).to(kind)
    x, _ = inputs(kind, torch.float32)
    with brn.keep_in_sync(layer):
        for _ in range(3):
            layer(x[dist.get_rank() :: 2])
    return [b.cpu() for b in layer.buffers()]


def test_shared_averages(workers: tuple[processes.Workers, str]) -> None:
    pool, kind = workers
    first, second = pool.call(shared, kind)
    assert all(map(torch.equal, first, second))
    x, _ = inputs("cpu", torch.float32)
    mean = torch.stack([part.mean((0, 2, 3)) for part in (x[::2], x[1::2])]).mean(0)
    torch.testing.assert_close(first[0], mean * (1 - 0.7**3), rtol=1e-4, atol=1e-5)
