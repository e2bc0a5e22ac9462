// weighted_loss over a whole call. Compiled once for each instruction set; all of it has internal linkage but the entry
// points at the end. No std containers: their out-of-line copies would be shared between the sets.
#include "cpu/weighted_loss.h"

#include <cstdlib>

#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/tiles/block_loss.h"

namespace diffdoctor {
namespace {

// Partial sums are kept per tile, at most this many for a sample, and added in order: the same bits for any number of
// threads, and memory that does not grow with the sample.
constexpr int64_t kTiles = 256;
constexpr int64_t kGrain = 16384;  // elements below which another thread does not pay

// Where a work item's blocks lie: all but the free dims.
inline void locate_item(const WeightedLossParams& p, const Tiling& t, int64_t item, Block& at) {
  set_index(p, t.map_dims, t.map_count, item / t.groups / t.ranges, at.index);
  at.lo = item / t.groups % t.ranges * t.range;
  at.steps = p.size[t.split] - at.lo < t.range ? p.size[t.split] - at.lo : t.range;
  at.count = at.steps * t.inner;
}

inline int64_t first_step(const Tiling& t, int64_t item) { return item % t.groups * t.free_steps / t.groups; }
inline int64_t last_step(const Tiling& t, int64_t item) { return (item % t.groups + 1) * t.free_steps / t.groups; }

// The start of the next block into the cache while this one is computed: the hardware's own prefetcher starts anew with
// each run of memory, and there the page may have to be looked up first.
template <typename acc_t>
void prefetch_start(const Call<acc_t>& call, const Starts& next) {
  constexpr int kLines = 8;
  const auto read = [](const char* from) {
    for (int line = 0; line < kLines; ++line) prefetch(from + 64 * line);
  };
  if (call.pred_run) read(next.pred);
  for (int k = 0; k < call.p.num_terms; ++k)
    if (call.term_run[k]) read(next.term[k]);
  if (!call.grad_run) return;
  for (int line = 0; line < kLines; ++line) prefetch_to_write(next.grad + 64 * line);
}

// A map where it is read as it lies; nothing where a range's blocks are several work items, which read the same.
inline RunAhead map_ahead(const WeightedLossParams& p, const Tiling& t, const Block& at, const Map& map,
                          int64_t blocks) {
  if (map.mode != kSame || t.groups > 1 || !block_is_run(p, t, map.stride)) return {};
  return RunAhead(map.data, map.dtype, block_offset(t, at, map.batch_stride, map.stride), at.count, blocks);
}

// A work item: one range of blocks that share their maps. Adds to sums[0], or to all sums where they are wanted.
template <typename acc_t>
void process_item(const Call<acc_t>& call, const Sample<acc_t>& s, Block& at, int64_t item, Buffers<acc_t>& buf,
                  double* sums) {
  const WeightedLossParams& p = call.p;
  const Tiling& t = call.tiling;
  locate_item(p, t, item, at);
  const int64_t range = at.b * (t.items / t.groups) + item / t.groups;
  if (call.has_maps && buf.filled != range) fill_weights(p, t, at, buf.maps);
  buf.filled = range;

  const bool stats = (p.outputs & kWriteSums) != 0, write_grad = (p.outputs & kWriteGrad) != 0;
  const bool left_out = s.weight == 0 || (!call.has_maps && call.clean_weight == 0);
  const bool no_gradient = write_grad && (s.gradient_scale == 0 || (!call.has_maps && call.clean_grad == 0));
  const bool l2_sums = stats && call.l2 && !p.weighting.present;
  int64_t blocks = 0;
  const int64_t first = first_step(t, item), last = last_step(t, item);
  Block next = at;
  set_index(p, t.free_dims, t.free_count, first, next.index);
  Starts next_starts = starts_of(call, next);
  RunAhead confidence = map_ahead(p, t, at, p.confidence, last - first);
  RunAhead mask = map_ahead(p, t, at, p.mask, last - first);
  for (int64_t step = first; step < last; ++step) {
    at = next;
    const Starts starts = next_starts;
    if (step + 1 < last) {
      advance(call, next, next_starts);
      prefetch_start(call, next_starts);
    }
    confidence.fetch();
    mask.fetch();
    if (left_out) {
      process_unselected(call, at, starts, buf, stats ? sums : nullptr);
      continue;
    }
    const BlockWeights<acc_t> w = block_weights(call, at, buf);
    if (no_gradient) {
      // A sample whose Z is 0, or a gradient switched off: exact zeros, whatever the residual holds.
      const double total = process_general(call, at, starts, s, buf, w, stats ? sums : nullptr, false);
      if (!stats) sums[0] += total;
      process_unselected(call, at, starts, buf, nullptr);
    } else if (l2_sums) {
      process_l2_sums(call, at, starts, s, buf, w, sums);
      ++blocks;
    } else if (stats) {
      process_general(call, at, starts, s, buf, w, sums, write_grad);
    } else if (call.l2) {
      sums[0] += process_l2(call, at, starts, s, buf, w);
    } else {
      sums[0] += process_general(call, at, starts, s, buf, w, nullptr, write_grad);
    }
  }
  if (stats && call.has_maps) {
    sums[kSumNan] += double(last - first) * buf.maps.nan;
    sums[kSumOutside] += double(last - first) * buf.maps.outside;
  }
  if (blocks > 0)
    with_maps(call, buf, [&](auto u, auto omega) { add_map_sums<acc_t>(u, omega, at.count, double(blocks), sums); });
}

template <typename acc_t>
Sample<acc_t> load_sample(const WeightedLossParams& p, int64_t b) {
  Sample<acc_t> s;
  s.pred_scale = load_per_sample<acc_t>(p.pred_scale, b);
  for (int k = 0; k < kMaxTerms; ++k) s.coef[k] = k < p.num_terms ? term_coef<acc_t>(p, k, b) : Line<acc_t>{0, 0};
  s.huber_c = load_per_sample<acc_t>(p.huber_c, b);
  s.weight = load_per_sample<acc_t>(p.weight, b);
  s.gradient_scale = (p.outputs & kWriteGrad) ? sample_gradient_scale<acc_t>(p, b) : acc_t(0);
  return s;
}

// partial: (batch, tiles, columns) -> sums of a sample, in order.
inline double sum_tiles(const double* partial, int64_t b, int64_t tiles, int columns, int column) {
  double total = 0;
  for (int64_t k = 0; k < tiles; ++k) total += partial[(b * tiles + k) * columns + column];
  return total;
}

template <typename acc_t>
void finish(const WeightedLossParams& p, const double* partial, int64_t tiles, int columns) {
  double result = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const double numerator = sum_tiles(partial, b, tiles, columns, kSumNumerator);
    if (p.outputs & kWriteSums)
      for (int c = 0; c < kSums; ++c)
        static_cast<acc_t*>(p.sums)[b * kSums + c] = acc_t(sum_tiles(partial, b, tiles, columns, c));
    const double z = load_per_sample<acc_t>(p.z, b);
    const double share = z == 0 ? 0 : (p.reduction == kSum ? numerator / z : numerator / z / double(p.count));
    result += share;
    if ((p.outputs & kWriteLoss) && p.reduction == kSample) static_cast<acc_t*>(p.loss)[b] = acc_t(share);
  }
  if (!(p.outputs & kWriteLoss) || p.reduction == kSample) return;
  *static_cast<acc_t*>(p.loss) = acc_t(p.reduction == kMean ? result / double(p.batch) : result);
}

template <typename acc_t>
void run_weighted_loss(const WeightedLossParams& p, int threads) {
  const Call<acc_t> call(p);
  if (call.grad_run) ask_for_large_pages(p.grad.data, p.batch * p.count * element_size(p.grad.dtype));
  const int64_t items = call.tiling.items;
  const int64_t tiles = items < kTiles ? items : kTiles;
  const int columns = (p.outputs & kWriteSums) ? kSums : 1;
  const Scratch partial(p.batch * tiles * columns);
  parallel_for(p.batch * tiles, usable_threads(threads, p.batch * p.count, kGrain), [&](int64_t begin, int64_t end) {
    Buffers<acc_t> buf;
    Block at = {};
    for (int64_t k = begin; k < end; ++k) {
      const int64_t tile = k % tiles;
      at.b = k / tiles;
      const Sample<acc_t> s = load_sample<acc_t>(p, at.b);
      double* sums = partial.data + k * columns;
      for (int c = 0; c < columns; ++c) sums[c] = 0;
      const int64_t last = (tile + 1) * items / tiles;
      for (int64_t item = tile * items / tiles; item < last; ++item) process_item(call, s, at, item, buf, sums);
    }
  });
  finish<acc_t>(p, partial.data, tiles, columns);
}

// The mean of omega. Free dims outside a block are not gone through: omega does not change along them.
template <typename acc_t>
void run_weight_mean(const WeightedLossParams& p, void* out, bool per_sample, int threads) {
  const Tiling t = make_tiling(p);
  const int64_t items = t.map_steps * t.ranges;
  const int64_t tiles = items < kTiles ? items : kTiles;
  const Scratch partial(p.batch * tiles);
  parallel_for(p.batch * tiles, usable_threads(threads, p.batch * p.count, kGrain), [&](int64_t begin, int64_t end) {
    Weights<acc_t> w;
    Block at = {};
    for (int64_t k = begin; k < end; ++k) {
      const int64_t tile = k % tiles;
      at.b = k / tiles;
      double total = 0;
      const int64_t last = (tile + 1) * items / tiles;
      for (int64_t item = tile * items / tiles; item < last; ++item) {
        set_index(p, t.map_dims, t.map_count, item / t.ranges, at.index);
        at.lo = item % t.ranges * t.range;
        at.steps = p.size[t.split] - at.lo < t.range ? p.size[t.split] - at.lo : t.range;
        at.count = at.steps * t.inner;
        fill_weights(p, t, at, w);
        for (int64_t i = 0; i < at.count; ++i) total += w.omega[i];
      }
      partial.data[k] = total;
    }
  });
  const double count = double(t.map_steps) * double(p.size[t.split]) * double(t.inner);
  double whole = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const double mean = sum_tiles(partial.data, b, tiles, 1, 0) / count;
    whole += mean;
    if (per_sample) static_cast<acc_t*>(out)[b] = acc_t(mean);
  }
  if (!per_sample) *static_cast<acc_t*>(out) = acc_t(whole / double(p.batch));
}

}  // namespace

namespace cpu {

void DD_CPU_ISA::weighted_loss(const WeightedLossParams& p, int threads) {
  if (p.dtype == kFloat64)
    run_weighted_loss<double>(p, threads);
  else
    run_weighted_loss<float>(p, threads);
}

void DD_CPU_ISA::weight_mean(const WeightedLossParams& p, void* out, bool per_sample, int threads) {
  if (p.dtype == kFloat64)
    run_weight_mean<double>(p, out, per_sample, threads);
  else
    run_weight_mean<float>(p, out, per_sample, threads);
}

}  // namespace cpu
}  // namespace diffdoctor
