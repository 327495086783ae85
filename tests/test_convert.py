"""BatchNorm <-> BatchRenorm: what is converted, what stays itself, and that the result trains and infers right."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchrenorm as brn

LAYERS: dict[str, tuple[Callable[..., nn.Module], type[nn.Module], tuple[int, ...]]] = {
    "1d": (nn.BatchNorm1d, brn.BatchRenorm1d, (6, 5)),
    "1d of sequences": (nn.BatchNorm1d, brn.BatchRenorm1d, (6, 5, 4)),
    "2d": (nn.BatchNorm2d, brn.BatchRenorm2d, (6, 5, 3, 3)),
    "3d": (nn.BatchNorm3d, brn.BatchRenorm3d, (6, 5, 2, 3, 3)),
    "sync": (nn.SyncBatchNorm, brn.BatchRenorm, (6, 5, 3, 3)),
}
LAZY = {
    "1d": (nn.LazyBatchNorm1d, nn.BatchNorm1d, brn.LazyBatchRenorm1d, brn.BatchRenorm1d, (6, 5)),
    "2d": (nn.LazyBatchNorm2d, nn.BatchNorm2d, brn.LazyBatchRenorm2d, brn.BatchRenorm2d, (6, 5, 3, 3)),
    "3d": (nn.LazyBatchNorm3d, nn.BatchNorm3d, brn.LazyBatchRenorm3d, brn.BatchRenorm3d, (6, 5, 2, 3, 3)),
}
CLIP = brn.ClipSchedule(1.5, 0.7, warmup=4, d_full=7, r_full=9)


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's way: a batch norm that also applies the activation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Block(nn.Module):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.shared = shared
        self.deep = nn.ModuleDict({"list": nn.ModuleList([nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))])})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shared(self.deep["list"][0](self.norm(self.conv(x))))


def network() -> nn.Module:
    """Norms in a Sequential, in a block, in a dictionary of lists, and one shared by two blocks."""
    shared = nn.BatchNorm2d(4)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), Block(shared), Block(shared), nn.AvgPool2d(6), nn.Flatten(),
        nn.Linear(4, 5), nn.BatchNorm1d(5),
    )  # fmt: skip


def minibatch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 2, 8, 8, generator=generator) * 2 + 1, torch.randn(6, 5, generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x, dy = minibatch(step)
        optimizer.zero_grad()
        model(x).backward(dy)
        optimizer.step()


def norms(
    model: nn.Module, kind: type | tuple[type, ...] = (nn.modules.batchnorm._BatchNorm, brn.BatchRenorm)
) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, kind)]


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_there_and_back(case: str, training: bool, dtype: torch.dtype, options: dict[str, Any]) -> None:
    norm, renorm, shape = LAYERS[case]
    layer = norm(5, momentum=0.25, dtype=dtype, **options)
    for p in layer.parameters():
        nn.init.normal_(p)
    for _ in range(3):
        layer(torch.randn(shape, dtype=dtype) * 2 + 1)
    if options.get("affine", True):
        layer.bias.requires_grad_(False)
    layer.train(training)
    x = torch.randn(shape, dtype=dtype)
    original = copy.deepcopy(layer)
    expected = original.eval()(x)
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())

    converted = brn.convert_batchnorm(layer, clip=CLIP, microbatch_size=3)
    assert converted is layer
    assert type(converted) is renorm
    assert (converted.eps, converted.momentum, converted.clip, converted.microbatch_size) == (layer.eps, 0.01, CLIP, 3)
    assert converted.eps == options.get("eps", 1e-5)
    assert converted.training == training
    assert "BatchRenorm" in repr(converted)
    _assert_same(converted, original, tensors)
    assert torch.equal(converted.eval()(x), expected)

    back = brn.to_batchnorm(converted.train(training))
    assert type(back) is norm
    assert back.training == training
    assert repr(back) == repr(norm(5, momentum=0.01, dtype=dtype, **options))
    _assert_same(back, original, tensors)
    assert torch.equal(back.eval()(x), expected)
    assert back.__dict__.keys() == original.__dict__.keys()


def test_batch_norm_gets_the_weight_that_a_schedule_ends_at() -> None:
    schedule = brn.MomentumSchedule(0.02)
    layer = brn.convert_batchnorm(nn.BatchNorm1d(3), momentum=schedule)
    assert layer.momentum == schedule
    assert brn.to_batchnorm(layer).momentum == 0.02
    layer.train()(torch.randn(4, 3))


def _assert_same(layer: nn.Module, original: nn.Module, tensors: dict[str, Tensor]) -> None:
    now = dict(layer.named_parameters()) | dict(layer.named_buffers())
    assert now.keys() == tensors.keys()
    assert all(now[name] is tensors[name] for name in now)
    assert {n: p.requires_grad for n, p in layer.named_parameters()} == {
        n: p.requires_grad for n, p in original.named_parameters()
    }
    assert layer.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(v, original.state_dict()[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("case", LAZY)
def test_lazy_layers(case: str) -> None:
    lazy, norm, lazy_renorm, renorm, shape = LAZY[case]
    x = torch.randn(shape)
    uninitialised = brn.convert_batchnorm(lazy(eps=1e-3), clip=CLIP, momentum=0.3)
    assert type(uninitialised) is lazy_renorm
    ready = renorm(5, eps=1e-3, momentum=0.3, clip=CLIP)
    assert torch.equal(uninitialised(x), ready(x))
    assert type(uninitialised) is renorm
    assert repr(uninitialised) == repr(ready)
    assert torch.equal(uninitialised.running_var, ready.running_var)

    back = brn.to_batchnorm(brn.convert_batchnorm(lazy()))
    assert type(back) is lazy
    back(x)
    assert type(back) is norm

    initialised = lazy()
    initialised(x)
    assert type(brn.convert_batchnorm(initialised)) is renorm


def test_a_network() -> None:
    """At any depth, in containers, and a shared layer once; nothing else is touched."""
    model = network()
    names, others = norms(model), {n: type(m) for n, m in model.named_modules() if n not in norms(model)}
    parameters = list(model.parameters())
    assert brn.convert_batchnorm(model) is model
    assert norms(model, brn.BatchRenorm) == names
    assert len(names) == 7  # the shared one counts once
    assert {n: type(m) for n, m in model.named_modules() if n in others} == others
    assert model[2].shared is model[3].shared
    assert type(model[2].shared) is brn.BatchRenorm2d
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    brn.to_batchnorm(model)
    assert norms(model, nn.modules.batchnorm._BatchNorm) == names
    assert model[2].shared is model[3].shared
    assert type(model[7]) is nn.BatchNorm1d


def test_without_a_bias() -> None:
    """torch's batch norm has learned this argument; a layer and its conversions keep it."""
    for cls, x in ((brn.BatchRenorm2d, torch.randn(4, 3, 5, 5)), (brn.LazyBatchRenorm2d, torch.randn(4, 3, 5, 5))):
        layer = cls(*([] if "Lazy" in cls.__name__ else [3]), bias=False)
        layer(x)
        assert sorted(name for name, _ in layer.named_parameters()) == ["weight"]
        assert "bias=False" in repr(layer)
        norm = brn.to_batchnorm(copy.deepcopy(layer))
        assert norm.bias is None
        assert brn.convert_batchnorm(norm).bias is None
        layer.reset_parameters()


