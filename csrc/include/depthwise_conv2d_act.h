// Depthwise convolution with bias, activation, a scaling of each channel and residual.
#pragma once

#include "include/activation.h"
#include "include/tensor_view.h"

namespace mobilemamba {

struct DepthwiseConv2dActParams {
  int64_t batch, channels, height, width, out_height, out_width;
  int64_t k, stride, padding;
  Activation activation;
  Map x, residual, y;           // residual may be absent
  Elements weight;              // (channels, k, k), contiguous
  Elements bias, scale, shift;  // (channels) or absent
  int64_t bias_stride, scale_stride, shift_stride;
  int64_t group;    // channels that an item covers, a multiple of kLanes
  int64_t rows;     // output rows that an item covers
  bool transposes;  // an item is one block, read and stored as a whole; else it goes row by row
  float* scratch;   // depthwise_scratch floats
};

// An item is a band of `rows` output rows of `group` channels of an image; bands vary fastest, groups slowest.
inline int64_t depthwise_items(const DepthwiseConv2dActParams& p) {
  return (p.channels + p.group - 1) / p.group * p.batch * ((p.out_height + p.rows - 1) / p.rows);
}

inline bool depthwise_reads_in_place(const DepthwiseConv2dActParams& p) {
  return p.x.elements.dtype == DType::kFloat32 && p.x.channel == 1 && p.height > 0 && p.width > 0;
}

// Rows of the image that a tile holds: those under the filter, or all of an item.
inline int64_t depthwise_tile_rows(const DepthwiseConv2dActParams& p) {
  return p.transposes ? (p.rows - 1) * p.stride + p.k : p.k;
}
// Floats of the tiles: of a whole group, or only of the block that is too narrow to be read in place.
inline int64_t depthwise_tiles(const DepthwiseConv2dActParams& p, int64_t lanes) {
  return depthwise_tile_rows(p) * p.width * (depthwise_reads_in_place(p) ? lanes : p.group);
}
// Positions whose sums are kept.
inline int64_t depthwise_sums(const DepthwiseConv2dActParams& p) { return (p.transposes ? p.rows : 1) * p.out_width; }

// The weights, biases, scales and shifts of a group, its tiles, the sums of a block, and a residual that has to be
// transposed.
inline int64_t depthwise_scratch(const DepthwiseConv2dActParams& p, int64_t lanes) {
  return p.group * (p.k * p.k + 3) + depthwise_tiles(p, lanes) + 2 * depthwise_sums(p) * lanes;
}

}  // namespace mobilemamba
