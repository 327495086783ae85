"""The nets of the experiments, with batch norm; `normalizers` replaces it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of an auxiliary head's loss: Google's training code of Inception-v3 (tensorflow/models, inception_model.py, `loss`).
_AUXILIARY = 0.4


@dataclass(frozen=True)
class Mlp:
    """A fully connected net: linear, norm, ReLU, `depth` times, and a linear layer. Images are flattened."""

    depth: int
    width: int


@dataclass(frozen=True)
class Conv4:
    """The net of the few-shot literature: 3x3 convolution, norm, ReLU, 2x2 maximum, four times; average; linear.

    Images of 28 pixels end in a map of 1x1, those of 64 in 4x4; 16 pixels are the least. (Vinyals et al. 2016 have 64
    channels, `width` here.)
    """

    width: int = 32


@dataclass(frozen=True)
class PlainConv:
    """3x3 convolution, norm, ReLU, once for each width, of the stride beside it; all of the last map; linear.

    No pooling: with strides down to a small map, most layers have few values a channel to normalise, as deep stages of
    large nets have.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class SmallResNet:
    """A ResNet for images of 28 to 64 pixels, as He et al. 2016 have it for CIFAR: a 3x3 stem and basic blocks.

    Channels double and resolution halves from stage to stage; shortcuts there are 1x1 convolutions with a norm.
    """

    blocks: tuple[int, ...] = (2, 2, 2)
    width: int = 32


@dataclass(frozen=True)
class SmallInception:
    """Inception-v3 (Szegedy et al. 2016) for images of 28 to 64 pixels: all its kinds of blocks, fewer of each.

    A stem of two 3x3 convolutions; at 1/2 of the resolution two blocks of 1x1, 3x3, double 3x3 and pooling branches; at
    1/4 two with 7x7 factorised into 1x7 and 7x1; at 1/8 one with 3x3 split into 1x3 beside 3x1; between them reductions
    by convolution and pooling side by side. Average, linear. No auxiliary head, no dropout.
    """

    width: int = 32


@dataclass(frozen=True)
class Torchvision:
    """A classification model of torchvision by its name there, untrained: "inception_v3", "resnet50", ...

    Inception-v3's auxiliary head has room from 299 pixels on; for smaller images (75 are the least) it is left out.
    """

    name: str


Model = Mlp | Conv4 | PlainConv | SmallResNet | SmallInception | Torchvision


def build(model: Model, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """A net with batch norm, in training mode.

    Args:
        model: which.
        shape: of one input, without the sample dimension: ``(features,)`` or ``(channels, height, width)``.
        classes: outputs.
        seed: of the weights, which are a function of it and of the arguments above alone.

    Returns:
        A net from ``(N, *shape)`` float32 to ``(N, classes)``, or in training to a tuple with those first and those of
        auxiliary heads after them: see `loss` and `logits`.

    Raises:
        ValueError: the net does not take inputs of this shape, has no batch norm, or is unknown to torchvision.
        RuntimeError: torchvision is needed and cannot be imported.
    """
    # Layers draw their first weights from torch's generator, which is the caller's.
    with torch.random.fork_rng(devices=[]):
        _try(model, shape, classes)
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which also seeds the accelerators
        net = _net(model, shape, classes)
        if not isinstance(model, Torchvision):
            torch.default_generator.manual_seed(seed)
            _initialize(net)
    return net


def loss(outputs: Tensor | tuple[Tensor, ...], y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy, and 0.4 of it for each auxiliary head.

    Args:
        outputs: of a net from `build`.
        y: ``(N,)`` int64 labels.
        label_smoothing: share of the target that goes to all classes alike; 0.1 in Inception-v3's training.
    """
    if isinstance(outputs, Tensor):
        return F.cross_entropy(outputs, y, label_smoothing=label_smoothing)
    first, *auxiliary = (F.cross_entropy(head, y, label_smoothing=label_smoothing) for head in outputs)
    return first + _AUXILIARY * sum(auxiliary)


def logits(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The ``(N, classes)`` outputs without those of auxiliary heads."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def _try(model: Model, shape: tuple[int, ...], classes: int) -> None:
    """Whether the net takes such inputs, asked of a copy without memory: sizes alone."""
    if not isinstance(model, Mlp) and len(shape) != 3:
        raise ValueError(f"expected images (channels, height, width) for {model}, got shape {shape}; reshape the data")
    if isinstance(model, Torchvision) and shape[0] != 3:
        raise ValueError(
            f"expected images of 3 channels for {model}, got shape {shape}; repeat the channel or take another model"
        )
    with torch.device("meta"):
        net = _net(model, shape, classes)
        if not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in net.modules()):
            raise ValueError(f"expected a model with batch norm, got {model}, which has none; take e.g. resnet50")
        try:
            net(torch.zeros(2, *shape))
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"expected inputs that {model} takes, got shape {shape} ({reason}); take larger images or another model"
            ) from error


def _net(model: Model, shape: tuple[int, ...], classes: int) -> nn.Module:
    if isinstance(model, Mlp):
        return _mlp(model, shape, classes)
    if isinstance(model, Conv4):
        return _conv4(model, shape[0], classes)
    if isinstance(model, PlainConv):
        return _plain_conv(model, shape, classes)
    if isinstance(model, SmallResNet):
        return _resnet(model, shape[0], classes)
    if isinstance(model, SmallInception):
        return _inception(model, shape[0], classes)
    return _torchvision(model, shape, classes)


def _initialize(net: nn.Module) -> None:
    """He et al. 2015, every layer."""
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _mlp(model: Mlp, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()] if len(shape) > 1 else []
    for inputs in [math.prod(shape)] + [model.width] * (model.depth - 1):
        # Without a bias, here and below: the normaliser's does the same.
        layers += [nn.Linear(inputs, model.width, bias=False), nn.BatchNorm1d(model.width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(model.width, classes))


def _conv4(model: Conv4, channels: int, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in [channels] + [model.width] * 3:
        layers += [_conv(inputs, model.width, 3), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, *_head(model.width, classes))


def _plain_conv(model: PlainConv, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    channels, *size = shape
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip((channels, *model.widths[:-1]), model.widths, model.strides, strict=True):
        layers.append(_conv(inputs, outputs, 3, stride))
        size = [math.ceil(n / stride) for n in size]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(model.widths[-1] * math.prod(size), classes))


def _conv(inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1) -> nn.Sequential:
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    conv = nn.Conv2d(inputs, outputs, kernel, stride, (height // 2, width // 2), bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def _head(features: int, classes: int) -> tuple[nn.Module, ...]:
    return (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes))


def _resnet(model: SmallResNet, channels: int, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = [_conv(channels, model.width, 3)]
    width = model.width
    for stage, blocks in enumerate(model.blocks):
        outputs = model.width * 2**stage
        for block in range(blocks):
            layers.append(_BasicBlock(width, outputs, stride=2 if stage > 0 and block == 0 else 1))
            width = outputs
    return nn.Sequential(*layers, *_head(width, classes))


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        # The second ReLU comes after the sum.
        self.residual = nn.Sequential(_conv(inputs, outputs, 3, stride), _conv(outputs, outputs, 3)[:2])
        self.shortcut = nn.Identity() if inputs == outputs else _conv(inputs, outputs, 1, stride)[:2]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


class _SideBySide(nn.ModuleList):
    """Branches of one input, their channels one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], 1)


