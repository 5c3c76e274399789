// A step of the causal depthwise convolution.
#pragma once

#include "include/causal_conv1d.h"

namespace mobilemamba {

struct CausalConv1dUpdateParams {
  int64_t batch, dim, steps;
  int64_t kept;  // positions in a row of the state
  CausalFilter filter;
  Sequence x, state, y;  // (batch, dim, steps), (rows, dim, kept), (batch, dim, steps)
  Indices offsets;       // positions that came before, (batch), or absent
  Indices rows;          // of the state, (batch), or absent
  float* scratch;        // causal_conv1d_update_scratch floats, one thread's
};

// The state, and the positions under the filter.
inline int64_t causal_conv1d_update_scratch(const CausalConv1dUpdateParams& p, int64_t lanes) {
  return (p.kept + p.steps + kMostTaps - 1) * lanes;
}

}  // namespace mobilemamba
