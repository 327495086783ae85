"""State and schedule: names, loading, resuming, limits for ever, what moves when."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

import batchrenorm as brn
from batchrenorm.backends import aten

PAIRS = [
    (brn.BatchRenorm1d, nn.BatchNorm1d, (6, 5)),
    (brn.BatchRenorm1d, nn.BatchNorm1d, (6, 5, 3)),
    (brn.BatchRenorm2d, nn.BatchNorm2d, (4, 5, 3, 3)),
    (brn.BatchRenorm3d, nn.BatchNorm3d, (4, 5, 2, 3, 3)),
]
LAZY = [
    (brn.LazyBatchRenorm1d, brn.BatchRenorm1d, nn.LazyBatchNorm1d, (6, 5)),
    (brn.LazyBatchRenorm2d, brn.BatchRenorm2d, nn.LazyBatchNorm2d, (4, 5, 3, 3)),
    (brn.LazyBatchRenorm3d, brn.BatchRenorm3d, nn.LazyBatchNorm3d, (4, 5, 2, 3, 3)),
]
KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def trained(layer: nn.Module, shape: tuple[int, ...], steps: int = 3) -> nn.Module:
    for _ in range(steps):
        layer(torch.randn(shape) * 3 + 1)
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    one, other = a.state_dict(), b.state_dict()
    assert list(one) == list(other)
    for key in one:
        assert one[key].dtype == other[key].dtype
        assert torch.equal(one[key], other[key]), key


# State dicts.


@pytest.mark.parametrize(("renorm", "norm", "shape"), PAIRS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_keys_shapes_and_dtypes_are_batch_norms(
    renorm: type[nn.Module], norm: type[nn.Module], shape: tuple[int, ...], affine: bool, tracked: bool
) -> None:
    for dtype in (None, torch.float64, torch.bfloat16):
        options = {"affine": affine, "track_running_stats": tracked, "dtype": dtype}
        ours, theirs = renorm(5, **options), norm(5, **options)
        a, b = ours.state_dict(), theirs.state_dict()
        assert list(a) == list(b) == KEYS[0 if affine else 2 : None if tracked else 2]
        assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
        assert dict(ours.named_buffers()).keys() == dict(theirs.named_buffers()).keys()


@pytest.mark.parametrize(("renorm", "norm", "shape"), PAIRS)
@pytest.mark.parametrize("assign", [False, True])
def test_strict_loading_both_ways(
    renorm: type[nn.Module], norm: type[nn.Module], shape: tuple[int, ...], assign: bool
) -> None:
    for source, target in ((renorm(5), norm(5)), (norm(5), renorm(5)), (renorm(5), renorm(5))):
        trained(source, shape)
        result = target.load_state_dict(source.state_dict(), strict=True, assign=assign)
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert_same_state(source, target)
        x = torch.randn(shape)
        assert torch.equal(source.eval()(x), target.eval()(x))
        target.train()(x)  # and it trains on
        assert target.num_batches_tracked == 4


def test_strict_loading_refuses_what_batch_norm_refuses() -> None:
    layer = brn.BatchRenorm2d(5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(nn.BatchNorm2d(6).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(nn.BatchNorm2d(5, affine=False).state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        brn.BatchRenorm2d(5, affine=False).load_state_dict(nn.BatchNorm2d(5).state_dict())


@pytest.mark.parametrize("metadata", [None, {"": {"version": 1}, "1": {"version": 1}}])
def test_state_dicts_of_before_the_counter(metadata: dict[str, Any] | None) -> None:
    """torch's batch norm of before version 2 had no num_batches_tracked; the layer keeps its own."""
    model = nn.Sequential(nn.Conv2d(3, 5, 1), brn.BatchRenorm2d(5))
    brn.set_step(model, 7)
    old = OrderedDict((k, v.clone() + 1) for k, v in model.state_dict().items() if "num_batches" not in k)
    if metadata is not None:
        old._metadata = metadata  # type: ignore[attr-defined]
    model.load_state_dict(old, strict=True)
    assert model[1].num_batches_tracked == 7
    assert torch.equal(model[1].running_mean, old["1.running_mean"])
    new = OrderedDict(old)
    new._metadata = {"1": {"version": 2}}  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        model.load_state_dict(new, strict=True)


