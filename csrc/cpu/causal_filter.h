// The filter of a causal convolution on kLanes channels, in registers.
#pragma once

#include "cpu/tile.h"
#include "include/causal_conv1d.h"

BEGIN_KERNELS
namespace {

struct Filter {
  Vec taps[kMostTaps], bias;

  Filter(const CausalFilter& f, int64_t channel, int64_t channels) {
    for (int64_t j = 0; j < f.width; ++j)
      taps[j] = load_lanes(f.weight + (channel * f.weight_channel + j * f.weight_tap), f.weight_channel, channels);
    bias = f.bias ? load_lanes(f.bias + channel * f.bias_channel, f.bias_channel, channels) : Vec{};
  }

  // At the position whose taps begin at rows[i].
  template <int kTaps>
  INLINE_MEMBER Vec sum(Rows rows, int64_t i) const {
    Vec s = bias;
    for (int j = 0; j < kTaps; ++j) s += taps[j] * rows.get(i + j);
    return s;
  }
};

// Calls f with the number of taps as a constant.
template <class F>
INLINE void with_taps(int64_t width, F f) {
  if (width == 2) return f(std::integral_constant<int, 2>{});
  if (width == 3) return f(std::integral_constant<int, 3>{});
  f(std::integral_constant<int, 4>{});
}

}  // namespace
END_KERNELS
