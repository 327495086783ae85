"""The heavy passes in C, `native.c`: eager CPU, where the package was built with a C compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..library import GIVEN, LIBRARY, MOVE_GRADIENT, MOVING, PARALLEL, PASS
from ..moving import NOT_TWICE, RATE, Moving
from . import Moments, Shared, as_laid_out, decomposed, in_order

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # TYPES in native.c
_PLAIN = (Tensor, torch.nn.Parameter)

# Up to this many elements waking other threads costs more than they save.
_ONE_THREAD = 2**15


def refusal(x: Tensor, *others: Tensor | None) -> str | None:
    """Why there can be no raw pointers to these, or None."""
    if LIBRARY is None:
        return "this package was installed without a C compiler"
    if x.dtype not in _TYPES:
        return f"x of {x.dtype}"
    for t in (x, *others):
        if t is not None and not (t.is_cpu and type(t) in _PLAIN):
            return f"a {type(t).__name__} on {t.device}"
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return "a tensor that has left a transform of torch.func"
    return "torch.jit at work" if torch._C._get_tracing_state() is not None else None


def refusal_of_moving(moving: Moving | None, x: Tensor, together: bool) -> str | None:
    """Why `moving.c` cannot move these buffers, or None."""
    if moving is None:
        return None
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for buffer in moving[:2]:
        if buffer.dtype != dtype or not buffer.is_contiguous():
            return f"a moving gradient of {buffer.dtype}, or not in one piece, beside x of {x.dtype}"
    return "a moving gradient that microbatches of several replicas share" if moving.replicas and not together else None


def moments(x: Tensor, eps: float, size: int, mask: Tensor | None = None) -> Moments:
    if mask is not None:
        raise ValueError("expected mask=None with backend='native', got a mask; use backend=None or 'decomposed'")
    statistics = vectors(x, size)
    x = in_order(x.detach())  # the derivative is in _Affine
    _run("brn_moments", x, statistics, eps, size)
    mean, var, std, _, _ = statistics.chunk(5) if size < x.shape[0] else statistics
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
    shared: Shared | None = None,
    moving: Moving | None = None,
) -> Tensor:
    statistics = torch.stack([*moments, scale, shift]).view(-1, x.shape[1])
    return forward(x, weight, bias, residual, activation, statistics, eps, size, moving, shared=shared)


def vectors(x: Tensor, size: int, more: int = 0) -> Tensor:
    """Memory for mean, var, std, scale and shift of G groups, ``(5 * G + more, C)``."""
    shape = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(5 * -(-shape[0] // size) + more, shape[1], dtype=dtype, device="cpu")


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    statistics: Tensor,
    eps: float,
    size: int,
    moving: Moving | None = None,
    between: tuple[int, bytes] | None = None,
    shared: Shared | None = None,
) -> Tensor:
    """`affine`; or with `between`, address and argument of a C function that makes scale and shift, both passes.

    `statistics` begins with mean, var, std, scale and shift, as `vectors` gives it.
    """
    return _apply(x, weight, bias, residual, (statistics, eps, size, activation is not None, between, shared, moving))


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
        statistics, eps, size, relu, between, shared, moving = constants
        given, x = x, in_order(x)
        y = torch.empty_like(x)
        w, b = _vector(weight, statistics), _vector(bias, statistics)
        passed = None if residual is None else as_laid_out(residual, x)
        _run("brn_affine", x, statistics, eps, size, None, y, w, b, residual=passed, relu=relu, between=between)
        # With a residual the ReLU's mask cannot be had from x; the output is kept by whatever takes it anyway.
        ctx.save_for_backward(given, weight, bias, y if relu and residual is not None else None)
        # Vectors that nobody else writes or differentiates; as attributes they cost no packing and unpacking.
        ctx.constants = statistics, eps, size, relu, shared, moving
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, y = ctx.saved_tensors
        statistics, eps, size, relu, shared, moving = ctx.constants
        need_x, need_weight, need_bias, need_residual, _ = needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # under create_graph: this gradient may be differentiated again
            if moving is not None and need_x:
                raise RuntimeError(NOT_TWICE)
            groups = -(-x.shape[0] // size)
            scale, shift = (v if groups > 1 else v[0] for v in statistics[: 5 * groups].chunk(5)[3:])
            vectors = scale, shift, weight, bias
            return *decomposed.gradients(needs, grad, x, eps, *vectors, size, y, relu, shared), None
        x = in_order(x)
        grad = as_laid_out(grad, x)
        gx = torch.empty_like(x) if need_x else None
        gw = torch.empty_like(weight, dtype=statistics.dtype) if need_weight else None
        gb = torch.empty_like(bias, dtype=statistics.dtype) if need_bias else None
        gr = torch.empty_like(x) if need_residual and relu else grad if need_residual else None
        w, b = _vector(weight, statistics), _vector(bias, statistics)
        through = gr if relu else None
        if shared is None:
            given = None if moving is None or gx is None else _given(moving, statistics, eps, size, x)
            vectors = w, b, gw, gb
            _run("brn_backward", x, statistics, eps, size, grad, gx, *vectors, None, y, through, relu, None, given)
        else:
            if relu:
                through = torch.empty_like(x) if through is None else through
                _run("brn_backward", x, statistics, eps, size, grad, None, w, b, y=y, residual_grad=through, relu=relu)
                grad = through
            _shared_gradients(shared, moving, x, statistics, eps, size, grad, gx, w, gw, gb)
        if gw is not None and gw.dtype != weight.dtype:
            gw = gw.to(weight.dtype)
        if gb is not None and gb.dtype != bias.dtype:
            gb = gb.to(bias.dtype)
        return gx, gw, gb, gr, None


def _given(moving: Moving, statistics: Tensor, eps: float, size: int, x: Tensor) -> tuple[Any, ...]:
    """The arguments of `brn_backward_given` after the first: own share, functions of moving.c and their argument."""
    N, C = x.shape[0], x.shape[1]
    each = x.numel() // (N * C) * size
    mean, slope, share, sigma, _ = moving
    own, groups = float(share), -(-N // size)
    packed = MOVING.pack(
        statistics.data_ptr(),
        mean.data_ptr(),
        slope.data_ptr(),
        # `correction.c` left it behind the groups' vectors and the mean and sigma of these.
        statistics[5 * groups + 2].data_ptr() if sigma is None else sigma.data_ptr(),
        groups,
        C,
        statistics.itemsize,
        x.numel() // C,
        each,
        own,
        eps,
        RATE,
    )
    return own, GIVEN, MOVE_GRADIENT, packed


def _shared_gradients(
    shared: Shared,
    moving: Moving | None,
    x: Tensor,
    statistics: Tensor,
    eps: float,
    size: int,
    grad: Tensor,
    out: Tensor | None,
    weight: Tensor | None,
    weight_grad: Tensor | None,
    bias_grad: Tensor | None,
) -> None:
    """The two halves of a backward, and between them the sum over the replicas."""
    mean, var, std, scale, shift = statistics
    sum_dy, sum_dy_x_hat = torch.empty_like(mean), torch.empty_like(mean)
    plain = torch.stack([mean, var, std, torch.ones_like(mean), torch.zeros_like(mean)])
    _run("brn_backward", x, plain, eps, size, grad, None, weight, None, sum_dy_x_hat, sum_dy)
    if weight_grad is not None:
        torch.addcmul(sum_dy_x_hat * scale, sum_dy, shift, out=weight_grad)
    if bias_grad is not None:
        bias_grad.copy_(sum_dy)
    if out is not None:
        a = scale / std if weight is None else weight * scale / std
        factor: float | Tensor = 1.0
        if moving is not None:
            count = shared.total.to(mean.dtype) / shared.replicas.size
            sum_dy, sum_dy_x_hat, factor = moving.part(sum_dy, sum_dy_x_hat, count, scale, shift, std, eps)
        b, c = shared.coefficients(sum_dy, sum_dy_x_hat, a, std)
        _run("brn_gradient", x, torch.stack([mean, var, std, a * factor, b]), eps, size, grad, out, bias=c)


# Past `Function.apply`, which looks for transforms of torch.func; with these at work this backend is not chosen.
_apply = super(torch.autograd.Function, _Affine).apply

AffineBackward: type = _Affine._backward_cls
"""The class of this backend's nodes in autograd's graph."""


def _run(
    name: str,
    x: Tensor,
    statistics: Tensor,
    eps: float,
    size: int,
    dy: Tensor | None = None,
    out: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    weight_grad: Tensor | None = None,
    bias_grad: Tensor | None = None,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    residual_grad: Tensor | None = None,
    relu: bool = False,
    between: tuple[int, bytes] | None = None,
    given: tuple[Any, ...] | None = None,
) -> None:
    """Call a function of native.c with its `struct pass`."""
    shape = x.shape
    N, C = shape[0], shape[1]
    elements = x.numel()
    S = elements // (N * C)
    size = min(size, N)
    rows = S == 1 or not x.is_contiguous()
    if rows:
        N, S, size = N * S, 1, size * S
    packed = PASS.pack(
        x.data_ptr(),
        0 if dy is None else dy.data_ptr(),
        0 if out is None else out.data_ptr(),
        statistics.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if weight_grad is None else weight_grad.data_ptr(),
        0 if bias_grad is None else bias_grad.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if y is None else y.data_ptr(),
        0 if residual_grad is None else residual_grad.data_ptr(),
        *PARALLEL,
        relu,
        torch.get_num_threads() if elements > _ONE_THREAD else 1,
        _TYPES[x.dtype],
        rows,
        N,
        C,
        S,
        size,
        eps,
    )
    if between is not None:
        failed = LIBRARY.brn_forward(packed, *between)  # type: ignore[union-attr]
    elif given is not None:
        failed = LIBRARY.brn_backward_given(packed, *given)  # type: ignore[union-attr]
    else:
        failed = getattr(LIBRARY, name)(packed)
    if failed:
        raise MemoryError("expected memory for vectors of length C, got none; use smaller tensors")


def _vector(vector: Tensor | None, like: Tensor) -> Tensor | None:
    if vector is None or (vector.dtype == like.dtype and vector.is_contiguous()):
        return vector
    return vector.to(like.dtype).contiguous()
