// One block of weighted_loss: its operands as runs of memory, computed where they lie or through short buffers.
#pragma once

#include "cpu/tiles/l2.h"
#include "cpu/tiles/sums.h"

namespace diffdoctor {
namespace {

// Elements that go through buffers at once: with more, those of a mixture of losses would leave the first-level cache.
constexpr int64_t kPiece = kShortSum;

template <typename acc_t>
struct alignas(64) Buffers {  // all of it whole lines: a vector across two takes twice the time
  Weights<acc_t> maps;
  acc_t v[kChunk], weight[kChunk], modulated[kChunk];
  acc_t pred[kChunk], term[kMaxTerms][kChunk], grad[kChunk];  // of operands that are not runs of memory
  acc_t pred_piece[kPiece], term_piece[kMaxTerms][kPiece], grad_piece[kPiece];
  acc_t d[kPiece], loss[kPiece], slope[kPiece], plain[kPiece], plain_modulated[kPiece];
  int64_t filled = -1;  // the range whose maps are in `maps`, counted over the call
};
static_assert(sizeof(Buffers<double>) <= 384 * 1024, "macOS gives a thread 512 KiB of stack");

// Where a block begins in each operand.
struct Starts {
  const char *pred, *term[kMaxTerms];
  char* grad;
};

template <typename acc_t>
struct Call;

// Over a block: the sum of omega * d^2, and with a gradient grad_scale * omega * m * d.
template <typename acc_t>
using L2Block = double(const Call<acc_t>& call, const Block& at, const Starts& starts, const Sample<acc_t>& s,
                       Buffers<acc_t>& buf, const BlockWeights<acc_t>& w, acc_t grad_scale);

template <typename acc_t>
struct Call {
  const WeightedLossParams& p;
  Tiling tiling;
  bool has_maps, modulated, pred_run, grad_run, term_run[kMaxTerms];
  acc_t clean_weight, clean_grad;
  int64_t pred_step, grad_step, term_step[kMaxTerms];  // bytes from a block to the next along the innermost free dim
  L2Block<acc_t>* l2;  // null where there is another loss, or more terms than the pass of l2.h is compiled for

