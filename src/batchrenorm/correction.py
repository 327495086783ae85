"""The paper on (C,)-vectors: r, d and the moving averages, and what a recomputed forward gets instead.

A training forward reads the averages and then moves them, so running the same forward a second time in the backward
would find other averages, other r and d, and so silently other gradients. It happens in activation checkpointing, and
in torch.compile, which may recompute anything that looks cheap, from buffers that it has updated meanwhile. So every
forward leaves behind the averages that it has used (`_History`), and a recomputation, recognised by running inside the
autograd engine, takes them from there and moves nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy

from .backends import aten, native, triton
from .library import CORRECT, LIBRARY, STEP
from .moving import Moving
from .schedule import MomentumSchedule

PENDING_FORWARDS = 64
"""How many forwards of one layer may wait for backwards that recompute (a pipeline keeps several in flight)."""


Move = Callable[[], None]


def correct(
    mu_B: Tensor,
    sigma_B: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    step: Tensor | None,
    share: Tensor | None = None,
    *,
    alpha: float | Tensor,
    eps: float,
    r_max: float | Tensor,
    d_max: float | Tensor,
    own: float | Tensor = 1.0,
    layer: Tensor,
    plain: bool,
) -> tuple[Tensor, Tensor, float | Tensor, Tensor, Move]:
    """r and d from the averages before the step, and the move of the averages, for when nothing can fail any more.

    Args:
        mu_B: ``(C,)`` means of the minibatch or ``(G, C)`` of its microbatches, float32 or float64.
        sigma_B: like mu_B, standard deviations with epsilon inside.
        running_mean: ``(C,)``, any floating dtype.
        running_var: ``(C,)``, sigma² - eps.
        step: 0-d integer counter of training forwards, or None.
        share: ``(G,)`` weights of the microbatches in the update, summing to 1; None is equal weights.
        alpha, r_max, d_max: floats or 0-d tensors.
        eps: epsilon.
        own: of the moving gradient, which depends on the step, as the limits do.
        layer: any tensor whose storage lives as long as the layer and is never written: the name of its history.
        plain: `is_plain_eager`.

    Returns:
        ``(r, d, own, sigma, move)``, r and d like mu_B, sigma what they were computed from. In a recomputation all are
        those of the forward that it repeats.
    """
    # Under a compiler, a transform or a dispatch mode the operator stands in for its body; in plain eager it would only
    # add its dispatch, about as much as all the arithmetic here.
    if plain:
        use = _used_averages(mu_B, sigma_B, running_mean, running_var, share, eps, Limits(r_max, d_max, own), layer)
        r, d = _r_d(mu_B, sigma_B, use)
        own = use.limits.own
        if use.repeated:
            return r, d, own, use.sigma, _stay
        # All small operators in one go, before the second heavy pass takes the caches again.
        new_mean, new_var = _moved(running_mean, running_var, use, alpha, eps)
        new_step, sigma = None, use.sigma
    else:
        limits = torch.stack([_as_scalar(v, mu_B) for v in (alpha, r_max, d_max, own)])
        r, d, own, sigma, new_mean, new_var, new_step = torch.ops.batchrenorm.correct(
            mu_B, sigma_B, running_mean, running_var, step, share, limits, eps, layer
        )

    def move() -> None:
        running_mean.copy_(new_mean)
        running_var.copy_(new_var)
        if step is not None:
            step.add_(aten.as_tensor(1)) if new_step is None else step.copy_(new_step)

    return r, d, own, sigma, move


def in_one_call(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    step: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    alpha: float,
    eps: float,
    r_max: float,
    d_max: float,
    size: int,
    layer: Tensor,
    residual: Tensor | None,
    activation: str | None,
    moving: Moving | None = None,
) -> Tensor:
    """The whole training step with `backends.native`: moments, `correction.c` for `correct`, affine, move.

    The same numbers, but for small x the calls that it saves would take most of the time.
    """
    vectors = native.vectors(x, size, more=5)
    rows, C = vectors.shape
    groups = rows // 5 - 1
    address, itemsize = vectors.data_ptr(), vectors.itemsize
    packed = STEP.pack(
        address,
        running_mean.data_ptr(),
        running_var.data_ptr(),
        0 if step is None else step.data_ptr(),
        address + 5 * groups * C * itemsize,
        groups,
        C,
        itemsize,
        alpha,
        eps,
        r_max,
        d_max,
    )
    may_be_repeated = _may_be_repeated()
    node = _node_of_this_forward() if may_be_repeated else 0
    y = native.forward(x, weight, bias, residual, activation, vectors, eps, size, moving, (CORRECT, packed))
    if may_be_repeated:
        # To be found by, so as a recomputation will compute it, to the last bit.
        mean = vectors[0] if groups == 1 else vectors[:groups].mean(0)
        sigma = vectors[5 * groups + 2]
        history = _history(layer)
        limits = Limits(r_max, d_max, 1.0 if moving is None else moving.own)
        history.record(history.forwards, mean, running_mean.clone(), sigma, limits, node)
    LIBRARY.brn_move(packed)  # type: ignore[union-attr]
    # What writes through a pointer has to tell autograd.
    written = (running_mean, running_var) if step is None else (running_mean, running_var, step)
    torch.autograd.graph.increment_version(written)
    return y


def suits_one_call(
    running_mean: Tensor | None, running_var: Tensor | None, step: Tensor | None, mask: Tensor | None, x: Tensor
) -> bool:
    """Whether `in_one_call` is for these, of which native has no `refusal`, and this forward is no repetition."""
    if running_mean is None or running_var is None or mask is not None or torch._C._current_graph_task_id() != -1:
        return False
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        running_mean.dtype == running_var.dtype == dtype
        and running_mean.is_contiguous()
        and running_var.is_contiguous()
        and not running_mean.requires_grad
        and not running_var.requires_grad
        and (step is None or step.dtype == torch.int64)
    )


def in_two_launches(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    size: int,
    residual: Tensor | None,
    activation: str | None,
    averages: triton.Averages,
    moving: Moving | None = None,
) -> Tensor:
    """The whole training step with `backends.triton`, `correction_triton.py` for `correct`; it leaves no history."""
    if moving is not None:
        moving = moving._replace(sigma=(averages.running_var + eps).sqrt())  # before it moves
    y = triton.in_two_launches(x, weight, bias, eps, size, residual, activation, averages, moving)
    written = tuple(t for t in averages[:3] if t is not None)
    torch.autograd.graph.increment_version(written)
    return y


def suits_two_launches(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    step: Tensor | None,
    mask: Tensor | None,
    x: Tensor,
    *numbers: float | Tensor | MomentumSchedule,
) -> bool:
    """Whether `in_two_launches` is for these, and nothing can ask for this forward again."""
    return (
        suits_one_call(running_mean, running_var, step, mask, x)
        and not any(isinstance(v, Tensor) for v in numbers)
        and not _may_be_repeated()
    )


def _stay() -> None:
    """A recomputation moves nothing."""


class Limits(NamedTuple):
    """What depends on the step."""

    r_max: float | Tensor
    d_max: float | Tensor
    own: float | Tensor = 1.0  # `Moving.own`


class _Use(NamedTuple):
    mean: Tensor  # (C,) of the minibatch, over all its microbatches
    std: Tensor  # (C,)
    mu: Tensor  # (C,) the averages that r and d are to be computed from
    sigma: Tensor  # (C,)
    limits: Limits
    repeated: bool


def _used_averages(
    mu_B: Tensor,
    sigma_B: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    share: Tensor | None,
    eps: float,
    limits: Limits,
    layer: Tensor,
) -> _Use:
    # With several microbatches one update by the mean of their means and of their sigmas: sigma stays E[sigma_B].
    mean, std = mu_B, sigma_B
    if share is not None:
        share = share.to(mu_B.dtype)
        # Not a matrix product, which autocast would round.
        mean, std = ((share[:, None] * v.view(len(share), -1)).sum(0) for v in (mean, std))
    elif mu_B.ndim == 2:
        mean, std = mu_B.mean(0), sigma_B.mean(0)
    if torch._C._current_graph_task_id() != -1:
        return _Use(mean, std, *_history(layer).recall(mean, std), True)
    mu, var = running_mean, running_var
    if mu.dtype != mean.dtype:
        mu, var = mu.to(mean.dtype), var.to(mean.dtype)
    sigma = (var + aten.as_tensor(eps)).sqrt_()
    if _may_be_repeated():
        mu = mu.clone() if mu is running_mean else mu  # the caller will write it
        history = _history(layer)
        # Compiled code may give the memory of what an operator has read to something else.
        seen = mean.clone() if mean is mu_B else mean
        history.record(history.forwards, seen, mu, sigma, limits, _node_of_this_forward())
    return _Use(mean, std, mu, sigma, limits, False)


def _may_be_repeated() -> bool:
    # Saved-tensor hooks (the non-reentrant checkpoint) or no gradients (the reentrant one, compiled code): without
    # either, nothing can ask for this forward again.
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _r_d(mu_B: Tensor, sigma_B: Tensor, use: _Use) -> tuple[Tensor, Tensor]:
    r_max, d_max, _ = use.limits
    r = (sigma_B / use.sigma).clamp_(1 / r_max, r_max)  # type: ignore[arg-type]
    d = (mu_B - use.mu).div_(use.sigma).clamp_(-d_max, d_max)  # type: ignore[arg-type]
    return r, d


def unclipped(
    mu_B: Tensor, sigma_B: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """r and d before clipping, as `correct` would compute them now; for who watches. Nothing is recorded or moved."""
    mu, sigma = running_mean.to(mu_B.dtype), (running_var.to(mu_B.dtype) + eps).sqrt()
    return _r_d(mu_B, sigma_B, _Use(mu_B, sigma_B, mu, sigma, Limits(math.inf, math.inf), False))


def _moved(
    running_mean: Tensor, running_var: Tensor, use: _Use, alpha: float | Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The running tensors after the step."""
    mean, std, mu, sigma = use[:4]
    if isinstance(alpha, Tensor):
        alpha = alpha.to(mu.dtype)
    new_mean = torch.lerp(mu, mean, alpha)
    # v - eps, but never below 0, where rounding could take it if the channel is constant.
    new_var = F.softshrink(torch.lerp(sigma, std, alpha).square_(), eps)
    # A channel that overflowed must not poison the averages: a gradient scaler will skip this step. On the CPU one
    # number tells whether there is any such channel; elsewhere looking at it would wait for the device.
    if mean.is_cpu and running_mean.dtype == mean.dtype and math.isfinite(mean.dot(std).item()):
        return new_mean, new_var
    # After rounding to the averages' dtype: sigma² of 300² is too much for float16.
    new_mean, new_var = new_mean.to(running_mean.dtype), new_var.to(running_var.dtype)
    finite = new_mean.isfinite() & new_var.isfinite()
    return torch.where(finite, new_mean, running_mean), torch.where(finite, new_var, running_var)


