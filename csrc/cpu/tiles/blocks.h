// How a sample's iteration space is cut into blocks, and where a block lies.
#pragma once

#include "common/weighted_loss.h"
#include "cpu/convert.h"

namespace diffdoctor {
namespace {

constexpr int64_t kChunk = 2048;  // a page of bf16: the hardware prefetcher starts anew at each

// How a sample is cut: a block is a range of dim `split` with all dims inside it, at most kChunk elements or fewer.
struct Tiling {
  int split;
  int64_t inner;   // elements inside one step of dim `split`
  int64_t range;   // steps of dim `split` in a block
  int64_t ranges;  // blocks along dim `split`
  // Dims outside `split`: those along which the maps change, and the free ones, over which a block's maps are reused.
  int map_dims[kMaxDims], map_count;
  int free_dims[kMaxDims], free_count;
  int64_t map_steps, free_steps;
  int64_t groups;  // the free steps are cut into this many work items
  int64_t items;   // per sample: map_steps * ranges * groups
};

// chunk: elements of a block at most.
inline Tiling make_tiling(const WeightedLossParams& p, int64_t chunk = kChunk) {
  Tiling t;
  t.inner = 1;
  t.split = kMaxDims - 1;
  while (t.split > 0 && t.inner * p.size[t.split] <= chunk) t.inner *= p.size[t.split--];
  // Where a map is resampled, it should be once for a position: no blocks along a dim it does not know, and smaller
  // blocks rather than free steps on several threads.
  const bool resampled = p.confidence.mode > kSame || p.mask.mode > kSame;
  if (resampled && t.split < kMaxDims - 1 && !p.map_varies[t.split]) t.inner /= p.size[++t.split];
  const int64_t size = p.size[t.split];
  int64_t most = chunk / t.inner;
  if (resampled && p.batch * p.count < 64 * kChunk * 16) most = most / 4;
  most = most < 1 ? 1 : most;
  t.ranges = (size + most - 1) / most;
  t.range = (size + t.ranges - 1) / t.ranges;
  t.ranges = (size + t.range - 1) / t.range;
  t.map_count = t.free_count = 0;
  t.map_steps = t.free_steps = 1;
  for (int d = 0; d < t.split; ++d) {
    if (p.size[d] == 1) continue;
    if (p.map_varies[d]) {
      t.map_dims[t.map_count++] = d;
      t.map_steps *= p.size[d];
    } else {
      t.free_dims[t.free_count++] = d;
      t.free_steps *= p.size[d];
    }
  }
  // Enough work items for many threads; the number must not depend on how many there are.
  const int64_t whole = p.batch * t.map_steps * t.ranges, enough = resampled ? 8 : 64;
  t.groups = whole >= enough ? 1 : (enough + whole - 1) / whole;
  t.groups = t.groups < t.free_steps ? t.groups : t.free_steps;
  t.items = t.map_steps * t.ranges * t.groups;
  return t;
}

// A block: indices of the dims outside, and the range [lo, lo + steps) of dim `split`.
struct Block {
  int64_t b;
  int64_t index[kMaxDims];
  int64_t lo, steps, count;
};

inline void set_index(const WeightedLossParams& p, const int* dims, int count, int64_t step, int64_t* index) {
  for (int k = count - 1; k >= 0; --k) {
    index[dims[k]] = step % p.size[dims[k]];
    step /= p.size[dims[k]];
  }
}

inline void next_index(const WeightedLossParams& p, const int* dims, int count, int64_t* index) {
  for (int k = count - 1; k >= 0; --k) {
    if (++index[dims[k]] < p.size[dims[k]]) return;
    index[dims[k]] = 0;
  }
}

inline int64_t block_offset(const Tiling& t, const Block& at, int64_t batch_stride, const int64_t* stride) {
  int64_t offset = at.b * batch_stride + at.lo * stride[t.split];
  for (int k = 0; k < t.map_count; ++k) offset += at.index[t.map_dims[k]] * stride[t.map_dims[k]];
  for (int k = 0; k < t.free_count; ++k) offset += at.index[t.free_dims[k]] * stride[t.free_dims[k]];
  return offset;
}

// Whether a block of this operand is one run of memory.
inline bool block_is_run(const WeightedLossParams& p, const Tiling& t, const int64_t* stride) {
  int64_t dense = 1;
  for (int d = kMaxDims - 1; d >= t.split; --d) {
    if (p.size[d] != 1 && stride[d] != dense) return false;
    dense *= p.size[d];
  }
  return true;
}

// What the next range reads of a map, into the cache while this one is computed, in equal shares. A range begins with
// its maps, and nothing else could be computed while the memory is waited for.
struct RunAhead {
  const char* next = nullptr;
  int64_t lines = 0;  // of a share

  RunAhead() = default;
  // offset, count: of this range in the map, elements.
  RunAhead(const void* data, int32_t dtype, int64_t offset, int64_t count, int64_t shares)
      : next(static_cast<const char*>(address(data, dtype, offset + count))),
        lines((count * element_size(dtype) / 64 + shares - 1) / shares) {}

  void fetch() {
    for (int64_t line = 0; line < lines; ++line, next += 64) prefetch(next);
  }
};

inline int64_t block_steps(const WeightedLossParams& p, const Tiling& t, const Block& at, int d) {
  return d == t.split ? at.steps : p.size[d];
}

}  // namespace
}  // namespace diffdoctor
