// Positions of maps on their way into matrix products and out of them.
#pragma once

#include "cpu/activation.h"
#include "cpu/tile.h"
#include "include/products.h"

BEGIN_KERNELS

void multiply(const Slab& slab, int64_t begin, int64_t end);  // panels, in products_kernel.cpp

namespace {

// Calls f(first, count) for the stretches of positions that are evenly spaced in the map.
template <class F>
INLINE void each_stretch(const Product& p, const Map& m, int64_t first, int64_t count, F f) {
  const bool rows_join = m.row == p.width * m.column, all_join = positions_join(p, m);
  const int64_t stretch = all_join ? INT64_MAX : rows_join ? p.height * p.width : p.width;
  for (int64_t at = first, end = first + count; at < end;) {
    const int64_t left = stretch - at % stretch, some = left < end - at ? left : end - at;
    f(at, some);
    at += some;
  }
}
INLINE Elements at_position(const Product& p, const Map& m, int64_t position, int64_t channel) {
  return m.at(position / p.width / p.height, channel, position / p.width % p.height, position % p.width);
}

// x of `count` positions as the product reads it: where it lies, or from `memory`.
struct Input {
  const void* data;
  int64_t step;
};

// The type of numbers in `memory` is T, a row of them `step` long.
template <class T>
static void read_map(const Product& p, const ProductInput& x, int64_t first, int64_t count, T* memory, int64_t step,
                     float* tile) {
  const int64_t depth = x.channels;
  const Map& map = x.map;
  with_activation(p.input_activation, [&](auto act) {
    if (map.channel == 1) {
      with_type(map.elements, [&](auto* typed) {
        each_stretch(p, map, first, count, [&](int64_t at, int64_t some) {
          const auto* from = static_cast<decltype(typed)>(at_position(p, map, at, 0).data);
          T* to = memory + (at - first) * step;
          for (int64_t i = 0; i < some; ++i, from += map.column, to += step) {
            int64_t c = 0;
            for (; c + kLanes <= depth; c += kLanes) store(to + c, act(load(from + c)));
            if (c < depth) store_some(to + c, act(load_some(from + c, depth - c)), depth - c);
          }
        });
      });
    } else {
      for (int64_t c = 0; c < depth; c += kLanes) {
        const int64_t channels = depth - c < kLanes ? depth - c : kLanes;
        each_stretch(p, map, first, count, [&](int64_t at, int64_t some) {
          for (int64_t l = 0; l < some; l += kProductTile) {
            const int64_t positions = some - l < kProductTile ? some - l : kProductTile;
            load_tile(tile, at_position(p, map, at + l, c), map.channel, map.column, channels, positions);
            T* to = memory + (at + l - first) * step + c;
            for (int64_t i = 0; i < positions; ++i) store_some(to + i * step, act(load(tile + i * kLanes)), channels);
          }
        });
      }
    }
  });
}
template <class T>
static void read_maps(const Product& p, int64_t first, int64_t count, T* memory, int64_t step, float* tile) {
  int64_t channel = 0;
  for (const ProductInput& x : p.x) {
    if (x.channels) read_map(p, x, first, count, memory + channel, step, tile);
    channel += x.channels;
  }
  if (step > channel)
    for (int64_t i = 0; i < count; ++i) memory[i * step + channel] = T{};
}

// tile: kProductTile positions.
[[maybe_unused]] static Input read_input(const Product& p, int64_t first, int64_t count, float* memory, float* tile) {
  if (reads_in_place(p)) return {at_position(p, p.x[0].map, first, 0).data, p.x[0].map.column};
  const int64_t step = packed_depth(p.weight.depth, p.weight.bfloat16);
  if (p.weight.bfloat16)
    read_maps(p, first, count, reinterpret_cast<BFloat16*>(memory), step, tile);
  else
    read_maps(p, first, count, memory, step, tile);
  return {memory, step};
}

// Sums of `count` positions and a panel's outputs from `output` on become y.
static void write_sums(const Product& p, const float* sums, int64_t sums_step, int64_t output, int64_t outputs,
                       int64_t first, int64_t count, float* tile) {
  float* added = tile + kProductTile * kLanes;
  const auto add = [&](const Map& m, int64_t at, int64_t channel, int64_t channels, int64_t positions) {
    if (!m) return;
    load_tile(added, at_position(p, m, at, channel), m.channel, m.column, channels, positions);
    for (int64_t i = 0; i < positions * kLanes; i += kLanes) store(tile + i, load(tile + i) + load(added + i));
  };
  // The stretches of y, in which those of what is added may end sooner.
  each_stretch(p, p.y, first, count, [&](int64_t outer, int64_t length) {
    each_stretch(p, p.residual ? p.residual : p.y, outer, length, [&](int64_t inner, int64_t least) {
      each_stretch(p, p.more ? p.more : p.y, inner, least, [&](int64_t at, int64_t some) {
        for (int64_t l = 0; l < some; l += kProductTile) {
          const int64_t positions = some - l < kProductTile ? some - l : kProductTile;
          for (int64_t c = 0; c < outputs; c += kLanes) {
            const int64_t channels = outputs - c < kLanes ? outputs - c : kLanes;
            const float* from = sums + (at + l - first) * sums_step + c;
            with_activation(p.activation, [&](auto act) {
              for (int64_t i = 0; i < positions; ++i) store(tile + i * kLanes, act(load(from + i * sums_step)));
            });
            add(p.residual, at + l, output + c, channels, positions);
            add(p.more, at + l, output + c, channels, positions);
            store_tile(tile, at_position(p, p.y, at + l, output + c), p.y.channel, p.y.column, channels, positions);
          }
        }
      });
    });
  });
}

// The outputs of panels [begin, end) at `count` positions. memory: the part of product_scratch behind the input.
[[maybe_unused]] static void run_product(const Product& p, Input in, int64_t first, int64_t count, int64_t begin,
                                         int64_t end, float* memory) {
  Slab slab{p.weight, p.bias, p.activation, in.data, in.step, 1, 0, count, {}, 0, {}, {}, 0, 0};
  if (writes_in_place(p)) {
    slab.y = at_position(p, p.y, first, 0), slab.y_step = p.y.column;
    if (p.residual) slab.residual = at_position(p, p.residual, first, 0), slab.residual_step = p.residual.column;
    if (p.more) slab.more = at_position(p, p.more, first, 0), slab.more_step = p.more.column;
    return multiply(slab, begin, end);
  }
  constexpr int64_t kStep = kPanelVectors * kPackedLanes;
  float* tile = memory + count * kStep;
  slab.activation = Activation::kNone, slab.y_step = kStep;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t from = panel_begin(p.weight.outputs, panel), to = panel_begin(p.weight.outputs, panel + 1);
    slab.y = Elements{memory, DType::kFloat32} + -from;
    multiply(slab, panel, panel + 1);
    write_sums(p, memory, kStep, from, (to < p.weight.outputs ? to : p.weight.outputs) - from, first, count, tile);
  }
}

}  // namespace
END_KERNELS
