// Squeeze-and-excitation: the means of the maps, and their scaling. Lanes are channels.
#include "cpu/tile.h"
#include "include/capability.h"
#include "include/squeeze_excite.h"

DECLARE_KERNEL(squeeze, SqueezeExciteParams)
DECLARE_KERNEL(excite, SqueezeExciteParams)

BEGIN_KERNELS
namespace {

// Calls f(image, channel, channels) for every item.
template <class F>
INLINE void each_block(const SqueezeExciteParams& p, int64_t begin, int64_t end, F f) {
  const int64_t blocks = (p.channels + kLanes - 1) / kLanes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t channel = item % blocks * kLanes, left = p.channels - channel;
    f(item / blocks, channel, left < kLanes ? left : kLanes);
  }
}
// Calls f(row, column, columns) for the parts of a map that fit a tile; rows that follow each other are one.
template <class F>
INLINE void each_part(const SqueezeExciteParams& p, F f) {
  const bool join = p.x.row == p.width * p.x.column && p.y.row == p.width * p.y.column;
  const int64_t rows = join ? 1 : p.height, width = join ? p.height * p.width : p.width;
  for (int64_t y = 0; y < rows; ++y)
    for (int64_t x = 0; x < width; x += kSqueezeTile) f(y, x, width - x < kSqueezeTile ? width - x : kSqueezeTile);
}

}  // namespace

void squeeze(const SqueezeExciteParams& p, int64_t begin, int64_t end) {
  const float positions = static_cast<float>(p.height * p.width);
  each_block(p, begin, end, [&](int64_t image, int64_t channel, int64_t channels) {
    Vec total{};
    each_part(p, [&](int64_t y, int64_t x, int64_t count) {  // sums of parts first: their rounding errors stay small
      const Rows rows = load_rows(p.scratch, p.x.at(image, channel, y, x), p.x.channel, p.x.column, channels, count);
      Vec sum{};
      for (int64_t i = 0; i < count; ++i) sum += rows.get(i);
      total += sum;
    });
    store_some(p.means + image * p.channels + channel, total / positions, channels);
  });
}

void excite(const SqueezeExciteParams& p, int64_t begin, int64_t end) {
  each_block(p, begin, end, [&](int64_t image, int64_t channel, int64_t channels) {
    const Vec weight = sigmoid(load_some(p.weights + image * p.channels + channel, channels));
    each_part(p, [&](int64_t y, int64_t x, int64_t count) {
      const Elements from = p.x.at(image, channel, y, x), to = p.y.at(image, channel, y, x);
      if (needs_no_tile(from, p.x.channel, channels) && needs_no_tile(to, p.y.channel, channels)) {
        const Rows in = in_place(from, p.x.column), out = in_place(to, p.y.column);
        for (int64_t i = 0; i < count; ++i) out.set(i, in.get(i) * weight);
        return;
      }
      load_tile(p.scratch, from, p.x.channel, p.x.column, channels, count);
      for (int64_t i = 0; i < count * kLanes; i += kLanes) store(p.scratch + i, load(p.scratch + i) * weight);
      store_tile(p.scratch, to, p.y.channel, p.y.column, channels, count);
    });
  });
}

END_KERNELS
