// What the bindings of the causal convolutions share.
#pragma once

#include "bindings/tensor.h"
#include "include/causal_conv1d.h"
#include "include/causal_conv1d_update.h"

namespace mobilemamba {

// Runs the forward, or a step, of which no dimension is empty; each device has its own.
void run_causal_conv1d(CausalConv1dParams& p, const Tensor& like);
void run_causal_conv1d_update(CausalConv1dUpdateParams& p, const Tensor& like);

// The gradients of weight (dim, width) and bias (dim), float32 and contiguous.
struct FilterSums {
  Tensor weight, bias;
};
// Runs the backward; p holds sizes, inputs and the gradients of x and initial. Each device has its own.
FilterSums run_causal_conv1d_backward(CausalConv1dParams& p, const Tensor& like);

inline CausalFilter filter_of(const Tensor& weight, const std::optional<Tensor>& bias, int64_t dim, bool silu) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) >= 2 && weight.size(1) <= kMostTaps,
                  "mobilemamba: weight must have shape (dim, 2 to 4)");
  check_size(weight, 0, dim);
  STD_TORCH_CHECK(!bias || bias->dim() == 1, "mobilemamba: bias must have one dimension");
  if (bias) check_size(*bias, 0, dim);
  return {weight.size(1),
          silu,
          elements(weight),
          weight.stride(0),
          weight.stride(1),
          elements(bias),
          mobilemamba::stride(bias, 0)};
}

}  // namespace mobilemamba
