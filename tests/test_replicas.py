"""`process_group=`: a sharded minibatch is the whole one, on real processes."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
from processes import Pool
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

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
    # Half: y is rounded to it once; dx, where autograd adds it up from two parts, three times. 2^-8 and 2^-11 are
    # its unit roundoffs; statistics are float32's.
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


# A layer among others, in a small model.


def network(group: Any, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    options = {"momentum": 0.3, "clip": brn.ClipSchedule.constant(1.5, 0.5), "process_group": group} | options
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        brn.BatchRenorm2d(4, **options),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, bias=False),
        brn.BatchRenorm2d(5, **options),
    ).double()


def shard(shards: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    rank = dist.get_rank()
    x = torch.randn(sum(shards), 3, 8, 8, generator=generator, dtype=torch.float64) + 1
    dy = torch.randn(sum(shards), 5, 4, 4, generator=generator, dtype=torch.float64)
    mine = slice(sum(shards[:rank]), sum(shards[: rank + 1]))
    return x[mine], dy[mine]


def trained(model: nn.Module, run: Any, x: Tensor, dy: Tensor, steps: int = 3) -> list[Tensor]:
    """Gradients of the last step, and buffers."""
    for _ in range(steps):
        model.zero_grad()
        run(x).backward(dy)
    return [p.grad.clone() for p in model.parameters()] + [b.clone() for b in model.buffers()]  # type: ignore


def alike(group: Any, what: str, shards: tuple[int, ...]) -> list[bool]:
    """Whether the model, run in the way of `what`, has the results of the plain one."""
    x, dy = shard(shards)
    plain, other = network(group), network(group)
    expected = trained(plain, plain, x, dy)
    if what.startswith("checkpoint"):
        reentrant = what.endswith("reentrant")
        x = x.clone().requires_grad_(reentrant)

        def run(x: Tensor) -> Tensor:
            return checkpoint(other, x, use_reentrant=reentrant)

    elif what == "selective":

        def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            kept = op == torch.ops.aten.convolution.default
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        def run(x: Tensor) -> Tensor:
            context = partial(create_selective_checkpoint_contexts, policy)
            return checkpoint(other, x, use_reentrant=False, context_fn=context)

    else:
        run = torch.compile(other, backend=what, fullgraph=True)
    got = trained(other, run, x, dy)
    return [torch.allclose(g, e, rtol=1e-9, atol=1e-9) for g, e in zip(got, expected)]


@pytest.mark.parametrize("what", ["checkpoint", "checkpoint, reentrant", "selective", "aot_eager"])
@pytest.mark.parametrize("shards", [(3, 5), (4, 0)], ids=str)
def test_recomputed_and_compiled(pool: Pool, what: str, shards: tuple[int, ...]) -> None:
    for found in pool.run(2, alike, what, shards):
        assert all(found)


@pytest.mark.slow
def test_inductor(pool: Pool) -> None:
    for found in pool.run(2, alike, "inductor", (3, 5)):
        assert all(found)


def collectives(group: Any, options: dict[str, Any]) -> dict[str, list[int]]:
    """What a training step of two layers sends: the numbers of each collective's message."""
    x, dy = shard((3, 5))
    if options.pop("frozen", False):
        model = network(group, affine=False, **options).requires_grad_(False)
    else:
        model = network(group, **options)
    model.train(options.pop("training", True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        y = model(x)
        if y.requires_grad:
            y.backward(dy)
    found: dict[str, list[int]] = {}
    for event in profile.events():
        if event.name.startswith("_c10d_functional::all_"):
            found.setdefault(event.name.split("::")[1], []).append(event.input_shapes[0][0])
    return found


def test_two_collectives_per_layer(pool: Pool) -> None:
    for found in pool.run(2, collectives, {}):
        # Of 4 and of 5 channels: counts, means, squares; in the backward the other way round.
        assert found == {"all_gather_into_tensor": [9, 11], "all_reduce": [10, 8]}


def test_one_per_layer_where_microbatches_stay_local_or_nothing_needs_a_gradient(pool: Pool) -> None:
    for options in ({"microbatch_size": 2}, {"frozen": True}):
        for found in pool.run(2, collectives, options):
            assert found == {"all_gather_into_tensor": [9, 11]}


def test_no_collective_alone(pool: Pool) -> None:
    assert pool.run(1, collectives, {}) == [{}]


def inference(group: Any) -> bool:
    model = network(group).eval()
    # One of them alone: were there a collective, it would wait for the other.
    return dist.get_rank() > 0 or bool(model(shard((3, 5))[0]).isfinite().all())


def test_no_collective_in_inference(pool: Pool) -> None:
    assert pool.run(2, inference) == [True, True]


def without_averages(group: Any) -> list[Tensor]:
    x, dy = shard((3, 5))
    layer = brn.BatchRenorm2d(3, track_running_stats=False, process_group=group).double()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy.sum((1, 2, 3), keepdim=True).expand_as(x))
    return [y.detach(), x.grad]  # type: ignore[list-item]


def test_without_averages_batch_norm_over_all(pool: Pool) -> None:
    found = pool.run(2, without_averages)
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64) + 1).requires_grad_()
    dy = torch.randn(8, 5, 4, 4, generator=generator, dtype=torch.float64).sum((1, 2, 3), keepdim=True)
    y = nn.functional.batch_norm(x, None, None, torch.ones(3).double(), None, True)
    (dx,) = torch.autograd.grad(y, x, dy.expand_as(x))
    for whole, shards in zip((y, dx), zip(*found)):
        torch.testing.assert_close(torch.cat(shards), whole.detach(), rtol=1e-12, atol=1e-12)


