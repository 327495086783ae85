"""`batch_renorm`: checks, microbatches, the order of the passes, the update of the averages, the choice of backend.

The path of one tensor through a training step:

    x (N, C, *)  ->  backend.moments: mean, var, std, (C,), or (G, C) of G microbatches     first heavy pass
                 ->  replicas.merge, where there are replicas: mean, var, std of all of them
                 ->  correction.correct: r, d like them, and the move of the averages       the paper, on vectors
                 ->  backend.affine                                                         second heavy pass
    and last, when nothing can fail any more, the averages move.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import Moments, Shared, aten, decomposed, native, triton
from .correction import correct, in_one_call, in_two_launches, is_plain_eager, suits_one_call, suits_two_launches
from .moving import Moving
from .replicas import Replicas, check_group, mean_of_groups, merge, replicas_of
from .schedule import ClipSchedule, MomentumSchedule, check_limits

BACKENDS: dict[str, ModuleType] = {"aten": aten, "decomposed": decomposed, "native": native, "triton": triton}


def batch_renorm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool,
    momentum: float | Tensor = 0.01,
    eps: float = 1e-5,
    r_max: float | Tensor = 3.0,
    d_max: float | Tensor = 5.0,
    microbatch_size: int | None = None,
    mask: Tensor | None = None,
    process_group: object | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Batch Renormalization as a function; in training it updates the running tensors in place, as `F.batch_norm` does.

    Training: ``y = weight * ((x - mu_B) / sigma_B * r + d) + bias`` with ``r = clip(sigma_B / sigma, 1/r_max, r_max)``,
    ``d = clip((mu_B - mu) / sigma, -d_max, d_max)``, ``sigma = sqrt(running_var + eps)``, ``mu = running_mean``, all
    from before the update; r and d are constants under the gradient. Inference is batch norm's.

    Args:
        x: ``(N, C)`` or ``(N, C, *spatial)``; float64, float32, bfloat16 or float16.
        running_mean: ``(C,)`` moving average of the mean, or None: then training is batch norm.
        running_var: ``(C,)``, the moving average of the standard deviation, kept as ``sigma² - eps`` so that inference
            is batch norm's; None together with running_mean.
        weight: ``(C,)`` gamma, or None for 1. May be float32 beside half x.
        bias: ``(C,)`` beta, or None for 0.
        training: normalise by the minibatch and update the averages, or normalise by the averages.
        momentum: weight of the new value in the averages (the paper's alpha), in [0, 1]; float or 0-d tensor.
        eps: added to the variance, under the root.
        r_max: limit of r, at least 1; float or 0-d tensor. Pass a tensor if it moves and the caller is compiled.
        d_max: limit of d, at least 0; float or 0-d tensor.
        microbatch_size: normalise consecutive groups of this many samples separately, each with its own r and d; the
            averages move once, by the mean over the groups. The last group may be smaller. Ignored in inference.
        mask: bool, ``(N, *spatial)``, True = a real element. Only real elements enter the statistics; the others are
            mapped like them (what is not finite there counts as 0). Ignored in inference by averages.
        process_group: normalise by the statistics of all replicas' minibatches together: a
            `torch.distributed.ProcessGroup`, its name, or "world" for all processes. Shards may differ in size and
            may be empty. x must require a gradient on all replicas or on none: then the backward is a collective as
            well. With microbatch_size the microbatches stay local, and only the averages' move is shared; ignored in
            inference. Gradients of weight and bias are this replica's.
        activation: "relu" for ``max(0, y)`` in the same pass over memory, or None.
        residual: like x, added to y before the activation, in the same pass.
        backend: "native" (C, on the CPU), "triton" (kernels for NVIDIA GPUs), "aten" (torch's batch-norm
            kernels) or "decomposed" (plain operators); None chooses.

    Returns:
        y, with the shape, dtype and memory format of x.

    Raises:
        ValueError: a wrong shape or number; nothing has been modified.
        TypeError: a wrong dtype; nothing has been modified.
        RuntimeError: a process group that is not there; nothing has been modified.

    Examples:
        >>> mean, var = torch.zeros(3), torch.ones(3)
        >>> x = torch.randn(8, 3, 5, 5)
        >>> y = batch_renorm(x, mean, var, training=True)
        >>> bool(mean.ne(0).all()), y.shape
        (True, torch.Size([8, 3, 5, 5]))

    Source: Algorithm 1; microbatches as in section 4.2.
    """
    return renormalize(
        x,
        running_mean,
        running_var,
        None,
        weight,
        bias,
        training=training,
        alpha=momentum,
        eps=eps,
        r_max=r_max,
        d_max=d_max,
        microbatch_size=microbatch_size,
        mask=mask,
        process_group=process_group,
        activation=activation,
        residual=residual,
        backend=backend,
    )


