// Backward of weighted_loss where the gradient for g = 1 was kept.
#include "cpu/scale_gradient.h"

#include "cpu/convert.h"
#include "cpu/parallel.h"

namespace diffdoctor {
namespace {

template <typename storage_t, typename acc_t>
void scale_piece(const void* in, void* out, int64_t begin, int64_t end, acc_t g) {
  const storage_t* from = static_cast<const storage_t*>(in);
  storage_t* to = static_cast<storage_t*>(out);
  DD_SIMD
  for (int64_t i = begin; i < end; ++i) from_acc(to_acc(from[i]) * g, to + i);
}

template <typename acc_t>
void run_scale_gradient(const void* grad, void* out, int32_t dtype, int64_t batch, int64_t count, const void* g,
                        int64_t g_stride, int threads) {
  const acc_t* factors = static_cast<const acc_t*>(g);
  bool untouched = grad == out;
  for (int64_t b = 0; untouched && b < batch; ++b) untouched = factors[b * g_stride] == 1;
  if (untouched) return;
  const int64_t piece = 8192, pieces = (count + piece - 1) / piece;
  parallel_for(batch * pieces, usable_threads(threads, batch * count, 65536), [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t b = k / pieces, from = k % pieces * piece;
      const int64_t begin = b * count + from;
      const int64_t end = begin + (count - from < piece ? count - from : piece);
      const acc_t factor = factors[b * g_stride];
      if (grad == out && factor == 1) continue;
      if (dtype == kFloat16) {
        for (int64_t i = begin; i < end; ++i)
          store_element<acc_t>(out, dtype, i, load_element<acc_t>(grad, dtype, i) * factor);
      } else if (dtype == kBFloat16) {
        scale_piece<bfloat16>(grad, out, begin, end, float(factor));
      } else {
        scale_piece<acc_t>(grad, out, begin, end, factor);
      }
    }
  });
}

}  // namespace

namespace cpu {

void DD_CPU_ISA::scale_gradient(const void* grad, void* out, int32_t dtype, int64_t batch, int64_t count, const void* g,
                                int64_t g_stride, int threads) {
  if (dtype == kFloat64)
    run_scale_gradient<double>(grad, out, dtype, batch, count, g, g_stride, threads);
  else
    run_scale_gradient<float>(grad, out, dtype, batch, count, g, g_stride, threads);
}

}  // namespace cpu
}  // namespace diffdoctor
