// Pointwise convolution with input activation, bias, activation and residual.
#pragma once

#include "include/products.h"

namespace mobilemamba {

// An item is a group of the weight's panels at a block of positions; groups vary fastest.
struct PointwiseConv2dActParams {
  Product product;
  int64_t positions, blocks, groups;
  float* scratch;  // product_scratch floats for the positions of a block
};

}  // namespace mobilemamba
