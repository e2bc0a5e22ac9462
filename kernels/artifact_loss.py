"""The artifact loss: bilinear up-sampling, sigmoid and a pooled confidence per picture, in one pass over the logits.

Each program owns a block of logits of one picture. It visits the up-sampled pixels that a logit takes part in, so the
gradient is gathered (no atomics, the same bits twice); a pixel counts towards the loss at the logit in whose cell it
lies. What is kept for backward, `unit_grad`, is the gradient before the division by the pooled weight, the size of the
logits. `max` needs the peak first, so its gradient takes a second launch.
"""

import triton
import triton.language as tl

from .common import arrives_last, as_scalar, column_sum, rounded_product, to_storage

BLOCK = 128  # logits of a program: one per thread, each visits its window of the up-sampled map

# The values of diffdoctor.lowering.artifact_loss.ARTIFACT_METHODS and .plan.REDUCTIONS.
_THRESHOLD = tl.constexpr(0)
_SUM = tl.constexpr(2)
_MAX = tl.constexpr(3)
_MEAN_OF_SAMPLES = tl.constexpr(0)
_PER_SAMPLE = tl.constexpr(1)
_EPSILON = tl.constexpr(1e-5)


@triton.jit
def _taps(position, size, scale, ACC: tl.constexpr):
    """Lower and upper tap of an up-sampled position (align_corners=False), the upper one's share, and its cell."""
    centre = position.to(ACC) + 0.5
    src = tl.maximum(rounded_product(centre, scale) - 0.5, 0.0)
    lower = tl.minimum(src.to(tl.int32), size - 1)
    share = tl.minimum(tl.maximum(src - lower.to(ACC), 0.0), 1.0)
    owner = tl.minimum((centre * scale).to(tl.int32), size - 1)
    return lower, tl.minimum(lower + 1, size - 1), share, owner


@triton.jit
def _blend(low, high, share):
    """low·(1 − share) + high·share, its rounding spelled out: `max` finds its peak again by equality.

    A share of 0 is low itself: an infinite neighbour does not reach a map that is not enlarged.
    """
    return tl.where(share == 0, low, tl.fma(high, share, low * (1.0 - share)))


@triton.jit
def _window_start(index, size, out_size, slack, GATHER: tl.constexpr):
    """First up-sampled position that has `index` among its taps (GATHER) or lies in its cell."""
    reach = 2 * index.to(tl.int64) - (1 if GATHER else 0)
    # The smallest Y with (2Y + 1) · size ≥ reach · out_size; what would lie before 0 rounds to 0.
    first = (reach * out_size + size - 1) // (2 * size) - slack
    return tl.maximum(first, 0).to(tl.int32)


@triton.jit
def _row(row_ptr, j, w, stride_x, inside, ACC: tl.constexpr):
    """A logit's left neighbour, the logit, its right neighbour; the border repeats."""
    left = tl.load(row_ptr + tl.maximum(j - 1, 0).to(tl.int64) * stride_x, mask=inside, other=0.0)
    middle = tl.load(row_ptr + j.to(tl.int64) * stride_x, mask=inside, other=0.0)
    right = tl.load(row_ptr + tl.minimum(j + 1, w - 1).to(tl.int64) * stride_x, mask=inside, other=0.0)
    return left.to(ACC), middle.to(ACC), right.to(ACC)


