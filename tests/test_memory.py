"""What a layer keeps for its backward and needs at most, in bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import Pool
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import batchrenorm as brn
from batchrenorm.backends import aten
from batchrenorm.library import LIBRARY

SHAPE = (16, 8, 32, 32)
BYTES = 16 * 8 * 32 * 32 * 4
# Vectors: a few dozen of C = 8 numbers at most.
VECTORS = 64 * 8 * 8


class Saved:
    """Counts what autograd keeps: each piece of memory once."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}

    def pack(self, t: Tensor) -> Tensor:
        self.bytes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def saved_by(layer: nn.Module, x: Tensor, *more: Any) -> int:
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
        y = layer(x, *more)
    y.backward(torch.randn_like(y))
    return saved.total


def bytes_of(step: Any) -> tuple[int, int]:
    """What the step has allocated and not yet given back: most at any time, and at its end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        most = max(most, now)
    return most, now


@pytest.fixture(params=["native", "aten"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager, in C and in ATen's way for x that is not small."""
    monkeypatch.setattr(aten, "_SMALL", -1)
    if request.param == "aten":
        monkeypatch.setattr("batchrenorm.backends.native.LIBRARY", None)
    elif LIBRARY is None:
        pytest.skip("the package was installed without a C compiler")


def layer_of(**options: Any) -> nn.Module:
    return brn.BatchRenorm2d(8, clip=brn.ClipSchedule.constant(), **options)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("options", [{}, {"microbatch_size": 4}, {"activation": "relu"}], ids=str)
def test_x_is_all_that_is_kept(options: dict[str, Any]) -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    assert BYTES <= saved_by(layer_of(**options), x) <= BYTES + VECTORS


@pytest.mark.usefixtures("large")
def test_with_a_residual_the_output_serves_as_the_mask() -> None:
    x, residual = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE, requires_grad=True)
    assert saved_by(layer_of(activation="relu"), x, None, residual) <= 2 * BYTES + VECTORS


@pytest.mark.usefixtures("large")
def test_checkpointed_nothing_is_kept() -> None:
    """Between forward and backward live the input and y; without the checkpoint what is between the layers as well."""
    layers = nn.Sequential(layer_of(), layer_of())
    x = torch.randn(SHAPE, requires_grad=True)
    held: list[Tensor] = []
    _, kept = bytes_of(lambda: held.append(checkpoint(layers, x, use_reentrant=False)))
    assert BYTES <= kept <= BYTES + 2 * VECTORS
    _, kept = bytes_of(lambda: held.append(layers(x)))
    assert kept >= 2 * BYTES


@pytest.mark.usefixtures("large")
def test_peak_is_that_of_batch_norm() -> None:
    """y, and in the backward dx; no copy of x."""
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    peaks = []
    for layer in (layer_of(), nn.BatchNorm2d(8)):
        layer(x).backward(dy)  # the gradients' own memory
        peaks.append(bytes_of(lambda layer=layer: torch.autograd.grad(layer(x), x, dy))[0])
    assert peaks[1] >= 2 * BYTES
    assert peaks[0] <= peaks[1] + VECTORS


def of_replicas(group: Any) -> list[int]:
    aten._SMALL = -1
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    layer = layer_of(process_group=group)
    saved = saved_by(layer, x)
    return [saved, bytes_of(lambda: torch.autograd.grad(layer(x), x, dy))[0]]


@pytest.mark.skipif(LIBRARY is None, reason="the package was installed without a C compiler")
def test_replicas_need_no_more(pool: Pool) -> None:
    for saved, peak in pool.run(2, of_replicas):
        assert saved <= BYTES + VECTORS
        assert 2 * BYTES <= peak <= 2 * BYTES + 2 * VECTORS
