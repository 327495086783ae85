"""What shared statistics cost, and what replicas drift apart without: `python -m benchmarks.replicas cost | drift`.

Both start processes of their own (gloo) and append rows to `benchmarks/results/replicas/`.

`cost`: a training step of ResNet-50's 53 normalisers, on small planes, so that what is compared is the collectives.
`nn.SyncBatchNorm` has no row: it refuses tensors on the CPU. Rounds of all arms in turn; ratios to `none` of the same
round; `none again` is the same code a second time, which shows the noise.

`drift`: 200 steps under DDP on shards of one distribution, and on shards of different labels.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import batchrenorm as brn

from .__main__ import environment, slug
from .tables import RESULTS, append

LEVELS = ("none", "sync_running_stats", "process_group")
STEPS = (1, 10, 50, 100, 200)


def channels_of_resnet50() -> list[int]:
    channels = [64]
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        channels += [4 * width] + [width, width, 4 * width] * blocks
    return channels


def layers(level: str) -> nn.ModuleList:
    group = "world" if level == "process_group" else None
    clip = brn.ClipSchedule.constant()
    return nn.ModuleList(brn.BatchRenorm2d(C, clip=clip, process_group=group) for C in channels_of_resnet50())


def step_of(level: str, samples: int, side: int) -> Any:
    model = layers(level.removesuffix(" again"))
    xs = [torch.randn(samples, C, side, side, requires_grad=True) for C in channels_of_resnet50()]
    dys = [torch.randn_like(x) for x in xs]

    def step() -> None:
        ys = [layer(x) for layer, x in zip(model, xs)]
        handle = brn.sync_running_stats(model, async_op=True) if level == "sync_running_stats" else None
        torch.autograd.backward(ys, dys)
        if handle is not None:
            handle.wait()

    return step


def sent_by(step: Any) -> dict[str, int]:
    """Collectives of a step, and the bytes that a process hands to them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as found:
        step()
    # Which of the names has the shape depends on the way in.
    events = [e for e in found.events() if e.name.startswith(("_c10d_functional::all_", "gloo:all_reduce"))]
    functional = [e for e in events if e.name.startswith("_c10d")]
    mine = functional or events
    size = 4 if functional else 8  # vectors of statistics are float32, the flat one of averages float64
    return {"collectives": len(mine), "bytes": sum(size * torch.Size(e.input_shapes[0]).numel() for e in mine)}


def cost(rank: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    arms = [*LEVELS, "none again"]
    steps = {arm: step_of(arm, options.samples, options.side) for arm in arms}
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    sent = {}
    for arm, step in steps.items():
        step()
        sent[arm] = sent_by(step)
    for _ in range(options.rounds):
        for arm, step in steps.items():
            dist.barrier()
            began = time.perf_counter()
            step()
            times[arm].append(time.perf_counter() - began)
    rows = []
    for arm in arms:
        ratios = [a / b for a, b in zip(times[arm], times["none"])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        milliseconds = round(1e3 * statistics.median(times[arm]), 3)
        row = {"level": arm, "ms": milliseconds, "ratio": round(middle, 3)}
        row |= {"ratio_quartiles": [round(low, 3), round(high, 3)], "rounds": options.rounds, **sent[arm]}
        rows.append({"benchmark": "cost", "samples": options.samples, "side": options.side, **row})
    return rows


def classifier(level: str) -> nn.Module:
    torch.manual_seed(0)
    group = "world" if level == "process_group" else None
    options: dict[str, Any] = {"clip": brn.ClipSchedule.for_training(STEPS[-1]), "process_group": group}
    blocks: list[nn.Module] = []
    for before, after in ((16, 64), (64, 64), (64, 64)):
        blocks += [nn.Linear(before, after, bias=False), brn.BatchRenorm1d(after, **options), nn.ReLU()]
    return nn.Sequential(*blocks, nn.Linear(64, 10))


def drift(rank: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for shards in ("of one distribution", "of different labels"):
        for level in LEVELS:
            rows += drift_of(rank, level, shards, options)
    return rows


def drift_of(rank: int, level: str, shards: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    replicas = dist.get_world_size()
    model = classifier(level)
    name = "forward_sync_buffers"  # torch 2.12 calls it so
    known = name in inspect.signature(DistributedDataParallel.__init__).parameters
    net = DistributedDataParallel(model, **{name if known else "broadcast_buffers": False})  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(10, 16, generator=generator) * 1.5
    sync = brn.keep_in_sync(net) if level == "sync_running_stats" else contextlib.nullcontext()
    rows = []
    with sync:
        for step in range(1, STEPS[-1] + 1):
            labels = torch.randint(10, (options.samples * replicas,), generator=generator)
            if shards == "of different labels":
                labels = labels.sort().values
            x = means[labels] + torch.randn(len(labels), 16, generator=generator)
            mine = slice(rank * options.samples, (rank + 1) * options.samples)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[mine]), labels[mine]).backward()
            optimizer.step()
            if isinstance(sync, brn.keep_in_sync):
                sync.wait()
            if step in STEPS:
                gaps = {"benchmark": "drift", "shards": shards, "samples": options.samples, "level": level}
                rows.append(gaps | {"step": step, **apart(model), **outputs_apart(model, means)})
    return rows


def apart(model: nn.Module) -> dict[str, Any]:
    """Largest difference between two replicas' averages over all channels: of mu in sigmas, and of sigma as a part."""
    norms = [m for m in model.modules() if isinstance(m, brn.BatchRenorm)]
    mu, sigma = (everyone(torch.cat(v)) for v in ([m.running_mean for m in norms], [m.running_std for m in norms]))  # type: ignore
    gap = (mu.amax(0) - mu.amin(0)) / sigma.amin(0)
    ratio = sigma.amax(0) / sigma.amin(0) - 1
    equal = bool((mu == mu[0]).all() and (sigma == sigma[0]).all())
    return {"mu": float(f"{gap.max():.3g}"), "sigma": float(f"{ratio.max():.3g}"), "bitwise_equal": equal}


@torch.no_grad()
def outputs_apart(model: nn.Module, means: Tensor) -> dict[str, float]:
    """Largest difference between two replicas' probabilities in inference."""
    model.eval()
    p = everyone(model(means).softmax(1).flatten())
    model.train()
    return {"probability": float(f"{(p.amax(0) - p.amin(0)).max():.3g}")}


def everyone(vector: Tensor) -> Tensor:
    rows = [torch.empty_like(vector) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, vector.detach().contiguous())
    return torch.stack(rows)


def process(rank: int, options: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=options.processes,
        timeout=timedelta(seconds=120),
    )
    rows = (cost if options.benchmark == "cost" else drift)(rank, options)
    if rank == 0:
        place = environment("cpu", 1)
        place["processes"] = options.processes
        for row in rows:
            print("  ".join(f"{k} {v}" for k, v in row.items() if k != "benchmark"), flush=True)
        if not options.no_record:
            append([place | row for row in rows], RESULTS / "replicas" / f"{slug(place['device'])}.jsonl")
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.replicas", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("benchmark", choices=("cost", "drift"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60, help="of cost")
    parser.add_argument("--samples", type=int, default=8, help="of each process in a step")
    parser.add_argument("--side", type=int, default=4, help="of the planes, of cost")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(process, (options, os.path.join(directory, "store")), options.processes)  # type: ignore[no-untyped-call]
    return 0


if __name__ == "__main__":
    sys.exit(main())