def test_running_std_is_sigma() -> None:
    layer = brn.BatchRenorm1d(3, eps=0.5)
    torch.testing.assert_close(layer.running_std, torch.full((3,), 1.5).sqrt())
    layer.running_var.copy_(torch.tensor([0.0, 3.5, 1e6]))
    torch.testing.assert_close(layer.running_std, torch.tensor([0.5, 4.0, 1e6 + 0.5]).sqrt())
    with pytest.raises(AttributeError):
        layer.running_std = torch.ones(3)
    assert brn.BatchRenorm1d(3, track_running_stats=False).running_std is None
    # It is the number that inference divides by.
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer.eval()(x), (x - layer.running_mean) / layer.running_std)


def test_a_constant_channel_keeps_its_variance_at_zero() -> None:
    """sigma**2 - eps, rounded, must not become a negative variance."""
    layer = brn.BatchRenorm1d(2, momentum=1.0, eps=1e-3)
    for value in (3.0, 1e3, -7.7):
        y = layer(torch.full((8, 2), value))
        assert (layer.running_var >= 0).all()
        assert layer.running_var.max() < 1e-9
        assert y.isfinite().all()
    # the rounding of the mean, u |mean|, over sigma = sqrt(eps), twice: once in the affine's offset
    assert layer.eval()(torch.full((8, 2), -7.7)).abs().max() <= 2 * 2**-24 * 7.7 / 1e-3**0.5


# Copies.


def _copies(layer: nn.Module) -> Iterator[nn.Module]:
    yield copy.deepcopy(layer)
    yield pickle.loads(pickle.dumps(layer))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = type(layer)(5, momentum=0.3, clip=layer.clip, microbatch_size=layer.microbatch_size)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    yield fresh


@pytest.mark.parametrize(("renorm", "norm", "shape"), PAIRS)
def test_copies_are_equal_and_independent(
    renorm: type[nn.Module], norm: type[nn.Module], shape: tuple[int, ...]
) -> None:
    clip = brn.ClipSchedule(1.5, 0.7, 1, 4, 6)
    layer = trained(renorm(5, momentum=0.3, clip=clip, microbatch_size=3), shape)
    for other in _copies(layer):
        assert type(other) is renorm
        assert_same_state(layer, other)
        assert repr(other) == repr(layer)
        before = copy.deepcopy(layer.state_dict())
        twin = copy.deepcopy(layer)
        # Both at once, and their backwards with the activations recomputed: histories are not shared either.
        xs = [torch.randn(shape).requires_grad_(), torch.randn(shape).requires_grad_()]
        dy = torch.randn(shape)
        for x, module in zip(xs, (other, twin)):
            torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False).backward(dy)
        assert all(torch.equal(v, layer.state_dict()[k]) for k, v in before.items())
        expected = [x.detach().clone().requires_grad_() for x in xs]
        for x in expected:
            copy.deepcopy(layer)(x).backward(dy)
        for x, e in zip(xs, expected):
            assert torch.equal(x.grad, e.grad)


def _model() -> nn.Module:
    clip = brn.ClipSchedule(1.5, 0.7, warmup=3, d_full=8, r_full=12)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        brn.BatchRenorm2d(4, momentum=0.2, clip=clip, microbatch_size=4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        brn.BatchRenorm2d(4, momentum=None, clip=clip),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 6),
        brn.BatchRenorm1d(6, momentum=0.2, clip=clip),
    )


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 2, 7, 7, generator=generator) * (1 + step / 5)
        dy = torch.randn(8, 6, generator=generator)
        optimizer.zero_grad()
        model(x).backward(dy)
        optimizer.step()


