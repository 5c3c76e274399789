// Images to sequences: a block is read once from memory, transposed once, and written four times.
#include "cpu/cross_scan.h"

BEGIN_KERNELS

void cross_scan(const CrossScanParams& p, int64_t begin, int64_t end) {
  alignas(64) float columns[kCrossScanTile];
  for_blocks(p, begin, end, [&](const CrossScanItem& at, int64_t x, const CrossScanBlock& here) {
    for (int64_t k = at.k; k < (p.one_by_one ? at.k + 1 : 4); ++k) {
      const Map image = p.image_of(k), sequence = p.map_of(k);
      with_type(image.at(at.batch, at.channel, at.row, x), [&](const auto* from) {
        using Type = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
        const auto to = static_cast<Type*>(sequence.at(at.batch, at.channel, at.row, x).data);
        if (p.scans != Scans::kCross || p.one_by_one || k % 2 == 0)
          return move_block<false>(here, to, steps(sequence), from, steps(image));
        const Steps tile = tile_steps(here, sequence);
        if (k == 1) move_block<false>(here, columns, tile, from, steps(image));
        move_block<false>(here, to, steps(sequence), columns, tile);
      });
    }
  });
}

END_KERNELS
