// policy_loss over a whole call. A block of pixels with all its channels stays in the cache between two passes: the sums
// over channels, from which each pixel's ratio follows, and the gradient. Compiled once for each instruction set; all of
// it has internal linkage but the entry point at the end.
#include "cpu/policy_loss.h"

#include "cpu/parallel.h"
#include "cpu/tiles/channels.h"
#include "cpu/tiles/map_rows.h"
#include "cpu/vector_math.h"

namespace diffdoctor {
namespace {

constexpr int64_t kTiles = 256;    // of a sample at most, whose partial sums are added in order
constexpr int64_t kGrain = 16384;  // elements below which another thread does not pay
constexpr int64_t kBlock = 8192;   // elements of a block: its operands stay in the second-level cache
constexpr int64_t kPixels = 1024;  // of a block at most, and a vector's worth at least

// Columns of the partial sums: the loss, then those of PolicySum; or the moments of level "sample".
constexpr int kColumns = 1 + kPolicySums;

template <typename acc_t>
struct alignas(64) Buffers {
  acc_t k[kPixels], advantage[kPixels], change[kPixels], old[kPixels], sum[kPixels], kl[kPixels];
  acc_t ratio[kPixels], slope[kPixels], kl_slope[kPixels];
  acc_t pred[kBlock], latents[kBlock], next_latents[kBlock], ref_pred[kBlock], grad[kBlock];
  bool nan[kPixels];  // where the advantage is
  MapScratch<acc_t> maps;
};

// The space of a sample's pixels: that of its elements with one channel.
inline WeightedLossParams pixels_of(const PolicyLossParams& p) {
  WeightedLossParams pixels = p.grid;
  pixels.count = p.grid.count / p.channels();
  pixels.size[p.channel_dim] = 1;
  for (int32_t& varies : pixels.map_varies) varies = 1;  // every block is a work item of its own
  return pixels;
}

inline int64_t block_pixels(int64_t channels) {
  const int64_t most = kBlock / channels;
  return most > kPixels ? kPixels : (most < 16 ? 16 : most);
}

enum OperandKind { kPred, kGrad, kLatents, kNextLatents, kRefPred, kOperands };

template <typename acc_t>
struct Call {
  const PolicyLossParams& p;
  const WeightedLossParams pixels;
  const Tiling tiling;
  const int64_t channels;
  int64_t inner;  // pixels of a row, behind the channels in memory
  bool rows;      // a block with all its channels is one run of memory that begins with a row
  const Operand* operands[kOperands];
  int64_t channel_stride[kOperands];
  bool run[kOperands];  // a channel of a block is a run of memory
  bool log_prob_run;

  explicit Call(const PolicyLossParams& params)
      : p(params), pixels(pixels_of(params)), tiling(make_tiling(pixels, block_pixels(params.channels()))),
        channels(params.channels()) {
    const Operand* all[kOperands] = {&p.grid.pred, &p.grid.grad, &p.grid.terms[0], &p.grid.terms[1], &p.grid.terms[2]};
    for (int k = 0; k < kOperands; ++k) {
      operands[k] = all[k];
      channel_stride[k] = all[k]->stride[p.channel_dim];
      run[k] = block_is_run(pixels, tiling, all[k]->stride);
    }
    log_prob_run = block_is_run(pixels, tiling, p.grid.weighting.stride);
    inner = 1;
    for (int d = p.channel_dim + 1; d < kMaxDims; ++d) inner *= p.grid.size[d];
    rows = p.grid.contiguous && channels > 1 && p.channel_dim > tiling.split && channels <= kBlock / 16;
  }

