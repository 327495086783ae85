"""One set of moving averages for all replicas, as the paper's workers have it, for one small collective per step.

Batch norm's averages are for inference only, so replicas whose averages differ still train the same function. Batch
Renormalization's are used in training. There are three levels:

- nothing: every replica has averages of its own. They drift apart, and with them the functions that are trained.
- `keep_in_sync`, or `sync_running_stats` where the loop is one's own: each replica normalises its own minibatch, with
  r and d from the shared averages. One all-reduce per step, off the critical path.
- `process_group=` of the layers: the statistics themselves are those of all replicas. Two collectives per layer.

Take the second, which is the paper's set-up. The third is for shards so small that r and d would be clipped all the
time; it costs two latencies per layer and step (benchmarks/replicas.py measures both). The first is for tests.
"""

from __future__ import annotations

import zlib
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_leaves

from .modules import BatchRenorm
from .replicas import WORLD, Replicas, check_group, gather, group_called, replicas_of


def sync_running_stats(
    model: nn.Module, group: object | None = None, async_op: bool = False, *, weight: float | Tensor = 1.0
) -> SyncHandle | None:
    """Give all replicas the mean of their moving averages, of mu and of *sigma*: one flat all-reduce.

    ``mu <- sum(w_i * mu_i) / sum(w_i)`` over the replicas i, and so sigma, the step and, where there is one, the moving
    gradient's state. Afterwards every replica holds the same bits. Call it after each training forward, or leave it to
    `keep_in_sync`.

    Args:
        model: any module, the same on all replicas; wrapped by DDP, FSDP or a compiler, or not.
        group: a `torch.distributed.ProcessGroup`, or its name; None for all processes.
        async_op: return at once; the averages change when the handle is waited for, before the next forward.
        weight: w of this replica, at least 0: its number of samples where shards are uneven, 0 where it had none.

    Returns:
        None, or with async_op a handle; call its `wait()`.

    Raises:
        ValueError: weight is negative or not finite.
        RuntimeError: a replica is gone or late, or its layers are others than here; the averages stay.

    Examples:
        >>> from batchrenorm import BatchRenorm1d
        >>> model = nn.Sequential(nn.Linear(2, 3), BatchRenorm1d(3))
        >>> sync_running_stats(model)                     # one process: nothing to do

    Source: section 4, 50 workers that share their averages.
    """
    if not isinstance(weight, Tensor) and not 0.0 <= weight < float("inf"):
        raise ValueError(f"expected weight >= 0, got {weight}; it is the number of samples of this replica")
    check_group(group)
    handle = SyncHandle(model, WORLD if group is None else group, weight)
    if async_op:
        return handle
    handle.wait()
    return None


