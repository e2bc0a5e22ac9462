"""weighted_loss in one pass: loss, gradient of model_pred and statistics, with the maps resampled in the kernel.

A sample's elements form a box of three axes: *outer* and *inner* dims, along which the maps vary, and *free* dims
between them, along which they do not (channels). A program owns one tile of outer × inner positions, or several in
turn, works out their weights once and goes over the free dims; without maps everything is free. Which dims those are,
and in which order, follows model_pred's memory, so that neighbouring lanes read neighbouring elements in every layout.

Compiled per: dtypes, which operands are there and whether each map has the grid's size, plain l2 or a mixture, whether
the gradient is modulated, what is written, tile shape, one tile or several. Sizes, strides, options, the interpolation
and the losses of a mixture are run-time values. Sums are per program, then per sample in program order, then over
samples: the same bits for the same call.
"""

import triton
import triton.language as tl

from .common import arrives_last, as_scalar, column_sum, to_storage
from .element_loss import element_loss
from .resample import ABSENT, SAME, map_value, resampled

MEAN = tl.constexpr(0)
SAMPLE = tl.constexpr(1)
SUM_COLUMNS = tl.constexpr(10)

# Bits of `tensor_bits` and `batched_bits`: per-sample numbers that come as tensors, and those with one for each sample.
PRED_SCALE, COEF0, COEF1, HUBER_C, WEIGHT, Z, GRAD_OUTPUT = (tl.constexpr(k) for k in range(7))
COEF2, ARTIFACT_COEF0, ARTIFACT_COEF1, ARTIFACT_COEF2 = (tl.constexpr(k) for k in range(7, 11))


@triton.jit
def count_of(units, UNIT: tl.constexpr, IDX: tl.constexpr):
    """A count that comes in UNITs: their number may fit in 32 bits where the count does not."""
    return as_scalar(units, IDX) * UNIT


@triton.jit
def decode(linear, sizes, strides, UNIT: tl.constexpr):
    """Σ index_d · stride_d of a linear index over `sizes`, the last dim running fastest; one stride: already merged.

    Strides are counted in UNITs: the compiler itself notices multiples of 16 only, vectors need less.
    """
    N: tl.constexpr = len(strides)
    # In this order: a stride is an int32 where it fits, and the product with UNIT may not.
    if N == 1:
        offset = linear * strides[0] * UNIT
    else:
        offset = linear % sizes[N - 1] * strides[N - 1] * UNIT
        rest = linear // sizes[N - 1]
        for k in tl.static_range(1, N - 1):
            offset += rest % sizes[N - 1 - k] * strides[N - 1 - k] * UNIT
            rest = rest // sizes[N - 1 - k]
        offset += rest * strides[0] * UNIT
    return offset


@triton.jit
def tile_offset(outer, inner, sizes, strides, OUTER_UNIT: tl.constexpr, INNER_UNIT: tl.constexpr):
    """Offset of outer × inner positions; sizes and strides stand as (outer dims, free dims, inner dims)."""
    return decode(outer, sizes[0], strides[0], OUTER_UNIT) + decode(inner, sizes[2], strides[2], INNER_UNIT)


@triton.jit
def number_of(pointers, tensor_bits, batched_bits, value, b, K: tl.constexpr, ACC: tl.constexpr):
    """Per-sample number K of sample b: from its tensor where there is one, else the value."""
    step = (batched_bits >> K) & 1
    return tl.load(pointers[K] + b * step, mask=((tensor_bits >> K) & 1) != 0, other=as_scalar(value, ACC))


