"""The layer on an accelerator: `pytest tests/test_device.py --device cuda` (the default where there is one).

Everything here runs on the CPU too, with `--device cpu`: that is how the tests themselves are tried without a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchrenorm as brn
from batchrenorm import functional
from batchrenorm.backends import triton
from batchrenorm.library import LIBRARY

GRADIENTS = ["microbatch", "moving"]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    name = request.config.getoption("--device")
    if name is None:
        name = "cuda" if torch.cuda.is_available() else None
    if name is None:
        pytest.skip("needs a GPU")
    return torch.device(name)


def layer_of(channels: int, device: torch.device, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    layer = brn.BatchRenorm2d(channels, clip=brn.ClipSchedule.constant(1.5, 0.5), momentum=0.3, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.running_mean.normal_(generator=generator).mul_(0.3)
        layer.running_var.uniform_(0.5, 2.0, generator=generator)
        layer.weight.uniform_(0.5, 2.0, generator=generator)
        layer.bias.normal_(generator=generator)
        if layer.gradient == "moving":
            layer.gradient_mean.normal_(generator=generator)
            layer.gradient_slope.normal_(generator=generator)
    return layer.to(device, dtype)


def step(layer: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor, cotangent: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], cotangent)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_against_float64_on_the_cpu(
    device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format, group: int | None, gradient: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(12, 5, 7, 9, generator=generator) * 2 + 3).to(dtype)
    cotangent = torch.randn(12, 5, 7, 9, generator=generator).to(dtype)
    options = {"microbatch_size": group, "gradient": gradient}
    exact = layer_of(5, torch.device("cpu"), torch.float64, **options)
    layer = layer_of(5, device, torch.float64 if dtype == torch.float64 else torch.float32, **options)
    # The same parameters: those of float32.
    exact.load_state_dict(layer.state_dict())
    expected = step(exact, list(exact.parameters()), x.double(), cotangent.double())
    given = x.to(device).contiguous(memory_format=memory_format)
    found = step(layer, list(layer.parameters()), given, cotangent.to(device))
    assert found[0].dtype == dtype
    assert found[0].is_contiguous(memory_format=memory_format)
    # Results are rounded once to the dtype; sums are in float32 at least. A few units in the last place of the largest
    # term (dx cancels among terms of the size of the cotangent times weight * r / sigma, at most 10 here).
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if dtype != torch.float64 else 0.0)
    for a, b in zip(found, expected, strict=True):
        scale = 10.0 * max(1.0, b.abs().max().item())
        assert (a.cpu().double() - b).abs().max().item() <= 4 * eps * scale
    # The moving ones are means of terms of the size of the cotangent, or its product with h: 10 at most.
    for name in ("running_mean", "running_var", "gradient_mean", "gradient_slope")[: 4 if gradient == "moving" else 2]:
        a, b = getattr(layer, name).cpu().double(), getattr(exact, name)
        torch.testing.assert_close(a, b, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-6)


def test_oracle(device: torch.device) -> None:
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 1
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    sigma = (var + 1e-5).sqrt().numpy()
    expected = oracle.train(x.numpy(), mean.numpy(), sigma, alpha=0.01, eps=1e-5, r_max=1.5, d_max=0.5)
    y = brn.batch_renorm(x.to(device), mean.to(device), var.to(device), training=True, r_max=1.5, d_max=0.5)
    torch.testing.assert_close(y.cpu(), torch.as_tensor(expected.y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_checkpointing(device: torch.device, reentrant: bool, gradient: str) -> None:
    generator = torch.Generator().manual_seed(0)
    plain, again = layer_of(4, device, gradient=gradient), layer_of(4, device, gradient=gradient)
    xs = [torch.randn(8, 4, 5, 5, generator=generator).to(device).requires_grad_() for _ in range(2)]
    cotangents = [torch.randn(8, 4, 5, 5, generator=generator).to(device) for _ in range(2)]
    expected = [layer(x) for layer in (plain,) for x in xs]
    found = [checkpoint(again, x, use_reentrant=reentrant) for x in xs]
    for layer, ys in ((plain, expected), (again, found)):
        torch.autograd.backward(ys, cotangents)
        gradients = [x.grad.clone() for x in xs] + [p.grad for p in layer.parameters()]
        for x in xs:
            x.grad = None
        ys.append(gradients)
    for a, b in zip(expected.pop(), found.pop(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for a, b in zip(plain.buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.slow
def test_compiled_gradients_are_eager_gradients(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    eager = layer_of(4, device)
    compiled = copy.deepcopy(eager)
    fast = torch.compile(lambda x: torch.sin(compiled(x)), fullgraph=True)
    for _ in range(3):
        x, cotangent = (torch.randn(8, 4, 5, 5, generator=generator).to(device) for _ in range(2))
        expected = step(lambda x: torch.sin(eager(x)), list(eager.parameters()), x, cotangent)
        found = step(fast, list(compiled.parameters()), x, cotangent)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(eager.buffers(), compiled.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_no_synchronisation(device: torch.device, gradient: str) -> None:
    """A training step under the paper's moving limits never waits for the GPU."""
    if device.type != "cuda":
        pytest.skip("only an accelerator can be waited for")
    first, second = (brn.BatchRenorm2d(8, gradient=gradient) for _ in range(2))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), first, nn.ReLU(), second).to(device)
    x = torch.randn(4, 3, 9, 9, device=device)
    net(x).sin().sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        net(x).sin().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("momentum", [None, brn.MomentumSchedule(0.05, 0.25)], ids=str)
