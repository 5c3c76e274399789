// Sequences to images: a block's sums are in float32, laid out as the image is.
#include "cpu/cross_scan.h"
#include "include/cross_merge.h"

BEGIN_KERNELS

void cross_merge(const CrossScanParams& p, int64_t begin, int64_t end) {
  alignas(64) float sums[CrossScanBlock::kMost];
  const CrossScanBlock block(p);
  for (int64_t item = begin; item < end; ++item) {
    const CrossScanItem at = cross_scan_item(p, block, item);
    for_blocks(p, block, at, [&](int64_t x, const CrossScanBlock& here) {
      const Map image = p.image_of(at.k);
      const Order order(steps(image).of);
      const int64_t across = here.size[order.dim[2]];
      Steps sum_steps;
      sum_steps.of[order.dim[2]] = 1, sum_steps.of[order.dim[1]] = across;
      sum_steps.of[order.dim[0]] = here.size[order.dim[1]] * across;
      for (int64_t k = at.k; k < (p.one_by_one ? at.k + 1 : 4); ++k) {
        const Map sequence = p.map_of(k);
        with_type(sequence.at(at.batch, at.channel, at.row, x), [&](const auto* from) {
          k == at.k ? move_block<false>(here, sums, sum_steps, from, steps(sequence))
                    : move_block<true>(here, sums, sum_steps, from, steps(sequence));
        });
      }
      with_type(image.at(at.batch, at.channel, at.row, x),
                [&](auto* to) { move_block<false>(here, to, steps(image), sums, sum_steps); });
    });
  }
}

END_KERNELS