def renormalize(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    step: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    alpha: float | Tensor | MomentumSchedule,
    eps: float,
    r_max: float | Tensor,
    d_max: float | Tensor,
    microbatch_size: int | None,
    mask: Tensor | None,
    process_group: object | None,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
    layer: Tensor | None = None,
    clip: ClipSchedule | None = None,
    moving: Moving | None = None,
) -> Tensor:
    """`batch_renorm` with the layer's counter of training forwards, and the tensor that names its history.

    With `clip` the limits are this schedule's at `step`, and alpha may be a schedule as well: then both stay
    unevaluated for a kernel that reads the step itself. With `moving` the gradient is the moving one.
    """
    check_settings(alpha, eps, r_max, d_max, microbatch_size, process_group, backend, activation)
    replicas = replicas_of(process_group) if training and process_group is not None else None
    _check_tensors(x, running_mean, running_var, weight, bias, may_be_empty=replicas is not None)
    if mask is not None:
        _check_mask(mask, x)
    if residual is not None:
        residual = _check_residual(residual, x)
    if not training and running_mean is not None and running_var is not None:
        return _finished(_inference(x, running_mean, running_var, weight, bias, eps), residual, activation)

    # Without averages inference is batch norm on the minibatch, all of it.
    N = x.shape[0]
    size = min(microbatch_size, N) if training and microbatch_size is not None else N
    # What all replicas have together is not known here.
    together = replicas if microbatch_size is None else None
    if together is None:
        _check_values_per_channel(x, size)
    if running_mean is None and mask is None and size == N and backend is None and replicas is None:
        return _finished(F.batch_norm(x, None, None, weight, bias, True, 0.0, eps), residual, activation)
    plain = is_plain_eager(x)
    if moving is not None and replicas is not None:
        moving = moving._replace(replicas=replicas)
    passes = choose(backend, plain, mask, together, moving, x, weight, bias, residual, running_mean, running_var, step)
    if passes is native and replicas is None and suits_one_call(running_mean, running_var, step, mask, x):
        layer = running_mean if layer is None else layer
        numbers = float(alpha), eps, float(r_max), float(d_max)  # type: ignore[arg-type]
        tensors = x, running_mean, running_var, step, weight, bias
        return in_one_call(*tensors, *numbers, size, layer, residual, activation, moving)  # type: ignore[arg-type]
    if (
        passes is triton
        and replicas is None
        and suits_two_launches(running_mean, running_var, step, mask, x, alpha, r_max, d_max)
    ):
        limits = ClipSchedule.constant(r_max, d_max) if clip is None else clip  # type: ignore[arg-type]
        averages = triton.Averages(running_mean, running_var, step, alpha, limits)  # type: ignore[arg-type]
        return in_two_launches(x, weight, bias, eps, size, residual, activation, averages, moving)
    if clip is not None and step is not None:
        r_max, d_max = clip(step)
    if isinstance(alpha, MomentumSchedule) and step is not None:
        alpha = alpha(step)
    share = None
    if mask is not None:
        x = torch.where(mask.unsqueeze(1) | x.isfinite(), x, 0)
        share = None if together is not None else _share_of_microbatches(mask, size)

    if x.numel() == 0:
        passes, N = decomposed, 0
    moments = mean, _, std = passes.moments(x, eps, size, mask)
    shared: tuple[Shared, ...] = ()
    if together is not None:
        moments, total = _merged(moments, x, mask, eps, together, plain)
        mean, _, std = moments
        shared = (Shared(together, total),)
        share = None if mask is None else _share_of_all(total)
    if running_mean is None or running_var is None:
        r, d = torch.ones_like(mean), torch.zeros_like(mean)
        return passes.affine(x, moments, eps, r, d, weight, bias, size, residual, activation, *shared)
    mu_B, sigma_B = (v.detach() if v.requires_grad else v for v in (mean, std))
    if replicas is not None and together is None:
        mu_B, sigma_B, share = mean_of_groups(mu_B, sigma_B, share, N, replicas)
    r, d, own, sigma, move = correct(
        mu_B,
        sigma_B,
        running_mean,
        running_var,
        step,
        share,
        alpha=alpha,  # type: ignore[arg-type]
        eps=eps,
        r_max=r_max,
        d_max=d_max,
        own=1.0 if moving is None else moving.own,
        layer=running_mean if layer is None else layer,
        plain=plain,
    )
    if mu_B.shape != mean.shape:
        r, d = (v[:-1].view_as(mean) for v in (r, d))
    if moving is None:
        y = passes.affine(x, moments, eps, r, d, weight, bias, size, residual, activation, *shared)
    else:
        options: dict[str, Any] = {
            "shared": shared[0] if shared else None,
            "moving": moving._replace(own=own, sigma=sigma),
        }
        if mask is not None and together is None:
            options["mask"] = mask
        y = passes.affine(x, moments, eps, r, d, weight, bias, size, residual, activation, **options)
    move()
    return y


