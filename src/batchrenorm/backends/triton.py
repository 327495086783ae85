"""The heavy passes as kernels of Triton, `triton_kernels.py`, with the paper's vectors between them on the device.

The path of x, whose groups of `size` samples are normalised by themselves:

    statistics   x -> mean, var, std (G, C) [-> r, d; the averages, the step move]    launch 1, reads x
    affine       x -> y = act((x - mean) * a + b + residual)                          launch 2, reads x, writes y
    sums         x, dy -> S1, S2 (G, C) -> gradients of weight and bias               launch 3, reads x, dy
    gradient     x, dy -> dx = a * (dy - S1 / n - (x - mean) * S2 / (n * std²))       launch 4, reads x, dy, writes dx

Grid: one program for each (block of channels, split, group), channels fastest, so that neighbours read neighbouring
memory. A program walks the tiles of its split and leaves one partial result. The **last** of a group's splits to
arrive, told by a counter, merges the partial results in the order of the splits: which program that is changes from run
to run, what it computes does not, so results are the same bits every time. It writes mean, var, std, r and d. The last
*group* to arrive for a block of channels moves these channels' averages (all groups have read them by then), and the
last *block* moves the step. Every last arriver sets its counter back to 0, so a launch needs no other before it.
Nothing here waits for another program, and nothing waits for the device.

Where a tile holds a whole group (small maps, microbatches), `forward_in_one` and `backward_in_one` do both passes from
registers: one read, one write, one launch.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..moving import NOT_TWICE, Moving
from ..schedule import ClipSchedule, MomentumSchedule
from . import Moments, Shared, as_laid_out, decomposed, in_order

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)

# Tuned by what the compiler for sm_90 says (tests/test_triton.py), not yet by a clock.
TILE = 4096
"""Elements of a tile: 32 for each thread of 4 warps, which is 4 loads of 16 bytes in bfloat16, or 16 of 8 warps."""
CHANNELS = 64
"""Channels of a tile of rows: in bfloat16 a line of 128 bytes."""
SLAB = 8192
"""Elements that one program may hold to read x once."""
SLAB_CHANNELS = 16
"""Channels of a slab of rows at least: a sector of 32 bytes in bfloat16."""
PROGRAMS = 528
"""Programs of a launch, where there is that much to do: 4 for each of 132 multiprocessors. Not asked of the device, so
that the splits, and with them the last bits, are the same on all."""
REVERSED = True
"""The second pass begins where the first has ended, with what the cache still holds."""


class Averages(NamedTuple):
    """What the statistics kernel needs to compute r and d and to move the averages."""

    running_mean: Tensor  # (C,) float32
    running_var: Tensor
    step: Tensor | None  # 0-d int64
    alpha: float | MomentumSchedule
    clip: ClipSchedule


def refusal(x: Tensor, *others: Tensor | None) -> str | None:
    """Why these kernels cannot run on these, or None."""
    if x.dtype not in _TYPES:
        return f"x of {x.dtype}"
    for t in (x, *others):
        if t is not None and not (t.device == x.device and type(t) in _PLAIN):
            return f"a {type(t).__name__} on {t.device} beside x on {x.device}"
    if not installed():
        return "triton is not installed (pip install 'batchrenorm[triton]')"
    if not (x.is_cuda and _runs_on(x.device.index)) and not (x.is_cpu and _interprets()):
        return f"x on {x.device}, where these kernels have not been tried"
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return "a tensor that has left a transform of torch.func"
    return "torch.jit at work" if torch._C._get_tracing_state() is not None else None


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _runs_on(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= (8, 0)


def _interprets() -> bool:
    """Triton's own switch: its interpreter runs kernels on CPU tensors, one program after the other."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _kernels() -> ModuleType:
    # Importing triton takes as long as importing torch; only who launches something pays for it.
    return importlib.import_module("batchrenorm.backends.triton_kernels")


def moments(x: Tensor, eps: float, size: int, mask: Tensor | None = None) -> Moments:
    if mask is not None:
        raise ValueError("expected mask=None with backend='triton', got a mask; use backend=None or 'decomposed'")
    x = in_order(x.detach())  # the derivative is in _Affine
    passes = _Passes.of(x, size)
    vectors = passes.vectors(x)
    _statistics(passes, x, vectors, eps, None)
    mean, var, std = vectors[:3] if passes.groups > 1 else vectors[:3, 0]
    return mean, var, std


def affine(
    x: Tensor,
    moments: Moments,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    size: int,
    residual: Tensor | None = None,
    activation: str | None = None,
    shared: Shared | None = None,  # never: `functional.choose` takes another backend then
    moving: Moving | None = None,
) -> Tensor:
    vectors = torch.stack([*moments, scale, shift]).view(5, -1, x.shape[1])
    return _apply(x, weight, bias, residual, (vectors, eps, size, activation is not None, None, moving))


