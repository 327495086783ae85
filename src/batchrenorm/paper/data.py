"""Images and labels, split into train, validation and test; and which of them make up each minibatch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..samplers import LabelGroupBatchSampler

_SPLIT_SEED = 1702_03275
# Of the 1,797 images. Settings are chosen on validation; test is looked at once, at the end of a run.
_SIZES = {"train": 1000, "validation": 297, "test": 500}
_PAIRS_PER_CLASS = {"train": 100, "validation": 20, "test": 50}


class Split(NamedTuple):
    """One part of a data set."""

    x: Tensor  # (n, inputs) float32
    y: Tensor  # (n,) int64


class Data(NamedTuple):
    """A data set."""

    train: Split
    validation: Split
    test: Split
    classes: int


def load(name: str) -> Data:
    """A data set by its name in a preset.

    Args:
        name: "digits", scikit-learn's 8x8 images of 10 digits; or "pairs-100", two of them side by side.

    Raises:
        ValueError: an unknown name.
    """
    if name not in ("digits", "pairs-100"):
        raise ValueError(f"expected data 'digits' or 'pairs-100', got {name!r}; correct the preset")
    splits = _digits()
    if name == "pairs-100":
        # After the split: no image of a training pair occurs in a test pair.
        splits = {
            part: _pairs(split, _PAIRS_PER_CLASS[part], seed) for seed, (part, split) in enumerate(splits.items())
        }
    return Data(splits["train"], splits["validation"], splits["test"], 10 if name == "digits" else 100)


def _digits() -> dict[str, Split]:
    from sklearn.datasets import load_digits  # an extra, needed here only

    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images, dtype=torch.float32) / 16
    y = torch.as_tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    parts = dict(zip(_SIZES, order.split(list(_SIZES.values()))))
    std, mean = torch.std_mean(x[parts["train"]])
    return {name: Split((x[index] - mean) / std, y[index]) for name, index in parts.items()}


def _pairs(split: Split, per_class: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(_SPLIT_SEED + seed)
    of_digit = [(split.y == digit).nonzero().flatten() for digit in range(10)]
    images, labels = [], []
    for label in range(100):
        sides = [of_digit[digit] for digit in divmod(label, 10)]
        drawn = [side[torch.randint(len(side), (per_class,), generator=generator)] for side in sides]
        # (n, 64) and (n, 64) -> (n, 128): for a fully connected net the order of the pixels does not matter.
        images.append(torch.cat([split.x[index] for index in drawn], 1))
        labels.append(torch.full((per_class,), label))
    return Split(torch.cat(images), torch.cat(labels))


def iid_batches(n: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Minibatches without regard to labels: one permutation of the data after another, without incomplete minibatches.

    Args:
        n: items of the data set.
        batch_size: items in a minibatch.
        steps: minibatches.
        seed: of the permutations.

    Returns:
        `steps` lists of `batch_size` indices, a function of the arguments alone.
    """
    generator = torch.Generator().manual_seed(seed)
    batches: list[list[int]] = []
    while len(batches) < steps:
        order = torch.randperm(n, generator=generator)
        batches += [batch.tolist() for batch in order.split(batch_size) if len(batch) == batch_size]
    return batches[:steps]


def label_batches(
    labels: Tensor, labels_per_batch: int, images_per_label: int, spread: int, steps: int, seed: int
) -> list[list[int]]:
    """Minibatches of a few labels with several images each, the images of a label side by side.

    Whatever `spread` is, the same images come in the same minibatch; only their order differs.

    Args:
        labels: ``(n,)``, of the data set.
        labels_per_batch: labels drawn for a minibatch, with replacement.
        images_per_label: images drawn for each.
        spread: deal the images of a label out over this many equal parts of the minibatch.
        steps: minibatches.
        seed: of the choices.
    """
    return list(
        LabelGroupBatchSampler(labels, labels_per_batch, images_per_label, spread=spread, num_batches=steps, seed=seed)
    )
