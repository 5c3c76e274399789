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
static void read_input(const Product& p, int64_t first, int64_t count, T* memory, int64_t step, float* tile) {
  const int64_t depth = p.weight.depth;
  with_activation(p.input_activation, [&](auto act) {
    if (p.x.channel == 1) {
      with_type(p.x.elements, [&](auto* typed) {
        each_stretch(p, p.x, first, count, [&](int64_t at, int64_t some) {
          const auto* x = static_cast<decltype(typed)>(at_position(p, p.x, at, 0).data);
          T* to = memory + (at - first) * step;
          for (int64_t i = 0; i < some; ++i, x += p.x.column, to += step) {
            int64_t c = 0;
            for (; c + kLanes <= depth; c += kLanes) store(to + c, act(load(x + c)));
            if (c < depth) store_some(to + c, act(load_some(x + c, depth - c)), depth - c);
          }
        });
      });
    } else {
      for (int64_t c = 0; c < depth; c += kLanes) {
        const int64_t channels = depth - c < kLanes ? depth - c : kLanes;
        each_stretch(p, p.x, first, count, [&](int64_t at, int64_t some) {
          for (int64_t l = 0; l < some; l += kProductTile) {
            const int64_t positions = some - l < kProductTile ? some - l : kProductTile;
            load_tile(tile, at_position(p, p.x, at + l, c), p.x.channel, p.x.column, channels, positions);
            T* to = memory + (at + l - first) * step + c;
            for (int64_t i = 0; i < positions; ++i) store_some(to + i * step, act(load(tile + i * kLanes)), channels);
          }
        });
      }
    }
  });
  if (step > depth)
    for (int64_t i = 0; i < count; ++i) memory[i * step + depth] = T{};
}

// tile: kProductTile positions.
[[maybe_unused]] static Input read_input(const Product& p, int64_t first, int64_t count, float* memory, float* tile) {
  if (reads_in_place(p)) return {at_position(p, p.x, first, 0).data, p.x.column};
  const int64_t step = packed_depth(p.weight.depth, p.weight.bfloat16);
  if (p.weight.bfloat16)
    read_input(p, first, count, reinterpret_cast<BFloat16*>(memory), step, tile);
  else
    read_input(p, first, count, memory, step, tile);
  return {memory, step};
}

// Sums of `count` positions and a panel's outputs from `output` on become y.
static void write_sums(const Product& p, const float* sums, int64_t sums_step, int64_t output, int64_t outputs,
                       int64_t first, int64_t count, float* tile) {
  float* added = tile + kProductTile * kLanes;
  // The stretches of y, in which those of the residual may end sooner.
  each_stretch(p, p.y, first, count, [&](int64_t stretch, int64_t length) {
    each_stretch(p, p.residual ? p.residual : p.y, stretch, length, [&](int64_t at, int64_t some) {
      for (int64_t l = 0; l < some; l += kProductTile) {
        const int64_t positions = some - l < kProductTile ? some - l : kProductTile;
        for (int64_t c = 0; c < outputs; c += kLanes) {
          const int64_t channels = outputs - c < kLanes ? outputs - c : kLanes;
          if (p.residual)
            load_tile(added, at_position(p, p.residual, at + l, output + c), p.residual.channel, p.residual.column,
                      channels, positions);
          const float* from = sums + (at + l - first) * sums_step + c;
          with_activation(p.activation, [&](auto act) {
            for (int64_t i = 0; i < positions; ++i) {
              Vec v = act(load(from + i * sums_step));
              if (p.residual) v += load(added + i * kLanes);
              store(tile + i * kLanes, v);
            }
          });
          store_tile(tile, at_position(p, p.y, at + l, output + c), p.y.channel, p.y.column, channels, positions);
        }
      }
    });
  });
}

// The outputs of panels [begin, end) at `count` positions. memory: the part of product_scratch behind the input.
[[maybe_unused]] static void run_product(const Product& p, Input in, int64_t first, int64_t count, int64_t begin,
                                         int64_t end, float* memory) {
  Slab slab{p.weight, p.bias, p.activation, in.data, in.step, 1, 0, {}, {}, 0, 0, count};
  if (writes_in_place(p)) {
    slab.y = at_position(p, p.y, first, 0), slab.y_step = p.y.column;
    if (p.residual) slab.residual = at_position(p, p.residual, first, 0), slab.residual_step = p.residual.column;
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
