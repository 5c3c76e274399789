// Sequences to images. Those that go forwards and backwards through the same pixels are added up, in float32, where
// they lie side by side; then columns are transposed once.
#include "cpu/cross_scan.h"
#include "include/cross_merge.h"

BEGIN_KERNELS

void cross_merge(const CrossScanParams& p, int64_t begin, int64_t end) {
  alignas(64) float sums[2][kCrossScanTile];
  for_blocks(p, begin, end, [&](const CrossScanItem& at, int64_t x, const CrossScanBlock& here) {
    const Map image = p.image_of(at.k);
    with_type(image.at(at.batch, at.channel, at.row, x), [&](auto* to) {
      const auto elements_of = [&](const Map& sequence) {
        return static_cast<decltype(to)>(sequence.at(at.batch, at.channel, at.row, x).data);  // of the image's type
      };
      if (p.one_by_one) {
        const Map sequence = p.map_of(at.k);
        return move_block<false>(here, to, steps(image), elements_of(sequence), steps(sequence));
      }
      const bool cross = p.scans == Scans::kCross;
      const Steps tiles[2] = {tile_steps(here, p.map_of(0)), tile_steps(here, p.map_of(1))};
      for (int64_t k = 0; k < 4; ++k) {
        const int64_t which = cross ? k % 2 : 0;
        const Map sequence = p.map_of(k);
        k == which ? move_block<false>(here, sums[which], tiles[which], elements_of(sequence), steps(sequence))
                   : move_block<true>(here, sums[which], tiles[which], elements_of(sequence), steps(sequence));
      }
      if (cross) move_block<true>(here, sums[0], tiles[0], sums[1], tiles[1]);
      move_block<false>(here, to, steps(image), sums[0], tiles[0]);
    });
  });
}

END_KERNELS