def _node_of_this_forward() -> int:
    """The number of the autograd node that comes next, or of the last one if this forward has none."""
    return torch.autograd._get_sequence_nr() - (0 if torch.is_grad_enabled() else 1)  # type: ignore[attr-defined]


def _history(layer: Tensor) -> _History:
    # By storage, which all aliases of a tensor share and which dies with the last of them.
    name = layer.untyped_storage()
    history = _HISTORIES.get(name)
    if history is None:
        history = _HISTORIES[name] = _History()
    return history


def name_of_history() -> Tensor:
    """What a layer keeps to be known by: an attribute and not a buffer, since it is no state.

    On the CPU also where `torch.device` is a context: it would stay on "meta" when the layer is given its memory.
    """
    return torch.empty(1, device="cpu")


class _Entry(NamedTuple):
    mean: Tensor  # (C,) what this forward saw: by this a recomputation finds it
    mu: Tensor  # (C,) what it used
    sigma: Tensor  # (C,)
    limits: Limits
    node: int  # the number of its autograd node, or of the last node before it if it ran without gradients
    grad: bool


class _History:
    """The averages and limits that one layer's last forwards have used, each found again by its minibatch's mean."""

    def __init__(self) -> None:
        self.forwards: deque[_Entry] = deque(maxlen=PENDING_FORWARDS)
        # Recomputations, which a nested checkpoint recomputes again: apart, so that they push no waiting forward out.
        self.repeats: deque[_Entry] = deque(maxlen=PENDING_FORWARDS)

    def record(
        self,
        where: deque[_Entry],
        mean: Tensor,
        mu: Tensor,
        sigma: Tensor,
        limits: Limits,
        node: int,
    ) -> None:
        where.append(_Entry(mean, mu, sigma, limits, node, torch.is_grad_enabled()))

    def recall(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Limits]:
        """The (mu, sigma, limits) of the forward whose minibatch had this mean.

        The nearest mean, not the equal one: under a compiler the forward without gradients and the recomputation with
        them are two programs that round differently.
        """
        entries = [
            entry
            for entry in (*self.forwards, *self.repeats)
            if entry.mean.shape == mean.shape and entry.mean.device == mean.device
        ]
        if not entries:
            raise RuntimeError(_NO_MATCH)
        # nan_to_num: a channel that overflowed is as unknown in the recomputation as it was in the forward.
        gaps = ((torch.stack([e.mean for e in entries]) - mean) / std).abs().nan_to_num(0.0, posinf=0.0).amax(1)
        gap = gaps.min()
        # Selected without looking at values: on a GPU that would wait for the device.
        ranks = torch.tensor(_ranks(entries)).to(mean.device, non_blocking=True)
        index = torch.where(gaps == gap, ranks, -2).argmax()
        mu = torch.stack([e.mu for e in entries])[index]
        sigma = torch.stack([e.sigma for e in entries])[index]
        columns = zip(*(e.limits for e in entries))
        limits = Limits(*(torch.stack([_as_scalar(v, mean) for v in column])[index] for column in columns))
        if mean.device.type != "cpu":
            mu = torch.where(gap > _TOLERANCE, math.nan, mu)  # NaN gradients say what an error cannot say in time
        elif gap > _TOLERANCE:
            raise RuntimeError(_NO_MATCH)
        self.record(self.repeats, mean, mu, sigma, limits, _node_of_this_forward())
        return mu, sigma, limits


