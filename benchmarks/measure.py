"""One case, from its tensors to its rows: time, bytes, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .cases import BYTES, EVAL, FORWARD, TRAIN, Case
from .exactness import Refused, error, inference_truth, inputs, truth
from .implementations import Layer, State, Unavailable, build
from .timing import Call, summarise, time_rounds

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest error of ours, relative to the largest value, on a case that is measured: that of sums over 1e5 values in x's
dtype. The gate before, on small tensors, is far stricter."""


def measure(
    case: Case, *, device: str = "cpu", seconds: float = 5.0, say: Callable[[str], None] = print
) -> Iterator[dict[str, object]]:
    """Every pass of a case with every implementation that can run it, as rows.

    Args:
        case: what to measure.
        device: where.
        seconds: time for each pass, without warm-up.
        say: takes a line for each implementation that is left out.

    Raises:
        Refused: ours is further from float64 than its dtype explains.
    """
    x, dy = inputs(case, device)
    state = State.random(case.shape[1], device)
    layers: dict[str, Layer] = {}
    for name in case.implementations:
        if name == "copy":
            continue
        try:
            layers[name] = build(name, state, x.ndim, x.dtype)
            layers[name].train(x)  # also compiles
        except Unavailable as reason:
            say(f"  {name} left out: {reason}")
        except Exception as error:
            if name.startswith(("bn", "brn")) and not case.compiled:
                raise
            layers.pop(name, None)
            say(f"  {name} left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    base = case.implementations[0]
    if base not in layers:
        return
    facts = _facts(case, x, dy, state, list(layers))
    copied = torch.empty_like(x.detach())
    for direction in case.passes:
        calls = {name: _call(layer, direction, x, dy) for name, layer in layers.items()}
        calls["copy"] = lambda: copied.copy_(x.detach())
        times = summarise(time_rounds(calls, base, seconds, _waiter(device)), base)
        for name, t in times.items():
            row: dict[str, object] = {"case": case.name, "shape": list(case.shape), "dtype": case.dtype}
            row |= {"channels_last": case.channels_last, "pass": direction, "implementation": name, "base": base}
            row |= {"ms": t.ms, "ratio": t.ratio, "ratio_quartiles": list(t.quartiles), "rounds": t.rounds}
            if name != "copy":
                row["copy_share"] = BYTES[direction] / 2 * times["copy"].ms / t.ms
                row |= facts[name, direction == EVAL]
            yield row


def _call(layer: Layer, direction: str, x: Tensor, dy: Tensor) -> Call:
    leaves = [x, *layer.parameters]

    def train() -> object:
        y = layer.train(x)
        # Not y.backward(): that would add to the gradients of the call before, one more pass over dx.
        return torch.autograd.grad(y, leaves, dy if y.dtype == dy.dtype else dy.to(y.dtype))

    def infer() -> object:
        with torch.no_grad():
            return layer.infer(x)

    return {TRAIN: train, FORWARD: lambda: layer.train(x), EVAL: infer}[direction]


def _waiter(device: str) -> Call:
    return (lambda: None) if device == "cpu" else torch.accelerator.synchronize


def _facts(
    case: Case, x: Tensor, dy: Tensor, state: State, names: list[str]
) -> dict[tuple[str, bool], dict[str, object]]:
    """What does not depend on time, by name and by whether it is inference."""
    facts: dict[tuple[str, bool], dict[str, object]] = {}
    truths: dict[tuple[bool, int | None], tuple[Tensor, Tensor]] = {}
    y_inference = None
    for name in names:
        layer = build(name, state, x.ndim, x.dtype)  # the one that is timed has already moved its averages
        saved, y = saved_bytes(lambda: layer.train(x))  # noqa: B023
        (dx,) = torch.autograd.grad(y, [x], dy.to(y.dtype))
        key = (layer.renorm, layer.microbatch)
        if key not in truths:
            truths[key] = truth(x, dy, state, *key)[:2]
        training = {
            "saved": saved / case.nbytes,
            "error_y": error(y, truths[key][0]),
            "error_dx": error(dx, truths[key][1]),
        }
        facts[name, False] = training
        if EVAL in case.passes:
            if y_inference is None:
                y_inference = inference_truth(x, state)
            with torch.no_grad():
                facts[name, True] = {"error_y": error(layer.infer(x), y_inference)}
        if name.startswith("brn"):
            for (_, inference), values in list(facts.items())[-2:]:
                for quantity in ("error_y", "error_dx"):
                    wrong = values.get(quantity, 0.0)
                    if not wrong <= TOLERANCE[case.dtype]:  # type: ignore[operator]
                        mode = "inference" if inference else "training"
                        raise Refused(
                            f"{name} is wrong in {mode} on {case.name!r}: {quantity} {wrong:.1e} against float64, "
                            f"expected at most {TOLERANCE[case.dtype]:.0e}; nothing of this case is printed or recorded"
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
