// What a causal convolution on a GPU has beside its operands.
#pragma once

#include "include/causal_conv1d.h"

namespace mobilemamba {

struct CausalConv1dCudaParams : CausalConv1dParams {
  // Set by plan_causal_conv1d: a block has some channels and one of so many parts of a sequence, `range` chunks.
  int64_t parts, range;

  // Backward. Sums over the positions of a part: float32 (batch, parts, dim, width), (batch, parts, dim).
  float *partial_weight, *partial_bias;
};

}  // namespace mobilemamba
