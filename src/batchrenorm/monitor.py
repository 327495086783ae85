"""See: what r, d and the averages of every layer are doing, at a price that can stay paid for a whole training.

The path of one reading, on one training forward in `every`:

    hook of the model   ->  a hook on each layer, for this forward alone: on the others a layer knows of no monitor
    x of the layer      ->  backend.moments: mu_B, sigma_B                  a statistics pass of its own
                        ->  correction.unclipped: r, d                      the layer's own mathematics
                        ->  a vector of numbers (`Reading`), on the layer's device
    end of the forward  ->  all layers' vectors as one (L, K) tensor, kept; no number is looked at
    readings(), ...     ->  copied to the host: here, and only here, the host waits for the device
"""

from __future__ import annotations

import csv
import math
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer
from torch.utils._python_dispatch import _disable_current_modes

from .correction import is_plain_eager, unclipped
from .functional import choose
from .modules import BatchRenorm
from .schedule import ClipSchedule


class Reading(NamedTuple):
    """One layer in one training forward; quantiles, of r and d before clipping, and fractions are over channels."""

    step: int  # training forwards that the monitor had seen before
    layer: str
    r_min: float
    r_05: float
    r_median: float
    r_95: float
    r_max: float
    d_min: float
    d_05: float
    d_median: float
    d_95: float
    d_max: float
    r_clipped_low: float  # fraction with r < 1 / limit
    r_clipped_high: float
    d_clipped_low: float  # fraction with d < -limit
    d_clipped_high: float
    r_limit: float
    d_limit: float
    gap: float  # root mean square of training minus inference output, before weight and bias: 0 when nothing is clipped
    mu_drift: float  # root mean square over channels, per step since the last reading, in sigma; NaN in the first
    sigma_drift: float

    @property
    def r_clipped(self) -> float:
        """Fraction of r outside its limits."""
        return self.r_clipped_low + self.r_clipped_high

    @property
    def d_clipped(self) -> float:
        """Fraction of d outside its limits."""
        return self.d_clipped_low + self.d_clipped_high


_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
_CLIPPED_MUCH = 0.2
_DRIFT_MUCH = 0.1
_GAP_MUCH = 0.5
_PANELS = {
    "r_clipped": "fraction of r clipped",
    "d_clipped": "fraction of d clipped",
    "gap": "training minus inference output",
    "mu_drift": "drift of mu per step, in sigma",
}

Sink = Callable[[int, dict[str, float]], None]


