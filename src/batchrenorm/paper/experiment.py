"""What an experiment consists of, as data: arms, measures, predictions, table, figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from .. import __version__
from ..schedule import ClipSchedule


class Labels(NamedTuple):
    """A minibatch that is not i.i.d.: labels drawn with replacement, and images drawn of each, side by side."""

    per_batch: int
    images: int
    spread: int = 1  # deal the images of a label out over this many groups


@dataclass(frozen=True)
class Arm:
    """One way to train. Arms of a preset share data, seeds, initial weights and, per kind of sampling, minibatches."""

    regime: str
    normalizer: str
    group: int | None = None  # samples normalised together; None is the whole minibatch, as the gradient always is
    labels: Labels | None = None  # None is i.i.d.
    learning_rate: float | None = None  # None is the preset's
    steps: int | None = None

    @property
    def name(self) -> str:
        """``regime/normalizer``."""
        return f"{self.regime}/{self.normalizer}"


class Measure(NamedTuple):
    """What one number of a trained arm was measured on."""

    arm: str
    split: str = "test"  # train, val or test
    statistics: str = "averages"  # mu and sigma of inference; or "batch": mu_B, sigma_B of groups like the arm's


class Row(NamedTuple):
    """A line of the result table."""

    label: str
    measure: Measure
    paper: str = ""  # the number that the paper printed, in percent


class Prediction(NamedTuple):
    """What was expected before the run, of the difference `better - worse` in points.

    ``at_least``: the mean difference is that large. ``within``: the difference is no larger than that, either way.
    """

    claim: str
    better: Measure
    worse: Measure
    at_least: float | None = None
    within: float | None = None


class Curve(NamedTuple):
    """A line in a figure."""

    label: str
    measure: Measure
    color: str
    dashed: bool = False


class Figure(NamedTuple):
    """Learning curves in one picture."""

    title: str
    caption: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Mlp:
    """A fully connected net."""

    depth: int
    width: int


@dataclass(frozen=True)
class Preset:
    """An experiment.

    Raises:
        ValueError: an arm's group or labels do not fit the minibatch.
    """

    name: str
    about: str
    data: str
    model: Mlp
    batch_size: int
    steps: int
    learning_rate: float  # SGD, momentum 0.9, cosine to 0
    weight_decay: float
    alpha: float  # weight of the new value in mu and sigma
    evaluations: int  # how often a training is looked at
    seeds: int
    arms: tuple[Arm, ...]
    rows: tuple[Row, ...]
    figures: tuple[Figure, ...]
    predictions: tuple[Prediction, ...]
    chosen: str  # how the settings were chosen
    caveats: tuple[str, ...]
    r_max: float = 3.0
    d_max: float = 5.0
    learn_gamma: bool = False  # the paper fixed gamma at 1

    def __post_init__(self) -> None:
        for arm in self.arms:
            if arm.group is not None and self.batch_size % arm.group:
                raise ValueError(
                    f"expected the group of {arm.name} to divide the minibatch of {self.batch_size}, got {arm.group}; "
                    "every group is normalised alike"
                )
            if arm.labels is not None and arm.labels.per_batch * arm.labels.images != self.batch_size:
                raise ValueError(
                    f"expected labels times images of {arm.name} to be the minibatch of {self.batch_size}, got "
                    f"{arm.labels.per_batch} * {arm.labels.images}; every arm takes as many samples in a step"
                )

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def config(self, arm: Arm) -> dict[str, Any]:
        """All that an arm's numbers depend on, except the seed and the processor."""
        steps = arm.steps or self.steps
        clip = ClipSchedule.for_training(steps, self.r_max, self.d_max)
        return {
            "preset": self.name,
            "data": self.data,
            "model": {"kind": type(self.model).__name__, **asdict(self.model)},
            "batch_size": self.batch_size,
            "group": arm.group or self.batch_size,
            "labels": None if arm.labels is None else arm.labels._asdict(),
            "normalizer": arm.normalizer,
            "steps": steps,
            "learning_rate": arm.learning_rate or self.learning_rate,
            "weight_decay": self.weight_decay,
            "optimizer": "SGD, momentum 0.9, cosine to 0",
            "alpha": self.alpha,
            "clip": asdict(clip),
            "learn_gamma": self.learn_gamma,
            "evaluations": self.evaluations,
            "batchrenorm": __version__,
            "torch": torch.__version__,
        }
