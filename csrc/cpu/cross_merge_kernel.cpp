// Sequences to images: a block's sums are in float32, laid out as the image is.
#include "cpu/cross_scan.h"
#include "include/cross_merge.h"

BEGIN_KERNELS
namespace {

template <bool kFirst, class T>
INLINE void add_run(float* sums, int64_t step, const T* from, int64_t from_step, int64_t count) {
  int64_t i = 0;
  if (step == 1 && (from_step == 1 || from_step == -1)) {
    for (; i + kLanes <= count; i += kLanes) {
      const Vec v = from_step == 1 ? load(from + i) : reversed(load(from - i - (kLanes - 1)));
      store(sums + i, kFirst ? v : load(sums + i) + v);
    }
  }
  for (; i < count; ++i) {
    const float v = load_one(from + i * from_step);
    sums[i * step] = kFirst ? v : sums[i * step] + v;
  }
}

template <class T>
INLINE void store_run(T* to, int64_t step, const float* sums, int64_t count) {
  int64_t i = 0;
  if (step == 1)
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(sums + i));
  for (; i < count; ++i) store_one(to + i * step, sums[i]);
}

}  // namespace

void cross_merge(const CrossScanParams& p, int64_t begin, int64_t end) {
  alignas(64) float sums[CrossScanBlock::kMost];
  const CrossScanBlock block(p);
  for (int64_t item = begin; item < end; ++item) {
    const CrossScanItem at = cross_scan_item(p, block, item);
    for_blocks(p, block, at, [&](int64_t x, const CrossScanBlock& here) {
      const Map image = p.image_of(at.k);
      const Elements to = image.at(at.batch, at.channel, at.row, x);
      if (p.one_by_one) {
        const Map sequence = p.map_of(at.k);
        return copy_block(here, image, to, sequence, sequence.at(at.batch, at.channel, at.row, x));
      }
      const Steps image_steps = steps(image);
      const Order order(image_steps.of);
      Steps sum_steps;
      sum_steps.of[order.dim[2]] = 1, sum_steps.of[order.dim[1]] = here.size[order.dim[2]];
      sum_steps.of[order.dim[0]] = here.size[order.dim[1]] * here.size[order.dim[2]];
      for (int64_t k = 0; k < 4; ++k) {
        const Map sequence = p.map_of(k);
        const Steps sequence_steps = steps(sequence);
        with_type(sequence.at(at.batch, at.channel, at.row, x), [&](const auto* from) {
          const auto add = [&](auto first) {
            for_runs(here, Order(sequence_steps.of), sum_steps, sequence_steps,
                     [&](int64_t sum, int64_t offset, int64_t step, int64_t from_step, int64_t count)
                         ALWAYS_INLINE { add_run<first.value>(sums + sum, step, from + offset, from_step, count); });
          };
          if (k == 0)
            add(std::true_type{});
          else
            add(std::false_type{});
        });
      }
      with_type(to, [&](auto* p_to) {
        for_runs(here, order, sum_steps, image_steps,
                 [&](int64_t sum, int64_t offset, int64_t, int64_t step, int64_t count)
                     ALWAYS_INLINE { store_run(p_to + offset, step, sums + sum, count); });
      });
    });
  }
}

END_KERNELS
