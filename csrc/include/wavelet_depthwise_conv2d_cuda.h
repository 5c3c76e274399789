// What wavelet_depthwise_conv2d on a GPU has beside its operands.
#pragma once

#include "include/wavelet_depthwise_conv2d.h"

namespace mobilemamba {

// How a launch divides the work, set by plan_wavelet_depthwise_conv2d. A unit is `unit_rows` rows by `unit_columns`
// columns of the bands of 32 channels of an image. A block has the units of a group, of the same channels.
struct WaveletDepthwiseConv2dCudaParams : WaveletDepthwiseConv2dParams {
  bool backward;          // of the weights: parts are (groups, blocks, 4, tap_rows, tap_columns, 32)
  int64_t rows, columns;  // of the bands
  int64_t taps;           // 3, 5, 7: tap_rows and tap_columns, for which there are kernels of their own; else 0
  int64_t segment;        // columns that a thread computes together, at least unit_columns
  bool whole;             // a unit is an image
  int64_t step;           // rows that a block reads at a time
  int64_t unit_rows, unit_columns, units_down, units_across, units;
  int64_t blocks;  // of channels
};

}  // namespace mobilemamba
