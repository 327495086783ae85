"""What is measured, as plain data.

On the CPU tensors stay under 32 MiB: glibc maps larger ones anew at every allocation, and then page faults are what one
measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from torch import Tensor

from batchrenorm.bench import DTYPES, arrange

TRAIN, FORWARD, BACKWARD, EVAL = "fwd+bwd", "fwd", "bwd", "eval"
PASSES = (TRAIN, FORWARD, BACKWARD, EVAL)
PLAIN, RELU, ADD_RELU = "", "relu", "add+relu"
BYTES = {
    PLAIN: {TRAIN: 8, FORWARD: 3, BACKWARD: 5, EVAL: 2},
    RELU: {TRAIN: 8, FORWARD: 3, BACKWARD: 5, EVAL: 2},
    ADD_RELU: {TRAIN: 10, FORWARD: 4, BACKWARD: 6, EVAL: 3},
}
"""Reads and writes of x-sized tensors that batch norm needs in two passes: 3 forward, 5 backward; the residual is read
once more, and its gradient written. Always this count, whatever an implementation really moves."""

STRONGEST = ("bn", "bn again", "brn", "copy")
EVERYONE = ("bn", "bn again", "brn", "bn cudnn off", "sync bn", "keras", "torchrl", "sb3", "copy")
MICROBATCHED = ("brn", "brn again", "brn 8x4", "bn", "bn 8x4 looped", "copy")
COMPILED = ("bn compiled", "bn compiled again", "brn compiled", "brn", "bn", "copy")

# (C, H = W) of the batch norms of ResNet-50 on 224 pixels and of Inception-v3 on 299.
RESNET50 = (
    *((64, 112), (64, 56), (256, 56), (128, 56), (512, 28), (128, 28), (256, 28)),
    *((1024, 14), (256, 14), (512, 14), (2048, 7), (512, 7)),
)
INCEPTION = (
    *((32, 149), (32, 147), (64, 147), (80, 73), (192, 71), (96, 35), (64, 35), (48, 35)),
    *((384, 17), (192, 17), (160, 17), (384, 8), (448, 8), (320, 8)),
)
BATCHES = (2, 4, 8, 32, 256)


@dataclass(frozen=True)
class Case:
    group: str
    shape: tuple[int, ...]
    dtype: str = "fp32"
    channels_last: bool = False
    fused: str = PLAIN
    passes: tuple[str, ...] = (TRAIN,)
    implementations: tuple[str, ...] = STRONGEST
    """The first is what the others are divided by; the second is the same code again: the noise."""
    model: str = ""
    """A whole training step of this model of torchvision, and no layer."""

    @property
    def name(self) -> str:
        layout = " channels_last" if self.channels_last else ""
        what = "x".join(map(str, self.shape))
        return f"{self.group}: {self.model}{' ' if self.model else ''}{what} {self.dtype}{layout} {self.fused}".strip()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def arrange(self, x: Tensor) -> Tensor:
        return arrange(x, self.channels_last)


def product_of(group: str, shapes: list[tuple[int, ...]], **choices: tuple) -> list[Case]:
    """A case for each shape and each combination of the fields' choices."""
    fields = list(choices)
    return [
        Case(group, shape, **dict(zip(fields, values))) for shape in shapes for values in product(*choices.values())
    ]


def square(net: tuple[tuple[int, int], ...], batches: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(N, C, side, side) for N in batches for C, side in net]


LAYOUTS, FUSED, ALL = (False, True), (PLAIN, RELU, ADD_RELU), tuple(DTYPES)
DENSE: list[tuple[int, ...]] = [(32, 64), (256, 256), (256, 1024), (4096, 512)]
VOLUME: list[tuple[int, ...]] = [(2, 64, 16, 32, 32)]
ODD: list[tuple[int, ...]] = [(8, 3, 33, 35), (4, 17, 7, 7), (8, 1000, 7, 7), (2, 8, 4, 4)]
PEERS: list[tuple[int, ...]] = [(32, 64, 56, 56), (32, 256, 14, 14)]


def _steps(shapes: dict[str, tuple[int, ...]], dtype: str, layouts: tuple[bool, ...]) -> list[Case]:
    names = ("bn", "bn again", "brn")
    return [
        Case("steps", shape, dtype, last, implementations=names, model=model)
        for model, shape in shapes.items()
        for last in layouts
    ]


