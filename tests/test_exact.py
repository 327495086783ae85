"""y, dx, dgamma, dbeta, mu and sigma against the NumPy oracle, through all phases of a schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn

import batchrenorm as brn
from batchrenorm import reference
from batchrenorm.backends import aten

EPS = 1e-5
# Step 0 and 1 are warm-up, 2 to 4 opening, from 5 on all is open.
SCHEDULE = {"r_max": 1.5, "d_max": 0.7, "warmup": 1, "d_full": 4, "r_full": 5}
STEPS = 7
SHAPES: dict[str, tuple[int, ...]] = {
    "2d": (10, 5),
    "2d_one_channel": (7, 1),
    "2d_wide": (34, 17),
    "3d": (3, 7, 5),
    "4d": (5, 6, 3, 7),
    "4d_one_channel": (3, 1, 5, 5),
    "4d_one_sample": (1, 4, 5, 3),
    "4d_one_pixel": (6, 5, 1, 1),
    "4d_vectors": (4, 16, 8, 8),
    "5d": (3, 5, 2, 3, 4),
}
# Larger than what ATen's shorter way is for, and the real thing.
LARGE = (8, 20, 15, 17)


# Every layout takes a contiguous tensor and gives one of the same shape; all but "expanded" of the same values.
def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.ndim])


def _sliced(x: Tensor) -> Tensor:
    larger = torch.full([n + 2 for n in x.shape], torch.nan, dtype=x.dtype)
    view = larger[tuple(slice(1, -1) for _ in x.shape)]
    return view.copy_(x)


def _strided(x: Tensor) -> Tensor:
    larger = torch.full((2 * x.shape[0], *x.shape[1:]), torch.nan, dtype=x.dtype)
    return larger[::2].copy_(x)


def _transposed(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def _expanded(x: Tensor) -> Tensor:
    return x[:, :1].expand(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": _channels_last,
    "sliced": _sliced,
    "strided": _strided,
    "transposed": _transposed,
    "expanded": _expanded,
}


def has_layout(layout: str, shape: tuple[int, ...]) -> bool:
    return layout != "channels_last" or len(shape) > 3


def minibatch(shape: tuple[int, ...], step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x and a random cotangent; every channel has its own mean and size, and both wander from step to step."""
    generator = torch.Generator().manual_seed(1_000 * step + len(shape))
    C = shape[1]
    channel = (1, C) + (1,) * (len(shape) - 2)
    mean = torch.randn(C, generator=generator, dtype=torch.float64) * 1.5
    size = torch.exp(torch.randn(C, generator=generator, dtype=torch.float64) * 0.7)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * size.view(channel) + mean.view(channel)
    dy = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), dy.to(dtype)


