// The passes around the vendor library's matrix products.
#pragma once

#include "include/activation.h"
#include "include/tensor_view.h"

namespace mobilemamba {

// y = activation(x + bias) + residual, with conversion and transposition where the tensors ask for it. An item is a
// position of the (batch, height, width), counted from `first`.
struct VendorPassParams {
  int64_t channels, height, width, first;
  Activation activation;
  Map x, residual, y;      // residual may be absent
  int64_t x_skip, y_skip;  // elements that precede the position `first` and that a slab of positions lacks
  Elements bias;           // (channels) or absent
  int64_t bias_stride;
  float* scratch;  // vendor_pass_scratch floats
};

constexpr int64_t kVendorPassTile = 64;  // positions that are transposed together

inline int64_t vendor_pass_scratch(const VendorPassParams& p, int64_t lanes) {
  return p.channels + lanes + 2 * kVendorPassTile * lanes;
}

}  // namespace mobilemamba
