"""The exponential average of a net over its training, with which the paper evaluates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .normalizers import get_averages, set_averages


class AveragedNet:
    """Parameters, mu and sigma of a net, averaged over the steps: ``average += (1 - decay) * (value - average)``.

    sigma itself is averaged, not running_var: so the result is the sigma of the averaged net's inference.

    Args:
        model: the net; its values now are the first.
        decay: weight of the old average; less in the first steps, ``(1 + step) / (10 + step)``, so that the untrained
            net is soon forgotten.

    Source: section 4, "exponentially-decayed moving averages of model parameters"; the early decay is that of
        TensorFlow's ExponentialMovingAverage, which trained Inception-v3.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = [value.clone() for value in _values(model)]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the net after this many steps."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for average, value in zip(self.values, _values(model)):
            average.lerp_(value, weight)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model is the average."""
        own = [value.clone() for value in _values(model)]
        _set(model, self.values)
        try:
            yield
        finally:
            _set(model, own)


def _values(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters() if p.requires_grad] + get_averages(model)


@torch.no_grad()
def _set(model: nn.Module, values: Sequence[Tensor]) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)
    set_averages(model, list(values[len(parameters) :]))
