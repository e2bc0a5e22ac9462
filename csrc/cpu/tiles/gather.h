// Blocks gathered into and scattered from buffers that stay in the first-level cache, for operands of any strides.
#pragma once

#include "cpu/tiles/blocks.h"

namespace diffdoctor {
namespace {

constexpr int64_t kShortRun = 16;  // below, a call for each run of memory costs more than the run

// Fills out[] over dims d.. of a block; returns how many elements that was. A dim with stride 0 is copied, not read.
template <typename acc_t>
int64_t gather_runs(const WeightedLossParams& p, const Tiling& t, const Block& at, const void* data, int32_t dtype,
                    const int64_t* stride, int64_t offset, int d, acc_t* out) {
  const int64_t steps = block_steps(p, t, at, d);
  if (d == kMaxDims - 1) {
    load_run<acc_t>(data, dtype, offset, stride[d], steps, out);
    return steps;
  }
  const int64_t inner = gather_runs(p, t, at, data, dtype, stride, offset, d + 1, out);
  for (int64_t i = 1; i < steps; ++i) {
    if (stride[d] == 0)
      memcpy(out + i * inner, out, inner * sizeof(acc_t));
    else
      gather_runs(p, t, at, data, dtype, stride, offset + i * stride[d], d + 1, out + i * inner);
  }
  return inner * steps;
}

// A block whose memory runs along another dim than its innermost: packed tokens against an unpacked target, a
// channels_last prediction against a plain one. Units of a few dense elements are taken along dim `along`.
struct UnitLoop {
  int64_t unit;             // dense elements, the block's innermost dims
  int64_t steps, from, to;  // along `along`: how many units, strides in the source and in the block
  int dims;                 // the dims around it, outermost first
  int64_t size[kMaxDims], stride[kMaxDims], dense[kMaxDims];
};

// False where the block's own order is the memory's, or its dense runs are long.
inline bool make_unit_loop(const WeightedLossParams& p, const Tiling& t, const Block& at, const int64_t* stride,
                           UnitLoop& loop) {
  int d = kMaxDims - 1;
  loop.unit = 1;
  for (; d >= t.split && stride[d] == loop.unit && loop.unit < kShortRun; --d) loop.unit *= block_steps(p, t, at, d);
  if (d < t.split || loop.unit >= kShortRun) return false;
  int along = -1;
  for (int k = d; k >= t.split; --k) {
    const int64_t length = stride[k] < 0 ? -stride[k] : stride[k];
    if (length == 0 || block_steps(p, t, at, k) == 1) continue;
    if (along < 0 || length < (stride[along] < 0 ? -stride[along] : stride[along])) along = k;
  }
  if (along < 0 || (loop.unit == 1 && along == kMaxDims - 1)) return false;
  int64_t dense = loop.unit;
  loop.dims = 0;
  for (int k = d; k >= t.split; --k) {
    const int64_t steps = block_steps(p, t, at, k);
    if (k == along) {
      loop.steps = steps;
      loop.from = stride[k];
      loop.to = dense;
    } else {
      loop.size[loop.dims] = steps;
      loop.stride[loop.dims] = stride[k];
      loop.dense[loop.dims++] = dense;
    }
    dense *= steps;
  }
  return true;
}

template <int kUnit, typename acc_t, typename storage_t>
void copy_units(const storage_t* in, const UnitLoop& loop, acc_t* out) {
  const int64_t unit = kUnit > 0 ? kUnit : loop.unit;
  for (int64_t i = 0; i < loop.steps; ++i)
    for (int64_t k = 0; k < unit; ++k) out[i * loop.to + k] = as<acc_t, storage_t>(in[i * loop.from + k]);
}

// Two bf16 as one word each: packed tokens with patches of 2.
template <int kUnit>
void copy_units(const bfloat16* in, const UnitLoop& loop, float* out) {
  if (kUnit != 2) {
    copy_units<kUnit, float, bfloat16>(in, loop, out);
    return;
  }
  const int64_t steps = loop.steps, from = loop.from, to = loop.to;
#pragma GCC unroll 4
  for (int64_t i = 0; i < steps; ++i) {
    uint32_t pair;
    memcpy(&pair, in + i * from, sizeof(pair));
    // Little endian: the first of two is the low half.
    out[i * to] = bits_to_float(pair << 16);
    out[i * to + 1] = bits_to_float(pair & 0xffff0000u);
  }
}

// All rows of a loop at once, since each lies elsewhere and the hardware fetches none ahead.
inline void prefetch_rows(const UnitLoop& loop, const void* data, int64_t size) {
  const int64_t stride = loop.from < 0 ? -loop.from : loop.from;
  if (stride * size > 64 || loop.from < 0) return;
  int64_t index[kMaxDims] = {};
  for (;;) {
    int64_t from = 0;
    for (int k = 0; k < loop.dims; ++k) from += index[k] * loop.stride[k];
    const char* row = static_cast<const char*>(data) + from * size;
    for (int64_t byte = 0; byte < loop.steps * stride * size; byte += 64) prefetch(row + byte);
    int k = 0;
    while (k < loop.dims && ++index[k] == loop.size[k]) index[k++] = 0;
    if (k == loop.dims) return;
  }
}

template <typename acc_t>
void gather_units(const UnitLoop& loop, const void* data, int32_t dtype, int64_t offset, acc_t* out) {
  prefetch_rows(loop, address(data, dtype, offset), element_size(dtype));
  with_storage(address(data, dtype, offset), dtype, [&](auto in) {
    int64_t index[kMaxDims] = {};
    for (;;) {
      int64_t from = 0, to = 0;
      for (int k = 0; k < loop.dims; ++k) {
        from += index[k] * loop.stride[k];
        to += index[k] * loop.dense[k];
      }
      if (loop.unit == 1)
        copy_units<1>(in + from, loop, out + to);
      else if (loop.unit == 2)
        copy_units<2>(in + from, loop, out + to);
      else if (loop.unit == 4)
        copy_units<4>(in + from, loop, out + to);
      else
        copy_units<0>(in + from, loop, out + to);
      int k = 0;
      while (k < loop.dims && ++index[k] == loop.size[k]) index[k++] = 0;
      if (k == loop.dims) return;
    }
  });
}

// A block of an operand at `offset`, dense in out[].
template <typename acc_t>
void gather(const WeightedLossParams& p, const Tiling& t, const Block& at, const void* data, int32_t dtype,
            const int64_t* stride, int64_t offset, acc_t* out) {
  UnitLoop loop = {};
  if (make_unit_loop(p, t, at, stride, loop))
    gather_units(loop, data, dtype, offset, out);
  else
    gather_runs(p, t, at, data, dtype, stride, offset, t.split, out);
}

template <typename acc_t>
int64_t scatter(const WeightedLossParams& p, const Tiling& t, const Block& at, void* data, int32_t dtype,
                const int64_t* stride, int64_t offset, int d, const acc_t* in) {
  const int64_t steps = block_steps(p, t, at, d);
  if (d == kMaxDims - 1) {
    store_run<acc_t>(data, dtype, offset, stride[d], steps, in);
    return steps;
  }
  int64_t done = 0;
  for (int64_t i = 0; i < steps; ++i)
    done += scatter(p, t, at, data, dtype, stride, offset + i * stride[d], d + 1, in + done);
  return done;
}

}  // namespace
}  // namespace diffdoctor
