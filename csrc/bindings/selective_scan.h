// What the bindings of the one- and the two-directional scan share.
#pragma once

#include "bindings/tensor.h"
#include "include/selective_scan.h"

DECLARE_KERNEL(selective_scan_fwd, SelectiveScanParams)
DECLARE_KERNEL(selective_scan_bwd, SelectiveScanParams)

namespace mobilemamba {

// Runs the forward; params holds sizes, inputs and outputs.
void run_scan(SelectiveScanParams& params);

// The gradients that are sums, in float32, shaped as the arguments are.
struct ScanSums {
  Tensor A, B, C, D, delta_bias;
};
// Runs the backward; params holds sizes, inputs, and the gradients of u, delta and z.
ScanSums run_scan_backward(SelectiveScanParams& params, const Tensor& like);

// A float32 sum in the dtype and strides of the argument that it belongs to; empty for an absent one.
Tensor like_argument(const Tensor& sum, const std::optional<Tensor>& argument, const Tensor& any);

}  // namespace mobilemamba