def _inception(model: SmallInception, channels: int, classes: int) -> nn.Sequential:
    w = model.width
    return nn.Sequential(
        _conv(channels, w, 3),
        _conv(w, 2 * w, 3),
        nn.MaxPool2d(3, 2, 1),
        _mixed_3x3(2 * w, w),
        _mixed_3x3(4 * w, w),
        _SideBySide(
            [
                _conv(4 * w, 2 * w, 3, 2),
                nn.Sequential(_conv(4 * w, w, 1), _conv(w, 2 * w, 3), _conv(2 * w, 2 * w, 3, 2)),
                nn.MaxPool2d(3, 2, 1),
            ]
        ),
        _mixed_7x7(8 * w, w, 2 * w),
        _mixed_7x7(8 * w, w, 2 * w),
        _SideBySide(
            [
                nn.Sequential(_conv(8 * w, 2 * w, 1), _conv(2 * w, 4 * w, 3, 2)),
                nn.Sequential(
                    _conv(8 * w, 2 * w, 1),
                    _conv(2 * w, 2 * w, (1, 7)),
                    _conv(2 * w, 2 * w, (7, 1)),
                    _conv(2 * w, 4 * w, 3, 2),
                ),
                nn.MaxPool2d(3, 2, 1),
            ]
        ),
        _mixed_split(16 * w, 4 * w),
        *_head(24 * w, classes),
    )


def _pooled(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(3, 1, 1), _conv(inputs, outputs, 1))


def _mixed_3x3(inputs: int, w: int) -> _SideBySide:
    return _SideBySide(
        [
            _conv(inputs, w, 1),
            nn.Sequential(_conv(inputs, w, 1), _conv(w, w, 3)),
            nn.Sequential(_conv(inputs, w, 1), _conv(w, w, 3), _conv(w, w, 3)),
            _pooled(inputs, w),
        ]
    )


def _mixed_7x7(inputs: int, w: int, outputs: int) -> _SideBySide:
    row, column = (1, 7), (7, 1)
    return _SideBySide(
        [
            _conv(inputs, outputs, 1),
            nn.Sequential(_conv(inputs, w, 1), _conv(w, w, row), _conv(w, outputs, column)),
            nn.Sequential(
                _conv(inputs, w, 1),
                _conv(w, w, column),
                _conv(w, w, row),
                _conv(w, w, column),
                _conv(w, outputs, row),
            ),
            _pooled(inputs, outputs),
        ]
    )


def _mixed_split(inputs: int, w: int) -> _SideBySide:
    def split() -> _SideBySide:
        return _SideBySide([_conv(w, w, (1, 3)), _conv(w, w, (3, 1))])

    return _SideBySide(
        [
            _conv(inputs, w, 1),
            nn.Sequential(_conv(inputs, w, 1), split()),
            nn.Sequential(_conv(inputs, w, 1), _conv(w, w, 3), split()),
            _pooled(inputs, w),
        ]
    )


def _torchvision(model: Torchvision, shape: tuple[int, ...], classes: int) -> nn.Module:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # RuntimeError: a build for CUDA beside a torch without it
        raise RuntimeError(
            f"expected torchvision for {model}, got {error}; run: pip install 'batchrenorm[vision]', in the build that "
            "belongs to your torch"
        ) from error
    if model.name not in models.list_models(module=models):
        raise ValueError(
            f"expected a classification model of torchvision, got {model.name!r}; "
            "torchvision.models.list_models(module=torchvision.models) names them"
        )
    options: dict[str, bool] = {}
    if model.name in ("inception_v3", "googlenet"):
        # Their own truncated normal distributions, which torchvision wants to be asked for.
        options["init_weights"] = True
    if model.name == "inception_v3":
        options["aux_logits"] = min(shape[1:]) >= 299
    return models.get_model(model.name, weights=None, num_classes=classes, **options)
