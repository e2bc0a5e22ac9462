// A few small calls of every kernel, against plain loops: run with a thread for each CUDA thread under ThreadSanitizer,
// and with fibres under AddressSanitizer and UndefinedBehaviorSanitizer. Prints what differs; exit code 1 if anything
// does.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/weighted_loss.h"
#include "cuda/artifact_loss.h"
#include "cuda/l2.h"
#include "cuda/scale_gradient.h"
#include "cuda/weighted_loss.h"

using namespace diffdoctor;

namespace {

int failures = 0;

void expect(const char* what, double got, double want, double tolerance) {
  if (std::fabs(got - want) <= tolerance * (1 + std::fabs(want))) return;
  std::printf("%s: got %.9g, want %.9g\n", what, got, want);
  failures += 1;
}

void expect_launched(const char* what, const char* error) {
  if (error == nullptr) return;
  std::printf("%s: %s\n", what, error);
  failures += 1;
}

float noise(unsigned k) {
  k = (k ^ 61u) * 0x9e3779b1u;
  k ^= k >> 15;
  k *= 0x85ebca6bu;
  return static_cast<float>((k ^ (k >> 13)) & 0xffffu) / 32768.0f - 1.0f;
}

// The head of a workspace is zero between launches.
struct Workspace {
  std::vector<uint64_t> words;
  explicit Workspace(int64_t bytes) : words(static_cast<size_t>(bytes + 7) / 8, 0) {}
  void* data() { return words.data(); }
  void expect_clear() {
    for (size_t k = 0; k < 512; ++k) expect("workspace head", static_cast<double>(words[k]), 0, 0);
  }
};

// (B, C, n) fp32, a map (B, n); `stride` spreads the prediction out in memory. Without sums and where it is dense, the
// kernels of l2.cu serve, and where n is odd those of l2_odd.cu.
void weighted_loss(int64_t batch, int64_t channels, int64_t n, int64_t stride, int32_t outputs) {
  const int64_t count = channels * n;
  std::vector<float> pred(static_cast<size_t>((batch * count - 1) * stride + 1)),
      grad(static_cast<size_t>(batch * count)), target(grad.size()), map(static_cast<size_t>(batch * n)),
      sums(static_cast<size_t>(batch * kSums));
  for (size_t i = 0; i < pred.size(); ++i) pred[i] = noise(static_cast<unsigned>(i));
  for (size_t i = 0; i < target.size(); ++i) target[i] = noise(static_cast<unsigned>(i) + 100000u);
  for (size_t i = 0; i < map.size(); ++i) map[i] = std::fabs(noise(static_cast<unsigned>(i) + 200000u));
  float loss = NAN;

  WeightedLossParams p;
  std::memset(&p, 0, sizeof(p));
  p.batch = batch;
  p.count = count;
  for (int d = 0; d < kMaxDims; ++d) p.size[d] = 1;
  p.size[4] = channels;
  p.size[5] = n;
  p.ndim = 2;
  p.contiguous = stride == 1;
  p.num_terms = 1;
  const auto operand = [&](std::vector<float>& values, int64_t step) {
    Operand x{values.data(), count * step, {0, 0, 0, 0, n * step, step}, kFloat32, 1};
    return x;
  };
  p.pred = operand(pred, stride);
  p.grad = operand(grad, 1);
  p.terms[0] = operand(target, 1);
  p.confidence.data = map.data();
  p.confidence.batch_stride = n;
  p.confidence.stride[5] = 1;
  p.map_varies[5] = 1;
  p.free_dims[0] = p.free_dims_weighted[0] = 4;
  p.free_dims[1] = p.free_dims_weighted[1] = 5;
  p.confidence.mode = kSame;
  p.pred_scale = p.coefs[0] = p.huber_c = p.weight = p.z = p.grad_output = PerSample{nullptr, 0, 1.0};
  p.strength[kL2] = 1;
  p.artifact_weight = 2;
  p.clean_weight = 1;
  p.artifact_grad = p.clean_grad = 1;
  p.gamma = 1;
  p.outputs = outputs;
  p.loss = &loss;
  p.sums = sums.data();

  Workspace workspace(cuda::weighted_loss_workspace(p));
  for (int repeat = 0; repeat < 2; ++repeat) {  // the second finds the counter as the first left it
    loss = NAN;
    expect_launched("weighted_loss", cuda::launch_weighted_loss(p, workspace.data(), nullptr));
    workspace.expect_clear();
    double total = 0;
    for (int64_t b = 0; b < batch; ++b) {
      double weight = 0;
      for (int64_t i = 0; i < count; ++i) {
        const double omega = 1.0 + map[static_cast<size_t>(b * n + i % n)];
        const size_t at = static_cast<size_t>(b * count + i);
        const double d = static_cast<double>(pred[at * static_cast<size_t>(stride)]) - target[at];
        weight += omega;
        total += omega * d * d;
        expect("gradient", grad[at], 2 * omega * d / static_cast<double>(batch * count), 1e-5);
      }
      if (outputs & kWriteSums) expect("weight sum", sums[static_cast<size_t>(b * kSums + kSumWeight)], weight, 1e-5);
    }
    expect("loss", loss, total / static_cast<double>(batch * count), 1e-5);
  }

  std::vector<float> mean(static_cast<size_t>(batch), NAN);
  Workspace another(cuda::weight_mean_workspace(p));
  expect_launched("weight_mean", cuda::launch_weight_mean(p, mean.data(), true, another.data(), nullptr));
  another.expect_clear();
  for (int64_t b = 0; b < batch; ++b) {
    double omega = 0;
    for (int64_t i = 0; i < n; ++i) omega += 1.0 + map[static_cast<size_t>(b * n + i)];
    expect("weight mean", mean[static_cast<size_t>(b)], omega / static_cast<double>(n), 1e-5);
  }

  const std::vector<float> before = grad;
  const float g = 3;
  expect_launched("scale_gradient",
                  cuda::launch_scale_gradient(grad.data(), grad.data(), kFloat32, 1, batch * count, &g, 0, nullptr));
  for (size_t i = 0; i < grad.size(); ++i) expect("scaled", grad[i], 3 * before[i], 0);
}

// Logits without up-sampling, where the answer is a few lines.
void artifact_loss(int64_t batch, int64_t side, int32_t method) {
  std::vector<float> logits(static_cast<size_t>(batch * side * side)), unit_grad(logits.size()),
      factor(static_cast<size_t>(batch)), maxima(factor.size());
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = 3 * noise(static_cast<unsigned>(i));
  float loss = NAN;
  ArtifactLossParams p;
  p.logits = logits.data();
  p.batch_stride = side * side;
  p.row_stride = side;
  p.col_stride = 1;
  p.batch = batch;
  p.in_h = p.in_w = p.out_h = p.out_w = side;
  p.threshold = 0.1f;
  p.dtype = kFloat32;
  p.method = method;
  p.reduction = kSum;
  p.loss = &loss;
  p.unit_grad = unit_grad.data();
  p.factor = factor.data();
  p.maxima = maxima.data();
  Workspace workspace(cuda::artifact_loss_workspace(p));
  expect_launched("artifact_loss", cuda::launch_artifact_loss(p, workspace.data(), nullptr));
  workspace.expect_clear();
  double total = 0;
  for (int64_t b = 0; b < batch; ++b) {
    double sum = 0, pixels = 0, largest = 0;
    for (int64_t i = 0; i < side * side; ++i) {
      const double c = 1 / (1 + std::exp(-static_cast<double>(logits[static_cast<size_t>(b * side * side + i)])));
      if (c > largest) largest = c;
      if (c > 0.1) sum += c, pixels += 1;
    }
    total += method == kMethodMax ? largest : sum / (pixels + 1e-5);
  }
  expect("artifact loss", loss, total, 1e-5);
  std::vector<float> grad(logits.size(), NAN);
  const float g = 1;
  expect_launched("artifact_loss_backward",
                  cuda::launch_artifact_loss_backward(unit_grad.data(), factor.data(), &g, 0, grad.data(), kFloat32,
                                                      batch, side * side, nullptr));
  for (size_t i = 0; i < grad.size(); ++i) {
    expect("artifact gradient", grad[i],
           static_cast<double>(unit_grad[i]) * factor[i / static_cast<size_t>(side * side)], 1e-6);
  }
}

}  // namespace

int main() {
  weighted_loss(1, 2, 512, 1, kWriteLoss | kWriteGrad | kWriteSums);
  weighted_loss(2, 1, 19, 3, kWriteLoss | kWriteGrad | kWriteSums);  // two blocks
  weighted_loss(2, 2, 512, 1, kWriteLoss | kWriteGrad);
  cuda::tiles_per_vector = 1;  // so that a block's shared memory is filled twice
  weighted_loss(2, 3, 515, 1, kWriteLoss | kWriteGrad);
  artifact_loss(1, 17, kThreshold);
  artifact_loss(1, 17, kMethodMax);
  if (failures == 0) std::printf("all equal\n");
  return failures == 0 ? 0 : 1;
}
