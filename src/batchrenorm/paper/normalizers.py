"""The normaliser that an arm puts into a net, and the moving averages of all its layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..convert import convert_batchnorm
from ..modules import BatchRenorm
from ..schedule import ClipSchedule, MomentumSchedule
from .mabn import Mabn, centre_weights

# Beyond the paper: with a `MomentumSchedule`, and limits that open within a tenth of the training, or at once.
EARLY = {
    "brn-early": ClipSchedule.early,
    "brn-moving-early": ClipSchedule.early,
    "brn-moving-open": lambda steps, r_max, d_max: ClipSchedule.constant(r_max, d_max),
}
MOVING = ("brn-moving", "brn-moving-early", "brn-moving-open")
NORMALIZERS = (
    *("bn", "brn", "brn-early", "brn-tight", "brn-unclipped"),
    *MOVING,
    *("mabn", "group", "layer", "moving-average"),
)


class MovingAverageNorm(nn.Module):
    """The negative control: normalise by the moving averages alone, with no gradient through the statistics.

    ``y = weight * (x - mu) / sigma + bias`` in training as in inference. Section 2 says why not: a gradient step and
    the normalisation then work against each other, and the weights grow without limit.

    Args:
        num_features: C.
        eps: added to the variance, under the root.
        momentum: weight of the new value in the averages.
        microbatch_size: samples of which a mu and a sigma are taken, whose means over all groups are the new values;
            None is the minibatch.
    """

    running_mean: Tensor
    running_std: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.01, microbatch_size: int | None = None
    ) -> None:
        super().__init__()
        self.microbatch_size = microbatch_size
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, ``(N, C)`` or ``(N, C, *)``; in training move the averages afterwards, as in Algorithm 1."""
        mu, sigma, weight, bias = (
            v.view(-1, *[1] * (x.ndim - 2)) for v in (self.running_mean, self.running_std, self.weight, self.bias)
        )
        y = (x - mu) / sigma * weight + bias
        if self.training:
            with torch.no_grad():
                # Under autocast x may be of half precision, which the averages never are.
                groups = x.to(self.running_mean.dtype).unflatten(0, (-1, self.microbatch_size or len(x)))
                var, mean = torch.var_mean(groups, [1, *range(3, groups.ndim)], correction=0)
                # Not in place: the backward still needs the old ones.
                self.running_mean = torch.lerp(self.running_mean, mean.mean(0), self.momentum)
                self.running_std = torch.lerp(self.running_std, (var + self.eps).sqrt().mean(0), self.momentum)
        return y


def normalize(
    model: nn.Module,
    name: str,
    *,
    alpha: float,
    clip: ClipSchedule,
    group: int | None,
    learn_gamma: bool,
    minibatch: int | None = None,
) -> nn.Module:
    """Replace every batch norm of a model, in place; weight, bias and eps of each layer stay.

    Args:
        model: with `nn.BatchNorm1d`, `2d` or `3d` anywhere in it.
        name: "bn"; "brn"; "brn-moving" (``gradient="moving"``); "brn-early", "brn-moving-early", "brn-moving-open"
            (with a `MomentumSchedule` that ends at alpha); "brn-tight" (limits 1.5 and 0.5); "brn-unclipped" (no
            limits, from step 0); "mabn", which has its own constants; "group", GroupNorm of at most 32 groups with at
            least 8 channels each; "layer", over all of a sample; or "moving-average".
        alpha: weight of the new value in the averages.
        clip: limits of "brn", "brn-moving" and the early ones.
        group: samples that "bn", "brn" and "mabn" normalise together, and whose mu and sigma "moving-average" averages;
            None is the minibatch. The others do not look at neighbours.
        learn_gamma: False fixes the scale at 1, as in the paper, where the next layer can absorb it.
        minibatch: samples, of whose groups "mabn" takes its moments; None: each group's own.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown name, or a model with other kinds of batch norm.
    """
    if name not in NORMALIZERS:
        raise ValueError(f"expected one of {', '.join(NORMALIZERS)} as normaliser, got {name!r}; correct the preset")
    clips = {
        # r = 1 and d = 0 are batch norm, bitwise: both arms run the same code.
        "bn": ClipSchedule.constant(1.0, 0.0),
        "brn": clip,
        **dict.fromkeys((*MOVING, *EARLY), clip),
        # Wu & He 2018, section 4.1, who found them best for groups of 4.
        "brn-tight": replace(clip, r_max=1.5, d_max=0.5),
        "brn-unclipped": ClipSchedule.constant(float("inf"), float("inf")),
    }
    if name in clips:
        gradient = "moving" if name in MOVING else "microbatch"
        momentum = MomentumSchedule(alpha) if name in EARLY else alpha
        convert_batchnorm(model, clip=clips[name], momentum=momentum, microbatch_size=group, gradient=gradient)
    else:
        for parent in list(model.modules()):
            for child, layer in parent.named_children():
                if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                    setattr(parent, child, _replacement(name, layer, alpha, group, minibatch))
    centre_weights(model)
    left = [
        f"{path or 'the model'}: {type(m).__name__}" for path, m in model.named_modules() if isinstance(m, _BatchNorm)
    ]
    if left:
        raise ValueError(
            f"expected nn.BatchNorm1d, 2d or 3d inside a model, got {', '.join(left)}; every normaliser is to replace "
            "the same layers"
        )
    if not learn_gamma:
        for layer in model.modules():
            if isinstance(layer, _LAYERS) and layer.weight is not None:
                nn.init.ones_(layer.weight).requires_grad_(False)
    return model


