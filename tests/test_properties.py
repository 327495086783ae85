"""Any shape, dtype, layout and setting that hypothesis can think of, against the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import batchrenorm as brn
from batchrenorm.backends import aten
from batchrenorm.library import LIBRARY

BACKENDS = ["aten", "decomposed", None, *(["native"] if LIBRARY else [])]
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values from a seed in any order of dimensions, with any gaps between."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    order = draw(st.permutations(range(len(shape))))
    step = draw(st.sampled_from([1, 1, 1, 2, 3]))
    memory = torch.full([shape[i] for i in order[:-1]] + [shape[order[-1]] * step], torch.nan, dtype=dtype)
    view = memory[..., ::step].permute([order.index(i) for i in range(len(shape))])
    assert view.shape == shape
    return view.copy_(x)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.integers(2, 5))
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 6)), *(draw(st.integers(1, 4)) for _ in range(rank - 2)))
    N, C = shape[:2]
    spatial = int(np.prod(shape[2:]))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    size = draw(st.none() | st.integers(1, 10))
    last = N if size is None else N % min(size, N) or min(size, N)
    assume(last * spatial > 1)
    channel = st.lists(st.integers(-128, 128), min_size=C, max_size=C).map(lambda v: torch.tensor(v).double() / 64)
    x = draw(tensors(shape, DTYPES[dtype]))
    x = x.mul_(draw(channel).exp().view(1, C, *[1] * (rank - 2))).add_(draw(channel).view(1, C, *[1] * (rank - 2)))
    mask = None
    if draw(st.booleans()):
        mask = torch.rand((N, *shape[2:]), generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.6
        # Two real elements in every microbatch; fewer is a case of its own in test_exact.py.
        for part in mask.split(size or N):
            part.view(-1)[:2] = True
    return {
        "x": x,
        "dy": draw(tensors(shape, DTYPES[dtype])),
        "mean": draw(channel).to(DTYPES[dtype]),
        "var": draw(channel).exp().to(DTYPES[dtype]),
        "weight": draw(st.none() | channel),
        "bias": draw(st.none() | channel),
        "mask": mask,
        "alpha": draw(st.floats(0, 1)),
        "eps": draw(st.sampled_from([1e-5, 1e-3, 0.1])),
        "r_max": draw(st.sampled_from([1.0, 1.1, 3.0]) | st.floats(1, 100)),
        "d_max": draw(st.sampled_from([0.0, 0.1, 5.0]) | st.floats(0, 100)),
        "microbatch_size": size,
        "small": draw(st.sampled_from([-1, 2**15])),
        "backend": "decomposed" if mask is not None else draw(st.sampled_from(BACKENDS)),
    }


def array(t: Tensor | None) -> oracle.Array | None:
    return None if t is None else t.detach().double().numpy()


@pytest.mark.parametrize("limits_as_tensors", [False, True])
@given(problems())
def test_agrees_with_the_oracle(limits_as_tensors: bool, p: dict[str, Any]) -> None:
    dtype = p["x"].dtype
    weight, bias = (None if p[k] is None else p[k].to(dtype).requires_grad_() for k in ("weight", "bias"))
    truth = oracle.train(
        array(p["x"]),
        array(p["mean"]),
        np.sqrt(array(p["var"]) + p["eps"]),
        array(weight),
        array(bias),
        alpha=p["alpha"],
        eps=p["eps"],
        r_max=p["r_max"],
        d_max=p["d_max"],
        microbatch=p["microbatch_size"],
        mask=None if p["mask"] is None else p["mask"].numpy(),
    )
    expected = dict(zip(("dx", "dgamma", "dbeta"), oracle.backward(truth, array(p["dy"]))))
    expected |= {"y": truth.y, "mu": truth.mu, "sigma": truth.sigma}

    mean, var, x = p["mean"].clone(), p["var"].clone(), p["x"].detach().requires_grad_()
    limits = {k: torch.tensor(p[k], dtype=torch.float64) if limits_as_tensors else p[k] for k in ("r_max", "d_max")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aten, "_SMALL", p["small"])  # as in conftest.py
        y = brn.batch_renorm(
            x, mean, var, weight, bias, training=True, momentum=p["alpha"], eps=p["eps"],
            microbatch_size=p["microbatch_size"], mask=p["mask"], backend=p["backend"], **limits,
        )  # fmt: skip
    leaves = {k: v for k, v in (("dx", x), ("dgamma", weight), ("dbeta", bias)) if v is not None}
    results = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), p["dy"])))
    results |= {"y": y, "mu": mean, "sigma": (var.double() + p["eps"]).sqrt()}

    scales = oracle.terms(truth, array(p["dy"]), array(bias))
    # With few values a channel's sigma_B may by chance be tiny beside its mean: then u |x|, by which x - mu_B and
    # mu_B are off, is no longer small beside sigma_B, for any implementation. Each enters x_hat once and sigma_B once.
    u = torch.finfo(dtype).eps / 2
    lost = 4 * u * np.max([np.abs(g.x).max(0) / g.sigma_B for g in truth.groups], 0)
    for name, value in results.items():
        if name in ("y", "dx", "dgamma", "dbeta"):
            assert value.dtype == dtype
        worst = oracle.error(array(value), expected[name], scales[name])
        assert (worst <= oracle.RELATIVE[str(dtype).removeprefix("torch.")] + lost).all(), f"{name}: {worst}"
    assert y.shape == x.shape


@given(problems())
def test_inference_agrees_with_the_oracle(p: dict[str, Any]) -> None:
    dtype = p["x"].dtype
    weight, bias = (None if p[k] is None else p[k].to(dtype) for k in ("weight", "bias"))
    y = brn.batch_renorm(
        p["x"], p["mean"], p["var"], weight, bias, training=False, eps=p["eps"],
        microbatch_size=p["microbatch_size"], mask=p["mask"],
    )  # fmt: skip
    mu, sigma = array(p["mean"]), np.sqrt(array(p["var"]) + p["eps"])
    expected = oracle.inference(array(p["x"]), mu, sigma, array(weight), array(bias))
    size = np.abs(array(p["x"])).max(tuple(i for i in range(p["x"].ndim) if i != 1)) + np.abs(mu)
    scale = size / sigma * (1 if weight is None else np.abs(array(weight)))
    scale = scale + (0 if bias is None else np.abs(array(bias)))
    assert oracle.error(array(y), expected, scale).max() <= oracle.RELATIVE[str(dtype).removeprefix("torch.")]


@given(
    st.integers(0, 10**7),
    st.floats(1, 1e3),
    st.floats(0, 1e3),
    st.integers(0, 10**5),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
)
def test_schedule(step: int, r_max: float, d_max: float, warmup: int, opening_d: int, opening_r: int) -> None:
    """Within its limits, never closing again, and the same for an int as for a tensor."""
    schedule = brn.ClipSchedule(r_max, d_max, warmup, warmup + opening_d, warmup + opening_r)
    r, d = schedule(step)
    assert 1 <= r <= r_max * (1 + 1e-15)
    assert 0 <= d <= d_max
    later = schedule(step + 1)
    assert later[0] >= r
    assert later[1] >= d
    assert tuple(v.item() for v in schedule(torch.tensor(step))) == (r, d)
    if opening_d > 0 and opening_r > 0:
        expected = oracle.limits(step, r_max, d_max, warmup, warmup + opening_d, warmup + opening_r)
        assert (r, d) == pytest.approx(expected, rel=1e-12, abs=1e-12)