  int64_t offset(const Block& at, const Operand& x) const {
    return block_offset(tiling, at, x.batch_stride, x.stride);
  }
};

// A channel's run of an operand, or all rows of a block, as acc_t: a pointer into it where it holds that type.
template <typename acc_t>
const acc_t* converted(const Call<acc_t>& call, const Block& at, int kind, int64_t channel, acc_t* buffer) {
  const Operand& x = *call.operands[kind];
  const int64_t offset = call.offset(at, x) + channel * call.channel_stride[kind];
  const int64_t n = call.rows ? at.count * call.channels : at.count;
  if (call.rows || call.run[kind]) {
    if (x.dtype == kAccDtype<acc_t>) return static_cast<const acc_t*>(x.data) + offset;
    load_run<acc_t>(x.data, x.dtype, offset, 1, n, buffer);
  } else {
    gather(call.pixels, call.tiling, at, x.data, x.dtype, x.stride, offset, buffer);
  }
  return buffer;
}

// body(operands, channel) for each channel, or once for all rows; the operands in place where that is possible.
template <typename pred_t, typename term_t, typename acc_t, typename body_t>
void visit_channels(const Call<acc_t>& call, const Block& at, Buffers<acc_t>& buf, bool write, const body_t& body) {
  const PolicyLossParams& p = call.p;
  constexpr bool kDirectPred = sizeof(pred_t) != sizeof(acc_t), kDirectTerms = sizeof(term_t) != sizeof(acc_t);
  const int64_t visits = call.rows ? 1 : call.channels;
  const auto place = [&](int kind, int64_t channel) {
    const Operand& x = *call.operands[kind];
    return address(x.data, x.dtype, call.offset(at, x) + channel * call.channel_stride[kind]);
  };
  for (int64_t c = 0; c < visits; ++c) {
    ChannelOperands<pred_t, term_t> x = {};
    if constexpr (kDirectPred)
      x.pred = static_cast<const pred_t*>(place(kPred, c));
    else
      x.pred = converted(call, at, kPred, c, buf.pred);
    if constexpr (kDirectTerms) {
      x.latents = static_cast<const term_t*>(place(kLatents, c));
      x.next_latents = static_cast<const term_t*>(place(kNextLatents, c));
      if (p.has_ref()) x.ref_pred = static_cast<const term_t*>(place(kRefPred, c));
    } else {
      x.latents = converted(call, at, kLatents, c, buf.latents);
      x.next_latents = converted(call, at, kNextLatents, c, buf.next_latents);
      if (p.has_ref()) x.ref_pred = converted(call, at, kRefPred, c, buf.ref_pred);
    }
    if (!write) {
      body(x);
      continue;
    }
    const Operand& grad = *call.operands[kGrad];
    const int64_t n = call.rows ? at.count * call.channels : at.count;
    const int64_t to = call.offset(at, grad) + c * call.channel_stride[kGrad];
    const bool dense = call.rows || call.run[kGrad];
    if (kDirectPred || (dense && grad.dtype == kAccDtype<acc_t>)) {
      x.grad = static_cast<pred_t*>(const_cast<void*>(address(grad.data, grad.dtype, to)));
      body(x);
      continue;
    }
    if constexpr (!kDirectPred) x.grad = buf.grad;
    body(x);
    if (dense)
      store_run<acc_t>(grad.data, grad.dtype, to, 1, n, buf.grad);
    else
      scatter(call.pixels, call.tiling, at, grad.data, grad.dtype, grad.stride, to, call.tiling.split, buf.grad);
  }
}

// bf16 is read and written in place where all of a block's operands are runs, everything else as acc_t.
template <typename acc_t, typename body_t>
void visit(const Call<acc_t>& call, const Block& at, Buffers<acc_t>& buf, bool write, const body_t& body) {
  if constexpr (sizeof(acc_t) == sizeof(float)) {
    const int last = call.p.has_ref() ? kRefPred : kNextLatents;
    const auto direct = [&](int kind) {
      return call.operands[kind]->dtype == kBFloat16 && (call.rows || call.run[kind]);
    };
    bool pred = direct(kPred) && (!write || direct(kGrad)), terms = true;
    for (int kind = kLatents; kind <= last; ++kind) terms = terms && direct(kind);
    if (pred && terms) return visit_channels<bfloat16, bfloat16>(call, at, buf, write, body);
    if (pred) return visit_channels<bfloat16, float>(call, at, buf, write, body);
    if (terms) return visit_channels<float, bfloat16>(call, at, buf, write, body);
  }
  visit_channels<acc_t, acc_t>(call, at, buf, write, body);
}

// The block's masks, advantages and old log-probabilities.
template <typename acc_t>
void fill_pixels(const Call<acc_t>& call, const PolicyStep<acc_t>& s, const Block& at, Buffers<acc_t>& buf) {
  const WeightedLossParams& pixels = call.pixels;
  const int64_t n = at.count;
  if (pixels.mask.mode != kAbsent) {
    gather_map(pixels, call.tiling, at, pixels.mask, buf.maps, buf.k);
    for (int64_t i = 0; i < n; ++i) buf.k[i] = region(buf.k[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) buf.k[i] = 1;
  }
  if (pixels.confidence.mode != kAbsent) gather_map(pixels, call.tiling, at, pixels.confidence, buf.maps, buf.advantage);
  for (int64_t i = 0; i < n; ++i) {
    const acc_t value = pixels.confidence.mode != kAbsent ? buf.advantage[i] : acc_t(0);
    buf.nan[i] = value != value;
    buf.advantage[i] = bounded_advantage(value, s.most);
  }
  if (call.p.old == kOldPerPixel) {
    const Operand& old = pixels.weighting;
    gather(pixels, call.tiling, at, old.data, old.dtype, old.stride, call.offset(at, old), buf.old);
  } else {
    for (int64_t i = 0; i < n; ++i) buf.old[i] = s.old_mean;
  }
}

// The sums over channels of a block's pixels: sum and, with a ref_pred, kl.
template <typename acc_t>
void sum_channels(const Call<acc_t>& call, const PolicyStep<acc_t>& s, const Block& at, Buffers<acc_t>& buf) {
  for (int64_t i = 0; i < at.count; ++i) buf.sum[i] = buf.kl[i] = 0;
  visit(call, at, buf, false, [&](const auto& x) {
    if (call.rows)
      add_rows(x, s.a, s.b, at.count / call.inner, call.channels, call.inner, buf.sum, buf.kl);
    else
      add_channel(x, s.a, s.b, at.count, buf.sum, buf.kl);
  });
}

// change: the log-probability less the old one.
template <typename acc_t>
void fill_change(const Call<acc_t>& call, const PolicyStep<acc_t>& s, int64_t n, Buffers<acc_t>& buf) {
  const bool on_policy = call.p.old == kOldIsNew;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const acc_t value = s.log_prob * buf.sum[i];
    buf.change[i] = value - (on_policy ? value : buf.old[i]);
  }
}

template <typename acc_t>
void write_log_prob(const Call<acc_t>& call, const PolicyStep<acc_t>& s, const Block& at, Buffers<acc_t>& buf) {
  const Operand& to = call.p.grid.weighting;
  for (int64_t i = 0; i < at.count; ++i) buf.sum[i] = s.inverse == 0 ? acc_t(0) : s.log_prob * buf.sum[i];
  if (call.log_prob_run)
    store_run<acc_t>(to.data, to.dtype, call.offset(at, to), 1, at.count, buf.sum);
  else
    scatter(call.pixels, call.tiling, at, to.data, to.dtype, to.stride, call.offset(at, to), call.tiling.split, buf.sum);
}

// What the pixels of a block add to the columns, from their ratios; their slopes.
template <typename acc_t>
void weigh_pixels(const Call<acc_t>& call, const PolicyStep<acc_t>& s, const SampleRatio<acc_t>* sample, int64_t n,
                  Buffers<acc_t>& buf, double* columns) {
  const bool has_ref = call.p.has_ref() && s.kl_weight != 0, left_out = s.inverse == 0;
  acc_t total = 0;
  if (sample) {
    for (int64_t i = 0; i < n; ++i) buf.ratio[i] = sample->ratio;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buf.ratio[i] = vector_exp(buf.change[i]);
  }
  const acc_t sample_slope = sample ? sample->slope * s.slope : acc_t(0);
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const acc_t k = left_out ? acc_t(0) : buf.k[i];
    const PolicyTerm<acc_t> term = policy_term(buf.ratio[i], buf.advantage[i], s.low, s.high);
    const acc_t divergence = has_ref ? s.kl_weight * s.kl * buf.kl[i] : acc_t(0);
    total += k == 0 ? acc_t(0) : k * (term.loss + divergence);
    const acc_t slope = sample ? sample_slope : term.slope * s.slope;
    buf.slope[i] = (k == 0) | (slope == 0) ? acc_t(0) : k * slope;
    buf.kl_slope[i] = has_ref & (k != 0) ? k * s.kl_slope : acc_t(0);
  }
  columns[0] += total;
  if (!(call.p.outputs & kWriteSums) || left_out) return;
  double* const sums = columns + 1;
  for (int64_t i = 0; i < n; ++i) {
    if (buf.k[i] == 0) continue;
    const acc_t ratio = buf.ratio[i];
    const PolicyTerm<acc_t> term = policy_term(ratio, buf.advantage[i], s.low, s.high);
    const acc_t kl = s.kl * buf.kl[i], loss = has_ref ? term.loss + s.kl_weight * kl : term.loss;
    sums[kPolicyCounted] += 1;
    sums[kPolicyRatio] += ratio;
    sums[kPolicyLargest] = ratio > sums[kPolicyLargest] ? double(ratio) : sums[kPolicyLargest];
    sums[kPolicyClipped] += term.cut;
    sums[kPolicyKl] += kl;
    sums[kPolicyNonfinite] += buf.nan[i] || loss - loss != 0;
  }
}

template <typename acc_t>
void write_gradient(const Call<acc_t>& call, const PolicyStep<acc_t>& s, const Block& at, Buffers<acc_t>& buf) {
  const bool kl = call.p.has_ref() && s.kl_weight != 0;
  visit(call, at, buf, true, [&](const auto& x) {
    const int64_t rows = at.count / call.inner;
    if (call.rows && kl)
      write_rows<true>(x, s.a, s.b, rows, call.channels, call.inner, buf.slope, buf.kl_slope);
    else if (call.rows)
      write_rows<false>(x, s.a, s.b, rows, call.channels, call.inner, buf.slope, buf.kl_slope);
    else if (kl)
      write_channel<true>(x, s.a, s.b, at.count, buf.slope, buf.kl_slope);
    else
      write_channel<false>(x, s.a, s.b, at.count, buf.slope, buf.kl_slope);
  });
}

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
    if (!by_sample || p.has_ref()) sum_channels(call, s, at, buf);
    if (!by_sample) {
      fill_change(call, s, at.count, buf);
      weigh_pixels<acc_t>(call, s, nullptr, at.count, buf, sums);
    } else {
      double of_sample[kPolicyMoments];
      for (int c = 0; c < kPolicyMoments; ++c) of_sample[c] = sum_tiles(moments.data, at.b, tiles, kPolicyMoments, c);
      const SampleRatio<acc_t> sample = sample_ratio<acc_t>(of_sample, s.low, s.high);
      if (!p.has_ref())
        for (int64_t i = 0; i < at.count; ++i) buf.kl[i] = 0;
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