def choose(
    backend: str | None,
    plain: bool,
    mask: Tensor | None,
    together: Replicas | None,
    moving: Moving | None,
    x: Tensor,
    *others: Tensor | None,
) -> ModuleType:
    if backend in ("aten", "decomposed"):
        return BACKENDS[backend]
    if backend is None and (not plain or mask is not None):
        return decomposed
    fused = triton if backend == "triton" or (backend is None and x.is_cuda) else native
    refusal = fused.refusal(x, *others) if plain else "a compiler, a transform or a mode is at work"
    if refusal is None and fused is triton and together is not None:
        refusal = "statistics over a process group, whose sums these kernels do not share yet"
    if refusal is None and fused is native:
        refusal = native.refusal_of_moving(moving, x, together is not None)
    if backend is not None:
        if refusal is None:
            return fused
        raise RuntimeError(
            f"expected what backend={backend!r} can do, got this: {refusal}; use backend=None, which chooses"
        )
    # In float64, which is for checking, bitwise torch's own.
    if refusal is None and (x.dtype != torch.float64 or moving is not None):
        return fused
    if moving is not None:
        return decomposed
    return aten if x.is_cpu or x.is_cuda else decomposed


def _inference(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    if torch.is_grad_enabled() and is_plain_eager(x) and not torch.jit.is_tracing():  # type: ignore[attr-defined]
        # Autograd keeps the averages; a training forward before the backward would write over them.
        running_mean, running_var = running_mean.clone(), running_var.clone()
    return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)