@triton.jit
def _coefs(pointers, tensor_bits, batched_bits, clean, artifact, b, K: tl.constexpr, ARTIFACT_K: tl.constexpr,
           SPATIAL: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """A term's coefficients where u is 0 and 1: numbers K and ARTIFACT_K of sample b, the second one if SPATIAL."""
    clean_coef = number_of(pointers, tensor_bits, batched_bits, clean, b, K, ACC)
    artifact_coef = clean_coef
    if SPATIAL:
        artifact_coef = number_of(pointers, tensor_bits, batched_bits, artifact, b, ARTIFACT_K, ACC)
    return clean_coef, artifact_coef


@triton.jit
def _coef_at(clean, artifact, u, SPATIAL: tl.constexpr):
    """A term's coefficient: `clean`, which becomes `artifact` as u goes from 0 to 1 if SPATIAL."""
    coef = clean
    if SPATIAL:
        coef = clean + u * (artifact - clean)
    return coef


@triton.jit
def map_at(ptr, b, batch_stride, strides, axes, mode, default, outer, inner, inside, sizes, coords, map_grid,
         KIND: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """A map on a tile of outer × inner positions; `default` where there is none."""
    if KIND == ABSENT:
        value = tl.zeros_like(outer + inner).to(ACC) + default
    elif KIND == SAME:
        offset = tile_offset(outer, inner, sizes, strides, 1, 1)
        value = map_value(ptr + b * batch_stride, offset, inside, ACC)
    else:
        t = tile_offset(outer, inner, sizes, coords[0], 1, 1)
        y = tile_offset(outer, inner, sizes, coords[1], 1, 1)
        x = tile_offset(outer, inner, sizes, coords[2], 1, 1)
        value = resampled(ptr + b * batch_stride, inside, t, y, x, axes, map_grid, mode, ACC)
    return value


@triton.jit
def _artifact_level(c, threshold, gamma):
    """u = c^γ where c ≥ threshold, which is at least 0, else 0; c above 1 counts as 1, a NaN as clean."""
    u = tl.where(c >= threshold, tl.minimum(c, 1.0), 0.0)
    if gamma != 1:
        u = tl.where(u > 0, tl.exp2(gamma * tl.log2(u)), 0.0)
    return u


@triton.jit
def _spatial(confidence_ptr, mask_ptr, b, batch_strides, confidence_strides, mask_strides,
             confidence_axes, mask_axes, mode, threshold, gamma, clean_weight, artifact_weight,
             outer, inner, inside, sizes, coords, map_grid,
             CONFIDENCE: tl.constexpr, MASK: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """u and ω on a tile of outer × inner positions; where a map is NaN, and where it is outside [0, 1]."""
    c = map_at(confidence_ptr, b, batch_strides[6], confidence_strides, confidence_axes, mode, 0.0, outer, inner,
               inside, sizes, coords, map_grid, CONFIDENCE, ACC)  # fmt: skip
    k = map_at(mask_ptr, b, batch_strides[7], mask_strides, mask_axes, mode, 1.0, outer, inner, inside,
               sizes, coords, map_grid, MASK, ACC)  # fmt: skip
    u = c
    if CONFIDENCE != ABSENT:
        u = _artifact_level(c, threshold, gamma)
    region = k
    if MASK != ABSENT:
        region = tl.where(k > 0, tl.minimum(k, 1.0), 0.0)
    nan = (c != c) | (k != k)
    outside = (c < 0) | (c > 1) | (k < 0) | (k > 1)
    return u, region * (clean_weight + (artifact_weight - clean_weight) * u), nan, outside


@triton.jit
def read_operand(ptr, tile_offset, free, present, sizes, strides, ACC: tl.constexpr, UNIT: tl.constexpr):
    offset = tile_offset + decode(free, sizes[1], strides[1], UNIT)
    return tl.load(ptr + offset, mask=present, other=0.0).to(ACC)


@triton.jit
def tile_sum(values):
    """Sum over a whole tile."""
    return tl.sum(tl.ravel(values), 0)


@triton.jit
def finish_loss(share, n, loss_ptr, shares_ptr, counter_ptr, b, batch, reduction,
                 ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A sample's loss; over samples in the last one to come here."""
    if reduction == SAMPLE:
        tl.store(loss_ptr + b, share / n)
    else:
        if reduction == MEAN:
            share = share / n
        tl.store(shares_ptr + b, share)
        if arrives_last(counter_ptr + batch, batch):
            loss = column_sum(shares_ptr, batch, 1, ACC, BLOCK)
            if reduction == MEAN:
                loss = loss / batch
            tl.store(loss_ptr, loss)


_NOT_SPECIALIZED = [
    "batch",
    "programs",
    "splits",
    "steps",
    "inner_blocks",
    "tensor_bits",
    "batched_bits",
    "mode",
    "reduction",
]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def weighted_loss_kernel(
    pred_ptr, grad_ptr, term0_ptr, term1_ptr, term2_ptr, weighting_ptr, confidence_ptr, mask_ptr,
    loss_ptr,  # () or (batch,) in ACC
    sums_ptr,  # (batch, SUM_COLUMNS) in ACC: the columns of csrc/common/weighted_loss_params.h
    partial_ptr,  # (batch, programs, COLUMNS) and (batch,) in ACC
    counter_ptr,  # (batch + 1) int32 zeros
    number_ptrs,  # per-sample numbers in ACC, in the order of PRED_SCALE ...
    batch, outer_count, free_count, inner_count, programs, splits, steps, inner_blocks,
    turns,  # tiles of a program, None for one
    sizes, pred_strides, grad_strides, term0_strides, term1_strides, term2_strides,  # (outer, free, inner)
    weighting_strides, confidence_strides, mask_strides, coords,
    batch_strides,  # pred, grad, term0, term1, term2, weighting, confidence, mask
    confidence_axes, mask_axes,  # see resample.py
    map_grid, mode, reduction, tensor_bits, batched_bits,
    pred_scale: tl.float64, coef0: tl.float64, coef1: tl.float64, huber_c: tl.float64, weight: tl.float64,
    z: tl.float64, grad_output: tl.float64, coef2: tl.float64,
    artifact_coef0: tl.float64, artifact_coef1: tl.float64, artifact_coef2: tl.float64,
    strength0: tl.float64, strength1: tl.float64, strength2: tl.float64, strength3: tl.float64,  # of element_loss.py's
    strength4: tl.float64, strength5: tl.float64, strength6: tl.float64, strength7: tl.float64,  # kinds, then zeros
    clean_weight: tl.float64, artifact_weight: tl.float64, clean_grad: tl.float64, artifact_grad: tl.float64,
    threshold: tl.float64, gamma: tl.float64,
    LOSS: tl.constexpr, GRAD: tl.constexpr, SUMS: tl.constexpr, PLAIN: tl.constexpr,
    CONFIDENCE: tl.constexpr, MASK: tl.constexpr,
    MODULATED: tl.constexpr,  # the gradient has a factor m, which may be 0
    SPATIAL: tl.constexpr,  # coefficients go from coef to artifact_coef as u goes from 0 to 1
    BLOCK_OUTER: tl.constexpr, BLOCK_FREE: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_PARTIAL: tl.constexpr,
    COUNT_UNITS: tl.constexpr,  # powers of two that divide the counts, so that masks split no vector
    PRED_UNITS: tl.constexpr, GRAD_UNITS: tl.constexpr, TERM0_UNITS: tl.constexpr, TERM1_UNITS: tl.constexpr,
    TERM2_UNITS: tl.constexpr,
    ACC: tl.constexpr, IDX: tl.constexpr, ROUND_BF16: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    n_outer = count_of(outer_count, COUNT_UNITS[0], IDX)
    n_free = count_of(free_count, COUNT_UNITS[1], IDX)
    n_inner = count_of(inner_count, COUNT_UNITS[2], IDX)
    first = (program % splits).to(IDX) * steps * BLOCK_FREE
    blocks = tl.minimum(steps, tl.cdiv(n_free - first, BLOCK_FREE))
    WHOLE: tl.constexpr = COUNT_UNITS[1] % BLOCK_FREE == 0  # no block is cut: masks know nothing of free positions
    # Elements are selected out through d = 0, one selection for the loss and, unless MODULATED, the gradient.
    THROUGH_D: tl.constexpr = PLAIN and not SUMS and weighting_ptr is None

    s = number_of(number_ptrs, tensor_bits, batched_bits, pred_scale, b, PRED_SCALE, ACC)
    c = number_of(number_ptrs, tensor_bits, batched_bits, huber_c, b, HUBER_C, ACC)
    v = number_of(number_ptrs, tensor_bits, batched_bits, weight, b, WEIGHT, ACC)
    divisor = number_of(number_ptrs, tensor_bits, batched_bits, z, b, Z, ACC)
    strength = (
        as_scalar(strength0, ACC), as_scalar(strength1, ACC), as_scalar(strength2, ACC), as_scalar(strength3, ACC),
        as_scalar(strength4, ACC), as_scalar(strength5, ACC), as_scalar(strength6, ACC), as_scalar(strength7, ACC),
    )  # fmt: skip
    n = as_scalar(n_outer, ACC) * as_scalar(n_free, ACC) * as_scalar(n_inner, ACC)
    if GRAD:
        g = number_of(number_ptrs, tensor_bits, batched_bits, grad_output, b, GRAD_OUTPUT, ACC) * v * s / divisor
        if reduction == MEAN:
            g = g / (n * batch)
        elif reduction == SAMPLE:
            g = g / n
    v_strength = v
    if PLAIN:
        v_strength = v * strength[0]
        if GRAD:
            g = g * (2.0 * strength[0])
    if term0_ptr is not None:
        clean0, artifact0 = _coefs(
            number_ptrs, tensor_bits, batched_bits, coef0, artifact_coef0, b, COEF0, ARTIFACT_COEF0, SPATIAL,
            ACC)  # fmt: skip
    if term1_ptr is not None:
        clean1, artifact1 = _coefs(
            number_ptrs, tensor_bits, batched_bits, coef1, artifact_coef1, b, COEF1, ARTIFACT_COEF1, SPATIAL,
            ACC)  # fmt: skip
    if term2_ptr is not None:
        clean2, artifact2 = _coefs(
            number_ptrs, tensor_bits, batched_bits, coef2, artifact_coef2, b, COEF2, ARTIFACT_COEF2, SPATIAL,
            ACC)  # fmt: skip

    total = tl.zeros([BLOCK_OUTER, BLOCK_FREE, BLOCK_INNER], ACC)
    if SUMS:
        artifact_loss, artifact_share = tl.zeros_like(total), tl.zeros_like(total)
        clean_loss, clean_share, nonfinite = tl.zeros_like(total), tl.zeros_like(total), tl.zeros_like(total)
        omega_total = tl.zeros([BLOCK_OUTER, 1, BLOCK_INNER], ACC)
        u_total, nan_total = tl.zeros_like(omega_total), tl.zeros_like(omega_total)
        outside_total = tl.zeros_like(omega_total)
    # Tiles, not scalars: the interpreter cannot spread the result of a scalar comparison over a tile.
    zero = tl.zeros([1, 1, 1], ACC)
    counts, divides = zero + v != 0, zero + divisor != 0
    if THROUGH_D:
        counts = counts & divides  # where the divisor is 0, the numerator is not asked for
    tile = program // splits
    if turns is not None:
        tile = tile * turns
    outer_block, inner_block = tile // inner_blocks, tile % inner_blocks
    for _ in range(1 if turns is None else turns):
        outer = (outer_block.to(IDX) * BLOCK_OUTER + tl.arange(0, BLOCK_OUTER))[:, None, None]
        inner = (inner_block.to(IDX) * BLOCK_INNER + tl.arange(0, BLOCK_INNER))[None, None, :]
        inside = (outer < n_outer) & (inner < n_inner)
        u, omega, nan, outside = _spatial(
            confidence_ptr, mask_ptr, b, batch_strides, confidence_strides, mask_strides, confidence_axes, mask_axes,
            mode, as_scalar(as_scalar(threshold, tl.float32), ACC), as_scalar(gamma, ACC),
            as_scalar(clean_weight, ACC), as_scalar(artifact_weight, ACC), outer, inner, inside, sizes, coords,
            map_grid, CONFIDENCE, MASK, ACC)  # fmt: skip
        chosen = inside & counts & (omega != 0)
        loss_factor = v_strength * omega
        if THROUGH_D:
            loss_factor = tl.where(chosen, loss_factor, 0.0)
        if GRAD:
            moved = chosen & divides
            slope_factor = omega * g
            if MODULATED:
                m = as_scalar(clean_grad, ACC) + (as_scalar(artifact_grad, ACC) - as_scalar(clean_grad, ACC)) * u
                moved = moved & (m != 0)
                slope_factor = omega * m * g
            slope_factor = tl.where(moved, slope_factor, 0.0)
            grad_tile = tile_offset(outer, inner, sizes, grad_strides, GRAD_UNITS[0], GRAD_UNITS[2])
        pred_tile = tile_offset(outer, inner, sizes, pred_strides, PRED_UNITS[0], PRED_UNITS[2])
        if term0_ptr is not None:
            term0_coef = _coef_at(clean0, artifact0, u, SPATIAL)
            term0_tile = tile_offset(outer, inner, sizes, term0_strides, TERM0_UNITS[0], TERM0_UNITS[2])
        if term1_ptr is not None:
            term1_coef = _coef_at(clean1, artifact1, u, SPATIAL)
            term1_tile = tile_offset(outer, inner, sizes, term1_strides, TERM1_UNITS[0], TERM1_UNITS[2])
        if term2_ptr is not None:
            term2_coef = _coef_at(clean2, artifact2, u, SPATIAL)
            term2_tile = tile_offset(outer, inner, sizes, term2_strides, TERM2_UNITS[0], TERM2_UNITS[2])
        if weighting_ptr is not None:
            weighting_tile = tile_offset(outer, inner, sizes, weighting_strides, 1, 1)

        for step in range(blocks):
            free = (first + step * BLOCK_FREE + tl.arange(0, BLOCK_FREE))[None, :, None]
            present = inside
            if not WHOLE:
                present = inside & (free < n_free)
            d = s * read_operand(
                pred_ptr + b * batch_strides[0], pred_tile, free, present, sizes, pred_strides, ACC,
                PRED_UNITS[1])  # fmt: skip
            if term0_ptr is not None:
                d -= term0_coef * read_operand(
                    term0_ptr + b * batch_strides[2], term0_tile, free, present, sizes, term0_strides, ACC,
                    TERM0_UNITS[1])  # fmt: skip
            if term1_ptr is not None:
                d -= term1_coef * read_operand(
                    term1_ptr + b * batch_strides[3], term1_tile, free, present, sizes, term1_strides, ACC,
                    TERM1_UNITS[1])  # fmt: skip
            if term2_ptr is not None:
                d -= term2_coef * read_operand(
                    term2_ptr + b * batch_strides[4], term2_tile, free, present, sizes, term2_strides, ACC,
                    TERM2_UNITS[1])  # fmt: skip
            if THROUGH_D:
                kept = tl.where(chosen, d, 0.0)
                if WHOLE:
                    total += loss_factor * (kept * kept)
                else:
                    total = tl.where(present, total + loss_factor * (kept * kept), total)
                if GRAD:
                    grad = tl.where(moved, slope_factor * d, 0.0) if MODULATED else slope_factor * kept
            else:
                if PLAIN:
                    loss, grad = d * d, d
                else:
                    loss, grad = element_loss(d, c, strength, ACC)
                selected = chosen & present
                weighted = loss_factor * loss
                if weighting_ptr is not None:
                    factor = read_operand(weighting_ptr + b * batch_strides[5], weighting_tile, free, present, sizes,
                                          weighting_strides, ACC, 1)  # fmt: skip
                    selected = selected & (factor != 0)
                    weighted *= factor
                    grad *= factor
                if GRAD:
                    grad = tl.where(moved & selected, slope_factor * grad, 0.0)
                weighted = tl.where(selected, weighted, 0.0)
                total += weighted
                if SUMS:
                    if PLAIN:
                        loss *= strength[0]
                    artifact_loss += tl.where(selected & (u != 0), u * loss, 0.0)
                    artifact_share += tl.where(selected, u, 0.0)
                    clean_loss += tl.where(selected & (u != 1), (1.0 - u) * loss, 0.0)
                    clean_share += tl.where(selected, 1.0 - u, 0.0)
                    nonfinite += tl.where(tl.abs(weighted) < float("inf"), 0.0, 1.0)
            if GRAD:
                grad = to_storage(grad, grad_ptr.dtype.element_ty, ROUND_BF16)
                offset = grad_tile + decode(free, sizes[1], grad_strides[1], GRAD_UNITS[1])
                tl.store(grad_ptr + b * batch_strides[1] + offset, grad, mask=present)
        if SUMS:
            omega_total += tl.where(inside, omega, 0.0)
            u_total += tl.where(inside, u, 0.0)
            nan_total += tl.where(inside & nan, 1.0, 0.0)
            outside_total += tl.where(inside & outside, 1.0, 0.0)
        if turns is not None:
            inner_block += 1
            outer_block += (inner_block == inner_blocks).to(outer_block.dtype)
            inner_block = tl.where(inner_block == inner_blocks, 0, inner_block)

    if LOSS or SUMS:
        COLUMNS: tl.constexpr = SUM_COLUMNS if SUMS else 1
        rows_ptr = partial_ptr + b * programs * COLUMNS
        own_ptr = rows_ptr + program * COLUMNS
        tl.store(own_ptr, tile_sum(total))
        if SUMS:
            seen = tl.minimum(n_free - first, steps * BLOCK_FREE).to(ACC)
            tl.store(own_ptr + 1, tile_sum(omega_total) * seen)
            tl.store(own_ptr + 2, tile_sum(artifact_loss))
            tl.store(own_ptr + 3, tile_sum(artifact_share))
            tl.store(own_ptr + 4, tile_sum(clean_loss))
            tl.store(own_ptr + 5, tile_sum(clean_share))
            tl.store(own_ptr + 6, tile_sum(u_total) * seen)
            tl.store(own_ptr + 7, tile_sum(nonfinite))
            tl.store(own_ptr + 8, tile_sum(nan_total) * seen)
            tl.store(own_ptr + 9, tile_sum(outside_total) * seen)
        if arrives_last(counter_ptr + b, programs):
            if SUMS:
                for column in tl.static_range(SUM_COLUMNS):
                    sum_of_column = column_sum(rows_ptr + column, programs, COLUMNS, ACC, BLOCK_PARTIAL)
                    tl.store(sums_ptr + b * SUM_COLUMNS + column, sum_of_column)
            if LOSS:
                numerator = column_sum(rows_ptr, programs, COLUMNS, ACC, BLOCK_PARTIAL)
                share = tl.where(divisor == 0, 0.0, numerator / divisor)
                shares_ptr = partial_ptr + batch.to(tl.int64) * programs * COLUMNS
                finish_loss(share, n, loss_ptr, shares_ptr, counter_ptr, b, batch, reduction, ACC, BLOCK_PARTIAL)


@triton.jit(do_not_specialize=["batch", "programs", "inner_blocks", "mode"])
def weight_mean_kernel(
    confidence_ptr, mask_ptr,
    out_ptr,  # (batch,) or (1,) in ACC: the mean of ω over each sample, or over the batch
    partial_ptr,  # (batch, programs) and (batch,) in ACC
    counter_ptr,  # (batch + 1) int32 zeros
    batch, n_outer, n_inner, programs, inner_blocks,
    sizes, confidence_strides, mask_strides, coords, batch_strides, confidence_axes, mask_axes, map_grid, mode,
    clean_weight: tl.float64, artifact_weight: tl.float64, threshold: tl.float64, gamma: tl.float64,
    PER_SAMPLE: tl.constexpr, CONFIDENCE: tl.constexpr, MASK: tl.constexpr,
    BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_PARTIAL: tl.constexpr,
    ACC: tl.constexpr, IDX: tl.constexpr,
):  # fmt: skip
    """The spatial weight's mean, what `normalize` divides by: the maps alone are read."""
    b = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    outer = ((program // inner_blocks).to(IDX) * BLOCK_OUTER + tl.arange(0, BLOCK_OUTER))[:, None, None]
    inner = ((program % inner_blocks).to(IDX) * BLOCK_INNER + tl.arange(0, BLOCK_INNER))[None, None, :]
    inside = (outer < n_outer) & (inner < n_inner)
    _, omega, _, _ = _spatial(
        confidence_ptr, mask_ptr, b, batch_strides, confidence_strides, mask_strides, confidence_axes, mask_axes, mode,
        as_scalar(as_scalar(threshold, tl.float32), ACC), as_scalar(gamma, ACC), as_scalar(clean_weight, ACC),
        as_scalar(artifact_weight, ACC), outer, inner, inside, sizes, coords, map_grid,
        CONFIDENCE, MASK, ACC)  # fmt: skip
    tl.store(partial_ptr + b * programs + program, tile_sum(tl.where(inside, omega, 0.0)))
    if arrives_last(counter_ptr + b, programs):
        mean = column_sum(partial_ptr + b * programs, programs, 1, ACC, BLOCK_PARTIAL)
        mean = mean / as_scalar(n_outer, ACC) / as_scalar(n_inner, ACC)
        if PER_SAMPLE:
            tl.store(out_ptr + b, mean)
        else:
            means_ptr = partial_ptr + batch.to(tl.int64) * programs
            tl.store(means_ptr + b, mean)
            if arrives_last(counter_ptr + batch, batch):
                tl.store(out_ptr, column_sum(means_ptr, batch, 1, ACC, BLOCK_PARTIAL) / batch)


@triton.jit(do_not_specialize=["programs", "steps", "g_stride"])
def scale_gradient_kernel(
    grad_ptr, out_ptr,  # (batch, count), the same tensor when IN_PLACE
    g_ptr,  # one number (g_stride 0) or (batch,) in ACC
    count, programs, steps, g_stride,
    IN_PLACE: tl.constexpr, BLOCK: tl.constexpr, ROUND_BF16: tl.constexpr,
):  # fmt: skip
    """grad · g for the kept gradient of g = 1; in place nothing is touched where g is 1."""
    b = (tl.program_id(0) // programs).to(tl.int64)
    g = tl.load(g_ptr + b * g_stride)
    if (g != 1) | (not IN_PLACE):
        first = (tl.program_id(0) % programs).to(tl.int64) * steps * BLOCK
        for step in range(steps):
            offs = first + step * BLOCK + tl.arange(0, BLOCK)
            grad = tl.load(grad_ptr + b * count + offs, mask=offs < count, other=0.0).to(g.dtype) * g
            tl.store(out_ptr + b * count + offs, to_storage(grad, out_ptr.dtype.element_ty, ROUND_BF16),
                     mask=offs < count)  # fmt: skip