def in_two_launches(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    size: int,
    residual: Tensor | None,
    activation: str | None,
    averages: Averages,
    moving: Moving | None = None,
) -> Tensor:
    """The whole training step, averages included; in one launch if x is small."""
    return _apply(x, weight, bias, residual, (None, eps, size, activation is not None, averages, moving))


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        constants: tuple[Any, ...],
    ) -> Tensor:
        vectors, eps, size, relu, averages, moving = constants
        given, x = x, in_order(x)
        passes = _Passes.of(x, size)
        # All memory before the first launch: nothing moves if there is not enough.
        y = torch.empty_like(x)
        passed = None if residual is None else as_laid_out(residual, x)
        w, b = _contiguous(weight), _contiguous(bias)
        with _on(x):
            if vectors is not None:
                passes.launch("affine", x, y, passed, vectors, w, b, relu, REVERSED, eps)
            else:
                vectors = passes.vectors(x)
                slab = passes.slab()
                if slab is None:
                    _statistics(passes, x, vectors, eps, averages)
                    passes.launch("affine", x, y, passed, vectors, w, b, relu, REVERSED, eps)
                else:
                    known = _step_arguments(averages)
                    slab.launch(
                        "forward_in_one", x, y, passed, vectors, w, b, slab.counters(x.device), *known, relu, eps
                    )
        # With a residual the ReLU's mask cannot be had from x; the output is kept by whatever takes it anyway.
        ctx.save_for_backward(given, weight, bias, y if relu and residual is not None else None)
        # Vectors that nobody else writes or differentiates; as attributes they cost no packing and unpacking.
        ctx.constants = vectors, eps, size, relu, moving
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, y = ctx.saved_tensors
        vectors, eps, size, relu, moving = ctx.constants
        need_x, need_weight, need_bias, need_residual, _ = needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # under create_graph: this gradient may be differentiated again
            if moving is not None and need_x:
                raise RuntimeError(NOT_TWICE)
            scale, shift = vectors[3:] if vectors.shape[1] > 1 else vectors[3:, 0]
            return *decomposed.gradients(needs, dy, x, eps, scale, shift, weight, bias, size, y, relu), None
        x = in_order(x)
        dy = as_laid_out(dy, x)
        if need_residual and not (relu or need_x or need_weight or need_bias):
            return None, None, None, dy, None
        passes = _Passes.of(x, size)
        dx = torch.empty_like(x) if need_x else None
        # The residual's gradient is dy behind the ReLU; the second pass takes that too, and needs no mask then.
        masked = torch.empty_like(x) if relu and (need_residual or (moving is not None and need_x)) else None
        dw = torch.empty_like(weight) if need_weight else None
        db = torch.empty_like(bias) if need_bias else None
        w, b = _contiguous(weight), _contiguous(bias)
        totals = torch.empty_like(vectors[:2])
        # A moving gradient has its vectors between the two passes, so x is read twice.
        slab = passes.slab() if moving is None else None
        with _on(x):
            if slab is not None:
                outputs = masked, dx, vectors, w, b, totals, slab.counters(x.device), dw, db
                slab.launch("backward_in_one", x, dy, y, *outputs, relu, eps)
            else:
                outputs = masked, vectors, w, b, totals, passes.partials(x), passes.counters(x.device), dw, db
                passes.launch("sums", x, dy, y, *outputs, relu, eps)
                if dx is not None:
                    if moving is not None:
                        vectors, totals = _moved(moving, totals, vectors, eps, passes, x)
                    behind, mask = (dy, relu) if masked is None else (masked, False)
                    passes.launch("gradient", x, behind, y, dx, vectors, w, b, totals, mask, REVERSED, eps)
        return dx, dw, db, None if not need_residual else dy if masked is None else masked, None


def _moved(
    moving: Moving, totals: Tensor, vectors: Tensor, eps: float, passes: _Passes, x: Tensor
) -> tuple[Tensor, Tensor]:
    """The vectors and sums that make `gradient` the moving one. With these vectors it cannot see a ReLU any more."""
    mean, var, std, scale, shift = vectors
    positions = x.numel() // (x.shape[0] * x.shape[1])
    count = std.new_full((passes.groups, 1), passes.size * positions)
    count[-1] = (x.shape[0] - (passes.groups - 1) * passes.size) * positions
    sum_dy, sum_dy_x_hat, factor = moving.part(totals[0], totals[1] / std, count, scale, shift, std, eps)
    scaled = torch.stack([mean, var, std, scale * factor, shift])
    return scaled, torch.stack([sum_dy / factor, sum_dy_x_hat * std / factor])


# Past `Function.apply`, which looks for transforms of torch.func; with these at work this backend is not chosen.
_apply = super(torch.autograd.Function, _Affine).apply

AffineBackward: type = _Affine._backward_cls
"""The class of this backend's nodes in autograd's graph."""


def _statistics(passes: _Passes, x: Tensor, vectors: Tensor, eps: float, averages: Averages | None) -> None:
    known = _step_arguments(averages)
    with _on(x):
        passes.launch("statistics", x, vectors, passes.partials(x), passes.counters(x.device), *known, eps)


