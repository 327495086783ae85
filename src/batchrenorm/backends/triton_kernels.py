"""The kernels of `backends.triton`, whose head says who owns what. Imported only where Triton runs.

A tile is `[BLOCK_M, BLOCK_C]`: elements m of one group (samples and space, flattened) by channels c. Its addresses are

    rows   (channels_last, or no space)   m * C + c                      contiguous along c
    planes (NC*)                          (m // S * C + c) * S + m % S   contiguous along m, as far as S allows

The contiguous length, C or S, comes in as `units * UNIT` with UNIT = gcd(length, 16) known to the compiler, which
therefore sees how far addresses and masks are aligned, and loads 16 bytes at once. (Triton looks at divisibility by 16
only, and 7 x 7 or 14 x 14 has none.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..correction_triton import clip_limits, moved, r_d

# The arguments that every kernel ends with are the fields of `_Passes` in triton.py.

# Numbers that change from batch to batch or step to step: a 1 or a multiple of 16 is no reason to compile again.
_COUNTS = ("N", "units", "size", "groups", "splits", "tiles")
_STEPS = (*_COUNTS, "warmup", "d_full", "r_full")


@triton.jit
def _place(pid, N, C, S, size, splits, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which program this is: block of channels, split, group, the channels, and the group's elements per channel."""
    blocks = tl.cdiv(C, BLOCK_C)
    block = pid % blocks
    split = pid // blocks % splits
    g = pid // blocks // splits
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    samples = tl.minimum(size, N - g * size)
    if WIDE:
        samples = samples.to(tl.int64)
    return block, split, g, c, samples * S