_LAYERS = (BatchRenorm, Mabn, MovingAverageNorm, nn.GroupNorm, nn.LayerNorm)


def _replacement(name: str, layer: nn.Module, alpha: float, group: int | None, minibatch: int | None) -> nn.Module:
    assert isinstance(layer, _BatchNorm)
    channels, eps = layer.num_features, layer.eps
    new: MovingAverageNorm | Mabn | nn.GroupNorm | nn.LayerNorm
    if name == "moving-average":
        new = MovingAverageNorm(channels, eps, alpha, group)
    elif name == "mabn":
        new = Mabn(channels, eps, group, 1 if group is None or minibatch is None else minibatch // group)
    elif name == "group":
        new = nn.GroupNorm(_groups(channels), channels, eps)
    elif isinstance(layer, nn.BatchNorm1d):
        new = nn.LayerNorm(channels, eps)
    else:
        new = nn.GroupNorm(1, channels, eps)
    if layer.running_mean is not None:
        new.to(layer.running_mean)
    new.weight, new.bias = layer.weight, layer.bias
    return new.train(layer.training)


def _groups(channels: int) -> int:
    """32 groups as in Wu & He 2018, and fewer where a group would have less than 8 channels: nearly instance norm.

    So the 64 channels of a ResNet's first stage are 8 groups of 8 here, and 32 of 2 in their experiments.
    """
    return max(g for g in range(1, 33) if channels % g == 0 and (channels // g >= 8 or g == 1))


def layer_names(model: nn.Module) -> list[str]:
    """Names of the layers that have moving averages, in the order of `get_averages`.

    For the nets of the presets this is also the order of the forward.
    """
    return [name for name, _ in _with_averages(model)]


def get_averages(model: nn.Module) -> list[Tensor]:
    """Copies of the moving averages: mu, sigma of the first layer, mu, sigma of the second, and so on.

    Returns:
        ``(C,)`` tensors in float64, from which `set_averages` gets running_var back: ``sigma² - eps`` loses bits where
        the variance is smaller than eps, and float64 has 29 more than float32.
    """
    averages = []
    for _, layer in _with_averages(model):
        if isinstance(layer, (BatchRenorm, Mabn)):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            mu, sigma = layer.running_mean, (layer.running_var.double() + layer.eps).sqrt()
        else:
            mu, sigma = layer.running_mean, layer.running_std
        averages += [mu.to(torch.float64, copy=True), sigma.to(torch.float64, copy=True)]
    return averages


@torch.no_grad()
def set_averages(model: nn.Module, averages: list[Tensor]) -> None:
    """Write moving averages back; the inverse of `get_averages`.

    For float32 layers the inverse to the last bit, where a variance is above 1e-7 eps; sigma is so always.

    Args:
        model: whose layers get them; the step counters stay.
        averages: mu, sigma, mu, sigma, ... in the order of `get_averages`.

    Raises:
        ValueError: more or fewer tensors than averages.
    """
    layers = [layer for _, layer in _with_averages(model)]
    if len(averages) != 2 * len(layers):
        raise ValueError(
            f"expected mu and sigma of {len(layers)} layers, got {len(averages)} tensors; take them from get_averages "
            "of the same model"
        )
    for layer, mu, sigma in zip(layers, averages[::2], averages[1::2]):
        if isinstance(layer, (BatchRenorm, Mabn)):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.copy_(mu)
            # The layer's own rule: sigma² - eps, never below 0.
            layer.running_var.copy_(F.softshrink(sigma.double().square(), layer.eps))
        else:
            layer.running_mean.copy_(mu)
            layer.running_std.copy_(sigma)


def _with_averages(model: nn.Module) -> Iterator[tuple[str, BatchRenorm | Mabn | MovingAverageNorm]]:
    for name, layer in model.named_modules():
        if isinstance(layer, (Mabn, MovingAverageNorm)) or (
            isinstance(layer, BatchRenorm) and layer.running_mean is not None
        ):
            yield name, layer
