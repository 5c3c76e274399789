// Tiles: a few positions of kLanes channels, float32, channels together: tile[position * kLanes + channel].
//
// Both layouts are read and written without a copy of the tensor: channels-last is a row of loads, channels-first a
// transposition in registers. Lanes beyond the tensor's channels are zero when read and dropped when written.
#pragma once

#include "cpu/vec.h"

BEGIN_KERNELS
namespace {

// e: the first element; the strides are in elements; channels <= kLanes.
[[maybe_unused]] static void load_tile(float* tile, Elements e, int64_t channel_stride, int64_t position_stride,
                                       int64_t channels, int64_t positions) {
  with_type(e, [&](const auto* p) {
    if (channel_stride == 1) {
      for (int64_t l = 0; l < positions; ++l) store(tile + l * kLanes, load_some(p + l * position_stride, channels));
    } else if (position_stride == 1) {
      for (int64_t l = 0; l < positions; l += kLanes) {
        const int64_t count = positions - l < kLanes ? positions - l : kLanes;
        Vec rows[kLanes];
        for (int c = 0; c < kLanes; ++c) rows[c] = c < channels ? load_some(p + c * channel_stride + l, count) : Vec{};
        transpose(rows);
        for (int64_t i = 0; i < count; ++i) store(tile + (l + i) * kLanes, rows[i]);
      }
    } else {
      for (int64_t l = 0; l < positions; ++l)
        for (int64_t c = 0; c < kLanes; ++c)
          tile[l * kLanes + c] = c < channels ? load_one(p + c * channel_stride + l * position_stride) : 0.0f;
    }
  });
}

[[maybe_unused]] static void store_tile(const float* tile, Elements e, int64_t channel_stride, int64_t position_stride,
                                        int64_t channels, int64_t positions) {
  with_type(e, [&](auto* p) {
    if (channel_stride == 1) {
      for (int64_t l = 0; l < positions; ++l) store_some(p + l * position_stride, load(tile + l * kLanes), channels);
    } else if (position_stride == 1) {
      for (int64_t l = 0; l < positions; l += kLanes) {
        const int64_t count = positions - l < kLanes ? positions - l : kLanes;
        Vec rows[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) rows[i] = i < count ? load(tile + (l + i) * kLanes) : Vec{};
        transpose(rows);
        for (int64_t c = 0; c < channels; ++c) store_some(p + c * channel_stride + l, rows[c], count);
      }
    } else {
      for (int64_t l = 0; l < positions; ++l)
        for (int64_t c = 0; c < channels; ++c)
          store_some(p + c * channel_stride + l * position_stride, splat(tile[l * kLanes + c]), 1);
    }
  });
}

// The lanes of one vector, as load_tile reads them.
INLINE Vec load_lanes(Elements e, int64_t channel_stride, int64_t channels) {
  float lanes[kLanes];
  load_tile(lanes, e, channel_stride, 0, channels, 1);
  return load(lanes);
}

// `count` elements, stride apart, as float32.
[[maybe_unused]] static void load_row(float* row, Elements e, int64_t stride, int64_t count) {
  with_type(e, [&](const auto* p) {
    if (stride == 1) {
      for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t some = count - i < kLanes ? count - i : kLanes;
        store_some(row + i, load_some(p + i, some), some);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) row[i] = load_one(p + i * stride);
    }
  });
}

}  // namespace
END_KERNELS
