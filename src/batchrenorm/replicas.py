"""Replicas of a layer in several processes: their moments merged into those of the whole minibatch, on (C,)-vectors.

The heavy passes stay at home. Forward, one all-gather of 2C + 1 numbers per layer, (count, mean, M2) of each replica,
which every replica merges in the same way, so that all of them hold the same bits. Backward, one all-reduce of the 2C
numbers d loss / d mean and d loss / d var, and from there on each replica's x has its gradient through its own moments.

A collective must be entered by every replica or by none. Here that is a matter of the model, never of the data: the
forward's is entered whenever the layer is in training, also with no sample at all; the backward's whenever x requires a
gradient. Where a recomputation repeats a forward it repeats its collective, on all replicas alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

WORLD = "world"
"""The name of a group of all the processes that there are: one, where torch.distributed was never initialised."""


class Replicas(NamedTuple):
    group: str  # its name, which a compiler takes for a constant and a pickle can hold
    size: int


def check_group(group: object | None) -> None:
    """Raise TypeError where `replicas_of` could not know what is meant."""
    if group is None or isinstance(group, str):
        return
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"expected process_group to be None, 'world' or a torch.distributed.ProcessGroup, got "
            f"{type(group).__name__}; a group that this process is no member of is none, and of a DeviceMesh it is "
            "mesh.get_group()"
        )


def replicas_of(group: object | None) -> Replicas | None:
    """The replicas to share statistics with; None where there are no others."""
    if group is None or (group == WORLD and not (dist.is_available() and dist.is_initialized())):
        return None
    known = group_called(group) if isinstance(group, str) else group
    size = known.size()  # type: ignore[attr-defined]
    return Replicas(known.group_name, size) if size > 1 else None  # type: ignore[attr-defined]


def group_called(name: str) -> dist.ProcessGroup:
    """The group of a name; raises RuntimeError where there is none."""
    if name == WORLD and dist.is_initialized():
        return dist.group.WORLD  # type: ignore[return-value]
    try:
        return dist.distributed_c10d._resolve_process_group(name)  # type: ignore
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"expected a process group of the name {name!r} in this process, found none; call "
            "torch.distributed.init_process_group (and new_group, in the same order) before the model's forward"
        ) from error


def name_of(group: object | None) -> str | None:
    """What `group` can be pickled and copied as; `replicas_of` takes it for the group."""
    if group is None or isinstance(group, str):
        return group
    return WORLD if group is dist.group.WORLD else group.group_name  # type: ignore[attr-defined]


def gather(vector: Tensor, replicas: Replicas) -> Tensor:
    """``(W, n)``: the vector of every replica."""
    c10d = torch.ops._c10d_functional
    rows = c10d.all_gather_into_tensor(vector.contiguous(), replicas.size, replicas.group)
    return c10d.wait_tensor(rows).view(replicas.size, -1)


def add_up(vector: Tensor, replicas: Replicas) -> Tensor:
    """The sum over the replicas; differentiable."""
    return _Sum.apply(vector, replicas)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vector: Tensor, replicas: Replicas) -> Tensor:
        ctx.replicas = replicas
        c10d = torch.ops._c10d_functional
        return c10d.wait_tensor(c10d.all_reduce(vector.contiguous(), "sum", replicas.group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return add_up(grad, ctx.replicas), None


def merge(
    mean: Tensor, var: Tensor, count: Tensor | float, differentiated: bool, replicas: Replicas
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Moments of all the replicas' values (Chan, Golub & LeVeque 1983), differentiable in mean and var.

    Args:
        mean, var: ``(C,)``, biased, of this replica's values; 0 where it has none.
        count: of its values per channel.
        differentiated: whether this replica will enter the backward's collective.
        replicas: `replicas_of` a group.

    Returns:
        ``(mean, var, count, agreed)`` of all; the count 0-d and float64, and 0-d bool whether all or none are
        differentiated.
    """
    # Filled on the device: copied there it would make the host wait.
    if isinstance(count, Tensor):
        count = count.double()
    else:
        count = torch.full((), count, dtype=torch.float64, device=mean.device)
    return _Merge.apply(mean, var, count, differentiated, replicas)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, var: Tensor, count: Tensor, differentiated: bool, replicas: Replicas
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        C = len(mean)
        # The sign, of 0 as well, has room for a bit.
        signed = count if differentiated else -count
        message = torch.cat([signed.to(mean.dtype).view(1), mean, var * count])
        # float64 costs nothing on vectors, and the order of the sums is the same everywhere.
        counts, means, squares = gather(message, replicas).double().split([1, C, C], 1)
        agreed = counts.signbit().sum() % replicas.size == 0
        counts = counts.abs()
        total = counts.sum()
        share = counts / total.clamp(min=1)
        merged = (share * means).sum(0)
        merged_var = ((squares + counts * (means - merged).square()).sum(0) / total.clamp(min=1)).to(mean.dtype)
        merged = merged.to(mean.dtype)
        ctx.replicas = replicas
        ctx.save_for_backward(mean, merged, (count / total.clamp(min=1)).to(mean.dtype))
        ctx.mark_non_differentiable(total, agreed)
        return merged, merged_var, total, agreed

    @staticmethod
    def backward(ctx: Any, mean_grad: Tensor, var_grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        mean, merged, share = ctx.saved_tensors
        mean_grad, var_grad = add_up(torch.cat([mean_grad, var_grad]), ctx.replicas).chunk(2)
        return share * (mean_grad + 2 * var_grad * (mean - merged)), share * var_grad, None, None, None


def mean_of_groups(
    mean: Tensor, std: Tensor, share: Tensor | None, samples: int, replicas: Replicas
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over all microbatches of all replicas of their means and standard deviations: the rule of one replica.

    Args:
        mean, std: ``(G, C)`` of this replica's microbatches, or ``(C,)`` of its only one.
        share: ``(G,)`` weights of theirs, NaN where none counts; None is equal ones.
        samples: of this replica; without any, no microbatch of it counts.
        replicas: `replicas_of` a group.

    Returns:
        ``(mean, std, share)`` as `correct` takes them, ``(G + 1, C)``, ``(G + 1, C)``, ``(G + 1,)``: the microbatches,
        which do not count, and the mean over all, which does.
    """
    C = mean.shape[-1]
    mean, std = mean.view(-1, C), std.view(-1, C)
    counted = mean.new_ones(len(mean)) if share is None else (share > 0).to(mean.dtype)
    if samples == 0:
        counted = torch.zeros_like(counted)
    sums = (torch.where(counted[:, None] > 0, v, 0).sum(0) for v in (mean, std))
    total, means, stds = gather(torch.cat([counted.sum().view(1), *sums]), replicas).double().sum(0).split([1, C, C])
    merged = (torch.cat([v, (w / total).to(v.dtype)[None]]) for v, w in ((mean, means), (std, stds)))
    return *merged, torch.cat([torch.zeros_like(counted), counted.new_ones(1)])  # type: ignore[return-value]