@triton.jit
def _visit(logits_ptr, index, inside, h, w, out_h, out_w, stride_y, stride_x, scale_y, scale_x, tau, peak,
           window_y, window_x, slack,
           METHOD: tl.constexpr, VALUE: tl.constexpr, GATHER: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Per logit: the pooled confidence and weight of its cell (for `max` the peak and its ties), and its gradient."""
    i = index // w
    j = index % w
    above_ptr = logits_ptr + tl.maximum(i - 1, 0).to(tl.int64) * stride_y
    below_ptr = logits_ptr + tl.minimum(i + 1, h - 1).to(tl.int64) * stride_y
    above_l, above_m, above_r = _row(above_ptr, j, w, stride_x, inside, ACC)
    here_l, here_m, here_r = _row(logits_ptr + i.to(tl.int64) * stride_y, j, w, stride_x, inside, ACC)
    below_l, below_m, below_r = _row(below_ptr, j, w, stride_x, inside, ACC)
    start_y = _window_start(i, h, out_h, slack, GATHER)
    start_x = _window_start(j, w, out_w, slack, GATHER)
    pooled = tl.zeros_like(here_m)
    if METHOD == _MAX:
        pooled -= 1.0
    weight = tl.zeros_like(here_m)
    gradient = tl.zeros_like(here_m)

    for dy in range(window_y):
        y = start_y + dy
        y_low, y_high, share_y, owner_y = _taps(y, h, scale_y, ACC)
        inner_y = y_low == i
        left = _blend(tl.where(inner_y, here_l, above_l), tl.where(inner_y, below_l, here_l), share_y)
        middle = _blend(tl.where(inner_y, here_m, above_m), tl.where(inner_y, below_m, here_m), share_y)
        right = _blend(tl.where(inner_y, here_r, above_r), tl.where(inner_y, below_r, here_r), share_y)
        tap_y = tl.where(inner_y, 1.0 - share_y, 0.0) + tl.where(y_high == i, share_y, 0.0)
        inside_y = inside & (y < out_h)
        owned_y = inside_y & (owner_y == i)
        for dx in range(window_x):
            x = start_x + dx
            x_low, x_high, share_x, owner_x = _taps(x, w, scale_x, ACC)
            inner_x = x_low == j
            z = _blend(tl.where(inner_x, middle, left), tl.where(inner_x, right, middle), share_x)
            c = 1.0 / (1.0 + tl.exp(-z))
            chosen = x < out_w
            slopes = chosen
            if METHOD == _THRESHOLD:
                slopes = chosen & ((c > tau) | (c != c))  # a NaN does not count, but its gradient is NaN
                chosen = chosen & (c > tau)
            if VALUE:
                owned = owned_y & chosen & (owner_x == j)
                if METHOD == _MAX:
                    weight = tl.where(owned, tl.where(c > pooled, 1.0, weight + (c == pooled).to(ACC)), weight)
                    pooled = tl.where(owned & ((c > pooled) | (c != c)), c, pooled)
                else:
                    pooled += tl.where(owned, c, 0.0)
                    weight += tl.where(owned, 1.0, 0.0)
            if GATHER:
                if METHOD == _MAX:
                    slopes = slopes & (c == peak)
                tap_x = tl.where(inner_x, 1.0 - share_x, 0.0) + tl.where(x_high == j, share_x, 0.0)
                tap = tap_y * tap_x
                gradient += tl.where(inside_y & slopes & (tap != 0.0), tap * (c * (1.0 - c)), 0.0)
    return pooled, weight, gradient


@triton.jit
def _highest(values):
    """The maximum of a block, NaN where there is one (tl.max passes NaN by)."""
    return tl.where(tl.sum(tl.where(values != values, 1.0, 0.0), 0) > 0, float("nan"), tl.max(values, 0))


@triton.jit
def _pool_sample(partial_ptr, n_tiles, METHOD: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """A picture's loss and its weight (the ties of `max`) from the partial results of its programs."""
    if METHOD == _MAX:
        highest = tl.full([BLOCK], -1.0, ACC)
        for start in range(0, n_tiles, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            peaks = tl.load(partial_ptr + 2 * offs, mask=offs < n_tiles, other=-1.0, cache_modifier=".cg")
            highest = tl.where((peaks > highest) | (peaks != peaks), peaks, highest)
        value = _highest(highest)
        ties = tl.zeros([BLOCK], ACC)
        for start in range(0, n_tiles, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            at_peak = tl.load(partial_ptr + 2 * offs, mask=offs < n_tiles, other=-1.0, cache_modifier=".cg") == value
            ties += tl.load(partial_ptr + 2 * offs + 1, mask=at_peak, other=0.0, cache_modifier=".cg")
        weight = tl.sum(ties, 0)
    else:
        value = column_sum(partial_ptr, n_tiles, 2, ACC, BLOCK)
        weight = column_sum(partial_ptr + 1, n_tiles, 2, ACC, BLOCK)
    return value, weight


_SHAPE = ["batch", "n_tiles", "h", "w", "out_h", "out_w", "stride_b", "stride_y", "window_y", "window_x", "slack"]


@triton.jit(do_not_specialize=_SHAPE)
def artifact_loss_kernel(
    logits_ptr,  # (batch, h, w), any strides
    unit_grad_ptr,  # (batch, h, w) in ACC, written when GATHER
    factor_ptr,  # (batch,) in ACC: gradient of logits = g · factor · unit_grad; None where none is wanted
    loss_ptr,  # () or (batch,) in ACC
    partial_ptr,  # (batch, n_tiles, 2) and (batch,) in ACC; the latter hold the pictures' losses (of `max`: peaks)
    counter_ptr,  # (batch + 1) int32 zeros
    batch, n_tiles, h, w, out_h, out_w,
    stride_b, stride_y, stride_x,
    scale_y: tl.float64, scale_x: tl.float64, tau: tl.float64,
    window_y, window_x, slack,
    METHOD: tl.constexpr, REDUCTION: tl.constexpr, GATHER: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // n_tiles).to(tl.int64)
    tile = tl.program_id(0) % n_tiles
    index = tile * BLOCK + tl.arange(0, BLOCK)
    inside = index < h * w
    pooled, weight, gradient = _visit(
        logits_ptr + b * stride_b, index, inside, h, w, out_h, out_w, stride_y, stride_x,
        as_scalar(scale_y, ACC), as_scalar(scale_x, ACC), as_scalar(as_scalar(tau, tl.float32), ACC), 0.0,
        window_y, window_x, slack, METHOD, True, GATHER, ACC)  # fmt: skip
    if GATHER:
        tl.store(unit_grad_ptr + b * h * w + index, gradient, mask=inside)
    pictures_ptr = partial_ptr + batch.to(tl.int64) * n_tiles * 2
    partial_ptr += b * n_tiles * 2
    if METHOD == _MAX:
        value = _highest(pooled)
        tl.store(partial_ptr + 2 * tile, value)
        tl.store(partial_ptr + 2 * tile + 1, tl.sum(tl.where(pooled == value, weight, 0.0), 0))
    else:
        tl.store(partial_ptr + 2 * tile, tl.sum(pooled, 0))
        tl.store(partial_ptr + 2 * tile + 1, tl.sum(weight, 0))

    if arrives_last(counter_ptr + b, n_tiles):
        value, total = _pool_sample(partial_ptr, n_tiles, METHOD, ACC, BLOCK)
        factor = as_scalar(1.0, ACC)
        if METHOD == _THRESHOLD:
            factor = 1.0 / (total + _EPSILON)
        elif METHOD != _SUM:
            factor = 1.0 / total
        if METHOD != _MAX:
            value *= factor
        if REDUCTION == _MEAN_OF_SAMPLES:
            factor /= batch
        if factor_ptr is not None:
            tl.store(factor_ptr + b, factor)
        tl.store(pictures_ptr + b, value)
        if REDUCTION == _PER_SAMPLE:
            tl.store(loss_ptr + b, value)
        elif arrives_last(counter_ptr + batch, batch):
            loss = column_sum(pictures_ptr, batch, 1, ACC, BLOCK)
            if REDUCTION == _MEAN_OF_SAMPLES:
                loss /= batch
            tl.store(loss_ptr, loss)


@triton.jit(do_not_specialize=_SHAPE[1:])
def artifact_peak_kernel(
    logits_ptr,  # (batch, h, w), any strides
    unit_grad_ptr,  # (batch, h, w) in ACC
    peak_ptr,  # (batch,) in ACC
    n_tiles, h, w, out_h, out_w,
    stride_b, stride_y, stride_x,
    scale_y: tl.float64, scale_x: tl.float64, tau: tl.float64,
    window_y, window_x, slack,
    GATHER: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is kept for `max`: the gradient at every pixel that equals the peak the forward kernel found."""
    b = (tl.program_id(0) // n_tiles).to(tl.int64)
    index = tl.program_id(0) % n_tiles * BLOCK + tl.arange(0, BLOCK)
    inside = index < h * w
    _, _, gradient = _visit(
        logits_ptr + b * stride_b, index, inside, h, w, out_h, out_w, stride_y, stride_x,
        as_scalar(scale_y, ACC), as_scalar(scale_x, ACC), as_scalar(tau, ACC), tl.load(peak_ptr + b),
        window_y, window_x, slack, _MAX, False, GATHER, ACC)  # fmt: skip
    tl.store(unit_grad_ptr + b * h * w + index, gradient, mask=inside)


@triton.jit(do_not_specialize=["n_tiles", "g_stride"])
def artifact_scale_kernel(
    unit_grad_ptr,  # (batch, n) in ACC
    factor_ptr,  # (batch,) in ACC
    g_ptr,  # the loss's gradient: one number (g_stride 0) or (batch,)
    out_ptr,  # (batch, n) in the logits' dtype
    n, n_tiles, g_stride,
    BLOCK: tl.constexpr, ROUND_BF16: tl.constexpr,
):  # fmt: skip
    """The logits' gradient."""
    b = (tl.program_id(0) // n_tiles).to(tl.int64)
    offs = tl.program_id(0) % n_tiles * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(factor_ptr + b)
    factor *= tl.load(g_ptr + b * g_stride).to(factor.dtype)
    gradient = tl.load(unit_grad_ptr + b * n + offs, mask=offs < n, other=0.0) * factor
    tl.store(out_ptr + b * n + offs, to_storage(gradient, out_ptr.dtype.element_ty, ROUND_BF16), mask=offs < n)


def windows(h, w, out_h, out_w, gathers):
    """Positions to visit per logit along y and x, and the slack on either side for ratios that round in fp32."""
    slack = 0
    for small, large in ((min(h, out_h), max(h, out_h)), (min(w, out_w), max(w, out_w))):
        if large % small or (large // small).bit_count() != 1:
            slack = 1
    taps = 2 if gathers else 1
    return -(-taps * out_h // h) + 2 * slack, -(-taps * out_w // w) + 2 * slack, slack
