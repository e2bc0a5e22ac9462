// A block of policy_loss's pixels with all its channels: the sums over channels, from which each pixel's ratio follows,
// what the pixels add to the loss, and the gradient.
#pragma once

#include "common/policy_loss.h"
#include "cpu/cache.h"
#include "cpu/stream.h"
#include "cpu/tiles/channels.h"
#include "cpu/tiles/map_rows.h"
#include "cpu/vector_math.h"

namespace diffdoctor {
namespace {

constexpr int64_t kBlock = 32768;  // elements of a block, or kFewest pixels: its residuals stay in the cache
constexpr int64_t kFewest = 16;
// Pixels of a block at most: a channel's run of them fills the pages it lies on, since finding each anew takes as long
// as reading it. Also the elements that go through buffers at once.
constexpr int64_t kPixels = 2048;

// Columns of the partial sums: the loss, then those of PolicySum; or the moments of level "sample".
constexpr int kColumns = 1 + kPolicySums;

template <typename acc_t>
struct alignas(64) Buffers {
  acc_t k[kPixels], given[kPixels], advantage[kPixels], change[kPixels], old[kPixels], sum[kPixels], kl[kPixels];
  acc_t ratio[kPixels], slope[kPixels], kl_slope[kPixels];
  acc_t pred[kPixels], latents[kPixels], next_latents[kPixels], ref_pred[kPixels], grad[kPixels];
  MapScratch<acc_t> maps;
  acc_t *d, *away;  // of all elements of a block
};
static_assert(sizeof(Buffers<double>) <= 384 * 1024, "macOS gives a thread 512 KiB of stack");

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
  return most > kPixels ? kPixels : (most < kFewest ? kFewest : most);
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
  bool streams;  // channels of the gradient that are runs are stored past the caches

  explicit Call(const PolicyLossParams& params)
      : p(params),
        pixels(pixels_of(params)),
        tiling(make_tiling(pixels, block_pixels(params.channels()))),
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
    int64_t bytes = 0;  // of an element
    for (int k = 0; k < (p.has_ref() ? kOperands : kRefPred); ++k) bytes += element_size(operands[k]->dtype);
    streams = kCanStream && (p.outputs & kWriteGrad) && p.grid.batch * p.grid.count * bytes >= cpu::stream_from();
    rows = p.grid.contiguous && channels > 1 && p.channel_dim > tiling.split;
  }

  int64_t offset(const Block& at, const Operand& x) const { return block_offset(tiling, at, x.batch_stride, x.stride); }
};

// n elements of a block's operand as acc_t, from `begin` of its rows, or of a channel: a pointer into it where it holds
// that type.
template <typename acc_t>
const acc_t* converted(const Call<acc_t>& call, const Block& at, int kind, int64_t offset, int64_t n, acc_t* buffer) {
  const Operand& x = *call.operands[kind];
  if (call.rows || call.run[kind]) {
    if (x.dtype == kAccDtype<acc_t>) return static_cast<const acc_t*>(x.data) + offset;
    load_run<acc_t>(x.data, x.dtype, offset, 1, n, buffer);
  } else {
    gather(call.pixels, call.tiling, at, x.data, x.dtype, x.stride, offset, buffer);
  }
  return buffer;
}

// A block's elements are gone through in segments: its channels, or pieces of its rows. begin: of the segment in d.
struct Segment {
  int64_t begin, count, channel;
};

template <typename acc_t, typename body_t>
void for_segments(const Call<acc_t>& call, const Block& at, const body_t& body) {
  const int64_t all = at.count * call.channels, most = call.rows ? kPixels : at.count;
  for (int64_t begin = 0, channel = 0; begin < all; begin += most, ++channel)
    body(Segment{begin, all - begin < most ? all - begin : most, channel});
}

