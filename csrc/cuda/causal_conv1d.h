// What the causal convolutions by vectors share.
#pragma once

#include "cuda/device.h"
#include "include/causal_conv1d_cuda.h"

namespace mobilemamba {

constexpr int kChannels = 4;  // of a thread where they are dense

// Elements side by side, as memory has them: what is loaded and stored at once.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  TwoChannels<T> pairs[kCount / 2];

  __device__ __forceinline__ void unpack(float* to) const {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float2 two = pairs[i].floats();
      to[2 * i] = two.x, to[2 * i + 1] = two.y;
    }
  }
  static __device__ __forceinline__ Vector of(const float* from) {
    Vector v;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) v.pairs[i] = TwoChannels<T>::of({from[2 * i], from[2 * i + 1]});
    return v;
  }
};

// The filters of channels that follow each other.
template <int kTaps, int kCount>
struct Filters {
  float taps[kTaps][kCount], bias[kCount];

  __device__ __forceinline__ Filters(const CausalFilter& f, int64_t channel) {
    visit(f.weight + channel * f.weight_channel, [&](const auto* weight) {
#pragma unroll
      for (int c = 0; c < kCount; ++c)
#pragma unroll
        for (int j = 0; j < kTaps; ++j) taps[j][c] = to_float(weight[c * f.weight_channel + j * f.weight_tap]);
    });
    memset(bias, 0, sizeof bias);
    if (f.bias)
      visit(f.bias + channel * f.bias_channel, [&](const auto* from) {
#pragma unroll
        for (int c = 0; c < kCount; ++c) bias[c] = to_float(from[c * f.bias_channel]);
      });
  }
  // Of channel c at the position whose first tap meets x[i].
  template <int kPositions>
  __device__ __forceinline__ float sum(const float (&x)[kPositions][kCount], int i, int c) const {
    float s = bias[c];
#pragma unroll
    for (int j = 0; j < kTaps; ++j) s += taps[j][c] * x[i + j][c];
    return s;
  }
};

// What precedes the first position of channels that follow each other.
template <int kBefore, int kCount>
__device__ __forceinline__ void read_initial(float (&to)[kBefore][kCount], const CausalConv1dParams& p, int64_t batch,
                                             int64_t channel) {
  memset(to, 0, sizeof to);
  if (p.initial)
    visit(p.initial.at(batch, channel, 0), [&](const auto* from) {
#pragma unroll
      for (int i = 0; i < kBefore; ++i)
#pragma unroll
        for (int c = 0; c < kCount; ++c) to[i][c] = to_float(from[c * p.initial.channel + i * p.initial.position]);
    });
}

template <class T>
__device__ __forceinline__ T* start_of(const Sequence& t, int64_t batch, int64_t offset) {
  return static_cast<T*>(t.elements.data) + batch * t.batch + offset;
}

// As exact as a result that is rounded to T.
template <class T>
__device__ __forceinline__ float sigmoid_for(float x) {
  if constexpr (std::is_same_v<T, float>) return quick_sigmoid(x);
  return reciprocal<T>(1.0f + power_of_two<T>(-kLog2E * x));
}

// Whether a sequence begins with whole vectors of the type of x, and threads can count in 32 bits.
inline bool begins_with_vector(const CausalConv1dParams& p, const Sequence& t, int64_t vector) {
  return !p.numbers && p.length <= 1 << 30 && p.batch * p.dim * ceil_div(p.length, 8) <= INT32_MAX &&
         t.elements.dtype == p.x.elements.dtype && (p.batch == 1 || t.batch % vector == 0) &&
         reinterpret_cast<uintptr_t>(t.elements.data) % (vector * element_size(t.elements.dtype)) == 0;
}

// Whether threads may take kChannels channels of a position at a time, or 16 bytes of a channel's positions.
template <class Fits>
bool all_sequences(const CausalConv1dParams& p, Fits fits) {
  return fits(p.x) && (p.grad ? fits(p.grad) && fits(p.grad_x) : fits(p.y));
}
inline bool in_vectors_of_channels(const CausalConv1dParams& p) {
  return p.dim % kChannels == 0 && all_sequences(p, [&](const Sequence& t) {
           return t.channel == 1 && t.position <= 1 << 28 && (p.length == 1 || t.position % kChannels == 0) &&
                  begins_with_vector(p, t, kChannels);
         });
}
inline bool in_vectors_of_positions(const CausalConv1dParams& p) {
  const int64_t vector = 16 / element_size(p.x.elements.dtype);
  return p.length % vector == 0 && all_sequences(p, [&](const Sequence& t) {
           return t.position == 1 && (p.dim == 1 || t.channel % vector == 0) && begins_with_vector(p, t, vector);
         });
}

// Calls f with the element type, the number of taps and whether there is an activation, as constants.
template <class F>
cudaError_t with_causal_variant(const CausalConv1dParams& p, F f) {
  return with_element(p.x.elements.dtype, [&](auto element) {
    const auto with_taps = [&](auto taps) {
      return p.filter.silu ? f(element, taps, std::true_type{}) : f(element, taps, std::false_type{});
    };
    if (p.filter.width == 2) return with_taps(std::integral_constant<int, 2>{});
    if (p.filter.width == 3) return with_taps(std::integral_constant<int, 3>{});
    return with_taps(std::integral_constant<int, 4>{});
  });
}

}  // namespace mobilemamba
