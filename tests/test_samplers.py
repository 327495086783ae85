"""The paper's minibatches that are not i.i.d."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import batchrenorm as brn

# 40 labels that are no range, with 2 to 9 images each, in disorder.
LABELS = [[7 * k + 3] * (2 + k % 8) for k in range(40)]
LABELS = [label for group in LABELS for label in group]
LABELS = [LABELS[i] for i in torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0)).tolist()]


def batches(sampler: brn.LabelGroupBatchSampler) -> list[list[int]]:
    return list(sampler)


@pytest.mark.parametrize("labels", [LABELS, torch.tensor(LABELS), tuple(LABELS)], ids=["list", "tensor", "tuple"])
def test_sixteen_labels_twice(labels: Any) -> None:
    sampler = brn.LabelGroupBatchSampler(labels, num_batches=200)
    assert len(sampler) == 200
    drawn = batches(sampler)
    assert len(drawn) == 200
    repeated = 0
    for batch in drawn:
        assert len(batch) == 32 == sampler.batch_size
        assert all(isinstance(i, int) for i in batch)
        pairs = (
            list(itertools.batched(batch, 2)) if hasattr(itertools, "batched") else list(zip(batch[::2], batch[1::2]))
        )
        for a, b in pairs:
            assert LABELS[a] == LABELS[b]
            assert a != b  # two images, not one twice
        counts = Counter(LABELS[a] for a, _ in pairs)
        repeated += max(counts.values()) > 1
    # With replacement: 16 of 40 labels without a repeat have the probability 40!/24!/40**16 = 3 %.
    assert repeated > 180
    assert {i for batch in drawn for i in batch} == set(range(len(LABELS)))


@pytest.mark.parametrize(("labels_per_batch", "images_per_label", "sets", "spread"), [
    (16, 2, 1, 1), (16, 2, 1, 2), (4, 2, 3, 2), (5, 1, 1, 1), (1, 2, 2, 1), (3, 2, 50, 1),
])  # fmt: skip
def test_arrangement(labels_per_batch: int, images_per_label: int, sets: int, spread: int) -> None:
    sampler = brn.LabelGroupBatchSampler(
        LABELS, labels_per_batch, images_per_label, sets_per_batch=sets, spread=spread, num_batches=10
    )
    for batch in sampler:
        assert len(batch) == labels_per_batch * images_per_label * sets == sampler.batch_size
        size = labels_per_batch * images_per_label
        for first in range(0, len(batch), size):
            group = batch[first : first + size]
            parts = [group[i : i + size // spread] for i in range(0, size, size // spread)]
            # every part has the same labels, each in the same place, and a part's share of their images
            labels = [[LABELS[i] for i in part] for part in parts]
            assert all(part == labels[0] for part in labels)
            k = images_per_label // spread
            runs = [labels[0][i : i + k] for i in range(0, len(labels[0]), k)]
            assert len(runs) == labels_per_batch
            assert all(len(set(run)) == 1 for run in runs)
            for j in range(labels_per_batch):
                images = [i for part in parts for i in part[j * k : (j + 1) * k]]
                assert len(set(images)) == images_per_label


def test_halves_are_the_same_pairs_dealt_out() -> None:
    """The paper's remedy: "for every pair of images belonging to the same class, one image is assigned to the first
    half-minibatch, and the other to the second"; the draw itself is the same."""
    whole = batches(brn.LabelGroupBatchSampler(LABELS, num_batches=20, seed=3))
    halves = batches(brn.LabelGroupBatchSampler(LABELS, num_batches=20, seed=3, spread=2))
    for a, b in zip(whole, halves):
        assert a[::2] == b[:16]
        assert a[1::2] == b[16:]


def test_sets_of_a_batch_are_independent() -> None:
    for batch in brn.LabelGroupBatchSampler(LABELS, 4, 2, sets_per_batch=3, num_batches=20):
        sets = [tuple(LABELS[i] for i in batch[first : first + 8]) for first in (0, 8, 16)]
        assert len(set(sets)) == 3


