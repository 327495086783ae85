"""BatchRenorm1d, 2d, 3d: batch norm's state, the schedule, one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import Parameter, UninitializedBuffer, UninitializedParameter

from .correction import is_plain_eager, name_of_history
from .functional import check_settings, renormalize
from .moving import Moving
from .replicas import name_of
from .schedule import CUMULATIVE, ClipSchedule, MomentumSchedule

Clip = Callable[[Tensor], tuple[Tensor, Tensor]] | ClipSchedule
Momentum = float | MomentumSchedule | None


class BatchRenorm(nn.Module):
    """Batch Renormalization of a tensor of any rank; `BatchRenorm1d`, `2d` and `3d` also check the rank.

    ``y = weight * ((x - mu_B) / sigma_B * r + d) + bias`` in training, ``weight * (x - mu) / sigma + bias`` in
    inference.

    A drop-in for `torch.nn.BatchNorm1d/2d/3d`: the same arguments and the same five state-dict keys. The averages are
    used in training, so `running_var` holds ``sigma² - eps``, where sigma averages the *standard deviation* as in the
    paper.

    Args:
        num_features: C, the size of dimension 1.
        eps: added to the variance, under the root.
        momentum: weight of the new value in the averages (the paper's alpha), in [0, 1]; a `MomentumSchedule`, by which
            it falls during training; or None for the cumulative mean.
        affine: learn weight and bias, ``(C,)``.
        track_running_stats: keep averages; without them the layer is batch norm on the minibatch, in inference too.
        device: of parameters and buffers.
        dtype: of parameters and averages.
        clip: limits of r and d as a function of the training step, which is `num_batches_tracked`.
        microbatch_size: normalise consecutive groups of this many samples separately, each with its own r and d.
        process_group: normalise by the statistics of all replicas together: a `torch.distributed.ProcessGroup`, its
            name, or "world"; see `batch_renorm`. A copied or unpickled layer holds the name.
        activation: "relu" for ``max(0, y)`` in the same pass over memory, or None.
        bias: with affine, learn the bias too.
        gradient: "microbatch" is the paper's backward, which subtracts means over the microbatch itself. "moving"
            subtracts averages over the steps instead, in two more buffers, ``(C,)`` each, `gradient_mean` and
            `gradient_slope`: more accurate where microbatches hold few values (2 to 8 samples of a dense layer or of a
            small map), and beyond the paper. It needs a `ClipSchedule` with wide limits, by whose warm-up it comes in.
            Inference is the same affine map. See docs/theory-backward.md.

    Raises:
        ValueError, TypeError: an argument out of its range, or an input of the wrong shape or dtype; an error leaves
            the averages and the step as they were.

    Examples:
        >>> layer = BatchRenorm2d(3, clip=ClipSchedule.constant())
        >>> x = torch.randn(4, 3, 8, 8)
        >>> expected = layer.eval()(x)                         # by the averages before the step
        >>> torch.allclose(layer.train()(x), expected, atol=1e-5)  # nothing clipped: training sees what inference sees
        True

    Source: Algorithm 1; schedule and momentum as in section 4.
    """

    num_features: int
    weight: Parameter | None
    bias: Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    gradient_mean: Tensor  # where gradient is "moving"
    gradient_slope: Tensor

    _ranks: tuple[int, ...] = ()
    # State dicts of torch's batch norm before its version 2 have no num_batches_tracked.
    _version = 2

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Momentum = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        clip: Clip = ClipSchedule(),
        microbatch_size: int | None = None,
        process_group: object | None = None,
        activation: str | None = None,
        bias: bool = True,
        gradient: str = "microbatch",
    ) -> None:
        super().__init__()
        if not isinstance(num_features, int) or isinstance(num_features, bool) or num_features < 0:
            raise ValueError(f"expected num_features to be an int >= 0, got {num_features!r}; it is dimension 1 of x")
        check_settings(
            CUMULATIVE if momentum is None else momentum,
            eps,
            1.0,
            0.0,
            microbatch_size,
            process_group,
            None,
            activation,
        )
        if not callable(clip):
            raise TypeError(
                f"expected clip to be a ClipSchedule, got {clip!r}; a constant is ClipSchedule.constant(r, d)"
            )
        check_gradient(gradient, clip, track_running_stats)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.clip = clip
        self.microbatch_size = microbatch_size
        self.process_group = process_group
        self.activation = activation
        self._layer = name_of_history()
        floating = {"device": device, "dtype": dtype}
        self.weight = Parameter(torch.ones(num_features, **floating)) if affine else None  # type: ignore[arg-type]
        biased = affine and bias
        self.bias = Parameter(torch.zeros(num_features, **floating)) if biased else None  # type: ignore[arg-type]
        tracked = track_running_stats
        zeros = torch.zeros(num_features, **floating) if tracked else None  # type: ignore[arg-type]
        self.register_buffer("running_mean", zeros)
        self.register_buffer("running_var", None if zeros is None else torch.ones_like(zeros))
        self.register_buffer(
            "num_batches_tracked", torch.zeros((), dtype=torch.long, device=device) if tracked else None
        )
        self._set_gradient(gradient)

    def _set_gradient(self, gradient: str) -> None:
        self.gradient = gradient
        if gradient == "moving":
            like = self.running_mean
            assert like is not None
            for name in _GRADIENT_BUFFERS:
                if isinstance(like, UninitializedBuffer):
                    new: Tensor = UninitializedBuffer(device=like.device, dtype=like.dtype)  # type: ignore[call-arg]
                else:
                    new = torch.zeros_like(like)
                self.register_buffer(name, new)

    def forward(self, x: Tensor, mask: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Normalise x; with a residual and an activation, ``activation(normalised x + residual)``.

        Args:
            x: ``(N, C)`` or ``(N, C, *spatial)`` of the layer's rank; float64, float32, bfloat16 or float16.
            mask: bool ``(N, *spatial)``, True = a real element; see `batch_renorm`.
            residual: like x, added before the activation.

        Returns:
            y, with the shape, dtype and memory format of x.
        """
        if self._ranks and isinstance(x, Tensor) and x.ndim not in self._ranks:
            ranks = " or ".join(f"{rank}-d" for rank in self._ranks)
            raise ValueError(
                f"expected {ranks} input for {type(self).__name__}, got {x.ndim}-d of shape {tuple(x.shape)}; "
                "use the layer of the right rank"
            )
        alpha: float | Tensor | MomentumSchedule = 0.0
        r_max: float | Tensor = 1.0
        d_max: float | Tensor = 0.0
        clip = None
        step = self.num_batches_tracked
        moving = None
        if self.training and step is not None:
            # On the CPU looking at the counter costs nothing; elsewhere it would wait for the device.
            t = step.item() if step.is_cpu and is_plain_eager(x) else step
            alpha = CUMULATIVE if self.momentum is None else self.momentum
            if step.is_cuda and isinstance(self.clip, ClipSchedule):
                clip = self.clip  # for whoever can read the step without waiting
            else:
                r_max, d_max = self.clip(t if isinstance(self.clip, ClipSchedule) else step)  # type: ignore[arg-type]
                alpha = alpha(t) if isinstance(alpha, MomentumSchedule) else alpha  # type: ignore[arg-type]
            if self.gradient == "moving":
                buffers = self._buffers
                own = self.clip.own_share(t)  # type: ignore[union-attr, arg-type]
                moving = Moving(buffers["gradient_mean"], buffers["gradient_slope"], own)  # type: ignore[arg-type]
        return renormalize(
            x,
            self.running_mean,
            self.running_var,
            step,
            self.weight,
            self.bias,
            training=self.training,
            alpha=alpha,
            eps=self.eps,
            r_max=r_max,
            d_max=d_max,
            microbatch_size=self.microbatch_size,
            mask=mask,
            process_group=self.process_group,
            activation=self.activation,
            residual=residual,
            layer=self._layer,
            clip=clip,
            moving=moving,
        )

    @property
    def running_std(self) -> Tensor | None:
        """``(C,)``, sigma: the paper's moving average of the standard deviation, with epsilon inside."""
        return None if self.running_var is None else (self.running_var + self.eps).sqrt()

    def reset_running_stats(self) -> None:
        """Averages 0 and 1, step 0, as in a new layer."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()
            if self.gradient == "moving":
                self.gradient_mean.zero_()
                self.gradient_slope.zero_()

    def reset_parameters(self) -> None:
        """A new layer's averages, step, weight and bias."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        text = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
        text += f"track_running_stats={self.track_running_stats}, clip={self.clip}"
        if self.affine and self.bias is None:
            text += ", bias=False"
        for name, value in {
            "microbatch_size": self.microbatch_size,
            "process_group": name_of(self.process_group),
            "activation": self.activation,
            "gradient": None if self.gradient == "microbatch" else self.gradient,
        }.items():
            text += "" if value is None else f", {name}={value}"
        return text

    def __getstate__(self) -> dict[str, Any]:
        # A process group is the process's, and cannot be copied or pickled.
        return {**self.__dict__, "process_group": name_of(self.process_group)}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        key = prefix + "num_batches_tracked"
        old = local_metadata.get("version") is None or local_metadata["version"] < 2
        if old and self.num_batches_tracked is not None and key not in state_dict:
            state_dict[key] = self.num_batches_tracked.clone()
        if self.gradient == "moving":
            # Batch norm, and Batch Renormalization with the paper's gradient, have no such state: it begins anew.
            names = [name for name in _GRADIENT_BUFFERS if prefix + name not in state_dict]
            if prefix + "running_mean" in state_dict:
                state_dict.update({prefix + name: torch.zeros_like(getattr(self, name)) for name in names})
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


_GRADIENT_BUFFERS = ("gradient_mean", "gradient_slope")


def check_gradient(gradient: str, clip: object, tracked: bool) -> None:
    if gradient not in ("microbatch", "moving"):
        raise ValueError(
            f"expected gradient to be 'microbatch' or 'moving', got {gradient!r}; the first is the paper's"
        )
    if gradient == "moving" and not isinstance(clip, ClipSchedule):
        raise TypeError(
            f"expected clip to be a ClipSchedule with gradient='moving', got {clip!r}; the moving gradient comes in as "
            "its limits open"
        )
    if gradient == "moving" and not tracked:
        raise ValueError(
            "expected track_running_stats=True with gradient='moving', got False; without averages there is no "
            "renormalisation whose gradient could be a moving one"
        )


class BatchRenorm1d(BatchRenorm):
    """`BatchRenorm` of ``(N, C)`` or ``(N, C, L)``: a drop-in for `torch.nn.BatchNorm1d`."""

    _ranks = (2, 3)


class BatchRenorm2d(BatchRenorm):
    """`BatchRenorm` of ``(N, C, H, W)``: a drop-in for `torch.nn.BatchNorm2d`."""

    _ranks = (4,)


class BatchRenorm3d(BatchRenorm):
    """`BatchRenorm` of ``(N, C, D, H, W)``: a drop-in for `torch.nn.BatchNorm3d`."""

    _ranks = (5,)


class _Lazy(LazyModuleMixin, BatchRenorm):
    """C is taken from the first input; then the layer becomes `cls_to_become`."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: Momentum = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        gradient: str = "microbatch",
        **options: Any,
    ) -> None:
        super().__init__(0, eps, momentum, False, False, device, dtype, **options)
        check_gradient(gradient, self.clip, track_running_stats)
        self.affine = affine
        self.track_running_stats = track_running_stats
        floating = {"device": device, "dtype": dtype}
        if affine:
            self.weight = UninitializedParameter(**floating)  # type: ignore
            self.bias = UninitializedParameter(**floating) if bias else None  # type: ignore
        if track_running_stats:
            self.running_mean = UninitializedBuffer(**floating)  # type: ignore[arg-type]
            self.running_var = UninitializedBuffer(**floating)  # type: ignore[arg-type]
            self.num_batches_tracked = torch.zeros((), dtype=torch.long, device=device)
        self._set_gradient(gradient)

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params() and self.num_features != 0:
            super().reset_parameters()

    def initialize_parameters(self, x: Tensor, *others: Tensor | None, **more: Tensor | None) -> None:
        if self.has_uninitialized_params():
            self.num_features = x.shape[1]
            for tensor in (self.weight, self.bias, *self._buffers.values()):
                if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
                    tensor.materialize((self.num_features,))
            self.reset_parameters()


class LazyBatchRenorm1d(_Lazy, BatchRenorm1d):
    """A `BatchRenorm1d` that takes num_features from its first input, as `torch.nn.LazyBatchNorm1d` does."""

    cls_to_become = BatchRenorm1d


class LazyBatchRenorm2d(_Lazy, BatchRenorm2d):
    """A `BatchRenorm2d` that takes num_features from its first input, as `torch.nn.LazyBatchNorm2d` does."""

    cls_to_become = BatchRenorm2d


class LazyBatchRenorm3d(_Lazy, BatchRenorm3d):
    """A `BatchRenorm3d` that takes num_features from its first input, as `torch.nn.LazyBatchNorm3d` does."""

    cls_to_become = BatchRenorm3d


def set_step(model: nn.Module, step: int) -> None:
    """Set the step of every Batch Renormalization layer in the model: the position in its clip schedule.

    For gradient accumulation (k forwards per optimiser step count as k), or to begin a fine-tuning past the warm-up.

    Args:
        model: any module.
        step: finished training steps, at least 0.

    Raises:
        ValueError: step is negative.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), BatchRenorm1d(3))
        >>> set_step(model, 40_000)
        >>> int(model[1].num_batches_tracked)
        40000
    """
    if step < 0:
        raise ValueError(f"expected step >= 0, got {step}; it counts finished training forwards")
    for module in model.modules():
        if isinstance(module, BatchRenorm) and module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(step)
