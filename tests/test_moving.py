"""`gradient="moving"`: against its formulae in NumPy, and all that can happen to a state that moves in the backward."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
from processes import Pool
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchrenorm as brn
from batchrenorm.backends import triton
from batchrenorm.functional import renormalize
from batchrenorm.library import LIBRARY
from batchrenorm.moving import Moving

C = 5
CLIP = brn.ClipSchedule(2.0, 1.0, warmup=2, d_full=6, r_full=8)
WARM, HALFWAY, OPEN = 1, 5, 9
BACKENDS = [
    "decomposed",
    pytest.param("native", marks=pytest.mark.skipif(LIBRARY is None, reason="needs a C compiler at installation")),
    pytest.param(
        "triton",
        marks=[
            pytest.mark.skipif(not triton.installed(), reason="needs the extra: pip install 'batchrenorm[triton]'"),
            # Of NumPy, which Triton's interpreter computes with.
            pytest.mark.filterwarnings("ignore::RuntimeWarning"),
        ],
    ),
]
SHAPES = [((12, C), 4), ((10, C), 4), ((6, C), 6), ((2, C, 4, 3), 1), ((8, C, 3, 3), 2), ((7, C, 2, 3, 2), 3)]


def settings(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """mu, variance, gamma, beta, and the gradient's mean and slope."""
    names = "running_mean", "running_var", "weight", "bias", "gradient_mean", "gradient_slope"
    vectors = dict(zip(names, torch.randn(6, C, dtype=dtype)))
    vectors["running_var"] = vectors["running_var"].abs() + 0.5
    return vectors


