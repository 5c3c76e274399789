// The last phase of SS2D on a GPU: LayerNorm over channels, and the gate.
#pragma once

#include "include/ss2d_bidirectional.h"

namespace mobilemamba {

struct Ss2dNormalizeParams {
  int64_t batch, dim, length;
  float eps;
  Sequence y, z, out;  // y float32; z may be absent
  Elements weight, bias;
  int64_t weight_stride, bias_stride;
};

}  // namespace mobilemamba