template <typename acc_t>
int64_t segment_offset(const Call<acc_t>& call, const Block& at, int kind, const Segment& segment) {
  const int64_t offset = call.offset(at, *call.operands[kind]);
  return offset + (call.rows ? segment.begin : segment.channel * call.channel_stride[kind]);
}

// The start of the next segment's run into the cache while this one is computed: the hardware's own prefetcher starts
// anew with each run, and its page may have to be looked up first.
template <typename acc_t>
void prefetch_segment(const Call<acc_t>& call, const Block& at, int kind, Segment segment) {
  if (call.rows || !call.run[kind] || ++segment.channel == call.channels) return;
  const Operand& x = *call.operands[kind];
  const void* from = address(x.data, x.dtype, segment_offset(call, at, kind, segment));
  for (int line = 0; line < 8; ++line) prefetch(static_cast<const char*>(from) + 64 * line);
}

template <typename pred_t, typename term_t, typename acc_t>
void fill_block(const Call<acc_t>& call, const PolicyStep<acc_t>& s, const Block& at, Buffers<acc_t>& buf) {
  const Map& map = call.pixels.confidence;
  const Operand& old_log_prob = call.pixels.weighting;
  RunAhead advantage, old;
  if (!call.rows && map.mode == kSame && block_is_run(call.pixels, call.tiling, map.stride))
    advantage = RunAhead(map.data, map.dtype, block_offset(call.tiling, at, map.batch_stride, map.stride), at.count,
                         call.channels);
  if (!call.rows && call.p.old == kOldPerPixel && call.log_prob_run)
    old = RunAhead(old_log_prob.data, old_log_prob.dtype, call.offset(at, old_log_prob), at.count, call.channels);
  for_segments(call, at, [&](const Segment& segment) {
    advantage.fetch();
    old.fetch();
    StepOperands<pred_t, term_t> x = {};
    const auto place = [&](int kind, auto* buffer, auto*& to) {
      prefetch_segment(call, at, kind, segment);
      const int64_t offset = segment_offset(call, at, kind, segment);
      const Operand& from = *call.operands[kind];
      using storage_t = std::remove_const_t<std::remove_pointer_t<std::remove_reference_t<decltype(to)>>>;
      if constexpr (std::is_same_v<storage_t, acc_t>)
        to = converted(call, at, kind, offset, segment.count, buffer);
      else
        to = static_cast<const storage_t*>(address(from.data, from.dtype, offset));
    };
    place(kPred, buf.pred, x.pred);
    place(kLatents, buf.latents, x.latents);
    place(kNextLatents, buf.next_latents, x.next_latents);
    if (call.p.has_ref()) place(kRefPred, buf.ref_pred, x.ref_pred);
    acc_t *const sum = call.rows ? nullptr : buf.sum, *const kl = call.rows ? nullptr : buf.kl;
    fill_residuals(x, s.a, s.b, segment.count, buf.d + segment.begin, buf.away + segment.begin, sum, kl);
  });
}

// The residuals of a block, and their sums of squares over channels: sum and, with a ref_pred, kl. bf16 is read in
// place where all of the operands are runs of it, everything else as acc_t.
template <typename acc_t>
void sum_channels(const Call<acc_t>& call, const PolicyStep<acc_t>& s, const Block& at, Buffers<acc_t>& buf) {
  for (int64_t i = 0; i < at.count; ++i) buf.sum[i] = buf.kl[i] = 0;
  const auto direct = [&](int kind) {
    return call.operands[kind]->dtype == kBFloat16 && (call.rows || call.run[kind]);
  };
  bool terms = sizeof(acc_t) == sizeof(float);
  for (int kind = kLatents; kind <= (call.p.has_ref() ? kRefPred : kNextLatents); ++kind) terms = terms && direct(kind);
  if (terms && direct(kPred))
    fill_block<bfloat16, bfloat16>(call, s, at, buf);
  else
    fill_block<acc_t, acc_t>(call, s, at, buf);
  if (!call.rows) return;
  const int64_t rows = at.count / call.inner;
  add_rows(buf.d, rows, call.channels, call.inner, buf.sum);
  if (call.p.has_ref()) add_rows(buf.away, rows, call.channels, call.inner, buf.kl);
}

