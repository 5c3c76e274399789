// MobileMamba's SS2D between its convolution and its output projection, one phase a kernel.
#pragma once

#include "include/products.h"
#include "include/scan_scratch.h"

namespace mobilemamba {

struct Ss2dParams {
  int64_t dim, length, state, rank;
  Sequence x, z, out;
  PackedWeight x_proj;  // (columns, dim): for direction k rows k (rank + 2 state) …: dt_low, B, C; padded with zeros
  const float* zeros;   // (columns)
  // Packed by ss2d_pack, float32, channels padded with zeros to a multiple of kPackedLanes (padded_dim):
  const float* dt_proj;                  // (2, rank, padded_dim)
  const float* dt_bias;                  // (2, padded_dim)
  const float* A;                        // (2, state, padded_dim), -exp(A_log)
  const float* D;                        // (2, padded_dim)
  const float *norm_weight, *norm_bias;  // (padded_dim)
  int64_t columns, padded_dim, block;
  float eps;
  // Between the phases, float32, of images first_image …:
  float* projected;  // (images, length, columns)
  float* sum;        // (images, length, padded_dim), both directions added
  int64_t first_image;
  float* scratch;  // one thread's
};

// A parameter (planes, dim, count), strides in elements, on its way to (planes, count, padded_dim).
struct Ss2dParameter {
  Elements from;
  int64_t planes, plane, channel, count, step;
  float* to;
};
// An item is a block of channels.
struct Ss2dPackParams {
  Ss2dParameter parameters[6];  // the first is A_log, of which -exp is packed
  int64_t dim, padded_dim;
  float* scratch;  // ss2d_pack_scratch floats
};
constexpr int64_t kSs2dPackTile = 64;
inline int64_t ss2d_pack_scratch(int64_t lanes) { return kSs2dPackTile * lanes; }

// Positions of an item of the first and the last phase: `block`, at most kSs2dPositions.
constexpr int64_t kSs2dPositions = 64;
inline int64_t ss2d_position_blocks(const Ss2dParams& p) { return (p.length + p.block - 1) / p.block; }

// Floats of one thread's scratch, enough for each phase.
inline int64_t ss2d_scratch(const Ss2dParams& p, int64_t lanes) {
  const int64_t scan = scan_fwd_scratch(p.length, p.state, lanes), project = kSs2dPositions * p.padded_dim;
  return scan > project ? scan : project;
}

}  // namespace mobilemamba
