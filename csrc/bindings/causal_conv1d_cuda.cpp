// The causal convolutions on a GPU.
#include "bindings/causal_conv1d.h"
#include "bindings/cuda.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

CausalConv1dCudaParams on_gpu(const CausalConv1dParams& params) {
  CausalConv1dCudaParams p{};
  static_cast<CausalConv1dParams&>(p) = params;
  plan_causal_conv1d(p);
  return p;
}

}  // namespace

void run_causal_conv1d(CausalConv1dParams& p, const Tensor& like) {
  const OnDeviceOf device(like);
  device.run(causal_conv1d_fwd, on_gpu(p));
}

FilterSums run_causal_conv1d_backward(CausalConv1dParams& params, const Tensor& like) {
  const OnDeviceOf device(like);
  CausalConv1dCudaParams p = on_gpu(params);
  const int64_t parts = p.batch * p.parts, taps = p.dim * p.filter.width;
  const auto new_floats = [&](std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(like, size, ScalarType::Float);
  };
  const auto floats = [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
  const Tensor partial_weight = new_floats({parts, taps}), partial_bias = new_floats({parts, p.dim});
  const Tensor weight = new_floats({p.dim, p.filter.width}), bias = new_floats({p.dim});
  p.partial_weight = floats(partial_weight), p.partial_bias = floats(partial_bias);
  device.run(causal_conv1d_bwd, p);
  const PartialSumsParams sums{
      {{p.partial_weight, floats(weight), 1, parts, taps}, {p.partial_bias, floats(bias), 1, parts, p.dim}}, 2};
  device.run(partial_sums, sums);
  return {weight, bias};
}

void run_causal_conv1d_update(CausalConv1dUpdateParams& p, const Tensor& like) {
  OnDeviceOf(like).run(causal_conv1d_update, p);
}

}  // namespace mobilemamba