def _ranks(entries: list[_Entry]) -> list[int]:
    """Which of several forwards of bitwise the same minibatch is being repeated: the one that ranks highest.

    The backward of an ordinary node repeats the last forward before that node. A node that is itself a checkpoint (the
    reentrant kind, or compiled code) ran its forwards without gradients inside its own: it repeats the first after it.
    """
    current = torch._C._current_autograd_node()
    number = current._sequence_nr()
    contains_forwards = isinstance(current, BackwardCFunction) and not isinstance(current, _OWN_NODES)
    ranks = []
    for entry in entries:
        if entry.grad:
            ranks.append(entry.node if entry.node <= number else -1)
        else:
            ranks.append(2**62 - entry.node if contains_forwards and entry.node >= number else -1)
    return ranks


_OWN_NODES = (aten.AffineBackward, native.AffineBackward, triton.AffineBackward)

# In units of sigma. Rounding to bfloat16 moves a value by 1e-3 of itself and the mean of 32 by 2e-4; two minibatches of
# n values lie n**-0.5 apart in each of C channels, all of which would have to fall below this.
_TOLERANCE = 2e-3
_NO_MATCH = (
    "expected the recomputation of a Batch Renormalization forward to find the forward that it repeats, but none of "
    f"this layer among the last {PENDING_FORWARDS} saw this minibatch: the model must compute the same values in the "
    "recomputation (keep preserve_rng_state=True), and a new training forward must not start inside a backward"
)
_HISTORIES: WeakKeyDictionary[torch.UntypedStorage, _History] = WeakKeyDictionary()