def _step_arguments(averages: Averages | None) -> tuple[Any, ...]:
    """From `running_mean` to `FALLING`, as the kernels take them."""
    if averages is None:
        return None, None, None, 0.0, 0.0, 1.0, 0.0, 0, 0, 0, False
    running_mean, running_var, step, alpha, clip = averages
    limits = float(clip.r_max), float(clip.d_max), clip.warmup, clip.d_full, clip.r_full
    if isinstance(alpha, MomentumSchedule):
        return running_mean, running_var, step, float(alpha.momentum), float(alpha.window), *limits, True
    return running_mean, running_var, step, float(alpha), 0.0, *limits, False


class _Passes(NamedTuple):
    """How the work is divided; its fields are the last arguments of every kernel."""

    N: int
    units: int  # the contiguous length, C of rows or S of planes, is units * UNIT
    other: int  # the other of C and S
    size: int  # samples of a group
    groups: int
    splits: int  # of a group's elements
    tiles: int  # of a split, at most
    ROWS: bool
    UNIT: int
    WIDE: bool  # offsets in a group do not fit 32 bits
    BLOCK_M: int
    BLOCK_C: int

    @staticmethod
    def of(x: Tensor, size: int) -> _Passes:
        N, C = x.shape[:2]
        S = x.numel() // (N * C)
        return _divided(N, C, S, min(size, N), S == 1 or not x.is_contiguous(), TILE, CHANNELS, PROGRAMS)

    @property
    def C(self) -> int:
        return self.units * self.UNIT if self.ROWS else self.other

    def slab(self) -> _Passes | None:
        """The same with one tile for all elements of a group, if these are few."""
        S = self.other if self.ROWS else self.units * self.UNIT
        rows = _power(self.size * S)
        block = min(SLAB_CHANNELS if self.ROWS else 1, _power(self.C))
        if rows * block > SLAB:
            return None
        if self.ROWS:
            block = max(block, min(CHANNELS, _power(self.C), _power(TILE // rows)))
        return self._replace(splits=1, tiles=1, BLOCK_M=rows, BLOCK_C=block)

    def blocks(self) -> int:
        return -(-self.C // self.BLOCK_C)

    def vectors(self, x: Tensor) -> Tensor:
        """(5, G, C) memory for mean, var, std, scale and shift."""
        return x.new_empty((5, self.groups, self.C), dtype=torch.float32)

    def partials(self, x: Tensor) -> Tensor:
        return x.new_empty((2, self.groups, self.splits, self.C), dtype=torch.float32)

    def counters(self, device: torch.device) -> Tensor:
        """For every (group, block), for every block, and one; all 0, and 0 again after the kernel."""
        return _counters(device, (self.groups + 1) * self.blocks() + 1)

    def launch(self, name: str, *arguments: Any) -> None:
        grid = (self.blocks() * self.splits * self.groups,)
        getattr(_kernels(), name)[grid](*arguments, *self, num_warps=warps(name, self.BLOCK_M * self.BLOCK_C))


def warps(name: str, elements: int) -> int:
    """Of a program. With two sums for every element of the tile 4 warps would need 249 registers a thread, or spill."""
    return 8 if elements > TILE or name in ("statistics", "sums") else 4


@functools.lru_cache(maxsize=1024)
def _divided(N: int, C: int, S: int, size: int, rows: bool, tile: int, channels: int, programs: int) -> _Passes:
    length, other = (C, S) if rows else (S, C)
    unit = math.gcd(length, 16)
    groups = -(-N // size)
    block_c = min(channels, _power(C)) if rows else 1
    # Not longer than the group, but for a warp with something to do.
    block_m = max(min(tile // block_c, _power(size * S)), -(-128 // block_c))
    all_tiles = -(-size * S // block_m)
    splits = min(all_tiles, max(1, programs // (-(-C // block_c) * groups)))
    tiles = -(-all_tiles // splits)
    # A tile may reach over the end.
    wide = size * S * C + tile * C >= 2**31
    splits = -(-all_tiles // tiles)
    return _Passes(N, length // unit, other, size, groups, splits, tiles, rows, unit, wide, block_m, block_c)


def _power(n: int) -> int:
    """The power of two from n on."""
    return 1 << max(n - 1, 0).bit_length()


_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}


def _counters(device: torch.device, length: int) -> Tensor:
    # One piece of memory for each stream, in which kernels run one after the other.
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            # Graphs captured on one stream may be replayed on several at once.
            return torch.zeros(length, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    counters = _COUNTERS.get((device, stream))
    if counters is None or len(counters) < length:
        counters = torch.zeros(max(length, 4096), dtype=torch.int32, device=device)
        _COUNTERS[device, stream] = counters
    return counters


def _on(x: Tensor) -> Any:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(x.device) if x.is_cuda else _NOWHERE


class _Nowhere:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


_NOWHERE = _Nowhere()


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
