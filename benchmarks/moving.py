"""What `gradient="moving"` costs a training step: `python -m benchmarks.moving [--record]`.

Whole steps of three nets, each with the paper's gradient, with it again (the noise) and with the moving one, in turns
on the same minibatch; the ratio is the median over the turns, beside it their quartiles. `--record` appends rows to
results/moving/rows.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchrenorm as brn
from batchrenorm.paper import models
from batchrenorm.paper.presets import PRESETS

ROWS = Path(__file__).parent / "results" / "moving" / "rows.jsonl"


def nets() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]]:
    """By name: a net with batch norm, the shape of its input, classes, samples normalised together."""
    dense, conv = PRESETS["small-batch"].model, PRESETS["small-batch-conv"].model
    resnet = models.SmallResNet(width=32)
    return {
        "dense, 4 layers of 128": (lambda: models.build(dense, (1, 15, 15), 964, 0), (32, 1, 15, 15), 964, 4),
        "7 convolutions, 14 pixels": (lambda: models.build(conv, (1, 14, 14), 964, 0), (32, 1, 14, 14), 964, 4),
        "small ResNet, 32 pixels": (lambda: models.build(resnet, (3, 32, 32), 10, 0), (32, 3, 32, 32), 10, 4),
    }


def step_of(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float]:
    optimizer = torch.optim.SGD(net.parameters(), 1e-4)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def measure(build: Callable[[], nn.Module], shape: tuple[int, ...], classes: int, group: int, rounds: int) -> Any:
    x, y = torch.randn(shape), torch.randint(classes, shape[:1])
    steps = {}
    for name in ("paper", "paper again", "moving"):
        net = build()
        gradient = "moving" if name == "moving" else "microbatch"
        # Limits open: where most of a training is spent.
        brn.convert_batchnorm(net, clip=brn.ClipSchedule.constant(), microbatch_size=group, gradient=gradient)
        steps[name] = step_of(net, x, y)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 3):
        # In every order: what a step finds in the caches is what the one before it left.
        for name in (list(steps) * 2)[turn % 3 : turn % 3 + 3]:
            taken = steps[name]()
            if turn >= 3:
                times[name].append(taken)
    found: dict[str, Any] = {"step_ms": 1e3 * statistics.median(times["paper"])}
    for name in ("paper again", "moving"):
        low, middle, high = statistics.quantiles([t / p for t, p in zip(times[name], times["paper"])], n=4)
        found[name.replace("paper ", "")] = {"ratio": middle, "quartiles": [low, high]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.moving", description=__doc__)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    for name, case in nets().items():
        torch.manual_seed(0)
        row = {"net": name, "samples": case[1][0], "group": case[3], "rounds": options.rounds}
        row |= measure(*case, options.rounds)
        row |= {"threads": options.threads, "torch": torch.__version__, "machine": platform.machine(), "commit": commit}
        row["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        print(json.dumps(row))
        if options.record:
            ROWS.parent.mkdir(exist_ok=True)
            with ROWS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