@pytest.mark.parametrize("at", [1, 3, 4, 9, 13])
@pytest.mark.parametrize("how", ["same model", "checkpoint", "deepcopy"])
def test_resuming_is_bitwise_the_uninterrupted_run(at: int, how: str) -> None:
    """Interrupted in each phase of the schedule."""
    whole, part = _model(), _model()
    part.load_state_dict(whole.state_dict())
    adam = {"lr": 1e-2}
    _train(whole, torch.optim.Adam(whole.parameters(), **adam), range(16))

    optimizer = torch.optim.Adam(part.parameters(), **adam)
    _train(part, optimizer, range(at))
    if how != "same model":
        buffer = io.BytesIO()
        torch.save({"model": part.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        part = copy.deepcopy(part) if how == "deepcopy" else _model()
        part.load_state_dict(saved["model"], strict=True)
        optimizer = torch.optim.Adam(part.parameters(), lr=123.0)
        optimizer.load_state_dict(saved["optimizer"])
    _train(part, optimizer, range(at, 16))
    assert_same_state(whole, part)


# The counter and the schedule.


def test_training_counts_and_inference_does_not() -> None:
    layer = brn.BatchRenorm2d(3)
    for step in range(3):
        assert layer.num_batches_tracked == step
        layer(torch.randn(4, 3, 2, 2))
    state = copy.deepcopy(layer.state_dict())
    layer.eval()
    for x in (torch.randn(4, 3, 2, 2) * 100, torch.randn(1, 3, 1, 1), torch.full((2, 3, 2, 2), torch.nan)):
        layer(x)
        with torch.no_grad():
            layer(x)
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in state.items())
    with torch.no_grad():  # as batch norm: training is the layer's mode, not autograd's
        layer.train()(torch.randn(4, 3, 2, 2))
    assert layer.num_batches_tracked == 4


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_one_forward_is_one_step(microbatch_size: int | None) -> None:
    layer = brn.BatchRenorm1d(3, microbatch_size=microbatch_size)
    layer(torch.randn(8, 3))
    assert layer.num_batches_tracked == 1


def _correction(layer: brn.BatchRenorm, mean: float, std: float) -> tuple[float, float]:
    """r and d of a forward on a minibatch of this mean and standard deviation: the output's, weight 1 and bias 0."""
    x = torch.randn(64, 1, dtype=torch.float64)
    x = (x - x.mean()) / x.std(correction=0) * std + mean
    y = layer(x).detach()
    return y.std(correction=0).item(), y.mean().item()


def test_schedule_is_a_function_of_the_saved_counter() -> None:
    """What a layer clips to, observed from outside, at steps given by state dict, by set_step and by training."""
    clip = brn.ClipSchedule(r_max=3.0, d_max=5.0, warmup=2, d_full=6, r_full=10)

    def layer() -> brn.BatchRenorm:
        return brn.BatchRenorm1d(1, eps=0.0, momentum=0.0, clip=clip, dtype=torch.float64)

    counted = layer()
    for step in range(15):
        r_max, d_max = oracle.limits(step, 3.0, 5.0, 2, 6, 10)
        loaded, placed = layer(), layer()
        loaded.load_state_dict({**layer().state_dict(), "num_batches_tracked": torch.tensor(step)})
        brn.set_step(placed, step)
        for each in (counted, loaded, placed):
            # far outside of any limit, below in a copy and above; x has its own rounding, u |mean| / std = 1e-13 * 1e6
            assert _correction(copy.deepcopy(each), -1e3, 1e-3) == pytest.approx(
                (1 / r_max, -d_max), rel=1e-6, abs=1e-6
            )
            assert _correction(each, 1e3, 1e3) == pytest.approx((r_max, d_max), rel=1e-6, abs=1e-6)
            assert each.num_batches_tracked == step + 1


def test_limits_hold_for_ever() -> None:
    """The growing warm-up factor of other implementations: 200 steps past r_full, and far beyond."""
    clip = brn.ClipSchedule(r_max=3.0, d_max=5.0, warmup=5, d_full=25, r_full=40)
    layer = brn.BatchRenorm1d(1, eps=0.0, momentum=0.0, clip=clip, dtype=torch.float64)
    for step in itertools.chain(range(240), (10**6, 10**9, 2**53)):
        brn.set_step(layer, step)
        mean, std = (1e4, 1e4) if step % 2 else (-1e4, 1e-4)
        r, d = _correction(layer, mean, std)
        assert 1 / 3 - 1e-6 <= r <= 3 + 1e-6  # mean/std = 1e8 leaves 1e-8 of x
        assert -5 - 1e-6 <= d <= 5 + 1e-6


def test_papers_schedule() -> None:
    schedule = brn.ClipSchedule()
    for step in (0, 1, 4_999, 5_000):
        assert schedule(step) == (1.0, 0.0)
    assert schedule(5_001)[0] > 1
    assert schedule(5_001)[1] > 0
    assert schedule(15_000)[1] == 2.5
    assert schedule(24_999)[1] < 5
    assert schedule(22_500)[0] == 2.0
    assert schedule(25_000) == (pytest.approx(1 + 2 * 20 / 35), 5.0)
    assert schedule(39_999)[0] < 3
    for step in (40_000, 40_001, 130_000, 10**12):
        assert schedule(step) == (3.0, 5.0)
    for step in range(0, 60_000, 997):
        # the form in which ludvb/batchrenorm has it
        assert schedule(step)[0] == pytest.approx(min(max(2 * step / 35_000 + 25 / 35, 1), 3), rel=1e-12)
        assert schedule(step)[1] == pytest.approx(min(max(5 * step / 20_000 - 25 / 20, 0), 5), rel=1e-12, abs=1e-12)
        assert schedule(step) == pytest.approx(oracle.limits(step), rel=1e-12)


def test_papers_schedule_as_fractions() -> None:
    assert brn.ClipSchedule.for_training(130_000) == brn.ClipSchedule()
    assert brn.ClipSchedule.for_training(1_300, 1.5, 0.5) == brn.ClipSchedule(1.5, 0.5, 50, 250, 400)
    for total in (1, 2, 7, 100, 12_345):
        schedule = brn.ClipSchedule.for_training(total)
        for got, fraction in ((schedule.warmup, 5), (schedule.d_full, 25), (schedule.r_full, 40)):
            assert abs(got - total * fraction / 130) <= 0.5
        assert schedule(total) == (3.0, 5.0)


def test_early_schedule() -> None:
    assert brn.ClipSchedule.early(1_300, 1.5, 0.5) == brn.ClipSchedule(1.5, 0.5, 0, 130, 130)
    assert brn.ClipSchedule.early(3)(0) == (3.0, 5.0)  # no tenth to wait for
    for schedule in (brn.ClipSchedule.early, brn.ClipSchedule.for_training):
        with pytest.raises(ValueError, match="total_steps >= 1, got 0"):
            schedule(0)


STEPS = (0, 1, 2, 9, 10, 11, 990, 991, 5_000, 10**9)


@pytest.mark.parametrize(("momentum", "window"), [(0.01, 0.1), (0.0, 1.0), (0.3, 0.1), (0.5, 0.0), (1.0, 0.5), (0, 1)])
def test_momentum_schedule(momentum: float, window: float) -> None:
    schedule = brn.MomentumSchedule(momentum, window)
    assert schedule == pickle.loads(pickle.dumps(schedule))
    for step in STEPS:
        expected = max(momentum, 1 / (1 + window * step))
        assert schedule(step) == pytest.approx(expected, rel=1e-14)
        for dtype in (torch.int64, torch.int32):
            of_tensor = schedule(torch.tensor(step, dtype=dtype))
            assert (of_tensor.dtype, of_tensor.shape) == (torch.float64, ())
            assert of_tensor.item() == schedule(step)


def test_averages_look_back_over_a_part_of_the_training() -> None:
    """The same as weights given one by one; and the counter that it goes by is saved."""
    schedule = brn.MomentumSchedule(0.05, 0.5)
    scheduled = brn.BatchRenorm1d(3, momentum=schedule, dtype=torch.float64)
    given = brn.BatchRenorm1d(3, dtype=torch.float64)
    for step in range(60):
        given.momentum = schedule(step)
        if step == 30:
            resumed = brn.BatchRenorm1d(3, momentum=schedule, dtype=torch.float64)
            resumed.load_state_dict(scheduled.state_dict())
            scheduled = resumed
        x = torch.randn(8, 3, dtype=torch.float64) * 3 + step
        assert torch.equal(scheduled(x), given(x))
        assert torch.equal(scheduled.running_mean, given.running_mean)
        assert torch.equal(scheduled.running_var, given.running_var)
    assert repr(scheduled).count("MomentumSchedule(momentum=0.05, window=0.5)") == 1


def test_cumulative_mean_is_a_momentum_schedule() -> None:
    cumulative, scheduled = (brn.BatchRenorm2d(2, momentum=m) for m in (None, brn.MomentumSchedule(0.0, 1.0)))
    for _ in range(20):
        x = torch.randn(4, 2, 3, 3)
        assert torch.equal(cumulative(x), scheduled(x))
    assert torch.equal(cumulative.running_var, scheduled.running_var)


@pytest.mark.parametrize("option", ["momentum", "window"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_momentum_schedule_refuses(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"expected {option} in \[0, 1\], got"):
        brn.MomentumSchedule(**{option: value})


def test_constant_schedule() -> None:
    for step in (0, 1, 10**9):
        assert brn.ClipSchedule.constant(1.5, 0.5)(step) == (1.5, 0.5)
    assert brn.ClipSchedule.constant()(0) == (3.0, 5.0)


def test_a_ramp_without_length_is_a_jump() -> None:
    schedule = brn.ClipSchedule(3.0, 5.0, warmup=4, d_full=4, r_full=4)
    assert [schedule(step) for step in (3, 4, 5)] == [(1.0, 0.0), (3.0, 5.0), (3.0, 5.0)]
    assert [tuple(v.item() for v in schedule(torch.tensor(step))) for step in (3, 4)] == [(1.0, 0.0), (3.0, 5.0)]


@pytest.mark.parametrize(
    "schedule",
    [
        brn.ClipSchedule(),
        brn.ClipSchedule.constant(1.7, 0.3),
        brn.ClipSchedule(1.1, 9.0, 3, 3, 7),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_schedule_of_a_tensor_is_that_of_an_int(schedule: brn.ClipSchedule, dtype: torch.dtype) -> None:
    for step in (0, 1, 2, 3, 4, 5, 6, 7, 4_999, 5_000, 5_001, 12_345, 25_000, 40_000, 10**9):
        r_max, d_max = schedule(torch.tensor(step, dtype=dtype))
        assert r_max.shape == d_max.shape == ()
        assert (r_max.item(), d_max.item()) == schedule(step)


@pytest.mark.parametrize("d_full", [2, 6])
def test_infinite_limits(d_full: int) -> None:
    """inf means unclipped; during the warm-up it is closed all the same."""
    for r_max, d_max in ((math.inf, 5.0), (3.0, math.inf), (math.inf, math.inf)):
        schedule = brn.ClipSchedule(r_max, d_max, warmup=2, d_full=d_full, r_full=d_full)
        for step, expected in ((0, (1.0, 0.0)), (1, (1.0, 0.0)), (6, (r_max, d_max)), (99, (r_max, d_max))):
            assert schedule(step) == expected
            assert tuple(v.item() for v in schedule(torch.tensor(step))) == expected
        layer = brn.BatchRenorm1d(3, clip=schedule)
        for _ in range(9):
            assert layer(torch.randn(8, 3)).isfinite().all()


def test_schedule_is_a_value() -> None:
    assert brn.ClipSchedule() == brn.ClipSchedule()
    assert hash(brn.ClipSchedule()) == hash(brn.ClipSchedule())
    assert pickle.loads(pickle.dumps(brn.ClipSchedule(2.0))) == brn.ClipSchedule(2.0)
    with pytest.raises(AttributeError):
        brn.ClipSchedule().r_max = 4.0  # type: ignore[misc]


def test_own_schedule() -> None:
    """Any function of the step tensor will do."""

    def schedule(step: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(step < 2, 1.0, 2.0), torch.where(step < 2, 0.0, 0.5)

    layer = brn.BatchRenorm1d(1, eps=0.0, momentum=0.0, clip=schedule, dtype=torch.float64)
    got = [_correction(layer, 1e3, 1e3) for _ in range(4)]
    assert got == [pytest.approx(e, abs=1e-9) for e in ((1, 0), (1, 0), (2, 0.5), (2, 0.5))]


def test_set_step() -> None:
    model = _model()
    untracked = brn.BatchRenorm1d(6, track_running_stats=False)
    model.append(untracked)
    counters = [m.num_batches_tracked for m in model if isinstance(m, brn.BatchRenorm)]
    brn.set_step(model, 123)
    assert [None if c is None else int(c) for c in counters] == [123, 123, 123, None]  # in place
    brn.set_step(model[1], 0)
    assert int(model[1].num_batches_tracked) == 0
    norm = nn.BatchNorm1d(3)
    brn.set_step(norm, 5)
    assert norm.num_batches_tracked == 0


def test_reset() -> None:
    layer = trained(brn.BatchRenorm2d(5, clip=brn.ClipSchedule.constant()), (4, 5, 3, 3))
    weight = layer.weight.detach().clone()
    layer.reset_running_stats()
    assert torch.equal(layer.weight, weight)
    fresh = brn.BatchRenorm2d(5)
    for key in KEYS[2:]:
        assert torch.equal(layer.state_dict()[key], fresh.state_dict()[key])
    trained(layer, (4, 5, 3, 3)).reset_parameters()
    assert_same_state(layer, fresh)
    brn.BatchRenorm2d(5, affine=False, track_running_stats=False).reset_parameters()


# Names, moves and lazy layers.


def test_repr() -> None:
    text = repr(brn.BatchRenorm2d(7, eps=1e-3, momentum=0.2, affine=False))
    assert text.startswith("BatchRenorm2d(7, eps=0.001, momentum=0.2, affine=False, track_running_stats=True")
    assert "ClipSchedule(r_max=3.0, d_max=5.0, warmup=5000, d_full=25000, r_full=40000)" in text
    assert "microbatch" not in text
    assert "microbatch_size=4" in repr(brn.BatchRenorm2d(7, microbatch_size=4))


def test_is_not_a_batch_norm() -> None:
    """Or `convert_sync_batchnorm`, which looks for `_BatchNorm`, would silently replace it."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(_model())
    assert sum(isinstance(m, brn.BatchRenorm) for m in model) == 3


def test_dtype_moves() -> None:
    layer = brn.BatchRenorm2d(3).double()
    assert layer.weight.dtype == layer.running_var.dtype == torch.float64
    assert layer.num_batches_tracked.dtype == torch.long
    layer(torch.randn(2, 3, 4, 4, dtype=torch.float64))
    layer.to(torch.bfloat16)(torch.randn(2, 3, 4, 4, dtype=torch.bfloat16))
    layer.float()(torch.randn(2, 3, 4, 4))
    assert layer.num_batches_tracked == 3


def test_meta_device() -> None:
    """Built without memory, materialised later: the usual way with large models."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(2, 3, 1), brn.BatchRenorm2d(3))
    assert model(torch.randn(4, 2, 5, 5, device="meta")).shape == (4, 3, 5, 5)
    source = nn.Sequential(nn.Conv2d(2, 3, 1), brn.BatchRenorm2d(3))
    emptied = copy.deepcopy(model).to_empty(device="cpu")
    emptied.load_state_dict(source.state_dict(), strict=True)
    assigned = copy.deepcopy(model)
    assigned.load_state_dict(copy.deepcopy(source.state_dict()), strict=True, assign=True)
    x = torch.randn(4, 2, 5, 5)
    expected = source(x)
    for each in (emptied, assigned):
        assert torch.equal(each(x), expected)
        assert_same_state(each, source)


@pytest.mark.parametrize(("lazy", "renorm", "lazy_norm", "shape"), LAZY)
def test_lazy(
    lazy: type[nn.Module], renorm: type[nn.Module], lazy_norm: type[nn.Module], shape: tuple[int, ...]
) -> None:
    options = {"eps": 1e-3, "momentum": 0.3, "clip": brn.ClipSchedule.constant(1.5, 0.7), "microbatch_size": 3}
    layer, eager = lazy(**options), renorm(5, **options)
    assert type(layer) is lazy
    assert list(layer.state_dict()) == list(lazy_norm().state_dict()) == KEYS
    x = torch.randn(shape)
    assert torch.equal(layer(x), eager(x))
    assert type(layer) is renorm
    assert layer.num_features == 5
    assert repr(layer) == repr(eager)
    assert_same_state(layer, eager)
    assert torch.equal(layer(x), eager(x))
    # state of a trained layer, ours or batch norm's, into one that has not seen its size
    for source in (eager, trained(lazy_norm(eps=1e-3), shape)):
        fresh = lazy(**options)
        fresh.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(fresh.eval()(x), source.eval()(x))
        assert_same_state(fresh, source)
        assert fresh.num_batches_tracked == source.num_batches_tracked


@pytest.mark.parametrize(("lazy", "renorm", "lazy_norm", "shape"), LAZY)
def test_lazy_without_affine_or_averages(
    lazy: type[nn.Module], renorm: type[nn.Module], lazy_norm: type[nn.Module], shape: tuple[int, ...]
) -> None:
    for affine, tracked in itertools.product((True, False), repeat=2):
        layer = lazy(affine=affine, track_running_stats=tracked, dtype=torch.float64)
        layer(torch.randn(shape, dtype=torch.float64))
        assert list(layer.state_dict()) == KEYS[0 if affine else 2 : None if tracked else 2]
        assert all(v.dtype == torch.float64 for k, v in layer.state_dict().items() if k != KEYS[4])


@pytest.mark.parametrize("converted", [False, True])
def test_deferred_initialisation(converted: bool) -> None:
    """Built without memory, as large models are, then given memory and a state: nothing may stay behind on "meta"."""
    torch._dynamo.reset()
    aten.as_tensor.cache_clear()
    eager = brn.BatchRenorm1d(3, momentum=0.3, clip=brn.ClipSchedule.constant())
    with torch.device("meta"):
        layer = brn.convert_batchnorm(nn.BatchNorm1d(3)) if converted else brn.BatchRenorm1d(3)
        # Another layer, whose first forward falls into this context.
        eager(torch.ones(4, 3, device="cpu") * torch.arange(4.0, device="cpu")[:, None])
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(eager.state_dict())
    layer.momentum, layer.clip = eager.momentum, eager.clip
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x = torch.randn(8, 3)
        torch.testing.assert_close(compiled(x), eager(x))
    for a, b in zip(layer.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b)
