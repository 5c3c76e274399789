// Bands to pixels, and the gradient of the transform: haar_dwt2d_kernel.cpp the other way round.
#include "cpu/haar.h"
#include "include/haar_idwt2d.h"

BEGIN_KERNELS
namespace {

template <int kFirst, int... kLane>
INLINE Vec alternate(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, kFirst + kLane / 2 + kLane % 2 * kLanes...);
}

template <class From, class To>
static void transform_row(const From* bands, int64_t band, To* p, To* q, int64_t columns) {
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
  for (int64_t x = 0; x < columns; x += 2 * kLanes, bands += kLanes) {
    const int64_t left = smaller(kLanes, columns - x), right = larger(0, smaller(kLanes, columns - x - kLanes));
    const int64_t count = half(left + right);
    Vec a = load_some(bands, count), b = load_some(bands + band, count);
    Vec c = load_some(bands + 2 * band, count), d = load_some(bands + 3 * band, count);
    butterfly(a, b, c, d);
    const auto write = [&](To* row, Vec first, Vec second) {
      if (!row) return;
      store_some(row + x, halve(alternate<0>(first, second, lanes)), left);
      if (right) store_some(row + x + kLanes, halve(alternate<kLanes / 2>(first, second, lanes)), right);
    };
    write(p, a, b), write(q, c, d);
  }
}

}  // namespace

void haar_idwt2d(const HaarParams& p, int64_t begin, int64_t end) {
  alignas(64) float tile[4 * kHaarTile * kLanes], bands[4 * kHaarTile * kLanes];
  for (int64_t i = begin; i < end; ++i) {
    const HaarItem at = haar_item(p, i);
    if (by_columns(p)) {
      for_rows(p, at, [&](Elements out, Elements in, int64_t rows) {
        with_type(in, [&](const auto* from) {
          with_type(out, [&](auto* to) {
            transform_row(from, p.band, to, rows == 2 ? to + p.pixels.row : nullptr, p.width);
          });
        });
      });
      continue;
    }
    for_tiles(p, at, [&](Elements to, Elements from, int64_t rows, int64_t columns) {
      for (int b = 0; b < 4; ++b)
        load_pixels(bands + b * kHaarTile * kLanes, from + b * p.band, p.bands, at.channels, half(rows), half(columns));
      with_output(tile, to, p.pixels, at.channels, rows, columns, [&](auto out) ALWAYS_INLINE {
        for (int64_t y = 0; y < rows; y += 2, out.data += 2 * out.row)
          inverse_row(out, bands + y / 2 * half(columns) * kLanes, kHaarTile * kLanes, smaller(2, rows - y), columns,
                      [](Vec value, int64_t, int64_t, int64_t) { return halve(value); });
      });
    });
  }
}

END_KERNELS
