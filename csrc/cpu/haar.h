// Rows of the Haar transform: lanes are channels, a 2×2 block of pixels is four vectors, and so are its four bands.
//
// The transform's matrix is symmetric and its own inverse, so one butterfly serves both directions and both gradients.
// Here it is not normalized: each direction doubles, which the callers take back where it costs nothing.
#pragma once

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

// One or two rows of pixels whose channels lie together: in the tensor itself, or in a tile.
struct Pixels {
  Elements elements;
  int64_t row, column, channels;
};

INLINE bool in_place(const Map& map) { return map.channel == 1; }
INLINE Pixels tile_pixels(float* tile, int64_t columns) {
  return {{tile, DType::kFloat32}, columns * kLanes, kLanes, kLanes};
}

// Calls f(tile, first element, positions) for each stretch of pixels that are evenly spaced.
template <class F>
INLINE void for_stretches(float* tile, const Map& map, int64_t rows, int64_t columns, F f) {
  if (map.row == columns * map.column) return f(tile, map.elements, rows * columns);
  for (int64_t y = 0; y < rows; ++y) f(tile + y * columns * kLanes, map.elements + y * map.row, columns);
}

// map: its elements begin with the first wanted.
static inline Pixels read_pixels(float* tile, const Map& map, int64_t channels, int64_t rows, int64_t columns) {
  if (in_place(map)) return {map.elements, map.row, map.column, channels};
  for_stretches(tile, map, rows, columns, [&](float* to, Elements from, int64_t positions) {
    load_tile(to, from, map.channel, map.column, channels, positions);
  });
  return tile_pixels(tile, columns);
}
static inline void write_pixels(float* tile, const Map& map, int64_t channels, int64_t rows, int64_t columns) {
  for_stretches(tile, map, rows, columns, [&](float* from, Elements to, int64_t positions) {
    store_tile(from, to, map.channel, map.column, channels, positions);
  });
}

// One or two rows of pixels to a row of each band; pixels beyond the image are zero. finish(value) may still change it.
template <class F>
INLINE void forward_row(float* bands, int64_t band, const Pixels& pixels, int64_t rows, int64_t columns, F finish) {
  with_type(pixels.elements, [&](const auto* p) {
    const auto* q = p + pixels.row;
    const auto read = [&](const auto* row, int64_t x) { return load_some(row + x * pixels.column, pixels.channels); };
    for (int64_t x = 0; x < columns; x += 2, bands += kLanes) {
      const bool right = x + 1 < columns, below = rows == 2;
      Vec a = read(p, x), b = right ? read(p, x + 1) : Vec{};
      Vec c = below ? read(q, x) : Vec{}, d = right && below ? read(q, x + 1) : Vec{};
      butterfly(a, b, c, d);
      store(bands, finish(a)), store(bands + band, finish(b));
      store(bands + 2 * band, finish(c)), store(bands + 3 * band, finish(d));
    }
  });
}

// The inverse; finish(value, y, x) may still change a pixel.
template <class F>
INLINE void inverse_row(const Pixels& pixels, const float* bands, int64_t band, int64_t rows, int64_t columns,
                        F finish) {
  with_type(pixels.elements, [&](auto* p) {
    auto* q = p + pixels.row;
    for (int64_t x = 0; x < columns; x += 2, bands += kLanes) {
      Vec a = load(bands), b = load(bands + band), c = load(bands + 2 * band), d = load(bands + 3 * band);
      butterfly(a, b, c, d);
      const auto write = [&](auto* row, int64_t column, Vec value, int64_t y) {
        store_some(row + column * pixels.column, finish(value, y, column), pixels.channels);
      };
      write(p, x, a, 0);
      if (x + 1 < columns) write(p, x + 1, b, 0);
      if (rows < 2) continue;
      write(q, x, c, 1);
      if (x + 1 < columns) write(q, x + 1, d, 1);
    }
  });
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

// Pieces of at most kHaarTile positions: whole rows where they are short, else parts of one. Calls f(pixels, bands,
// rows of pixels, columns of pixels) with maps whose elements begin with the piece's first.
template <class F>
INLINE void for_tiles(const HaarParams& p, const HaarItem& at, F f) {
  const int64_t width = half(p.width), across = smaller(width, kHaarTile), down = kHaarTile / across;
  for (int64_t y = at.top; y < at.bottom; y += down) {
    const int64_t rows = smaller(p.height, 2 * smaller(y + down, at.bottom)) - 2 * y;
    for (int64_t x = 0; x < width; x += across) {
      Map pixels = p.pixels, bands = p.bands;
      pixels.elements = pixels.at(at.image, at.channel, 2 * y, 2 * x);
      bands.elements = bands.at(at.image, at.channel, y, x);
      f(pixels, bands, rows, smaller(p.width - 2 * x, 2 * across));
    }
  }
}

INLINE Vec halve(Vec x) { return x * 0.5f; }

}  // namespace
END_KERNELS
