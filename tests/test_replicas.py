"""`process_group=`: a sharded minibatch is the whole one, on real processes."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
from processes import Pool
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchrenorm as brn
from batchrenorm.backends import aten
from batchrenorm.library import LIBRARY

SHARDS = [(3, 5), (4, 0), (0, 6), (1, 7, 2), (3, 0, 2, 1)]
SETTINGS: dict[str, Any] = {"momentum": 0.3, "eps": 1e-5, "r_max": 1.5, "d_max": 0.5}
BACKENDS = ["decomposed", "aten"] + ([] if LIBRARY is None else ["native"])


class Case(NamedTuple):
    backend: str | None
    shape: tuple[int, ...] = (3, 4, 5)  # of x, but for the samples
    dtype: torch.dtype = torch.float64
    channels_last: bool = False
    microbatch: int | None = None
    masked: bool = False
    relu: bool = False
    residual: bool = False


class Batch(NamedTuple):
    x: Tensor
    dy: Tensor
    residual: Tensor
    mask: Tensor
    vectors: list[Tensor]  # mu, var, gamma, beta


def batch_of(case: Case, samples: int) -> Batch:
    """The same in every process."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    C = case.shape[0]
    # The replicas' own means and deviations differ, far more than those of minibatches would.
    x = normal(samples, *case.shape) * 2 + 3 + torch.linspace(-2, 2, samples).view(-1, *[1] * len(case.shape))
    parts = x, normal(*x.shape), normal(*x.shape)
    mask = torch.rand(samples, *case.shape[1:], generator=generator) < 0.7
    vectors = [normal(C) * 0.3 + 2, normal(C).abs() + 0.5, normal(C).abs() + 0.5, normal(C)]
    vectors = [v.to(torch.float64 if case.dtype == torch.float64 else torch.float32) for v in vectors]
    return Batch(*(v.to(case.dtype) for v in parts), mask, vectors)


def step(group: Any, case: Case, shards: tuple[int, ...]) -> dict[str, Any]:
    """One replica's results."""
    rank = dist.get_rank()
    batch = batch_of(case, sum(shards))
    mine = slice(sum(shards[:rank]), sum(shards[: rank + 1]))

    def own(v: Tensor) -> Tensor:
        v = v[mine].clone()
        if case.channels_last:
            v = v.contiguous(memory_format=torch.channels_last)
        return v.requires_grad_()

    x, residual = own(batch.x), own(batch.residual)
    mu, var, gamma, beta = (v.clone() for v in batch.vectors)
    gamma, beta = gamma.requires_grad_(), beta.requires_grad_()
    y = brn.batch_renorm(
        x,
        mu,
        var,
        gamma,
        beta,
        training=True,
        **SETTINGS,
        microbatch_size=case.microbatch,
        mask=batch.mask[mine] if case.masked else None,
        process_group=group,
        activation="relu" if case.relu else None,
        residual=residual if case.residual else None,
        backend=None if case.masked else case.backend,
    )
    wanted = [x, gamma, beta] + ([residual] if case.residual else [])
    gradients = torch.autograd.grad(y, wanted, batch.dy[mine])
    found = dict(zip(("y", "dx", "dgamma", "dbeta", "dresidual", "mu", "var"), [y, *gradients]))
    assert y.stride() == x.stride() or len(y) == 0
    assert y.dtype == x.dtype == gradients[0].dtype
    out = {name: value.detach().double().numpy() for name, value in found.items()}
    return out | {"mu": mu.double().numpy(), "sigma": (var.double() + 1e-5).sqrt().numpy(), "bits": (mu, var)}


def steps(group: Any, cases: list[Case], shards: tuple[int, ...]) -> list[dict[str, Any]]:
    aten._SMALL = -1
    return [step(group, case, shards) for case in cases]


