// Blocks of images and of the sequences that hold their pixels, gone through in the order in which one of them lies.
#pragma once

#include "cpu/vec.h"
#include "include/cross_scan.h"

BEGIN_KERNELS
namespace {

// Of channel, row and column.
struct Steps {
  int64_t of[3];
};
INLINE Steps steps(const Map& map) { return {{map.channel, map.row, map.column}}; }

// Some channels and rows of an image, a few columns at a time.
struct CrossScanItem {
  int64_t batch, k, channel, row;  // k: the sequence whose image it is, if they are one by one
};
INLINE CrossScanItem cross_scan_item(const CrossScanParams& p, const CrossScanBlock& block, int64_t item) {
  const int64_t down = (p.height + block.size[1] - 1) / block.size[1];
  const int64_t across = (p.channels + block.size[0] - 1) / block.size[0];
  const int64_t image = item / down / across;
  return {p.one_by_one ? image / 4 : image, p.one_by_one ? image % 4 : 0, item / down % across * block.size[0],
          item % down * block.size[1]};
}

// Calls f(first column, sizes of the block) for each block of an item.
template <class F>
INLINE void for_blocks(const CrossScanParams& p, const CrossScanBlock& block, const CrossScanItem& at, F f) {
  CrossScanBlock here = block;
  const auto rest = [](int64_t size, int64_t first, int64_t most) { return size - first < most ? size - first : most; };
  here.size[0] = rest(p.channels, at.channel, block.size[0]), here.size[1] = rest(p.height, at.row, block.size[1]);
  for (int64_t x = 0; x < p.width; x += block.size[2]) {
    here.size[2] = rest(p.width, x, block.size[2]);
    f(x, here);
  }
}

// Calls f(offset, offset, step, step, elements) for each run of a block, in two tensors with these steps; neighbours in
// the one that `order` is of follow each other.
template <class F>
INLINE void for_runs(const CrossScanBlock& block, const Order& order, const Steps& a, const Steps& b, F f) {
  const int outer = order.dim[0], middle = order.dim[1], inner = order.dim[2];
  for (int64_t i = 0; i < block.size[outer]; ++i)
    for (int64_t j = 0; j < block.size[middle]; ++j)
      f(i * a.of[outer] + j * a.of[middle], i * b.of[outer] + j * b.of[middle], a.of[inner], b.of[inner],
        block.size[inner]);
}

template <class T, int... kLane>
INLINE T reversed(T v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLanes - 1 - kLane)...);
}
template <class T>
INLINE T reversed(T v) {
  return reversed(v, std::make_integer_sequence<int, kLanes>{});
}

// Copies elements, as the bits that they are.
template <class Bits>
INLINE void copy_run(Bits* to, int64_t to_step, const Bits* from, int64_t from_step, int64_t count) {
  typedef Bits Lanes __attribute__((vector_size(kLanes * sizeof(Bits))));
  int64_t i = 0;
  if (from_step == 1 && (to_step == 1 || to_step == -1)) {
    for (; i + kLanes <= count; i += kLanes) {
      Lanes v;
      std::memcpy(&v, from + i, sizeof v);
      if (to_step == -1) v = reversed(v);
      std::memcpy(to_step == 1 ? to + i : to - i - (kLanes - 1), &v, sizeof v);
    }
  }
  for (; i < count; ++i) to[i * to_step] = from[i * from_step];
}

// Copies a block; the elements of both have the same type.
static void copy_block(const CrossScanBlock& block, const Map& to_map, Elements to, const Map& from_map,
                       Elements from) {
  const Steps to_steps = steps(to_map), from_steps = steps(from_map);
  const auto copy = [&](auto* t, const auto* f) {
    for_runs(block, Order(to_steps.of), to_steps, from_steps,
             [&](int64_t to_offset, int64_t from_offset, int64_t to_step, int64_t from_step, int64_t count)
                 ALWAYS_INLINE { copy_run(t + to_offset, to_step, f + from_offset, from_step, count); });
  };
  if (to.dtype == DType::kFloat32)
    copy(static_cast<uint32_t*>(to.data), static_cast<const uint32_t*>(from.data));
  else
    copy(static_cast<uint16_t*>(to.data), static_cast<const uint16_t*>(from.data));
}

}  // namespace
END_KERNELS
