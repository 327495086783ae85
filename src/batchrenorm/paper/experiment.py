"""What an experiment consists of, as data: arms, measures, predictions, table, figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from .. import __version__
from ..schedule import ClipSchedule, MomentumSchedule
from .models import Model
from .normalizers import EARLY


class Labels(NamedTuple):
    """Minibatches that are not i.i.d.: sets of labels drawn with replacement, images drawn of each, side by side."""

    labels: int  # in a set; as many sets as the minibatch holds
    images: int  # of each label
    spread: int = 1  # deal the images of a label out over this many equal parts of the set

    @property
    def size(self) -> int:
        """Items in a set."""
        return self.labels * self.images


@dataclass(frozen=True)
class Arm:
    """One way to train. Arms of a preset share data, seeds, initial weights and, per kind of sampling, minibatches."""

    regime: str
    normalizer: str
    group: int | None = None  # samples normalised together; None is the whole minibatch, as the gradient always is
    labels: Labels | None = None  # None is i.i.d.
    learning_rate: float | None = None  # None is the preset's
    steps: int | None = None
    may_diverge: bool = False  # a loss that is not finite is a result here, elsewhere it ends the training

    @property
    def name(self) -> str:
        """``regime/normalizer``."""
        return f"{self.regime}/{self.normalizer}"


class Measure(NamedTuple):
    """What one number of a trained arm was measured on."""

    arm: str
    split: str = "test"  # train, val or test
    # "averages": mu and sigma of inference. "batch": mu_B, sigma_B of non-i.i.d. groups. "training": the training
    # forward, whose distance from "averages" on the same images is what Batch Renormalization is to close.
    statistics: str = "averages"
    parameters: str = "last"  # or "averaged": parameters, mu and sigma averaged over the steps


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
    paper: str | None = None  # the number of the paper's figure that it redraws


@dataclass(frozen=True)
class Preset:
    """An experiment.

    Raises:
        ValueError: an arm's group or labels do not fit the minibatch, or a setting is unknown.
    """

    name: str
    about: str
    scale: str  # net and data in one sentence
    data: str
    model: Model
    batch_size: int
    steps: int
    learning_rate: float
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
    evaluation_items: int = 1000  # of training and of validation images each time; 1.6 points of standard error at most
    image_size: int | None = None  # pixels; None is the data's own
    augment: bool = False
    optimizer: str = "sgd"  # momentum 0.9; or "rmsprop", the paper's: decay 0.9, momentum 0.9
    rmsprop_eps: float = 1.0  # Inception-v3's; outside the root in torch
    decay: str = "cosine"  # of the learning rate, to 0; or "exponential": 0.94 every 1/50 of the training
    warmup: int = 0  # steps of linear growth of the learning rate
    label_smoothing: float = 0.0
    averaging: float | None = None  # decay of the average of parameters, mu and sigma over the steps; None: no average
    test_labels: Labels | None = None  # of "non-i.i.d. in test"; None is the arm's own
    r_max: float = 3.0
    d_max: float = 5.0
    learn_gamma: bool = False  # the paper fixed gamma at 1
    precision: str = "float32"  # or "bfloat16", "float16" under autocast
    compile: str | None = None  # mode of torch.compile
    channels_last: bool = False
    accumulate: int = 1  # parts of the minibatch that go through the net one after the other
    checkpoint_every: int = 500  # steps
    device: str | None = None  # None is a GPU if there is one

    def __post_init__(self) -> None:
        for arm in self.arms:
            if arm.group is not None and self.batch_size % arm.group:
                raise ValueError(
                    f"expected the group of {arm.name} to divide the minibatch of {self.batch_size}, got {arm.group}; "
                    "every group is normalised alike"
                )
            if arm.labels is not None and self.batch_size % arm.labels.size:
                raise ValueError(
                    f"expected labels times images of {arm.name} to divide the minibatch of {self.batch_size}, got "
                    f"{arm.labels.labels} * {arm.labels.images}; every arm takes as many samples in a step"
                )
        for name, value, known in (
            ("optimizer", self.optimizer, ("sgd", "rmsprop")),
            ("decay", self.decay, ("cosine", "exponential")),
            ("precision", self.precision, ("float32", "bfloat16", "float16")),
        ):
            if value not in known:
                raise ValueError(f"expected {name} of {self.name} to be one of {', '.join(known)}, got {value!r}")
        for name, count in (
            ("batch_size", self.batch_size),
            ("steps", self.steps),
            ("accumulate", self.accumulate),
            ("checkpoint_every", self.checkpoint_every),
        ):
            if count < 1:
                raise ValueError(f"expected {name} of {self.name} >= 1, got {count}; it is a count")
        self.parts(1)

    def parts(self, replicas: int) -> int:
        """Samples that one process sends through the net at a time.

        Args:
            replicas: processes that share a minibatch.

        Raises:
            ValueError: the minibatch cannot be divided so that every group stays whole.
        """
        pieces = replicas * self.accumulate
        size = self.batch_size // pieces
        for arm in self.arms:
            group = arm.group or self.batch_size
            if pieces > 1 and (self.batch_size % pieces or size % group):
                raise ValueError(
                    f"expected the minibatch of {self.batch_size} in groups of {group} ({arm.name}) to be divisible "
                    f"into {replicas} processes times {self.accumulate} parts of whole groups, got "
                    f"{self.batch_size / pieces:g} samples each; use fewer processes or parts, or a larger minibatch"
                )
        return size

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def parameters(self) -> str:
        """Which parameters its results are of: "averaged" where it averages them, as in the paper."""
        return "last" if self.averaging is None else "averaged"

    def config(self, arm: Arm) -> dict[str, Any]:
        """All that an arm's numbers depend on, except the seed, the processor, and how many of them there are."""
        steps = arm.steps or self.steps
        clip = EARLY.get(arm.normalizer, ClipSchedule.for_training)(steps, self.r_max, self.d_max)
        return {
            "preset": self.name,
            "data": self.data,
            "image_size": self.image_size,
            "augment": self.augment,
            "model": {"kind": type(self.model).__name__, **_plain(asdict(self.model))},
            "batch_size": self.batch_size,
            "group": arm.group or self.batch_size,
            "labels": None if arm.labels is None else arm.labels._asdict(),
            "test_labels": None if self.test_labels is None else self.test_labels._asdict(),
            "normalizer": arm.normalizer,
            "steps": steps,
            "learning_rate": arm.learning_rate or self.learning_rate,
            "weight_decay": self.weight_decay,
            "optimizer": self.optimizer if self.optimizer == "sgd" else f"rmsprop, eps {self.rmsprop_eps:g}",
            "decay": self.decay,
            "warmup": self.warmup,
            "label_smoothing": self.label_smoothing,
            "averaging": self.averaging,
            "alpha": self.alpha,
            **({"window": MomentumSchedule(self.alpha).window} if arm.normalizer in EARLY else {}),
            "clip": asdict(clip),
            "learn_gamma": self.learn_gamma,
            "precision": self.precision,
            "compile": self.compile,
            "channels_last": self.channels_last,
            "accumulate": self.accumulate,
            "evaluations": self.evaluations,
            "evaluation_items": self.evaluation_items,
            "batchrenorm": __version__,
            "torch": torch.__version__,
        }


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    # As they come back from a line of JSON.
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
