"""The nets of the experiments and what arms put into them: the same weights, the whole of the normalisers, no more."""

from __future__ import annotations

import copy
import functools
import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision_shim import allow_torchvision

from batchrenorm import BatchRenorm, ClipSchedule, MomentumSchedule, set_step
from batchrenorm.paper.mabn import Mabn
from batchrenorm.paper.models import (
    Conv4,
    Mlp,
    Model,
    PlainConv,
    SmallInception,
    SmallResNet,
    Torchvision,
    build,
    logits,
    loss,
)
from batchrenorm.paper.normalizers import (
    EARLY,
    MOVING,
    NORMALIZERS,
    MovingAverageNorm,
    get_averages,
    layer_names,
    normalize,
    set_averages,
)

OPEN = ClipSchedule.constant()
PAPERS = {
    **dict.fromkeys(("bn", "brn", "brn-tight", "brn-unclipped", *EARLY, *MOVING), BatchRenorm),
    "moving-average": MovingAverageNorm,
}
KINDS = {**PAPERS, "mabn": Mabn}  # with averages

# The least nets of each kind that hold all its parts.
NETS = {
    "mlp": (Mlp(3, 16), (12,)),
    "conv4": (Conv4(8), (1, 28, 28)),
    "plain": (PlainConv((8, 8), (2, 1)), (1, 13, 12)),
    "resnet": (SmallResNet((1, 1, 1), 8), (1, 28, 28)),
    "inception": (SmallInception(4), (1, 28, 28)),
}
# Normalised layers, counted in the papers' figures: the auxiliary head of Inception-v3 has two of its 96.
LAYERS = {"inception_v3": 96, "resnet18": 20, "resnet50": 53}


def arm(
    net: nn.Module,
    name: str,
    *,
    alpha: float = 0.1,
    clip: ClipSchedule = OPEN,
    group: int | None = None,
    learn_gamma: bool = True,
) -> nn.Module:
    return normalize(net, name, alpha=alpha, clip=clip, group=group, learn_gamma=learn_gamma)


@functools.cache
def _built(model: Model, shape: tuple[int, ...], device: str) -> nn.Module:
    with torch.device(device):
        return build(model, shape, 10, seed=0)


def fresh(name: str, shape: tuple[int, ...] | None = None, device: str = "cpu") -> nn.Module:
    """A net of its own for the test, without building it again."""
    model = NETS[name][0] if name in NETS else Torchvision(name)
    return copy.deepcopy(_built(model, shape or NETS[name][1], device))


def norms(net: nn.Module) -> list[nn.Module]:
    kinds = (_BatchNorm, BatchRenorm, Mabn, MovingAverageNorm, nn.GroupNorm, nn.LayerNorm)
    return [layer for layer in net.modules() if isinstance(layer, kinds)]


@pytest.fixture(scope="module")
def torchvision() -> None:
    allow_torchvision()
    pytest.importorskip("torchvision", reason="needs the extra: pip install 'batchrenorm[vision]'")


# They train


def train(net: nn.Module, shape: tuple[int, ...], samples: int) -> None:
    """Some steps on one minibatch lower its loss, and reach every parameter."""
    x, y = torch.randn(samples, *shape), torch.randint(10, (samples,))
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(loss(net(x), y))
        losses[-1].backward()
        for name, p in parameters.items():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.any(), name
        optimizer.step()
    assert losses[-1] < losses[0]
    assert net.eval()(x).shape == (samples, 10)


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("net", NETS)
def test_every_net_trains_with_every_normalizer(net: str, name: str) -> None:
    # The first averages, 0 and 1, are far from a deep net's: the early schedules' limits open slowly.
    clip = ClipSchedule.early(30) if name in EARLY else OPEN
    train(arm(fresh(net), name, clip=clip, group=4, learn_gamma=False), NETS[net][1], samples=8)


