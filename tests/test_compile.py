"""torch.compile: the same numbers as in eager, one graph, no recompilation while the limits move."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import batchrenorm as brn

CLIP = brn.ClipSchedule(2.0, 1.0, warmup=2, d_full=5, r_full=8)


def conv_net(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        brn.BatchRenorm2d(8, momentum=0.3, clip=CLIP, **options),  # type: ignore[arg-type]
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, bias=False),
        brn.BatchRenorm2d(4, momentum=0.3, clip=brn.ClipSchedule.constant(), **options),  # type: ignore[arg-type]
    )


def steps(net: nn.Module, forward: Callable[[Tensor], Tensor], xs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    seen: list[Tensor] = []
    for x in xs:
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        net.zero_grad()
        y = forward(x)
        y.backward(torch.randn(y.shape, generator=generator, dtype=torch.double).to(y.dtype))
        assert x.grad is not None
        seen += [y.detach(), x.grad, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]
    return seen + [b.clone() for b in net.buffers()]


def batches(sizes: list[int], channels_last: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    xs = [torch.randn(n, 3, 9, 7, generator=generator, dtype=torch.double) * (1 + i) + i for i, n in enumerate(sizes)]
    return [x.contiguous(memory_format=torch.channels_last) if channels_last else x for x in xs]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_gradients_equal_eager_while_the_limits_move(backend: str, channels_last: bool) -> None:
    """The trap: r and d recomputed in the backward, from averages that the forward has updated meanwhile."""
    torch._dynamo.reset()
    eager = conv_net().double()
    compiled = copy.deepcopy(eager)
    xs = batches([6] * 10, channels_last)
    expected = steps(eager, eager, xs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = steps(compiled, torch.compile(compiled, backend=backend, fullgraph=True), xs)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"microbatch_size": 2},
        {"microbatch_size": 4},
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": None},
        {"momentum": brn.MomentumSchedule(0.1, 0.7)},
    ],
    ids=str,
)
def test_options(options: dict[str, object]) -> None:
    torch._dynamo.reset()
    eager = brn.BatchRenorm2d(3, **{"momentum": 0.3, "clip": CLIP, **options}).double()  # type: ignore[arg-type]
    compiled = copy.deepcopy(eager)
    xs = batches([6] * 4)
    expected = steps(eager, eager, xs)
    got = steps(compiled, torch.compile(compiled, backend="aot_eager", fullgraph=True), xs)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


def test_dynamic_batch_sizes_in_one_graph() -> None:
    torch._dynamo.reset()
    eager = conv_net().double()
    compiled = copy.deepcopy(eager)
    xs = batches([6, 5, 9, 2])
    expected = steps(eager, eager, xs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = steps(compiled, torch.compile(compiled, backend="aot_eager", fullgraph=True, dynamic=True), xs)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


def test_a_mask() -> None:
    torch._dynamo.reset()
    eager = brn.BatchRenorm1d(4, momentum=0.3, clip=brn.ClipSchedule.constant()).double()
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.randn(5, 4, 7, generator=generator, dtype=torch.double)
        mask = torch.rand(5, 7, generator=generator) > 0.3
        torch.testing.assert_close(run(x, mask), eager(x, mask), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(compiled.running_var, eager.running_var, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_half(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    eager = brn.BatchRenorm2d(3, momentum=0.3, clip=brn.ClipSchedule.constant())
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for x in batches([6] * 3):
        x = x.to(dtype)
        y, expected = run(x), eager(x)
        assert y.dtype == dtype
        assert compiled.running_var is not None
        assert compiled.running_var.dtype == torch.float32
        # Two roundings of the same value may fall to two neighbours: two units in the last place of the largest value.
        slack = 2 * torch.finfo(dtype).eps * float(expected.detach().abs().max())
        torch.testing.assert_close(y, expected, rtol=0, atol=slack)


def test_function_with_moving_limits_as_tensors() -> None:
    torch._dynamo.reset()

    def step(x: Tensor, mean: Tensor, var: Tensor, r_max: Tensor, d_max: Tensor) -> Tensor:
        return brn.batch_renorm(x, mean, var, training=True, r_max=r_max, d_max=d_max, momentum=0.3)

    run = torch.compile(step, backend="aot_eager", fullgraph=True)
    averages = [(torch.zeros(3, dtype=torch.double), torch.ones(3, dtype=torch.double)) for _ in range(2)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i, x in enumerate(batches([4] * 4)):
            limits = torch.tensor(1.0 + i, dtype=torch.double), torch.tensor(0.5 * i, dtype=torch.double)
            expected = step(x, *averages[0], *limits)
            torch.testing.assert_close(run(x, *averages[1], *limits), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(averages[1], averages[0], rtol=1e-12, atol=1e-14)


def test_evaluation_is_batch_norm() -> None:
    torch._dynamo.reset()
    net = conv_net().double()
    xs = batches([6] * 3)
    for x in xs:
        net(x)
    net.eval()
    with torch.no_grad():
        got = torch.compile(net, backend="aot_eager", fullgraph=True)(xs[0])
        torch.testing.assert_close(got, net(xs[0]), rtol=1e-12, atol=1e-12)
