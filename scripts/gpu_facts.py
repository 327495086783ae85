"""The facts that decide how to write kernels for a GPU, as one JSON object. See scripts/gpu.sh."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="sizes that mean nothing")
    options = parser.parse_args()
    device = torch.device(options.device)
    shape = (2, 8, 4, 4) if options.toy else (256, 256, 28, 28)  # 98 MiB in bfloat16
    facts: dict[str, Any] = {"versions": versions(), "device": name(device), "shape": shape, "toy": options.toy}
    facts["copy"] = copy_rate(shape, device)
    facts["batch norm"] = [
        batch_norm(shape, dtype, memory_format, cudnn, device)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for memory_format in (torch.contiguous_format, torch.channels_last)
        for cudnn in ((True, False) if device.type == "cuda" else (False,))
    ]
    facts["launch"] = launches(device)
    facts["compiled batch norm, relu"] = compiled(shape, device, options.toy)
    facts["batch renorm with triton"] = [
        renorm(shape, dtype, memory_format, backwards, device)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for memory_format in (torch.contiguous_format, torch.channels_last)
        for backwards in (False, True)
    ]
    facts["compile recomputes r, d from updated averages"] = compile_trap(device, options.toy)
    print(json.dumps(facts, indent=1))


def versions() -> dict[str, str | None]:
    try:
        import triton

        found = triton.__version__
    except ImportError:
        found = None
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {"torch": torch.__version__, "triton": found, "cuda": torch.version.cuda, "cudnn": cudnn and str(cudnn)}


def name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def milliseconds(run: Callable[[], Any], device: torch.device, rounds: int = 30) -> float:
    """The median time of one call, on the device's own clock where it has one."""
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds if device.type == "cuda" else 3):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # Something to do while the launches queue up: host time would be measured otherwise.
            torch.cuda._sleep(200_000)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            began = time.perf_counter()
            run()
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def copy_rate(shape: tuple[int, ...], device: torch.device) -> dict[str, float]:
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    ms = milliseconds(lambda: y.copy_(x), device)
    return {"ms": ms, "GB/s read and written": 2 * x.nbytes / ms / 1e6}


def batch_norm(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, cudnn: bool, device: torch.device
) -> dict[str, Any]:
    x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    cotangent = torch.randn_like(x)
    layer = nn.BatchNorm2d(shape[1], device=device)

    def both() -> None:
        torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), cotangent)

    with torch.backends.cudnn.flags(enabled=cudnn):
        kernels = kernel_names(both, device)
        forward, whole = milliseconds(lambda: layer(x), device), milliseconds(both, device)
    # Statistics and transform read x twice and write y; the backward reads x and its gradient twice and writes one.
    rates = {"forward GB/s (3B)": 3 * x.nbytes / forward / 1e6, "both GB/s (8B)": 8 * x.nbytes / whole / 1e6}
    layout = "channels_last" if memory_format == torch.channels_last else "NCHW"
    head = {"dtype": str(dtype).removeprefix("torch."), "layout": layout, "cudnn": cudnn}
    return {**head, "forward ms": forward, "both ms": whole, **rates, "kernels": kernels}


def renorm(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    backwards: bool,
    device: torch.device,
) -> dict[str, Any]:
    """The layer by Triton's kernels, the second passes from the end backwards or forwards."""
    from batchrenorm import BatchRenorm2d
    from batchrenorm.backends import triton

    x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    layout = "channels_last" if memory_format == torch.channels_last else "NCHW"
    head = {"dtype": str(dtype).removeprefix("torch."), "layout": layout, "second pass reversed": backwards}
    if device.type != "cuda" or triton.refusal(x) is not None:
        return {**head, "refused": triton.refusal(x)}
    cotangent = torch.randn_like(x)
    layer = BatchRenorm2d(shape[1], device=device)

    def both() -> None:
        torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), cotangent)

    before = triton.REVERSED
    triton.REVERSED = backwards
    try:
        kernels = kernel_names(both, device)
        forward, whole = milliseconds(lambda: layer(x), device), milliseconds(both, device)
    finally:
        triton.REVERSED = before
    rates = {"forward GB/s (3B)": 3 * x.nbytes / forward / 1e6, "both GB/s (8B)": 8 * x.nbytes / whole / 1e6}
    return {**head, "forward ms": forward, "both ms": whole, **rates, "kernels": kernels, **host_time(layer)}