def is_plain_eager(x: Tensor) -> bool:
    """No compiler, transform, dispatch mode, tensor subclass or storage-less tensor: python may look at values."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(x) not in (Tensor, torch.nn.Parameter)
        or x.is_meta
    )


def _as_scalar(value: float | Tensor, like: Tensor) -> Tensor:
    dtype = torch.float32 if like.device.type == "mps" else torch.float64
    if isinstance(value, Tensor):
        return value.to(like.device, dtype)
    return torch.full((), value, dtype=dtype, device=like.device)


# The same computation as one operator, which no compiler looks into: it neither recomputes r and d from updated buffers
# nor moves the averages a second time. Functional (the caller copies the results), so that transforms can rewrite it.
_LIBRARY = torch.library.Library("batchrenorm", "DEF")
_LIBRARY.define(
    "correct(Tensor mu_B, Tensor sigma_B, Tensor running_mean, Tensor running_var, Tensor? step, Tensor? share, "
    "Tensor limits, float eps, Tensor layer) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _correct_op(
    mu_B: Tensor,
    sigma_B: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    step: Tensor | None,
    share: Tensor | None,
    limits: Tensor,
    eps: float,
    layer: Tensor,
) -> tuple[Tensor, ...]:
    alpha, *rest = limits.unbind() if not limits.is_cpu else limits.tolist()
    use = _used_averages(mu_B, sigma_B, running_mean, running_var, share, eps, Limits(*rest), layer)
    if use.repeated:
        new_mean, new_var = running_mean.clone(), running_var.clone()
    else:
        new_mean, new_var = _moved(running_mean, running_var, use, alpha, eps)
    # An operator may not return its input.
    new_step = limits.new_empty(0) if step is None else step + (0 if use.repeated else 1)
    own = use.limits.own
    own = own.clone() if isinstance(own, Tensor) else limits.new_full((), own)
    # Nor may it return what the history keeps: compiled code writes over results that it needs no more.
    return *_r_d(mu_B, sigma_B, use), own, use.sigma.clone(), new_mean, new_var, new_step


def _correct_fake(
    mu_B: Tensor,
    sigma_B: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    step: Tensor | None,
    share: Tensor | None,
    limits: Tensor,
    eps: float,
    layer: Tensor,
) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(mu_B),
        torch.empty_like(mu_B),
        limits.new_empty(()),
        torch.empty_like(mu_B[0] if mu_B.ndim == 2 else mu_B),
        torch.empty_like(running_mean),
        torch.empty_like(running_var),
        limits.new_empty(0) if step is None else torch.empty_like(step),
    )


def _correct_vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
    members = [
        torch.ops.batchrenorm.correct(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims)))
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(out) for out in zip(*members)), (0,) * 7


def _correct_autograd(*args: Any) -> tuple[Tensor, ...]:
    """No derivative; but a compiler is told to save the results, even inside a checkpointed region.

    Recomputing them would need the averages of before the step, so it would save the buffers, which the next forward
    writes: with two forwards pending torch raises. r and d are (G, C) and cost nothing to save.
    """
    with torch._C._AutoDispatchBelowAutograd():
        out = torch.ops.batchrenorm.correct(*args)
    tracing = get_proxy_mode()
    if tracing is not None:
        op = torch.ops.batchrenorm.correct.default
        node = next((node for node in reversed(tracing.tracer.graph.nodes) if node.target is op), None)
        for saved in () if node is None else (node, *node.users):
            saved.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return out


_LIBRARY.impl("correct", _correct_op, "CompositeExplicitAutograd")
_LIBRARY.impl("correct", _correct_autograd, "Autograd")
torch.library.register_fake("batchrenorm::correct", _correct_fake, lib=_LIBRARY)
torch.library.register_vmap("batchrenorm::correct", _correct_vmap, lib=_LIBRARY)
