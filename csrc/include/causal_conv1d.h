// Causal depthwise convolution of sequences.
#pragma once

#include "include/tensor_view.h"

namespace mobilemamba {

constexpr int64_t kMostTaps = 4;

// The filter of a causal convolution, bias and activation; strides in elements.
struct CausalFilter {
  int64_t width;  // taps, from 2 to kMostTaps
  bool silu;
  Elements weight;  // (dim, width)
  int64_t weight_channel, weight_tap;
  Elements bias;  // (dim) or absent
  int64_t bias_channel;
};

struct CausalConv1dParams {
  int64_t batch, dim, length;
  CausalFilter filter;
  Sequence x, initial;  // (batch, dim, length), (batch, dim, width - 1) or absent
  Indices numbers;      // of the sequences that positions belong to, (batch, length), or absent
  float* scratch;       // causal_conv1d_scratch floats, one thread's

  // Forward.
  Sequence y;

  // Backward.
  Sequence grad, grad_x, grad_initial;  // the last where there is an `initial`
  float* partial;                       // sums over the positions: float32 (batch, dim, width + 1), the bias last
};

// Whether the forward goes along the positions, one channel after the other.
inline bool along_positions(const CausalConv1dParams& p) {
  return p.x.position == 1 && p.y.position == 1 && p.y.channel != 1 && !p.numbers;
}

constexpr int64_t kCausalChunk = 128;      // positions of a tile
constexpr int64_t kCausalRowChunk = 2048;  // of one channel: long, or the processor does not fetch ahead
inline int64_t causal_conv1d_item(const CausalConv1dParams& p) {
  return along_positions(p) ? kCausalRowChunk : kCausalChunk;
}

// Rows of inputs and of their gradients, each with the taps before them; of results. Or one channel's inputs.
inline int64_t causal_conv1d_scratch(int64_t lanes) {
  const int64_t tiles = (3 * kCausalChunk + 2 * (kMostTaps - 1)) * lanes, row = kCausalRowChunk + kMostTaps - 1;
  return tiles > row ? tiles : row;
}

}  // namespace mobilemamba
