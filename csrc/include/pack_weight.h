// Packing of a weight for the matrix products.
#pragma once

#include "include/products.h"

namespace mobilemamba {

// An item is a panel of (outputs, channels, rows, columns); the depth runs over (rows, columns, channels).
struct PackWeightParams {
  Map weight;  // batch: the outputs
  int64_t channels, rows, columns;
  PackedWeight packed;
  void* to;
  float* scratch;  // pack_weight_scratch floats
};

constexpr int64_t kPackTile = 64;  // of the depth, transposed together
inline int64_t pack_weight_scratch(int64_t lanes) { return (kPackTile + 1) * lanes; }

}  // namespace mobilemamba
