// Selective scan, one direction or both added, any state size.
#pragma once

#include "include/scan_scratch.h"
#include "include/tensor_view.h"

namespace mobilemamba {

// Strides in elements; a dimension that a tensor lacks has stride 0.
struct ScanTensor {
  Elements elements;
  int64_t batch = 0, direction = 0, channel = 0, state = 0, position = 0;

  ANYWHERE explicit operator bool() const { return static_cast<bool>(elements); }
  ANYWHERE Elements at(int64_t b, int64_t k, int64_t c, int64_t n, int64_t l) const {
    return elements + (b * batch + k * direction + c * channel + n * state + l * position);
  }
};

struct SelectiveScanParams {
  int64_t batch, dim, length, state;
  int64_t directions;  // direction 0 runs up, direction 1 down
  int64_t groups;      // of channels that share B and C
  bool softplus;
  ScanTensor u;      // (batch, [directions,] dim, length)
  ScanTensor delta;  // (batch, directions, dim, length)
  ScanTensor A;      // (directions, dim, state)
  ScanTensor B, C;   // (batch, directions, groups, state, length), or (dim, state) where they do not vary
  bool B_varies, C_varies;
  int64_t B_group, C_group;  // groups of channels to one group of B, of C
  ScanTensor D, delta_bias;  // (directions, dim)
  ScanTensor z;              // (batch, dim, length)
  float* scratch;            // one thread's

  // Forward.
  int64_t segments, segment;  // of a sequence, of one direction; positions of each, but of the last
  float* folds;               // (batch × groups × blocks, segments - 1, state, 2, lanes): decay and state
  ScanTensor out;             // (batch, dim, length)
  ScanTensor last_state;      // (batch, dim, state), of one direction

  // Backward.
  ScanTensor grad_out, grad_last_state;
  ScanTensor grad_u, grad_delta, grad_z;
  int64_t slices;  // a group's channels are divided in so many parts, by shape alone, to give every thread work
  // Sums over the channels of a slice: float32 (batch, directions, groups, slices, state, length).
  float *partial_B, *partial_C;
  // Sums over the positions: float32 (batch, directions, dim[, state]).
  float *partial_A, *partial_D, *partial_delta_bias, *partial_fixed_B, *partial_fixed_C;
};

constexpr int64_t kScanBackwardChunk = 256;  // positions; the backward keeps more tiles than the forward

// Channels of one group come in blocks of as many as a vector has lanes.
inline int64_t scan_blocks(const SelectiveScanParams& p, int64_t lanes) {
  return (p.dim / p.groups + lanes - 1) / lanes;
}

// Floats of one thread's scratch for a backward over vectors of `lanes`.
inline int64_t scan_bwd_scratch(const SelectiveScanParams& p, int64_t lanes) {
  const int64_t chunks = (p.length + kScanBackwardChunk - 1) / kScanBackwardChunk;
  return (10 * kScanBackwardChunk + kMaxState + chunks * p.state + 2 * p.length) * lanes + 2 * kScanBackwardChunk +
         scan_fwd_scratch(p.length, p.state, lanes);
}

}  // namespace mobilemamba
