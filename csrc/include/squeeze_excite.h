// The passes of squeeze-and-excitation over the maps; between them are two matrix products.
#pragma once

#include "include/tensor_view.h"

namespace mobilemamba {

// An item is a block of channels of an image.
struct SqueezeExciteParams {
  int64_t channels, height, width;
  Map x, y;
  float* means;          // (batch, channels): written by squeeze
  const float* weights;  // (batch, channels): excite takes their sigmoid
  float* scratch;        // squeeze_excite_scratch floats
};

constexpr int64_t kSqueezeTile = 64;  // positions of a row
inline int64_t squeeze_excite_scratch(int64_t lanes) { return kSqueezeTile * lanes; }

}  // namespace mobilemamba