// The block's masks, advantages and old log-probabilities.
template <typename acc_t>
void fill_pixels(const Call<acc_t>& call, const PolicyStep<acc_t>& s, const Block& at, Buffers<acc_t>& buf) {
  const WeightedLossParams& pixels = call.pixels;
  const int64_t n = at.count;
  if (s.inverse == 0) {  // nothing was drawn: no pixel counts
    for (int64_t i = 0; i < n; ++i) buf.k[i] = 0;
  } else if (pixels.mask.mode != kAbsent) {
    gather_map(pixels, call.tiling, at, pixels.mask, buf.maps, buf.k);
    for (int64_t i = 0; i < n; ++i) buf.k[i] = region(buf.k[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) buf.k[i] = 1;
  }
  gather_map(pixels, call.tiling, at, pixels.confidence, buf.maps, buf.given);
  for (int64_t i = 0; i < n; ++i) buf.advantage[i] = bounded_advantage(buf.given[i], s.most);
  if (call.p.old == kOldPerPixel) {
    const Operand& old = pixels.weighting;
    gather(pixels, call.tiling, at, old.data, old.dtype, old.stride, call.offset(at, old), buf.old);
  } else {
    for (int64_t i = 0; i < n; ++i) buf.old[i] = s.old_mean;
  }
}

// change: the log-probability less the old one.
template <typename acc_t>
void fill_change(const Call<acc_t>& call, const PolicyStep<acc_t>& s, int64_t n, Buffers<acc_t>& buf) {
  const bool on_policy = call.p.old == kOldIsNew;
  DD_SIMD
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
    scatter(call.pixels, call.tiling, at, to.data, to.dtype, to.stride, call.offset(at, to), call.tiling.split,
            buf.sum);
}

// The sum of the pixels' losses; their ratios from change, and their slopes. By value: what is stored must not make the
// compiler read the numbers again.
template <bool kSample, bool kKl, typename acc_t>
DD_NOINLINE acc_t weigh_run(const PolicyStep<acc_t> s, const SampleRatio<acc_t> sample, int64_t n,
                            Buffers<acc_t>& buf) {
  const acc_t *const all_k = buf.k, *const advantage = buf.advantage, *const change = buf.change, *const kl = buf.kl;
  acc_t *const ratio = buf.ratio, *const slope = buf.slope, *const kl_slope = buf.kl_slope;
  const acc_t divergence = s.kl_weight * s.kl, sample_slope = sample.slope * s.slope;
  acc_t total = 0;
  DD_SIMD_SUM(total)
  for (int64_t i = 0; i < n; ++i) {
    const acc_t k = all_k[i], r = kSample ? sample.ratio : vector_exp(change[i]);
    const PolicyTerm<acc_t> term = policy_term(r, advantage[i], s.low, s.high);
    const acc_t weighted = k * (kKl ? term.loss + divergence * kl[i] : term.loss);
    const acc_t steep = k * (kSample ? sample_slope : term.slope * s.slope);
    ratio[i] = r;
    total += k == 0 ? acc_t(0) : weighted;
    slope[i] = k == 0 ? acc_t(0) : steep;
    if (kKl) kl_slope[i] = k == 0 ? acc_t(0) : k * s.kl_slope;
  }
  return total;
}

// What the pixels of a block add to the columns, from their ratios; their slopes.
template <typename acc_t>
void weigh_pixels(const Call<acc_t>& call, const PolicyStep<acc_t>& s, const SampleRatio<acc_t>* sample, int64_t n,
                  Buffers<acc_t>& buf, double* columns) {
  const bool has_ref = call.p.has_ref() && s.kl_weight != 0, left_out = s.inverse == 0;
  if (sample)
    columns[0] += has_ref ? weigh_run<true, true>(s, *sample, n, buf) : weigh_run<true, false>(s, *sample, n, buf);
  else
    columns[0] += has_ref ? weigh_run<false, true>(s, SampleRatio<acc_t>{}, n, buf)
                          : weigh_run<false, false>(s, SampleRatio<acc_t>{}, n, buf);
  if (!(call.p.outputs & kWriteSums) || left_out) return;
  double* const sums = columns + 1;
  for (int64_t i = 0; i < n; ++i) {
    if (buf.k[i] == 0) continue;
    const acc_t ratio = buf.ratio[i];
    const PolicyTerm<acc_t> term = policy_term(ratio, buf.advantage[i], s.low, s.high);
    const acc_t kl = call.p.has_ref() ? s.kl * buf.kl[i] : acc_t(0),
                loss = has_ref ? term.loss + s.kl_weight * kl : term.loss;
    sums[kPolicyCounted] += 1;
    sums[kPolicyRatio] += ratio;
    sums[kPolicyLargest] = ratio > sums[kPolicyLargest] ? double(ratio) : sums[kPolicyLargest];
    sums[kPolicyClipped] += term.cut;
    sums[kPolicyKl] += kl;
    sums[kPolicyNonfinite] += buf.given[i] != buf.given[i] || loss - loss != 0;
  }
}

template <typename acc_t>
void write_gradient(const Call<acc_t>& call, const PolicyStep<acc_t>& s, const Block& at, Buffers<acc_t>& buf) {
  const Operand& grad = *call.operands[kGrad];
  const acc_t* away = call.p.has_ref() && s.kl_weight != 0 ? buf.away : nullptr;
  const int64_t base = call.offset(at, grad), rows = at.count / call.inner;
  const auto write = [&](auto* out) {  // of all rows, in place
    write_rows(buf.d, away, buf.slope, buf.kl_slope, rows, call.channels, call.inner, out);
  };
  if (call.rows && grad.dtype == kBFloat16 && sizeof(acc_t) == sizeof(float))
    return write(static_cast<bfloat16*>(grad.data) + base);
  if (call.rows && grad.dtype == kAccDtype<acc_t>) return write(static_cast<acc_t*>(grad.data) + base);
  if (call.rows) {  // over the residuals, which are not needed any more
    write(buf.d);
    store_run<acc_t>(grad.data, grad.dtype, base, 1, at.count * call.channels, buf.d);
    return;
  }
  for_segments(call, at, [&](const Segment& segment) {
    if (!call.streams) prefetch_segment(call, at, kGrad, segment);
    const int64_t to = segment_offset(call, at, kGrad, segment), n = segment.count;
    const auto write_to = [&](auto* out) {
      write_channel(buf.d + segment.begin, away ? away + segment.begin : away, buf.slope, buf.kl_slope, n, out);
    };
    const auto write_run = [&](auto* run) {
      if (!call.streams) return write_to(run);
      write_to(reinterpret_cast<decltype(run)>(buf.grad));
      stream_copy(run, buf.grad, n * static_cast<int64_t>(sizeof(*run)));
    };
    if (call.run[kGrad] && grad.dtype == kBFloat16 && sizeof(acc_t) == sizeof(float))
      return write_run(static_cast<bfloat16*>(grad.data) + to);
    if (call.run[kGrad] && grad.dtype == kAccDtype<acc_t>) return write_run(static_cast<acc_t*>(grad.data) + to);
    write_to(buf.grad);
    if (call.run[kGrad])
      store_run<acc_t>(grad.data, grad.dtype, to, 1, n, buf.grad);
    else
      scatter(call.pixels, call.tiling, at, grad.data, grad.dtype, grad.stride, to, call.tiling.split, buf.grad);
  });
}

}  // namespace
}  // namespace diffdoctor
