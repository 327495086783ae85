"""`backends.triton`: on a GPU where there is one, else in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from test_exact import EPS, LAYOUTS, SCHEDULE, STEPS, Averages, array, has_layout, minibatch, parameters
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import batchrenorm as brn
from batchrenorm.backends import triton as passes
from batchrenorm.functional import renormalize

if not passes.installed():
    pytest.skip("needs the extra: pip install 'batchrenorm[triton]'", allow_module_level=True)

# Of NumPy, which the interpreter computes with, where a channel or a limit is not finite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLIP = brn.ClipSchedule(**SCHEDULE)  # type: ignore[arg-type]
OPEN = 6
EPILOGUES = [(None, False), ("relu", False), (None, True), ("relu", True)]

# Half an epsilon, rounded to nearest; but Triton's interpreter cuts a float32 off where bfloat16 ends.
ROUNDING = {
    torch.float32: 0.0,
    torch.float16: torch.finfo(torch.float16).eps / 2,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / (1 if DEVICE == "cpu" else 2),
}


@pytest.fixture(autouse=True)
def _no_counters_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that fails in the interpreter goes no further than its counters were then."""
    monkeypatch.setattr(passes, "_COUNTERS", {})


@pytest.fixture(params=["slab", "splits"])
def division(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the work is divided: small shapes go through what large ones need."""
    if request.param != "slab":
        monkeypatch.setattr(passes, "SLAB", 0)
        monkeypatch.setattr(passes, "TILE", 128)
        monkeypatch.setattr(passes, "CHANNELS", 16)
        monkeypatch.setattr(passes, "PROGRAMS", 12)
    return request.param


def run(
    x: Tensor,
    dy: Tensor,
    averages: Averages,
    weight: Tensor | None,
    bias: Tensor | None,
    t: int = OPEN,
    *,
    residual: Tensor | None = None,
    in_steps: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """One training step; `in_steps` is moments -> correct -> affine, else the kernels do all."""
    averages.mean, averages.var = averages.mean.to(DEVICE), averages.var.to(DEVICE)
    step = torch.tensor(t, device=DEVICE)
    leaves = {"dx": x, "dgamma": weight, "dbeta": bias, "dresidual": residual}
    given = {name: None if v is None else v.detach().to(DEVICE).requires_grad_() for name, v in leaves.items()}
    alpha = torch.tensor(0.3, device=DEVICE) if in_steps else 0.3
    y = renormalize(
        given["dx"], averages.mean, averages.var, step, given["dgamma"], given["dbeta"],
        **{"alpha": alpha, "clip": CLIP, "microbatch_size": None, **options},
        training=True, eps=EPS, r_max=1.0, d_max=0.0, mask=None, process_group=None, residual=given["dresidual"],
        backend="triton",
    )  # fmt: skip
    assert step.item() == t + 1
    there = {name: v for name, v in given.items() if v is not None}
    gradients = torch.autograd.grad(y, list(there.values()), dy.to(DEVICE))
    out = {"y": y.detach(), **dict(zip(there, gradients)), "mu": averages.mean, "sigma": (averages.var + EPS).sqrt()}
    return {name: v.cpu() for name, v in out.items()}


def verify(
    x: Tensor,
    dy: Tensor,
    averages: Averages,
    t: int = OPEN,
    *,
    affine: bool = True,
    activation: str | None = None,
    residual: Tensor | None = None,
    microbatch_size: int | None = None,
    **options: Any,
) -> None:
    """Against the oracle; the averages of both go on."""
    dtype, C = x.dtype, x.shape[1]
    weight, bias = parameters(C, torch.float32) if affine else (None, None)
    r_max, d_max = oracle.limits(t, **SCHEDULE)  # type: ignore[arg-type]
    truth = oracle.train(
        array(x), averages.mu, averages.sigma, None if weight is None else array(weight),
        None if bias is None else array(bias), alpha=0.3, r_max=r_max, d_max=d_max, microbatch=microbatch_size,
    )  # fmt: skip
    extra = 0.0 if residual is None else residual.abs().max().item()
    scales = oracle.terms(truth, array(dy), (np.zeros(C) if bias is None else np.abs(array(bias))) + extra)
    z = truth.y if residual is None else truth.y + array(residual)
    dz = array(dy)
    if activation is not None:
        # Where z is 0 but for rounding either side of the ReLU is right: no gradient there.
        near = np.abs(z) < 1e-4 * scales["y"].reshape(1, -1, *[1] * (x.ndim - 2)) + torch.finfo(dtype).tiny
        dy = torch.where(torch.from_numpy(near), 0, dy)
        dz = array(dy) * (z > 0)
        z = z * (z > 0)
        scales |= {name: v for name, v in oracle.terms(truth, array(dy)).items() if name.startswith("d")}
    expected = dict(zip(("dx", "dgamma", "dbeta"), oracle.backward(truth, dz)))
    expected |= {"y": z, "mu": truth.mu, "sigma": truth.sigma}
    found = run(
        x, dy, averages, weight, bias, t, residual=residual, activation=activation, microbatch_size=microbatch_size,
        **options,
    )  # fmt: skip
    if residual is not None:
        assert torch.equal(found.pop("dresidual"), torch.from_numpy(dz).to(dtype))  # dy with zeros: no arithmetic
    for name, value in found.items():
        half = name in ("y", "dx") and dtype != torch.float32
        assert value.dtype == (dtype if half else torch.float32), name
        # y and dx are rounded once to the dtype, relative to themselves, so to their terms.
        tolerance = oracle.RELATIVE["float32"] + (ROUNDING[dtype] if half else 0.0)
        worst = oracle.error(array(value), expected[name], scales[name]).max()
        assert worst <= tolerance, f"{name}: relative error {worst:.1e} at step {t}"
    averages.mu, averages.sigma = truth.mu, truth.sigma


def rows_or_planes(shape: tuple[int, ...]) -> list[str]:
    return [layout for layout in ("contiguous", "channels_last") if has_layout(layout, shape)]


SMALL = ((10, 5), (7, 1), (5, 33), (3, 7, 5), (5, 3, 3, 7), (6, 5, 1, 1), (3, 3, 7, 7), (2, 16, 4, 4), (3, 5, 2, 3, 2))


@pytest.mark.parametrize("case", range(3 * len(SMALL)))
def test_against_the_oracle(case: int, division: str) -> None:
    """Layouts, dtypes, groups with a ragged last, epilogues, with weight and without, fused and in steps: in turn.

    The interpreter needs a tenth of a second for a launch, so not their product; the numbers of ways are such that
    shapes and the two divisions meet all of a way's values.
    """
    shape, turn = SMALL[case % len(SMALL)], case + (division != "slab")
    dtype = (torch.float32, torch.bfloat16, torch.float16)[case // len(SMALL)]
    layouts = rows_or_planes(shape)
    layout = layouts[turn % len(layouts)]
    activation, add = EPILOGUES[turn % 4]
    x, dy = minibatch(shape, OPEN, dtype)
    residual = LAYOUTS[layout](torch.randn(shape).to(dtype)) if add else None
    # Of two or three values some lie so near to each other that float32 cannot tell dx.
    size = (shape[0] + 1) // 2 if turn // 2 % 2 and shape[0] // 2 * np.prod(shape[2:]) > 3 else None
    verify(
        LAYOUTS[layout](x), LAYOUTS[layout](dy), Averages(shape[1], torch.float32), affine=turn % 5 > 0,
        activation=activation, residual=residual, microbatch_size=size, in_steps=turn % 3 == 0,
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x_and_of_the_others(layout: str) -> None:
    shape = (4, 6, 3, 7)
    for mine, others, (activation, add) in (
        (layout, "contiguous", EPILOGUES[3]),
        ("channels_last", layout, EPILOGUES[2]),
    ):
        x, dy = minibatch(shape, OPEN, torch.float32)
        residual = LAYOUTS[others](torch.randn(shape)) if add and others != "expanded" else None
        dy = dy if others == "expanded" and activation else LAYOUTS[others](dy)
        verify(
            LAYOUTS[mine](x), dy, Averages(6, torch.float32), activation=activation, residual=residual,
            microbatch_size=3,
        )  # fmt: skip


def test_through_all_phases_of_the_schedule(division: str) -> None:
    averages = Averages(6, torch.float32)
    for t in range(STEPS):
        x, dy = minibatch((5, 6, 2, 4), t, torch.float32)
        verify(LAYOUTS["channels_last"](x), dy, averages, t, microbatch_size=3)


@pytest.mark.parametrize(
    "clip",
    [
        brn.ClipSchedule(),
        brn.ClipSchedule.constant(2.0, 1.0),
        brn.ClipSchedule(3.0, 5.0, 1, 1, 1),
        brn.ClipSchedule(float("inf"), float("inf"), 2, 4, 4),
    ],
    ids=str,
)
def test_limits_are_the_schedules(clip: brn.ClipSchedule) -> None:
    """Seen in y: x is far from the averages, so r and d are at their limits."""
    for t in (0, 1, 3, 5_001, 2**40):
        expected, found = (Averages(3, torch.float32) for _ in range(2))
        r_max, d_max = clip(t)
        x = torch.randn(8, 3) * 50 + 900
        y = brn.batch_renorm(
            x, expected.mean, expected.var, training=True, r_max=r_max, d_max=d_max, backend="decomposed"
        )  # fmt: skip
        results = run(x, x, found, None, None, t, clip=clip, alpha=0.01)
        torch.testing.assert_close(results["y"], y, rtol=1e-5, atol=1e-5 * y.abs().max().item())


def test_cumulative_mean() -> None:
    averages = Averages(4, torch.float32)
    xs = [torch.randn(6, 4, 5, 5) + k for k in range(3)]
    for t, x in enumerate(xs):
        run(x, x, averages, None, None, t, alpha=brn.MomentumSchedule(0.0, 1.0))
    torch.testing.assert_close(averages.mean.cpu(), torch.stack(xs).mean((0, 1, 3, 4)), rtol=1e-5, atol=1e-6)


def test_momentum_schedule() -> None:
    """The kernel reads the step itself; the truth is given each weight as a number."""
    schedule = brn.MomentumSchedule(0.05, 0.25)
    found, expected = Averages(4, torch.float32), Averages(4, torch.float32)
    for t in (0, 1, 2, 75, 76, 80, 2**40):
        x = torch.randn(6, 4, 5, 5) + t % 7
        run(x, x, found, None, None, t, alpha=schedule)
        run(x, x, expected, None, None, t, alpha=schedule(t))
        # The kernel has window in float32: alpha is off by 2**-24 of itself, and rounded as much, of values up to 7.
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.var, expected.var, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_offset(layout: str) -> None:
    """Mean / std = 1e4: the exact sums of squares would need twice float32's digits."""
    x = LAYOUTS[layout](torch.randn(6, 5, 7, 9) + 1e4)
    mean, var, std = (v.cpu() for v in passes.moments(x.to(DEVICE), EPS, 6))
    exact = x.double().var((0, 2, 3), correction=0)
    # x itself is rounded to 1e4 * 2**-24 = 6e-4; of these numbers the result is exact to rounding.
    torch.testing.assert_close(var.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=2e-7, atol=0)
    torch.testing.assert_close(std, (var + EPS).sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("value", "size"), [(torch.nan, None), (-torch.inf, 2)])
def test_a_channel_that_is_not_finite_moves_no_average(value: float, size: int | None, division: str) -> None:
    x, dy = minibatch((5, 6, 3, 7), OPEN, torch.float32)
    clean, dirty = Averages(6, torch.float32), Averages(6, torch.float32)
    expected = run(x, dy, clean, None, None, microbatch_size=size)
    x[2, 1, 0, 0] = value
    found = run(x, dy, dirty, None, None, microbatch_size=size)
    assert found["y"][2, 1].isnan().any()
    others = [0, 2, 3, 4, 5]
    for name in ("y", "dx"):
        assert torch.equal(found[name][:, others], expected[name][:, others])
    for name in ("mean", "var"):
        before = getattr(Averages(6, torch.float32), name)
        assert torch.equal(getattr(dirty, name).cpu()[1], before[1])
        assert torch.equal(getattr(dirty, name).cpu()[others], getattr(clean, name).cpu()[others])


def test_relu_passes_nan_and_stops_what_half_precision_rounds_to_zero() -> None:
    x, dy = minibatch((4, 3, 5, 5), OPEN, torch.float16)
    bias = torch.tensor([0.0, 2.0**-26, 1.0])  # the middle one is 0 in float16
    found = run(x, dy, Averages(3, torch.float32), torch.zeros(3), bias, activation="relu")
    assert found["dbeta"][1] == 0
    assert found["dbeta"][0] == 0
    assert found["dbeta"][2] != 0
    x[0, 0, 0, 0] = torch.nan
    assert run(x, dy, Averages(3, torch.float32), None, None, activation="relu")["y"][:, 0].isnan().all()


def test_every_run_gives_the_same_bits(division: str) -> None:
    layout, size = "channels_last", 3
    x, dy = (LAYOUTS[layout](t) for t in minibatch((5, 20, 5, 6), OPEN, torch.bfloat16))
    weight, bias = parameters(20, torch.float32)
    seen = [
        run(x, dy, Averages(20, torch.float32), weight, bias, microbatch_size=size, activation="relu")
        for _ in range(2 if DEVICE == "cpu" else 20)
    ]
    for other in seen[1:]:
        assert all(torch.equal(seen[0][name], other[name]) for name in other)
    assert all(not counters.any() for counters in passes._COUNTERS.values())


class _Scrambled:
    """The interpreter's grid in another order: programs arrive as they like on a GPU."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        from triton.runtime import interpreter

        def launch(*arguments: Any, **options: Any) -> None:
            order = torch.randperm(grid[0]).tolist()
            builder = interpreter.interpreter_builder
            set_index = builder.set_grid_idx
            builder.set_grid_idx = lambda x, y, z: set_index(order[x], y, z)
            try:
                self.kernel[grid](*arguments, **options)
            finally:
                builder.set_grid_idx = set_index

        return launch


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the order is random anyway")
@pytest.mark.parametrize("size", [None, 3])
def test_no_bit_depends_on_which_program_arrives_last(
    size: int | None, division: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, dy = minibatch((4, 20, 3, 5), OPEN, torch.float32)
    x, dy = LAYOUTS["channels_last"](x), LAYOUTS["channels_last"](dy)
    weight, bias = parameters(20, torch.float32)

    def result() -> dict[str, Tensor]:
        return run(x, dy, Averages(20, torch.float32), weight, bias, microbatch_size=size, activation="relu")

    expected = result()
    kernels = passes._kernels()
    for name in ("statistics", "affine", "sums", "gradient", "forward_in_one", "backward_in_one"):
        monkeypatch.setattr(kernels, name, _Scrambled(getattr(kernels, name)))
    for _ in range(2):
        found = result()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 1), (1, 2)], ids=str)
def test_gradients_of_some(needed: tuple[int, ...], division: str) -> None:
    x, dy = minibatch((5, 6, 3, 7), OPEN, torch.float32)
    tensors = [x, *parameters(6, torch.float32), torch.randn_like(x)]
    gradients = []
    for wanted in (range(4), needed):
        given = [t.detach().to(DEVICE).requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        mean, var = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)
        y = brn.batch_renorm(
            given[0], mean, var, *given[1:3], training=True, residual=given[3], activation="relu", backend="triton"
        )  # fmt: skip
        found = torch.autograd.grad(y, [given[i] for i in wanted], dy.to(DEVICE))
        gradients.append(dict(zip(wanted, found)))
    assert all(torch.equal(gradients[0][i], g) for i, g in gradients[1].items())


def test_second_derivatives_are_plain_operators() -> None:
    results = []
    for backend in ("triton", "decomposed"):
        x = minibatch((5, 6, 3, 7), OPEN, torch.float32)[0].to(DEVICE).requires_grad_()
        mean, var = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)
        y = brn.batch_renorm(x, mean, var, training=True, backend=backend)
        (dx,) = torch.autograd.grad(y, x, y.detach().sin(), create_graph=True)
        (ddx,) = torch.autograd.grad(dx, x, y.detach().cos())
        results.append(ddx)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    """Two forwards pending; the recomputation gets the averages that its forward used, and moves nothing."""
    xs = [minibatch((6, 5, 3, 7), t, torch.float32)[0].to(DEVICE).requires_grad_() for t in range(2)]
    dys = [minibatch((6, 5, 3, 7), t, torch.float32)[1].to(DEVICE) for t in range(2)]
    seen = []
    for again in (False, True):
        mean, var = torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)
        step = torch.tensor(OPEN, device=DEVICE)

        def layer(x: Tensor, mean: Tensor = mean, var: Tensor = var, step: Tensor = step) -> Tensor:
            return renormalize(
                x, mean, var, step, None, None, training=True, alpha=0.3, eps=EPS, r_max=1.0, d_max=0.0,
                microbatch_size=4, mask=None, process_group=None, backend="triton", clip=CLIP,
            )  # fmt: skip

        ys = [checkpoint(layer, x, use_reentrant=reentrant) if again else layer(x) for x in xs]
        torch.autograd.backward(ys, dys)
        seen.append([*(x.grad for x in xs), mean, var, step])
        for x in xs:
            x.grad = None
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_saved_for_backward() -> None:
    """x, with a ReLU too; and the output only where a residual comes before the ReLU."""
    for activation, add, expected in ((None, False, 1), ("relu", False, 1), (None, True, 1), ("relu", True, 2)):
        x = torch.randn(4, 5, 3, 7, device=DEVICE, requires_grad=True)
        mean, var = torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)
        residual = torch.randn_like(x) if add else None
        y = brn.batch_renorm(
            x, mean, var, training=True, activation=activation, residual=residual, backend="triton"
        )  # fmt: skip
        node = y.grad_fn
        assert node is not None
        assert sum(t is not None and t.numel() == x.numel() for t in node.saved_tensors) == expected  # type: ignore[attr-defined]


def test_what_it_refuses() -> None:
    mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    x = torch.randn(4, 3, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"backend='triton' can do, got this: x of torch.float64; use backend=None"):
        brn.batch_renorm(x.double(), mean, var, training=True, backend="triton")
    mask = torch.ones(4, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="expected mask=None with backend='triton'"):
        brn.batch_renorm(x, mean, var, training=True, mask=mask, backend="triton")
    with pytest.raises(RuntimeError, match="a compiler, a transform or a mode"):
        torch.func.vmap(lambda v: brn.batch_renorm(v, mean, var, training=True, backend="triton"))(x.expand(2, 4, 3))
    assert torch.equal(mean.cpu(), torch.zeros(3))


def test_division_of_any_size() -> None:
    """Every element of every group belongs to one tile, and large tensors have 64-bit offsets."""
    for N, C, S, size, rows in itertools.product((2, 37, 1024), (1, 3, 64, 2048), (1, 49, 12544), (1, 4, 99), (0, 1)):
        p = passes._divided(N, C, S, min(size, N), bool(rows), 4096, 64, 528)
        elements = min(size, N) * S
        assert p.C == C
        assert p.tiles * p.splits * p.BLOCK_M >= elements > p.tiles * (p.splits - 1) * p.BLOCK_M
        assert (elements * C + 4096 * C >= 2**31) == p.WIDE
        slab = p.slab()
        assert slab is None or (elements <= slab.BLOCK_M and slab.BLOCK_M * slab.BLOCK_C <= passes.SLAB)
    x = torch.randn(5, 3, 4, 4)
    for layout in ("contiguous", "channels_last"):
        given = LAYOUTS[layout](x).to(DEVICE)
        p = passes._Passes.of(given, 2)
        found = []
        for wide in (False, True):
            vectors = p.vectors(given)
            passes._statistics(p._replace(WIDE=wide), given, vectors, EPS, None)
            found.append(vectors[:3])
        assert torch.equal(*found)


def test_importing_the_package_imports_no_triton() -> None:
    script = "import sys, batchrenorm; assert not any(m == 'triton' or m.startswith('triton.') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_compiled_for_a_hopper_gpu() -> None:
    """Without a GPU: 16-byte loads and stores, and nothing spilled. In a process where nothing is interpreted."""
    script = Path(__file__).parent / "offline_compile.py"
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