def cpu() -> list[Case]:
    """Recorded in at most 12 minutes on two cores."""
    grid = square(RESNET50, BATCHES[:4]), square(INCEPTION, BATCHES[:4])
    three = (TRAIN, FORWARD, EVAL)
    cases = [
        *product_of("peers", PEERS, channels_last=LAYOUTS, passes=(three,), implementations=(EVERYONE,)),
        *product_of("peers", [(64, 64, 56, 56)], dtype=("bf16",), passes=((TRAIN,),), implementations=(EVERYONE,)),
        *product_of("peers", [*DENSE, *VOLUME], passes=(three,), implementations=(EVERYONE,)),
        *product_of(
            "variants", [(64, 64, 56, 56)], dtype=("bf16", "fp16"), channels_last=LAYOUTS, fused=FUSED, passes=(PASSES,)
        ),
        *product_of("variants", [PEERS[0]], channels_last=LAYOUTS, fused=FUSED, passes=(PASSES,)),
        *product_of("variants", [PEERS[1]], dtype=ALL, channels_last=LAYOUTS, fused=FUSED),
        *product_of("resnet50", grid[0], channels_last=LAYOUTS),
        *product_of("inception", grid[1], channels_last=LAYOUTS),
        *product_of("dense", DENSE, dtype=("bf16",)),
        *product_of("3-d", VOLUME, dtype=("fp32", "bf16"), channels_last=LAYOUTS),
        *product_of("odd", ODD, channels_last=LAYOUTS),
        *_microbatches(),
        *_compiled([(32, 256, 14, 14)], ("fp32",), (False,)),
        *_steps({"resnet50": (8, 3, 96, 96), "inception_v3": (8, 3, 107, 107)}, "fp32", LAYOUTS),
    ]
    return [case for case in cases if case.model or case.nbytes <= 25 * 2**20]


def gpu() -> list[Case]:
    """Targets first, so that a stage that is cut short has them."""
    large = [(32, 256, 56, 56), (256, 256, 56, 56)]
    batches = {"resnet50": (256, 3, 224, 224), "inception_v3": (128, 3, 299, 299)}
    return [
        *product_of("variants", large, dtype=ALL, channels_last=(True, False), fused=FUSED, passes=(PASSES,)),
        *_compiled(large, ("bf16",), (True, False)),
        *_microbatches("bf16", [(32, 256, 56, 56), (32, 256, 14, 14)]),
        *_steps(batches, "bf16", (True, False)),
        *product_of("peers", [*large, *DENSE], dtype=("bf16", "fp16"), implementations=(EVERYONE,)),
        *product_of("peers", large, dtype=("fp16",), channels_last=(True,), implementations=(EVERYONE,)),
        *product_of("dense", [*DENSE, (65536, 256)], dtype=("bf16",), passes=(PASSES,)),
        *product_of("odd", ODD, dtype=("bf16",), channels_last=LAYOUTS),
        *product_of("3-d", [*VOLUME, (2, 64, 32, 64, 64)], dtype=("bf16",), channels_last=LAYOUTS),
        *product_of("resnet50", square(RESNET50, BATCHES), dtype=("bf16",), channels_last=(True, False)),
        *product_of("inception", square(INCEPTION, BATCHES), dtype=("bf16",), channels_last=(True, False)),
    ]


def full() -> list[Case]:
    """Everything, for --only to choose from; hours on a GPU, and most of it does not fit a CPU."""
    every = {"dtype": ALL, "channels_last": LAYOUTS, "fused": FUSED, "passes": (PASSES,)}
    flat = every | {"channels_last": (False,), "implementations": (EVERYONE,)}
    return [
        *product_of("resnet50", square(RESNET50, BATCHES), **every),
        *product_of("inception", square(INCEPTION, BATCHES), **every),
        *product_of("3-d", [*VOLUME, (2, 64, 32, 64, 64)], **every),
        *product_of("odd", ODD, **every),
        *product_of("dense", [*DENSE, (65536, 256)], **flat),
        *product_of("peers", PEERS, **(every | {"fused": (PLAIN,), "implementations": (EVERYONE,)})),
        *_compiled(square(RESNET50, (32, 256)), ALL, LAYOUTS),
        *_microbatches(),
    ]


def quick() -> list[Case]:
    """A sign of life in seconds."""
    return [
        Case("peers", (32, 64), implementations=EVERYONE, passes=(TRAIN, EVAL)),
        *product_of("odd", [(2, 8, 4, 4)], fused=FUSED, passes=(PASSES,)),
        Case("micro", (32, 256, 14, 14), implementations=MICROBATCHED),
    ]


def _microbatches(dtype: str = "fp32", shapes: list[tuple[int, ...]] | None = None) -> list[Case]:
    shapes = shapes or [*PEERS, (32, 64), (32, 4096)]
    cases = product_of("micro", shapes, dtype=(dtype,), channels_last=LAYOUTS, implementations=(MICROBATCHED,))
    return [case for case in cases if len(case.shape) > 2 or not case.channels_last]


def _compiled(shapes: list[tuple[int, ...]], dtypes: tuple[str, ...], layouts: tuple[bool, ...]) -> list[Case]:
    return product_of("compiled", shapes, dtype=dtypes, channels_last=layouts, fused=FUSED, implementations=(COMPILED,))


SUITES = {"quick": quick, "cpu": cpu, "gpu": gpu, "full": full}


def suite(name: str) -> list[Case]:
    """Its cases, each once.

    Raises:
        ValueError: there is no such suite.
    """
    if name not in SUITES:
        raise ValueError(f"expected a suite, one of {', '.join(SUITES)}, got {name!r}")
    cases = SUITES[name]()
    return list({case.name: case for case in cases}.values())
