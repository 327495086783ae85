"""What `RenormMonitor` costs a training step: `python -m benchmarks.monitor [--record]`.

Three kinds of step take turns on one net: nobody watches; a monitor waits; a monitor reads. At one reading in 50 a step
costs the mean of 49 waiting and one reading: the overhead is the median over the turns, beside it their quartiles. What
a reading adds to a waiting step, over 50, is less noisy. `--record` appends a row to results/monitor/rows.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

import batchrenorm as brn

EVERY = 50


def net(width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False)]
    for _ in range(depth):
        layers += [brn.BatchRenorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def measure(width: int, depth: int, batch: int, size: int, rounds: int) -> dict[str, Any]:
    model = net(width, depth)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        return 1e3 * (time.perf_counter() - start)

    times: dict[str, list[float]] = {"plain": [], "waiting": [], "reading": []}
    for turn in range(rounds + 2):
        # In every order: what a step finds in the caches is what the one before it left.
        for kind in (list(times) * 2)[turn % 3 : turn % 3 + 3]:
            if kind == "plain":
                taken = step()
            else:
                with brn.RenormMonitor(model, every=EVERY) as monitor:
                    monitor.steps = 1 if kind == "waiting" else 0
                    taken = step()
            if turn >= 2:
                times[kind].append(taken)
    medians = {f"{kind}_ms": statistics.median(seen) for kind, seen in times.items()}
    # Within a turn, so that a machine that slows down slows all three.
    ratios = [((EVERY - 1) * w + r) / EVERY / p for p, w, r in zip(*times.values())]
    low, middle, high = (100 * (q - 1) for q in statistics.quantiles(ratios, n=4))
    reading = statistics.median((r - w) / p for p, w, r in zip(*times.values()))
    return medians | {
        "overhead_percent": middle,
        "overhead_quartiles": [low, high],
        "readings_share_percent": 100 * reading / EVERY,
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.monitor", description=__doc__)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    for width, depth, batch, size in ((16, 8, 8, 16), (32, 8, 16, 32)):
        torch.manual_seed(0)
        case = {"width": width, "depth": depth, "batch": batch, "size": size, "every": EVERY, "rounds": options.rounds}
        row = case | measure(width, depth, batch, size, options.rounds)
        row |= {"threads": options.threads, "torch": torch.__version__, "machine": platform.machine(), "commit": commit}
        row["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        print(json.dumps(row))
        if options.record:
            path = Path(__file__).parent / "results" / "monitor" / "rows.jsonl"
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