def test_labels_are_uniform() -> None:
    """Over labels and not over images, some of which have four times the images; and over the images of one.

    Chi-square of n draws with f degrees of freedom has mean f and variance 2 f (in the multinomial just below it), so
    f + 6 sqrt(2 f) is six standard deviations: by Cantelli's inequality alone exceeded with probability < 1/37, by the
    nearly normal tail with < 1e-6 — and the seed is fixed.
    """
    sampler = brn.LabelGroupBatchSampler(LABELS, 16, 2, num_batches=1000)
    drawn = [i for batch in sampler for i in batch]

    def chi_square(counts: Counter[int], keys: set[int]) -> float:
        expected = sum(counts[k] for k in keys) / len(keys)
        return sum((counts[k] - expected) ** 2 for k in keys) / expected

    def bound(f: int) -> float:
        return f + 6 * math.sqrt(2 * f)

    firsts = Counter(LABELS[i] for i in drawn[::2])
    assert sum(firsts.values()) == 16_000
    assert chi_square(firsts, set(LABELS)) < bound(39)
    # the position in the batch says nothing about the label
    for position in (0, 15):
        assert chi_square(Counter(LABELS[i] for i in drawn[2 * position :: 32]), set(LABELS)) < bound(39)
    # and each image of a label has the same chance, in the first place and in the second
    for label in sorted(set(LABELS))[:16]:
        images = {i for i, v in enumerate(LABELS) if v == label}
        for half in (drawn[::2], drawn[1::2]):
            assert chi_square(Counter(i for i in half if i in images), images) < bound(len(images) - 1)


def test_seeds_and_epochs() -> None:
    def make(seed: int = 0, epoch: int = 0) -> list[list[int]]:
        sampler = brn.LabelGroupBatchSampler(LABELS, num_batches=5, seed=seed)
        sampler.set_epoch(epoch)
        return batches(sampler)

    assert make() == make()
    distinct = [make(0, 0), make(1, 0), make(0, 1), make(1, 1), make(11, 0), make(1, 10)]
    assert all(a != b for a, b in itertools.combinations(distinct, 2))
    # within an epoch as well
    assert len({tuple(b) for b in make()}) == 5

    sampler = brn.LabelGroupBatchSampler(LABELS, num_batches=5)
    assert [batches(sampler) for _ in range(3)] == [make(0, e) for e in range(3)]
    assert sampler.epoch == 3
    sampler.set_epoch(1)
    assert batches(sampler) == make(0, 1)


def test_no_global_random_state() -> None:
    sampler = brn.LabelGroupBatchSampler(LABELS, num_batches=5)
    before = torch.get_rng_state()
    one = batches(sampler)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    sampler.set_epoch(0)
    assert batches(sampler) == one


def test_default_length() -> None:
    assert len(brn.LabelGroupBatchSampler([0, 1] * 320)) == 20
    assert len(brn.LabelGroupBatchSampler([0, 1] * 4, sets_per_batch=2)) == 1
    assert len(brn.LabelGroupBatchSampler([0, 1] * 320, sets_per_batch=2)) == 10


def _stream(sampler: brn.LabelGroupBatchSampler, loader: Any, count: int) -> tuple[list[list[int]], dict[str, Any]]:
    """The next `count` minibatches, over epochs, and the state after the last of them."""
    out: list[list[int]] = []
    while len(out) < count:
        for batch in loader:
            out.append([int(i) for i in (batch[0] if isinstance(batch, (list, tuple)) and len(batch) == 1 else batch)])
            if len(out) == count:
                return out, sampler.state_dict()
    raise AssertionError


def _alone(sampler: brn.LabelGroupBatchSampler) -> Any:
    return sampler


def _loader(sampler: brn.LabelGroupBatchSampler) -> Any:
    return DataLoader(TensorDataset(torch.arange(len(LABELS))), batch_sampler=sampler)


@pytest.mark.parametrize("loaded", [_alone, _loader])
@pytest.mark.parametrize("at", range(1, 12))
def test_resume_anywhere(at: int, loaded: Callable[[brn.LabelGroupBatchSampler], Any]) -> None:
    """At the start, inside, at the end of an epoch: the run that goes on is the run that was never interrupted."""

    def make(seed: int) -> brn.LabelGroupBatchSampler:
        return brn.LabelGroupBatchSampler(LABELS, 4, 2, num_batches=5, seed=seed)

    sampler = make(7)
    whole, _ = _stream(sampler, loaded(sampler), 14)
    sampler = make(7)
    first, state = _stream(sampler, loaded(sampler), at)
    resumed = make(0)
    resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
    rest, _ = _stream(resumed, loaded(resumed), 14 - at)
    assert first + rest == whole
    other = copy.deepcopy(resumed)
    assert other.state_dict() == resumed.state_dict()


