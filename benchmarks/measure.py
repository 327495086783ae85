"""One case, from its tensors to its rows: time, bytes, launches, errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from batchrenorm import bench
from batchrenorm.backends import native
from batchrenorm.timing import Call, enqueue, events, summarise, time_rounds, wall

from . import gpu
from .cases import BACKWARD, BYTES, EVAL, FORWARD, TRAIN, Case
from .exactness import Inputs, Refused, Truth, error, inference_truth, inputs, some_channels, truth
from .implementations import Layer, State, Unavailable, build

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
"""Largest error of ours, relative to the largest value, on a case that is measured: that of sums over 1e5 values in x's
dtype. The gate before, on small tensors, is far stricter."""
Say = Callable[[str], None]
Row = dict[str, object]


def measure(case: Case, *, device: str = "cpu", seconds: float = 1.0, say: Say = print) -> Iterator[Row]:
    """Every pass of a case with every implementation that can run it, as rows.

    Args:
        case: what to measure.
        device: where.
        seconds: time for each pass, without warm-up.
        say: takes a line for each implementation that is left out.

    Raises:
        Refused: ours is further from float64 than its dtype explains.
    """
    shared: Row = {"case": case.name, "group": case.group, "shape": list(case.shape), "dtype": case.dtype}
    shared |= {"channels_last": case.channels_last, "fused": case.fused, "model": case.model}
    shared |= {"nbytes": case.nbytes, "base": case.implementations[0]}
    for row in (_steps if case.model else _layers)(case, device, seconds, say):
        yield shared | row


def _layers(case: Case, device: str, seconds: float, say: Say) -> Iterator[Row]:
    given = [inputs(case, device, seed) for seed in range(1, 1 + gpu.sets(case.nbytes, device))]
    x = given[0].x
    state = State.random(case.shape[1], device)
    if any("compiled" in name for name in case.implementations):
        torch._dynamo.reset()  # what it compiled for the case before counts towards its limit
    layers: dict[str, Layer] = {}
    for name in case.implementations:
        if name == "copy":
            continue
        try:
            layers[name] = build(name, state, x.ndim, x.dtype, case.fused)
            layers[name].train(x, given[0].residual)  # also compiles
        except Unavailable as reason:
            say(f"  {name} left out: {reason}")
        except Exception as failure:
            if name in ("bn", "bn again", "brn", "brn again", "brn 8x4"):
                raise
            layers.pop(name, None)
            say(f"  {name} left out: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}")
    base = case.implementations[0]
    if base not in layers:
        return
    facts = _facts(case, given[0], state, list(layers), some_channels(case, device))
    for direction in case.passes:
        calls = {name: [_call(layer, direction, some) for some in given] for name, layer in layers.items()}
        # A compiled backward gives its buffers away, so it cannot be run again and again.
        calls = {name: some for name, some in calls.items() if direction != BACKWARD or "compiled" not in name}
        shape = [(torch.empty_like(some.x.detach()), some.x.detach()) for some in given]
        calls["copy"] = [lambda pair=pair: pair[0].copy_(pair[1]) for pair in shape]
        timed = _times(calls, base, seconds, device, say, captured=direction != BACKWARD)
        for name, row in timed.items():
            row |= {"pass": direction, "implementation": name}
            if name != "copy":
                # Of the kernels where they are measured apart from their host.
                key = next(key for key in ("graph_ms", "event_ms", "ms") if key in row and key in timed["copy"])
                row["copy_share"] = BYTES[case.fused][direction] / 2 * timed["copy"][key] / row[key]  # type: ignore
                row |= facts.get((name.removesuffix(" again"), direction), {})
                row |= _profile(calls[name][0], case.nbytes, device)
            if device != "cpu":
                row["cold_l2"] = gpu.is_cold(case.nbytes, device)
            yield row


def _times(
    calls: dict[str, list[Call]], base: str, seconds: float, device: str, say: Say, captured: bool
) -> dict[str, Row]:
    """By the wall clock; on a GPU also by its events, as a replayed graph, and the host's share."""
    turns = {name: gpu.rotating(some) for name, some in calls.items()}
    timed: dict[str, Row] = {}
    for name, t in summarise(time_rounds(turns, base, seconds, wall(device)), base).items():
        timed[name] = {"ms": t.ms, "ratio": t.ratio, "ratio_quartiles": list(t.quartiles), "rounds": t.rounds}
    if torch.device(device).type == "cpu":
        return timed
    for name, t in summarise(time_rounds(turns, base, seconds / 2, events), base).items():
        timed[name] |= {"event_ms": t.ms, "event_ratio": t.ratio}
    for name, t in summarise(time_rounds(turns, base, seconds / 4, enqueue), base).items():
        timed[name]["host_us"] = 1e3 * t.ms
    replays = gpu.graphs(calls, say) if captured else {}
    if base in replays:
        for name, t in summarise(time_rounds(replays, base, seconds / 2, events), base).items():
            timed[name] |= {"graph_ms": t.ms / len(calls[name]), "graph_ratio": t.ratio}
    return timed


