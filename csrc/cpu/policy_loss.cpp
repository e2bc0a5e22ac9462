// policy_loss over a whole call. A block of pixels with all its channels stays in the cache between two passes: the
// sums over channels, from which each pixel's ratio follows, and the gradient. Compiled once for each instruction set;
// all of it has internal linkage but the entry point at the end.
#include "cpu/policy_loss.h"

#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/tiles/policy_block.h"

namespace diffdoctor {
namespace {

constexpr int64_t kTiles = 256;    // of a sample at most, whose partial sums are added in order
constexpr int64_t kGrain = 16384;  // elements below which another thread does not pay

template <typename acc_t>
void add_moments(const PolicyStep<acc_t>& s, int64_t n, const Buffers<acc_t>& buf, double* moments) {
  if (s.inverse == 0) return;
  for (int64_t i = 0; i < n; ++i) {
    const acc_t k = buf.k[i], advantage = buf.advantage[i];
    if (k == 0) continue;
    moments[kMomentChange] += k * buf.change[i];
    moments[kMomentWeight] += k;
    moments[advantage > 0 ? kMomentPositive : kMomentNegative] += k * advantage;
  }
}

// body(step, block, columns) for every block of every sample. partial: (batch, tiles, columns), set to 0 before.
template <typename acc_t, typename body_t>
void for_blocks(const Call<acc_t>& call, int64_t tiles, int columns, double* partial, int threads, const body_t& body) {
  const PolicyLossParams& p = call.p;
  const Tiling& t = call.tiling;
  const int64_t batch = p.grid.batch;
  parallel_for(batch * tiles, usable_threads(threads, batch * p.grid.count, kGrain), [&](int64_t begin, int64_t end) {
    Buffers<acc_t> buf;
    const int64_t pixels = block_pixels(call.channels);
    const Scratch residuals(2 * pixels * call.channels);
    buf.d = reinterpret_cast<acc_t*>(residuals.data);
    buf.away = buf.d + pixels * call.channels;
    Block at = {};
    for (int64_t k = begin; k < end; ++k) {
      const int64_t tile = k % tiles;
      at.b = k / tiles;
      const PolicyStep<acc_t> s = policy_step<acc_t>(p, batch, call.pixels.count, at.b);
      double* sums = partial + k * columns;
      for (int c = 0; c < columns; ++c) sums[c] = 0;
      const int64_t last = (tile + 1) * t.items / tiles;
      for (int64_t item = tile * t.items / tiles; item < last; ++item) {
        set_index(call.pixels, t.map_dims, t.map_count, item / t.ranges, at.index);
        at.lo = item % t.ranges * t.range;
        at.steps = call.pixels.size[t.split] - at.lo < t.range ? call.pixels.size[t.split] - at.lo : t.range;
        at.count = at.steps * t.inner;
        body(s, at, buf, sums);
      }
    }
    if (call.streams) finish_streams();
  });
}

// partial: (batch, tiles, columns) -> a column of a sample, in order.
inline double sum_tiles(const double* partial, int64_t b, int64_t tiles, int columns, int column) {
  double total = 0;
  for (int64_t k = 0; k < tiles; ++k) total += partial[(b * tiles + k) * columns + column];
  return total;
}

template <typename acc_t>
void finish(const Call<acc_t>& call, const double* partial, int64_t tiles) {
  const PolicyLossParams& p = call.p;
  double result = 0;
  for (int64_t b = 0; b < p.grid.batch; ++b) {
    if (p.outputs & kWriteSums) {
      acc_t* sums = static_cast<acc_t*>(p.sums) + b * kPolicySums;
      for (int c = 0; c < kPolicySums; ++c) sums[c] = acc_t(sum_tiles(partial, b, tiles, kColumns, 1 + c));
      double largest = 0;
      for (int64_t k = 0; k < tiles; ++k) {
        const double other = partial[(b * tiles + k) * kColumns + 1 + kPolicyLargest];
        largest = other > largest ? other : largest;
      }
      sums[kPolicyLargest] = acc_t(largest);
    }
    const double total = sum_tiles(partial, b, tiles, kColumns, 0);
    const double share = p.reduction == kSum ? total : total / double(call.pixels.count);
    result += share;
    if ((p.outputs & kWriteLoss) && p.reduction == kSample) static_cast<acc_t*>(p.loss)[b] = acc_t(share);
  }
  if (!(p.outputs & kWriteLoss) || p.reduction == kSample) return;
  *static_cast<acc_t*>(p.loss) = acc_t(p.reduction == kMean ? result / double(p.grid.batch) : result);
}

template <typename acc_t>
void run_policy_loss(const PolicyLossParams& p, int threads) {
  const Call<acc_t> call(p);
  if (p.outputs & kWriteGrad) ask_for_large_pages(p.grad, p.grid.batch * p.grid.count * element_size(p.grid.dtype));
  const int64_t items = call.tiling.items, tiles = items < kTiles ? items : kTiles, batch = p.grid.batch;
  const Scratch partial(batch * tiles * kColumns);
  if (p.outputs & kWriteLogProb) {
    for_blocks(call, tiles, kColumns, partial.data, threads, [&](const auto& s, const Block& at, auto& buf, double*) {
      sum_channels(call, s, at, buf);
      write_log_prob(call, s, at, buf);
    });
    return;
  }
  const bool by_sample = p.level == kSampleLevel;
  const Scratch moments(by_sample ? batch * tiles * kPolicyMoments : 1);
  if (by_sample) {
    const auto add = [&](const auto& s, const Block& at, auto& buf, double* sums) {
      fill_pixels(call, s, at, buf);
      sum_channels(call, s, at, buf);
      fill_change(call, s, at.count, buf);
      add_moments(s, at.count, buf, sums);
    };
    for_blocks(call, tiles, kPolicyMoments, moments.data, threads, add);
  }
  const auto weigh = [&](const auto& s, const Block& at, auto& buf, double* sums) {
    fill_pixels(call, s, at, buf);
    if (!by_sample || p.has_ref() || (p.outputs & kWriteGrad)) sum_channels(call, s, at, buf);
    if (!by_sample) {
      fill_change(call, s, at.count, buf);
      weigh_pixels<acc_t>(call, s, nullptr, at.count, buf, sums);
    } else {
      double of_sample[kPolicyMoments];
      for (int c = 0; c < kPolicyMoments; ++c) of_sample[c] = sum_tiles(moments.data, at.b, tiles, kPolicyMoments, c);
      const SampleRatio<acc_t> sample = sample_ratio<acc_t>(of_sample, s.low, s.high);
      weigh_pixels(call, s, &sample, at.count, buf, sums);
    }
    if (p.outputs & kWriteGrad) write_gradient(call, s, at, buf);
  };
  for_blocks(call, tiles, kColumns, partial.data, threads, weigh);
  if (p.outputs & (kWriteLoss | kWriteSums)) finish(call, partial.data, tiles);
}

}  // namespace

namespace cpu {

void DD_CPU_ISA::policy_loss(const PolicyLossParams& p, int threads) {
  if (p.grid.dtype == kFloat64)
    run_policy_loss<double>(p, threads);
  else
    run_policy_loss<float>(p, threads);
}

}  // namespace cpu
}  // namespace diffdoctor