def test_resume_by_what_was_consumed() -> None:
    """With workers the loader draws ahead; the training says how far it is."""
    sampler = brn.LabelGroupBatchSampler(LABELS, 4, 2, num_batches=9)
    whole = batches(sampler)
    sampler.set_epoch(0)
    ahead = iter(sampler)
    for _ in range(6):
        next(ahead)
    state = sampler.state_dict(consumed=4)
    fresh = brn.LabelGroupBatchSampler(LABELS, 4, 2, num_batches=9)
    fresh.load_state_dict(state)
    assert batches(fresh) == whole[4:]
    assert fresh.epoch == 1


def test_as_a_batch_sampler_with_workers() -> None:
    sampler = brn.LabelGroupBatchSampler(LABELS, 4, 2, num_batches=5)
    expected = batches(sampler)
    sampler.set_epoch(0)
    loader = DataLoader(TensorDataset(torch.arange(len(LABELS))), batch_sampler=sampler, num_workers=1)
    assert len(loader) == 5
    assert [b[0].tolist() for b in loader] == expected


def test_one_set_is_one_microbatch() -> None:
    """What the arrangement is for: each set normalised by itself, in a layer with the sampler's set as microbatch."""
    sampler = brn.LabelGroupBatchSampler(LABELS, 4, 2, sets_per_batch=3, num_batches=1)
    (batch,) = sampler
    x = torch.randn(len(LABELS), 5, dtype=torch.float64)[batch]
    mean, var = torch.zeros(5).double(), torch.ones(5).double()
    y = brn.batch_renorm(x, mean.clone(), var.clone(), training=True, microbatch_size=8)
    for group, out in zip(x.split(8), y.split(8)):
        expected = brn.batch_renorm(group, mean.clone(), var.clone(), training=True)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"labels": []}, ["n integers", "(0,)"]),
        ({"labels": [[1, 2], [3, 4]]}, ["n integers", "(2, 2)"]),
        ({"labels": [0.5, 0.5]}, ["n integers", "torch.float32"]),
        ({"labels": [0, 0, 1]}, ["images_per_label=2", "got 1 of label 1"]),
        ({"labels_per_batch": 0}, ["labels_per_batch >= 1", "got 0"]),
        ({"images_per_label": 0}, ["images_per_label >= 1", "got 0"]),
        ({"sets_per_batch": -1}, ["sets_per_batch >= 1", "got -1"]),
        ({"spread": 0}, ["spread >= 1", "got 0"]),
        ({"spread": 3}, ["multiple of spread", "2 and 3"]),
        ({"num_batches": 0}, ["num_batches >= 1", "got 0"]),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^expected .+; .+$") as caught:
        brn.LabelGroupBatchSampler(**{"labels": LABELS, **arguments})
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_any_batch_without_iterating() -> None:
    labels = torch.arange(60) % 6
    one = brn.LabelGroupBatchSampler(labels, 2, 3, num_batches=5, seed=4)
    assert [one.batch(i) for i in range(5)] == list(brn.LabelGroupBatchSampler(labels, 2, 3, num_batches=5, seed=4))
    assert one.state_dict()["next"] == 0


@pytest.mark.parametrize("images", [20, 700], ids=["by keys", "drawn again"])
def test_images_of_a_label_differ_and_are_drawn_equally_often(images: int) -> None:
    """Both ways of drawing, with two sizes of label, so that none reaches over the end of its own."""
    labels = torch.tensor([0] * images + [1] * (images - 3))
    sampler = brn.LabelGroupBatchSampler(labels, 4, 10, num_batches=500)
    seen = torch.zeros(len(labels))
    firsts = torch.zeros(len(labels))
    for batch in sampler:
        for first in range(0, 40, 10):
            own = batch[first : first + 10]
            assert len(set(own)) == 10
            assert len(set(labels[own].tolist())) == 1
            seen[own] += 1
            firsts[own[0]] += 1
    for part, total in ((seen, 20_000), (firsts, 2_000)):
        for label in (0, 1):
            found = part[labels == label]
            expected = found.sum() / len(found)
            statistic = ((found - expected) ** 2 / expected).sum()
            # chi-squared has mean len - 1 and variance 2 (len - 1); 5 standard deviations, and the seed is fixed.
            # Without replacement the counts vary less than those of independent draws, never more.
            assert statistic < len(found) + 5 * (2 * len(found)) ** 0.5
        assert part.sum() == total
