"""The nets, and the normaliser that each arm puts in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modules import BatchRenorm1d
from ..schedule import ClipSchedule


class MovingAverageNorm(nn.Module):
    """The negative control: normalise by the moving averages alone, with no gradient through the statistics.

    Section 2 says why not: a gradient step and the normalisation then work against each other, and the weights grow
    without limit.

    Args:
        num_features: C.
        eps: added to the variance, under the root.
        momentum: weight of the new value in the averages.
    """

    running_mean: Tensor
    running_std: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.01) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, ``(N, C)``; in training move the averages afterwards, as in Algorithm 1."""
        y = (x - self.running_mean) / self.running_std * self.weight + self.bias
        if self.training:
            with torch.no_grad():
                var, mean = torch.var_mean(x, 0, correction=0)
                # Not in place: the backward still needs the old ones.
                self.running_mean = torch.lerp(self.running_mean, mean, self.momentum)
                self.running_std = torch.lerp(self.running_std, (var + self.eps).sqrt(), self.momentum)
        return y


def normalizer(
    name: str, features: int, alpha: float, clip: ClipSchedule, microbatch_size: int | None, learn_gamma: bool
) -> nn.Module:
    """The normaliser of an arm.

    Args:
        name: "bn", "brn", "brn-unclipped" (no limits, from step 0), "moving-average" or "layer".
        features: C.
        alpha: weight of the new value in the averages.
        clip: limits of "brn".
        microbatch_size: samples that are normalised together; None is the minibatch.
        learn_gamma: False fixes the scale at 1, as in the paper, where the next layer can absorb it.

    Raises:
        ValueError: an unknown name.
    """
    clips = {
        # r = 1 and d = 0 are batch norm, bitwise: both arms run the same code.
        "bn": ClipSchedule.constant(1.0, 0.0),
        "brn": clip,
        "brn-unclipped": ClipSchedule.constant(float("inf"), float("inf")),
    }
    layer: BatchRenorm1d | MovingAverageNorm | nn.LayerNorm
    if name in clips:
        layer = BatchRenorm1d(features, momentum=alpha, clip=clips[name], microbatch_size=microbatch_size)
    elif name == "moving-average":
        layer = MovingAverageNorm(features, momentum=alpha)
    elif name == "layer":
        layer = nn.LayerNorm(features)
    else:
        raise ValueError(
            f"expected one of {[*clips, 'moving-average', 'layer']} as normaliser, got {name!r}; correct the preset"
        )
    if not learn_gamma and layer.weight is not None:
        layer.weight.requires_grad_(False)
    return layer


def mlp(inputs: int, classes: int, depth: int, width: int, norms: list[nn.Module], seed: int) -> nn.Sequential:
    """A fully connected net, normalised before each ReLU as in the paper.

    Args:
        inputs: size of dimension 1 of the input.
        classes: outputs.
        depth: hidden layers.
        width: of each hidden layer.
        norms: `depth` normalisers of `width` features.
        seed: of the weights, which are the same for every normaliser.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    sizes = [inputs] + [width] * depth
    for size, norm in zip(sizes, norms):
        # Without a bias: the normaliser's does the same.
        layers += [_linear(size, width, False, generator), norm, nn.ReLU()]
    return nn.Sequential(*layers, _linear(width, classes, True, generator))


def _linear(inputs: int, outputs: int, bias: bool, generator: torch.Generator) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