def _call(layer: Layer, direction: str, given: Inputs) -> Call:
    leaves = [*given.leaves, *layer.parameters]

    def forward() -> Tensor:
        return layer.train(given.x, given.residual)

    def backward(y: Tensor, again: bool = False) -> object:
        dy = given.dy if y.dtype == given.dy.dtype else given.dy.to(y.dtype)
        # Not y.backward(): that would add to the gradients of the call before, one more pass over dx.
        return torch.autograd.grad(y, leaves, dy, retain_graph=again)

    def infer() -> object:
        with torch.no_grad():
            return layer.infer(given.x, given.residual)

    if direction == BACKWARD:
        y = forward()
        return lambda: backward(y, again=True)
    return {TRAIN: lambda: backward(forward()), FORWARD: forward, EVAL: infer}[direction]


def _facts(case: Case, given: Inputs, state: State, names: list[str], channels: Tensor) -> dict[tuple[str, str], Row]:
    """Bytes kept for the backward and errors, which do not depend on time, by name and pass."""
    facts: dict[tuple[str, str], Row] = {}
    truths: dict[tuple[bool, int | None], Truth] = {}
    y_inference = inference_truth(case, given, state, channels) if EVAL in case.passes else None
    for name in names:
        if name.endswith(" again"):
            continue
        # The one that is timed has already moved its averages.
        layer = build(name, state, given.x.ndim, given.x.dtype, case.fused)
        with torch.no_grad():
            y = None if y_inference is None else layer.infer(given.x, given.residual)
        saved, out = saved_bytes(lambda: layer.train(given.x, given.residual))  # noqa: B023
        key = (layer.renorm, layer.microbatch)
        if key not in truths:
            truths[key] = truth(case, given, state, *key, channels)
        expected = truths[key]
        (dx,) = torch.autograd.grad(out, [given.x], expected.dy.to(out.dtype))
        wrong = {
            "error_y": error(out[:, channels], expected.y),
            "error_dx": error(dx[:, channels], expected.gradients[0]),
        }
        facts[name, TRAIN] = {"saved": saved / case.nbytes, **wrong}
        if y is not None and y_inference is not None:
            facts[name, EVAL] = {"error_y": error(y[:, channels], y_inference)}
        if not name.startswith("brn"):
            continue
        for direction in (TRAIN, EVAL):
            for quantity in ("error_y", "error_dx"):
                value = facts.get((name, direction), {}).get(quantity, 0.0)
                if not value <= TOLERANCE[case.dtype]:  # type: ignore[operator]
                    mode = "inference" if direction == EVAL else "training"
                    raise Refused(
                        f"{name} is wrong in {mode} on {case.name!r}: {quantity} {value:.1e} against float64, expected "
                        f"at most {TOLERANCE[case.dtype]:.0e}; nothing of this case is printed or recorded"
                    )
    return facts


def saved_bytes(forward: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes that autograd keeps for the backward, a storage counted once; and the output."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()
    return sum(storages.values()), y


class _Counted:
    """Stands before the C library and counts what is called, which no profiler of torch sees."""

    def __init__(self, library: object) -> None:
        self.library = library
        self.calls = 0

    def __getattr__(self, name: str) -> object:
        self.calls += 1
        return getattr(self.library, name)


def _profile(call: Call, nbytes: int, device: str) -> Row:
    """Launches, which on the CPU are ATen operators and calls of C, and the peak of memory in sizes of x."""
    if torch.device(device).type != "cpu":
        names = gpu.kernels(call)
        return {"launches": len(names), "kernels": sorted(set(names)), "peak": gpu.peak(call) / nbytes}
    library = native.LIBRARY and _Counted(native.LIBRARY)
    with (
        mock.patch.object(native, "LIBRARY", library),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        call()
    launches = sum(_is_outermost(event) for event in profiler.events())
    held = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return {"launches": launches + (library.calls if library else 0), "peak": highest / nbytes}


def _is_outermost(event: torch.autograd.profiler_util.FunctionEvent) -> bool:
    above = event.cpu_parent
    while above is not None and not above.name.startswith("aten::"):
        above = above.cpu_parent
    return above is None and event.name.startswith("aten::")


def _steps(case: Case, device: str, seconds: float, say: Say) -> Iterator[Row]:
    """A whole training step of a model as it is, again, and converted."""
    # Beside a torch without CUDA the published torchvision imports only after this.
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    import torchvision_shim

    torchvision_shim.allow_torchvision()
    try:
        net = bench.load(f"torchvision:{case.model}")
    except RuntimeError as reason:
        say(f"  left out: {reason}")
        return
    if case.model == "inception_v3" and case.shape[-1] < 299:
        net.aux_logits, net.AuxLogits = False, None  # its head has no room there
    models = dict(zip(("bn", "bn again", "brn"), bench.candidates(net).values()))
    wrong = _error_of_conversion(case, models)
    calls = {
        name: [bench.step(model, case.shape, bench.DTYPES[case.dtype], device, case.channels_last)]
        for name, model in models.items()
    }
    # Some rounds of a large net need their time.
    for name, row in _times(calls, "bn", 8 * seconds, device, say, captured=False).items():
        row |= {"pass": "step", "implementation": name}
        yield row | {"error_y": wrong} | _profile(calls[name][0], case.nbytes, device)


def _error_of_conversion(case: Case, models: dict[str, torch.nn.Module]) -> float:
    """The converted net against the original, in inference; on the CPU, where no convolution rounds to TF32.

    Raises:
        Refused: they differ.
    """
    x = torch.randn(2, *case.shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first, converted = (models[name].eval()(x) for name in ("bn", "brn"))
    wrong = error(converted, first.double())
    if not wrong <= 1e-4:
        raise Refused(f"the converted {case.model} differs from the original in inference by {wrong:.1e}")
    return wrong