@pytest.mark.parametrize("model", [Conv4(8), SmallResNet((1, 1, 1, 1), 8), SmallInception(4)], ids=repr)
def test_nets_train_on_larger_colour_images(model: Model) -> None:
    train(arm(build(model, (3, 64, 64), 10, seed=0), "brn", group=4), (3, 64, 64), samples=8)


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.usefixtures("torchvision")
def test_a_torchvision_model_trains_with_every_normalizer(name: str) -> None:
    train(arm(fresh("resnet18", (3, 64, 64)), name, group=4), (3, 64, 64), samples=8)


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.usefixtures("torchvision")
def test_inception_v3_takes_a_step_with_every_normalizer(name: str) -> None:
    net = arm(fresh("inception_v3", (3, 75, 75)), name, learn_gamma=False)
    loss(net(torch.randn(4, 3, 75, 75)), torch.randint(10, (4,)), label_smoothing=0.1).backward()
    for parameter_name, p in net.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, parameter_name
            assert p.grad.isfinite().all(), parameter_name
    assert net.eval()(torch.randn(1, 3, 75, 75)).shape == (1, 10)


# What is compared is comparable


@pytest.mark.parametrize("net", [*NETS, "resnet18"])
def test_arms_share_their_weights_which_only_the_seed_decides(net: str, request: pytest.FixtureRequest) -> None:
    if net == "resnet18":
        request.getfixturevalue("torchvision")
    model, shape = NETS.get(net, (Torchvision("resnet18"), (3, 64, 64)))

    def parameters(name: str, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(100 + len(name))
        return dict(arm(build(model, shape, 10, seed), name).named_parameters())

    first = parameters("bn", 1)
    for name in NORMALIZERS:
        other = parameters(name, 1)
        assert other.keys() == first.keys()
        assert all(torch.equal(other[key], first[key]) for key in first), name
    assert not torch.equal(*(next(iter(parameters("bn", seed).values())) for seed in (1, 2)))


@pytest.mark.parametrize("net", NETS)
def test_building_leaves_the_generators_alone(net: str) -> None:
    before = torch.get_rng_state()
    build(*NETS[net], 10, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_of_the_dense_net_are_those_of_the_committed_results() -> None:
    net = build(Mlp(depth=3, width=16), (12,), 10, seed=5)
    generator = torch.Generator().manual_seed(5)
    for layer in (layer for layer in net if isinstance(layer, nn.Linear)):
        fan_in = layer.in_features
        expected = torch.zeros(layer.weight.shape).normal_(0, math.sqrt(2 / fan_in), generator=generator)
        assert torch.equal(layer.weight, expected)
    assert torch.equal(net[-1].bias, torch.zeros(10))
    assert [type(layer) for layer in net[:3]] == [nn.Linear, nn.BatchNorm1d, nn.ReLU]


def test_the_dense_net_takes_images_as_vectors() -> None:
    images, vectors = build(Mlp(2, 8), (1, 4, 4), 10, 0), build(Mlp(2, 8), (16,), 10, 0)
    x = torch.randn(4, 1, 4, 4)
    assert torch.equal(images(x), vectors(x.flatten(1)))


# Every layer


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.usefixtures("torchvision")
def test_every_layer_is_replaced(model: str, name: str) -> None:
    net = fresh(model, (3, 299, 299), "meta")
    assert len(norms(net)) == LAYERS[model]
    arm(net, name)
    assert len(norms(net)) == LAYERS[model]
    assert {type(layer) for layer in norms(net)}.isdisjoint({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d})
    kind = KINDS.get(name, nn.GroupNorm)
    assert all(isinstance(layer, kind) for layer in norms(net))
    assert len(layer_names(net)) == len(get_averages(net)) / 2 == (LAYERS[model] if name in KINDS else 0)
    outputs = net(torch.zeros(2, 3, 299, 299, device="meta"))
    assert [head.shape for head in (outputs if isinstance(outputs, tuple) else [outputs])] == [(2, 10)] * (
        2 if model == "inception_v3" else 1
    )


def test_the_auxiliary_head_is_left_out_where_it_has_no_room(torchvision: None) -> None:
    net = fresh("inception_v3", (3, 298, 298), "meta")
    assert len(norms(net)) == 94
    assert isinstance(net(torch.zeros(2, 3, 298, 298, device="meta")), Tensor)


@pytest.mark.parametrize("net", [*NETS, *LAYERS])
def test_names_are_in_the_order_of_the_forward(net: str, request: pytest.FixtureRequest) -> None:
    if net in LAYERS:
        request.getfixturevalue("torchvision")
    shape = NETS[net][1] if net in NETS else (3, 299, 299)
    built = arm(fresh(net, shape, "meta"), "brn")
    called: list[str] = []
    for name in layer_names(built):
        built.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    built(torch.zeros(2, *shape, device="meta"))
    assert called == layer_names(built)


def test_sizes_are_those_that_the_literature_prints() -> None:
    def parameters(model: Model, classes: int) -> int:
        return sum(p.numel() for p in build(model, (3, 32, 32), classes, 0).parameters())

    # ResNet-20 for CIFAR-10 with shortcuts of 1x1 convolutions.
    assert parameters(SmallResNet((3, 3, 3), 16), 10) == 272_474
    # The embedding of prototypical networks (113,088), whose convolutions have biases, and a linear layer here.
    assert parameters(Conv4(64), 5) == 113_088 - 4 * 64 + 5 * 65


# Batch norm is batch norm


def compare(actual: nn.Module, expected: Any, x: Tensor, plain: nn.Module) -> None:
    """Output and all gradients of a net against those of plain batch norm."""
    cotangent = torch.randn(len(x), 10, dtype=x.dtype)
    for y, net in ((actual(x), actual), (expected(x), plain)):
        y.backward(cotangent)
        net.y = y.detach()
    torch.testing.assert_close(actual.y, plain.y, rtol=1e-9, atol=1e-9)
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in actual.named_parameters():
        torch.testing.assert_close(
            p.grad, gradients[name], rtol=1e-7, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("net", NETS)
def test_bn_is_torch_batch_norm_of_each_group(net: str, group: int | None) -> None:
    plain = fresh(net).double()
    for layer in norms(plain):
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
    x = torch.randn(12, *NETS[net][1], dtype=torch.float64)
    compare(
        arm(copy.deepcopy(plain), "bn", group=group),
        lambda x: torch.cat([plain(part) for part in x.split(group or len(x))]),
        x,
        plain,
    )


@pytest.mark.usefixtures("torchvision")
def test_bn_in_a_torchvision_model_is_torch_batch_norm() -> None:
    plain = fresh("resnet18", (3, 64, 64)).double()
    compare(arm(copy.deepcopy(plain), "bn"), plain, torch.randn(4, 3, 64, 64, dtype=torch.float64), plain)


def test_limits_and_momentum_are_those_of_the_arm() -> None:
    schedule = ClipSchedule.for_training(1300)
    infinity = ClipSchedule.constant(math.inf, math.inf)
    tight = replace(schedule, r_max=1.5, d_max=0.5)
    for name, clip in {
        "bn": ClipSchedule.constant(1, 0),
        "brn": schedule,
        "brn-tight": tight,
        "brn-unclipped": infinity,
    }.items():
        for layer in norms(arm(fresh("conv4"), name, alpha=0.03, clip=schedule, group=4)):
            assert isinstance(layer, BatchRenorm)
            assert (layer.clip, layer.momentum, layer.microbatch_size) == (clip, 0.03, 4)
    for name in EARLY:
        for layer in norms(arm(fresh("conv4"), name, alpha=0.03, clip=schedule)):
            assert layer.momentum == MomentumSchedule(0.03)
            assert layer.gradient == ("moving" if name in MOVING else "microbatch")
    for layer in norms(arm(fresh("conv4"), "moving-average", alpha=0.03)):
        assert layer.momentum == 0.03


# The other normalisers


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("net", ["mlp", "conv4"])
def test_weight_bias_and_eps_stay(net: str, name: str) -> None:
    plain = fresh(net).eval()
    for layer in norms(plain):
        nn.init.uniform_(layer.weight)
        nn.init.normal_(layer.bias)
        layer.eps = 0.25
    kept = {key: p.clone() for key, p in plain.named_parameters()}
    other = arm(copy.deepcopy(plain), name)
    assert all(torch.equal(p, kept[key]) and p.requires_grad for key, p in other.named_parameters())
    assert [layer.eps for layer in norms(other)] == [0.25] * len(norms(plain))
    assert not any(layer.training for layer in norms(other))
    # Gamma fixed at 1, as in the paper; beta is learnt.
    fixed = arm(plain, name, learn_gamma=False)
    assert all(torch.equal(layer.weight, torch.ones_like(layer.weight)) for layer in norms(fixed))
    frozen = {key for key, p in fixed.named_parameters() if not p.requires_grad}
    assert frozen == {f"{key}.weight" for key, m in fixed.named_modules() if m in norms(fixed)}


@pytest.mark.parametrize(
    ("name", "channels", "groups"),
    [
        *(("layer", 48, 1), ("group", 7, 1), ("group", 16, 2), ("group", 48, 6)),
        *(("group", 64, 8), ("group", 320, 32), ("group", 2048, 32)),
    ],
)
@pytest.mark.parametrize("spatial", [(), (3, 2)])
def test_group_and_layer_norm(name: str, channels: int, groups: int, spatial: tuple[int, ...]) -> None:
    plain = nn.BatchNorm2d(channels) if spatial else nn.BatchNorm1d(channels)
    (layer,) = arm(nn.Sequential(plain), name)
    x = torch.randn(3, channels, *spatial) * 5 + 2
    sets = x.view(3, groups, -1)
    std, mean = torch.std_mean(sets, 2, correction=0, keepdim=True)
    torch.testing.assert_close(layer(x), ((sets - mean) / std).view_as(x), rtol=1e-4, atol=1e-5)


def test_moving_average_norm_has_no_gradient_through_the_statistics() -> None:
    layer = arm(nn.Sequential(nn.BatchNorm2d(2)), "moving-average", alpha=0.5)[0]
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.bias, 0.5)
    x = torch.tensor([[1.0, 3.0], [5.0, 3.0]]).view(2, 2, 1, 1).expand(2, 2, 3, 4).clone().requires_grad_()
    first, second = layer(x), layer(x)
    torch.testing.assert_close(first, 2 * x + 0.5)  # averages 0 and 1
    # Then halfway to the minibatch's: means 3 and 3, deviations 2 and sqrt(eps).
    mean = torch.tensor([1.5, 1.5]).view(2, 1, 1)
    std = torch.tensor([1.5, 0.5 + 0.5 * 1e-5**0.5]).view(2, 1, 1)
    torch.testing.assert_close(second, 2 * (x - mean) / std + 0.5)
    cotangent = torch.randn(2, 2, 3, 4)
    # Between a forward and its backward the averages may move.
    set_averages(layer, [v + 1 for v in get_averages(layer)])
    torch.testing.assert_close(torch.autograd.grad(second, x, cotangent)[0], 2 * cotangent / std)


# Averages


def trained(name: str) -> nn.Module:
    net = arm(fresh("resnet"), name, group=4)
    for _ in range(3):
        net(torch.randn(8, 1, 28, 28) * 3 + 1)
    return net


@pytest.mark.parametrize("name", NORMALIZERS)
def test_averages_written_back_are_the_same_to_the_last_bit(name: str) -> None:
    net = trained(name)
    for layer in norms(net):
        if isinstance(layer, BatchRenorm):
            # Of channels that are nearly constant too: eps is 1e-5.
            layer.running_var.copy_(torch.logspace(-12, 6, len(layer.running_var)))
    state, averages = copy.deepcopy(net.state_dict()), get_averages(net)
    assert len(averages) == (2 * len(norms(net)) if name in KINDS else 0)
    net(torch.randn(8, 1, 28, 28))
    net.load_state_dict({**state, **{k: v + 1 for k, v in state.items() if "running" in k}})
    set_averages(net, averages)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(averages, get_averages(net), strict=True))


@pytest.mark.parametrize("name", PAPERS)
def test_averages_are_the_papers(name: str) -> None:
    net = arm(nn.Sequential(nn.BatchNorm1d(1)), name, alpha=0.5)
    set_step(net, 10)  # where the early schedules too have come down to a half
    net(torch.tensor([[1.0], [5.0]]))  # mean 3, deviation 2
    mu, sigma = get_averages(net)
    torch.testing.assert_close(mu, torch.tensor([1.5], dtype=torch.float64))
    torch.testing.assert_close(sigma, torch.tensor([1.5], dtype=torch.float64), rtol=1e-5, atol=0)
    set_averages(net, [mu - 1, sigma * 2])
    x = torch.randn(4, 1)
    torch.testing.assert_close(net.eval()(x), (x - 0.5) / 3, rtol=1e-5, atol=1e-6)


def test_a_variance_is_never_negative() -> None:
    net = arm(nn.Sequential(nn.BatchNorm1d(1)), "brn")
    set_averages(net, [torch.zeros(1), torch.full((1,), 1e-3)])  # below sqrt(eps)
    assert net[0].running_var == 0


@pytest.mark.parametrize("name", ["bn", "brn"])
def test_parts_of_a_step_move_the_averages_as_the_whole_does(name: str) -> None:
    whole = arm(fresh("inception"), name, group=4).double()
    for _ in range(2):
        whole(torch.randn(12, 1, 28, 28, dtype=torch.float64))
    parts = copy.deepcopy(whole)
    x = torch.randn(12, 1, 28, 28, dtype=torch.float64)
    before, after, outputs = get_averages(parts), [], []
    for part in x.split(4):
        set_averages(parts, before)
        outputs.append(parts(part))
        after.append(get_averages(parts))
    set_averages(parts, [torch.stack(values).mean(0) for values in zip(*after)])
    torch.testing.assert_close(torch.cat(outputs), whole(x))
    for actual, expected in zip(get_averages(parts), get_averages(whole), strict=True):
        torch.testing.assert_close(actual, expected)
    moved = max(float((a - b).abs().max()) for a, b in zip(before, get_averages(whole)))
    assert moved > 0.05


# Loss


def test_loss_counts_an_auxiliary_head_with_four_tenths() -> None:
    first, second, y = torch.randn(5, 7), torch.randn(5, 7), torch.randint(7, (5,))

    def cross_entropy(outputs: Tensor, smoothing: float) -> Tensor:
        target = F.one_hot(y, 7) * (1 - smoothing) + smoothing / 7
        return -(target * (outputs - outputs.logsumexp(1, keepdim=True))).sum(1).mean()

    torch.testing.assert_close(loss(first, y), cross_entropy(first, 0))
    torch.testing.assert_close(loss(first, y, 0.1), cross_entropy(first, 0.1))
    torch.testing.assert_close(
        loss((first, second), y, 0.1), cross_entropy(first, 0.1) + 0.4 * cross_entropy(second, 0.1)
    )
    assert logits(first) is logits((first, second)) is first


# Errors


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (Conv4(8), (784,), r"expected images \(channels, height, width\) for Conv4"),
        (Conv4(8), (1, 15, 15), r"expected inputs that Conv4\(width=8\) takes, got shape \(1, 15, 15\)"),
        (Torchvision("inception_v3"), (3, 74, 74), r"expected inputs that .*got shape \(3, 74, 74\)"),
        (Torchvision("resnet18"), (1, 64, 64), "expected images of 3 channels"),
        (Torchvision("vit_b_16"), (3, 224, 224), "expected a model with batch norm"),
        (Torchvision("resnet5"), (3, 64, 64), "expected a classification model of torchvision, got 'resnet5'"),
        (Torchvision("fcn_resnet50"), (3, 64, 64), "expected a classification model of torchvision"),
    ],
    ids=lambda value: repr(value) if not isinstance(value, str) else "",
)
def test_what_cannot_be_built_is_said(
    model: Model, shape: tuple[int, ...], message: str, request: pytest.FixtureRequest
) -> None:
    if isinstance(model, Torchvision):
        request.getfixturevalue("torchvision")
    with pytest.raises(ValueError, match=message):
        build(model, shape, 10, seed=0)


def test_a_missing_torchvision_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(RuntimeError, match=r"pip install 'batchrenorm\[vision\]'"):
        build(Torchvision("resnet18"), (3, 64, 64), 10, seed=0)


def test_an_unknown_normalizer_is_said() -> None:
    net = fresh("mlp")
    with pytest.raises(ValueError, match=r"expected one of bn, brn, .* got 'batch'"):
        arm(net, "batch")


class _WithActivation(nn.BatchNorm2d):
    """A layer that does more than batch norm."""


@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_layer_that_cannot_be_replaced_is_said(name: str) -> None:
    with pytest.raises(ValueError, match="got 1: _WithActivation"):
        arm(nn.Sequential(nn.BatchNorm2d(3), _WithActivation(3)), name)


def test_averages_of_another_model_are_said() -> None:
    net = trained("brn")
    with pytest.raises(ValueError, match="expected mu and sigma of 9 layers, got 17 tensors"):
        set_averages(net, get_averages(net)[1:])