def _finished(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    # In place where y is nobody else's: batch norm's backward does not read its output.
    if is_plain_eager(y):
        y = y if residual is None else y.add_(residual)
        return y if activation is None else y.relu_()
    y = y if residual is None else y + residual
    return y if activation is None else y.relu()


def _share_of_microbatches(mask: Tensor, size: int) -> Tensor:
    """(G,) weights of the microbatches in the update: equal, but none for those with fewer than two real elements.

    All 0 / 0 = NaN when there is no other: not finite, so the averages stay as they were.
    """
    counts = torch.stack([part.sum() for part in mask.split(size)])
    counted = (counts > 1).to(torch.float64 if mask.device.type != "mps" else torch.float32)
    return counted / counted.sum()


def _merged(
    moments: Moments, x: Tensor, mask: Tensor | None, eps: float, replicas: Replicas, plain: bool
) -> tuple[Moments, Tensor]:
    mean, var, _ = moments
    count = math.prod((x.shape[0], *x.shape[2:])) if mask is None else mask.sum()
    differentiated = torch.is_grad_enabled() and x.requires_grad
    mean, var, total, agreed = merge(mean, var, count, differentiated, replicas)
    # On every replica alike, since all of them see the same. On a GPU looking would wait for the device.
    if plain and total.is_cpu and not agreed.item():
        raise RuntimeError(
            "expected x to require a gradient on all replicas of the process group or on none, got both; the backward "
            "is a collective, so freeze the same parts and leave out gradients in the same forwards everywhere"
        )
    if mask is None and plain and total.is_cpu and total.item() < 2:
        raise ValueError(
            f"expected more than one value per channel in training, got {int(total.item())} on {replicas.size} "
            "replicas together; use more samples, drop the last ones, or call eval() for single samples"
        )
    return (mean, var, (var + eps).sqrt()), total


def _share_of_all(total: Tensor) -> Tensor:
    """`_share_of_microbatches` of all replicas' minibatch as one."""
    counted = (total > 1).to(total.dtype).view(1)
    return counted / counted


def _check_tensors(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    may_be_empty: bool,
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected x to be a torch.Tensor, got {type(x).__name__}; convert it with torch.as_tensor")
    if not x.is_floating_point():
        raise TypeError(
            f"expected x to be float64, float32, bfloat16 or float16, got {x.dtype}; convert it, e.g. x.float()"
        )
    if x.ndim < 2:
        raise ValueError(
            f"expected x of shape (N, C) or (N, C, *spatial), got {tuple(x.shape)}; add the missing dimensions"
        )
    if x.numel() == 0 and not may_be_empty:
        raise ValueError(f"expected at least one element, got x of shape {tuple(x.shape)}; skip empty batches")
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(
            f"expected running_mean and running_var both or neither, got None for {missing}; give the other too"
        )
    C = x.shape[1]
    for vector in (running_mean, running_var, weight, bias):
        if vector is not None and vector.shape != (C,):
            names = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
            name = next(name for name, v in names.items() if v is vector)
            raise ValueError(
                f"expected {name} of shape ({C},) for x of shape {tuple(x.shape)}, got {tuple(vector.shape)}; "
                "channels are dimension 1 of x"
            )


def check_settings(
    alpha: float | Tensor | MomentumSchedule,
    eps: float,
    r_max: float | Tensor,
    d_max: float | Tensor,
    microbatch_size: int | None,
    process_group: object | None,
    backend: str | None,
    activation: str | None,
) -> None:
    if not isinstance(alpha, (Tensor, MomentumSchedule)) and not 0.0 <= alpha <= 1.0:
        raise ValueError(f"expected momentum in [0, 1], the weight of the new value, got {alpha}; the paper uses 0.01")
    if not eps >= 0.0:
        raise ValueError(f"expected eps >= 0, got {eps}; torch.nn.BatchNorm2d uses 1e-5")
    check_limits(1.0 if isinstance(r_max, Tensor) else r_max, 0.0 if isinstance(d_max, Tensor) else d_max)
    if microbatch_size is not None:
        if not isinstance(microbatch_size, int):
            raise TypeError(
                f"expected microbatch_size to be an int or None, got {type(microbatch_size).__name__}; round it"
            )
        if microbatch_size < 1:
            raise ValueError(f"expected microbatch_size >= 1 or None, got {microbatch_size}; None is the whole batch")
    if process_group is not None:
        check_group(process_group)
    if activation not in (None, "relu"):
        raise ValueError(f"expected activation to be None or 'relu', got {activation!r}; apply another one afterwards")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"expected backend to be None or one of {sorted(BACKENDS)}, got {backend!r}; None chooses")


def _check_mask(mask: Tensor, x: Tensor) -> None:
    expected = (x.shape[0], *x.shape[2:])
    if mask.dtype != torch.bool:
        raise TypeError(f"expected mask to be torch.bool, got {mask.dtype}; True is a real element, e.g. mask.bool()")
    if mask.shape != expected:
        raise ValueError(
            f"expected mask of shape {expected} for x of shape {tuple(x.shape)}, got {tuple(mask.shape)}; "
            "the mask is x without its channels"
        )


def _check_residual(residual: Tensor, x: Tensor) -> Tensor:
    if not isinstance(residual, Tensor) or not residual.is_floating_point():
        got = residual.dtype if isinstance(residual, Tensor) else type(residual).__name__
        raise TypeError(f"expected residual to be a floating-point torch.Tensor, got {got}; convert it, e.g. .float()")
    if residual.shape != x.shape:
        raise ValueError(
            f"expected residual of the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}; "
            "expand it before, e.g. residual.expand_as(x)"
        )
    # Under autocast the branches of a block may come in different types.
    return residual if residual.dtype == x.dtype else residual.to(x.dtype)


def _check_values_per_channel(x: Tensor, size: int) -> None:
    last = x.shape[0] % size or size if size else 0
    if last == 1 and math.prod(x.shape[2:]) == 1:
        where = "" if size == x.shape[0] else f", whose last microbatch of {size} holds {last} sample"
        raise ValueError(
            f"expected more than one value per channel in training, got x of shape {tuple(x.shape)}{where}; "
            "use more samples, drop the last ones, or call eval() for single samples"
        )
