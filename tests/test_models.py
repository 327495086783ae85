"""`convert_batchnorm` on the architectures that people use: every norm converted, inference unchanged, and back.

Random weights and random averages.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision_shim import allow_torchvision

import batchrenorm as brn

TORCHVISION = [
    "resnet18", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "mobilenet_v2", "mobilenet_v3_small",
    "efficientnet_b0", "efficientnet_v2_s", "mnasnet0_5", "regnet_x_400mf", "regnet_y_400mf", "shufflenet_v2_x0_5",
    "googlenet", "inception_v3", "vgg11_bn", "segmentation.fcn_resnet50", "segmentation.deeplabv3_mobilenet_v3_large",
    "segmentation.lraspp_mobilenet_v3_large", "detection.ssdlite320_mobilenet_v3_large",
    "detection.retinanet_resnet50_fpn", "video.r2plus1d_18", "video.r3d_18",
]  # fmt: skip
TIMM = [
    "resnet10t", "resnetv2_50", "seresnext26t_32x4d", "mobilenetv3_small_050", "efficientnet_lite0", "ghostnet_050",
    "regnetx_002", "dla34", "hrnet_w18_small", "res2net50_14w_8s", "repvgg_a0", "cspresnet50", "levit_128s",
    "lcnet_050",
]  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def uneven(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, NORMS):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.8, 1.2)
    return model.eval()


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    children = output.values() if isinstance(output, dict) else output
    return [t for child in children for t in tensors(child)]


def check(model: nn.Module, *x: Any) -> nn.Module:
    uneven(model)
    with torch.no_grad():
        expected = tensors(model(*x))
        keys = list(model.state_dict())
        norms = [name for name, m in model.named_modules() if isinstance(m, NORMS)]
        brn.convert_batchnorm(model)
        assert norms
        assert [n for n, m in model.named_modules() if isinstance(m, brn.BatchRenorm)] == norms
        assert not any(isinstance(m, NORMS) for m in model.modules())
        assert list(model.state_dict()) == keys
        # Inference of ours is torch's own operator: the same bits.
        assert all(torch.equal(a, b) for a, b in zip(tensors(model(*x)), expected, strict=True))
        assert all(m.clip == brn.ClipSchedule.constant() for m in model.modules() if isinstance(m, brn.BatchRenorm))
        there = brn.to_batchnorm(model)
        assert [n for n, m in there.named_modules() if isinstance(m, NORMS)] == norms
        assert all(torch.equal(a, b) for a, b in zip(tensors(there(*x)), expected, strict=True))
    return brn.convert_batchnorm(there)


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    need_torchvision()
    from torchvision import models

    module = models
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
    build = getattr(module, name.split(".")[-1])
    options: dict[str, Any] = {"weights": None}
    if "." in name and not name.startswith("video"):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model = build(**options)
    if name.startswith("detection"):
        # Boxes are chosen by an operator that is not there beside a torch without CUDA: features and heads are.
        check(Detector(model), torch.randn(1, 3, 64, 64))
        return
    if name.startswith("video"):
        x = torch.randn(1, 3, 4, 32, 32)
    else:
        x = torch.randn(1, 3, 75, 75) if name == "inception_v3" else torch.randn(1, 3, 64, 64)
    check(model, x)


class Detector(nn.Module):
    """A detector up to its boxes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, model.head

    def forward(self, x: Tensor) -> Any:
        features = list(self.backbone(x).values())
        return [features, self.head(features)]


def need_torchvision() -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision, which timm needs too, is not installed")
    allow_torchvision()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    need_torchvision()
    timm = pytest.importorskip("timm", reason="timm is not installed")
    size = 224 if name.startswith("levit") else 64
    check(timm.create_model(name, pretrained=False), torch.randn(1, 3, size, size))


@pytest.mark.filterwarnings("ignore")
def test_timms_activation() -> None:
    """BatchNormAct2d is converted with its activation and comes back; training equals norm, then activation."""
    need_torchvision()
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    layer = layers.BatchNormAct2d(5, act_layer=nn.SiLU)
    nn.init.normal_(layer.weight)
    clip = brn.ClipSchedule.constant(1.5, 0.7)
    hand = brn.BatchRenorm2d(5, clip=clip)
    hand.load_state_dict(layer.state_dict())
    before = dict(layer.__dict__)
    brn.convert_batchnorm(layer, clip=clip)
    assert isinstance(layer, brn.BatchRenorm2d)
    for _ in range(3):
        x = torch.randn(4, 5, 3, 3) * 2 + 1
        assert torch.equal(layer(x), nn.functional.silu(hand(x)))
    assert torch.equal(layer.eval()(x), nn.functional.silu(hand.eval()(x)))
    expected = layer(x)
    brn.to_batchnorm(layer)
    assert type(layer) is layers.BatchNormAct2d
    assert layer.__dict__.keys() == before.keys()
    assert torch.equal(layer(x), expected)


@pytest.mark.filterwarnings("ignore")
def test_frozen_norms_are_left(caplog: pytest.LogCaptureFixture) -> None:
    need_torchvision()
    from torchvision.ops.misc import FrozenBatchNorm2d

    model = nn.Sequential(FrozenBatchNorm2d(3), nn.BatchNorm2d(3))
    with caplog.at_level("INFO", logger="batchrenorm"):
        brn.convert_batchnorm(model)
    assert type(model[0]) is FrozenBatchNorm2d
    assert type(model[1]) is brn.BatchRenorm2d
    assert not caplog.records


def test_trained_averages_need_no_warm_up(caplog: pytest.LogCaptureFixture) -> None:
    """Of a pretrained body and a new head the body's limits are open at once, whatever its counter says."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[1].running_mean.normal_()
    assert model[1].num_batches_tracked == 0
    with caplog.at_level("INFO", logger="batchrenorm"):
        brn.convert_batchnorm(model)
    assert model[1].clip == brn.ClipSchedule.constant()
    assert model[3].clip == brn.ClipSchedule()
    assert [r.getMessage().split(",")[0] for r in caplog.records] == ["1 layers have trained averages"]

    asked = brn.convert_batchnorm(uneven(nn.BatchNorm1d(3)), clip=brn.ClipSchedule())
    assert asked.clip == brn.ClipSchedule()  # who asks for a warm-up gets it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = brn.convert_batchnorm(nn.LazyBatchNorm1d())
    assert lazy.clip == brn.ClipSchedule()
