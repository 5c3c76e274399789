// A block of an image in shared memory, filled and emptied in the order in which a tensor lies.
#pragma once

#include "cuda/device.h"
#include "include/cross_scan.h"

namespace mobilemamba {

constexpr int kCrossScanThreads = 256;

ANYWHERE inline int64_t cross_scan_items(const CrossScanParams& p) {
  const CrossScanBlock block(p, CrossScanBlock::kGpu);
  return p.images() * ceil_div(p.channels, block.size[0]) * ceil_div(p.height, block.size[1]) *
         ceil_div(p.width, block.size[2]);
}
// The most that a block takes, each of whose rows and channels has one place more so that columns are in other banks.
constexpr int64_t kCrossScanShared = 16 * (16 * (16 + 1) + 1);

// values[i], from registers.
template <class T>
__device__ __forceinline__ T pick(const T (&values)[3], int i) {
  return i == 0 ? values[0] : i == 1 ? values[1] : values[2];
}

struct CrossScanItem {
  int64_t batch, k;  // k: the sequence whose image it is, if they are one by one
  int64_t first[3];  // channel, row, column
  int size[3];

  __device__ CrossScanItem(const CrossScanParams& p, int64_t item) {
    const CrossScanBlock block(p, CrossScanBlock::kGpu);
    const int64_t whole[3] = {p.channels, p.height, p.width};
    for (int i = 2; i >= 0; --i) {
      const int64_t blocks = ceil_div(whole[i], block.size[i]);
      first[i] = item % blocks * block.size[i], item /= blocks;
      size[i] = static_cast<int>(whole[i] - first[i] < block.size[i] ? whole[i] - first[i] : block.size[i]);
    }
    batch = p.one_by_one ? item / 4 : item, k = p.one_by_one ? item % 4 : 0;
  }
  // Calls f(element of the map, its place in shared memory) for this thread's elements; threads that follow each other
  // have neighbours.
  template <class F>
  __device__ __forceinline__ void for_elements(const Map& map, F f) const {
    const int64_t strides[3] = {map.channel, map.row, map.column};
    const Order order(strides, size);
    const int outer = order.dim[0], middle = order.dim[1], inner = order.dim[2];
    const int rows = pick(size, middle), columns = pick(size, inner);
    const int64_t down = pick(strides, outer), along = pick(strides, middle), across = pick(strides, inner);
    const int pitches[3] = {size[1] * (size[2] + 1) + 1, size[2] + 1, 1};
    const int pitch_down = pick(pitches, outer), pitch_along = pick(pitches, middle),
              pitch_across = pick(pitches, inner);
    visit(map.at(batch, first[0], first[1], first[2]), [&](auto* p) {
#pragma unroll 2  // more take registers that are not there
      for (int i = threadIdx.x; i < size[0] * size[1] * size[2]; i += kCrossScanThreads) {
        const int x = i % columns, y = i / columns % rows, z = i / columns / rows;
        f(p[z * down + y * along + x * across], z * pitch_down + y * pitch_along + x * pitch_across);
      }
    });
  }
};

}  // namespace mobilemamba
