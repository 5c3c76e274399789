// Images to sequences: each block is read once from memory and written four times.
#include "cpu/cross_scan.h"

BEGIN_KERNELS

void cross_scan(const CrossScanParams& p, int64_t begin, int64_t end) {
  const CrossScanBlock block(p);
  for (int64_t item = begin; item < end; ++item) {
    const CrossScanItem at = cross_scan_item(p, block, item);
    for_blocks(p, block, at, [&](int64_t x, const CrossScanBlock& here) {
      for (int64_t k = at.k; k < (p.one_by_one ? at.k + 1 : 4); ++k) {
        const Map image = p.image_of(k), sequence = p.map_of(k);
        with_type(image.at(at.batch, at.channel, at.row, x), [&](const auto* from) {
          void* to = sequence.at(at.batch, at.channel, at.row, x).data;
          move_block<false>(here, static_cast<std::remove_const_t<std::remove_pointer_t<decltype(from)>>*>(to),
                            steps(sequence), from, steps(image));
        });
      }
    });
  }
}

END_KERNELS
