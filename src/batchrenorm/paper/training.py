"""Training one arm with one seed, alone or as one of several processes.

The path of a minibatch: `plan` names its items, the split decodes and augments this process's share of them, `_step`
sends them through the net, in parts if they are accumulated, and then, in this order: gradients are averaged over the
processes (by DDP), moving averages over parts and processes, the optimiser steps, the averaged net takes the step in.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import random
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import sync_running_stats
from ..modules import set_step
from ..schedule import ClipSchedule
from . import checkpoints, evaluation, models, normalizers
from .averaging import AveragedNet
from .data import Data, Split
from .experiment import Arm, Preset
from .mabn import Mabn
from .sampling import plan

# A loss is looked at so often: on a GPU looking waits for it.
_LOOK_EVERY = 50

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Diverged(RuntimeError):
    """The loss of an arm that should train is not a finite number."""


class Lost(RuntimeError):
    """Another process of the training is gone."""


def build(preset: Preset, arm: Arm, data: Data, seed: int) -> nn.Module:
    """The net of an arm, with the same weights for every arm."""
    net = models.build(preset.model, data.shape, data.classes, seed)
    clip = ClipSchedule(**preset.config(arm)["clip"])
    normalizers.normalize(
        net,
        arm.normalizer,
        alpha=preset.alpha,
        clip=clip,
        group=arm.group,
        learn_gamma=preset.learn_gamma,
        minibatch=preset.batch_size,
    )
    return net.to(memory_format=torch.channels_last) if preset.channels_last else net  # type: ignore[call-overload]


def train(
    preset: Preset,
    arm: Arm,
    seed: int,
    data: Data,
    device: torch.device,
    progress: Callable[[int, float | None], None],
    checkpoint: Path | None = None,
    watch: Callable[[str, float, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Train, looking at training and validation images on the way, and at the test images once, at the end.

    Args:
        preset: the experiment.
        arm: one of its arms.
        seed: of weights, minibatches and augmentation.
        data: of the preset.
        device: to train on.
        progress: called with the finished steps and the latest validation accuracy; what it raises ends the training,
            after a checkpoint.
        checkpoint: file to go on from, if it is there, and to write every `preset.checkpoint_every` steps.
        watch: called with a name, a number and the step, for TensorBoard.

    Returns:
        One entry per evaluation: step, split, statistics, parameters, accuracy in percent, loss, r and d.

    Raises:
        Diverged: the loss is not finite.
        Lost: another process is gone.
        ValueError: the checkpoint was made with other settings.
    """
    try:
        return _Training(preset, arm, seed, data, device, checkpoint).run(progress, watch)
    except RuntimeError as error:
        # Under gloo and NCCL a dead process shows as an error of the collective in which the others wait.
        if dist.is_initialized() and not isinstance(error, Diverged) and _is_of_a_collective(error):
            reason = str(error).strip().partition("\n")[0]
            raise Lost(
                f"expected {dist.get_world_size()} processes, but one is gone in the training of "
                f"{arm.name}, seed {seed} ({reason}); start the same command again, it goes on from the last checkpoint"
            ) from error
        raise


def _is_of_a_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    )


