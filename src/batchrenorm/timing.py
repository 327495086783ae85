"""Interleaved timing: what is compared meets the same machine."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

Call = Callable[[], object]
Clock = Callable[[Call, int], float]
"""Seconds of one call, from that many of them one after the other."""


def wall(device: str) -> Clock:
    """The caller's clock, read when the device has nothing left to do."""
    wait: Call = (lambda: None) if torch.device(device).type == "cpu" else torch.accelerator.synchronize

    def seconds(call: Call, repeats: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        return (time.perf_counter() - start) / repeats

    return seconds


def events(call: Call, repeats: int) -> float:
    """The GPU's own clock, from before the first call's first kernel to the end of the last call's last."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def enqueue(call: Call, repeats: int) -> float:
    """Seconds of the host alone. The GPU's queue holds about a thousand launches; beyond them the host would wait."""
    repeats = min(repeats, 20)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / repeats


class Times(NamedTuple):
    ms: float
    ratio: float
    quartiles: tuple[float, float]
    rounds: int


def time_rounds(
    calls: dict[str, Call], base: str, seconds: float, clock: Clock, sample: float = 2e-3
) -> dict[str, list[float | None]]:
    """Seconds per call: every implementation once in every round, in a new random order.

    Args:
        calls: what to time, by name.
        base: one of them; it takes part in every round. One that takes much longer takes part in fewer (None
            elsewhere), so that the budget is not spent on it.
        seconds: the budget.
        clock: `wall`, `events` or `enqueue`.
        sample: calls that are shorter than this are repeated within a round.

    Returns:
        For every name one entry per round.
    """
    order = random.Random(0)
    repeats = {}
    costs = {}
    with _quiet():
        for name, call in calls.items():
            cost = min(clock(call, 1) for _ in range(3))
            repeats[name] = max(1, math.ceil(sample / cost))
            costs[name] = cost * repeats[name]
        every = {name: max(1, int(costs[name] / (4 * costs[base]))) for name in calls}
        times: dict[str, list[float | None]] = {name: [] for name in calls}
        end = time.perf_counter() + seconds
        for number in range(1000):
            names = [name for name in calls if number % every[name] == 0]
            order.shuffle(names)
            taken = {name: clock(calls[name], repeats[name]) for name in names}
            for name in calls:
                times[name].append(taken.get(name))
            # Cycles of this round only: a whole collection would walk all of torch and Keras.
            gc.collect(0)
            fewest = min(sum(t is not None for t in row) for row in times.values())
            if time.perf_counter() > end and number >= 4 and fewest >= 3:
                break
    return times


@contextmanager
def _quiet() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def summarise(times: dict[str, list[float | None]], base: str) -> dict[str, Times]:
    """Medians. The ratio to the base is taken within a round, where both met the same machine, and then its median."""
    summary = {}
    for name, row in times.items():
        pairs = [(t, b) for t, b in zip(row, times[base]) if t is not None and b is not None]
        ratios = [t / b for t, b in pairs]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        ms = 1e3 * statistics.median(t for t, _ in pairs)
        summary[name] = Times(ms, statistics.median(ratios), (low, high), len(pairs))
    return summary
