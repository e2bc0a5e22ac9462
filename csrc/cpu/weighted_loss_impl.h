// weighted_loss over a whole call. Included once per instruction set; all of it has internal linkage but the entry
// points named by DD_CPU_ISA. No std containers: their out-of-line copies would be shared between the sets.
#pragma once

#include <cstdlib>

#include "cpu/chunk.h"
#include "cpu/parallel.h"

namespace diffdoctor {
namespace {

// Partial sums are kept per tile, at most this many for a sample, and added in order: the same bits for any number of
// threads, and memory that does not grow with the sample.
constexpr int64_t kTiles = 256;
constexpr int64_t kGrain = 16384;  // elements below which another thread does not pay

template <typename acc_t>
struct Buffers {
  Weights<acc_t> maps;
  acc_t v[kChunk], weight[kChunk], modulated[kChunk];
  acc_t pred[kChunk], target[kChunk], term[kChunk], grad[kChunk];
  acc_t d[kChunk], loss[kChunk], slope[kChunk];
};

template <typename acc_t>
struct Call {
  const WeightedLossParams& p;
  Tiling tiling;
  bool has_maps, modulated, l2_only, pred_run, grad_run, term_run[kMaxTerms], plain_target;
  acc_t clean_weight, clean_grad;

  explicit Call(const WeightedLossParams& params) : p(params), tiling(make_tiling(params)) {
    has_maps = p.confidence.mode != kAbsent || p.mask.mode != kAbsent;
    modulated = modulates(p);
    l2_only = true;
    for (int k = kL1; k < kLossKinds; ++k) l2_only = l2_only && p.strength[k] == 0;
    pred_run = block_is_run(p, tiling, p.pred.stride);
    grad_run = (p.work & kWriteGrad) && block_is_run(p, tiling, p.grad.stride);
    for (int k = 0; k < p.num_terms; ++k) term_run[k] = block_is_run(p, tiling, p.term[k].stride);
    plain_target = p.num_terms == 1 && p.coef[0].data == nullptr && p.coef[0].value == 1;
    clean_weight = acc_t(p.clean_weight);
    clean_grad = acc_t(p.clean_grad);
  }
};

template <typename acc_t>
void load_block(const Call<acc_t>& call, const Place& at, const Operand& x, bool run, acc_t* out) {
  const int64_t offset = block_offset(call.tiling, at, x.batch_stride, x.stride);
  if (run)
    load_run<acc_t>(x.data, x.dtype, offset, 1, at.count, out);
  else
    gather(call.p, call.tiling, at, x.data, x.dtype, x.stride, offset, call.tiling.split, out);
}

template <typename acc_t>
void store_block(const Call<acc_t>& call, const Place& at, const acc_t* values) {
  const Operand& x = call.p.grad;
  const int64_t offset = block_offset(call.tiling, at, x.batch_stride, x.stride);
  if (call.grad_run)
    store_run<acc_t>(x.data, x.dtype, offset, 1, at.count, values);
  else
    scatter(call.p, call.tiling, at, x.data, x.dtype, x.stride, offset, call.tiling.split, values);
}

// sum_k coef_k * term_k
template <typename acc_t>
void build_target(const Call<acc_t>& call, const Place& at, const Sample<acc_t>& s, Buffers<acc_t>& buf) {
  const WeightedLossParams& p = call.p;
  if (p.num_terms == 0) {
    for (int64_t i = 0; i < at.count; ++i) buf.target[i] = 0;
    return;
  }
  load_block(call, at, p.term[0], call.term_run[0], buf.target);
  if (call.plain_target) return;
  for (int64_t i = 0; i < at.count; ++i) buf.target[i] *= s.coef[0];
  for (int k = 1; k < p.num_terms; ++k) {
    load_block(call, at, p.term[k], call.term_run[k], buf.term);
    for (int64_t i = 0; i < at.count; ++i) buf.target[i] += s.coef[k] * buf.term[i];
  }
}

// The element-wise weights of a block: omega * v and omega * m * v. Null where they are constant over the call.
template <typename acc_t>
struct BlockWeights {
  const acc_t* weight;
  const acc_t* modulated;
};

template <typename acc_t>
BlockWeights<acc_t> block_weights(const Call<acc_t>& call, const Place& at, Buffers<acc_t>& buf) {
  const WeightedLossParams& p = call.p;
  const acc_t *omega = buf.maps.omega, *modulated = call.modulated ? buf.maps.modulated : omega;
  if (!p.weighting.present) {
    if (!call.has_maps) return {nullptr, nullptr};
    return {omega, modulated};
  }
  load_block(call, at, p.weighting, false, buf.v);
  const acc_t* v = buf.v;
  const acc_t plain = call.clean_weight, m = call.clean_grad;
  if (!call.has_maps)
    for (int64_t i = 0; i < at.count; ++i) {
      buf.weight[i] = v[i] == 0 || plain == 0 ? acc_t(0) : v[i] * plain;
      buf.modulated[i] = buf.weight[i] == 0 || m == 0 ? acc_t(0) : buf.weight[i] * m;
    }
  else
    for (int64_t i = 0; i < at.count; ++i) {
      buf.weight[i] = omega[i] == 0 || v[i] == 0 ? acc_t(0) : omega[i] * v[i];
      buf.modulated[i] = modulated[i] == 0 || v[i] == 0 ? acc_t(0) : modulated[i] * v[i];
    }
  return {buf.weight, call.modulated ? buf.modulated : buf.weight};
}

template <typename pred_t, typename term_t, typename acc_t>
acc_t run_l2(const pred_t* pred, const term_t* target, const BlockWeights<acc_t>& w, const Sample<acc_t>& s,
             acc_t loss_scale, acc_t grad_scale, int64_t n, pred_t* grad) {
  const auto run = [&](auto chunk) {
    return chunk(pred, target, w.weight, w.modulated, s.pred_scale, loss_scale, grad_scale, n, grad);
  };
  if (!grad)
    return w.weight ? run(l2_chunk<true, false, false, pred_t, term_t, acc_t>)
                    : run(l2_chunk<false, false, false, pred_t, term_t, acc_t>);
  if (!w.weight) return run(l2_chunk<false, false, true, pred_t, term_t, acc_t>);
  return w.modulated == w.weight ? run(l2_chunk<true, false, true, pred_t, term_t, acc_t>)
                                 : run(l2_chunk<true, true, true, pred_t, term_t, acc_t>);
}

// l2 read from and written to bf16 memory. False where the block does not lie that way.
inline bool direct_bfloat16(const Call<float>& call, const Place& at, const BlockWeights<float>& w,
                            const Sample<float>& s, float loss_scale, float grad_scale, bool write_grad, float& total) {
  const WeightedLossParams& p = call.p;
  if (p.pred_dtype != kBFloat16 || !call.pred_run || (write_grad && !call.grad_run)) return false;
  if (!call.plain_target || !call.term_run[0]) return false;
  const Tiling& t = call.tiling;
  const int64_t from = block_offset(t, at, p.term[0].batch_stride, p.term[0].stride);
  const bfloat16* pred =
      static_cast<const bfloat16*>(p.pred.data) + block_offset(t, at, p.pred.batch_stride, p.pred.stride);
  bfloat16* grad = nullptr;
  if (write_grad) grad = static_cast<bfloat16*>(p.grad.data) + block_offset(t, at, p.grad.batch_stride, p.grad.stride);
  if (p.term[0].dtype == kBFloat16)
    total =
        run_l2(pred, static_cast<const bfloat16*>(p.term[0].data) + from, w, s, loss_scale, grad_scale, at.count, grad);
  else if (p.term[0].dtype == kFloat32)
    total =
        run_l2(pred, static_cast<const float*>(p.term[0].data) + from, w, s, loss_scale, grad_scale, at.count, grad);
  else
    return false;
  return true;
}

inline bool direct_bfloat16(const Call<double>&, const Place&, const BlockWeights<double>&, const Sample<double>&,
                            double, double, bool, double&) {
  return false;
}

// A pointer to a block that lies in memory as a run of acc_t, else the block gathered into `buffer`.
template <typename acc_t>
const acc_t* block_values(const Call<acc_t>& call, const Place& at, const Operand& x, bool run, acc_t* buffer) {
  if (run && x.dtype == kAccDtype<acc_t>)
    return static_cast<const acc_t*>(x.data) + block_offset(call.tiling, at, x.batch_stride, x.stride);
  load_block(call, at, x, run, buffer);
  return buffer;
}

template <typename acc_t>
double process_l2(const Call<acc_t>& call, const Place& at, const Sample<acc_t>& s, Buffers<acc_t>& buf,
                  const BlockWeights<acc_t>& w) {
  const WeightedLossParams& p = call.p;
  const bool write_grad = (p.work & kWriteGrad) != 0;
  const acc_t strength = acc_t(p.strength[kL2]);
  const acc_t loss_scale = strength * s.weight * (w.weight ? acc_t(1) : call.clean_weight);
  const acc_t grad_scale =
      2 * strength * s.gradient_scale * (w.weight ? acc_t(1) : call.clean_weight * call.clean_grad);
  acc_t total = 0;
  if (direct_bfloat16(call, at, w, s, loss_scale, grad_scale, write_grad, total)) return total;
  const acc_t* pred = block_values(call, at, p.pred, call.pred_run, buf.pred);
  const acc_t* target = buf.target;
  if (call.plain_target)
    target = block_values(call, at, p.term[0], call.term_run[0], buf.target);
  else
    build_target(call, at, s, buf);
  if (!write_grad) return run_l2<acc_t, acc_t, acc_t>(pred, target, w, s, loss_scale, grad_scale, at.count, nullptr);
  const Operand& grad = p.grad;
  const bool in_place = call.grad_run && grad.dtype == kAccDtype<acc_t>;
  acc_t* out = buf.grad;
  if (in_place) out = static_cast<acc_t*>(grad.data) + block_offset(call.tiling, at, grad.batch_stride, grad.stride);
  total = run_l2(pred, target, w, s, loss_scale, grad_scale, at.count, out);
  if (!in_place) store_block(call, at, buf.grad);
  return total;
}

template <typename acc_t>
double process_general(const Call<acc_t>& call, const Place& at, const Sample<acc_t>& s, Buffers<acc_t>& buf,
                       BlockWeights<acc_t> w, double* sums, bool write_grad) {
  const WeightedLossParams& p = call.p;
  const int64_t n = at.count;
  if (!w.weight) {
    const acc_t modulated =
        call.clean_weight == 0 || call.clean_grad == 0 ? acc_t(0) : call.clean_weight * call.clean_grad;
    for (int64_t i = 0; i < n; ++i) {
      buf.weight[i] = call.clean_weight;
      buf.modulated[i] = modulated;
    }
    w = {buf.weight, buf.modulated};
  }
  load_block(call, at, p.pred, call.pred_run, buf.pred);
  build_target(call, at, s, buf);
  for (int64_t i = 0; i < n; ++i) {
    const acc_t d = s.pred_scale * buf.pred[i] - buf.target[i];
    buf.d[i] = w.weight[i] == 0 ? acc_t(0) : d;
  }
  mixture(p, buf.d, s.huber_c, n, buf.loss, buf.slope);
  acc_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += w.weight[i] == 0 ? acc_t(0) : w.weight[i] * buf.loss[i];
  if (write_grad) {
    for (int64_t i = 0; i < n; ++i)
      buf.grad[i] = w.modulated[i] == 0 ? acc_t(0) : w.modulated[i] * buf.slope[i] * s.gradient_scale;
    store_block(call, at, buf.grad);
  }
  if (sums) {
    if (!call.has_maps)
      for (int64_t i = 0; i < n; ++i) {
        buf.maps.u[i] = 0;
        buf.maps.omega[i] = call.clean_weight;
      }
    for (int64_t i = 0; i < n; ++i) buf.term[i] = w.weight[i] == 0 ? acc_t(0) : w.weight[i] * s.weight;
    add_sums(buf.maps.u, buf.maps.omega, buf.term, buf.loss, n, sums);
  }
  return double(total) * double(s.weight);
}

// What a block leaves when its whole sample, or every element, is left out: a zero gradient, and omega in the sums.
template <typename acc_t>
void process_unselected(const Call<acc_t>& call, const Place& at, Buffers<acc_t>& buf, double* sums) {
  if (call.p.work & kWriteGrad) {
    for (int64_t i = 0; i < at.count; ++i) buf.grad[i] = 0;
    store_block(call, at, buf.grad);
  }
  if (!sums) return;
  for (int64_t i = 0; i < at.count; ++i) {
    sums[kSumWeight] += call.has_maps ? buf.maps.omega[i] : call.clean_weight;
    sums[kSumArtifact] += call.has_maps ? buf.maps.u[i] : acc_t(0);
  }
}

// The start of the next block into the cache, while this one is computed.
inline void prefetch_block(const Tiling& t, const Place& at, const Operand& x) {
  const int64_t size = x.dtype == kFloat64 ? 8 : (x.dtype == kFloat32 ? 4 : 2);
  const char* from = static_cast<const char*>(x.data) + size * block_offset(t, at, x.batch_stride, x.stride);
  for (int line = 0; line < 8; ++line) __builtin_prefetch(from + 64 * line);
}

// A work item: one range of blocks that share their maps. Adds to sums[0], or to all sums where they are wanted.
template <typename acc_t>
void process_item(const Call<acc_t>& call, const Sample<acc_t>& s, Place& at, int64_t item, Buffers<acc_t>& buf,
                  double* sums) {
  const WeightedLossParams& p = call.p;
  const Tiling& t = call.tiling;
  const int64_t group = item % t.groups;
  const int64_t range = item / t.groups % t.ranges;
  set_index(p, t.map_dims, t.map_count, item / t.groups / t.ranges, at.index);
  at.lo = range * t.range;
  at.steps = p.size[t.split] - at.lo < t.range ? p.size[t.split] - at.lo : t.range;
  at.count = at.steps * t.inner;
  if (call.has_maps) fill_weights(p, t, at, buf.maps);

  const bool stats = (p.work & kWriteSums) != 0, write_grad = (p.work & kWriteGrad) != 0;
  const bool left_out = s.weight == 0 || (!call.has_maps && call.clean_weight == 0);
  const bool no_gradient = write_grad && (s.gradient_scale == 0 || (!call.has_maps && call.clean_grad == 0));
  const int64_t last = (group + 1) * t.free_steps / t.groups;
  for (int64_t step = group * t.free_steps / t.groups; step < last; ++step) {
    if (step + 1 < last) {
      set_index(p, t.free_dims, t.free_count, step + 1, at.index);
      prefetch_block(t, at, p.pred);
      if (p.num_terms > 0) prefetch_block(t, at, p.term[0]);
    }
    set_index(p, t.free_dims, t.free_count, step, at.index);
    if (left_out) {
      process_unselected(call, at, buf, stats ? sums : nullptr);
      continue;
    }
    const BlockWeights<acc_t> w = block_weights(call, at, buf);
    if (no_gradient) {
      // A sample whose Z is 0, or a gradient switched off: exact zeros, whatever the residual holds.
      const double total = process_general(call, at, s, buf, w, stats ? sums : nullptr, false);
      if (!stats) sums[0] += total;
      process_unselected(call, at, buf, nullptr);
      continue;
    }
    if (call.l2_only && !stats)
      sums[0] += process_l2(call, at, s, buf, w);
    else if (stats)
      process_general(call, at, s, buf, w, sums, write_grad);
    else
      sums[0] += process_general(call, at, s, buf, w, nullptr, write_grad);
  }
}

template <typename acc_t>
Sample<acc_t> load_sample(const WeightedLossParams& p, int64_t b) {
  Sample<acc_t> s;
  s.pred_scale = load_per_sample<acc_t>(p.pred_scale, b);
  for (int k = 0; k < kMaxTerms; ++k) s.coef[k] = k < p.num_terms ? load_per_sample<acc_t>(p.coef[k], b) : acc_t(0);
  s.huber_c = load_per_sample<acc_t>(p.huber_c, b);
  s.weight = load_per_sample<acc_t>(p.weight, b);
  s.gradient_scale = (p.work & kWriteGrad) ? sample_gradient_scale<acc_t>(p, b) : acc_t(0);
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
    if (p.work & kWriteSums)
      for (int c = 0; c < kSums; ++c)
        static_cast<acc_t*>(p.sums)[b * kSums + c] = acc_t(sum_tiles(partial, b, tiles, columns, c));
    const double z = load_per_sample<acc_t>(p.z, b);
    const double share = z == 0 ? 0 : (p.reduction == kSum ? numerator / z : numerator / z / double(p.count));
    result += share;
    if ((p.work & kWriteLoss) && p.reduction == kSample) static_cast<acc_t*>(p.loss)[b] = acc_t(share);
  }
  if (!(p.work & kWriteLoss) || p.reduction == kSample) return;
  *static_cast<acc_t*>(p.loss) = acc_t(p.reduction == kMean ? result / double(p.batch) : result);
}

template <typename acc_t>
void run_weighted_loss(const WeightedLossParams& p, int threads) {
  const Call<acc_t> call(p);
  const int64_t items = call.tiling.items;
  const int64_t tiles = items < kTiles ? items : kTiles;
  const int columns = (p.work & kWriteSums) ? kSums : 1;
  const Scratch partial(p.batch * tiles * columns);
  parallel_for(p.batch * tiles, usable_threads(threads, p.batch * p.count, kGrain), [&](int64_t begin, int64_t end) {
    Buffers<acc_t> buf;
    Place at = {};
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

// The mean of omega. Free dims outside a block are not walked: omega does not change along them.
template <typename acc_t>
void run_weight_mean(const WeightedLossParams& p, void* out, bool per_sample, int threads) {
  const Tiling t = make_tiling(p);
  const int64_t items = t.map_steps * t.ranges;
  const int64_t tiles = items < kTiles ? items : kTiles;
  const Scratch partial(p.batch * tiles);
  parallel_for(p.batch * tiles, usable_threads(threads, p.batch * p.count, kGrain), [&](int64_t begin, int64_t end) {
    Weights<acc_t> w;
    Place at = {};
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
}  // namespace diffdoctor
