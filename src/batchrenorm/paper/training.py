"""Training one arm with one seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..schedule import ClipSchedule
from . import evaluation, models
from .data import Data, Split, iid_batches, label_batches
from .experiment import Arm, Preset

# Enough for a curve, few enough to cost nothing beside the training.
_EVALUATION_ITEMS = 2000


def build(preset: Preset, arm: Arm, data: Data, seed: int) -> nn.Module:
    """The net of an arm, with the same weights for every arm."""
    config = preset.config(arm)
    norms = [
        models.normalizer(
            arm.normalizer,
            preset.model.width,
            preset.alpha,
            ClipSchedule(**config["clip"]),
            arm.group,
            preset.learn_gamma,
        )
        for _ in range(preset.model.depth)
    ]
    return models.mlp(data.train.x.shape[1], data.classes, preset.model.depth, preset.model.width, norms, seed)


def batches(preset: Preset, arm: Arm, labels: Tensor, steps: int, seed: int) -> list[list[int]]:
    """The minibatches of an arm: the same for every arm that samples in the same way."""
    if arm.labels is None:
        return iid_batches(len(labels), preset.batch_size, steps, seed)
    return label_batches(labels, *arm.labels, steps, seed)


def train(
    preset: Preset, arm: Arm, seed: int, data: Data, progress: Callable[[int, float | None], None]
) -> list[dict[str, Any]]:
    """Train, looking at training and validation images on the way, and at the test images once, at the end.

    Args:
        preset: the experiment.
        arm: one of its arms.
        seed: of weights and minibatches.
        data: of the preset.
        progress: called with the finished steps and the latest validation accuracy; what it raises ends the training.

    Returns:
        One entry per evaluation: step, split, statistics, accuracy in percent, loss, r and d in that step's forward.
    """
    steps = arm.steps or preset.steps
    model = build(preset, arm, data, seed)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=arm.learning_rate or preset.learning_rate,
        momentum=0.9,
        weight_decay=preset.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    looked_at = {max(1, round(steps * k / preset.evaluations)) for k in range(1, preset.evaluations + 1)}
    splits = {"train": _every_nth(data.train), "val": data.validation}
    evaluations: list[dict[str, Any]] = []
    accuracy = None
    for step, batch in enumerate(batches(preset, arm, data.train.y, steps, seed), 1):
        optimizer.zero_grad()
        watched = step in looked_at and arm.normalizer.startswith("brn")
        with evaluation.corrections(model if watched else nn.Identity()) as seen:
            outputs = model(data.train.x[batch])
        F.cross_entropy(outputs, data.train.y[batch]).backward()
        optimizer.step()
        schedule.step()
        if step in looked_at:
            if step == steps:
                splits["test"] = data.test
            for entry in _evaluate(preset, arm, model, splits):
                evaluations.append({"step": step, **entry, **_mean(seen)})
            accuracy = next(
                e["accuracy"] for e in reversed(evaluations) if (e["split"], e["statistics"]) == ("val", "averages")
            )
        progress(step, accuracy)
    return evaluations


def _evaluate(preset: Preset, arm: Arm, model: nn.Module, splits: dict[str, Split]) -> list[dict[str, Any]]:
    entries = []
    for name, split in splits.items():
        scores = {"averages": evaluation.with_averages(model, split)}
        if arm.labels is not None and name != "train":
            # As in the paper's "non-i.i.d. in test": minibatches sampled like the arm's, the same for every seed.
            drawn = batches(preset, arm, split.y, len(split.y) // preset.batch_size, seed=0)
            scores["batch"] = evaluation.with_batch_statistics(model, split, drawn)
        entries += [{"split": name, "statistics": kind, **score._asdict()} for kind, score in scores.items()]
    return entries


def _every_nth(split: Split) -> Split:
    n = math.ceil(len(split.y) / _EVALUATION_ITEMS)
    return Split(split.x[::n], split.y[::n])


def _mean(seen: list[evaluation.Corrections]) -> dict[str, float | None]:
    names = evaluation.Corrections._fields
    if not seen:
        return dict.fromkeys(names)
    return {name: finite(sum(values) / len(values)) for name, values in zip(names, zip(*seen))}


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None
