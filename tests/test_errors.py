"""Bad input: one sentence with what was expected, what came and what to do; and nothing has moved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchrenorm as brn


def is_one_sentence(error: BaseException) -> None:
    message = str(error)
    assert "\n" not in message
    assert message.startswith("expected ")
    assert "got " in message
    assert len(message.split("; ")) == 2 or ", so " in message, message  # ... what to do
    assert message.split("; ")[-1].strip()
    assert not message.endswith(".")


def mask_of(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


X2 = torch.randn(6, 5, 3, 3)
# layer, input, error, parts of its message
CALLS: dict[str, tuple[Callable[[], brn.BatchRenorm], tuple[Any, ...], type[Exception], list[str]]] = {
    "rank 3 to 2d": (lambda: brn.BatchRenorm2d(5), (torch.randn(6, 5, 3),), ValueError, ["4-d", "3-d", "(6, 5, 3)"]),
    "rank 5 to 2d": (lambda: brn.BatchRenorm2d(5), (torch.randn(6, 5, 3, 3, 3),), ValueError, ["4-d", "5-d"]),
    "rank 4 to 1d": (lambda: brn.BatchRenorm1d(5), (X2,), ValueError, ["2-d or 3-d", "4-d", "BatchRenorm1d"]),
    "rank 1 to 1d": (lambda: brn.BatchRenorm1d(5), (torch.randn(5),), ValueError, ["2-d or 3-d", "1-d"]),
    "rank 4 to 3d": (lambda: brn.BatchRenorm3d(5), (X2,), ValueError, ["5-d", "4-d"]),
    "rank 1 to any": (lambda: brn.BatchRenorm(5), (torch.randn(5),), ValueError, ["(N, C)", "(5,)"]),
    "rank 0 to any": (lambda: brn.BatchRenorm(5), (torch.tensor(1.0),), ValueError, ["(N, C)", "()"]),
    "wrong C": (lambda: brn.BatchRenorm2d(4), (X2,), ValueError, ["(4,)", "(6, 5, 3, 3)", "(5,)"]),
    "wrong C, no averages": (
        lambda: brn.BatchRenorm2d(4, track_running_stats=False),
        (X2,),
        ValueError,
        ["(4,)", "weight"],
    ),
    "channels at the end": (lambda: brn.BatchRenorm2d(5), (X2.movedim(1, -1),), ValueError, ["dimension 1"]),
    "one value, 2-d": (
        lambda: brn.BatchRenorm1d(5),
        (torch.randn(1, 5),),
        ValueError,
        ["more than one value", "(1, 5)"],
    ),
    "one value, 4-d": (
        lambda: brn.BatchRenorm2d(5),
        (torch.randn(1, 5, 1, 1),),
        ValueError,
        ["more than one value", "(1, 5, 1, 1)", "eval()"],
    ),
    "last microbatch of one value": (
        lambda: brn.BatchRenorm1d(5, microbatch_size=4),
        (torch.randn(9, 5),),
        ValueError,
        ["more than one value", "(9, 5)", "last microbatch of 4", "1 sample", "drop"],
    ),
    "microbatches of one value": (
        lambda: brn.BatchRenorm1d(5, microbatch_size=1),
        (torch.randn(9, 5),),
        ValueError,
        ["more than one value"],
    ),
    "empty batch": (lambda: brn.BatchRenorm2d(5), (torch.randn(0, 5, 3, 3),), ValueError, ["(0, 5, 3, 3)", "empty"]),
    "empty image": (lambda: brn.BatchRenorm2d(5), (torch.randn(2, 5, 0, 3),), ValueError, ["(2, 5, 0, 3)", "empty"]),
    "integers": (lambda: brn.BatchRenorm2d(5), (X2.long(),), TypeError, ["float", "torch.int64", "x.float()"]),
    "booleans": (lambda: brn.BatchRenorm2d(5), (X2 > 0,), TypeError, ["float", "torch.bool"]),
    "complex": (lambda: brn.BatchRenorm2d(5), (X2.to(torch.complex64),), TypeError, ["float", "torch.complex64"]),
    "a list": (lambda: brn.BatchRenorm1d(2), ([[1.0, 2.0]],), TypeError, ["Tensor", "list", "as_tensor"]),
    "an array": (lambda: brn.BatchRenorm1d(5), (torch.randn(6, 5).numpy(),), TypeError, ["Tensor", "ndarray"]),
    "mask with channels": (
        lambda: brn.BatchRenorm2d(5),
        (X2, mask_of(6, 5, 3, 3)),
        ValueError,
        ["(6, 3, 3)", "(6, 5, 3, 3)"],
    ),
    "mask of samples": (lambda: brn.BatchRenorm2d(5), (X2, mask_of(6)), ValueError, ["(6, 3, 3)", "(6,)"]),
    "mask to broadcast": (lambda: brn.BatchRenorm2d(5), (X2, mask_of(1, 3, 3)), ValueError, ["(6, 3, 3)", "(1, 3, 3)"]),
    "mask of floats": (
        lambda: brn.BatchRenorm2d(5),
        (X2, torch.ones(6, 3, 3)),
        TypeError,
        ["torch.bool", "torch.float32"],
    ),
    "mask of bytes": (
        lambda: brn.BatchRenorm2d(5),
        (X2, torch.ones(6, 3, 3, dtype=torch.uint8)),
        TypeError,
        ["torch.bool", "torch.uint8"],
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CALLS)
def test_bad_call(case: str, training: bool) -> None:
    make, arguments, error, parts = CALLS[case]
    layer = make()
    for buffer in layer.buffers():
        buffer.copy_(buffer + 2)
    layer.train(training)
    before = copy.deepcopy(layer.state_dict())
    if "more than one value" in parts and not training:
        layer(*arguments)  # inference has no minibatch
    else:
        with pytest.raises(error) as caught:
            layer(*arguments)
        is_one_sentence(caught.value)
        for part in parts:
            assert part in str(caught.value)
    after = layer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # and the layer works on
    if case not in ("wrong C, no averages",):
        good = {1: (6,), 2: (6, 3, 3), 3: (6, 2, 3, 3)}
        rank = {brn.BatchRenorm2d: 2, brn.BatchRenorm3d: 3}.get(type(layer), 1)
        N, *spatial = good[rank]
        if layer.microbatch_size == 1:
            layer.microbatch_size = None
        layer(torch.randn(N, layer.num_features, *spatial))


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"num_features": -1}, ValueError, ["num_features", "-1"]),
        ({"num_features": 2.0}, ValueError, ["num_features", "2.0"]),
        ({"num_features": True}, ValueError, ["num_features", "True"]),
        ({"eps": -1e-5}, ValueError, ["eps >= 0", "-1e-05"]),
        ({"eps": float("nan")}, ValueError, ["eps >= 0", "nan"]),
        ({"momentum": 1.5}, ValueError, ["[0, 1]", "1.5"]),
        ({"momentum": -0.1}, ValueError, ["[0, 1]", "-0.1"]),
        ({"momentum": float("nan")}, ValueError, ["[0, 1]", "nan"]),
        ({"microbatch_size": 0}, ValueError, ["microbatch_size >= 1", "got 0"]),
        ({"microbatch_size": -4}, ValueError, ["microbatch_size >= 1", "-4"]),
        ({"microbatch_size": 4.0}, TypeError, ["microbatch_size", "int", "float"]),
        ({"clip": 3.0}, TypeError, ["ClipSchedule", "3.0", "constant"]),
        ({"clip": (3.0, 5.0)}, TypeError, ["ClipSchedule", "constant"]),
    ],
)
@pytest.mark.parametrize("cls", [brn.BatchRenorm1d, brn.BatchRenorm2d, brn.LazyBatchRenorm2d, brn.convert_batchnorm])
def test_bad_layer(
    cls: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    if cls is brn.convert_batchnorm:
        if not arguments.keys() <= {"momentum", "microbatch_size", "clip"}:
            pytest.skip("no argument of convert_batchnorm")
        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
        with pytest.raises(error) as caught:
            cls(model, **arguments)
        assert all(type(m) is nn.BatchNorm1d for m in model)
    else:
        if "num_features" in arguments and cls is brn.LazyBatchRenorm2d:
            pytest.skip("lazy layers have none")
        if cls is not brn.LazyBatchRenorm2d:
            arguments = {"num_features": 3, **arguments}
        with pytest.raises(error) as caught:
            cls(**arguments)
    is_one_sentence(caught.value)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: brn.ClipSchedule(r_max=0.99), ["r_max >= 1", "0.99"]),
        (lambda: brn.ClipSchedule(r_max=float("nan")), ["r_max >= 1", "nan"]),
        (lambda: brn.ClipSchedule(d_max=-0.1), ["d_max >= 0", "-0.1"]),
        (lambda: brn.ClipSchedule(d_max=float("nan")), ["d_max >= 0", "nan"]),
        (lambda: brn.ClipSchedule(warmup=-1), ["warmup", "-1"]),
        (lambda: brn.ClipSchedule(warmup=10, d_full=9, r_full=20), ["warmup <= d_full", "10", "9"]),
        (lambda: brn.ClipSchedule(warmup=10, d_full=20, r_full=9), ["warmup <= r_full", "10", "9"]),
        (lambda: brn.ClipSchedule.constant(0.5), ["r_max >= 1", "0.5"]),
        (lambda: brn.ClipSchedule.constant(2.0, -1.0), ["d_max >= 0", "-1.0"]),
        (lambda: brn.ClipSchedule.for_training(0), ["total_steps >= 1", "got 0"]),
        (lambda: brn.ClipSchedule.for_training(-5), ["total_steps >= 1", "-5"]),
        (lambda: brn.ClipSchedule.for_training(100, 0.5), ["r_max >= 1", "0.5"]),
        (lambda: brn.set_step(brn.BatchRenorm1d(3), -1), ["step >= 0", "-1"]),
    ],
)
def test_bad_schedule(make: Callable[[], Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        make()
    is_one_sentence(caught.value)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"r_max": 0.9}, ValueError, ["r_max >= 1", "0.9"]),
        ({"d_max": -1.0}, ValueError, ["d_max >= 0", "-1.0"]),
        ({"eps": -1e-3}, ValueError, ["eps >= 0", "-0.001"]),
        ({"momentum": 2.0}, ValueError, ["[0, 1]", "2.0"]),
        ({"microbatch_size": 0}, ValueError, ["microbatch_size >= 1"]),
        ({"microbatch_size": 3, "x": torch.randn(7, 5)}, ValueError, ["more than one value", "last microbatch of 3"]),
        ({"backend": "cudnn"}, ValueError, ["'aten', 'decomposed'", "'cudnn'"]),
        ({"backend": ""}, ValueError, ["'aten', 'decomposed'", "''"]),
        ({"process_group": object()}, TypeError, ["process_group", "get_group"]),
        ({"running_var": None}, ValueError, ["both or neither", "running_var"]),
        ({"running_mean": None}, ValueError, ["both or neither", "running_mean"]),
        ({"running_mean": torch.zeros(4)}, ValueError, ["running_mean", "(5,)", "(4,)"]),
        ({"running_var": torch.ones(5, 1)}, ValueError, ["running_var", "(5,)", "(5, 1)"]),
        ({"weight": torch.ones(4)}, ValueError, ["weight", "(5,)", "(4,)"]),
        ({"bias": torch.ones(())}, ValueError, ["bias", "(5,)", "()"]),
        ({"mask": mask_of(5)}, ValueError, ["mask", "(6,)", "(5,)"]),
        ({"mask": torch.ones(6)}, TypeError, ["torch.bool", "torch.float32"]),
        ({"mask": mask_of(6), "backend": "aten"}, ValueError, ["mask=None", "decomposed"]),
        ({"x": torch.randn(6)}, ValueError, ["(N, C)", "(6,)"]),
        ({"x": torch.ones(6, 5, dtype=torch.int32)}, TypeError, ["torch.int32"]),
    ],
)
def test_bad_function_call(changes: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    mean, var = torch.randn(5), torch.rand(5) + 1
    arguments = {"x": torch.randn(6, 5), "running_mean": mean, "running_var": var}
    before = mean.clone(), var.clone()
    with pytest.raises(error) as caught:
        brn.batch_renorm(**{**arguments, **changes}, training=True)
    is_one_sentence(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


def test_process_group_of_a_layer_says_when_it_is_made() -> None:
    """Not at the first step of a job that has waited in a queue."""
    with pytest.raises(TypeError, match="process_group"):
        brn.BatchRenorm2d(3, process_group=object())
    with pytest.raises(TypeError, match="process_group"):
        brn.convert_batchnorm(nn.BatchNorm2d(3), process_group=object())


def test_every_error_of_the_layer_is_also_one_after_some_training() -> None:
    """Averages and step that have moved stay where they are, to the last bit, and so does the run after the error."""
    layer = brn.BatchRenorm1d(5, momentum=0.3, microbatch_size=4, clip=brn.ClipSchedule.constant())
    batches = [torch.randn(8, 5) * 2 + 1 for _ in range(4)]
    for x in batches[:2]:
        layer(x)
    undisturbed = copy.deepcopy(layer)
    for bad in (torch.randn(9, 5), torch.randn(8, 4), torch.randn(8, 5).int(), torch.randn(8), torch.randn(0, 5)):
        with pytest.raises((ValueError, TypeError)):
            layer(bad)
        with pytest.raises((ValueError, TypeError)):
            layer(batches[2], torch.ones(7, dtype=torch.bool))
    for x in batches[2:]:
        assert torch.equal(layer(x), undisturbed(x))
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), undisturbed.state_dict().values()))


# Not finite.


@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_not_finite_shows_in_y_and_not_in_the_averages(
    layout: str, dtype: torch.dtype, value: float, microbatch_size: int | None, backend: str
) -> None:
    x = torch.randn(6, 4, 3, 3).to(dtype)
    x[0, 1, 2, 2] = value
    x[5, 3, 0, 0] = value
    x = x.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    own = torch.float64 if dtype == torch.float64 else torch.float32
    mean, var = torch.randn(4, dtype=own), torch.rand(4, dtype=own) + 1
    before = mean.clone(), var.clone()
    options = {"training": True, "momentum": 0.3, "microbatch_size": microbatch_size, "backend": backend}
    y = brn.batch_renorm(x, mean, var, torch.ones(4, dtype=own), torch.ones(4, dtype=own), **options)

    # the same elements as in batch norm, microbatch by microbatch
    expected = torch.cat(
        [nn.functional.batch_norm(part, None, None, training=True) for part in x.split(microbatch_size or 6)]
    )
    assert torch.equal(y.isnan(), expected.isnan())
    assert not y.isinf().any()
    for channel in (1, 3):
        assert mean[channel] == before[0][channel]
        assert var[channel] == before[1][channel]
    for channel in (0, 2):
        assert mean[channel] != before[0][channel]
        assert var[channel] != before[1][channel]
    good_mean, good_var = before[0].clone(), before[1].clone()
    brn.batch_renorm(torch.where(x.isfinite(), x, 0), good_mean, good_var, **options)
    for channel in (0, 2):
        assert mean[channel] == good_mean[channel]
        assert var[channel] == good_var[channel]


def test_overflow_of_the_variance_counts_as_not_finite(backend: str) -> None:
    """Every element finite, their squares not."""
    x = torch.randn(8, 3)
    x[:, 1] *= 1e30
    mean, var = torch.zeros(3), torch.ones(3)
    brn.batch_renorm(x, mean, var, training=True, momentum=0.5, backend=backend)
    assert mean[1] == 0
    assert var[1] == 1
    assert mean.isfinite().all()
    assert var.isfinite().all()
    assert (mean[[0, 2]] != 0).all()


@pytest.mark.parametrize("momentum", [0.3, None])
def test_a_skipped_step_does_not_poison(momentum: float | None) -> None:
    """What a gradient scaler does: the forward overflows, it sees gradients that are not finite and skips.

    The layer must go on as if only the counter had moved.
    """
    model = nn.Sequential(nn.Linear(4, 6), brn.BatchRenorm1d(6, momentum=momentum, clip=brn.ClipSchedule.constant()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    skipped = 0
    for step in range(6):
        x = torch.randn(8, 4)
        if step == 3:
            x[2] = torch.inf
            averages = model[1].running_mean.clone(), model[1].running_var.clone()
        optimizer.zero_grad()
        y = model(x)
        loss = (y * torch.randn_like(y)).sum()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if all(torch.equal(a, b) for a, b in zip(before, model.parameters())):
            skipped += 1
            assert step == 3
            assert torch.equal(model[1].running_mean, averages[0])
            assert torch.equal(model[1].running_var, averages[1])
    assert skipped == 1
    assert model[1].num_batches_tracked == 6
    assert all(v.isfinite().all() for v in model.state_dict().values())
    assert model.eval()(torch.randn(8, 4)).isfinite().all()


def test_nan_in_inference_stays_where_it_is() -> None:
    layer = brn.BatchRenorm2d(3).eval()
    x = torch.randn(4, 3, 2, 2)
    x[1, 2, 0, 1] = torch.nan
    assert torch.equal(layer(x).isnan(), x.isnan())