def test_twice_is_once() -> None:
    model = brn.convert_batchnorm(network(), clip=CLIP)
    brn.convert_batchnorm(model, clip=brn.ClipSchedule())
    assert model[1].clip == CLIP  # a layer that is one already keeps its settings


def test_the_optimiser_goes_on() -> None:
    """BN trained with Adam, converted, trained on: parameters, moments and all are those of a model built by hand."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, optimizer, range(3))
    trained, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())

    brn.convert_batchnorm(model, clip=CLIP, momentum=0.2, microbatch_size=3)
    assert all(id(p) in {id(q) for q in optimizer.state} for p in model.parameters())
    train(model, optimizer, range(3, 12))

    def by_hand(C: int, cls: type[brn.BatchRenorm] = brn.BatchRenorm2d) -> brn.BatchRenorm:
        return cls(C, momentum=0.2, clip=CLIP, microbatch_size=3)

    hand = network()
    hand[1], hand[7], shared = by_hand(4), by_hand(5, brn.BatchRenorm1d), by_hand(4)
    for block in (hand[2], hand[3]):
        block.norm, block.shared, block.deep["list"][0][1] = by_hand(4), shared, by_hand(4)
    hand.load_state_dict(trained, strict=True)
    assert hand[1].num_batches_tracked == 3
    other = torch.optim.Adam(hand.parameters(), lr=1e-2)
    other.load_state_dict(moments)
    train(hand, other, range(3, 12))

    assert all(torch.equal(v, hand.state_dict()[k]) for k, v in model.state_dict().items())
    assert model[2].shared.num_batches_tracked == 2 * 12  # two forwards a step
    x = minibatch(99)[0]
    assert torch.equal(model.eval()(x), hand.eval()(x))


def test_state_dicts_do_not_notice() -> None:
    model = network()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(2))
    state = copy.deepcopy(model.state_dict())
    renorm = brn.convert_batchnorm(network())
    renorm.load_state_dict(state, strict=True)
    x = minibatch(9)[0]
    expected = model.eval()(x)
    assert torch.equal(renorm.eval()(x), expected)
    plain = network()
    plain.load_state_dict(renorm.state_dict(), strict=True)
    assert torch.equal(plain.eval()(x), expected)
    assert list(renorm.state_dict()) == list(state)
    assert renorm.state_dict()._metadata == state._metadata


def test_inference_after_training_as_renorm() -> None:
    model = brn.convert_batchnorm(network(), clip=CLIP, momentum=0.3)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(10))
    x = minibatch(99)[0]
    expected = model.eval()(x)
    norm = brn.to_batchnorm(copy.deepcopy(model))
    assert torch.equal(norm(x), expected)
    assert not norms(norm, brn.BatchRenorm)
    # Folding into the convolution before it, by torch's own tool, works from there.
    fused = nn.utils.fusion.fuse_conv_bn_eval(norm[0], norm[1])
    torch.testing.assert_close(fused(x), norm[1](norm[0](x)), rtol=1e-4, atol=1e-5)
    norm.train()
    train(norm, torch.optim.SGD(norm.parameters(), lr=0.1), range(2))


def test_where() -> None:
    seen: list[str] = []

    def only_in_blocks(name: str, layer: nn.Module) -> bool:
        seen.append(name)
        return name.endswith("norm") and isinstance(layer, nn.BatchNorm2d)

    model = brn.convert_batchnorm(network(), where=only_in_blocks)
    assert norms(model, brn.BatchRenorm) == ["2.norm", "3.norm"]
    assert {"1", "2.norm", "2.shared", "2.deep.list.0.1", "7"} <= set(seen)


def test_hooks_stay() -> None:
    model = network()
    calls: list[str] = []
    model[1].register_forward_hook(lambda module, inputs, output: calls.append("forward"))
    model[1].register_forward_pre_hook(lambda module, inputs: calls.append("pre"))
    model[1].register_full_backward_hook(lambda module, gx, gy: calls.append("backward"))
    model[1].weight.register_hook(lambda g: calls.append("weight"))
    brn.convert_batchnorm(model)
    x, dy = minibatch(0)
    model(x).backward(dy)
    assert sorted(calls) == ["backward", "forward", "pre", "weight"]


def test_what_does_more_is_left_alone_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), BatchNormAct2d(3), nn.Sequential(BatchNormAct2d(3), nn.BatchNorm2d(3)))
    before = model[1]
    with caplog.at_level(logging.INFO, logger="batchrenorm"):
        brn.convert_batchnorm(model)
    assert model[1] is before
    assert type(model[1]) is type(model[2][0]) is BatchNormAct2d
    assert type(model[2][1]) is brn.BatchRenorm2d
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert all("BatchNormAct2d" in m for m in messages)
    assert messages[0].startswith("1 ")
    assert messages[1].startswith("2.0 ")
    assert (model(torch.randn(4, 2, 3, 3))[:, :1] != 0).any()

    caplog.clear()
    root = BatchNormAct2d(3)
    with caplog.at_level(logging.INFO, logger="batchrenorm"):
        assert type(brn.convert_batchnorm(root)) is BatchNormAct2d
    assert "the model stays" in caplog.records[0].getMessage()


def test_a_subclass_of_ours_is_left_alone_on_the_way_back() -> None:
    class RenormAct(brn.BatchRenorm2d):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return F.relu(super().forward(x, mask))

    assert type(brn.to_batchnorm(RenormAct(3))) is RenormAct


def test_other_norms_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(
        nn.InstanceNorm1d(3), nn.InstanceNorm2d(3, track_running_stats=True), nn.LazyInstanceNorm2d(),
        nn.GroupNorm(1, 3), nn.LayerNorm(3),
    )  # fmt: skip
    types = [type(m) for m in model]
    with caplog.at_level(logging.INFO, logger="batchrenorm"):
        brn.convert_batchnorm(model)
        brn.to_batchnorm(model)
    assert [type(m) for m in model] == types
    assert not caplog.records


def test_a_model_without_norms() -> None:
    model = nn.Linear(2, 3)
    assert brn.convert_batchnorm(model) is model
    assert brn.to_batchnorm(model) is model


def test_sync_batch_norm_of_every_rank() -> None:
    """`SyncBatchNorm` does not know its rank; nor does what it becomes."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    brn.convert_batchnorm(model, clip=CLIP)
    assert {type(m) for m in model.modules() if isinstance(m, brn.BatchRenorm)} == {brn.BatchRenorm}
    plain = brn.convert_batchnorm(network(), clip=CLIP)
    plain.load_state_dict(model.state_dict())
    for step in range(6):
        x, _ = minibatch(step)
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("case", LAYERS)
def test_converted_layers_can_be_copied(case: str) -> None:
    norm, renorm, shape = LAYERS[case]
    layer = brn.convert_batchnorm(norm(5), clip=CLIP, momentum=0.3)
    for _ in range(5):
        layer(torch.randn(shape))
    x, dy = torch.randn(shape), torch.randn(shape)
    results = []
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer):
        assert type(other) is renorm
        leaf = x.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(other, leaf, use_reentrant=False)
        y.backward(dy)
        results.append([y, leaf.grad, other.weight.grad, *other.state_dict().values()])
        assert other.num_batches_tracked == 6
    assert all(torch.equal(a, b) for other in results[:2] for a, b in zip(other, results[2]))


def test_converted_layers_do_not_share_a_history() -> None:
    """Two converted layers that see the same minibatch, each recomputed with its own averages."""
    model = brn.convert_batchnorm(
        nn.ModuleList([nn.BatchNorm1d(5), nn.BatchNorm1d(5)]), clip=brn.ClipSchedule.constant()
    )
    model[1].running_mean.fill_(3.0)
    x, dy = torch.randn(8, 5), torch.randn(8, 5)

    def gradients(recompute: bool) -> list[Tensor]:
        layers = copy.deepcopy(model)
        leaf = x.clone().requires_grad_()
        ys = [torch.utils.checkpoint.checkpoint(m, leaf, use_reentrant=False) if recompute else m(leaf) for m in layers]
        torch.autograd.backward(ys, [dy, dy])
        return [leaf.grad, *(p.grad for p in layers.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False)))


def test_meta_and_frozen() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    model.requires_grad_(False)
    brn.convert_batchnorm(model)
    assert model[1].weight.device.type == "meta"
    assert not model[1].weight.requires_grad
    assert model(torch.randn(4, 2, 3, 3, device="meta")).shape == (4, 3, 3, 3)
