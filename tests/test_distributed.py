"""Shared moving averages, DDP, FSDP, checkpoints and recalibration, on real processes."""

from __future__ import annotations

import contextlib
import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import Pool
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.checkpoint import checkpoint

import batchrenorm as brn

EPS = 1e-5


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


def network(checkpointed: bool = False, **options: Any) -> nn.Sequential:
    torch.manual_seed(3)
    options = {"momentum": 0.3, "clip": brn.ClipSchedule.constant(1.5, 0.5)} | options
    hidden = nn.Sequential(nn.Linear(3, 6), brn.BatchRenorm1d(6, **options), nn.Tanh())
    return nn.Sequential(
        Checkpointed(hidden) if checkpointed else hidden, nn.Linear(6, 4), brn.BatchRenorm1d(4, **options)
    ).double()


def minibatches(steps: int, samples: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    found = []
    for _ in range(steps):
        x = torch.randn(samples, 3, generator=generator, dtype=torch.float64) * 2
        # Sorted, so that the replicas' shards are of different distributions.
        found.append((x.sort(0).values + 1, torch.randn(samples, 4, generator=generator, dtype=torch.float64)))
    return found


def mine(shards: tuple[int, ...]) -> slice:
    rank = dist.get_rank()
    return slice(sum(shards[:rank]), sum(shards[: rank + 1]))


def buffers(model: nn.Module) -> list[Tensor]:
    return [b.clone() for m in model.modules() if isinstance(m, brn.BatchRenorm) for b in m.buffers()]


def ddp(model: nn.Module, group: Any, broadcast: bool = False) -> DistributedDataParallel:
    # torch 2.12 has given the option another name.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, process_group=group, **{option: broadcast})


def descend(model: nn.Module, y: Tensor, cotangent: Tensor, total: int) -> None:
    """One step of gradient descent on the mean over all samples; DDP and FSDP divide by the number of replicas."""
    ((y * cotangent).sum() / total).backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
                p.grad = None


def trained_whole(steps: int, samples: int, size: int | None, **options: Any) -> list[Tensor]:
    """Parameters and buffers after training in one process."""
    model = network(microbatch_size=size, **options)
    for x, cotangent in minibatches(steps, samples):
        descend(model, model(x), cotangent, samples)
    return [p.detach() for p in model.parameters()] + buffers(model)


def trained(group: Any, way: str, level: str, shards: tuple[int, ...], steps: int) -> dict[str, Any]:
    """The same in shards: this replica's parameters and buffers, and its buffers after every step."""
    model = network(process_group=group if level == "process_group" else None, checkpointed="checkpoint" in way)
    wrapped: nn.Module = model
    if "fsdp" in way:
        mesh = DeviceMesh.from_group(group, "cpu")
        for layer in [m for m in model if not isinstance(m, brn.BatchRenorm)]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        wrapped = ddp(model, group, "broadcast" in way)
    sync = brn.keep_in_sync(wrapped, group) if level == "keep_in_sync" else contextlib.nullcontext()
    seen = []
    with sync:
        for x, cotangent in minibatches(steps, sum(shards)):
            y = wrapped(x[mine(shards)])
            descend(model, y, cotangent[mine(shards)], sum(shards) // len(shards))
            if isinstance(sync, brn.keep_in_sync):
                sync.wait()
            seen.append(buffers(model))
    parameters = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]
    return {"state": parameters + buffers(model), "seen": seen}


def all_equal(replicas: list[dict[str, Any]]) -> bool:
    """Whether all replicas have the same bits after every step."""
    first = replicas[0]["seen"]
    return all(
        all(map(torch.equal, here, there)) for r in replicas[1:] for here, there in zip(first, r["seen"], strict=True)
    )


@pytest.mark.parametrize("way", ["ddp", "ddp broadcast", "ddp checkpoint", "fsdp", "fsdp checkpoint"])
@pytest.mark.parametrize("level", ["keep_in_sync", "process_group"])
def test_replicas_train_what_one_process_does(pool: Pool, way: str, level: str) -> None:
    """Each a microbatch with r and d of its own from shared averages; or all of them one minibatch."""
    shards = (4, 4)
    replicas = pool.run(2, trained, way, level, shards, 6)
    whole = trained_whole(6, 8, 4 if level == "keep_in_sync" else None)
    assert all_equal(replicas)
    for state in (r["state"] for r in replicas):
        for got, wanted in zip(state, whole, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shards", [(3, 5), (6, 0), (2, 7, 3)], ids=str)
def test_uneven_shards_under_ddp(pool: Pool, shards: tuple[int, ...]) -> None:
    N = sum(shards) // len(shards) * len(shards)
    replicas = pool.run(len(shards), trained, "ddp", "process_group", shards, 6)
    assert all_equal(replicas)
    for got, wanted in zip(replicas[0]["state"], trained_whole(6, N, None), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def test_uneven_shards_keep_in_sync(pool: Pool) -> None:
    assert all_equal(pool.run(3, trained, "ddp broadcast", "keep_in_sync", (2, 7, 3), 6))


def test_without_it_they_drift(pool: Pool) -> None:
    assert not all_equal(pool.run(2, trained, "ddp", "none", (4, 4), 6))


# The function.


def layers(group: Any) -> nn.ModuleDict:
    model = nn.ModuleDict({"a": brn.BatchRenorm1d(3), "b": brn.BatchRenorm2d(5, eps=1e-3), "c": nn.BatchNorm1d(2)})
    generator = torch.Generator().manual_seed(dist.get_rank())
    for m in (model["a"], model["b"]):
        m.running_mean.normal_(generator=generator)
        m.running_var.uniform_(0.1, 4, generator=generator)
        m.num_batches_tracked.fill_(20_000_003 + dist.get_rank())
    return model


def synchronised(group: Any, weights: list[float], async_op: bool) -> dict[str, Any]:
    model = layers(group)
    before = copy.deepcopy(model).state_dict()
    handle = brn.sync_running_stats(model, group, async_op, weight=weights[dist.get_rank()])
    if async_op:
        assert handle is not None
        assert all(map(torch.equal, before.values(), model.state_dict().values()))
        handle.wait()
        handle.wait()
    else:
        assert handle is None
    after = copy.deepcopy(model).state_dict()
    brn.sync_running_stats(model, group)
    return {"before": before, "after": after, "again": model.state_dict()}


@pytest.mark.parametrize("weights", [[1, 1], [8, 0], [3, 5, 0], [2, 3, 1, 7]], ids=str)
@pytest.mark.parametrize("async_op", [False, True])
def test_mean_of_mu_and_of_sigma(pool: Pool, weights: list[float], async_op: bool) -> None:
    found = pool.run(len(weights), synchronised, weights, async_op)
    w = np.array(weights, np.float64)
    for name, eps in (("a", EPS), ("b", 1e-3)):

        def mean(what: str, f: Any, name: str = name) -> Any:
            values = np.stack([f(r["before"][f"{name}.{what}"].double().numpy()) for r in found])
            return (w.reshape(-1, *[1] * (values.ndim - 1)) * values).sum(0) / w.sum()

        mu = mean("running_mean", lambda v: v)
        sigma = mean("running_var", lambda v, eps=eps: np.sqrt(v + eps))
        step = round(mean("num_batches_tracked", lambda v: v))
        for r in found:
            np.testing.assert_allclose(r["after"][f"{name}.running_mean"].numpy(), mu, rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(r["after"][f"{name}.running_var"].numpy(), sigma**2 - eps, rtol=1e-6)
            assert r["after"][f"{name}.num_batches_tracked"] == step
    for r in found:
        assert all(map(torch.equal, r["after"].values(), found[0]["after"].values()))
        # What is equal already stays so, to the last bit.
        assert all(map(torch.equal, r["again"].values(), r["after"].values()))
        assert torch.equal(r["before"]["c.running_var"], r["after"]["c.running_var"])


def test_nobody_has_a_sample(pool: Pool) -> None:
    for r in pool.run(2, synchronised, [0.0, 0.0], False):
        assert all(map(torch.equal, r["before"].values(), r["after"].values()))


def messages(group: Any) -> list[int]:
    model = layers(group)
    brn.sync_running_stats(model, group)  # the first time the replicas look whether they have the same layers
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        brn.sync_running_stats(model, group)
    names = ("c10d::all", "c10d::broadcast", "c10d::gather", "c10d::barrier", "gloo:")
    events = [e for e in profile.events() if e.name.startswith(names) and "c10d" in e.name]
    assert [e.name for e in events] == ["c10d::allreduce_"]
    work = [e for e in profile.events() if e.name.startswith("gloo:all_reduce")]
    return [int(np.prod(e.input_shapes[0])) for e in work]


def test_one_collective_of_two_numbers_per_channel(pool: Pool) -> None:
    for sizes in pool.run(2, messages):
        assert sizes == [1 + 2 + 2 * (3 + 5)]


def test_alone_there_is_nothing_to_do() -> None:
    model = network()
    assert brn.sync_running_stats(model) is None
    handle = brn.sync_running_stats(model, async_op=True)
    assert handle is not None
    handle.wait()
    with brn.keep_in_sync(model):
        model(torch.randn(4, 3).double())


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_is_a_number_of_samples(weight: float) -> None:
    with pytest.raises(ValueError, match="weight >= 0"):
        brn.sync_running_stats(network(), weight=weight)


def test_a_group_is_a_group() -> None:
    for call in (brn.sync_running_stats, brn.keep_in_sync):
        with pytest.raises(TypeError, match="process_group"):
            call(network(), object())  # type: ignore[operator]


# Without a line in the loop.


def accumulated(group: Any) -> dict[str, Any]:
    """Two of three forwards in `no_sync`."""
    model = ddp(network(), group)
    apart, together = [], []
    with brn.keep_in_sync(model, group) as sync:
        for k, (x, cotangent) in enumerate(minibatches(6, 8)):
            quiet = k % 3 < 2
            with model.no_sync() if quiet else contextlib.nullcontext():
                (model(x[mine((4, 4))]) * cotangent[mine((4, 4))]).sum().backward()
            sync.wait()
            (apart if quiet else together).append(buffers(model))
    return {"apart": apart, "seen": together, "gradients": [p.grad for p in model.parameters()]}


def test_gradient_accumulation(pool: Pool) -> None:
    replicas = pool.run(2, accumulated)
    assert all_equal(replicas)
    assert not torch.equal(replicas[0]["apart"][0][0], replicas[1]["apart"][0][0])
    assert all(map(torch.equal, replicas[0]["gradients"], replicas[1]["gradients"]))


def read(group: Any, how: str) -> list[Tensor]:
    """The averages as they are seen by who does not know that a synchronisation is on its way."""
    model = network()
    sync = brn.keep_in_sync(model, group)
    (x, cotangent), (x2, _) = minibatches(2, 8)
    (model(x[mine((4, 4))]) * cotangent[mine((4, 4))]).sum().backward()
    if how == "state_dict":
        return list(model.state_dict().values())
    if how == "inference":
        model.eval()
        return [model(x2).detach()]
    copied = copy.deepcopy(model)
    copied.train()(x2)  # has no synchronisation of its own
    sync.remove()
    model(x[: 1 + 3 * (dist.get_rank() + 1)])  # and now apart
    assert sync.handle is None
    return buffers(model)[:0]


@pytest.mark.parametrize("how", ["state_dict", "inference", "a copy and the end"])
def test_whoever_reads_waits(pool: Pool, how: str) -> None:
    first, second = pool.run(2, read, how)
    assert all(map(torch.equal, first, second))


# Checkpoints of several processes.


def saved_and_loaded(group: Any, path: str, shards: tuple[int, ...]) -> dict[str, Any]:
    def state(model: nn.Module) -> dict[str, Any]:
        return {"model": model.state_dict()}

    mesh = DeviceMesh.from_group(group, "cpu")

    def build() -> tuple[nn.Module, brn.keep_in_sync]:
        model = network()
        fully_shard(model, mesh=mesh)
        return model, brn.keep_in_sync(model, group)

    def train(model: nn.Module, batches: Any) -> None:
        for x, cotangent in batches:
            descend(model, model(x[mine(shards)]), cotangent[mine(shards)], 4)

    model, sync = build()
    batches = minibatches(6, 8)
    train(model, batches[:3])
    dcp.save(state(model), checkpoint_id=path, process_group=group, no_dist=False)
    train(model, batches[3:])
    sync.remove()
    resumed, sync = build()
    loaded = state(resumed)
    dcp.load(loaded, checkpoint_id=path, process_group=group)
    resumed.load_state_dict(loaded["model"])
    train(resumed, batches[3:])
    sync.remove()
    return {"straight": _whole(model), "resumed": _whole(resumed)}


def _whole(model: nn.Module) -> list[Tensor]:
    return [getattr(v, "full_tensor", lambda v=v: v)().detach() for v in model.state_dict().values()]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_resumed_from_a_distributed_checkpoint(pool: Pool, tmp_path: Path) -> None:
    """Bitwise; and one process loads what two have saved."""
    found = pool.run(2, saved_and_loaded, str(tmp_path / "two"), (4, 4))
    for r in found:
        assert all(map(torch.equal, r["straight"], r["resumed"]))
        assert all(map(torch.equal, r["straight"], found[0]["straight"]))
    alone = network()
    loaded = {"model": alone.state_dict()}
    dcp.load(loaded, checkpoint_id=str(tmp_path / "two"), no_dist=True)
    alone.load_state_dict(loaded["model"])
    assert int(alone[2].num_batches_tracked) == 3  # type: ignore[arg-type]


# Averages that belong to the weights.


def test_recalibrated_to_the_mean_of_mu_and_sigma() -> None:
    model = network().train()
    model[1].eval()
    batches = [x for x, _ in minibatches(5, 8)]
    model(batches[0] * 7)
    expected = copy.deepcopy(model)
    before = {m: (m.training, getattr(m, "momentum", None), getattr(m, "clip", None)) for m in model.modules()}
    assert brn.recalibrate(model, [(x, None) for x in batches]) is model
    assert before == {m: (m.training, getattr(m, "momentum", None), getattr(m, "clip", None)) for m in model.modules()}
    # Layer by layer as batch norm, in NumPy.
    hidden, last, norm = expected
    seen: list[list[Any]] = [[], []]
    for x in batches:
        for k, (linear, layer) in enumerate([(hidden[0], hidden[1]), (last, norm)]):
            x = linear(x).detach()
            mu, sigma = x.mean(0), (x.var(0, correction=0) + EPS).sqrt()
            seen[k].append((mu, sigma))
            x = (x - mu) / sigma * layer.weight.detach() + layer.bias.detach()
            x = x.tanh() if k == 0 else x
    for layer, values in zip((model[0][1], model[2]), seen):  # type: ignore[index]
        mu, sigma = (torch.stack(v).mean(0) for v in zip(*values))
        torch.testing.assert_close(layer.running_mean, mu, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.running_std, sigma, rtol=1e-12, atol=1e-12)
        assert layer.num_batches_tracked == 1


def test_recalibration_that_fails_leaves_everything() -> None:
    model = network()
    model(minibatches(1, 8)[0][0])
    before = buffers(model)

    def broken() -> Any:
        yield minibatches(1, 8)[0][0]
        raise OSError("no more")

    for loader, error in ((broken(), OSError), ([], ValueError)):
        with pytest.raises(error):
            brn.recalibrate(model, loader)
        assert all(map(torch.equal, before, buffers(model)))
        assert model[2].momentum == 0.3
        assert model.training


def test_a_layer_that_is_not_reached_keeps_its_averages() -> None:
    model = nn.ModuleList([brn.BatchRenorm1d(3), brn.BatchRenorm1d(3)])
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    model[1].running_mean.fill_(5)  # type: ignore[operator, union-attr]
    brn.recalibrate(model, [torch.randn(8, 3)])
    assert bool((model[1].running_mean == 5).all())
    assert bool((model[0].running_mean != 0).all())


def recalibrated(group: Any, own: bool) -> list[Tensor]:
    model = network(process_group=group if own else None)
    batches = [x for x, _ in minibatches(6, 8)]
    # The second has fewer of them, where no layer waits for it.
    part = [x[mine((3, 5))] for x in batches] if own else [batches[:4], batches[4:]][dist.get_rank()]
    brn.recalibrate(model, part, group=None if own else group)
    return [model[0][1].running_mean, model[0][1].running_std]  # type: ignore[index, list-item]


@pytest.mark.parametrize("own", [True, False])
def test_recalibrated_by_several(pool: Pool, own: bool) -> None:
    model = network()
    brn.recalibrate(model, [x for x, _ in minibatches(6, 8)])
    for found in pool.run(2, recalibrated, own):
        torch.testing.assert_close(found, [model[0][1].running_mean, model[0][1].running_std], rtol=1e-11, atol=1e-12)


def test_averaging_of_weights_averages_sigma() -> None:
    model = network()
    ema = get_ema_avg_fn(0.75)
    averaged = AveragedModel(model, avg_fn=brn.average_sigma(model, ema), use_buffers=True)
    mu = sigma = weight = None
    for x, _ in minibatches(4, 8):
        model(x)
        with torch.no_grad():
            model[1].weight += 0.1  # type: ignore[operator]
        averaged.update_parameters(model)
        now = [model[2].running_mean.clone(), model[2].running_std, model[1].weight.detach().clone()]  # type: ignore
        if mu is None:
            mu, sigma, weight = now
        else:
            mu, sigma, weight = (0.75 * a + 0.25 * b for a, b in zip((mu, sigma, weight), now))
    with pytest.raises(ValueError, match="average_sigma"):
        averaged.update_parameters(copy.deepcopy(model))
    layer = averaged.module[2]
    torch.testing.assert_close(layer.running_mean, mu)
    torch.testing.assert_close(layer.running_std, sigma)
    torch.testing.assert_close(averaged.module[1].weight, weight)
    assert layer.num_batches_tracked == 4


def compiled(group: Any) -> list[Tensor]:
    model = network()
    run = torch.compile(ddp(model, group), backend="aot_eager")
    with brn.keep_in_sync(run, group):
        for x, cotangent in minibatches(4, 8):
            (run(x[mine((4, 4))]) * cotangent[mine((4, 4))]).sum().backward()
    return buffers(model)


def test_around_a_compiled_model(pool: Pool) -> None:
    first, second = pool.run(2, compiled)
    assert all(map(torch.equal, first, second))
    assert int(first[2]) == 4
