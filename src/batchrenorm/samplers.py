"""Minibatches that are not i.i.d., as in section 4.3 of the paper."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler


class LabelGroupBatchSampler(Sampler[list[int]]):
    """Minibatches of a few labels with a few images each: the paper's 16 labels times 2 images.

    For every minibatch `labels_per_batch` labels are drawn at random *with* replacement (so a label may come twice),
    and for each of them `images_per_label` different images of it. The images of a label stand side by side.

    Batches are a function of (seed, epoch, index) alone, so an iteration can be resumed anywhere and arms of an
    experiment share their batches. After a whole pass the epoch advances by itself.

    Args:
        labels: ``(n,)`` integers, the label of each item of the dataset.
        labels_per_batch: labels drawn for a set.
        images_per_label: images drawn for each label.
        sets_per_batch: how many such sets, drawn independently, stand one after the other in a minibatch (the paper's
            50 workers). With ``microbatch_size = labels_per_batch * images_per_label`` each set is normalised by
            itself.
        spread: deal the images of each label out over this many equal parts of the set; 2 is the paper's remedy, in
            which one image of every pair goes to the first half-minibatch and the other to the second.
        num_batches: minibatches in an epoch; None for ``n // batch size`` (at least 1).
        seed: of the random choices.

    Raises:
        ValueError: a label has fewer images than `images_per_label`, or a number is out of its range.

    Examples:
        >>> labels = [0] * 5 + [1] * 5 + [2] * 5
        >>> sampler = LabelGroupBatchSampler(labels, labels_per_batch=2, images_per_label=3, num_batches=4)
        >>> [[labels[i] for i in batch] for batch in sampler][0]
        [0, 0, 0, 2, 2, 2]

    Source: section 4.3.
    """

    def __init__(
        self,
        labels: Sequence[int] | Tensor,
        labels_per_batch: int = 16,
        images_per_label: int = 2,
        *,
        sets_per_batch: int = 1,
        spread: int = 1,
        num_batches: int | None = None,
        seed: int = 0,
    ) -> None:
        of = torch.as_tensor(labels)
        if of.ndim != 1 or of.numel() == 0 or of.is_floating_point():
            raise ValueError(
                f"expected labels to be n integers, got shape {tuple(of.shape)} of {of.dtype}; one for each item"
            )
        for name, value in {
            "labels_per_batch": labels_per_batch,
            "images_per_label": images_per_label,
            "sets_per_batch": sets_per_batch,
            "spread": spread,
            "num_batches": 1 if num_batches is None else num_batches,
        }.items():
            if value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}; it is a count")
        if images_per_label % spread:
            raise ValueError(
                f"expected images_per_label to be a multiple of spread, got {images_per_label} and {spread}; "
                "each part gets the same number of images of a label"
            )
        order = of.argsort(stable=True)
        names, counts = of[order].unique_consecutive(return_counts=True)
        if counts.min() < images_per_label:
            rare = int(counts.argmin())
            raise ValueError(
                f"expected at least images_per_label={images_per_label} images of every label, got {int(counts[rare])} "
                f"of label {int(names[rare])}; leave rare labels out or draw fewer images"
            )
        self._order = order  # the images of a label side by side
        self._ranges = list(zip((counts.cumsum(0) - counts).tolist(), counts.tolist()))  # first place, count
        self.labels_per_batch = labels_per_batch
        self.images_per_label = images_per_label
        self.sets_per_batch = sets_per_batch
        self.spread = spread
        self.batch_size = labels_per_batch * images_per_label * sets_per_batch
        self.num_batches = max(1, of.numel() // self.batch_size) if num_batches is None else num_batches
        self.seed = seed
        self.epoch = 0
        self._next = 0

    def __len__(self) -> int:
        """Minibatches in an epoch."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        """The rest of the epoch: all of it, unless `load_state_dict` has set a place inside."""
        while self._next < self.num_batches:
            batch = self.batch(self._next)
            self._next += 1
            yield batch
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch at its first minibatch."""
        self.epoch, self._next = epoch, 0

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Where the iteration stands.

        Args:
            consumed: minibatches of this epoch that training has used. A `DataLoader` with workers draws ahead, so its
                sampler stands further than the training; None is what was drawn.
        """
        return {"seed": self.seed, "epoch": self.epoch, "next": self._next if consumed is None else consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.seed, self.epoch, self._next = state["seed"], state["epoch"], state["next"]

    def batch(self, index: int) -> list[int]:
        """The minibatch at this place of the epoch, without moving the iteration."""
        # Numbers from `random()` alone: that method's sequence is the same in every version of Python. Operators on
        # tensors would take longer than all draws, and than a tenth of a small net's step.
        uniform = random.Random(f"{self.seed} {self.epoch} {index}").random
        part = self.images_per_label // self.spread
        places: list[int] = []
        for _ in range(self.sets_per_batch):
            labels = [int(uniform() * len(self._ranges)) for _ in range(self.labels_per_batch)]
            drawn = [_different(*self._ranges[label], self.images_per_label, uniform) for label in labels]
            for begin in range(0, self.images_per_label, part):
                for images in drawn:
                    places += images[begin : begin + part]
        return self._order[places].tolist()


def _different(first: int, count: int, k: int, uniform: Callable[[], float]) -> list[int]:
    """k different ones of `count` numbers from `first` on, all choices and orders alike."""
    drawn: dict[int, None] = {}  # in the order of drawing
    while len(drawn) < k:
        drawn[first + int(uniform() * count)] = None
    return list(drawn)