class RenormMonitor:
    """Watch r, d, clipping and averages of every Batch Renormalization layer of a model while it trains.

    Every `every`-th training forward each layer's input is reduced once more; the others cost one call of Python.
    Nothing waits for the device until a reading is asked for, and no result of the model changes. It works with any
    backend. Of a compiled model give it ``torch.compile(model)``: the watched forward, and it alone, runs uncompiled
    (a forward compiled in place by ``model.compile()`` cannot be watched). Recomputations by activation checkpointing
    are not counted.

    Args:
        model: what is called in training; layers may be converted later.
        every: training forwards from one reading to the next.
        keep: how many of the latest readings of a layer are kept.

    Raises:
        ValueError: every or keep is not positive.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), BatchRenorm(8))
        >>> with RenormMonitor(model, every=2) as monitor:
        ...     for _ in range(4):
        ...         y = model(torch.randn(16, 4))
        >>> [(reading.step, reading.layer) for reading in monitor.readings()]
        [(0, '1'), (2, '1')]

    Source: the quantities are those of Algorithm 1.
    """

    def __init__(self, model: nn.Module, every: int = 50, keep: int = 1000) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}; it counts training forwards or readings")
        self.model = model
        self.every = every
        self.steps = 0
        self._kept: deque[tuple[int, list[str], Tensor]] = deque(maxlen=keep)
        self._last: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._now: list[tuple[str, Tensor]] = []
        self._unwatch: list[Callable[[], Any]] = []
        self._untrained: list[tuple[str, Tensor]] = []
        self._logged = -1
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def close(self) -> None:
        """Leave the model; the readings stay."""
        self._release()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> RenormMonitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def layers(self) -> dict[str, BatchRenorm]:
        """The layers by name that have averages, in the order of the model."""
        return {
            name.replace("_orig_mod.", ""): m
            for name, m in self.model.named_modules()
            if isinstance(m, BatchRenorm) and m.running_mean is not None
        }

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        if not model.training:
            if not self.steps and not self._untrained:
                found = self.layers().items()
                self._untrained = [
                    (n, _is_new(m)) for n, m in found if not isinstance(m.running_mean, UninitializedBuffer)
                ]
            return
        if self.steps % self.every == 0:
            if "torch._dynamo" in sys.modules:  # to import it would take a second
                # Compiled code does not see hooks that came after it.
                stance = torch.compiler.set_stance("force_eager")
                self._unwatch.append(lambda: stance.__exit__(None, None, None))
            for name, layer in self.layers().items():
                hook = _Hook(self, name)
                if layer is model:  # whose hooks are being called already
                    hook(layer, args, kwargs)
                self._unwatch.append(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        self.steps += 1

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or not self._unwatch:
            return
        self._release()
        if self._now:
            names, vectors = zip(*self._now)
            device = vectors[0].device
            # A model on several devices: its numbers meet on the first.
            stacked = torch.stack([v.to(device, non_blocking=True) for v in vectors])
            self._kept.append((self.steps - 1, list(names), stacked))
            self._now = []

    def _release(self) -> None:
        for undo in reversed(self._unwatch):
            undo()
        self._unwatch = []

    @torch.no_grad()
    def _read(self, name: str, layer: BatchRenorm, x: Tensor, mask: Tensor | None) -> None:
        mu, var, step = layer.running_mean, layer.running_var, layer.num_batches_tracked
        if mu is None or var is None or step is None or not layer.training:
            return
        size = min(layer.microbatch_size or x.shape[0], x.shape[0])
        x = x.detach()
        # By the passes that the layer itself would take: on the CPU in C they are ten times faster than in plain torch.
        mean, batch_var, std = choose(None, is_plain_eager(x), mask, None, None, x, mu, var).moments(
            x, layer.eps, size, mask
        )
        r, d = (v.float().flatten() for v in unclipped(mean, std, mu, var, layer.eps))
        r_limit, d_limit = (limit.float() for limit in layer.clip(step))
        both = torch.stack([r, d])
        ordered = both.sort(1).values
        at = [round(q * (len(r) - 1)) for q in _QUANTILES]
        low, high = torch.stack([1 / r_limit, -d_limit])[:, None], torch.stack([r_limit, d_limit])[:, None]
        outside = torch.stack([both < low, both > high], 1).float().mean(2)
        # Training minus inference output is u (r' - r) + (d' - d), with primes for clipped; u has mean 0.
        excess = (both.clamp(low, high) - both).square()
        gap = (excess[0] * (batch_var / std.square()).float().flatten() + excess[1]).mean().sqrt()
        sigma = (var.float() + layer.eps).sqrt()
        drift = torch.full_like(outside[0], math.nan)
        if name in self._last:
            old_mu, old_sigma, old_step = self._last[name]
            moved = torch.stack([mu.float() - old_mu, sigma - old_sigma]) / old_sigma
            drift = moved.square().mean(1).sqrt() / (step - old_step).clamp(min=1)
        self._last[name] = mu.float().clone(), sigma, step.clone()
        limits = torch.stack([r_limit, d_limit, gap])
        vector = torch.cat([*(row[i : i + 1] for row in ordered for i in at), outside.flatten(), limits, drift])
        self._now.append((name, vector))

    def readings(self, layer: str | None = None) -> list[Reading]:
        """All readings kept, oldest first; waits for the device.

        Args:
            layer: only of this one.
        """
        return [
            Reading(step, name, *row)
            for step, names, rows in list(self._kept)
            for name, row in zip(names, rows.tolist())
            if layer is None or name == layer
        ]

    def latest(self) -> dict[str, Reading]:
        """The last reading of each layer, by name."""
        return {reading.layer: reading for reading in self.readings()}

    def scalars(self) -> dict[str, float]:
        """Of the last reading, by "renorm/layer/quantity": what a logger wants."""
        return _scalars(list(self.latest().values()))

    def warnings(self) -> list[str]:
        """What is wrong, and the remedy; empty if nothing is."""
        found = [
            f"{name} was evaluated before it was trained: its averages are 0 and 1; train it, or load its state"
            for name, new in self._untrained
            if bool(new)
        ]
        latest = self.latest()
        for name in self.layers() if self._kept else ():
            if name not in latest:
                found.append(
                    f"{name} was not reached in training mode: its averages stay; call train(), or leave it so"
                )
        all_readings = self.readings()
        clips = {name: layer.clip for name, layer in self.layers().items()}
        for name, now in latest.items():
            drifts = [(r.mu_drift, r.sigma_drift) for r in all_readings if r.layer == name and r.mu_drift == r.mu_drift]
            if drifts and not any(m or s for m, s in drifts):
                found.append(f"averages of {name} never moved: raise momentum above 0, and look for values not finite")
            elif now.mu_drift > _DRIFT_MUCH or now.sigma_drift > _DRIFT_MUCH:
                worst = max(now.mu_drift, now.sigma_drift)
                found.append(f"averages of {name} move by {worst:.2g} sigma per step: lower momentum or learning rate")
            # Limits of batch norm clip all there is, and limits on their way to the last a part: that is their purpose.
            r_open, d_open = _open(clips[name], now)
            if d_open and now.d_clipped > _CLIPPED_MUCH:
                found.append(f"d clipped in {now.d_clipped:.0%} of channels of {name}: raise d_max or momentum")
            if r_open and now.r_clipped > _CLIPPED_MUCH:
                found.append(f"r clipped in {now.r_clipped:.0%} of channels of {name}: raise r_max or momentum")
            if r_open and d_open and now.gap > _GAP_MUCH:
                found.append(
                    f"training and inference outputs of {name} are {now.gap:.2g} apart (root mean square, 1 is the "
                    "output's spread): open the limits, or raise momentum"
                )
        return found

    def summary(self, console: Any = None) -> None:
        """Print a table of each layer's last reading, and the warnings. Needs rich.

        Args:
            console: a `rich.console.Console`; None makes one.
        """
        from rich.console import Console
        from rich.table import Table

        console = Console() if console is None else console
        latest = self.latest()
        step = max((r.step for r in latest.values()), default=None)
        table = Table(title="no training forward yet" if step is None else f"training forward {step}")
        table.add_column("layer", overflow="fold")
        for column in ("r 5 / 50 / 95 %", "d 5 / 50 / 95 %", "limits", "r clipped", "d clipped", "gap", "drift"):
            table.add_column(column, justify="right")
        for name, now in latest.items():
            table.add_row(
                name,
                f"{now.r_05:.2f} / {now.r_median:.2f} / {now.r_95:.2f}",
                f"{now.d_05:.2f} / {now.d_median:.2f} / {now.d_95:.2f}",
                f"{now.r_limit:.3g}, {now.d_limit:.3g}",
                f"{now.r_clipped:.0%}",
                f"{now.d_clipped:.0%}",
                f"{now.gap:.2g}",
                "-" if math.isnan(now.mu_drift) else f"{now.mu_drift:.1e}",
            )
        console.print(table)
        for warning in self.warnings():
            console.print(f"! {warning}", markup=False, highlight=False)

    def plot(self, path: str | Path | None = None) -> Any:
        """Heat maps, layers by steps: clipped fractions, gap and drift. Needs matplotlib.

        Args:
            path: where to save it, e.g. "renorm.png".

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            RuntimeError: there is no reading yet.
        """
        from matplotlib.figure import Figure

        readings = self.readings()
        if not readings:
            raise RuntimeError("expected at least one reading, got none; run a training forward of the model first")
        names = list(dict.fromkeys(r.layer for r in readings))
        steps = sorted({r.step for r in readings})
        figure = Figure(figsize=(11, 2.2 + 0.32 * len(names)), layout="constrained")
        for axes, (quantity, title) in zip(figure.subplots(2, 2, sharex=True, sharey=True).flat, _PANELS.items()):
            grid = torch.full((len(names), len(steps)), math.nan)
            for r in readings:
                grid[names.index(r.layer), steps.index(r.step)] = getattr(r, quantity)
            top = 1.0 if quantity.endswith("clipped") else None
            # Columns are readings, so that two are as wide as any; the ticks say which steps they are.
            image = axes.imshow(
                grid.tolist(), aspect="auto", vmin=0.0, vmax=top, interpolation="nearest", cmap="viridis"
            )
            ticks = sorted({round(i * (len(steps) - 1) / 4) for i in range(5)})
            axes.set_xticks(ticks, [f"{steps[i]:,}" for i in ticks])
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.set_title(title, fontsize=10)
            figure.colorbar(image, ax=axes)
        figure.supxlabel("training forward", fontsize=10)
        figure.supylabel("layer", fontsize=10)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def log(self, sink: Any) -> None:
        """Hand over every reading that has not been handed over yet; waits for the device, so call it now and then.

        Args:
            sink: a TensorBoard `SummaryWriter`, or a function of the step and of a dictionary of scalars.
        """
        write: Sink = sink if callable(sink) else lambda step, scalars: _write(sink, step, scalars)
        by_step: dict[int, list[Reading]] = {}
        for reading in self.readings():
            if reading.step > self._logged:
                by_step.setdefault(reading.step, []).append(reading)
        for step, group in by_step.items():
            write(step, _scalars(group))
            self._logged = step

    def to_csv(self, path: str | Path) -> None:
        """Write all readings kept, a row for each layer and step.

        Args:
            path: the file; it is overwritten.
        """
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(Reading._fields)
            writer.writerows(self.readings())

    def lightning_callback(self) -> Any:
        """A Lightning callback that logs new readings to the trainer's loggers as it logs. Needs lightning."""
        from lightning.pytorch import Callback

        monitor = self

        class RenormCallback(Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                if trainer.global_step % trainer.log_every_n_steps == 0:
                    self._log(trainer)

            def on_train_end(self, trainer: Any, *args: Any) -> None:
                self._log(trainer)

            def _log(self, trainer: Any) -> None:
                def write(step: int, scalars: dict[str, float]) -> None:
                    for logger in trainer.loggers:
                        logger.log_metrics(scalars, step)

                monitor.log(write)

        return RenormCallback()

    def trainer_callback(self) -> Any:
        """A callback for Hugging Face's Trainer: the latest scalars join its logs. Needs transformers."""
        from transformers import TrainerCallback

        monitor = self

        class RenormCallback(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
                if logs is not None:
                    logs.update(monitor.scalars())

        return RenormCallback()


class _Hook:
    """A layer's, for one forward. An object, and no closure, so that a model can be copied in the middle of it."""

    def __init__(self, monitor: RenormMonitor, name: str) -> None:
        self.monitor = monitor
        self.name = name

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, BatchRenorm)
        x = args[0] if args else kwargs.get("x")
        C = layer.num_features
        if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[1] != C or torch._C._are_functorch_transforms_active():
            return  # what the layer refuses it shall say itself; an ensemble under vmap has no numbers to be kept
        mask = args[1] if len(args) > 1 else kwargs.get("mask")
        # Selective checkpointing counts operators in a dispatch mode, and a recomputation is not read: with these of
        # the forward it would take one's result for another's.
        with _disable_current_modes():
            self.monitor._read(self.name, layer, x, mask)


def _open(clip: Any, now: Reading) -> tuple[bool, bool]:
    """Whether the limits of r and of d are the schedule's last; of another function, whether they are not closed."""
    if not isinstance(clip, ClipSchedule):
        return now.r_limit > 1, now.d_limit > 0
    # A reading is in float32.
    r_open, d_open = now.r_limit >= clip.r_max * (1 - 1e-6), now.d_limit >= clip.d_max * (1 - 1e-6)
    return r_open and clip.r_max > 1, d_open and clip.d_max > 0


def _is_new(layer: BatchRenorm) -> Tensor:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean.eq(0).all() & layer.running_var.eq(1).all()


def _scalars(readings: list[Reading]) -> dict[str, float]:
    names = ("r_median", "d_median", "r_clipped", "d_clipped", "gap", "mu_drift", "sigma_drift")
    values = {f"renorm/{reading.layer}/{name}": getattr(reading, name) for reading in readings for name in names}
    return {key: value for key, value in values.items() if not math.isnan(value)}


def _write(writer: Any, step: int, scalars: dict[str, float]) -> None:
    for key, value in scalars.items():
        writer.add_scalar(key, value, step)
