"""The package's own C: what its loops, threads, pointers and conversions could get wrong, and doing without it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import oracle
import pytest
import torch
from conftest import NO_LIBRARY
from test_exact import EPS, Averages, array, check, minibatch, parameters, train_functional
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchrenorm as brn
from batchrenorm import correction, library
from batchrenorm.backends import aten, native

needs_library = pytest.mark.skipif(library.LIBRARY is None, reason=NO_LIBRARY)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def step(shape: tuple[int, ...], dtype: torch.dtype, layout: str, size: int | None) -> None:
    """One training step with open limits against the oracle."""
    x, dy = minibatch(shape, 6, dtype)
    if layout == "rows" and len(shape) == 4:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    averages = Averages(shape[1], dtype)
    weight, bias = parameters(shape[1], dtype)
    truth = oracle.train(
        array(x), averages.mu, averages.sigma, array(weight), array(bias), alpha=0.3, r_max=1.5, d_max=0.7,
        microbatch=size,
    )  # fmt: skip
    results = train_functional(
        x, dy, averages, weight, bias, step=6, momentum=0.3, microbatch_size=size, backend="native"
    )
    check(results, truth, array(dy), bias, dtype)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("spatial", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 65, 1023, 1025, 2047, 2049])
def test_planes_of_any_length(spatial: int, dtype: torch.dtype) -> None:
    """Less than a vector, a bit more, and around the blocks."""
    for C in (1, 3, 17):
        step((3, C, spatial, 1), dtype, "planes", None)
        step((5, C, spatial, 2), dtype, "planes", 2)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("C", [1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 23, 31, 33, 1023, 1025, 1040, 2051])
def test_rows_of_any_length(C: int, dtype: torch.dtype) -> None:
    """Less than a vector, less than a pair of them, what steps back, and several chunks of channels."""
    for N, size in ((2, None), (3, None), (13, None), (15, 4), (14, 11)):
        # Of a thousand channels some have two or three values so near to each other that float32 cannot tell dx.
        if N > 3 or C < 100 or dtype == torch.float64:
            step((N, C), dtype, "rows", size)


@needs_library
@pytest.mark.parametrize("N", [127, 128, 129, 255, 257, 3000])
def test_many_rows(N: int) -> None:
    """Around the leaves, and more than a unit."""
    step((N, 70), torch.float32, "rows", None)
    step((N, 70), torch.float32, "rows", 2 * N // 3)  # the last group has fewer parts


@needs_library
@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("size", [None, 3, 5])
def test_channels_in_parts(layout: str, size: int | None, threads: int) -> None:
    """More than a unit holds, so that parts are joined; the last group has fewer of them."""
    step((7, 2, 331, 303), torch.float32, layout, size)


@needs_library
@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [None, 3])
def test_no_bit_depends_on_threads_or_processor(
    layout: str, dtype: torch.dtype, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(8, 37, 40, 41), (2, 3, 400, 401)] if layout == "planes" else [(8, 37, 40, 41), (3002, 70)]
    libraries = sorted(Path(library.__file__).parent.glob("native_*.so"))
    assert libraries
    for shape in shapes:
        x, dy = minibatch(shape, 0, dtype)
        if layout == "rows" and len(shape) == 4:
            x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        assert x.numel() > native._ONE_THREAD
        seen: list[list[Tensor]] = []
        for path in libraries:
            loaded = ctypes.CDLL(str(path))
            loaded.brn_forward.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_char_p]
            monkeypatch.setattr(native, "LIBRARY", loaded)
            for threads in (1, 2, 3):
                before = torch.get_num_threads()
                torch.set_num_threads(threads)
                averages = Averages(shape[1], torch.float32)
                weight, bias = parameters(shape[1], torch.float32)
                results = train_functional(
                    x, dy, averages, weight, bias, step=6, momentum=0.3, microbatch_size=size, backend="native"
                )
                seen.append([t.clone() for t in results.values()])
                torch.set_num_threads(before)
        for other in seen[1:]:
            assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@needs_library
@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_fewer_threads_than_asked_for(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP may give less (OMP_THREAD_LIMIT, a region within another): the threads that come do everything."""
    threads = torch.get_num_threads()
    asked = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def one_comes(work: int, data: int, threads: int, flags: int) -> None:
        asked.append(threads)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)(data)

    number = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 2)
    addresses = tuple(ctypes.cast(f, ctypes.c_void_p).value for f in (one_comes, number))
    monkeypatch.setattr(native, "PARALLEL", addresses)
    torch.set_num_threads(3)
    step((7, 2, 331, 303), torch.float32, layout, None)
    torch.set_num_threads(threads)
    assert 3 in asked


