// The causal convolutions on the CPU.
#include "bindings/causal_conv1d.h"

DECLARE_KERNEL(causal_conv1d_fwd, CausalConv1dParams)
DECLARE_KERNEL(causal_conv1d_bwd, CausalConv1dParams)
DECLARE_KERNEL(causal_conv1d_update, CausalConv1dUpdateParams)

namespace mobilemamba {
namespace {

constexpr int64_t kOperations = 30;  // of a vector at one position

}  // namespace

void run_causal_conv1d(CausalConv1dParams& p, const Tensor&) {
  const int64_t lanes = vector_lanes(), positions = causal_conv1d_item(p);
  parallel(KERNEL(causal_conv1d_fwd), p, p.batch * ceil_div(p.length, positions) * ceil_div(p.dim, lanes),
           std::min(p.length, positions) * kOperations, causal_conv1d_scratch(lanes));
}

FilterSums run_causal_conv1d_backward(CausalConv1dParams& p, const Tensor& like) {
  const int64_t lanes = vector_lanes(), width = p.filter.width;
  auto floats = [&](std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(like, size, ScalarType::Float);
  };
  Tensor parts = floats({p.batch, p.dim, width + 1}), weight = floats({p.dim, width}), bias = floats({p.dim});
  p.partial = static_cast<float*>(parts.data_ptr());
  parallel(KERNEL(causal_conv1d_bwd), p, p.batch * ceil_div(p.dim, lanes), p.length * 3 * kOperations,
           causal_conv1d_scratch(lanes));
  float *to_weight = static_cast<float*>(weight.data_ptr()), *to_bias = static_cast<float*>(bias.data_ptr());
  torch::stable::parallel_for(0, p.dim, 1 + 4096 / p.batch, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * (width + 1); i < end * (width + 1); ++i) {
      float sum = 0;
      for (int64_t b = 0; b < p.batch; ++b) sum += p.partial[b * p.dim * (width + 1) + i];
      const int64_t channel = i / (width + 1), tap = i % (width + 1);
      (tap < width ? to_weight[channel * width + tap] : to_bias[channel]) = sum;
    }
  });
  return {weight, bias};
}

void run_causal_conv1d_update(CausalConv1dUpdateParams& p, const Tensor&) {
  const int64_t lanes = vector_lanes();
  parallel(KERNEL(causal_conv1d_update), p, p.batch * ceil_div(p.dim, lanes), (p.kept + p.steps) * kOperations,
           causal_conv1d_update_scratch(p, lanes));
}

}  // namespace mobilemamba
