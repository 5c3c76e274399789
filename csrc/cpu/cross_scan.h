// Blocks of images and of the sequences that hold their pixels, gone through in the order in which one of them lies.
#pragma once

#include "cpu/vec.h"
#include "include/cross_scan.h"

BEGIN_KERNELS
namespace {

constexpr int64_t kCrossScanTile = CrossScanBlock::kSide * CrossScanBlock::kSide;  // the most elements of a block

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

// Calls f(item, first column, sizes of the block) for each block of some items.
template <class F>
INLINE void for_blocks(const CrossScanParams& p, int64_t begin, int64_t end, F f) {
  const CrossScanBlock block(p);
  const auto rest = [](int64_t size, int64_t first, int64_t most) { return size - first < most ? size - first : most; };
  for (int64_t item = begin; item < end; ++item) {
    const CrossScanItem at = cross_scan_item(p, block, item);
    CrossScanBlock here = block;
    here.size[0] = rest(p.channels, at.channel, block.size[0]), here.size[1] = rest(p.height, at.row, block.size[1]);
    for (int64_t x = 0; x < p.width; x += block.size[2]) {
      here.size[2] = rest(p.width, x, block.size[2]);
      f(at, x, here);
    }
  }
}

// Steps in a tile that lies as a map does, its backward steps turned round.
INLINE Steps tile_steps(const CrossScanBlock& block, const Map& map) {
  const Order order(steps(map).of, block.size);
  Steps tile;
  int64_t step = 1;
  for (int i = 2; i >= 0; --i) tile.of[order.dim[i]] = step, step *= block.size[order.dim[i]];
  return tile;
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

// Makes one dimension of two, wherever one follows the other in both tensors.
INLINE void join(int64_t (&size)[3], Steps& a, Steps& b) {
  for (int again = 0; again < 2; ++again)
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j)
        if (i != j && size[i] > 1 && a.of[i] == size[j] * a.of[j] && b.of[i] == size[j] * b.of[j])
          size[j] *= size[i], size[i] = 1;
}

// Writes a block, or adds it, in the order in which `to` lies. Where `from` lies in another, squares of kLanes are
// transposed in registers.
template <bool kAdd, class From, class To>
static void move_block(const CrossScanBlock& block, To* to, Steps to_steps, const From* from, Steps from_steps) {
  int64_t size[3] = {block.size[0], block.size[1], block.size[2]};
  for (int i = 0; i < 3; ++i) {
    if (to_steps.of[i] >= 0 && from_steps.of[i] >= 0) continue;
    // A sequence that goes backwards is gone through from its end, upwards in memory, as processors fetch ahead.
    to += (size[i] - 1) * to_steps.of[i], from += (size[i] - 1) * from_steps.of[i];
    to_steps.of[i] = -to_steps.of[i], from_steps.of[i] = -from_steps.of[i];
  }
  join(size, to_steps, from_steps);
  const Order order(to_steps.of, size);
  const int inner = order.dim[2], other = Order(from_steps.of, size).dim[2];
  const int middle = other == inner ? order.dim[1] : other, outer = 3 - inner - middle;
  const int64_t across = size[inner], along = size[middle];
  const int64_t to_across = to_steps.of[inner], to_along = to_steps.of[middle];
  const int64_t from_across = from_steps.of[inner], from_along = from_steps.of[middle];
  for (int64_t z = 0; z < size[outer]; ++z, to += to_steps.of[outer], from += from_steps.of[outer]) {
    if (other == inner) {
      for (int64_t y = 0; y < along; ++y)
        for (int64_t x = 0; x < across; x += kLanes) {
          const int64_t count = across - x < kLanes ? across - x : kLanes;
          put_run<kAdd>(to + y * to_along + x * to_across, to_across,
                        load_run(from + y * from_along + x * from_across, from_across, count), count);
        }
      continue;
    }
    for (int64_t y = 0; y < along; y += kLanes)
      for (int64_t x = 0; x < across; x += kLanes) {
        To* const first = to + y * to_along + x * to_across;
        const From* const square = from + y * from_along + x * from_across;
        if (y + kLanes <= along && x + kLanes <= across) {
          Vec rows[kLanes];
          for (int64_t i = 0; i < kLanes; ++i) rows[i] = load_run(square + i * from_across, from_along, kLanes);
          transpose(rows);
          for (int64_t i = 0; i < kLanes; ++i) put_run<kAdd>(first + i * to_along, to_across, rows[i], kLanes);
          continue;
        }
        for (int64_t i = 0; i < kLanes && y + i < along; ++i)
          for (int64_t j = 0; j < kLanes && x + j < across; ++j) {
            To* const place = first + i * to_along + j * to_across;
            const float value = load_one(square + i * from_along + j * from_across);
            store_one(place, kAdd ? load_one(place) + value : value);
          }
      }
  }
}

}  // namespace
END_KERNELS