def batch(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x, whose microbatches are clipped in some channels, and dy, which depends on it."""
    x = torch.randn(shape, dtype=torch.float64) * torch.linspace(0.5, 4, shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    dy = torch.randn(shape, dtype=torch.float64) + 0.3 * x + 0.5
    return x.to(dtype), dy.to(dtype)


def check(
    found: dict[str, Tensor],
    x: Tensor,
    dy: Tensor,
    vectors: dict[str, Tensor],
    step: int,
    size: int | list[int],
    relu: bool = False,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """Against the oracle, in units of the terms that are added up.

    Half rounds dx once more; three times where autograd adds it up from two parts.
    """
    mu, var, gamma, beta, mean, slope = (v.double().numpy() for v in vectors.values())
    r_max, d_max = CLIP(step)
    truth = oracle.train(
        x.double().numpy(),
        mu,
        np.sqrt(var + 1e-5),
        gamma,
        beta,
        r_max=r_max,
        d_max=d_max,
        microbatch=size,
        mask=None if mask is None else mask.numpy(),
    )
    cotangent = dy.double().numpy()
    if relu:
        cotangent = np.where(truth.y + (0 if residual is None else residual.double().numpy()) > 0, cotangent, 0)
    dx, new_mean, new_slope = oracle.moving_backward(
        truth, cotangent, np.sqrt(var + 1e-5), mean, slope, CLIP.own_share(step)
    )
    # e and e * h are sums of these.
    h = max(np.abs(g.x_hat).max() for g in truth.groups)
    terms = np.abs(cotangent).max() + np.abs(mean) + h * np.abs(slope)
    scale = np.max([g.r / g.sigma_B for g in truth.groups], 0) * np.abs(gamma)
    sizes = {"dx": scale * terms, "gradient_mean": terms, "gradient_slope": h * terms}
    half = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(x.dtype, 0.0)
    limit = 1e-12 if x.dtype == torch.float64 else 1e-5
    for name, value in {"dx": dx, "gradient_mean": new_mean, "gradient_slope": new_slope}.items():
        worst = oracle.error(found[name].detach().double().numpy(), value, sizes[name]).max()
        assert worst <= limit + (3.03 * half if name == "dx" else 0.0), f"{name} is off by {worst:.1e}"


def forward(x: Tensor, state: dict[str, Tensor], step: int, size: int | None, **options: Any) -> Tensor:
    mu, var, weight, bias, mean, slope = state.values()
    settings: dict[str, Any] = {"alpha": 0.1, "eps": 1e-5, "mask": None, "process_group": None} | options
    settings |= dict(zip(("r_max", "d_max"), CLIP(step)))
    moving = Moving(mean, slope, CLIP.own_share(step))
    return renormalize(
        x, mu, var, torch.tensor(step), weight, bias, training=True, microbatch_size=size, moving=moving, **settings
    )


def run(
    backend: str, x: Tensor, dy: Tensor, vectors: dict[str, Tensor], step: int, size: int, **epilogue: Any
) -> dict[str, Tensor]:
    state = {name: v.clone() for name, v in vectors.items()}
    state["weight"].requires_grad_()
    state["bias"].requires_grad_()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = forward(x, state, step, size, backend=backend, **epilogue)
    assert torch.equal(state["gradient_mean"], vectors["gradient_mean"]), "moved before the backward"
    y.backward(dy)
    assert x.grad is not None
    assert x.grad.dtype == x.dtype
    return {"dx": x.grad, "gradient_mean": state["gradient_mean"], "gradient_slope": state["gradient_slope"]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("step", [WARM, HALFWAY, OPEN])
@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)
def test_formulae(shape: tuple[int, ...], size: int, step: int, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("this backend has no float64")
    vectors = settings(torch.float64 if dtype == torch.float64 else torch.float32)
    x, dy = batch(shape, dtype)
    check(run(backend, x, dy, vectors, step, size), x, dy, vectors, step, size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("activation", "added"), [("relu", False), ("relu", True), (None, True)])
@pytest.mark.parametrize("step", [HALFWAY, OPEN])
def test_epilogues(step: int, activation: str | None, added: bool, backend: str) -> None:
    vectors = settings(torch.float32)
    x, dy = batch((6, C, 4, 4), torch.float32)
    residual = torch.randn_like(x) if added else None
    found = run(backend, x, dy, vectors, step, 2, activation=activation, residual=residual)
    check(found, x, dy, vectors, step, 2, activation == "relu", residual)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("step", [HALFWAY, OPEN])
def test_large(step: int, channels_last: bool, backend: str) -> None:
    """Several units of work in a group, some of them on other threads."""
    vectors = settings(torch.float32)
    x, dy = batch((6, C, 160, 161), torch.float32)
    if channels_last:
        x, dy = (v.contiguous(memory_format=torch.channels_last) for v in (x, dy))
    torch.set_num_threads(2)
    try:
        found = run(backend, x, dy, vectors, step, 4)
    finally:
        torch.set_num_threads(1)
    check(found, x, dy, vectors, step, 4)


def layer(kind: type[brn.BatchRenorm] = brn.BatchRenorm, step: int = OPEN, **options: Any) -> brn.BatchRenorm:
    options = {"clip": CLIP, "microbatch_size": 2, "gradient": "moving", "dtype": torch.float64} | options
    new = kind(C, **options)
    with torch.no_grad():
        for name, value in settings(options["dtype"]).items():
            getattr(new, name).copy_(value)
        new.num_batches_tracked.fill_(step)  # type: ignore[union-attr]
    return new


def vectors_of(module: brn.BatchRenorm) -> dict[str, Tensor]:
    names = "running_mean", "running_var", "weight", "bias", "gradient_mean", "gradient_slope"
    return {name: getattr(module, name).detach().clone() for name in names}


@pytest.mark.parametrize("step", [WARM, HALFWAY, OPEN])
@pytest.mark.parametrize("compiled", [False, True])
def test_masks(step: int, compiled: bool) -> None:
    module = layer(step=step)
    vectors = vectors_of(module)
    x, dy = batch((7, C, 6), torch.float64)
    mask = torch.rand(7, 6) < 0.7
    x.requires_grad_()
    call = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    call(x, mask).backward(dy)
    found = {"dx": x.grad, "gradient_mean": module.gradient_mean, "gradient_slope": module.gradient_slope}
    check(found, x.detach(), dy, vectors, step, 2, mask=mask)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_warm_up_is_the_papers_to_the_last_bit(dtype: torch.dtype) -> None:
    moving = layer(step=WARM, dtype=dtype)
    paper = brn.BatchRenorm(C, clip=CLIP, microbatch_size=2, dtype=dtype)
    paper.load_state_dict({k: v for k, v in moving.state_dict().items() if not k.startswith("gradient")})
    x, dy = batch((6, C, 3), dtype)
    gradients = []
    for module in (moving, paper):
        # In float64 the paper's backward is ATen's, in float32 both are this package's.
        y = module(x.requires_grad_())
        gradients.append(torch.autograd.grad(y, [x, module.weight, module.bias], dy))  # type: ignore[list-item]
    for a, b in zip(*gradients):
        if dtype == torch.float32 and LIBRARY is not None:
            assert torch.equal(a, b)
        else:
            error = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
            torch.testing.assert_close(a, b, rtol=error, atol=error)


def test_nothing_is_left_of_a_shift_and_of_a_scale() -> None:
    """What the state is for: on data that stays the same, <dx> and <dx h> go to 0, at any N, with E h² far from 1."""
    clip = brn.ClipSchedule.constant(100.0, 100.0)
    module = brn.BatchRenorm(1, momentum=0.01, clip=clip, microbatch_size=4, gradient="moving")
    generator = torch.Generator().manual_seed(0)
    sums, squares = torch.zeros(3, dtype=torch.float64), 0.0
    for step in range(3000):
        x = torch.randn(32, 1, generator=generator).requires_grad_()
        y = module(x)
        # A cotangent that is a function of x, with a mean and a slope, and noise.
        dy = 2.0 - 3.0 * y.detach() + torch.randn(32, 1, generator=generator)
        (dx,) = torch.autograd.grad(y, x, dy)
        if step >= 1000:
            h = y.detach().double()
            sums += torch.stack([dx.double().mean(), (dx.double() * h).mean(), dy.double().mean()])
            squares += float(h.square().mean())
    sums, squares = sums / 2000, squares / 2000
    assert 1.3 < squares < 1.9, "E h² is not where theory has it for groups of 4, 1.57"
    # 64,000 values of deviation 1 (dx) and 1.3 to 2 (dx h): four standard errors; dy itself has mean 2.
    assert abs(sums[0]) < 0.016
    assert abs(sums[1]) < 0.03
    assert abs(sums[2]) > 1.5
    assert abs(float(module.gradient_slope) + 3.0) < 0.3
    assert abs(float(module.gradient_mean) - 2.0) < 0.3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_checkpointing_changes_no_bit(reentrant: bool, order: tuple[int, ...]) -> None:
    """Several forwards pending, while the limits, and with them the share of the own gradient, move."""
    results = []
    for recompute in (False, True):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, C), layer(step=HALFWAY - 2, dtype=torch.float32), nn.Linear(C, C), nn.ReLU())
        net.append(layer(step=HALFWAY - 2, dtype=torch.float32))
        xs = [torch.randn(6, 4, requires_grad=True) for _ in order]
        dys = [torch.randn(6, C) for _ in order]
        ys = [checkpoint(net, x, use_reentrant=reentrant) if recompute else net(x) for x in xs]
        for i in order:
            ys[i].backward(dys[i])
        results.append([x.grad for x in xs] + [p.grad for p in net.parameters()] + list(net.buffers()))
    for plain, recomputed in zip(*results):
        assert torch.equal(plain, recomputed)


def pending(call: Callable[[Tensor], Tensor], module: brn.BatchRenorm) -> list[Tensor]:
    """One layer twice in a row, and two forwards before their backwards, then a third step."""
    generator = torch.Generator().manual_seed(4)
    xs = [torch.randn(6, C, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    ys = [call(call(x)) for x in xs[:2]]
    for y in reversed(ys):
        y.backward(torch.randn(y.shape, generator=generator, dtype=y.dtype))
    y = call(xs[2])
    y.backward(torch.randn(y.shape, generator=generator, dtype=y.dtype))
    return [x.grad for x in xs] + [module.weight.grad, *module.buffers()]  # type: ignore[union-attr, list-item]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, dynamic: bool) -> None:
    if backend == "inductor" and dynamic:
        pytest.skip("as with aot_eager; compiling takes its time")
    torch._dynamo.reset()
    first = layer(step=HALFWAY - 3)
    second = copy.deepcopy(first)
    compiled = torch.compile(second, backend=backend, fullgraph=True, dynamic=dynamic)
    for a, b in zip(pending(first, first), pending(compiled, second)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_compiled_and_checkpointed() -> None:
    torch._dynamo.reset()
    first = layer(step=HALFWAY - 3)
    second = copy.deepcopy(first)
    compiled = torch.compile(lambda x: checkpoint(second, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    for a, b in zip(pending(first, first), pending(compiled, second)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_second_derivatives_are_refused(dtype: torch.dtype, masked: bool) -> None:
    module = layer(dtype=dtype)
    before = module.gradient_mean.clone()
    x, dy = batch((6, C, 3), dtype)
    y = module(x.requires_grad_(), torch.ones(6, 3, dtype=torch.bool) if masked else None)
    with pytest.raises(RuntimeError, match=r"expected a gradient that is not differentiated again .*'microbatch'"):
        torch.autograd.grad(y, x, dy, create_graph=True)
    assert torch.equal(module.gradient_mean, before)


@pytest.mark.parametrize("transform", [torch.vmap, lambda f: torch.func.grad(lambda x: f(x).square().sum())])
def test_transforms_are_refused(transform: Callable[..., Any]) -> None:
    transformed, x = transform(layer()), torch.randn(4, C, C, C, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"expected no transform of torch.func .*'microbatch'"):
        transformed(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_overflow_does_not_stay(dtype: torch.dtype) -> None:
    """What a gradient scaler meets: the channel's state stays, the others' move."""
    module = layer(dtype=dtype)
    before = vectors_of(module)
    x, dy = batch((6, C, 3), dtype)
    dy[1, 2, 0], dy[3, 3, 1] = torch.inf, torch.nan
    module(x.requires_grad_()).backward(dy)
    for name in ("gradient_mean", "gradient_slope"):
        after = getattr(module, name)
        assert torch.equal(after[2:4], before[name][2:4])
        assert bool((after[[0, 1, 4]] != before[name][[0, 1, 4]]).all())


def test_only_a_backward_to_x_moves_the_state() -> None:
    module = layer()
    before = module.gradient_mean.clone()
    x, dy = batch((6, C, 3), torch.float64)
    module(x).backward(dy)  # weight and bias alone
    with torch.no_grad():
        module(x)
    module.eval()(x.requires_grad_()).backward(dy)
    assert torch.equal(module.gradient_mean, before)


def net() -> nn.Sequential:
    torch.manual_seed(5)
    options: dict[str, Any] = {"clip": brn.ClipSchedule(3.0, 5.0, 2, 4, 6), "microbatch_size": 2, "gradient": "moving"}
    return nn.Sequential(nn.Linear(4, C), brn.BatchRenorm1d(C, **options), nn.ReLU(), nn.Linear(C, 2))


def train(model: nn.Module, steps: range) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_state_is_saved_and_a_resumed_training_is_the_same() -> None:
    straight, stopped = net(), net()
    train(straight, range(8))
    train(stopped, range(4))
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed = net()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert float(resumed[1].gradient_slope.abs().sum()) > 0
    copies = [resumed, copy.deepcopy(stopped), pickle.loads(pickle.dumps(stopped))]
    for model in copies:
        train(model, range(4, 8))
        for a, b in zip(straight.state_dict().values(), model.state_dict().values()):
            assert torch.equal(a, b)


def test_state_dicts() -> None:
    five = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(brn.BatchRenorm1d(C).state_dict()) == five
    module = layer(brn.BatchRenorm1d, dtype=torch.float32)
    assert list(module.state_dict()) == [*five, "gradient_mean", "gradient_slope"]
    module.load_state_dict(nn.BatchNorm1d(C).state_dict())  # strictly
    assert not module.gradient_mean.any()
    assert not module.gradient_slope.any()
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({})
    module = layer()
    module.reset_running_stats()
    assert not module.gradient_mean.any()
    assert "gradient=moving" in repr(module)
    assert "gradient" not in repr(brn.BatchRenorm1d(C))


def test_conversion_there_and_back() -> None:
    model = nn.Sequential(nn.Linear(4, C), nn.BatchNorm1d(C), nn.BatchNorm1d(C, track_running_stats=False))
    brn.convert_batchnorm(model, clip=CLIP, microbatch_size=2, gradient="moving")
    assert [getattr(m, "gradient", None) for m in model] == [None, "moving", "microbatch"]
    x = torch.randn(6, 4)
    for _ in range(12):
        model(x).square().sum().backward()
    assert float(model[1].gradient_slope.abs().sum()) > 0
    model.eval()
    expected = model(x)
    back = brn.to_batchnorm(model)
    assert type(back[1]) is nn.BatchNorm1d
    assert torch.equal(back(x), expected)
    assert list(back[1].state_dict()) == list(nn.BatchNorm1d(C).state_dict())
    assert set(vars(back[1])) == set(vars(nn.BatchNorm1d(C)))


def test_lazy_layers() -> None:
    for module in (
        brn.LazyBatchRenorm1d(clip=CLIP, gradient="moving"),
        brn.convert_batchnorm(nn.LazyBatchNorm1d(), clip=CLIP, gradient="moving"),
    ):
        module(torch.randn(6, 3))
        assert module.gradient_mean.shape == module.gradient_slope.shape == (3,)
        assert not module.gradient_mean.any()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"gradient": "own"}, ValueError, "expected gradient to be 'microbatch' or 'moving', got 'own'; "),
        ({"gradient": "moving", "clip": lambda t: (t, t)}, TypeError, "expected clip to be a ClipSchedule with "),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], text: str) -> None:
    for build in (
        lambda: brn.BatchRenorm1d(C, **options),
        lambda: brn.LazyBatchRenorm1d(**options),
        lambda: brn.convert_batchnorm(nn.BatchNorm1d(C), **options),
    ):
        with pytest.raises(error, match=text):
            build()
    with pytest.raises(ValueError, match="expected track_running_stats=True with gradient='moving'"):
        brn.BatchRenorm1d(C, track_running_stats=False, gradient="moving")


def test_half_precision_layers_train() -> None:
    module = brn.BatchRenorm1d(C, clip=CLIP, gradient="moving").bfloat16()
    module.num_batches_tracked.fill_(OPEN)  # type: ignore[union-attr]
    x, dy = batch((8, C), torch.bfloat16)
    module(x.requires_grad_()).backward(dy)
    assert module.gradient_mean.dtype == torch.bfloat16
    # From 0, three tenths of the mean of dy; rounded to bfloat16, whose unit roundoff is 2^-8.
    torch.testing.assert_close(module.gradient_mean.float(), 0.3 * dy.float().mean(0), rtol=2**-8, atol=1e-6)


# Replicas.


def sharded(group: Any, backend: str | None, step: int, shards: tuple[int, ...], size: int | None) -> dict[str, Any]:
    torch.manual_seed(7)
    vectors = settings()
    x, dy = batch((sum(shards), C, 3), torch.float64)
    rank = dist.get_rank()
    mine = slice(sum(shards[:rank]), sum(shards[: rank + 1]))
    x_mine = x[mine].clone().requires_grad_()
    state = {name: v.clone() for name, v in vectors.items()}
    # On the second replica another backend: they must agree on what they send.
    chosen = "decomposed" if rank == 1 else backend if size is None else None
    y = forward(x_mine, state, step, size, backend=chosen, process_group=group)
    y.backward(dy[mine])
    return {"dx": x_mine.grad, "gradient_mean": state["gradient_mean"], "gradient_slope": state["gradient_slope"]}


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("shards", [(3, 5), (1, 7, 2), (4, 0)], ids=str)
def test_sharded_is_whole(pool: Pool, shards: tuple[int, ...], size: int | None) -> None:
    for backend in ["decomposed"] + ([] if LIBRARY is None else ["native"]):
        for step in (HALFWAY, OPEN):
            results = pool.run(len(shards), sharded, backend, step, shards, size)
            torch.manual_seed(7)
            vectors = settings()
            x, dy = batch((sum(shards), C, 3), torch.float64)
            groups = sum(shards) if size is None else [min(size, n - k) for n in shards for k in range(0, n, size)]
            for replica in results:
                whole = replica | {"dx": torch.cat([r["dx"] for r in results])}
                check(whole, x, dy, vectors, step, groups)
                assert torch.equal(replica["gradient_mean"], results[0]["gradient_mean"])


def synchronised(group: Any, during_a_backward: bool) -> tuple[Tensor, Tensor]:
    module = layer()
    own = torch.full_like(module.gradient_mean, float(dist.get_rank()))
    module.gradient_mean.copy_(own)
    handle = brn.sync_running_stats(module, group, async_op=True)
    if during_a_backward:
        module.gradient_mean += 10 * (1 + own)
    assert handle is not None
    handle.wait()
    return module.gradient_mean, module.gradient_slope


def test_synchronisation_shares_the_state(pool: Pool) -> None:
    for mean, _ in pool.run(2, synchronised, False):
        assert mean.tolist() == [0.5] * C
    # What a backward adds meanwhile is not lost.
    for rank, (mean, _) in enumerate(pool.run(2, synchronised, True)):
        assert mean.tolist() == [0.5 + 10 * (1 + rank)] * C
