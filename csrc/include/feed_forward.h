// Two pointwise convolutions with an activation between them, around a residual.
#pragma once

#include "include/products.h"

namespace mobilemamba {

// An item is a block of positions. Their hidden channels, first.y and second.x, are only ever in scratch.
struct FeedForwardParams {
  Product first, second;
  int64_t positions, blocks;
  float* scratch;  // feed_forward_scratch floats
};

inline int64_t feed_forward_scratch(const FeedForwardParams& p, int64_t positions) {
  const int64_t hidden = positions * packed_depth(p.second.weight.depth, p.second.weight.bfloat16);
  return hidden + product_scratch(p.first, positions) + product_scratch(p.second, positions);
}

}  // namespace mobilemamba