def second_derivative(group: Any, backend: str) -> Tensor:
    aten._SMALL = -1
    batch = batch_of(Case(backend), 8)
    mine = slice(0, 3) if dist.get_rank() == 0 else slice(3, 8)
    x = batch.x[mine].clone().requires_grad_()
    mu, var, gamma, beta = (v.clone() for v in batch.vectors)
    settings: dict[str, Any] = SETTINGS | {"training": True, "backend": backend, "process_group": group}
    y = brn.batch_renorm(x, mu, var, gamma, beta, **settings)
    (dx,) = torch.autograd.grad(y, x, batch.dy[mine], create_graph=True)
    return torch.autograd.grad(dx, x, batch.residual[mine])[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward(pool: Pool, backend: str) -> None:
    found = torch.cat(pool.run(2, second_derivative, backend))
    batch = batch_of(Case(backend), 8)
    x = batch.x.clone().requires_grad_()
    mu, var, gamma, beta = batch.vectors
    y, *_ = brn.reference.batch_renorm(x, mu, (var + 1e-5).sqrt(), gamma, beta, r_max=1.5, d_max=0.5)
    (dx,) = torch.autograd.grad(y, x, batch.dy, create_graph=True)
    (truth,) = torch.autograd.grad(dx, x, batch.residual)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)


# What a user may do wrong: one clear error on every replica, and the averages stay.


def refused(group: Any, what: str) -> str:
    rank = dist.get_rank()
    layer = brn.BatchRenorm1d(3, process_group=group)
    x = torch.randn(1 if what == "one value" and rank == 0 else 0 if what == "one value" else 4, 3)
    x.requires_grad_(what != "gradient on one" or rank == 0)
    before = [b.clone() for b in layer.buffers()]
    try:
        layer(x)
    except (ValueError, RuntimeError) as error:
        assert all(map(torch.equal, before, layer.buffers()))
        return str(error)
    return "nothing"


@pytest.mark.parametrize(("what", "said"), [("one value", "got 1 on 2 replicas"), ("gradient on one", "got both")])
def test_refused_by_all(pool: Pool, what: str, said: str) -> None:
    for text in pool.run(2, refused, what):
        assert said in text


def test_an_empty_minibatch_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one element"):
        brn.BatchRenorm1d(3)(torch.empty(0, 3))


# The group as an attribute.


def copies(group: Any) -> list[bool]:
    x, _ = shard((3, 5))
    layer = brn.BatchRenorm2d(3, process_group=group, momentum=0.5).double()
    world = brn.BatchRenorm2d(3, process_group=dist.group.WORLD)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    layer(x)
    for other in others:
        other(x)
    checks = [torch.equal(layer.running_mean, other.running_mean) for other in others]  # type: ignore[arg-type]
    return [*checks, copy.deepcopy(world).process_group == "world", "process_group=world" in repr(world)]


def test_copied_and_pickled(pool: Pool) -> None:
    assert pool.run(2, copies) == [[True] * 4] * 2


def converted(group: Any) -> list[Any]:
    sync = nn.Sequential(nn.SyncBatchNorm(3, process_group=group), nn.SyncBatchNorm(3), nn.BatchNorm2d(3))
    other = copy.copy(sync)
    groups = [m.process_group for m in brn.convert_batchnorm(sync)]
    back = brn.to_batchnorm(other)
    again = [back[0].process_group is group, back[1].process_group]
    given = brn.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), process_group="world")
    return [groups[0] is group, *groups[1:], *again, given[0].process_group]


def test_converted_from_sync_batch_norm(pool: Pool) -> None:
    assert pool.run(2, converted) == [[True, "world", None, True, None, "world"]] * 2


def test_the_world_without_others_is_this_process() -> None:
    x = torch.randn(8, 3)
    layer, other = brn.BatchRenorm1d(3), brn.BatchRenorm1d(3, process_group="world")
    assert torch.equal(layer(x), other(x))


def test_a_group_that_is_not_there() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        brn.BatchRenorm1d(3, process_group="7")(torch.randn(8, 3))
