// artifact_loss: bilinear up-sampling, sigmoid, reduction, and the gradient gathered back per logit. Rows of the
// up-sampled map live in a buffer one row high; the map itself is never stored.
#include "cpu/artifact_loss.h"

#include "common/resample.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/vector_math.h"

namespace diffdoctor {
namespace {

constexpr int64_t kBands = 16;  // horizontal bands of a picture that may run on different threads

template <typename acc_t>
acc_t sigmoid(acc_t x) {
  const acc_t a = x < 0 ? x : -x;  // NaN stays NaN below
  const acc_t e = exp_nonpositive(a);
  const acc_t one = acc_t(1) / (acc_t(1) + e);
  const acc_t value = x < 0 ? e * one : one;
  return x != x ? x : value;
}

// What a picture's rows share: where each output column reads, and with what weight.
template <typename acc_t>
struct Columns {
  int64_t* first;
  acc_t* weight;  // of the column after `first`
};

// Per band: the sum, how many pixels counted, and (max) the largest confidence.
struct Band {
  double sum, counted, largest;
};

template <typename acc_t>
struct ArtifactCall {
  const ArtifactLossParams& p;
  Columns<acc_t> columns;
  int64_t bands;

  int64_t band_begin(int64_t k) const { return k * p.out_h / bands; }
  // Logit rows that a band's pixels touch: [first_row, last_row].
  int64_t first_row(int64_t k) const {
    int64_t first, second;
    acc_t weight;
    bilinear_index(band_begin(k), p.in_h, p.out_h, first, second, weight);
    return first;
  }
  int64_t last_row(int64_t k) const {
    int64_t first, second;
    acc_t weight;
    bilinear_index(band_begin(k + 1) - 1, p.in_h, p.out_h, first, second, weight);
    return second;
  }
};

// Row y of the up-sampled logits as confidences. rows: two buffers of in_w + 1.
template <typename acc_t>
void confidence_row(const ArtifactCall<acc_t>& call, int64_t b, int64_t y, acc_t* row, acc_t* out) {
  const ArtifactLossParams& p = call.p;
  int64_t top, bottom;
  acc_t weight;
  bilinear_index(y, p.in_h, p.out_h, top, bottom, weight);
  const int64_t base = b * p.batch_stride;
  acc_t* below = row + p.in_w + 1;
  load_run<acc_t>(p.logits, p.dtype, base + top * p.row_stride, p.col_stride, p.in_w, row);
  load_run<acc_t>(p.logits, p.dtype, base + bottom * p.row_stride, p.col_stride, p.in_w, below);
  row[p.in_w] = row[p.in_w - 1];
  below[p.in_w] = below[p.in_w - 1];
  const int64_t* first = call.columns.first;
  const acc_t* wx = call.columns.weight;
  // A weight of 0 selects: an infinite neighbour does not reach a map that is not enlarged.
  const auto blend = [](acc_t low, acc_t high, acc_t share) {
    return share == 0 ? low : (1 - share) * low + share * high;
  };
  for (int64_t x = 0; x < p.out_w; ++x) {
    const int64_t k = first[x];
    out[x] = blend(blend(row[k], row[k + 1], wx[x]), blend(below[k], below[k + 1], wx[x]), weight);
  }
  for (int64_t x = 0; x < p.out_w; ++x) out[x] = sigmoid(out[x]);
}

// Adds row y's slopes to the two logit rows it came from. unit_grad: the band's rows, in_w wide, from logit row
// `origin`.
template <typename acc_t>
void gather_row(const ArtifactCall<acc_t>& call, int64_t y, int64_t origin, const acc_t* slope, acc_t* gathered,
                acc_t* unit_grad) {
  const ArtifactLossParams& p = call.p;
  int64_t top, bottom;
  acc_t weight;
  bilinear_index(y, p.in_h, p.out_h, top, bottom, weight);
  for (int64_t k = 0; k <= p.in_w; ++k) gathered[k] = 0;
  for (int64_t x = 0; x < p.out_w; ++x) {
    const int64_t k = call.columns.first[x];
    const acc_t right = call.columns.weight[x] == 0 ? 0 : call.columns.weight[x] * slope[x];
    gathered[k] += slope[x] - right;
    gathered[k + 1] += right;
  }
  gathered[p.in_w - 1] += gathered[p.in_w];
  acc_t* upper = unit_grad + (top - origin) * p.in_w;
  acc_t* lower = unit_grad + (bottom - origin) * p.in_w;
  for (int64_t k = 0; k < p.in_w; ++k) upper[k] += (1 - weight) * gathered[k];
  if (weight == 0) return;
  for (int64_t k = 0; k < p.in_w; ++k) lower[k] += weight * gathered[k];
}

// One band: its sums, and its part of the gradient in unit_grad[0 .. rows * in_w). work: out_w +
// 2 * (in_w + 1) numbers.
template <typename acc_t>
void process_band(const ArtifactCall<acc_t>& call, int64_t b, int64_t k, double largest, acc_t* work, acc_t* unit_grad,
                  Band& band) {
  const ArtifactLossParams& p = call.p;
  acc_t* c = work;
  acc_t* row = work + p.out_w;
  const acc_t threshold = acc_t(p.threshold);
  const int64_t origin = call.first_row(k);
  if (unit_grad) {
    const int64_t n = (call.last_row(k) - origin + 1) * p.in_w;
    for (int64_t i = 0; i < n; ++i) unit_grad[i] = 0;
  }
  for (int64_t y = call.band_begin(k); y < call.band_begin(k + 1); ++y) {
    confidence_row(call, b, y, row, c);
    double sum = 0, counted = 0;
    for (int64_t x = 0; x < p.out_w; ++x) {
      const bool counts =
          p.method == kThreshold ? c[x] > threshold : (p.method == kMethodMax ? double(c[x]) == largest : true);
      // A NaN is not above the threshold, but a mean and a sum hold it, and so does every gradient.
      sum += counts ? double(c[x]) : 0.0;
      counted += counts ? 1.0 : 0.0;
      c[x] = counts || c[x] != c[x] ? c[x] * (1 - c[x]) : acc_t(0);
    }
    band.sum += sum;
    band.counted += counted;
    if (unit_grad) gather_row(call, y, origin, c, row, unit_grad);
  }
}

// The largest confidence of a band; NaN where one is NaN, as amax has it.
template <typename acc_t>
double largest_of_band(const ArtifactCall<acc_t>& call, int64_t b, int64_t k, acc_t* work) {
  double largest = -1;
  for (int64_t y = call.band_begin(k); y < call.band_begin(k + 1); ++y) {
    confidence_row(call, b, y, work + call.p.out_w, work);
    for (int64_t x = 0; x < call.p.out_w; ++x) {
      const double value = work[x];
      largest = value > largest || value != value ? value : largest;
      if (largest != largest) return largest;
    }
  }
  return largest;
}

struct PictureResult {
  double value, factor;
};

inline PictureResult picture_result(const ArtifactLossParams& p, double sum, double counted) {
  const double pixels = double(p.out_h) * double(p.out_w);
  switch (p.method) {
    case kThreshold:
      return {sum / (counted + 1e-5), 1 / (counted + 1e-5)};
    case kMethodMean:
      return {sum / pixels, 1 / pixels};
    case kMethodSum:
      return {sum, 1};
    default:
      return {sum / counted, 1 / counted};
  }
}

template <typename acc_t>
void run_artifact_loss(const ArtifactLossParams& p, int threads) {
  const int64_t bands = p.out_h < kBands ? p.out_h : kBands;
  // One block of scratch: column table, then rows and a band of the gradient for each (picture, band).
  const int64_t rows = p.in_h + 2 * bands + 1;  // of the gradient in all bands of a picture, shared borders twice
  const int64_t band_work = 2 * (p.in_w + 1) + p.out_w;
  const int64_t picture = bands * band_work + (p.unit_grad ? rows * p.in_w : 0);
  const Scratch memory(2 * p.out_w + p.batch * (picture + 3 * bands) + 1);
  int64_t* first = reinterpret_cast<int64_t*>(memory.data);
  acc_t* weight = reinterpret_cast<acc_t*>(memory.data + p.out_w);
  Band* found = reinterpret_cast<Band*>(memory.data + 2 * p.out_w);  // (batch, bands)
  double* pictures = memory.data + 2 * p.out_w + 3 * p.batch * bands;
  for (int64_t x = 0; x < p.out_w; ++x) {
    int64_t second;
    bilinear_index(x, p.in_w, p.out_w, first[x], second, weight[x]);
  }
  const ArtifactCall<acc_t> call = {p, {first, weight}, bands};
  const int team = usable_threads(threads, p.batch * p.out_h * p.out_w, 8192);
  auto work_of = [&](int64_t b, int64_t k) { return reinterpret_cast<acc_t*>(pictures + b * picture + k * band_work); };
  auto unit_grad_of = [&](int64_t b, int64_t k) -> acc_t* {
    if (!p.unit_grad) return nullptr;
    // Bands before this one hold at most first_row(k) - first_row(0) + 2k rows.
    return reinterpret_cast<acc_t*>(pictures + b * picture + bands * band_work) + (call.first_row(k) + 2 * k) * p.in_w;
  };
  if (p.method == kMethodMax)
    parallel_for(p.batch * bands, team, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        found[i].largest = largest_of_band(call, i / bands, i % bands, work_of(i / bands, i % bands));
    });
  if (p.method == kMethodMax)
    for (int64_t b = 0; b < p.batch; ++b) {
      double top = -1;
      for (int64_t k = 0; k < bands; ++k) {
        const double value = found[b * bands + k].largest;
        top = value > top || value != value ? value : top;
        if (top != top) break;
      }
      for (int64_t k = 0; k < bands; ++k) found[b * bands + k].largest = top;
    }
  parallel_for(p.batch * bands, team, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Band& band = found[i];
      band.sum = band.counted = 0;
      process_band(call, i / bands, i % bands, band.largest, work_of(i / bands, i % bands),
                   unit_grad_of(i / bands, i % bands), band);
    }
  });
  double result = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    double sum = 0, counted = 0;
    for (int64_t k = 0; k < bands; ++k) {
      sum += found[b * bands + k].sum;
      counted += found[b * bands + k].counted;
    }
    const PictureResult of = picture_result(p, sum, counted);
    result += of.value;
    if (p.reduction == kSample) static_cast<acc_t*>(p.loss)[b] = acc_t(of.value);
    if (!p.unit_grad) continue;
    static_cast<acc_t*>(p.factor)[b] = acc_t(p.reduction == kMean ? of.factor / double(p.batch) : of.factor);
    acc_t* unit_grad = static_cast<acc_t*>(p.unit_grad) + b * p.in_h * p.in_w;
    for (int64_t i = 0; i < p.in_h * p.in_w; ++i) unit_grad[i] = 0;
    for (int64_t k = 0; k < bands; ++k) {
      const acc_t* part = unit_grad_of(b, k);
      const int64_t from = call.first_row(k) * p.in_w, n = (call.last_row(k) + 1) * p.in_w - from;
      for (int64_t i = 0; i < n; ++i) unit_grad[from + i] += part[i];
    }
  }
  if (p.reduction != kSample)
    *static_cast<acc_t*>(p.loss) = acc_t(p.reduction == kMean ? result / double(p.batch) : result);
}

