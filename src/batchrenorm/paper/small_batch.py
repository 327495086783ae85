"""Beyond the paper: which normaliser for tiny microbatches, every arm with a learning rate of its own."""

from __future__ import annotations

from dataclasses import replace

from .experiment import Arm, Labels, Measure, Prediction, Preset, Row
from .models import Mlp, PlainConv, SmallInception, Torchvision

_RENORM = ("bn", "brn", "brn-early", "brn-moving", "brn-moving-early")
_GROUPED = (*_RENORM, "brn-tight", "mabn")
TITLES = {
    "bn": "BN",
    "brn": "BRN",
    "brn-tight": "BRN, limits 1.5 and 0.5",
    "brn-early": "BRN, early",
    "brn-moving": "BRN, moving",
    "brn-moving-early": "BRN, moving, early",
    "brn-moving-open": "BRN, moving, open at once",
    "mabn": "MABN",
    "group": "GroupNorm",
    "layer": "LayerNorm",
}
_SIXTEEN_PAIRS, _EIGHT_FOURS = Labels(labels=16, images=2), Labels(labels=8, images=4)


# By name: samples normalised together, sampling, normalisers.
REGIMES: dict[str, tuple[int | None, Labels | None, tuple[str, ...]]] = {
    "whole": (None, None, (*_RENORM, "group", "layer")),
    "groups-8": (8, None, _GROUPED),
    "groups-4": (4, None, _GROUPED),
    "groups-2": (2, None, (*_GROUPED, "brn-moving-open")),
    "groups-1": (1, None, _GROUPED),  # not in a dense net, where that is one value a channel
    "pairs": (None, _SIXTEEN_PAIRS, _RENORM),
    "one-label": (4, _EIGHT_FOURS, _RENORM),
}


def describe(arm: Arm) -> str:
    """What is normalised together, for a table."""
    if arm.regime == "whole":
        return "the minibatch"
    if arm.regime == "pairs":
        return "the minibatch, 16 labels × 2"
    if arm.regime == "one-label":
        return "groups of 4, one label each"
    return f"groups of {arm.group}"


# The learning rate of each arm: that of the best mean accuracy on validation images over seeds 100 and 101, the same
# candidates for every arm, and halves of the lowest for as long as the lowest is the best. Written by
# `scripts/small_batch.py choose` from the committed tuning rows.
CANDIDATES = {
    "small-batch": (0.05, 0.1, 0.2, 0.4),
    "small-batch-conv": (0.025, 0.05, 0.1, 0.2),
    "small-batch-fashion": (0.025, 0.05, 0.1, 0.2),
}
CHOSEN: dict[str, dict[str, float]] = {
    "small-batch": {
        "whole/bn": 0.2,
        "whole/brn": 0.2,
        "whole/brn-early": 0.2,
        "whole/brn-moving": 0.2,
        "whole/brn-moving-early": 0.2,
        "whole/group": 0.1,
        "whole/layer": 0.1,
        "groups-8/bn": 0.2,
        "groups-8/brn": 0.2,
        "groups-8/brn-early": 0.4,
        "groups-8/brn-moving": 0.2,
        "groups-8/brn-moving-early": 0.2,
        "groups-8/mabn": 0.2,
        "groups-4/bn": 0.2,
        "groups-4/brn": 0.2,
        "groups-4/brn-early": 0.2,
        "groups-4/brn-moving": 0.2,
        "groups-4/brn-moving-early": 0.2,
        "groups-4/brn-tight": 0.2,
        "groups-4/mabn": 0.1,
        "groups-2/brn": 0.1,
        "groups-2/brn-early": 0.1,
        "groups-2/brn-moving": 0.2,
        "groups-2/brn-moving-early": 0.2,
        "groups-2/mabn": 0.1,
        "groups-2/brn-moving-open": 0.1,
        "pairs/bn": 0.1,
        "pairs/brn": 0.2,
        "pairs/brn-early": 0.2,
        "pairs/brn-moving": 0.2,
        "pairs/brn-moving-early": 0.2,
        "one-label/brn": 0.025,
        "one-label/brn-early": 0.1,
        "one-label/brn-moving": 0.1,
        "one-label/brn-moving-early": 0.05,
    },
    "small-batch-conv": {
        "whole/bn": 0.05,
        "whole/brn": 0.05,
        "whole/brn-early": 0.05,
        "whole/brn-moving": 0.05,
        "whole/brn-moving-early": 0.05,
        "whole/group": 0.025,
        "whole/layer": 0.025,
        "groups-8/bn": 0.05,
        "groups-8/brn": 0.025,
        "groups-8/brn-early": 0.025,
        "groups-8/brn-moving": 0.025,
        "groups-8/brn-moving-early": 0.05,
        "groups-8/brn-tight": 0.025,
        "groups-8/mabn": 0.025,
        "groups-4/bn": 0.05,
        "groups-4/brn": 0.05,
        "groups-4/brn-early": 0.05,
        "groups-4/brn-moving": 0.05,
        "groups-4/brn-moving-early": 0.025,
        "groups-4/brn-tight": 0.05,
        "groups-4/mabn": 0.025,
        "groups-2/bn": 0.025,
        "groups-2/brn": 0.025,
        "groups-2/brn-early": 0.05,
        "groups-2/brn-moving": 0.025,
        "groups-2/brn-moving-early": 0.05,
        "groups-2/brn-tight": 0.025,
        "groups-2/mabn": 0.025,
        "groups-1/brn": 0.0125,
        "groups-1/brn-moving": 0.0125,
        "groups-1/brn-moving-early": 0.025,
        "one-label/brn-early": 0.0125,
        "one-label/brn-moving-early": 0.0125,
    },
    "small-batch-fashion": {
        "whole/bn": 0.05,
        "whole/brn": 0.025,
        "whole/brn-moving": 0.0125,
        "whole/brn-moving-early": 0.05,
        "groups-4/bn": 0.025,
        "groups-4/brn": 0.025,
        "groups-4/brn-moving": 0.025,
        "groups-4/brn-moving-early": 0.025,
        "groups-2/bn": 0.025,
        "groups-2/brn": 0.025,
        "groups-2/brn-moving": 0.2,
        "groups-2/brn-moving-early": 0.025,
        "one-label/bn": 0.05,
        "one-label/brn": 0.025,
        "one-label/brn-moving": 0.0125,
        "one-label/brn-moving-early": 0.1,
    },
}


