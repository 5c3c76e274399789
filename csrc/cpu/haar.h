// Rows of the Haar transform: lanes are channels, a 2×2 block of pixels is four vectors, and so are its four bands.
//
// The transform's matrix is symmetric and its own inverse, so one butterfly serves both directions and both gradients.
// Here it is not normalized: each direction doubles, which the callers take back where it costs nothing.
#pragma once

#include <type_traits>

#include "cpu/tile.h"
#include "include/haar.h"

BEGIN_KERNELS
namespace {

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// x00 x01 / x10 x11 to the four bands in order, or back.
INLINE void butterfly(Vec& a, Vec& b, Vec& c, Vec& d) {
  const Vec sum_0 = a + b, sum_1 = c + d, difference_0 = a - b, difference_1 = c - d;
  a = sum_0 + sum_1, b = sum_0 - sum_1, c = difference_0 + difference_1, d = difference_0 - difference_1;
}

// Rows of pixels whose channels lie together: in the tensor itself, or in a tile. A typed pointer and plain numbers:
// built from Elements in memory it would be read back before the stores ahead of it are done.
template <class T>
struct Pixels {
  T* data;
  int64_t row, column, channels;
};

INLINE bool in_place(const Map& map) { return map.channel == 1; }
INLINE Pixels<float> tile_pixels(float* tile, int64_t columns) { return {tile, columns * kLanes, kLanes, kLanes}; }

// Calls f(tile, first element, positions) for each stretch of `rows` rows that is evenly spaced. first: the rows'
// first.
template <class F>
INLINE void for_stretches(float* tile, Elements first, const Map& map, int64_t rows, int64_t columns, F f) {
  if (map.row == columns * map.column) return f(tile, first, rows * columns);
  for (int64_t y = 0; y < rows; ++y) f(tile + y * columns * kLanes, first + y * map.row, columns);
}
static inline void load_pixels(float* tile, Elements first, const Map& map, int64_t channels, int64_t rows,
                               int64_t columns) {
  for_stretches(tile, first, map, rows, columns, [&](float* to, Elements from, int64_t positions) {
    load_tile(to, from, map.channel, map.column, channels, positions);
  });
}
static inline void store_pixels(float* tile, Elements first, const Map& map, int64_t channels, int64_t rows,
                                int64_t columns) {
  for_stretches(tile, first, map, rows, columns, [&](float* from, Elements to, int64_t positions) {
    store_tile(from, to, map.channel, map.column, channels, positions);
  });
}

// Calls f with the rows' Pixels to be read, by way of the tile where they are not in place.
template <class F>
INLINE void with_input(float* tile, Elements first, const Map& map, int64_t channels, int64_t rows, int64_t columns,
                       F f) {
  if (in_place(map)) {
    with_type(first, [&](auto* p) ALWAYS_INLINE {
      f(Pixels<std::remove_pointer_t<decltype(p)>>{p, map.row, map.column, channels});
    });
  } else {
    load_pixels(tile, first, map, channels, rows, columns);
    f(tile_pixels(tile, columns));
  }
}
// Calls f with the rows' Pixels to be written.
template <class F>
INLINE void with_output(float* tile, Elements first, const Map& map, int64_t channels, int64_t rows, int64_t columns,
                        F f) {
  if (in_place(map)) {
    with_type(first, [&](auto* p) ALWAYS_INLINE {
      f(Pixels<std::remove_pointer_t<decltype(p)>>{p, map.row, map.column, channels});
    });
  } else {
    f(tile_pixels(tile, columns));
    store_pixels(tile, first, map, channels, rows, columns);
  }
}

// Blocks of columns [begin, end) of one or two rows. kWhole: two rows, an even number of columns, kLanes channels.
template <bool kWhole, class T, class F>
INLINE void forward_blocks(float* bands, int64_t band, const Pixels<T>& in, int64_t rows, int64_t begin, int64_t end,
                           F finish) {
  const int64_t channels = kWhole ? kLanes : in.channels;
  const T *p = in.data + begin * in.column, *q = p + in.row;
  bands += begin / 2 * kLanes;
  for (int64_t x = begin; x < end; x += 2, p += 2 * in.column, q += 2 * in.column, bands += kLanes) {
    const bool right = kWhole || x + 1 < end, below = kWhole || rows == 2;
    Vec a = load_some(p, channels), b = right ? load_some(p + in.column, channels) : Vec{};
    Vec c = below ? load_some(q, channels) : Vec{}, d = right && below ? load_some(q + in.column, channels) : Vec{};
    butterfly(a, b, c, d);
    store(bands, finish(a)), store(bands + band, finish(b));
    store(bands + 2 * band, finish(c)), store(bands + 3 * band, finish(d));
  }
}
template <bool kWhole, class T, class F>
INLINE void inverse_blocks(const Pixels<T>& out, const float* bands, int64_t band, int64_t rows, int64_t begin,
                           int64_t end, F finish) {
  const int64_t channels = kWhole ? kLanes : out.channels;
  T *p = out.data + begin * out.column, *q = p + out.row;
  bands += begin / 2 * kLanes;
  for (int64_t x = begin; x < end; x += 2, p += 2 * out.column, q += 2 * out.column, bands += kLanes) {
    const bool right = kWhole || x + 1 < end, below = kWhole || rows == 2;
    Vec a = load(bands), b = load(bands + band), c = load(bands + 2 * band), d = load(bands + 3 * band);
    butterfly(a, b, c, d);
    store_some(p, finish(a, 0, x, channels), channels);
    if (right) store_some(p + out.column, finish(b, 0, x + 1, channels), channels);
    if (below) store_some(q, finish(c, 1, x, channels), channels);
    if (right && below) store_some(q + out.column, finish(d, 1, x + 1, channels), channels);
  }
}
template <class T>
INLINE int64_t whole_blocks(const Pixels<T>& pixels, int64_t rows, int64_t columns) {
  return rows == 2 && pixels.channels == kLanes ? columns / 2 * 2 : 0;
}

// One or two rows of pixels to a row of each band; pixels beyond the image are zero. finish(value) may still change it.
template <class T, class F>
INLINE void forward_row(float* bands, int64_t band, const Pixels<T>& in, int64_t rows, int64_t columns, F finish) {
  const int64_t whole = whole_blocks(in, rows, columns);
  forward_blocks<true>(bands, band, in, rows, 0, whole, finish);
  forward_blocks<false>(bands, band, in, rows, whole, columns, finish);
}
// The inverse; finish(value, y, x, channels) may still change a pixel.
template <class T, class F>
INLINE void inverse_row(const Pixels<T>& out, const float* bands, int64_t band, int64_t rows, int64_t columns,
                        F finish) {
  const int64_t whole = whole_blocks(out, rows, columns);
  inverse_blocks<true>(out, bands, band, rows, 0, whole, finish);
  inverse_blocks<false>(out, bands, band, rows, whole, columns, finish);
}

// What an item of haar_dwt2d and haar_idwt2d is: up to kLanes channels of an image, and rows of their bands.
struct HaarItem {
  int64_t image, channel, channels, top, bottom;
};
static inline HaarItem haar_item(const HaarParams& p, int64_t item) {
  const int64_t height = half(p.height), strips = (height + kHaarStrip - 1) / kHaarStrip;
  const int64_t blocks = (p.channels + kLanes - 1) / kLanes;
  const int64_t top = item % strips * kHaarStrip, channel = item / strips % blocks * kLanes;
  return {item / strips / blocks, channel, smaller(kLanes, p.channels - channel), top,
          smaller(top + kHaarStrip, height)};
}

// Where both tensors have their columns together, a row goes straight through, its columns in the lanes.
INLINE bool by_columns(const HaarParams& p) { return p.pixels.column == 1 && p.bands.column == 1; }

// Calls f(first row of pixels, of the first band, number of rows of pixels) for each row of bands of each channel.
template <class F>
INLINE void for_rows(const HaarParams& p, const HaarItem& at, F f) {
  for (int64_t c = at.channel; c < at.channel + at.channels; ++c)
    for (int64_t y = at.top; y < at.bottom; ++y)
      f(p.pixels.at(at.image, c, 2 * y, 0), p.bands.at(at.image, c, y, 0), smaller(2, p.height - 2 * y));
}

// Otherwise the lanes are the channels, and this many positions of each band are in scratch at a time.
constexpr int64_t kHaarTile = 64;

// Pieces of at most kHaarTile positions: whole rows where they are short, else parts of one. Calls f(first pixel, first
// band element, rows of pixels, columns of pixels).
template <class F>
INLINE void for_tiles(const HaarParams& p, const HaarItem& at, F f) {
  const int64_t width = half(p.width), across = smaller(width, kHaarTile), down = kHaarTile / across;
  for (int64_t y = at.top; y < at.bottom; y += down) {
    const int64_t rows = smaller(p.height, 2 * smaller(y + down, at.bottom)) - 2 * y;
    for (int64_t x = 0; x < width; x += across)
      f(p.pixels.at(at.image, at.channel, 2 * y, 2 * x), p.bands.at(at.image, at.channel, y, x), rows,
        smaller(p.width - 2 * x, 2 * across));
  }
}

INLINE Vec halve(Vec x) { return x * 0.5f; }

}  // namespace
END_KERNELS
