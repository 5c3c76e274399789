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

template <int... kLane>
INLINE Vec reversed(Vec v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLanes - 1 - kLane)...);
}
INLINE Vec reversed(Vec v) { return reversed(v, std::make_integer_sequence<int, kLanes>{}); }

// Up to kLanes elements, of any step; vectors where it is 1 or -1.
template <class T>
INLINE Vec load_run(const T* from, int64_t step, int64_t count) {
  if (step == 1) return load_some(from, count);
  if (step == -1 && count == kLanes) return reversed(load(from - (kLanes - 1)));
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = load_one(from + i * step);
  return load(lanes);
}
template <class T>
INLINE void store_run(T* to, int64_t step, Vec v, int64_t count) {
  if (step == 1) return store_some(to, v, count);
  if (step == -1 && count == kLanes) return store(to - (kLanes - 1), reversed(v));
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) store_one(to + i * step, lanes[i]);
}
template <bool kAdd, class T>
INLINE void put_run(T* to, int64_t step, Vec v, int64_t count) {
  store_run(to, step, kAdd ? load_run(to, step, count) + v : v, count);
}

// Writes a block, or adds it, in the order in which `to` lies. Where `from` lies in another, squares of kLanes are
// transposed in registers.
template <bool kAdd, class From, class To>
static void move_block(const CrossScanBlock& block, To* to, const Steps& to_steps, const From* from,
                       const Steps& from_steps) {
  const auto part = [](int64_t size, int64_t i) { return size - i < kLanes ? size - i : kLanes; };
  const Order order(to_steps.of);
  const int inner = order.dim[2], other = Order(from_steps.of).dim[2];
  const int middle = other == inner ? order.dim[1] : other, outer = 3 - inner - middle;
  const int64_t across = block.size[inner], along = block.size[middle];
  const int64_t to_across = to_steps.of[inner], to_along = to_steps.of[middle];
  const int64_t from_across = from_steps.of[inner], from_along = from_steps.of[middle];
  for (int64_t z = 0; z < block.size[outer]; ++z, to += to_steps.of[outer], from += from_steps.of[outer]) {
    if (other == inner) {
      for (int64_t y = 0; y < along; ++y)
        for (int64_t x = 0; x < across; x += kLanes)
          put_run<kAdd>(to + y * to_along + x * to_across, to_across,
                        load_run(from + y * from_along + x * from_across, from_across, part(across, x)),
                        part(across, x));
      continue;
    }
    for (int64_t y = 0; y < along; y += kLanes)
      for (int64_t x = 0; x < across; x += kLanes) {
        const int64_t rows = part(along, y), columns = part(across, x);
        Vec square[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          square[i] = i < columns ? load_run(from + y * from_along + (x + i) * from_across, from_along, rows) : Vec{};
        transpose(square);
        for (int64_t i = 0; i < rows; ++i)
          put_run<kAdd>(to + (y + i) * to_along + x * to_across, to_across, square[i], columns);
      }
  }
}

}  // namespace
END_KERNELS