@triton.jit
def _tile(tile, c, count, C, S, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets in the group, and which of them exist."""
    if WIDE:
        tile = tl.full([], tile, tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there = (m < count)[:, None] & (c < C)[None, :]
    if ROWS:
        return m[:, None] * C + c[None, :], there
    return ((m // S)[:, None] * C + c[None, :]) * S + (m % S)[:, None], there


@triton.jit
def _last_of(counter, arrivals):  # type: ignore[no-untyped-def]
    """Whether all the others have passed here; what they wrote is then visible. Leaves the counter at 0."""
    before = arrivals - 1
    if arrivals > 1:
        tl.debug_barrier()  # all threads of this program have written
        before = tl.atomic_add(counter, 1, sem="acq_rel")
        if before == arrivals - 1:
            tl.atomic_xchg(counter, 0)
    tl.debug_barrier()
    return before == arrivals - 1


@triton.jit
def _merged(n, mean, m2):  # type: ignore[no-untyped-def]
    """Chan's merge of parts along axis 0: n elements each, their mean, and the sum of squares about it."""
    total = tl.sum(n, 0)
    whole = tl.maximum(total, 1.0)
    centre = tl.sum(n * mean, 0) / whole
    # Once more about the first result, whose rounding is relative to the mean and not to sigma.
    centre += tl.sum(n * (mean - centre[None, :]), 0) / whole
    off = mean - centre[None, :]
    return total, centre, tl.sum(m2 + n * off * off, 0)


@triton.jit
def _joined(n_a, mean_a, m2_a, n_b, mean_b, m2_b):  # type: ignore[no-untyped-def]
    """The same of two."""
    n = n_a + n_b
    share = n_b / tl.maximum(n, 1.0)
    gap = mean_b - mean_a
    return n, mean_a + gap * share, m2_a + m2_b + gap * gap * n_a * share


@triton.jit
def _vector(pointer, c, C, default: tl.constexpr, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    if pointer is None:
        return tl.full([BLOCK_C], default, tl.float32)
    return tl.load(pointer + c, mask=c < C, other=default).to(tl.float32)


@triton.jit
def _normalised(v, mean, a, b, residual, offsets, there, RELU: tl.constexpr):  # type: ignore[no-untyped-def]
    """One tile of y in float32. The mean is subtracted first: v * a + (b - mean * a) loses digits at large offsets."""
    y = (v - mean[None, :]) * a[None, :] + b[None, :]
    if residual is not None:
        y += tl.load(residual + offsets, mask=there, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)  # NaN stays
    return y


@triton.jit
def _through_relu(dy, v, mean, a, b, y, offsets, there, dtype: tl.constexpr, RELU: tl.constexpr):  # type: ignore[no-untyped-def]
    """The cotangent before the ReLU. Its mask is y's sign: of y where it was kept, else of y computed again."""
    if RELU:
        if y is not None:
            out = tl.load(y + offsets, mask=there, other=0.0).to(tl.float32)
        else:
            # Rounded as y was: what became 0 in half precision has no gradient.
            out = ((v - mean[None, :]) * a[None, :] + b[None, :]).to(dtype).to(tl.float32)
        dy = tl.where(out <= 0.0, 0.0, dy)
    return dy


@triton.jit
def _constants(vectors, weight, bias, g, groups, c, C, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    """mean, std, scale and shift of a group, and weight * scale / std and weight * shift + bias."""
    there = c < C
    at = vectors + g * C + c
    mean = tl.load(at, mask=there, other=0.0)
    std = tl.load(at + 2 * groups * C, mask=there, other=1.0)
    scale = tl.load(at + 3 * groups * C, mask=there, other=0.0)
    shift = tl.load(at + 4 * groups * C, mask=there, other=0.0)
    w = _vector(weight, c, C, 1.0, BLOCK_C)
    a = tl.div_rn(scale, std) * w
    return mean, std, scale, shift, a, shift * w + _vector(bias, c, C, 0.0, BLOCK_C)


@triton.jit
def _correct(  # type: ignore[no-untyped-def]
    mean, std, vectors, running_mean, running_var, step, r_max, d_max, warmup, d_full, r_full, eps,
    g, groups, c, C,
):  # fmt: skip
    """r and d of a group, from averages that move only when all groups have come so far."""
    there = c < C
    t = tl.full([], 0, tl.int64)
    if step is not None:
        t = tl.load(step)
    r_low, r_high, d_high = clip_limits(t, r_max, d_max, warmup, d_full, r_full)
    mu = tl.load(running_mean + c, mask=there, other=0.0)
    sigma = tl.sqrt_rn(tl.load(running_var + c, mask=there, other=1.0) + eps)
    r, d = r_d(mean, std, mu, sigma, r_low, r_high, d_high)
    at = vectors + g * C + c
    tl.store(at + 3 * groups * C, r, mask=there)
    tl.store(at + 4 * groups * C, d, mask=there)
    return r, d


@triton.jit
def _move(  # type: ignore[no-untyped-def]
    vectors, counters, running_mean, running_var, step, alpha, window, eps, block, groups, c, C,
    FALLING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Called once for every group: the last one moves the averages of these channels, the last block the step."""
    blocks = tl.cdiv(C, BLOCK_C)
    counters += groups * blocks
    if _last_of(counters + block, groups):
        there = c < C
        # One update by the mean of the groups' means and of their sigmas: sigma stays E[sigma_B].
        mean, std = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
        for first in range(0, groups, BLOCK_M):
            g = first + tl.arange(0, BLOCK_M)
            some = (g < groups)[:, None] & there[None, :]
            at = vectors + g[:, None] * C + c[None, :]
            mean += tl.sum(tl.load(at, mask=some, other=0.0, cache_modifier=".cg"), 0)
            std += tl.sum(tl.load(at + 2 * groups * C, mask=some, other=0.0, cache_modifier=".cg"), 0)
        if FALLING:
            part = 1.0 / (tl.load(step).to(tl.float64) * window + 1.0)
            alpha = tl.maximum(alpha, part.to(tl.float32))
        mu = tl.load(running_mean + c, mask=there, other=0.0)
        var = tl.load(running_var + c, mask=there, other=1.0)
        sigma = tl.sqrt_rn(var + eps)
        new_mean, new_var = moved(mean / groups, std / groups, mu, sigma, var, alpha, eps)
        tl.store(running_mean + c, new_mean, mask=there)
        tl.store(running_var + c, new_var, mask=there)
        if step is not None and _last_of(counters + blocks, blocks):
            tl.store(step, tl.load(step) + 1)


@triton.jit(do_not_specialize=_STEPS)
def statistics(  # type: ignore[no-untyped-def]
    x, vectors, partials, counters,
    running_mean, running_var, step, alpha, window, r_max, d_max, warmup, d_full, r_full, FALLING: tl.constexpr,
    eps, N, units, other, size, groups, splits, tiles,
    ROWS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C, S = units * UNIT if ROWS else other, other if ROWS else units * UNIT
    block, split, g, c, count = _place(tl.program_id(0), N, C, S, size, splits, BLOCK_C, WIDE)
    group = x + g.to(tl.int64) * size * C * S

    # Welford's recurrence in every lane of the tile: right for any mean, and no lane waits for another.
    n = tl.zeros([BLOCK_M], tl.float32)
    mean, m2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32), tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    k = 0.0
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(count, BLOCK_M).to(tl.int32))):
        offsets, there = _tile(tile, c, count, C, S, ROWS, BLOCK_M, WIDE)
        v = tl.load(group + offsets, mask=there, other=0.0).to(tl.float32)
        k += 1.0
        delta = tl.where(there, v - mean, 0.0)
        mean += delta * (1.0 / k)
        m2 += delta * (v - mean)
        n += tl.where(tile * BLOCK_M + tl.arange(0, BLOCK_M) < count, 1.0, 0.0)
    _, part_mean, part_m2 = _merged(n[:, None], mean, m2)
    at = partials + (g * splits + split) * C + c
    tl.store(at, part_mean, mask=c < C)
    tl.store(at + groups * splits * C, part_m2, mask=c < C)

    blocks = tl.cdiv(C, BLOCK_C)
    if _last_of(counters + g * blocks + block, splits):
        n_all = tl.zeros([1], tl.float32)
        mean_all, m2_all = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
        for first in range(0, splits, BLOCK_M):
            s = first + tl.arange(0, BLOCK_M)
            some = (s < splits)[:, None] & (c < C)[None, :]
            read = partials + ((g * splits + s) * C)[:, None] + c[None, :]
            means = tl.load(read, mask=some, other=0.0, cache_modifier=".cg")
            m2s = tl.load(read + groups * splits * C, mask=some, other=0.0, cache_modifier=".cg")
            elements = tl.minimum(tl.maximum(count - s.to(tl.int64) * tiles * BLOCK_M, 0), tiles * BLOCK_M)
            counts = tl.where(s < splits, elements.to(tl.float32), 0.0)
            n_some, mean_some, m2_some = _merged(counts[:, None], means, m2s)
            n_all, mean_all, m2_all = _joined(n_all, mean_all, m2_all, n_some, mean_some, m2_some)
        var = m2_all / n_all
        std = tl.sqrt_rn(var + eps)
        at = vectors + g * C + c
        tl.store(at, mean_all, mask=c < C)
        tl.store(at + groups * C, var, mask=c < C)
        tl.store(at + 2 * groups * C, std, mask=c < C)
        if running_mean is not None:
            _correct(
                mean_all, std, vectors, running_mean, running_var, step, r_max, d_max, warmup, d_full, r_full, eps,
                g, groups, c, C,
            )  # fmt: skip
            _move(
                vectors, counters, running_mean, running_var, step, alpha, window, eps, block, groups, c, C,
                FALLING, BLOCK_M, BLOCK_C,
            )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def affine(  # type: ignore[no-untyped-def]
    x, y, residual, vectors, weight, bias, RELU: tl.constexpr, REVERSED: tl.constexpr,
    eps, N, units, other, size, groups, splits, tiles,
    ROWS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C, S = units * UNIT if ROWS else other, other if ROWS else units * UNIT
    pid = tl.num_programs(0) - 1 - tl.program_id(0) if REVERSED else tl.program_id(0)
    _, split, g, c, count = _place(pid, N, C, S, size, splits, BLOCK_C, WIDE)
    group = g.to(tl.int64) * size * C * S
    mean, _, _, _, a, b = _constants(vectors, weight, bias, g, groups, c, C, BLOCK_C)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(count, BLOCK_M).to(tl.int32))):
        offsets, there = _tile(tile, c, count, C, S, ROWS, BLOCK_M, WIDE)
        offsets += group
        v = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
        out = _normalised(v, mean, a, b, residual, offsets, there, RELU)
        tl.store(y + offsets, out.to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_COUNTS)
def sums(  # type: ignore[no-untyped-def]
    x, dy, y, masked, vectors, weight, bias, totals, partials, counters, dweight, dbias, RELU: tl.constexpr,
    eps, N, units, other, size, groups, splits, tiles,
    ROWS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """S1 = sum(dy), S2 = sum(dy * (x - mean)), and the gradients of weight and bias, which follow from them."""
    C, S = units * UNIT if ROWS else other, other if ROWS else units * UNIT
    block, split, g, c, count = _place(tl.program_id(0), N, C, S, size, splits, BLOCK_C, WIDE)
    group = g.to(tl.int64) * size * C * S
    mean, _, _, _, a, b = _constants(vectors, weight, bias, g, groups, c, C, BLOCK_C)
    s1, s2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32), tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(count, BLOCK_M).to(tl.int32))):
        offsets, there = _tile(tile, c, count, C, S, ROWS, BLOCK_M, WIDE)
        offsets += group
        v = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
        grad = tl.load(dy + offsets, mask=there, other=0.0).to(tl.float32)
        grad = _through_relu(grad, v, mean, a, b, y, offsets, there, x.dtype.element_ty, RELU)
        if masked is not None:
            tl.store(masked + offsets, grad.to(x.dtype.element_ty), mask=there)
        s1 += grad
        s2 += tl.where(there, grad * (v - mean[None, :]), 0.0)
    at = partials + (g * splits + split) * C + c
    tl.store(at, tl.sum(s1, 0), mask=c < C)
    tl.store(at + groups * splits * C, tl.sum(s2, 0), mask=c < C)

    blocks = tl.cdiv(C, BLOCK_C)
    if _last_of(counters + g * blocks + block, splits):
        s1_all, s2_all = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
        for first in range(0, splits, BLOCK_M):
            s = first + tl.arange(0, BLOCK_M)
            some = (s < splits)[:, None] & (c < C)[None, :]
            read = partials + ((g * splits + s) * C)[:, None] + c[None, :]
            s1_all += tl.sum(tl.load(read, mask=some, other=0.0, cache_modifier=".cg"), 0)
            s2_all += tl.sum(tl.load(read + groups * splits * C, mask=some, other=0.0, cache_modifier=".cg"), 0)
        tl.store(totals + g * C + c, s1_all, mask=c < C)
        tl.store(totals + (groups + g) * C + c, s2_all, mask=c < C)
        _parameters(totals, counters, vectors, dweight, dbias, block, groups, c, C, BLOCK_M, BLOCK_C)


@triton.jit
def _parameters(  # type: ignore[no-untyped-def]
    totals, counters, vectors, dweight, dbias, block, groups, c, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Called once for every group: the last one sums over them."""
    if dweight is not None or dbias is not None:  # noqa: SIM102, known to the compiler
        if _last_of(counters + groups * tl.cdiv(C, BLOCK_C) + block, groups):
            dw, db = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
            for first in range(0, groups, BLOCK_M):
                g = first + tl.arange(0, BLOCK_M)
                some = (g < groups)[:, None] & (c < C)[None, :]
                at = g[:, None] * C + c[None, :]
                s1 = tl.load(totals + at, mask=some, other=0.0, cache_modifier=".cg")
                s2 = tl.load(totals + groups * C + at, mask=some, other=0.0, cache_modifier=".cg")
                std = tl.load(vectors + 2 * groups * C + at, mask=some, other=1.0)
                scale = tl.load(vectors + 3 * groups * C + at, mask=some, other=0.0)
                shift = tl.load(vectors + 4 * groups * C + at, mask=some, other=0.0)
                dw += tl.sum(s2 / std * scale + s1 * shift, 0)
                db += tl.sum(s1, 0)
            if dweight is not None:
                tl.store(dweight + c, dw.to(dweight.dtype.element_ty), mask=c < C)
            if dbias is not None:
                tl.store(dbias + c, db.to(dbias.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=_COUNTS)
def gradient(  # type: ignore[no-untyped-def]
    x, dy, y, dx, vectors, weight, bias, totals, RELU: tl.constexpr, REVERSED: tl.constexpr,
    eps, N, units, other, size, groups, splits, tiles,
    ROWS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C, S = units * UNIT if ROWS else other, other if ROWS else units * UNIT
    pid = tl.num_programs(0) - 1 - tl.program_id(0) if REVERSED else tl.program_id(0)
    _, split, g, c, count = _place(pid, N, C, S, size, splits, BLOCK_C, WIDE)
    group = g.to(tl.int64) * size * C * S
    mean, std, _, _, a, b = _constants(vectors, weight, bias, g, groups, c, C, BLOCK_C)
    n = count.to(tl.float32)
    p = tl.load(totals + g * C + c, mask=c < C, other=0.0) / n
    q = tl.load(totals + (groups + g) * C + c, mask=c < C, other=0.0) / (n * std * std)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(count, BLOCK_M).to(tl.int32))):
        offsets, there = _tile(tile, c, count, C, S, ROWS, BLOCK_M, WIDE)
        offsets += group
        v = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
        grad = tl.load(dy + offsets, mask=there, other=0.0).to(tl.float32)
        grad = _through_relu(grad, v, mean, a, b, y, offsets, there, x.dtype.element_ty, RELU)
        out = a[None, :] * (grad - p[None, :] - (v - mean[None, :]) * q[None, :])
        tl.store(dx + offsets, out.to(dx.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_STEPS)
def forward_in_one(  # type: ignore[no-untyped-def]
    x, y, residual, vectors, weight, bias, counters,
    running_mean, running_var, step, alpha, window, r_max, d_max, warmup, d_full, r_full, FALLING: tl.constexpr,
    RELU: tl.constexpr,
    eps, N, units, other, size, groups, splits, tiles,
    ROWS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`statistics` and `affine` where a tile holds all elements of a group's channels: x is read once."""
    C, S = units * UNIT if ROWS else other, other if ROWS else units * UNIT
    block, _, g, c, count = _place(tl.program_id(0), N, C, S, size, splits, BLOCK_C, WIDE)
    group = g.to(tl.int64) * size * C * S
    offsets, there = _tile(tl.full([], 0, tl.int32), c, count, C, S, ROWS, BLOCK_M, WIDE)
    offsets += group
    v = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
    n = count.to(tl.float32)
    mean = tl.sum(v, 0) / n
    mean += tl.sum(tl.where(there, v - mean[None, :], 0.0), 0) / n
    off = tl.where(there, v - mean[None, :], 0.0)
    var = tl.sum(off * off, 0) / n
    std = tl.sqrt_rn(var + eps)
    at = vectors + g * C + c
    tl.store(at, mean, mask=c < C)
    tl.store(at + groups * C, var, mask=c < C)
    tl.store(at + 2 * groups * C, std, mask=c < C)
    r, d = _correct(
        mean, std, vectors, running_mean, running_var, step, r_max, d_max, warmup, d_full, r_full, eps,
        g, groups, c, C,
    )  # fmt: skip
    w = _vector(weight, c, C, 1.0, BLOCK_C)
    a, b = tl.div_rn(r, std) * w, d * w + _vector(bias, c, C, 0.0, BLOCK_C)
    out = _normalised(v, mean, a, b, residual, offsets, there, RELU)
    tl.store(y + offsets, out.to(y.dtype.element_ty), mask=there)
    _move(
        vectors, counters, running_mean, running_var, step, alpha, window, eps, block, groups, c, C,
        FALLING, BLOCK_M, BLOCK_C,
    )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def backward_in_one(  # type: ignore[no-untyped-def]
    x, dy, y, masked, dx, vectors, weight, bias, totals, counters, dweight, dbias, RELU: tl.constexpr,
    eps, N, units, other, size, groups, splits, tiles,
    ROWS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`sums` and `gradient`, x and dy read once."""
    C, S = units * UNIT if ROWS else other, other if ROWS else units * UNIT
    block, _, g, c, count = _place(tl.program_id(0), N, C, S, size, splits, BLOCK_C, WIDE)
    group = g.to(tl.int64) * size * C * S
    mean, std, _, _, a, b = _constants(vectors, weight, bias, g, groups, c, C, BLOCK_C)
    offsets, there = _tile(tl.full([], 0, tl.int32), c, count, C, S, ROWS, BLOCK_M, WIDE)
    offsets += group
    v = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
    grad = tl.load(dy + offsets, mask=there, other=0.0).to(tl.float32)
    grad = _through_relu(grad, v, mean, a, b, y, offsets, there, x.dtype.element_ty, RELU)
    if masked is not None:
        tl.store(masked + offsets, grad.to(x.dtype.element_ty), mask=there)
    off = tl.where(there, v - mean[None, :], 0.0)
    s1, s2 = tl.sum(grad, 0), tl.sum(grad * off, 0)
    if dx is not None:
        n = count.to(tl.float32)
        out = a[None, :] * (grad - (s1 / n)[None, :] - off * (s2 / (n * std * std))[None, :])
        tl.store(dx + offsets, out.to(dx.dtype.element_ty), mask=there)
    tl.store(totals + g * C + c, s1, mask=c < C)
    tl.store(totals + (groups + g) * C + c, s2, mask=c < C)
    _parameters(totals, counters, vectors, dweight, dbias, block, groups, c, C, BLOCK_M, BLOCK_C)
