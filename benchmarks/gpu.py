"""What only a GPU needs: buffers that are not in its cache, launches without their host, kernels by name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from batchrenorm.timing import Call

_SETS = 16


def sets(nbytes: int, device: str) -> int:
    """How many sets of buffers to go round in, so that none is in the L2 cache when it comes up again."""
    if torch.device(device).type == "cpu":
        return 1
    return min(_SETS, math.ceil(4 * torch.cuda.get_device_properties(device).L2_cache_size / nbytes))


def is_cold(nbytes: int, device: str) -> bool:
    """Whether that many are enough; small tensors stay in L2, as they do in a net."""
    return sets(nbytes, device) < _SETS


def rotating(calls: list[Call]) -> Call:
    """One of the calls at a time, in turn."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def graphs(calls: dict[str, list[Call]], say: Callable[[str], None]) -> dict[str, Call]:
    """A replay of all calls of each implementation, without the host; those that cannot be captured are left out."""
    replays: dict[str, Call] = {}
    for name, some in calls.items():
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    some[0]()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in some:
                    call()
            replays[name] = graph.replay
        except Exception as error:
            say(f"  {name} not captured as a CUDA graph: {type(error).__name__}: {str(error).splitlines()[0]}")
            torch.cuda.synchronize()
    return replays


def kernels(call: Call) -> list[str]:
    """All that one call runs on the GPU, in order of their start."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    found = [
        event
        for event in profiler.events()
        # An optimiser's step is an annotation there, and no kernel.
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return [event.name[:80] for event in sorted(found, key=lambda event: event.time_range.start)]


def peak(call: Call) -> int:
    """Bytes above what is held before, results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
