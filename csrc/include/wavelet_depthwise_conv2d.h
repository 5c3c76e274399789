// Depthwise convolution in the Haar domain, one level.
#pragma once

#include "include/capability.h"
#include "include/haar.h"

namespace mobilemamba {

struct WaveletDepthwiseConv2dParams {
  int64_t batch, channels, height, width;  // of the pixels
  Map x;
  Map weight;      // (4 channels, 1, taps): channel 4c + band; only the taps that can meet a band element
  Elements scale;  // (4 channels), or absent
  int64_t scale_stride;
  int64_t tap_rows, tap_columns;  // odd
  float* scratch;                 // one thread's

  // Forward, and the gradient of x: the same with the taps reversed.
  bool reverse;
  Map base;  // or absent
  Map out;

  // Gradients of weight and scale: every group of units sums into its own part, and the parts are added in order.
  Map grad;
  int64_t groups;
  float* parts;  // (groups, blocks of kLanes channels, 4, tap_rows, tap_columns, kLanes)
  Map grad_weight;
  Elements grad_scale;
};

// A unit of work is kLanes channels of an image, or of a part of a large one this many band rows and columns in size.
constexpr int64_t kWaveletRows = 64, kWaveletColumns = 64;

inline int64_t wavelet_units(const WaveletDepthwiseConv2dParams& p) {
  return p.batch * ((half(p.height) + kWaveletRows - 1) / kWaveletRows) *
         ((half(p.width) + kWaveletColumns - 1) / kWaveletColumns);
}

// Columns of a band in scratch: a part's, with those that its taps meet on either side.
inline int64_t wavelet_columns(const WaveletDepthwiseConv2dParams& p) {
  const int64_t width = half(p.width);
  return (width < kWaveletColumns ? width : kWaveletColumns) + p.tap_columns - 1;
}

// Rows are filtered in groups of this many. Scratch holds the band rows that a group's taps meet.
constexpr int64_t kWaveletGroup = 8;
inline int64_t wavelet_slots(const WaveletDepthwiseConv2dParams& p) {
  const int64_t met = kWaveletGroup + p.tap_rows - 1, height = half(p.height);
  return met < height ? met : height;
}

// Floats of one thread's scratch; the kernel lays them out: weights, band rows, a group's results, two rows of pixels.
inline int64_t wavelet_scratch(const WaveletDepthwiseConv2dParams& p, int64_t lanes) {
  return 4 * lanes * (p.tap_rows * p.tap_columns + (wavelet_slots(p) + kWaveletGroup + 1) * wavelet_columns(p));
}

}  // namespace mobilemamba

DECLARE_KERNEL(wavelet_depthwise_conv2d_fwd, WaveletDepthwiseConv2dParams)
DECLARE_KERNEL(wavelet_depthwise_conv2d_bwd, WaveletDepthwiseConv2dParams)
DECLARE_KERNEL(wavelet_depthwise_conv2d_bwd_sum, WaveletDepthwiseConv2dParams)