@needs_library
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere torch may use another runtime")
def test_threads_are_torchs_own() -> None:
    """A second OpenMP runtime would bring a second pool of threads, which waits by spinning."""
    assert all(library.PARALLEL)
    script = """
import os, torch, batchrenorm as brn
torch.set_num_threads(3)
x = torch.randn(64, 64, 32, 32)
torch.nn.functional.batch_norm(x, None, None, training=True)
before = len(os.listdir("/proc/self/task"))
assert before >= 3
layer = brn.BatchRenorm2d(64)
layer(x.requires_grad_()).sum().backward()
assert len(os.listdir("/proc/self/task")) <= before + 1, "more threads than torch's and the autograd engine's"
maps = open("/proc/self/maps").read()
assert "native_" in maps
assert len({line.split()[-1] for line in maps.splitlines() if "omp" in line.rsplit("/", 1)[-1]}) == 1
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


class _Forwards(torch.utils.data.Dataset[Tensor]):
    def __init__(self) -> None:
        self.layer = brn.BatchRenorm2d(8)
        self.x = torch.randn(8, 8, 64, 64)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return self.layer(self.x).detach().mean((0, 2, 3))


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_forked_workers() -> None:
    """After a fork the threads of the parent are gone; a worker that waited for them would wait for ever."""
    script = f"""
import sys, torch
sys.path.insert(0, {os.fspath(Path(__file__).parent)!r})
from test_native import _Forwards
torch.set_num_threads(2)
data = _Forwards()
expected = data[0]
loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, timeout=60, multiprocessing_context="fork")
assert all(torch.equal(got, expected) for got in loader)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


@needs_library
def test_calls_from_several_threads() -> None:
    """The lock of the interpreter is free during a call."""
    x = torch.randn(16, 8, 33, 31)
    expected = brn.BatchRenorm2d(8)(x)
    wrong: list[int] = []

    def work(number: int) -> None:
        layer = brn.BatchRenorm2d(8)
        for _ in range(10):
            layer.reset_running_stats()
            if not torch.equal(layer(x), expected):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 5, 7, 9), (6, 21)], ids=str)
def test_pointers_of_any_alignment(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, dy = minibatch(shape, 0, dtype)
    weight, bias = parameters(shape[1], torch.float32)

    def shifted(t: Tensor) -> Tensor:
        memory = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)
        view = memory[1:].view(t.shape).copy_(t)
        assert view.is_contiguous()
        assert view.data_ptr() % 16 != 0
        return view

    results = []
    for move in (torch.clone, shifted):
        averages = Averages(shape[1], torch.float32)
        averages.mean, averages.var = move(averages.mean), move(averages.var)
        results.append(
            train_functional(
                move(x), move(dy), averages, move(weight), move(bias), step=6, momentum=0.3, backend="native"
            )
        )
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# Half precision: every number goes in as it is and comes out rounded as torch rounds.


def _through(x: Tensor, factor: float) -> Tensor:
    """x * factor, computed in float32 by the affine pass."""
    C = x.shape[1]
    zeros, ones = torch.zeros(C), torch.ones(C)
    return native.affine(x, (zeros, ones, ones), 0.0, torch.full((C,), factor), zeros, None, None, len(x))