def _arms(name: str, *names: str) -> tuple[Arm, ...]:
    return tuple(
        Arm(
            regime,
            normalizer,
            group,
            labels,
            CHOSEN.get(name, {}).get(f"{regime}/{normalizer}"),
            # In a dense net two samples have no gradient through batch norm, which every warm-up is, and a group of one
            # label betrays it: to fail there is a result.
            may_diverge=regime in ("groups-1", "groups-2", "one-label"),
        )
        for regime, (group, labels, normalizers) in ((key, REGIMES[key]) for key in names)
        for normalizer in normalizers
    )


def _rows(arms: tuple[Arm, ...]) -> tuple[Row, ...]:
    return tuple(Row(f"{TITLES[arm.normalizer]}, {describe(arm)}", Measure(arm.name)) for arm in arms)


def _predictions(full: float, moving: float, early_of_two: float) -> tuple[Prediction, ...]:
    """Halves and more of the differences of an earlier program with other weights and untuned arms (LOG.md).

    The last three, of the early schedules, were written later, with their first validation results in view.
    """
    brn, moved = Measure("groups-4/brn"), Measure("groups-4/brn-moving")
    early = Measure("groups-4/brn-moving-early")
    return (
        Prediction("Groups of 4 cost BRN accuracy", Measure("whole/brn"), brn, at_least=full),
        Prediction("Groups of 4: the moving gradient beats BRN's", moved, brn, at_least=moving),
        Prediction("Groups of 4: the moving gradient is as good as MABN", moved, Measure("groups-4/mabn"), within=3.0),
        Prediction(
            "All 32: the moving gradient costs nothing", Measure("whole/brn-moving"), Measure("whole/brn"), within=2.0
        ),
        Prediction(
            "Groups of one label: the moving gradient beats BRN's",
            Measure("one-label/brn-moving"),
            Measure("one-label/brn"),
            at_least=1.0,
        ),
        Prediction("Groups of 4: the moving gradient is better with the early schedules", early, moved, at_least=1.0),
        Prediction(
            "Groups of 2: the moving gradient is better with the early schedules",
            Measure("groups-2/brn-moving-early"),
            Measure("groups-2/brn-moving"),
            at_least=early_of_two,
        ),
        Prediction(
            "All 32: the moving gradient costs nothing with the early schedules either",
            Measure("whole/brn-moving-early"),
            Measure("whole/brn-early"),
            within=2.0,
        ),
    )