def check(case: Case, shards: tuple[int, ...], replicas: list[dict[str, Any]]) -> None:
    batch = batch_of(case, sum(shards))
    mu, var, gamma, beta = (v.double().numpy() for v in batch.vectors)
    x, dy = batch.x.double().numpy(), batch.dy.double().numpy()
    microbatch: Any = None
    if case.microbatch is not None:
        microbatch = [min(case.microbatch, n - k) for n in shards for k in range(0, n, case.microbatch)]
    truth = oracle.train(
        x,
        mu,
        np.sqrt(var + 1e-5),
        gamma,
        beta,
        alpha=SETTINGS["momentum"],
        r_max=SETTINGS["r_max"],
        d_max=SETTINGS["d_max"],
        microbatch=microbatch,
        mask=batch.mask.numpy() if case.masked else None,
    )
    y = truth.y + batch.residual.double().numpy() if case.residual else truth.y
    if case.relu:
        dy = np.where(y > 0, dy, 0)
        y = np.maximum(y, 0)
    dx, dgamma, dbeta = oracle.backward(truth, dy)
    sizes = oracle.terms(truth, batch.dy.double().numpy(), beta)
    if case.residual:
        sizes["y"] = sizes["y"] + np.abs(batch.residual.double().numpy()).max()
    wanted = {"y": y, "dx": dx, "dgamma": dgamma, "dbeta": dbeta, "mu": truth.mu, "sigma": truth.sigma}
    # What is rounded to half is the gradient itself, whose part through the moments may exceed the terms above.
    sizes["dx"] = np.maximum(sizes["dx"], np.abs(np.moveaxis(dx, 1, 0)).reshape(len(gamma), -1).max(1))
    got = {name: np.concatenate([r[name] for r in replicas]) for name in ("y", "dx")}
    got |= {name: sum(r[name] for r in replicas) for name in ("dgamma", "dbeta")}
    # Half: y is rounded to it once; dx, where autograd adds it up from two parts, three times. 2^-8 and 2^-11 are its unit roundoffs; statistics are float32's.
    half = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(case.dtype)
    tolerance = 1e-12 if case.dtype == torch.float64 else 1e-5
    for name, value in wanted.items():
        limit = tolerance if not half else {"y": 1.01 * half, "dx": 3.03 * half}.get(name, tolerance)
        for actual in [got[name]] if name in got else [r[name] for r in replicas]:
            worst = oracle.error(actual, value, sizes[name]).max()
            assert worst <= limit, f"{case}, {shards}: {name} is off by {worst:.1e}"
    if case.residual:
        np.testing.assert_array_equal(np.concatenate([r["dresidual"] for r in replicas]), dy)
    for replica in replicas[1:]:
        for mine, first in zip(replica["bits"], replicas[0]["bits"]):
            assert torch.equal(mine, first), "averages differ between replicas"


EXACT, HALF, BOTH = (torch.float64, torch.float32), (torch.bfloat16, torch.float16), (False, True)
SHAPES = [(3,), (3, 7), (3, 4, 5), (2, 3, 2, 5)]
CASES = [
    *(Case(b, shape, dtype) for b in BACKENDS for shape in SHAPES for dtype in EXACT),
    *(Case(b, dtype=dtype, channels_last=last) for b in BACKENDS for dtype in HALF for last in BOTH),
    *(Case(b, channels_last=True, dtype=torch.float32) for b in BACKENDS),
    *(Case(b, microbatch=m, dtype=dtype) for b in BACKENDS for m in (2, 100) for dtype in EXACT),
    *(Case(None, shape, masked=True, microbatch=m) for shape in [(3, 9), (3, 4, 5)] for m in (None, 2)),
    *(Case(b, relu=True, residual=r, channels_last=last) for b in BACKENDS for r in BOTH for last in BOTH),
]


@pytest.mark.parametrize("shards", SHARDS, ids=str)
def test_sharded_is_whole(pool: Pool, shards: tuple[int, ...]) -> None:
    results = pool.run(len(shards), steps, CASES, shards)
    for case, replicas in zip(CASES, zip(*results)):
        check(case, shards, list(replicas))
