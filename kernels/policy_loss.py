"""policy_loss in one pass: loss, gradient of model_pred and statistics, with the maps resampled in the kernel.

A sample's elements form the box of kernels/weighted_loss.py, its free dim the channels. A program owns a tile of
outer × inner pixels with all their channels: the sum over these gives a pixel's ratio, and the ratio its channels'
gradients. The residuals of a block of channels stay in registers between the two; others are read again, from the
cache.

Level "sample" takes two launches: the first adds up what the samples' ratios are made of.
"""

import triton
import triton.language as tl

from .common import arrives_last, as_scalar, column_sum, to_storage
from .resample import ABSENT
from .weighted_loss import count_of, decode, finish_loss, map_at, number_of, read_operand, tile_offset, tile_sum

MEAN = tl.constexpr(0)
SAMPLE = tl.constexpr(1)
# Columns of a program's partial sums: the loss, and those of csrc/common/policy_loss_params.h; the moments.
COLUMNS = tl.constexpr(7)
SUM_COLUMNS = tl.constexpr(6)
LARGEST = tl.constexpr(2)
MOMENTS = tl.constexpr(4)

# What a launch is for.
PIXEL_LEVEL, SAMPLE_MOMENTS, SAMPLE_LEVEL, LOG_PROB = (tl.constexpr(k) for k in range(4))
# Where the old log-probability comes from.
OLD_IS_NEW, OLD_PER_SAMPLE = tl.constexpr(0), tl.constexpr(1)
# Bits of `tensor_bits` and `batched_bits`, as in kernels/weighted_loss.py.
A, B, SIGMA, OLD_MEAN, GRAD_OUTPUT = (tl.constexpr(k) for k in range(5))