def parameters(C: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(C)
    weight = torch.randn(C, generator=generator, dtype=torch.float64) + 0.5
    bias = torch.randn(C, generator=generator, dtype=torch.float64)
    return weight.to(dtype), bias.to(dtype)


def random_mask(shape: tuple[int, ...], step: int) -> Tensor:
    mask = torch.rand((shape[0], *shape[2:]), generator=torch.Generator().manual_seed(step)) < 0.7
    # Two real elements in the first and in the last sample, so that no microbatch is without.
    mask[0].fill_(True)
    mask[-1].fill_(True)
    return mask


def array(t: Tensor) -> oracle.Array:
    return t.detach().double().numpy()


@dataclass
class Averages:
    """The oracle's and the implementation's, step by step."""

    C: int
    dtype: torch.dtype = torch.float64
    mu: oracle.Array = field(init=False)
    sigma: oracle.Array = field(init=False)
    mean: Tensor = field(init=False)
    var: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mu, self.sigma = np.zeros(self.C), np.full(self.C, np.sqrt(1 + EPS))
        self.mean, self.var = torch.zeros(self.C, dtype=self.dtype), torch.ones(self.C, dtype=self.dtype)


def check(
    results: dict[str, Tensor], truth: oracle.Step, dy: oracle.Array, bias: Tensor | None, dtype: torch.dtype
) -> None:
    expected = dict(zip(("dx", "dgamma", "dbeta"), oracle.backward(truth, dy)))
    expected |= {"y": truth.y, "mu": truth.mu, "sigma": truth.sigma}
    scales = oracle.terms(truth, dy, None if bias is None else array(bias))
    tolerance = oracle.RELATIVE[str(dtype).removeprefix("torch.")]
    for name, value in results.items():
        assert value.dtype == dtype, name
        worst = oracle.error(array(value), expected[name], scales[name]).max()
        assert worst <= tolerance, f"{name}: relative error {worst:.1e}"


def train_functional(
    x: Tensor,
    dy: Tensor,
    averages: Averages,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    step: int,
    schedule: dict[str, Any] = SCHEDULE,
    tensor_limits: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """One step of `batch_renorm`; all results by the letters of the paper."""
    r_max, d_max = brn.ClipSchedule(**schedule)(torch.tensor(step) if tensor_limits else step)
    x = x.detach().requires_grad_()
    weight = None if weight is None else weight.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    y = brn.batch_renorm(
        x, averages.mean, averages.var, weight, bias, training=True, r_max=r_max, d_max=d_max, eps=EPS, **options
    )
    assert y.shape == x.shape
    inputs = {"dx": x, "dgamma": weight, "dbeta": bias}
    inputs = {name: t for name, t in inputs.items() if t is not None}
    gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    return {
        "y": y,
        **dict(zip(inputs, gradients)),
        "mu": averages.mean,
        "sigma": (averages.var + EPS).sqrt(),
    }


def run(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    layout: str = "contiguous",
    cotangent: str = "contiguous",
    weighted: bool = True,
    biased: bool = True,
    masked: bool = False,
    microbatch_size: int | None = None,
    momentum: float | None = 0.3,
    **options: Any,
) -> list[oracle.Step]:
    """STEPS steps, each compared with the oracle's, which has its own averages and its own schedule."""
    averages = Averages(shape[1], dtype)
    weight, bias = parameters(shape[1], dtype)
    truths = []
    for step in range(STEPS):
        x, dy = minibatch(shape, step, dtype)
        x, dy = LAYOUTS[layout](x), LAYOUTS[cotangent](dy)
        mask = random_mask(shape, step) if masked else None
        alpha = 1 / (step + 1) if momentum is None else momentum
        r_max, d_max = oracle.limits(step, **SCHEDULE)
        truth = oracle.train(
            array(x),
            averages.mu,
            averages.sigma,
            array(weight) if weighted else None,
            array(bias) if biased else None,
            alpha=alpha,
            r_max=r_max,
            d_max=d_max,
            microbatch=microbatch_size,
            mask=None if mask is None else mask.numpy(),
        )
        results = train_functional(
            x,
            dy,
            averages,
            weight if weighted else None,
            bias if biased else None,
            step=step,
            momentum=alpha,
            microbatch_size=microbatch_size,
            mask=mask,
            **options,
        )
        check(results, truth, array(dy), bias if biased else None, dtype)
        averages.mu, averages.sigma = truth.mu, truth.sigma
        truths.append(truth)
    return truths


def test_uninitialised_memory_is_poisoned() -> None:
    """The fixture in conftest.py works for code of the package, and for that alone."""
    source = "import torch\ndef f(x): return (torch.empty(3), torch.empty_like(x), x.new_empty(3), "
    source += "torch.empty_strided((2,), (1,)), torch.empty(2, dtype=torch.long))"
    inside: dict[str, Any] = {"__name__": "batchrenorm.backends.new"}
    exec(source, inside)
    *floating, integer = inside["f"](torch.zeros(3))
    assert all(t.isnan().all() for t in floating)
    assert integer.tolist() == [2**63 - 1] * 2
    outside: dict[str, Any] = {"__name__": "elsewhere"}
    exec(source, outside)
    assert not all(t.isnan().all() for t in outside["f"](torch.zeros(3))[:4])
    # And the layers do allocate: the name of a layer's history is never read.
    assert brn.BatchRenorm1d(3)._layer.isnan().all()


def test_phases_occur() -> None:
    """The data do what the tests below rely on: r and d are off, then partly clipped on each side, partly not."""
    truths = run(SHAPES["4d"], torch.float64)
    r, d = (np.stack([getattr(t.groups[0], name) for t in truths]) for name in "rd")
    assert (r[:2] == 1).all()
    assert (d[:2] == 0).all()
    for values, limit in ((np.log(r[5:]), np.log(1.5)), (d[5:], 0.7)):
        clipped = np.isclose(np.abs(values), limit)
        assert 0.1 < clipped.mean() < 0.9
        assert values[clipped].min() < 0 < values[clipped].max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    run(shape, dtype, backend=backend)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("microbatch_size", [None, 2, 3])
def test_large(layout: str, microbatch_size: int | None) -> None:
    """Nothing patched."""
    assert np.prod(LARGE) > aten._SMALL
    run(LARGE, torch.float32, layout=layout, microbatch_size=microbatch_size)
    run(LARGE, torch.float64, layout=layout, cotangent=layout, microbatch_size=microbatch_size)


@pytest.mark.parametrize("side", [256, 1024])
@pytest.mark.parametrize("offset", [0.0, 1.9])
def test_large_planes(side: int, offset: float) -> None:
    """Sums over a million values of one sample, where running sums in float32 would show."""
    x = torch.randn(2 if side == 256 else 1, 2, side, side) + offset
    mean, var, _ = aten.moments(x, 0.0, len(x))
    truth = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    # sigma, and so y, is off by half of what the variance is: the 1e-5.
    torch.testing.assert_close(var.double(), truth[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), truth[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", ["2d", "3d", "4d", "4d_one_channel", "4d_vectors", "5d"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(shape: str, layout: str, dtype: torch.dtype, backend: str) -> None:
    """Of x, of the cotangent and of both."""
    if not has_layout(layout, SHAPES[shape]):
        pytest.skip("channels_last is of rank 4 and 5")
    run(SHAPES[shape], dtype, layout=layout, backend=backend)
    run(SHAPES[shape], dtype, cotangent=layout, backend=backend)
    run(SHAPES[shape], dtype, layout=layout, cotangent=layout, backend=backend)


@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_weight_and_bias_are_independent(
    weighted: bool, biased: bool, microbatch_size: int | None, backend: str
) -> None:
    run(SHAPES["4d"], torch.float64, weighted=weighted, biased=biased, microbatch_size=microbatch_size, backend=backend)


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_gradient_of_one_input_alone(needed: str, backend: str) -> None:
    """Backward kernels are told what is needed; each alone is what it is among all."""
    x, dy = minibatch(SHAPES["4d"], 0)
    inputs = {"x": x, **dict(zip(("weight", "bias"), parameters(x.shape[1])))}

    def gradient(*names: str) -> Tensor:
        leaves = {name: t.clone().requires_grad_(name in names) for name, t in inputs.items()}
        averages = Averages(x.shape[1])
        y = brn.batch_renorm(
            leaves["x"],
            averages.mean,
            averages.var,
            leaves["weight"],
            leaves["bias"],
            training=True,
            backend=backend,
        )
        return torch.autograd.grad(y, leaves[needed], dy)[0]

    assert torch.equal(gradient(needed), gradient("x", "weight", "bias"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize(
    ("shape", "microbatch_size"),
    [
        ((8, 5, 3, 4), 2),
        ((8, 5, 3, 4), 4),
        ((7, 5, 3, 4), 3),  # a last one of 1 sample, which has 12 values per channel
        ((5, 3, 4, 2), 1),
        ((5, 3, 4, 2), 9),  # larger than the minibatch
        ((8, 1, 3, 3), 4),
        ((6, 3, 2, 3, 2), 4),
        ((11, 6), 3),
        ((9, 4, 3), 2),
    ],
)
def test_microbatches(shape: tuple[int, ...], microbatch_size: int, layout: str, backend: str) -> None:
    """r and d of their own, from the averages before the step, and one update by the mean over the microbatches."""
    if not has_layout(layout, shape):
        pytest.skip("channels_last is of rank 4 and 5")
    run(shape, torch.float64, microbatch_size=microbatch_size, layout=layout, cotangent=layout, backend=backend)
    run(shape, torch.float32, microbatch_size=microbatch_size, layout=layout, backend=backend)


def test_microbatches_differ_in_r_and_d() -> None:
    """The trap of TensorFlow's virtual_batch_size: one r and d for all. The data would show it."""
    groups = run((8, 5, 3, 4), torch.float64, microbatch_size=2)[-1].groups
    assert np.ptp([g.r for g in groups], axis=0).max() > 0.1
    assert np.ptp([g.d for g in groups], axis=0).max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("microbatch_size", [None, 2, 4])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", ["2d", "3d", "4d", "4d_one_channel", "5d"])
def test_masks(shape: str, layout: str, microbatch_size: int | None, dtype: torch.dtype) -> None:
    if not has_layout(layout, SHAPES[shape]):
        pytest.skip("channels_last is of rank 4 and 5")
    run(SHAPES[shape], dtype, masked=True, layout=layout, microbatch_size=microbatch_size)


def test_mask_of_all_true_is_no_mask(cpu: str) -> None:
    for shape in SHAPES.values():
        x, dy = minibatch(shape, 0)
        mask = torch.ones((shape[0], *shape[2:]), dtype=torch.bool)
        one, other = Averages(shape[1]), Averages(shape[1])
        with_mask = train_functional(x, dy, one, *parameters(shape[1]), step=5, mask=mask)
        without = train_functional(x, dy, other, *parameters(shape[1]), step=5)
        for name in without:
            torch.testing.assert_close(with_mask[name], without[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("padding", [torch.nan, torch.inf, 1e30])
def test_what_is_masked_reaches_no_statistic_and_no_gradient(padding: float) -> None:
    """Padding may be anything, NaN too: real elements, averages and all their gradients do not notice."""
    shape = SHAPES["4d"]
    x, dy = minibatch(shape, 3)
    mask = random_mask(shape, 3)
    dy = dy * mask.unsqueeze(1)
    results = []
    for fill in (0.0, padding):
        averages = Averages(shape[1])
        filled = torch.where(mask.unsqueeze(1), x, fill)
        result = train_functional(filled, dy, averages, *parameters(shape[1]), step=5, mask=mask, microbatch_size=2)
        result["y"] = torch.where(mask.unsqueeze(1), result["y"], 0)
        results.append(result)
    for name in results[0]:
        # 0 times a finite padding is 0, so the sums are the same sums.
        assert torch.equal(results[0][name], results[1][name]), name


def test_microbatch_of_padding_alone_has_no_say() -> None:
    """It has no mean to tell; the other microbatches share the update, and with none of them the averages stay."""
    x, dy = minibatch((6, 4), 0)
    mask = torch.tensor([True, True, False, False, True, True])
    averages, expected = Averages(4), Averages(4)
    result = train_functional(x, dy, averages, None, None, step=5, mask=mask, microbatch_size=2, momentum=0.3)
    train_functional(x[mask], dy[mask], expected, None, None, step=5, microbatch_size=2, momentum=0.3)
    torch.testing.assert_close(averages.mean, expected.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(averages.var, expected.var, rtol=1e-12, atol=0)
    assert all(t.isfinite().all() for t in result.values())
    before = averages.mean.clone(), averages.var.clone()
    train_functional(x, dy, averages, None, None, step=5, mask=torch.zeros_like(mask), momentum=0.3)
    assert torch.equal(averages.mean, before[0])
    assert torch.equal(averages.var, before[1])


def test_cumulative_average(backend: str) -> None:
    """momentum=None: every step weighs the same."""
    run(SHAPES["4d"], torch.float64, momentum=None, backend=backend)
    layer = brn.BatchRenorm2d(6, momentum=None, dtype=torch.float64)
    means, stds = [], []
    for step in range(5):
        x, _ = minibatch(SHAPES["4d"], step)
        layer(x)
        means.append(array(x).mean((0, 2, 3)))
        stds.append(np.sqrt(array(x).var((0, 2, 3)) + EPS))
        np.testing.assert_allclose(array(layer.running_mean), np.mean(means, 0), rtol=1e-12)
        np.testing.assert_allclose(array(layer.running_std), np.mean(stds, 0), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_limits_and_momentum_as_tensors(dtype: torch.dtype, backend: str) -> None:
    run(SHAPES["4d"], dtype, tensor_limits=True, backend=backend)
    run(SHAPES["4d"], dtype, tensor_limits=True, microbatch_size=2, backend=backend)
    shape = SHAPES["2d"]
    x, dy = minibatch(shape, 0, dtype)
    results = []
    for momentum in (0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)):
        averages = Averages(shape[1], dtype)
        results.append(train_functional(x, dy, averages, None, None, step=5, momentum=momentum, backend=backend))
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


MODULES = {"2d": brn.BatchRenorm1d, "3d": brn.BatchRenorm1d, "4d": brn.BatchRenorm2d, "5d": brn.BatchRenorm3d}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", MODULES)
def test_modules(
    cpu: str, shape: str, dtype: torch.dtype, microbatch_size: int | None, masked: bool, affine: bool
) -> None:
    """The layer brings its own averages, schedule and counter; in inference it normalises by those averages."""
    eps = 1e-3
    C = SHAPES[shape][1]
    for cls in (MODULES[shape], brn.BatchRenorm):
        layer = cls(
            C, eps, 0.3, affine=affine, dtype=dtype, clip=brn.ClipSchedule(**SCHEDULE), microbatch_size=microbatch_size
        )
        weight, bias = parameters(C, dtype)
        if affine:
            layer.load_state_dict({"weight": weight, "bias": bias}, strict=False)
        mu, sigma = np.zeros(C), np.full(C, np.sqrt(1 + eps))
        for step in range(STEPS):
            assert layer.num_batches_tracked == step
            x, dy = minibatch(SHAPES[shape], step, dtype)
            mask = random_mask(SHAPES[shape], step) if masked else None
            gamma_beta = (array(weight), array(bias)) if affine else (None, None)
            r_max, d_max = oracle.limits(step, **SCHEDULE)
            truth = oracle.train(
                array(x), mu, sigma, *gamma_beta, alpha=0.3, eps=eps, r_max=r_max, d_max=d_max,
                microbatch=microbatch_size, mask=None if mask is None else mask.numpy(),
            )  # fmt: skip
            x.requires_grad_()
            layer.zero_grad()
            y = layer(x, mask)
            y.backward(dy)
            results = {"y": y, "dx": x.grad, "mu": layer.running_mean, "sigma": layer.running_std}
            if affine:
                results |= {"dgamma": layer.weight.grad, "dbeta": layer.bias.grad}
            check(results, truth, array(dy), bias if affine else None, dtype)
            mu, sigma = truth.mu, truth.sigma
        layer.eval()
        expected = oracle.inference(array(x), mu, sigma, *gamma_beta)
        scale = oracle.terms(truth, array(dy), array(bias))["y"] + np.abs(mu / sigma)
        tolerance = oracle.RELATIVE[str(dtype).removeprefix("torch.")]
        assert oracle.error(array(layer(x)), expected, scale).max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """`reference.py`, the truth for readers, against the oracle."""
    C = shape[1]
    gamma, beta = parameters(C, dtype)
    mu, sigma = np.zeros(C), np.full(C, np.sqrt(1 + EPS))
    mu_t, sigma_t = torch.zeros(C, dtype=dtype), torch.full((C,), 1 + EPS, dtype=dtype).sqrt()
    for step in range(STEPS):
        x, dy = minibatch(shape, step, dtype)
        r_max, d_max = oracle.limits(step, **SCHEDULE)
        limits = {"r_max": r_max, "d_max": d_max}
        truth = oracle.train(array(x), mu, sigma, array(gamma), array(beta), alpha=0.3, **limits)
        inputs = [t.detach().requires_grad_() for t in (x, gamma, beta)]
        before = mu_t.clone(), sigma_t.clone()
        y, mu_new, sigma_new = reference.batch_renorm(inputs[0], mu_t, sigma_t, *inputs[1:], alpha=0.3, **limits)
        assert torch.equal(mu_t, before[0])
        assert torch.equal(sigma_t, before[1])
        mu_t, sigma_t = mu_new, sigma_new
        gradients = dict(zip(("dx", "dgamma", "dbeta"), torch.autograd.grad(y, inputs, dy)))
        check({"y": y, **gradients, "mu": mu_t, "sigma": sigma_t}, truth, array(dy), beta, dtype)
        mu, sigma = truth.mu, truth.sigma


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_large_offset(layout: str, microbatch_size: int | None, backend: str) -> None:
    """mean/sigma = 1e4 in float32: x itself carries the values to 1e4 * 6e-8 of sigma, so nothing need be lost.

    E[x^2] - E[x]^2 would lose all: 1e8 * 6e-8 of the variance.
    """
    x = LAYOUTS[layout](torch.randn(8, 16, 16, 16) + 1e4)
    dy = torch.randn_like(x)
    averages = Averages(16, torch.float32)
    results = train_functional(x, dy, averages, None, None, step=0, microbatch_size=microbatch_size, backend=backend)
    for group, ours in zip(x.split(microbatch_size or 8), results["y"].split(microbatch_size or 8)):
        assert (ours.std((0, 2, 3), correction=0) - 1).abs().max() < 0.01
        # The mean: 2 x the error of torch's batch norm on the same layout (its channels_last kernel sums 1e4s one by
        # one) plus the rounding of 1e4 to float32, half of 2**-10, in the statistic and in the affine's offset.
        naive = torch.nn.functional.batch_norm(group, None, None, training=True)
        assert ours.mean((0, 2, 3)).abs().max() <= 2 * naive.mean((0, 2, 3)).abs().max() + 2**-10
    truth = oracle.train(
        array(x), averages.mu, averages.sigma, r_max=1.0, d_max=0.0, alpha=0.01, microbatch=microbatch_size
    )
    sigma_B = np.mean([g.sigma_B for g in truth.groups], 0)
    moved = (averages.sigma - array(results["sigma"])) / 0.01
    np.testing.assert_allclose(averages.sigma - moved, sigma_B, rtol=0.01)
    # dx is made of deviations x - mu_B, which are exact differences: to a hundredth, and not to the 1e4-th of a term.
    dx = oracle.backward(truth, array(dy))[0]
    assert np.abs(array(results["dx"]) - dx).max() < 0.01


def _memory_format(x: Tensor) -> tuple[bool, ...]:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.is_contiguous(), x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("masked", [False, True])
def test_dtype_and_memory_format_are_the_inputs(
    cpu: str, layout: str, dtype: torch.dtype, microbatch_size: int | None, training: bool, masked: bool
) -> None:
    for shape in ((4, 6, 3, 5), (6, 3, 4, 2, 3)):
        x, dy = minibatch(shape, 0, dtype)
        x = LAYOUTS[layout](x).requires_grad_()
        layer = brn.BatchRenorm(
            shape[1], microbatch_size=microbatch_size, dtype=dtype if x.dtype == torch.float64 else None
        )
        layer.train(training)
        y = layer(x, random_mask(shape, 0) if masked else None)
        assert y.dtype == dtype
        assert _memory_format(y) == _memory_format(x)
        y.backward(LAYOUTS[layout](dy))
        assert x.grad is not None
        assert x.grad.dtype == dtype
        assert _memory_format(x.grad) == _memory_format(x)


# Half precision: error <= 2 x that of the algorithm computed in that dtype, plus what no result in that dtype can
# avoid, its own rounding: half an ulp, u times the value.
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["2d_wide", "3d", "4d", "4d_vectors", "5d"])
@pytest.mark.parametrize("half_parameters", [False, True])
@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_half(
    shape: str, dtype: torch.dtype, layout: str, backend: str, half_parameters: bool, microbatch_size: int | None
) -> None:
    if not has_layout(layout, SHAPES[shape]):
        pytest.skip("channels_last is of rank 4 and 5")
    u = torch.finfo(dtype).eps / 2
    C = SHAPES[shape][1]
    own = dtype if half_parameters else torch.float32
    # Parameters and averages that are the same numbers in every dtype.
    weight, bias = (p.to(dtype).to(own) for p in parameters(C))
    mean0, var0 = (torch.linspace(-1, 1, C).to(dtype).to(own), torch.linspace(0.5, 2, C).to(dtype).to(own))
    for step in (0, 3, 6):
        x, dy = minibatch(SHAPES[shape], step, dtype)
        r_max, d_max = oracle.limits(step, **SCHEDULE)
        limits = {"r_max": r_max, "d_max": d_max, "alpha": 0.3}
        truth = oracle.train(
            array(x),
            array(mean0),
            np.sqrt(array(var0) + EPS),
            array(weight),
            array(bias),
            microbatch=microbatch_size,
            **limits,
        )
        expected = dict(zip(("dx", "dgamma", "dbeta"), oracle.backward(truth, array(dy))))
        expected |= {"y": truth.y, "mu": truth.mu, "sigma": truth.sigma}

        averages = Averages(C, own)
        averages.mean, averages.var = mean0.clone(), var0.clone()
        options = {"step": step, "momentum": 0.3, "microbatch_size": microbatch_size, "backend": backend}
        ours = train_functional(LAYOUTS[layout](x), dy, averages, weight, bias, **options)
        assert ours["y"].dtype == ours["dx"].dtype == dtype
        assert ours["dgamma"].dtype == ours["dbeta"].dtype == ours["mu"].dtype == own

        naive = _naive_half(x, dy, mean0, var0, weight, bias, microbatch_size, dtype, limits)
        for name, value in expected.items():
            rounding = (u if ours[name].dtype == dtype else torch.finfo(torch.float32).eps) * np.abs(value).max()
            if name == "sigma" and half_parameters:
                # running_var = sigma^2 - eps is what is rounded: |d sigma| = |d var| / (2 sigma), and here sigma
                # from it is rounded in adding eps and in the root.
                rounding = 2.5 * u * np.abs(value).max()
            error = np.abs(array(ours[name]) - value).max()
            allowed = 2 * np.abs(naive[name] - value).max() + rounding
            assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}"


def _naive_half(
    x: Tensor,
    dy: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    microbatch_size: int | None,
    dtype: torch.dtype,
    limits: dict[str, float],
) -> dict[str, oracle.Array]:
    """Algorithm 1 with every number of that dtype."""
    x, weight, bias = (t.to(dtype).detach().requires_grad_() for t in (x, weight, bias))
    mu, sigma = mean.to(dtype), (var.to(dtype) + EPS).sqrt()
    size = microbatch_size or x.shape[0]
    parts = [reference.batch_renorm(p, mu, sigma, weight, bias, **limits) for p in x.split(size)]  # type: ignore[arg-type]
    y = torch.cat([p[0] for p in parts])
    gradients = torch.autograd.grad(y, [x, weight, bias], dy)
    mu, sigma = (torch.stack([p[i] for p in parts]).mean(0) for i in (1, 2))
    return {
        name: array(t) for name, t in zip(("y", "dx", "dgamma", "dbeta", "mu", "sigma"), (y, *gradients, mu, sigma))
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_of_half_input_are_float32(dtype: torch.dtype, backend: str) -> None:
    """The averages, and what the forward keeps for the backward: to float32's rounding, not to half's."""
    shape = (16, 8, 8, 8)
    x, dy = minibatch(shape, 0, dtype)
    x = x + 8  # where rounding a mean to half would show
    averages = Averages(8, torch.float32)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        weight, bias = parameters(8, torch.float32)
        results = train_functional(x, dy, averages, weight, bias, step=6, momentum=1.0, backend=backend)
    mean, std = array(x).mean((0, 2, 3)), np.sqrt(array(x).var((0, 2, 3)) + EPS)
    np.testing.assert_allclose(array(averages.mean), mean, rtol=1e-5)
    np.testing.assert_allclose(array(results["sigma"]), std, rtol=1e-5)
    # Of x and of its size half is right; of everything else float32.
    assert all(t.dtype == torch.float32 for t in saved if t.numel() < x.numel() and t.is_floating_point())
    # With a mean in half, off by u * 8, dgamma would be off by that times sum(dy) / sigma.
    r_max, d_max = oracle.limits(6, **SCHEDULE)
    truth = oracle.train(
        array(x), np.zeros(8), np.full(8, np.sqrt(1 + EPS)), array(weight), array(bias), r_max=r_max, d_max=d_max
    )
    error = np.abs(array(results["dgamma"]) - oracle.backward(truth, array(dy))[1])
    assert (error <= 1e-5 * oracle.terms(truth, array(dy))["dgamma"]).all()
    u = torch.finfo(dtype).eps / 2
    assert (u * 8 * np.abs(array(dy).sum((0, 2, 3))) > 1e-5 * oracle.terms(truth, array(dy))["dgamma"]).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_half_module(cpu: str, dtype: torch.dtype, training: bool) -> None:
    """`.half()` and `.bfloat16()` on a model, which converts parameters and averages but not the counter."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), brn.BatchRenorm2d(8, clip=brn.ClipSchedule.constant())).to(dtype)
    model.train(training)
    x = torch.randn(4, 3, 8, 8, dtype=dtype, requires_grad=True)
    y = model(x)
    y.backward(torch.randn_like(y))
    assert y.dtype == dtype
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
    assert model[1].running_mean.dtype == model[1].running_var.dtype == dtype
    assert model[1].num_batches_tracked.dtype == torch.long
    assert model[1].num_batches_tracked == int(training)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("training", [True, False])
def test_autocast(cpu: str, training: bool, microbatch_size: int | None, masked: bool) -> None:
    """Under autocast the layer gets bfloat16 from a convolution and keeps its own float32; float32 in stays float32."""
    conv = nn.Conv2d(3, 8, 3, padding=1)
    layer = brn.BatchRenorm2d(8, momentum=0.3, clip=brn.ClipSchedule.constant(), microbatch_size=microbatch_size)
    plain = brn.BatchRenorm2d(8, momentum=0.3, clip=brn.ClipSchedule.constant(), microbatch_size=microbatch_size)
    layer.train(training)
    plain.train(training)
    x = torch.randn(4, 3, 5, 5)
    mask = random_mask((4, 3, 5, 5), 0) if masked else None
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = conv(x)
            y = layer(hidden, mask)
        assert hidden.dtype == y.dtype == torch.bfloat16
        y.backward(torch.randn_like(y))
        # the same without autocast around it
        assert torch.equal(plain(hidden.detach(), mask), y)
        assert torch.equal(plain.running_mean, layer.running_mean)
        assert torch.equal(plain.running_var, layer.running_var)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(4, 8, 5, 5), mask).dtype == torch.float32
        plain.load_state_dict(layer.state_dict())
    assert layer.weight.grad.dtype == torch.float32
    assert layer.running_mean.dtype == torch.float32


@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("shape", [(6, 3), (4, 2, 3), (5, 2, 2, 2)], ids=str)
def test_gradcheck(shape: tuple[int, ...], microbatch_size: int | None, backend: str) -> None:
    """Analytic gradients against finite differences, of the function with r and d held at their values.

    Clipped hard, r and d do not move with x, so the function as it is has the derivative that stop_gradient declares.
    """
    C = shape[1]
    x, _ = minibatch(shape, 2)
    inputs = [t.requires_grad_() for t in (x, *parameters(C))]

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, var = torch.full((C,), 30.0, dtype=x.dtype), torch.full((C,), 1e-4, dtype=x.dtype)
        options = {"r_max": 1.3, "d_max": 0.4, "microbatch_size": microbatch_size, "backend": backend}
        return brn.batch_renorm(x, mean, var, weight, bias, training=True, **options)

    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_gradgradcheck(masked: bool) -> None:
    shape = (5, 2, 3)
    x, dy = minibatch(shape, 2)
    mask = random_mask(shape, 0) if masked else None
    inputs = [t.requires_grad_() for t in (x, *parameters(2))]

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, var = torch.full((2,), 30.0, dtype=x.dtype), torch.full((2,), 1e-4, dtype=x.dtype)
        options = {"training": True, "r_max": 1.3, "d_max": 0.4, "mask": mask, "backend": "decomposed"}
        return brn.batch_renorm(x, mean, var, weight, bias, **options)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs, dy.requires_grad_())


@pytest.mark.parametrize("through", ["grad", "backward"])
@pytest.mark.parametrize("dy_requires_grad", [True, False])
def test_double_backward_is_right_or_refused(cpu: str, dy_requires_grad: bool, through: str) -> None:
    """A backend whose backward has no derivative must say so: no gradient penalty may drop out of a loss silently.

    torch's `once_differentiable` does not see to it: it lets a cotangent without requires_grad pass, and its error sits
    on a branch that `torch.autograd.grad` never visits.
    """

    def penalised(backend: str) -> Tensor:
        x, dy = minibatch((6, 3), 0)
        x.requires_grad_()
        dy.requires_grad_(dy_requires_grad)
        averages = Averages(3)
        y = brn.batch_renorm(x, averages.mean, averages.var, training=True, backend=backend)
        (gx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        loss = (y * dy).sum() + gx.pow(3).sum()
        if through == "grad":
            return torch.autograd.grad(loss, x)[0]
        loss.backward()
        return x.grad

    expected = penalised("decomposed")
    try:
        got = penalised("aten")
    except RuntimeError:
        return
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_without_averages_it_is_batch_norm(cpu: str, training: bool) -> None:
    x, dy = minibatch(SHAPES["4d"], 0)
    layer = brn.BatchRenorm2d(6, track_running_stats=False, dtype=torch.float64).train(training)
    norm = nn.BatchNorm2d(6, track_running_stats=False, dtype=torch.float64).train(training)
    for m in (layer, norm):
        with torch.no_grad():
            m.weight.copy_(parameters(6)[0])
            m.bias.copy_(parameters(6)[1])
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = layer(a), norm(b)
    y.backward(dy)
    z.backward(dy)
    assert torch.equal(y, z)
    assert torch.equal(a.grad, b.grad)
    assert torch.equal(layer.weight.grad, norm.weight.grad)
    assert torch.equal(layer.bias.grad, norm.bias.grad)
    with pytest.raises(ValueError, match="both or neither"):
        brn.batch_renorm(x, torch.zeros(6), None, training=True)
