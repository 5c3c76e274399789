// MobileMamba's SS2D between its convolution and its output projection, one phase a kernel.
#pragma once

#include "include/scan_scratch.h"
#include "include/tensor_view.h"

namespace mobilemamba {

// (batch, channels, positions), strides in elements.
struct Sequence {
  Elements elements;
  int64_t batch = 0, channel = 0, position = 0;

  Elements at(int64_t b, int64_t c, int64_t l) const { return elements + (b * batch + c * channel + l * position); }
};

struct Ss2dParams {
  int64_t dim, length, state, rank;
  Sequence x, z, out;
  // Packed by the binding, float32, channels padded with zeros to a multiple of kSs2dLanes (padded_dim):
  const float* x_proj;   // (dim, columns): for direction k columns k (rank + 2 state) …: dt_low, B, C; padded too
  const float* dt_proj;  // (2, rank, padded_dim)
  const float* dt_bias;  // (2, padded_dim)
  const float* A;        // (2, state, padded_dim), -exp(A_log)
  const float* D;        // (2, padded_dim)
  const float *norm_weight, *norm_bias;  // (padded_dim)
  int64_t columns, padded_dim;
  float eps;
  // Between the phases, float32, of images first_image …:
  float* projected;  // (images, length, columns)
  float* sum;        // (images, length, padded_dim), both directions added
  int64_t first_image;
  float* scratch;  // one thread's
};

constexpr int64_t kSs2dLanes = 16;      // the most lanes of any instruction set
constexpr int64_t kSs2dPositions = 64;  // of an item of the first and the last phase

inline int64_t ss2d_position_blocks(const Ss2dParams& p) { return (p.length + kSs2dPositions - 1) / kSs2dPositions; }

// Floats of one thread's scratch, enough for each phase.
inline int64_t ss2d_scratch(const Ss2dParams& p, int64_t lanes) {
  const int64_t scan = scan_fwd_scratch(p.length, p.state, lanes), project = kSs2dPositions * p.padded_dim;
  return scan > project ? scan : project;
}

}  // namespace mobilemamba