def test_weights_of_the_averages_are_those_of_the_step(device: torch.device, momentum: brn.MomentumSchedule) -> None:
    layer, other = layer_of(4, device), layer_of(4, device)
    layer.momentum = momentum
    schedule = brn.MomentumSchedule(0.0, 1.0) if momentum is None else momentum
    for t in range(12):
        other.momentum = schedule(t)
        x = torch.randn(8, 4, 5, 5, device=device) + t
        torch.testing.assert_close(layer(x), other(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.running_mean, other.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.running_var, other.running_var, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_captured_step_equals_eager_step(device: torch.device, gradient: str) -> None:
    if device.type != "cuda":
        pytest.skip("needs CUDA graphs")
    eager, captured = layer_of(4, device, gradient=gradient), layer_of(4, device, gradient=gradient)
    x = torch.randn(8, 4, 5, 5, device=device, requires_grad=True)
    cotangent = torch.randn_like(x)
    state = copy.deepcopy(captured.state_dict())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(captured, list(captured.parameters()), x, cotangent)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(captured(x), [x, *captured.parameters()], cotangent)
    captured.load_state_dict(state)
    for _ in range(3):
        graph.replay()
        expected = step(eager, list(eager.parameters()), x, cotangent)[1:]
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(eager.buffers(), captured.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_more_than_two_to_the_31_elements(device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_properties(device).total_memory < 60 * 2**30:
        pytest.skip("needs a GPU with 60 GiB")
    x = torch.full((2**14 + 1, 8, 128, 128), 1.0, dtype=torch.bfloat16, device=device)
    x[-1] = 3.0
    layer = brn.BatchRenorm2d(8, affine=False, device=device)
    y = layer(x)
    std = ((x[-1, 0, 0, 0].double() - 1) ** 2 * 2**14 / (2**14 + 1) ** 2).sqrt()
    torch.testing.assert_close(y[-1, 0, 0, 0].double(), 2 * 2**14 / (2**14 + 1) / std, rtol=1e-2, atol=0)


def test_the_backend_that_is_chosen(device: torch.device) -> None:
    layer = layer_of(3, device)
    x = torch.randn(4, 3, 5, 5, device=device)
    state = copy.deepcopy(layer.state_dict())
    expected = layer(x)
    for backend in functional.BACKENDS:
        layer.load_state_dict(state)
        if backend == "triton" and triton.refusal(x) is not None:
            continue
        if backend == "native" and (device.type != "cpu" or LIBRARY is None):
            continue  # it raises, which the tests of errors see
        y = brn.batch_renorm(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias,
            training=True, momentum=0.3, r_max=1.5, d_max=0.5, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
