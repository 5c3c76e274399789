// Tiles: a few positions of kLanes channels, float32, channels together: tile[position * kLanes + channel].
//
// Both layouts are read and written without a copy of the tensor: channels-last is a row of loads, channels-first a
// transposition in registers. Lanes beyond the tensor's channels are zero when read and dropped when written. A tensor
// that has a tile's form but for the distance of its positions is used where it lies.
#pragma once

#include "cpu/vec.h"

BEGIN_KERNELS
namespace {

constexpr int64_t kWorthTransposing = 5;  // positions; single elements take less time than so short rows

// e: the first element; the strides are in elements; channels <= kLanes.
[[maybe_unused]] static void load_tile(float* tile, Elements e, int64_t channel_stride, int64_t position_stride,
                                       int64_t channels, int64_t positions) {
  with_type(e, [&](const auto* p) {
    if (channel_stride == 1) {
      for (int64_t l = 0; l < positions; ++l) store(tile + l * kLanes, load_some(p + l * position_stride, channels));
    } else if (position_stride == 1 && positions >= kWorthTransposing) {
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
    } else if (position_stride == 1 && positions >= kWorthTransposing) {
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
          store_one(p + c * channel_stride + l * position_stride, tile[l * kLanes + c]);
    }
  });
}

// Positions of kLanes channels, float32, channels together: a tile, or the part of a tensor that needs none.
struct Rows {
  float* data = nullptr;
  int64_t step = kLanes;  // from a position to the next, in elements

  INLINE_MEMBER float* operator[](int64_t l) const { return data + l * step; }
  INLINE_MEMBER Vec get(int64_t l) const { return load(data + l * step); }
  INLINE_MEMBER void prefetch(int64_t l) const { __builtin_prefetch(data + l * step); }
  INLINE_MEMBER void set(int64_t l, Vec v) const { store(data + l * step, v); }
};

INLINE bool needs_no_tile(Elements e, int64_t channel_stride, int64_t channels) {
  return e.dtype == DType::kFloat32 && channel_stride == 1 && channels == kLanes;
}
INLINE Rows in_place(Elements e, int64_t position_stride) { return {static_cast<float*>(e.data), position_stride}; }

// To read, never to write: the tensor where it lies, or a copy of it in the tile.
INLINE Rows load_rows(float* tile, Elements e, int64_t channel_stride, int64_t position_stride, int64_t channels,
                      int64_t positions) {
  if (needs_no_tile(e, channel_stride, channels)) return in_place(e, position_stride);
  load_tile(tile, e, channel_stride, position_stride, channels, positions);
  return {tile};
}

// The lanes of one vector, as load_tile reads them.
INLINE Vec load_lanes(Elements e, int64_t channel_stride, int64_t channels) {
  if (needs_no_tile(e, channel_stride, channels)) return load(static_cast<const float*>(e.data));
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