def _preset(name: str, *names: str, steps: int) -> Preset:
    arms = _arms(name, *names)
    return Preset(
        name=name,
        about="Normalisers for tiny microbatches, dense layers",
        scale="",
        data="omniglot",
        model=Mlp(depth=4, width=128),
        batch_size=32,
        steps=steps,
        learning_rate=0.1,  # where an arm has none of its own
        warmup=steps // 20,
        weight_decay=0.0,
        alpha=20 / steps,
        evaluations=6,
        evaluation_items=2000,
        seeds=5,
        arms=arms,
        rows=_rows(arms),
        figures=(),
        predictions=(),
        chosen="",
        device="cpu",
        caveats=(
            "Small nets, and a gradient of 32 samples in every arm: what differs is what is normalised together.",
            "MABN's constants are its authors', for trainings of 100 epochs; its groups see those before them in the "
            "same minibatch, which no other arm's do.",
        ),
    )


def _how_chosen(name: str) -> str:
    return (
        f"Each arm's learning rate was chosen among {', '.join(f'{rate:g}' for rate in CANDIDATES[name])}, and halves "
        "of the lowest for as long as the lowest was the best, by the mean accuracy on validation images over two "
        "seeds that are not among those of the results. "
    )


_NETS = (
    "Nets, images and steps are those of an earlier study (LOG.md), chosen for showing what small groups cost. The "
    "predictions stood before the first run, those of the early schedules before theirs."
)

small_batch = replace(
    _preset("small-batch", "whole", "groups-8", "groups-4", "groups-2", "pairs", "one-label", steps=3000),
    scale="A net of 4 dense layers, minibatches of 32, 3,000 steps; Omniglot at 15 pixels.",
    image_size=15,
    predictions=_predictions(full=7.0, moving=5.0, early_of_two=5.0),
    chosen=_how_chosen("small-batch") + _NETS,
)

small_batch_conv = replace(
    _preset("small-batch-conv", *REGIMES, steps=2000),
    about="Normalisers for tiny microbatches, convolutions on maps of 2 x 2",
    scale="7 convolutions, 4 of them on 2 × 2 pixels, minibatches of 32, 2,000 steps; Omniglot at 14 pixels.",
    # 14, 7, 4, 2 pixels: a sample has 4 values a channel in the last five normalisers.
    model=PlainConv(widths=(32,) + (64,) * 6, strides=(2, 2, 2, 1, 1, 1, 1)),
    image_size=14,
    predictions=_predictions(full=5.0, moving=3.0, early_of_two=2.0),
    chosen=_how_chosen("small-batch-conv") + _NETS,
)

small_batch_fashion = replace(
    _preset("small-batch-fashion", "whole", "groups-4", "groups-2", "one-label", steps=3000),
    scale="A net of 4 dense layers, minibatches of 32, 3,000 steps; Fashion-MNIST.",
    data="fashion-mnist",
    chosen=_how_chosen("small-batch-fashion"),
)

# For a GPU. ResNet-18 ends in maps of 2 x 2, 4 values a channel of each sample, the small Inception in 8 x 8.
small_batch_resnet = replace(
    _preset("small-batch-resnet", "whole", "groups-4", "groups-2", steps=6000),
    about="Normalisers for tiny microbatches, ResNet-18 on photographs of 64 pixels",
    scale="ResNet-18, minibatches of 128, 6,000 steps, on Tiny ImageNet.",
    data="tiny-imagenet",
    model=Torchvision("resnet18"),
    batch_size=128,
    weight_decay=5e-4,
    evaluation_items=5000,
    seeds=3,
    augment=True,
    precision="bfloat16",
    channels_last=True,
    device=None,
    chosen="Not yet run: usual settings, the same for every arm.",
    caveats=(),
)

small_batch_inception = replace(
    small_batch_resnet,
    name="small-batch-inception",
    about="Normalisers for tiny microbatches, a small Inception on photographs of 64 pixels",
    scale="A small Inception, minibatches of 128, 6,000 steps, on Tiny ImageNet.",
    model=SmallInception(width=64),
)