def host_time(layer: nn.Module) -> dict[str, float]:
    """Microseconds of the host for a training forward of a layer on almost no data, beside batch norm's."""
    found = {}
    channels = layer.num_features
    x = torch.randn(2, channels, 4, 4, device=next(layer.parameters()).device, requires_grad=True)
    for label, module in (("renorm", layer), ("batch norm", nn.BatchNorm2d(channels, device=x.device))):
        for _ in range(20):
            module(x)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(300):
            module(x)
        found[f"host us of a small forward, {label}"] = (time.perf_counter() - began) / 300 * 1e6
        torch.cuda.synchronize()
    return found


def kernel_names(run: Callable[[], Any], device: torch.device) -> list[str]:
    if device.type != "cuda":
        return []
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return [f"{event.key[:120]} x{event.count}" for event in profile.key_averages()]


def launches(device: torch.device) -> dict[str, float]:
    """Microseconds of host time for an operator on a vector, alone and in a replayed graph."""
    x = torch.ones(64, device=device)
    n = 1000

    def many() -> None:
        for _ in range(n):
            x.mul_(1.0)

    many()
    began = time.perf_counter()
    many()
    if device.type == "cuda":
        torch.cuda.synchronize()
    found = {"us per operator": (time.perf_counter() - began) * 1e6 / n}
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            many()
        graph.replay()
        found["us per operator in a graph"] = milliseconds(graph.replay, device) * 1e3 / n
    return found


def compiled(shape: tuple[int, ...], device: torch.device, toy: bool) -> dict[str, float]:
    if toy and device.type != "cuda":
        return {}
    layer = nn.BatchNorm2d(shape[1], device=device)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    cotangent, other = torch.randn_like(x), torch.randn_like(x)
    found = {}
    for label, function in (
        ("bn", lambda x: layer(x)),
        ("bn, relu", lambda x: F.relu(layer(x))),
        ("bn, add, relu", lambda x: F.relu(layer(x) + other)),
    ):
        fast = torch.compile(function)

        def both(fast: Callable[[Any], Any] = fast) -> None:
            torch.autograd.grad(fast(x), (x, layer.weight, layer.bias), cotangent)

        found[f"{label}: both ms"] = milliseconds(both, device)
    return found


def compile_trap(device: torch.device, toy: bool) -> dict[str, float] | None:
    """The largest relative error of a compiled gradient when r and d are plain operators, as most would write them."""
    if toy and device.type != "cuda":
        return None
    mu, sigma = torch.zeros(8, device=device), torch.ones(8, device=device)

    def naive(x: torch.Tensor) -> torch.Tensor:
        var, mean = torch.var_mean(x, 0, correction=0)
        std = (var + 1e-5).sqrt()
        r, d = (std / sigma).detach().clamp(1 / 3, 3), ((mean - mu) / sigma).detach().clamp(-5, 5)
        y = (x - mean) / std * r + d
        with torch.no_grad():
            mu.lerp_(mean, 0.3)
            sigma.lerp_(std, 0.3)
        return y.sin()

    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 8, generator=generator) * 3 + 1).to(device).requires_grad_()
    cotangent = torch.randn(64, 8, generator=generator).to(device)
    gradients = []
    for function in (naive, torch.compile(naive)):
        mu.zero_()
        sigma.fill_(1.0)
        gradients.append(torch.autograd.grad(function(x), x, cotangent)[0])
    eager, fast = gradients
    return {"relative error": ((eager - fast).abs().max() / eager.abs().max()).item()}


if __name__ == "__main__":
    main()
