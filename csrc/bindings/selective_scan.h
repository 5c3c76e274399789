// What the bindings of the one- and the two-directional scan share.
#pragma once

#include "bindings/tensor.h"
#include "include/selective_scan.h"

namespace mobilemamba {

// Runs the forward; params holds sizes, inputs and outputs, `like` is on their device. Each device has its own.
void run_scan(SelectiveScanParams& params, const Tensor& like);

// The gradients that are sums, in float32, contiguous: as many elements as the arguments, in their order.
struct ScanSums {
  Tensor A, B, C, D, delta_bias;
};
// Runs the backward; params holds sizes, inputs, and the gradients of u, delta and z. Each device has its own.
ScanSums run_scan_backward(SelectiveScanParams& params, const Tensor& like);

// A sum in the dtype and strides of the argument that it belongs to; empty for an absent one.
Tensor like_argument(const Tensor& sum, const std::optional<Tensor>& argument, const Tensor& any);

}  // namespace mobilemamba
