"""What is measured, as plain data.

Tensors stay under 32 MiB: glibc maps larger ones anew at every allocation, and then page faults are what one measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

TRAIN, FORWARD, EVAL = "fwd+bwd", "fwd", "eval"
BYTES = {TRAIN: 8, FORWARD: 3, EVAL: 2}
"""Reads and writes of x-sized tensors that batch norm needs: 3 forward, 5 backward (each in two passes), 2 in eval."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

EVERYONE = ("bn", "bn again", "brn", "keras", "torchrl", "sb3", "copy")
MICROBATCHED = ("brn", "brn again", "brn 8x4", "bn", "bn 8x4 looped", "copy")
COMPILED = ("bn compiled", "bn compiled again", "brn compiled", "bn", "copy")


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    dtype: str = "fp32"
    channels_last: bool = False
    passes: tuple[str, ...] = (TRAIN, FORWARD, EVAL)
    implementations: tuple[str, ...] = EVERYONE
    """The first is what the others are divided by; the second is the same code again: the noise."""
    compiled: bool = False
    quick: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def arrange(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous(memory_format=CHANNELS_LAST[x.ndim]) if self.channels_last else x.contiguous()


def _conv(size: str, dtype: str, channels_last: bool, **more: bool) -> Case:
    # Twice the samples in half the bytes: the same size in memory.
    shape = {"24 MiB": (32, 64, 56, 56), "6 MiB": (32, 256, 14, 14)}[size]
    shape = (shape[0] * (2 if dtype == "bf16" else 1), *shape[1:])
    layout = "channels_last" if channels_last else "NCHW"
    return Case(f"conv {size} {dtype} {layout}", shape, dtype, channels_last, **more)


CASES = (
    *(
        _conv(size, dtype, channels_last, quick=size == "6 MiB" and not channels_last and dtype == "fp32")
        for size in ("24 MiB", "6 MiB")
        for dtype in ("fp32", "bf16")
        for channels_last in (False, True)
    ),
    Case("dense (32, 64)", (32, 64), quick=True),
    Case("dense (256, 256)", (256, 256)),
    Case("dense (4096, 512)", (4096, 512)),
    Case("dense (4096, 512) bf16", (4096, 512), "bf16"),
    Case("tiny conv (2, 8, 4, 4)", (2, 8, 4, 4)),
    Case("3-d 8 MiB fp32", (2, 64, 16, 32, 32)),
    Case("3-d 8 MiB fp32 channels_last", (2, 64, 16, 32, 32), channels_last=True),
    Case("32 as 8x4, conv 24 MiB", (32, 64, 56, 56), passes=(TRAIN,), implementations=MICROBATCHED),
    Case("32 as 8x4, conv 24 MiB channels_last", (32, 64, 56, 56), "fp32", True, (TRAIN,), MICROBATCHED),
    Case("32 as 8x4, conv 6 MiB", (32, 256, 14, 14), passes=(TRAIN,), implementations=MICROBATCHED, quick=True),
    Case("32 as 8x4, conv 6 MiB channels_last", (32, 256, 14, 14), "fp32", True, (TRAIN,), MICROBATCHED),
    Case("32 as 8x4, dense (32, 64)", (32, 64), passes=(TRAIN,), implementations=MICROBATCHED),
    Case("32 as 8x4, dense (32, 4096)", (32, 4096), passes=(TRAIN,), implementations=MICROBATCHED),
    *(
        Case(f"compiled, {case.name}", case.shape, case.dtype, case.channels_last, (TRAIN,), COMPILED, compiled=True)
        for case in (
            _conv("24 MiB", "fp32", False),
            _conv("24 MiB", "fp32", True),
            _conv("6 MiB", "fp32", False),
            Case("dense (256, 256)", (256, 256)),
        )
    ),
)