@needs_library
@pytest.mark.parametrize("layout", ["planes", "rows", "part of a vector"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_numbers(dtype: torch.dtype, layout: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    shape = {"planes": (1, 1, 2**16), "rows": (64, 1024), "part of a vector": (2**14, 4)}[layout]
    x = every.view(shape)
    for factor in (1.0, 0.7, 1.37, 3e-5, 2e4, 1e-38 if dtype == torch.bfloat16 else 2.0**-20):
        y = _through(x, factor)
        expected = (x.float() * factor).to(dtype)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(), expected.nan_to_num())


# Statistics: as exact as float32 inputs allow, in every layout.


@needs_library
@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("offset", [0.0, 3.0, 1e4])
@pytest.mark.parametrize("data", ["normal", "an outlier first", "a ramp", "constant at first"])
def test_statistics_of_many_values(layout: str, offset: float, data: str) -> None:
    """Half a million in a channel. 2e-7 is 3 units of the last place of what is returned."""
    x = torch.randn(2, 2, 512, 512, dtype=torch.float64)
    if data == "an outlier first":
        x[:, :, 0, 0] = 3e3
    elif data == "a ramp":
        x = x * 0.1 + torch.linspace(-5, 5, 512)
    elif data == "constant at first":
        x[:, :, :2] = 4.0
    x = (x + offset).float()
    truth = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    x = x.contiguous(memory_format=torch.channels_last if layout == "rows" else torch.contiguous_format)
    mean, var, _ = native.moments(x, 0.0, len(x))
    # Adding up to 128 deviations of 3e3 sigma leaves what float has of their squares.
    relative = 2e-5 if data == "an outlier first" else 1e-6
    torch.testing.assert_close(var.double(), truth[0], rtol=relative, atol=0)
    assert ((mean.double() - truth[1]).abs() <= 2e-7 * (truth[0].sqrt() + truth[1].abs())).all()


@needs_library
@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("alpha", "r_max", "d_max"), [(0.01, 1.2, 0.4), (0.7, 3.0, 5.0), (0.0, torch.inf, torch.inf), (1.0, 1.0, 0.0)]
)
def test_correction_is_the_one_in_torch_operators(
    alpha: float, r_max: float, d_max: float, dtype: torch.dtype, groups: int
) -> None:
    """With channels that are not finite, constant, or have an average of 0; to a few units of the last place."""
    C, size = 131, 4
    x = torch.randn(size * groups, C, dtype=dtype) * torch.rand(C).exp().to(dtype) + torch.randn(C).to(dtype)
    x[0, 3], x[1, 4], x[:, 6] = torch.nan, torch.inf, 2.5
    mean, var = torch.randn(C, dtype=dtype), torch.rand(C, dtype=dtype)
    var[5] = 0
    statistics = mu_B, _, sigma_B = native.moments(x, EPS, size)
    expected = [mean.clone(), var.clone(), torch.tensor(3)]
    r, d, _, _, move = correction.correct(
        mu_B, sigma_B, *expected, alpha=alpha, eps=EPS, r_max=r_max, d_max=d_max, layer=torch.zeros(1), plain=True
    )
    y = native.affine(x, statistics, EPS, r, d, None, None, size)
    move()
    got = [mean.clone(), var.clone(), torch.tensor(3)]
    z = correction.in_one_call(x, *got, None, None, alpha, EPS, r_max, d_max, size, torch.zeros(1), None, None)
    ulp = torch.finfo(dtype).eps
    for a, b in zip((z, *got), (y, *expected)):
        torch.testing.assert_close(a, b, rtol=8 * ulp, atol=16 * ulp, equal_nan=True)
    for average, before in zip(got, (mean, var)):
        assert torch.equal(average[3:5], before[3:5])


@needs_library
def test_autograd_knows_of_what_is_written() -> None:
    """A graph that has saved the averages must not go on with others."""
    layer = brn.BatchRenorm1d(3)
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * layer.running_mean).sum() + (weight * layer.running_var).sum()
    layer(torch.randn(4, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_library
@pytest.mark.parametrize("microbatch_size", [None, 4])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("shape", [(16, 8), (8, 8, 64, 33)], ids=str)
def test_checkpointing_changes_no_bit_in_float32(
    shape: tuple[int, ...], reentrant: bool, microbatch_size: int | None
) -> None:
    """The forward is one call, its recomputation the separate functions."""
    seen: list[list[Tensor]] = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        layer = brn.BatchRenorm(
            shape[1], momentum=0.3, clip=brn.ClipSchedule.constant(1.2, 0.3), microbatch_size=microbatch_size
        )
        xs = [(torch.randn(shape) * 2 + 1).requires_grad_() for _ in range(3)]
        xs[2].data.copy_(xs[0])  # equal minibatches, which have used other averages
        ys = [torch.tanh(checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)) for x in xs]
        torch.autograd.backward(ys, [torch.randn(shape) for _ in ys])
        seen.append([*ys, *(x.grad for x in xs), *(p.grad for p in layer.parameters()), *layer.buffers()])
    names = ["y"] * 3 + ["dx"] * 3 + ["dweight", "dbias", "mean", "var", "step"]
    for name, a, b in zip(names, *seen, strict=True):
        if name in ("dweight", "dbias"):  # the reentrant kind adds the same gradients up in another order
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(a, b), name


class _Subclass(torch.Tensor):
    pass


@needs_library
@pytest.mark.parametrize("which", ["x", "weight", "running_mean"])
@pytest.mark.parametrize("odd", ["meta", "subclass"])
def test_no_pointer_to_what_is_no_memory(which: str, odd: str) -> None:
    tensors = {"x": torch.randn(6, 3), "running_mean": torch.zeros(3), "weight": torch.ones(3)}
    moved = {"meta": lambda t: t.to("meta"), "subclass": lambda t: t.as_subclass(_Subclass)}[odd](tensors[which])
    tensors[which] = moved
    with pytest.raises(RuntimeError, match=r"expected .*backend='native'.* got .*; use backend=None"):
        brn.batch_renorm(running_var=torch.ones(3), training=True, backend="native", **tensors)
    if odd == "subclass":
        assert brn.batch_renorm(running_var=torch.ones(3), training=True, **tensors).isfinite().all()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As installed without a compiler: another backend is chosen, and asking for this one is an error."""
    monkeypatch.setattr(native, "LIBRARY", None)
    x, dy = minibatch((8, 5, 3, 4), 0, torch.float32)
    results = []
    for backend in (None, "aten"):
        results.append(train_functional(x, dy, Averages(5, torch.float32), None, None, step=6, backend=backend))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    with pytest.raises(RuntimeError, match=r"expected .* got .* without a C compiler; use backend=None"):
        train_functional(x, dy, Averages(5, torch.float32), None, None, step=6, backend="native")


@needs_library
def test_a_library_of_other_sources_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An editable installation whose C has changed since would read other numbers from the same bytes."""
    assert library._load() is not None
    monkeypatch.setattr(library, "PASS", library.STEP)
    assert library._load() is None


@needs_library
def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for module in (native, aten, brn.functional.decomposed):
        name = module.__name__.rsplit(".", 1)[-1]
        monkeypatch.setattr(module, "moments", lambda *a, name=name, f=module.moments: seen.append(name) or f(*a))
    monkeypatch.setattr(brn.functional, "suits_one_call", lambda *a: False)
    layer = brn.BatchRenorm1d(3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        layer(torch.randn(4, 3).to(dtype))
    layer(torch.randn(4, 3), torch.ones(4, dtype=torch.bool))
    assert seen == ["native", "native", "native", "aten", "decomposed"]


@needs_library
def test_in_a_model() -> None:
    """Non-contiguous inputs, shared layers, no gradients: one of each kind of caller, against ATen's results."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), brn.BatchRenorm2d(6, clip=brn.ClipSchedule.constant()), nn.ReLU())
    x = torch.randn(4, 3, 9, 9)
    views = [x, x.transpose(2, 3), x[:, :, ::2], x.contiguous(memory_format=torch.channels_last)[:, :, 1:]]
    outputs = []
    for available in (library.LIBRARY, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "LIBRARY", available)
            net[1].reset_running_stats()
            ys = [net(view) for view in views]
            with torch.no_grad():
                ys.append(net(x))
            net.zero_grad()
            sum((y * y).sum() for y in ys[:4]).backward()
            outputs.append([*ys, *(p.grad.clone() for p in net[1].parameters()), *(b.clone() for b in net.buffers())])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert a.stride() == b.stride()
