"""The presets of `batchrenorm reproduce`."""

from __future__ import annotations

from dataclasses import replace

from .experiment import Arm, Curve, Figure, Labels, Measure, Mlp, Preset, Row

_BN, _BRN, _GREEN, _PURPLE, _GREY = "#2f7ed8", "#e0702c", "#3f9d5a", "#9a63c4", "#8a8a8a"

# The paper's 16 labels x 2 images in a minibatch of 32. What is normalised together is a quarter of it: 4 labels x 2.
_PAIRED = Labels(per_batch=16, images=2)

_STEPS = 1500

digits = Preset(
    name="digits",
    about="Pairs of handwritten digits, 100 classes",
    data="pairs-100",
    model=Mlp(depth=5, width=96),
    batch_size=32,
    steps=_STEPS,
    learning_rate=0.1,
    alpha=max(0.01, 20 / _STEPS),
    evaluations=15,
    seeds=5,
    arms=(
        Arm("baseline", "bn"),
        Arm("baseline", "brn"),
        Arm("baseline", "layer"),
        Arm("microbatch", "bn", group=4),
        Arm("microbatch", "brn", group=4),
        Arm("noniid", "bn", group=8, labels=_PAIRED),
        Arm("noniid", "brn", group=8, labels=_PAIRED),
        Arm("halves", "bn", group=8, labels=_PAIRED._replace(spread=2)),
        Arm("blowup", "bn", learning_rate=1.0, steps=600),
        Arm("blowup", "brn", learning_rate=1.0, steps=600),
        Arm("blowup", "brn-unclipped", learning_rate=1.0, steps=600),
        Arm("blowup", "moving-average", learning_rate=1.0, steps=600),
    ),
    rows=(
        Row("BN, i.i.d. minibatch of 32", Measure("baseline/bn"), "78.3"),
        Row("BRN, i.i.d. minibatch of 32", Measure("baseline/brn"), "78.5"),
        Row("LayerNorm, for comparison", Measure("baseline/layer")),
        Row("BN, normalised in groups of 4", Measure("microbatch/bn"), "74.2"),
        Row("BRN, normalised in groups of 4", Measure("microbatch/brn"), "76.5"),
        Row("BN, non-i.i.d. groups", Measure("noniid/bn"), "67"),
        Row("– the same nets, training images", Measure("noniid/bn", "train"), "72.8"),
        Row("– the same nets, non-i.i.d. test groups, μ_B and σ_B", Measure("noniid/bn", "test", "batch"), "76.5"),
        Row("BN, groups made i.i.d. again (“halves”)", Measure("halves/bn"), "77.4"),
        Row("BRN, non-i.i.d. groups", Measure("noniid/brn"), "78.5 (legend: 78.6)"),
        Row("– the same nets, training images", Measure("noniid/brn", "train")),
        Row("BN, learning rate 1", Measure("blowup/bn")),
        Row("BRN, learning rate 1", Measure("blowup/brn")),
        Row("BRN unclipped from step 0, learning rate 1", Measure("blowup/brn-unclipped")),
        Row("moving averages alone, learning rate 1", Measure("blowup/moving-average"), "“blowing up”"),
    ),
    figures=(
        Figure(
            "I.i.d. minibatches of 32",
            "As the paper's Figure 1: the two coincide.",
            (
                Curve("BN", Measure("baseline/bn", "val"), _BN),
                Curve("BRN", Measure("baseline/brn", "val"), _BRN),
            ),
        ),
        Figure(
            "Normalised in groups of 4",
            "As Figure 2: the gradient is still over all 32. Limits open after 4 % of the steps.",
            (
                Curve("BN, groups of 4", Measure("microbatch/bn", "val"), _BN),
                Curve("BRN, groups of 4", Measure("microbatch/brn", "val"), _BRN),
                Curve("BN, all 32", Measure("baseline/bn", "val"), _GREY, dashed=True),
            ),
        ),
        Figure(
            "Non-i.i.d. groups",
            "As Figure 3: groups of 4 labels with 2 images each.",
            (
                Curve("BN", Measure("noniid/bn", "val"), _BN),
                Curve("BN, training images", Measure("noniid/bn", "train"), _BN, dashed=True),
                Curve("BN, non-i.i.d. in test, μ_B and σ_B", Measure("noniid/bn", "val", "batch"), _PURPLE),
                Curve("BN, halves", Measure("halves/bn", "val"), _GREEN),
                Curve("BRN", Measure("noniid/brn", "val"), _BRN),
                Curve("BN, i.i.d. 32", Measure("baseline/bn", "val"), _GREY, dashed=True),
            ),
        ),
        Figure(
            "High learning rate",
            "Section 2: why not just use the averages. Learning rate 1, i.i.d. minibatches of 32.",
            (
                Curve("BN", Measure("blowup/bn", "val"), _BN),
                Curve("BRN", Measure("blowup/brn", "val"), _BRN),
                Curve("BRN, unclipped from step 0", Measure("blowup/brn-unclipped", "val"), _PURPLE),
                Curve("moving averages alone", Measure("blowup/moving-average", "val"), _GREY),
            ),
        ),
    ),
    predictions=(),
    chosen="",
    caveats=(),
)

smoke = replace(
    digits,
    name="smoke",
    about="A rehearsal of a few steps, whose numbers mean nothing",
    data="digits",
    model=Mlp(depth=2, width=16),
    steps=40,
    evaluations=4,
    seeds=2,
    arms=tuple(replace(arm, steps=None) for arm in digits.arms),
)

PRESETS = {preset.name: preset for preset in (digits, smoke)}