template <typename acc_t>
void run_artifact_loss_backward(const void* unit_grad, const void* factor, const void* g, int64_t g_stride, void* out,
                                int32_t dtype, int64_t batch, int64_t count) {
  const acc_t* from = static_cast<const acc_t*>(unit_grad);
  for (int64_t b = 0; b < batch; ++b) {
    const acc_t scale = static_cast<const acc_t*>(factor)[b] * static_cast<const acc_t*>(g)[b * g_stride];
    for (int64_t i = 0; i < count; ++i) store_element<acc_t>(out, dtype, b * count + i, from[b * count + i] * scale);
  }
}

}  // namespace

namespace cpu {

void DD_CPU_ISA::artifact_loss(const ArtifactLossParams& p, int threads) {
  if (p.dtype == kFloat64)
    run_artifact_loss<double>(p, threads);
  else
    run_artifact_loss<float>(p, threads);
}

void DD_CPU_ISA::artifact_loss_backward(const void* unit_grad, const void* factor, const void* g, int64_t g_stride,
                                        void* out, int32_t dtype, int64_t batch, int64_t count) {
  if (dtype == kFloat64)
    run_artifact_loss_backward<double>(unit_grad, factor, g, g_stride, out, dtype, batch, count);
  else
    run_artifact_loss_backward<float>(unit_grad, factor, g, g_stride, out, dtype, batch, count);
}

}  // namespace cpu
}  // namespace diffdoctor