@triton.jit
def column_max(partial_ptr, count, stride, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The largest of `count` partial results `stride` apart, at least 0."""
    largest = tl.zeros([BLOCK], ACC)
    for start in range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        other = tl.load(partial_ptr + offs.to(tl.int64) * stride, mask=offs < count, other=0.0, cache_modifier=".cg")
        largest = tl.maximum(largest, other)
    return tl.max(largest, 0)


@triton.jit
def _residual(pred, latents_ptr, next_ptr, latents_tile, next_tile, latents_strides, next_strides, a, b, free, present,
              sizes, LATENTS_UNIT: tl.constexpr, NEXT_UNIT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """next_latents - a latents - b model_pred; 0 where nothing is."""
    latents = read_operand(latents_ptr, latents_tile, free, present, sizes, latents_strides, ACC, LATENTS_UNIT)
    drawn = read_operand(next_ptr, next_tile, free, present, sizes, next_strides, ACC, NEXT_UNIT)
    return drawn - a * latents - b * pred


@triton.jit
def _store_gradient(grad_ptr, grad_tile, free, present, sizes, grad_strides, slope, d, kl_slope, away,
                    KL: tl.constexpr, UNIT: tl.constexpr, ROUND_BF16: tl.constexpr):  # fmt: skip
    grad = tl.where(slope == 0, 0.0, slope * d)
    if KL:
        grad += tl.where(kl_slope == 0, 0.0, kl_slope * away)
    offset = grad_tile + decode(free, sizes[1], grad_strides[1], UNIT)
    tl.store(grad_ptr + offset, to_storage(grad, grad_ptr.dtype.element_ty, ROUND_BF16), mask=present)


_NOT_SPECIALIZED = ["batch", "programs", "steps", "inner_blocks", "tensor_bits", "batched_bits", "mode", "reduction"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def policy_loss_kernel(
    pred_ptr, grad_ptr, latents_ptr, next_ptr, ref_ptr,
    log_prob_ptr,  # the old one, or with LOG_PROB the result
    advantage_ptr, mask_ptr,
    loss_ptr,  # () or (batch,) in ACC
    sums_ptr,  # (batch, SUM_COLUMNS) in ACC
    moments_ptr,  # (batch, MOMENTS) in ACC: what SAMPLE_MOMENTS leaves for SAMPLE_LEVEL
    partial_ptr,  # (batch, programs, COLUMNS or MOMENTS) and (batch,) in ACC
    counter_ptr,  # (batch + 1) int32 zeros
    number_ptrs,  # per-sample numbers in ACC, in the order of A, B ...
    batch, outer_count, free_count, inner_count, programs, steps, inner_blocks,
    sizes, pred_strides, grad_strides, latents_strides, next_strides, ref_strides,  # (outer, free, inner)
    log_prob_strides, advantage_strides, mask_strides, coords,
    batch_strides,  # pred, grad, latents, next, ref, log_prob, advantage, mask
    advantage_axes, mask_axes,  # see resample.py
    map_grid, mode, reduction, tensor_bits, batched_bits,
    a: tl.float64, b: tl.float64, sigma: tl.float64, old_mean: tl.float64, grad_output: tl.float64,
    low: tl.float64, high: tl.float64,  # bounds of the ratio
    most: tl.float64,  # of the advantage
    kl_weight: tl.float64,
    STAGE: tl.constexpr, OLD: tl.constexpr, LOSS: tl.constexpr, GRAD: tl.constexpr, SUMS: tl.constexpr,
    KL: tl.constexpr,  # there is a ref_pred
    ADVANTAGE: tl.constexpr, MASK: tl.constexpr,
    HELD: tl.constexpr,  # a block holds all channels
    BLOCK_OUTER: tl.constexpr, BLOCK_FREE: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_PARTIAL: tl.constexpr,
    COUNT_UNITS: tl.constexpr,
    PRED_UNITS: tl.constexpr, GRAD_UNITS: tl.constexpr, LATENTS_UNITS: tl.constexpr, NEXT_UNITS: tl.constexpr,
    REF_UNITS: tl.constexpr,
    ACC: tl.constexpr, IDX: tl.constexpr, ROUND_BF16: tl.constexpr,
):  # fmt: skip
    index = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    n_outer = count_of(outer_count, COUNT_UNITS[0], IDX)
    n_free = count_of(free_count, COUNT_UNITS[1], IDX)
    n_inner = count_of(inner_count, COUNT_UNITS[2], IDX)
    outer = ((program // inner_blocks).to(IDX) * BLOCK_OUTER + tl.arange(0, BLOCK_OUTER))[:, None, None]
    inner = ((program % inner_blocks).to(IDX) * BLOCK_INNER + tl.arange(0, BLOCK_INNER))[None, None, :]
    inside = (outer < n_outer) & (inner < n_inner)

    zero = tl.zeros([BLOCK_OUTER, 1, BLOCK_INNER], ACC)
    a = number_of(number_ptrs, tensor_bits, batched_bits, a, index, A, ACC)
    b = number_of(number_ptrs, tensor_bits, batched_bits, b, index, B, ACC)
    # Tiles, not scalars: the interpreter cannot spread the result of a scalar comparison over a tile.
    deviation = zero + number_of(number_ptrs, tensor_bits, batched_bits, sigma, index, SIGMA, ACC)
    inverse = tl.where(deviation == 0, 0.0, 1.0 / deviation)
    channels = as_scalar(n_free, ACC)
    scale = b * inverse

    pred_ptr += index * batch_strides[0]
    latents_ptr += index * batch_strides[2]
    next_ptr += index * batch_strides[3]
    pred_tile = tile_offset(outer, inner, sizes, pred_strides, PRED_UNITS[0], PRED_UNITS[2])
    latents_tile = tile_offset(outer, inner, sizes, latents_strides, LATENTS_UNITS[0], LATENTS_UNITS[2])
    next_tile = tile_offset(outer, inner, sizes, next_strides, NEXT_UNITS[0], NEXT_UNITS[2])
    if KL:
        ref_ptr += index * batch_strides[4]
        ref_tile = tile_offset(outer, inner, sizes, ref_strides, REF_UNITS[0], REF_UNITS[2])

    # The first block of channels is held; what else there is is gone through twice.
    free = tl.arange(0, BLOCK_FREE).to(IDX)[None, :, None]
    present = inside & (free < n_free)
    pred = read_operand(pred_ptr, pred_tile, free, present, sizes, pred_strides, ACC, PRED_UNITS[1])
    d = _residual(pred, latents_ptr, next_ptr, latents_tile, next_tile, latents_strides, next_strides, a, b, free,
                  present, sizes, LATENTS_UNITS[1], NEXT_UNITS[1], ACC)  # fmt: skip
    away = d
    if KL:
        away = pred - read_operand(ref_ptr, ref_tile, free, present, sizes, ref_strides, ACC, REF_UNITS[1])
    squares, away_squares = d * d, away * away
    if not HELD:
        for step in range(1, steps):
            later = (step * BLOCK_FREE + tl.arange(0, BLOCK_FREE)).to(IDX)[None, :, None]
            there = inside & (later < n_free)
            later_pred = read_operand(pred_ptr, pred_tile, later, there, sizes, pred_strides, ACC, PRED_UNITS[1])
            later_d = _residual(
                later_pred, latents_ptr, next_ptr, latents_tile, next_tile, latents_strides, next_strides, a, b, later,
                there, sizes, LATENTS_UNITS[1], NEXT_UNITS[1], ACC)  # fmt: skip
            squares += later_d * later_d
            if KL:
                later_away = later_pred - read_operand(
                    ref_ptr, ref_tile, later, there, sizes, ref_strides, ACC, REF_UNITS[1])  # fmt: skip
                away_squares += later_away * later_away
    log_prob = -0.5 * (tl.sum(squares, 1, keep_dims=True) * inverse) * inverse / channels
    log_prob_offset = index * batch_strides[5] + tile_offset(outer, inner, sizes, log_prob_strides, 1, 1)

    if STAGE == LOG_PROB:
        tl.store(log_prob_ptr + log_prob_offset, tl.where(deviation == 0, 0.0, log_prob), mask=inside)
    else:
        k = map_at(mask_ptr, index, batch_strides[7], mask_strides, mask_axes, mode, 1.0, outer, inner, inside, sizes,
                   coords, map_grid, MASK, ACC)  # fmt: skip
        if MASK != ABSENT:
            k = tl.where(k > 0, tl.minimum(k, 1.0), 0.0)
        k = tl.where(deviation == 0, 0.0, k)
        counted = inside & (k != 0)
        given = map_at(advantage_ptr, index, batch_strides[6], advantage_strides, advantage_axes, mode, 0.0, outer,
                       inner, inside, sizes, coords, map_grid, ADVANTAGE, ACC)  # fmt: skip
        most = as_scalar(most, ACC)
        advantage = tl.where(given < -most, -most, given)
        advantage = tl.where(advantage > most, most, advantage)
        advantage = tl.where(advantage == advantage, advantage, 0.0)
        if OLD == OLD_IS_NEW:
            change = log_prob - log_prob
        elif OLD == OLD_PER_SAMPLE:
            change = log_prob - number_of(number_ptrs, tensor_bits, batched_bits, old_mean, index, OLD_MEAN, ACC)
        else:
            change = log_prob - tl.load(log_prob_ptr + log_prob_offset, mask=inside, other=0.0).to(ACC)

        if STAGE == SAMPLE_MOMENTS:
            rows_ptr = partial_ptr + index * programs * MOMENTS
            weighted = k * advantage
            tl.store(rows_ptr + program * MOMENTS, tile_sum(tl.where(counted, k * change, 0.0)))
            tl.store(rows_ptr + program * MOMENTS + 1, tile_sum(tl.where(counted, k, 0.0)))
            tl.store(rows_ptr + program * MOMENTS + 2, tile_sum(tl.where(counted & (advantage > 0), weighted, 0.0)))
            tl.store(rows_ptr + program * MOMENTS + 3, tile_sum(tl.where(counted & (advantage < 0), weighted, 0.0)))
            if arrives_last(counter_ptr + index, programs):
                for column in tl.static_range(MOMENTS):
                    tl.store(moments_ptr + index * MOMENTS + column,
                             column_sum(rows_ptr + column, programs, MOMENTS, ACC, BLOCK_PARTIAL))  # fmt: skip
        else:
            low, high = as_scalar(low, ACC), as_scalar(high, ACC)
            if STAGE == SAMPLE_LEVEL:
                weight = zero + tl.load(moments_ptr + index * MOMENTS + 1)
                divisor = tl.where(weight == 0, 1.0, weight)
                ratio = tl.exp((zero + tl.load(moments_ptr + index * MOMENTS)) / divisor)
            else:
                ratio = tl.exp(change)
            plain = -advantage * ratio
            above = tl.where(ratio < low, low, ratio)
            clipped = -advantage * tl.where(above > high, high, above)
            acts = advantage != 0
            cut = acts & (plain < clipped)
            loss = tl.where(acts, tl.where(cut, clipped, plain), 0.0)
            slope = tl.where(acts & (plain >= clipped), plain, 0.0)
            slope = tl.where(acts & (plain != plain), plain, slope)
            if STAGE == SAMPLE_LEVEL:
                # A ratio that is NaN is taken.
                positive = tl.where(ratio > high, 0.0, tl.load(moments_ptr + index * MOMENTS + 2))
                negative = tl.where(ratio < low, 0.0, tl.load(moments_ptr + index * MOMENTS + 3))
                slope = tl.where(positive + negative == 0, 0.0, -(positive + negative) / divisor * ratio)
            strength = as_scalar(kl_weight, ACC)
            kl = zero
            if KL:
                kl = 0.5 * tl.sum(away_squares, 1, keep_dims=True) * scale * scale / channels
                loss += tl.where(zero + strength == 0, 0.0, strength * kl)
            pixels = as_scalar(n_outer, ACC) * as_scalar(n_inner, ACC)
            if GRAD:
                g = number_of(number_ptrs, tensor_bits, batched_bits, grad_output, index, GRAD_OUTPUT, ACC) / channels
                if reduction == MEAN:
                    g = g / (pixels * batch)
                elif reduction == SAMPLE:
                    g = g / pixels
                slope = tl.where(counted & (slope != 0), k * slope * (g * scale * inverse), 0.0)
                kl_slope = tl.where(counted, k * strength * (g * scale * scale), 0.0)
                grad_ptr += index * batch_strides[1]
                grad_tile = tile_offset(outer, inner, sizes, grad_strides, GRAD_UNITS[0], GRAD_UNITS[2])
                _store_gradient(grad_ptr, grad_tile, free, present, sizes, grad_strides, slope, d, kl_slope, away, KL,
                                GRAD_UNITS[1], ROUND_BF16)  # fmt: skip
                if not HELD:
                    for step in range(1, steps):
                        later = (step * BLOCK_FREE + tl.arange(0, BLOCK_FREE)).to(IDX)[None, :, None]
                        there = inside & (later < n_free)
                        later_pred = read_operand(
                            pred_ptr, pred_tile, later, there, sizes, pred_strides, ACC, PRED_UNITS[1])  # fmt: skip
                        later_d = _residual(
                            later_pred, latents_ptr, next_ptr, latents_tile, next_tile, latents_strides, next_strides,
                            a, b, later, there, sizes, LATENTS_UNITS[1], NEXT_UNITS[1], ACC)  # fmt: skip
                        later_away = later_d
                        if KL:
                            later_away = later_pred - read_operand(
                                ref_ptr, ref_tile, later, there, sizes, ref_strides, ACC, REF_UNITS[1])  # fmt: skip
                        _store_gradient(grad_ptr, grad_tile, later, there, sizes, grad_strides, slope, later_d,
                                        kl_slope, later_away, KL, GRAD_UNITS[1], ROUND_BF16)  # fmt: skip
            if LOSS or SUMS:
                rows_ptr = partial_ptr + index * programs * COLUMNS
                own_ptr = rows_ptr + program * COLUMNS
                tl.store(own_ptr, tile_sum(tl.where(counted, k * loss, 0.0)))
                if SUMS:
                    numbers = tl.where(counted & (ratio == ratio), ratio, 0.0)
                    odd = counted & ((loss - loss != 0) | (given != given))
                    tl.store(own_ptr + 1, tile_sum(counted.to(ACC)))
                    tl.store(own_ptr + 2, tile_sum(tl.where(counted, ratio, 0.0)))
                    tl.store(own_ptr + 3, tl.max(tl.ravel(numbers), 0))
                    tl.store(own_ptr + 4, tile_sum((counted & cut).to(ACC)))
                    tl.store(own_ptr + 5, tile_sum(tl.where(counted, kl, 0.0)))
                    tl.store(own_ptr + 6, tile_sum(odd.to(ACC)))
                if arrives_last(counter_ptr + index, programs):
                    if SUMS:
                        for column in tl.static_range(SUM_COLUMNS):
                            if column == LARGEST:
                                value = column_max(rows_ptr + 1 + column, programs, COLUMNS, ACC, BLOCK_PARTIAL)
                            else:
                                value = column_sum(rows_ptr + 1 + column, programs, COLUMNS, ACC, BLOCK_PARTIAL)
                            tl.store(sums_ptr + index * SUM_COLUMNS + column, value)
                    if LOSS:
                        share = column_sum(rows_ptr, programs, COLUMNS, ACC, BLOCK_PARTIAL)
                        shares_ptr = partial_ptr + batch.to(tl.int64) * programs * COLUMNS
                        finish_loss(share, pixels, loss_ptr, shares_ptr, counter_ptr, index, batch, reduction, ACC,
                                    BLOCK_PARTIAL)  # fmt: skip
