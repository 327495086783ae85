"""What depends on the training step: the limits on r and d (paper, section 4), and the weight of the averages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClipSchedule:
    """Limits that open linearly during training, as in section 4 of the paper.

    ``r_max(t) = 1 + (r_max - 1) * ramp(t; warmup, r_full)`` and ``d_max(t) = d_max * ramp(t; warmup, d_full)``, where
    ``ramp`` is 0 up to ``warmup``, 1 from ``*_full`` on and linear between. During warm-up the layer is batch norm.

    Args:
        r_max: final limit of r, which lies in ``[1/r_max, r_max]``; at least 1.
        d_max: final limit of d, which lies in ``[-d_max, d_max]``; at least 0.
        warmup: training steps of plain batch norm.
        d_full: step at which d_max is reached; at least ``warmup``.
        r_full: step at which r_max is reached; at least ``warmup``.

    Raises:
        ValueError: a limit or a step out of its range.

    Examples:
        >>> schedule = ClipSchedule()
        >>> [tuple(round(float(v), 3) for v in schedule(torch.tensor(t))) for t in (0, 5_000, 15_000, 40_000)]
        [(1.0, 0.0), (1.0, 0.0), (1.571, 2.5), (3.0, 5.0)]
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup: int = 5_000
    d_full: int = 25_000
    r_full: int = 40_000

    def __post_init__(self) -> None:
        check_limits(self.r_max, self.d_max)
        for name in ("d_full", "r_full"):
            if not 0 <= self.warmup <= getattr(self, name):
                raise ValueError(
                    f"expected 0 <= warmup <= {name}, got warmup={self.warmup} and {name}={getattr(self, name)}; "
                    "the limits can only open after the warm-up"
                )

    @classmethod
    def for_training(cls, total_steps: int, r_max: float = 3.0, d_max: float = 5.0) -> ClipSchedule:
        """The paper's schedule as fractions of a run: 5k, 25k and 40k of 130k steps are 3.8 %, 19 % and 31 %.

        Args:
            total_steps: training steps of the whole run; at least 1.
            r_max: final limit of r.
            d_max: final limit of d.

        Raises:
            ValueError: ``total_steps`` is not positive, or a limit is out of its range.

        Examples:
            >>> ClipSchedule.for_training(1_300)
            ClipSchedule(r_max=3.0, d_max=5.0, warmup=50, d_full=250, r_full=400)
        """
        _check_length(total_steps)
        return cls(r_max, d_max, *(round(total_steps * k / 130) for k in (5, 25, 40)))

    @classmethod
    def early(cls, total_steps: int, r_max: float = 3.0, d_max: float = 5.0) -> ClipSchedule:
        """Limits that open over the first tenth of a run, without warm-up: to go with a `MomentumSchedule`.

        Not the paper's, whose averages lag too far behind for that so early; what it is worth is in LOG.md.

        Args:
            total_steps: training steps of the whole run; at least 1.
            r_max: final limit of r.
            d_max: final limit of d.

        Raises:
            ValueError: ``total_steps`` is not positive, or a limit is out of its range.

        Examples:
            >>> ClipSchedule.early(1_300)
            ClipSchedule(r_max=3.0, d_max=5.0, warmup=0, d_full=130, r_full=130)
        """
        _check_length(total_steps)
        return cls(r_max, d_max, 0, *[round(total_steps / 10)] * 2)

    @classmethod
    def constant(cls, r_max: float = 3.0, d_max: float = 5.0) -> ClipSchedule:
        """Open limits from the first step: only for layers whose averages are already trained.

        Args:
            r_max: limit of r.
            d_max: limit of d.

        Raises:
            ValueError: a limit is out of its range.

        Examples:
            >>> ClipSchedule.constant(1.5, 0.5)
            ClipSchedule(r_max=1.5, d_max=0.5, warmup=0, d_full=0, r_full=0)
        """
        return cls(r_max, d_max, 0, 0, 0)

    @overload
    def __call__(self, step: Tensor) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(self, step: int) -> tuple[float, float]: ...
    def __call__(self, step: Tensor | int) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """The limits for the training forward that follows ``step`` finished ones.

        Args:
            step: 0-d integer tensor, or an int.

        Returns:
            ``(r_max, d_max)``: 0-d float64 tensors (float32 where the device has no float64) on the device of ``step``,
            computed without a host sync; for an int, floats.
        """
        r = 1.0 + _ramp(step, self.warmup, self.r_full, self.r_max - 1.0)
        d = _ramp(step, self.warmup, self.d_full, self.d_max)
        return r, d  # type: ignore[return-value]

    @overload
    def own_share(self, step: Tensor) -> Tensor: ...
    @overload
    def own_share(self, step: int) -> float: ...
    def own_share(self, step: Tensor | int) -> Tensor | float:
        """Share of the microbatch's own gradient where ``gradient="moving"``: 1 in the warm-up, 0 from ``r_full`` on.

        It falls as the limit of r opens: behind r = 1 the forward is batch norm's, of which the moving gradient would
        be a wrong derivative. Where r_max is 1 it stays 1.

        Args:
            step: as for the limits.

        Examples:
            >>> [ClipSchedule().own_share(t) for t in (0, 5_000, 22_500, 40_000)]
            [1.0, 1.0, 0.5, 0.0]
        """
        return 1.0 - _ramp(step, self.warmup, self.r_full, 1.0 if self.r_max > 1.0 else 0.0)


