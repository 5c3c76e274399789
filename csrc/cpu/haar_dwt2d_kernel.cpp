// Pixels to bands, and the gradient of the inverse: a copy with a butterfly in the middle, each element read and
// written once. Channels-first rows are split into even and odd columns in registers; any other layout has channels in
// the lanes and is transposed, in cache, on the side that does not.
#include "cpu/haar.h"
#include "include/haar_dwt2d.h"

BEGIN_KERNELS
namespace {

template <int... kLane>
INLINE Vec even(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, 2 * kLane...);
}
template <int... kLane>
INLINE Vec odd(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, 2 * kLane + 1 ...);
}

template <class From, class To>
static void transform_row(const From* p, const From* q, To* bands, int64_t band, int64_t columns) {
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
  for (int64_t x = 0; x < columns; x += 2 * kLanes, bands += kLanes) {
    const int64_t left = smaller(kLanes, columns - x), right = larger(0, smaller(kLanes, columns - x - kLanes));
    const int64_t count = half(left + right);
    const auto read = [&](const From* row, Vec& first, Vec& second) {
      const Vec l = row ? load_some(row + x, left) : Vec{},
                r = row && right ? load_some(row + x + kLanes, right) : Vec{};
      first = even(l, r, lanes), second = odd(l, r, lanes);
    };
    Vec a, b, c, d;
    read(p, a, b), read(q, c, d);
    butterfly(a, b, c, d);
    store_some(bands, halve(a), count), store_some(bands + band, halve(b), count);
    store_some(bands + 2 * band, halve(c), count), store_some(bands + 3 * band, halve(d), count);
  }
}

}  // namespace

void haar_dwt2d(const HaarParams& p, int64_t begin, int64_t end) {
  alignas(64) float tile[4 * kHaarTile * kLanes], bands[4 * kHaarTile * kLanes];
  for (int64_t i = begin; i < end; ++i) {
    const HaarItem at = haar_item(p, i);
    if (by_columns(p)) {
      for_rows(p, at, [&](Elements pixels, Elements out, int64_t rows) {
        with_type(pixels, [&](const auto* from) {
          with_type(out, [&](auto* to) {
            transform_row(from, rows == 2 ? from + p.pixels.row : nullptr, to, p.band, p.width);
          });
        });
      });
      continue;
    }
    for_tiles(p, at, [&](Elements from, Elements to, int64_t rows, int64_t columns) {
      with_input(tile, from, p.pixels, at.channels, rows, columns, [&](auto in) ALWAYS_INLINE {
        for (int64_t y = 0; y < rows; y += 2, in.data += 2 * in.row)
          forward_row(bands + y / 2 * half(columns) * kLanes, kHaarTile * kLanes, in, smaller(2, rows - y), columns,
                      halve);
      });
      for (int b = 0; b < 4; ++b)
        store_pixels(bands + b * kHaarTile * kLanes, to + b * p.band, p.bands, at.channels, half(rows), half(columns));
    });
  }
}

END_KERNELS
