// Dense convolution with bias and activation.
#pragma once

#include "include/products.h"

namespace mobilemamba {

struct Conv2dActParams {
  int64_t batch, channels, height, width, filters, out_height, out_width;
  int64_t k, stride, padding;
  Activation activation;
  Map x, y;
  PackedWeight weight;  // of depth (k, k, channels); bfloat16 only where a run of k · channels holds whole pairs
  const float* bias;    // (filters), padded to a multiple of kPackedLanes
  int64_t rows;         // output rows of an item
  float* scratch;       // conv2d_scratch floats
};

// An item is a band of `rows` output rows of an image.
inline int64_t conv2d_bands(const Conv2dActParams& p) { return (p.out_height + p.rows - 1) / p.rows; }

// A row of the padded image, and how many of them a band needs.
inline int64_t conv2d_padded_row(const Conv2dActParams& p) { return (p.width + 2 * p.padding) * p.channels; }
inline int64_t conv2d_padded_rows(const Conv2dActParams& p) { return (p.rows - 1) * p.stride + p.k; }

// The padded rows, a tile to transpose one of them, a panel's sums of a row of outputs, and a tile to transpose them.
inline int64_t conv2d_scratch(const Conv2dActParams& p, int64_t lanes) {
  return conv2d_padded_rows(p) * conv2d_padded_row(p) + (p.width + p.out_width) * lanes +
         p.out_width * kPanelVectors * kPackedLanes;
}

// Whether that is little enough. Padding and strides are only numbers: they may ask for more than there is memory, or
// than 64 bits can count.
inline bool conv2d_scratch_is_small(const Conv2dActParams& p) {
  constexpr double kMost = 1 << 28;
  const double image = static_cast<double>(conv2d_padded_rows(p)) * static_cast<double>(p.width + 2 * p.padding);
  return image * static_cast<double>(p.channels) + static_cast<double>(p.width + 4 * p.out_width) * 16 < kMost;
}

}  // namespace mobilemamba