@dataclass(frozen=True)
class MomentumSchedule:
    """The weight of the new value in the averages, large at first: they look back over a part of the training so far.

    ``alpha(t) = max(momentum, 1 / (1 + window * t))``. While the weights of a net still change fast, averages of weight
    0.01 lag behind them, which is why the paper begins with batch norm; these follow, and the limits may open early.

    Args:
        momentum: the weight in the end, in [0, 1].
        window: how far back they look, as a part of the steps so far, in [0, 1]; 1 and a momentum of 0 are the
            cumulative mean.

    Raises:
        ValueError: a number out of its range.

    Examples:
        >>> schedule = MomentumSchedule(momentum=0.01)
        >>> [round(schedule(t), 3) for t in (0, 10, 100, 1_000)]
        [1.0, 0.5, 0.091, 0.01]

    Source: not of the paper; LOG.md, "an early start".
    """

    momentum: float = 0.01
    window: float = 0.1

    def __post_init__(self) -> None:
        for name, value in (("momentum", self.momentum), ("window", self.window)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"expected {name} in [0, 1], got {value}; it is a part of the whole")

    @overload
    def __call__(self, step: Tensor) -> Tensor: ...
    @overload
    def __call__(self, step: int) -> float: ...
    def __call__(self, step: Tensor | int) -> Tensor | float:
        """The weight for the training forward that follows ``step`` finished ones.

        Args:
            step: 0-d integer tensor, or an int.

        Returns:
            A 0-d float64 tensor (float32 where the device has no float64) on the device of ``step``, computed without
            a host sync; for an int, a float.
        """
        if isinstance(step, Tensor):
            return (1.0 / (as_real(step) * self.window + 1.0)).clamp(min=self.momentum)
        return max(self.momentum, 1.0 / (step * self.window + 1.0))


CUMULATIVE = MomentumSchedule(0.0, 1.0)


def _check_length(total_steps: int) -> None:
    if total_steps < 1:
        raise ValueError(f"expected total_steps >= 1, got {total_steps}; give the length of the run in steps")


def _ramp(step: Tensor | int, start: int, end: int, height: float) -> Tensor | float:
    # 0 while step <= start, so that the last batch-norm step is number `warmup`; start == end is a jump at once.
    if isinstance(step, Tensor):
        t = as_real(step)
        part = ((t - start) / (end - start)).clamp(0.0, 1.0) if end > start else (t >= end).to(t.dtype)
        return torch.where(part > 0, part * height, 0.0)  # and not 0 * inf where there is no limit
    fraction = min(max((step - start) / (end - start), 0.0), 1.0) if end > start else float(step >= end)
    return fraction * height if fraction else 0.0


def as_real(step: Tensor) -> Tensor:
    """The step as float64, exact up to 2**53, or float32 where the device has no float64."""
    return step.to(torch.float32 if step.device.type == "mps" else torch.float64)


def check_limits(r_max: float, d_max: float) -> None:
    """Raise ValueError unless ``r_max >= 1`` and ``d_max >= 0``, both of them numbers (inf means unclipped)."""
    if math.isnan(r_max) or r_max < 1:
        raise ValueError(
            f"expected r_max >= 1 (r lies in [1/r_max, r_max]), got {r_max}; r_max=1, d_max=0 is batch norm"
        )
    if math.isnan(d_max) or d_max < 0:
        raise ValueError(
            f"expected d_max >= 0 (d lies in [-d_max, d_max]), got {d_max}; r_max=1, d_max=0 is batch norm"
        )