  explicit Call(const WeightedLossParams& params);
};

template <typename acc_t>
Starts starts_of(const Call<acc_t>& call, const Block& at) {
  const WeightedLossParams& p = call.p;
  const auto start = [&](const Operand& x) {
    const int64_t offset = block_offset(call.tiling, at, x.batch_stride, x.stride);
    return static_cast<char*>(const_cast<void*>(address(x.data, x.dtype, offset)));
  };
  Starts starts = {};
  starts.pred = start(p.pred);
  for (int k = 0; k < p.num_terms; ++k) starts.term[k] = start(p.terms[k]);
  if (p.outputs & kWriteGrad) starts.grad = start(p.grad);
  return starts;
}

// On to the next free step.
template <typename acc_t>
void advance(const Call<acc_t>& call, Block& at, Starts& starts) {
  const Tiling& t = call.tiling;
  next_index(call.p, t.free_dims, t.free_count, at.index);
  if (at.index[t.free_dims[t.free_count - 1]] == 0) {
    starts = starts_of(call, at);
    return;
  }
  starts.pred += call.pred_step;
  for (int k = 0; k < kMaxTerms; ++k) starts.term[k] += call.term_step[k];
  starts.grad += call.grad_step;
}

// A block as one run: in place, or gathered into a buffer.
struct Run {
  const void* data;
  int32_t dtype;
};

template <typename acc_t>
Run run_of(const Call<acc_t>& call, const Block& at, const Operand& x, const void* start, bool run, acc_t* buffer) {
  if (run) return {start, x.dtype};
  gather(call.p, call.tiling, at, start, x.dtype, x.stride, 0, buffer);
  return {buffer, kAccDtype<acc_t>};
}

// n elements of a run as acc_t: a pointer into it where it holds that type.
template <typename acc_t>
const acc_t* piece_of(const Run& run, int64_t begin, int64_t n, acc_t* buffer) {
  if (run.dtype == kAccDtype<acc_t>) return static_cast<const acc_t*>(run.data) + begin;
  load_run<acc_t>(run.data, run.dtype, begin, 1, n, buffer);
  return buffer;
}

template <typename acc_t>
struct Runs {
  Run pred, term[kMaxTerms];
  Run grad;  // data is null where no gradient is written
  bool scatter_grad;
};

template <typename acc_t>
Runs<acc_t> runs_of(const Call<acc_t>& call, const Block& at, const Starts& starts, Buffers<acc_t>& buf,
                    bool write_grad) {
  const WeightedLossParams& p = call.p;
  Runs<acc_t> runs = {};
  runs.pred = run_of(call, at, p.pred, starts.pred, call.pred_run, buf.pred);
  for (int k = 0; k < p.num_terms; ++k)
    runs.term[k] = run_of(call, at, p.terms[k], starts.term[k], call.term_run[k], buf.term[k]);
  if (!write_grad) return runs;
  runs.scatter_grad = !call.grad_run;
  runs.grad = {buf.grad, kAccDtype<acc_t>};
  if (call.grad_run) runs.grad = {starts.grad, p.grad.dtype};
  return runs;
}

template <typename acc_t>
void store_block(const Call<acc_t>& call, const Block& at, const Starts& starts, const acc_t* values) {
  const Operand& x = call.p.grad;
  if (call.grad_run)
    store_run<acc_t>(starts.grad, x.dtype, 0, 1, at.count, values);
  else
    scatter(call.p, call.tiling, at, starts.grad, x.dtype, x.stride, 0, call.tiling.split, values);
}

template <typename acc_t>
BlockWeights<acc_t> block_weights(const Call<acc_t>& call, const Block& at, Buffers<acc_t>& buf) {
  const WeightedLossParams& p = call.p;
  const acc_t *omega = buf.maps.omega, *modulated = call.modulated ? buf.maps.modulated : omega;
  const acc_t* level = p.spatial_coefs ? buf.maps.u : nullptr;
  if (!p.weighting.present) {
    if (!call.has_maps) return {nullptr, nullptr, nullptr};
    return {omega, modulated, level};
  }
  gather(p, call.tiling, at, p.weighting.data, p.weighting.dtype, p.weighting.stride,
         block_offset(call.tiling, at, p.weighting.batch_stride, p.weighting.stride), buf.v);
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
  return {buf.weight, call.modulated ? buf.modulated : buf.weight, level};
}

// Tried as if everything were finite; where it was not, the piece is done again.
template <typename shape_t, bool kWeights, bool kModulated, bool kGrad, typename pred_t, typename term_t,
          typename acc_t>
acc_t l2_retried(const Operands<pred_t, term_t>& x, const Sample<acc_t>& s, const BlockWeights<acc_t>& w,
                 acc_t grad_scale, int64_t n) {
  acc_t total;
  if (l2_finite<shape_t, kWeights, kModulated, kGrad>(x, s, w, grad_scale, n, total)) return total;
  return l2_run<shape_t, kWeights, kModulated, kGrad>(x, s, w, grad_scale, n);
}

template <typename shape_t, typename pred_t, typename term_t, typename acc_t>
acc_t l2_piece(const Operands<pred_t, term_t>& x, const Sample<acc_t>& s, const BlockWeights<acc_t>& w,
               acc_t grad_scale, int64_t n) {
  if constexpr (!shape_t::kSpatial) {  // coefficients that change come with a map
    if (!w.weight)
      return x.grad ? l2_retried<shape_t, false, false, true>(x, s, w, grad_scale, n)
                    : l2_retried<shape_t, false, false, false>(x, s, w, grad_scale, n);
  }
  if (!x.grad) return l2_retried<shape_t, true, false, false>(x, s, w, grad_scale, n);
  return w.modulated == w.weight ? l2_retried<shape_t, true, false, true>(x, s, w, grad_scale, n)
                                 : l2_retried<shape_t, true, true, true>(x, s, w, grad_scale, n);
}

template <typename pred_t, typename term_t, typename acc_t>
DD_NOINLINE acc_t l2_piece(const WeightedLossParams& p, const Operands<pred_t, term_t>& x, const Sample<acc_t>& s,
                           const BlockWeights<acc_t>& w, acc_t grad_scale, int64_t n) {
  if (p.spatial_coefs)
    return p.num_terms == 2 ? l2_piece<TermShape<2, true>>(x, s, w, grad_scale, n)
                            : l2_piece<TermShape<3, true>>(x, s, w, grad_scale, n);
  switch (p.num_terms) {
    case 0:
      return l2_piece<TermShape<0, false>>(x, s, w, grad_scale, n);
    case 1:
      return l2_piece<TermShape<1, false>>(x, s, w, grad_scale, n);
    default:
      return l2_piece<TermShape<2, false>>(x, s, w, grad_scale, n);
  }
}

// A block's operands lie where they are read as pred_t and term_t, and so does its gradient.
template <typename pred_t, typename term_t, typename acc_t>
double l2_in_place(const Call<acc_t>& call, const Block& at, const Starts& starts, const Sample<acc_t>& s,
                   Buffers<acc_t>&, const BlockWeights<acc_t>& w, acc_t grad_scale) {
  Operands<pred_t, term_t> x;
  x.pred = reinterpret_cast<const pred_t*>(starts.pred);
  for (int k = 0; k < kMaxTerms; ++k) x.term[k] = reinterpret_cast<const term_t*>(starts.term[k]);
  x.grad = reinterpret_cast<pred_t*>(starts.grad);
  return l2_piece<pred_t, term_t, acc_t>(call.p, x, s, w, grad_scale, at.count);
}

// A block in pieces, of which some operands go through buffers: those that are read as acc_t and are not, and any that
// are no runs of memory.
template <typename pred_t, typename term_t, typename acc_t>
double l2_in_pieces(const Call<acc_t>& call, const Block& at, const Starts& starts, const Sample<acc_t>& s,
                    Buffers<acc_t>& buf, const BlockWeights<acc_t>& w, acc_t grad_scale) {
  constexpr bool buffered = sizeof(pred_t) == sizeof(acc_t), term_buffered = sizeof(term_t) == sizeof(acc_t);
  const Runs<acc_t> runs = runs_of(call, at, starts, buf, (call.p.outputs & kWriteGrad) != 0);
  const bool own_grad = runs.grad.data && (!buffered || runs.grad.dtype == kAccDtype<acc_t>);
  bool direct = own_grad || !runs.grad.data;
  if (buffered) direct = direct && runs.pred.dtype == kAccDtype<acc_t>;
  for (int k = 0; term_buffered && k < call.p.num_terms; ++k) direct = direct && runs.term[k].dtype == kAccDtype<acc_t>;
  const int64_t piece = direct ? kChunk : kPiece;
  double total = 0;
  for (int64_t begin = 0; begin < at.count; begin += piece) {
    const int64_t n = at.count - begin < piece ? at.count - begin : piece;
    Operands<pred_t, term_t> x = {};
    if constexpr (buffered) {
      x.pred = piece_of<acc_t>(runs.pred, begin, n, buf.pred_piece);
      if (runs.grad.data && !own_grad) x.grad = buf.grad_piece;
    } else {
      x.pred = static_cast<const pred_t*>(runs.pred.data) + begin;
    }
    if (own_grad) x.grad = static_cast<pred_t*>(const_cast<void*>(runs.grad.data)) + begin;
    for (int k = 0; k < call.p.num_terms; ++k) {
      if constexpr (term_buffered)
        x.term[k] = piece_of<acc_t>(runs.term[k], begin, n, buf.term_piece[k]);
      else
        x.term[k] = static_cast<const term_t*>(runs.term[k].data) + begin;
    }
    total += l2_piece<pred_t, term_t, acc_t>(call.p, x, s, w.from(begin), grad_scale, n);
    if constexpr (buffered) {
      if (runs.grad.data && !own_grad)
        store_run<acc_t>(const_cast<void*>(runs.grad.data), runs.grad.dtype, begin, 1, n, buf.grad_piece);
    }
  }
  if (runs.scatter_grad) store_block(call, at, starts, buf.grad);
  return total;
}

// The types as which a call's blocks are read: without conversion where prediction and terms are runs of acc_t or bf16.
template <typename acc_t>
L2Block<acc_t>* choose_l2(const Call<acc_t>& call) {
  const WeightedLossParams& p = call.p;
  const bool write_grad = (p.outputs & kWriteGrad) != 0;
  const auto pred = [&](int32_t dtype) {
    return (call.pred_run ? p.pred.dtype : kAccDtype<acc_t>) == dtype &&
           (!write_grad || (call.grad_run ? p.grad.dtype : kAccDtype<acc_t>) == dtype);
  };
  bool runs = call.pred_run && (call.grad_run || !write_grad);
  for (int k = 0; k < p.num_terms; ++k) runs = runs && call.term_run[k];
  const auto terms = [&](int32_t dtype) {
    bool same = true;
    for (int k = 0; k < p.num_terms; ++k)
      same = same && (call.term_run[k] ? p.terms[k].dtype : kAccDtype<acc_t>) == dtype;
    return same;
  };
  const auto read_as = [&](auto pred_type, int32_t pred_dtype, auto term_type, int32_t term_dtype) {
    using pred_t = decltype(pred_type);
    using term_t = decltype(term_type);
    return runs && pred(pred_dtype) && terms(term_dtype) ? l2_in_place<pred_t, term_t, acc_t>
                                                         : l2_in_pieces<pred_t, term_t, acc_t>;
  };
  const acc_t number = 0;
  if constexpr (sizeof(acc_t) == sizeof(float)) {
    const bool low = p.num_terms > 0 && terms(kBFloat16);
    if (pred(kBFloat16))
      return low ? read_as(bfloat16(), kBFloat16, bfloat16(), kBFloat16)
                 : read_as(bfloat16(), kBFloat16, number, kFloat32);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    // l2_finite widens fp16 as it reads; elsewhere a buffer is faster.
    if (pred(kFloat16))
      return p.num_terms > 0 && terms(kFloat16) ? read_as(float16(), kFloat16, float16(), kFloat16)
                                                : read_as(float16(), kFloat16, number, kFloat32);
#endif
    if (low) return read_as(number, kFloat32, bfloat16(), kBFloat16);
  }
  return read_as(number, kAccDtype<acc_t>, number, kAccDtype<acc_t>);
}

template <typename acc_t>
Call<acc_t>::Call(const WeightedLossParams& params) : p(params), tiling(make_tiling(params)) {
  has_maps = p.confidence.mode != kAbsent || p.mask.mode != kAbsent;
  modulated = modulates(p);
  clean_weight = acc_t(p.clean_weight);
  clean_grad = acc_t(p.clean_grad);
  const bool write_grad = (p.outputs & kWriteGrad) != 0;
  pred_run = block_is_run(p, tiling, p.pred.stride);
  grad_run = write_grad && block_is_run(p, tiling, p.grad.stride);
  for (int k = 0; k < p.num_terms; ++k) term_run[k] = block_is_run(p, tiling, p.terms[k].stride);
  const auto step = [&](const Operand& x, bool present) {
    if (!present || tiling.free_count == 0) return int64_t{0};
    return x.stride[tiling.free_dims[tiling.free_count - 1]] * element_size(x.dtype);
  };
  pred_step = step(p.pred, true);
  grad_step = step(p.grad, write_grad);
  for (int k = 0; k < kMaxTerms; ++k) term_step[k] = step(p.terms[k], k < p.num_terms);
  bool l2_only = p.spatial_coefs ? p.num_terms >= 2 : p.num_terms <= 2;
  for (int k = 0; k < kLossKinds; ++k) l2_only = l2_only && (k == kL2 || p.strength[k] == 0);
  l2 = l2_only ? choose_l2(*this) : nullptr;
}

template <typename acc_t>
double process_l2(const Call<acc_t>& call, const Block& at, const Starts& starts, const Sample<acc_t>& s,
                  Buffers<acc_t>& buf, const BlockWeights<acc_t>& w) {
  const acc_t strength = acc_t(call.p.strength[kL2]);
  const acc_t loss_scale = strength * s.weight * (w.weight ? acc_t(1) : call.clean_weight);
  const acc_t grad_scale =
      2 * strength * s.gradient_scale * (w.weight ? acc_t(1) : call.clean_weight * call.clean_grad);
  return call.l2(call, at, starts, s, buf, w, grad_scale) * double(loss_scale);
}

// weight, level: of the piece; weight is null where all are selected, level where the coefficients do not change.
template <typename acc_t>
void residuals(const Call<acc_t>& call, const Sample<acc_t>& s, const Runs<acc_t>& runs, const acc_t* weight,
               const acc_t* level, int64_t begin, int64_t n, Buffers<acc_t>& buf) {
  const WeightedLossParams& p = call.p;
  Operands<acc_t, acc_t> x = {};
  x.pred = piece_of<acc_t>(runs.pred, begin, n, buf.pred_piece);
  for (int k = 0; k < p.num_terms; ++k) x.term[k] = piece_of<acc_t>(runs.term[k], begin, n, buf.term_piece[k]);
  const auto fill = [&, x, s](auto shape) {
    for (int64_t i = 0; i < n; ++i) {
      const acc_t d = residual<decltype(shape)>(x, s, level, i);
      buf.d[i] = weight && weight[i] == 0 ? acc_t(0) : d;
    }
  };
  const auto fill_as = [&](auto terms) {
    constexpr int kTerms = decltype(terms)::value;
    level ? fill(TermShape<kTerms, true>()) : fill(TermShape<kTerms, false>());
  };
  switch (p.num_terms) {
    case 0:
      return fill(TermShape<0, false>());
    case 1:
      return fill_as(std::integral_constant<int, 1>());
    case 2:
      return fill_as(std::integral_constant<int, 2>());
    default:
      return fill_as(std::integral_constant<int, 3>());
  }
}

// Any losses, and the sums where they are wanted.
template <typename acc_t>
double process_general(const Call<acc_t>& call, const Block& at, const Starts& starts, const Sample<acc_t>& s,
                       Buffers<acc_t>& buf, const BlockWeights<acc_t>& w, double* sums, bool write_grad) {
  const WeightedLossParams& p = call.p;
  const Runs<acc_t> runs = runs_of(call, at, starts, buf, write_grad);
  if (!w.weight) {
    const bool none = call.clean_weight == 0 || call.clean_grad == 0;
    for (int64_t i = 0; i < kPiece; ++i) {
      buf.plain[i] = call.clean_weight;
      buf.plain_modulated[i] = none ? acc_t(0) : call.clean_weight * call.clean_grad;
    }
  }
  double total = 0;
  for (int64_t begin = 0; begin < at.count; begin += kPiece) {
    const int64_t n = at.count - begin < kPiece ? at.count - begin : kPiece;
    const acc_t* weight = w.weight ? w.weight + begin : buf.plain;
    const acc_t* modulated = w.weight ? w.modulated + begin : buf.plain_modulated;
    residuals(call, s, runs, weight, w.from(begin).level, begin, n, buf);
    eval_losses(p, buf.d, s.huber_c, n, buf.loss, buf.slope);
    total += weighted_sum(weight, buf.loss, n);
    if (write_grad) {
      const bool in_place = runs.grad.dtype == kAccDtype<acc_t>;
      void* const grad = const_cast<void*>(runs.grad.data);
      acc_t* out = in_place ? static_cast<acc_t*>(grad) + begin : buf.grad_piece;
      scale_slopes(modulated, buf.slope, s.gradient_scale, n, out);
      if (!in_place) store_run<acc_t>(grad, runs.grad.dtype, begin, 1, n, buf.grad_piece);
    }
    if (!sums) continue;
    for (int64_t i = 0; i < n; ++i) buf.d[i] = weight[i] == 0 ? acc_t(0) : weight[i] * s.weight;
    if (call.has_maps)
      add_sums(buf.maps.u + begin, buf.maps.omega + begin, buf.d, buf.loss, n, sums);
    else
      add_plain_sums(call.clean_weight, buf.d, buf.loss, n, sums);
  }
  if (runs.scatter_grad) store_block(call, at, starts, buf.grad);
  return total * double(s.weight);
}

// body(u, omega) with the maps of a block as functions of the element.
template <typename acc_t, typename body_t>
void with_maps(const Call<acc_t>& call, const Buffers<acc_t>& buf, const body_t& body) {
  const acc_t *levels = buf.maps.u, *weights = buf.maps.omega;
  const acc_t plain = call.clean_weight;
  if (call.has_maps)
    body([levels](int64_t i) { return levels[i]; }, [weights](int64_t i) { return weights[i]; });
  else
    body([](int64_t) { return acc_t(0); }, [plain](int64_t) { return plain; });
}

// l2 with its sums but for those of the maps, where v is one number for the sample: the call without sums, then another
// pass over the block, which the cache still holds.
template <typename acc_t>
void process_l2_sums(const Call<acc_t>& call, const Block& at, const Starts& starts, const Sample<acc_t>& s,
                     Buffers<acc_t>& buf, const BlockWeights<acc_t>& w, double* sums) {
  sums[kSumNumerator] += process_l2(call, at, starts, s, buf, w);
  const Runs<acc_t> runs = runs_of(call, at, starts, buf, false);
  const acc_t strength = acc_t(call.p.strength[kL2]);
  with_maps(call, buf, [&](auto u, auto omega) {
    for (int64_t begin = 0; begin < at.count; begin += kPiece) {
      const int64_t n = at.count - begin < kPiece ? at.count - begin : kPiece;
      const auto from = [begin](auto of) { return [=](int64_t i) { return of(begin + i); }; };
      const BlockWeights<acc_t> piece = w.from(begin);
      residuals(call, s, runs, piece.weight, piece.level, begin, n, buf);
      add_l2_sums(from(u), from(omega), buf.d, strength, s.weight, n, sums);
    }
  });
}

// What a block leaves when its whole sample, or every element, is left out: a zero gradient, and omega in the sums.
template <typename acc_t>
void process_unselected(const Call<acc_t>& call, const Block& at, const Starts& starts, Buffers<acc_t>& buf,
                        double* sums) {
  if (call.p.outputs & kWriteGrad) {
    for (int64_t i = 0; i < at.count; ++i) buf.grad[i] = 0;
    store_block(call, at, starts, buf.grad);
  }
  if (!sums) return;
  for (int64_t i = 0; i < at.count; ++i) {
    sums[kSumWeight] += call.has_maps ? buf.maps.omega[i] : call.clean_weight;
    sums[kSumArtifact] += call.has_maps ? buf.maps.u[i] : acc_t(0);
  }
}

}  // namespace
}  // namespace diffdoctor
