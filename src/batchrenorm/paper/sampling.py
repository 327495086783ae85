"""Which items make up each minibatch: a function of the seed, the same for every arm that samples in the same way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..samplers import LabelGroupBatchSampler
from .experiment import Labels


class IidPlan(Sequence[Sequence[int]]):
    """Minibatches without regard to labels: one permutation of the data after another, without incomplete minibatches.

    Made as they are asked for: those of ImageNet in 130,000 steps would fill the memory.

    Args:
        n: items of the data set.
        batch_size: items in a minibatch.
        steps: minibatches.
        seed: of the permutations.

    Raises:
        ValueError: fewer items than one minibatch has.
    """

    def __init__(self, n: int, batch_size: int, steps: int, seed: int) -> None:
        if n < batch_size:
            raise ValueError(f"expected at least {batch_size} items for a minibatch, got {n}; take smaller minibatches")
        self._n, self._batch_size, self._steps, self._seed = n, batch_size, steps, seed
        self._restart()

    def _restart(self) -> None:
        self._generator = torch.Generator().manual_seed(self._seed)
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        """Minibatches."""
        return self._steps

    def __getitem__(self, step: int) -> list[int]:  # type: ignore[override]
        """The items of a minibatch; quick in the order of the steps."""
        if not 0 <= step < self._steps:
            raise IndexError(f"expected a step from 0 to {self._steps - 1}, got {step}; the plan has no more")
        epoch, place = divmod(step, self._n // self._batch_size)
        if epoch < self._epoch:
            self._restart()
        while self._epoch < epoch:
            self._order = torch.randperm(self._n, generator=self._generator)
            self._epoch += 1
        return self._order[place * self._batch_size : (place + 1) * self._batch_size].tolist()


class LabelPlan(Sequence[Sequence[int]]):
    """Minibatches of a few labels with several images each, the images of a label side by side.

    Whatever ``labels.spread`` is, the same images come in the same minibatch; only their order differs.

    Args:
        y: ``(n,)``, labels of the data set.
        labels: of a set.
        sets: drawn independently, one after the other in a minibatch.
        steps: minibatches.
        seed: of the choices.
    """

    def __init__(self, y: Tensor, labels: Labels, sets: int, steps: int, seed: int) -> None:
        self._sampler = LabelGroupBatchSampler(
            y, labels.labels, labels.images, sets_per_batch=sets, spread=labels.spread, num_batches=steps, seed=seed
        )

    def __len__(self) -> int:
        """Minibatches."""
        return len(self._sampler)

    def __getitem__(self, step: int) -> list[int]:  # type: ignore[override]
        """The items of a minibatch."""
        if not 0 <= step < len(self):
            raise IndexError(f"expected a step from 0 to {len(self) - 1}, got {step}; the plan has no more")
        return self._sampler.batch(step)


def plan(batch_size: int, labels: Labels | None, y: Tensor, steps: int, seed: int) -> Sequence[Sequence[int]]:
    """The minibatches of a training.

    Args:
        batch_size: items in a minibatch.
        labels: of a set where they are not i.i.d.; as many sets as the minibatch holds.
        y: ``(n,)``, labels of the data set.
        steps: minibatches.
        seed: of the choices.
    """
    if labels is None:
        return IidPlan(len(y), batch_size, steps, seed)
    return LabelPlan(y, labels, batch_size // labels.size, steps, seed)