class _Training:
    """The state of a training between two steps."""

    def __init__(
        self, preset: Preset, arm: Arm, seed: int, data: Data, device: torch.device, checkpoint: Path | None
    ) -> None:
        self.preset, self.arm, self.seed, self.data, self.device = preset, arm, seed, data, device
        self.checkpoint = checkpoint
        self.steps = arm.steps or preset.steps
        self.replicas = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        size = preset.parts(self.replicas) * preset.accumulate
        self.share = slice(self.rank * size, (self.rank + 1) * size)

        self.model = build(preset, arm, data, seed).to(device)
        self.net: nn.Module = self.model
        if self.replicas > 1:
            options: dict[str, Any] = {"device_ids": [device.index] if device.type == "cuda" else None}
            # The averages are shared below, of sigma and after the step; DDP would copy the first process's.
            known = inspect.signature(DistributedDataParallel.__init__).parameters
            options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
            self.net = DistributedDataParallel(self.model, **options)
        if preset.compile is not None:
            self.net = torch.compile(self.net, mode=preset.compile)  # type: ignore[assignment]
        self.optimizer = _optimizer(preset, arm, self.model)
        self.schedule = _schedule(preset, self.optimizer, self.steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=preset.precision == "float16")
        self.averaged = None if preset.averaging is None else AveragedNet(self.model, preset.averaging)
        self.step = 0
        self.records: list[dict[str, Any]] = []
        self.seconds = {"train": 0.0, "data": 0.0}
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self._resume()

    def run(
        self, progress: Callable[[int, float | None], None], watch: Callable[[str, float, int], None] | None
    ) -> list[dict[str, Any]]:
        preset, arm = self.preset, self.arm
        looked_at = {max(1, round(self.steps * k / preset.evaluations)) for k in range(1, preset.evaluations + 1)}
        minibatches = self.data.train.minibatches(
            plan(preset.batch_size, arm.labels, self.data.train.y, self.steps, self.seed),
            augment=self.seed if preset.augment else None,
            start=self.step,
            share=self.share,
        )
        while self.step < self.steps:
            began = time.perf_counter()
            x, y = next(minibatches)
            got = time.perf_counter()
            watched = self._corrections(x) if self.step + 1 in looked_at else None
            looked = time.perf_counter()
            loss = self._step(x, y)
            self.step += 1
            self.seconds["data"] += got - began
            if self.step in looked_at or self.step % _LOOK_EVERY == 0:
                self._check_loss()  # on a GPU this is also where the step ends
            self.seconds["train"] += time.perf_counter() - looked
            if watch is not None:
                watch("loss", loss.item(), self.step)
                watch("learning rate", float(self.schedule.get_last_lr()[0]), self.step)
            if watched is not None:
                before = len(self.records)
                self._evaluate(watched)
                if watch is not None:
                    for found in self.records[before:]:
                        what = f"{found['split']}/{found['statistics']}/{found['parameters']}"
                        watch(f"accuracy/{what}", found["accuracy"], self.step)
            if self.step % preset.checkpoint_every == 0 and self.step < self.steps:
                self.save()
            try:
                progress(self.step, self.accuracy)
            except BaseException:
                self.save()
                raise
        return self.records

    @property
    def accuracy(self) -> float | None:
        """The latest on validation images."""
        found = (r for r in reversed(self.records) if (r["split"], r["statistics"]) == ("val", "averages"))
        return next((r["accuracy"] for r in found if r["parameters"] == self.preset.parameters), None)

    def _seed_dropout(self) -> None:
        # Its randomness is a function of seed, step and process: nothing of it has to be kept in a checkpoint.
        # (torch.manual_seed would note a traceback for accelerators that are not there, every time.)
        seed = random.Random(f"{self.seed} {self.step} {self.rank}").getrandbits(63)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        self._seed_dropout()
        k = self.preset.accumulate
        parts = list(zip(x.chunk(k), y.chunk(k)))
        # Every part, on every process, uses the averages of before the step; afterwards they move once, by the mean
        # over all of them, as those of microbatches do.
        before = normalizers.get_averages(self.model) if k > 1 else []
        after: list[list[Tensor]] = []
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.device)
        for i, (x_i, y_i) in enumerate(parts):
            if i > 0:
                normalizers.set_averages(self.model, before)
                set_step(self.model, self.step)
            quiet = self.replicas > 1 and i < k - 1
            with self.net.no_sync() if quiet else contextlib.nullcontext():  # type: ignore[operator]
                with self._autocast():
                    loss_i = models.loss(self.net(self._laid_out(x_i)), y_i, self.preset.label_smoothing) / k
                self.scaler.scale(loss_i).backward()
            loss += loss_i.detach()
            if k > 1:
                after.append(normalizers.get_averages(self.model))
        if k > 1:
            normalizers.set_averages(self.model, [torch.stack(part).mean(0) for part in zip(*after)])
        if self.replicas > 1:
            _share_averages(self.model)
            # Of the whole minibatch: a NaN in one process's share ends the training of all of them at the same step.
            dist.all_reduce(loss)
            loss /= self.replicas
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with warnings.catch_warnings():
            # The first step of float16 is often left out, its scale being too large; torch takes it for forgotten.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.schedule.step()
        if self.averaged is not None:
            self.averaged.update(self.model, self.step + 1)
        self.finite &= loss.isfinite()
        return loss

    def _laid_out(self, x: Tensor) -> Tensor:
        images = x.ndim == 4
        return x.contiguous(memory_format=torch.channels_last) if self.preset.channels_last and images else x

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.preset.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, _DTYPES[self.preset.precision])

    def _check_loss(self) -> None:
        if not self.arm.may_diverge and not self.finite.item():
            kept = "" if self.checkpoint is None or not self.checkpoint.exists() else "; the last checkpoint is kept"
            raise Diverged(
                f"expected a finite loss of {self.arm.name}, seed {self.seed}, got NaN or infinity within the last "
                f"{_LOOK_EVERY} steps before step {self.step}{kept}; lower the learning rate"
            )

    def _corrections(self, x: Tensor) -> dict[str, evaluation.Corrections]:
        if not self.arm.normalizer.startswith("brn"):
            return {}
        self._seed_dropout()
        with self._autocast():
            return evaluation.corrections(self.model, self._laid_out(x.chunk(self.preset.accumulate)[0]))

    def _evaluate(self, watched: dict[str, evaluation.Corrections]) -> None:
        preset, train, val = self.preset, self.data.train, self.data.validation
        splits: dict[str, tuple[Split, Sequence[int]]] = {
            "train": (train, _every_nth(len(train.y), preset.evaluation_items)),
            "val": (val, _every_nth(len(val.y), preset.evaluation_items)),
        }
        if self.step == self.steps:
            splits["test"] = (self.data.test, range(len(self.data.test.y)))
        layers = [{"name": name, **_rounded(seen)} for name, seen in watched.items()]
        means = _mean(list(watched.values()))
        for parameters in dict.fromkeys(("last", preset.parameters)):
            context = contextlib.nullcontext()
            if parameters == "averaged":
                assert self.averaged is not None
                context = self.averaged.applied(self.model)  # type: ignore[assignment]
            everything = parameters == preset.parameters
            with context, self._autocast():
                for name, (split, rows) in splits.items():
                    if name == "train" and not everything:
                        continue
                    for kind, score in self._scores(name, split, rows, everything).items():
                        entry = {"step": self.step, "split": name, "statistics": kind, "parameters": parameters}
                        entry |= score._asdict() | means
                        if layers and (name, kind, parameters) == ("val", "averages", "last"):
                            entry["layers"] = layers
                        entry |= {f"{what}_seconds": round(value, 3) for what, value in self.seconds.items()}
                        self.records.append(entry)

    def _scores(self, name: str, split: Split, rows: Sequence[int], everything: bool) -> dict[str, evaluation.Score]:
        preset, arm = self.preset, self.arm
        scores = {"averages": evaluation.with_averages(self.model, split, rows)}
        if not everything or arm.normalizer in ("group", "layer"):
            return scores
        if name == "train":
            n = max(1, len(rows) // preset.batch_size)
            drawn = list(plan(preset.batch_size, arm.labels, split.y, n, seed=0))
            scores["training"] = evaluation.in_training(self.model, split, drawn)
        elif arm.labels is not None:
            # As in the paper's "non-i.i.d. in test": the same minibatches for every seed.
            labels = preset.test_labels or arm.labels
            if split.y.unique(return_counts=True)[1].min() < labels.images:
                return scores  # Omniglot has two validation images of a character: no such groups
            size = preset.batch_size if preset.test_labels is None else labels.size
            drawn = list(plan(size, labels, split.y, max(1, len(rows) // size), seed=0))
            group = arm.group or preset.batch_size if preset.test_labels is None else labels.size
            scores["batch"] = evaluation.with_batch_statistics(self.model, split, drawn, group)
        return scores

    @property
    def _settings(self) -> str:
        # As text: torch.__version__ is an object of torch's own, which torch.load takes for code.
        return json.dumps([self.preset.config(self.arm), self.seed], sort_keys=True)

    def save(self) -> None:
        """Write the checkpoint, if there is to be one and a training could go on from it."""
        if self.checkpoint is None or self.rank > 0 or not (self.arm.may_diverge or self._is_finite()):
            return
        state = {
            "settings": self._settings,
            "step": self.step,
            "records": self.records,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.values,
        }
        checkpoints.save(self.checkpoint, state)

    def _is_finite(self) -> bool:
        # The last loss is that of the parameters before the last update: it knows nothing of these.
        state = self.model.state_dict().values()
        return bool(self.finite.item()) and all(bool(v.isfinite().all()) for v in state if v.is_floating_point())

    def _resume(self) -> None:
        if self.checkpoint is None:
            return
        found: list[Any] = [None]
        if self.rank == 0 and self.checkpoint.exists():
            found = [checkpoints.load(self.checkpoint, torch.device("cpu"))]
        if self.replicas > 1:
            dist.broadcast_object_list(found)  # the file may be on the first machine only
        (state,) = found
        if state is None:
            return
        if state.get("settings") != self._settings:
            raise ValueError(
                f"expected a checkpoint of the present settings in {self.checkpoint}, got one of other settings or "
                "versions; start over with --fresh, or choose another directory with --runs"
            )
        self.step, self.records, self.seconds = state["step"], state["records"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if self.averaged is not None:
            self.averaged.values = [value.to(self.device) for value in state["averaged"]]


def _optimizer(preset: Preset, arm: Arm, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings: dict[str, Any] = {
        "lr": arm.learning_rate or preset.learning_rate,
        "momentum": 0.9,
        "weight_decay": preset.weight_decay,
    }
    if preset.optimizer == "sgd":
        return torch.optim.SGD(parameters, **settings)
    return torch.optim.RMSprop(parameters, alpha=0.9, eps=preset.rmsprop_eps, **settings)


def _schedule(preset: Preset, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    lr = torch.optim.lr_scheduler
    schedule: torch.optim.lr_scheduler.LRScheduler
    if preset.decay == "cosine":
        schedule = lr.CosineAnnealingLR(optimizer, max(1, steps - preset.warmup))
    else:
        schedule = lr.StepLR(optimizer, max(1, (steps - preset.warmup) // 50), 0.94)
    if preset.warmup:
        rise = lr.LinearLR(optimizer, 1 / (preset.warmup + 1), 1.0, preset.warmup)
        schedule = lr.SequentialLR(optimizer, [rise, schedule], [preset.warmup])
    return schedule


@torch.no_grad()
def _share_averages(model: nn.Module) -> None:
    """The mean of mu and of sigma over all processes: the paper's workers have one set of averages."""
    sync_running_stats(model)
    # Layers of the experiments' own.
    buffers = [b for m in model.modules() if isinstance(m, normalizers.MovingAverageNorm) for b in m.buffers()]
    # The windows of "mabn" stay each process's own.
    buffers += [m.running_var for m in model.modules() if isinstance(m, Mabn)]
    averages = [b for b in buffers if b.is_floating_point()]
    if averages:
        flat = torch.cat(averages).double()
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for average, shared in zip(averages, flat.split([len(average) for average in averages])):
            average.copy_(shared)


def _every_nth(n: int, items: int) -> range:
    return range(0, n, math.ceil(n / items))


def _mean(seen: Sequence[evaluation.Corrections]) -> dict[str, float | None]:
    names = evaluation.Corrections._fields
    if not seen:
        return dict.fromkeys(names)
    return {name: finite(sum(values) / len(values)) for name, values in zip(names, zip(*seen))}


def _rounded(seen: evaluation.Corrections) -> dict[str, float | None]:
    return {name: None if (v := finite(value)) is None else round(v, 5) for name, value in seen._asdict().items()}


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None