class SyncHandle:
    """A synchronisation that has begun."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, group: object, weight: float | Tensor) -> None:
        layers = {name: m for name, m in model.named_modules() if isinstance(m, BatchRenorm)}
        layers = {name: m for name, m in layers.items() if m.running_mean is not None}
        self.layers = list(layers.values())
        self.work: list[tuple[Any, Tensor, list[BatchRenorm], list[Tensor]]] = []
        replicas = replicas_of(group)
        if replicas is None or not self.layers:
            return
        _agree(layers, replicas)
        known = group_called(group) if isinstance(group, str) else group
        for device in dict.fromkeys(_mean_of(m).device for m in self.layers):
            here = [m for m in self.layers if _mean_of(m).device == device]
            # float64, so that what is equal already stays as it is, to the last bit, and steps are exact.
            w = torch.as_tensor(weight, dtype=torch.float64).to(device, non_blocking=True)
            parts = [p for m in here for p in (_step_of(m).view(1), _mean_of(m), _sigma_of(m), *_gradient_of(m))]
            flat = torch.cat([w.view(1), *(w * p for p in parts)])
            work = dist.all_reduce(flat, group=known, async_op=True)
            self.work.append((work, flat, here, [b.clone() for m in here for b in _gradient_of(m)]))

    @torch.no_grad()
    def wait(self) -> None:
        """Wait for the others, and write the averages; a second time it does nothing."""
        pending, self.work = self.work, []
        for work, *_ in pending:
            work.wait()
        for _, flat, here, begun in pending:
            total = flat[0]
            shared = (flat[1:] / total).split([1 + m.num_features * (2 + len(_gradient_of(m))) for m in here])
            for m, numbers in zip(here, shared):
                step, (mean, sigma, *gradient) = numbers[0], numbers[1:].view(-1, m.num_features).unbind()
                # Where no replica had a sample, everything stays.
                for buffer, new in (
                    (m.running_mean, mean),
                    (m.running_var, F.softshrink(sigma.square(), m.eps)),
                    (m.num_batches_tracked, step.round()),
                ):
                    buffer.copy_(torch.where(total > 0, new, buffer))  # type: ignore
                for buffer, new in zip(_gradient_of(m), gradient):
                    # A backward may have moved it meanwhile, which is added to what all have together.
                    old = begun.pop(0)
                    moved = torch.where(buffer == old, new, buffer + (new - old))
                    buffer.copy_(torch.where(total > 0, moved, buffer))


_AGREED: WeakKeyDictionary[nn.Module, tuple[int, Replicas]] = WeakKeyDictionary()


def _agree(layers: dict[str, BatchRenorm], replicas: Replicas) -> None:
    """Once for these layers: raise on every replica where one has others. Messages of other sizes may end a process."""
    first = next(iter(layers.values()))
    shape = [(name, m.num_features, m.eps, m.gradient) for name, m in layers.items()]
    digest = zlib.crc32(repr(shape).encode())
    if _AGREED.get(first) == (digest, replicas):
        return
    digests = gather(torch.tensor([digest], device=_mean_of(first).device), replicas)
    if bool((digests != digest).any()):
        raise RuntimeError(
            "expected the same Batch Renormalization layers on all replicas, got others on another one (names, "
            "channels, epsilon or gradient differ); build the same model everywhere, and wrap it in the same way"
        )
    _AGREED[first] = digest, replicas


def _mean_of(layer: BatchRenorm) -> Tensor:
    return layer.running_mean  # type: ignore[return-value]


def _sigma_of(layer: BatchRenorm) -> Tensor:
    return (layer.running_var.double() + layer.eps).sqrt()  # type: ignore[union-attr]


def _step_of(layer: BatchRenorm) -> Tensor:
    return layer.num_batches_tracked  # type: ignore[return-value]


def _gradient_of(layer: BatchRenorm) -> tuple[Tensor, ...]:
    return (layer.gradient_mean, layer.gradient_slope) if layer.gradient == "moving" else ()


class keep_in_sync:
    """`sync_running_stats` after every training forward of a model, without a line in the loop.

    The all-reduce starts when the forward has ended, runs beside the backward, and is waited for by the next forward
    or `state_dict()`. Shards count by their samples: by the first dimension of the first tensor among the model's
    arguments. In DDP's `no_sync` the replicas stay apart as they were asked to, until the forward outside of it.

    DDP's own broadcast of buffers before each forward finds them equal, whichever of the two comes first; without it
    (`forward_sync_buffers=False`, in older torch `broadcast_buffers=False`) its time is saved.

    The object has `wait()`, for who reads the averages between two forwards, and `remove()`; it is also a context,
    which ends with both.

    Args:
        model: the outermost module, of which the loop calls the forward: after DDP, `fully_shard` or `torch.compile`.
        group: a `torch.distributed.ProcessGroup`, or its name; None for all processes.

    Examples:
        >>> from batchrenorm import BatchRenorm1d
        >>> model = nn.Sequential(nn.Linear(2, 3), BatchRenorm1d(3))
        >>> with keep_in_sync(model):
        ...     y = model(torch.randn(8, 2))

    Source: section 4, 50 workers that share their averages.
    """

    def __init__(self, model: nn.Module, group: object | None = None) -> None:
        check_group(group)
        self.model, self.group = model, group
        self.weight = 1.0
        self.handle: SyncHandle | None = None
        self.hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
            model.register_state_dict_pre_hook(self._read),
        ]

    def wait(self) -> None:
        """Until the averages are those of all replicas."""
        handle, self.handle = self.handle, None
        if handle is not None:
            handle.wait()

    def remove(self) -> None:
        """Wait, and leave the model alone from now on."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        self.wait()

    def __enter__(self) -> keep_in_sync:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.remove()
            return
        # Others may never come, and the error is what there is to tell.
        self.handle = None
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> keep_in_sync:
        return self  # a copy of the model, as an average of its weights is, has no synchronisation of its own

    # Not torch.compiler.disable, which this is but for importing the compiler, 3 s, at once.
    @_disable_dynamo
    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is not self.model or _is_repetition():
            return
        self.wait()
        first = next((v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor) and v.ndim), None)
        self.weight = 1.0 if first is None else float(len(first))

    @_disable_dynamo
    def _after(self, model: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if model is not self.model or _is_repetition() or not model.training:
            return
        if getattr(model, "require_backward_grad_sync", True):  # False in DDP's no_sync
            self.handle = sync_running_stats(model, self.group, async_op=True, weight=self.weight)

    def _read(self, model: nn.Module, *_: Any) -> None:
        self.wait()


def _is_repetition() -> bool:
    """Inside a backward: activation checkpointing runs the forward again, which moves no averages."""
    return torch._C._current_graph_task_id() != -1
