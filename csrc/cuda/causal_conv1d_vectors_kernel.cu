// causal_conv1d of sequences that are dense in the channels or in the positions: a thread has vectors of these.
//
// Channels dense: a thread goes along up to 64 positions of four channels, with their filters and the positions under
// them in registers. Two groups of positions (64 bytes) are on their way while a third is computed, and each is asked
// for before its predecessor is used. The positions before a segment are read again. Positions dense: a thread has four
// vectors of 16 bytes of one channel and reads the four elements before each too, which lie in the first cache; all of
// these loads leave at once. Threads are numbered through, vectors first, so that any number of them fills warps.
//
// Bytes: x and y once, and of x up to 3 positions of each segment. Instructions of 16 bytes (sm_90, 16 bits, four taps,
// SiLU): 108 and, with what a thread does once, 143; 32 of them are the multiply-adds and 16 special functions.
#include "cuda/causal_conv1d.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksOfProcessor = 5;
constexpr int kVectors = 4;  // of 16 bytes, of a thread where positions are dense

struct Plan : CausalConv1dParams {
  unsigned vectors, pieces;  // vectors of channels, segments; or vectors of positions a thread apart, channels
  int segment;
};

template <class T, int kTaps, bool kSilu>
__global__ void __launch_bounds__(kThreads, kBlocksOfProcessor) channels_kernel(Plan p) {
  constexpr int kBefore = kTaps - 1, kGroup = 8 / sizeof(T);
  using Four = Vector<T, kChannels>;
  const unsigned thread = blockIdx.x * kThreads + threadIdx.x, outer = thread / p.vectors, batch = outer / p.pieces;
  if (batch >= p.batch) return;
  const int channel = static_cast<int>(thread - outer * p.vectors) * kChannels;
  const int begin = static_cast<int>(outer - batch * p.pieces) * p.segment, length = static_cast<int>(p.length);
  int left = length - begin < p.segment ? length - begin : p.segment;
  const int x_step = static_cast<int>(p.x.position), y_step = static_cast<int>(p.y.position);
  const T* from = start_of<const T>(p.x, batch, begin * p.x.position + channel);
  T* to = start_of<T>(p.y, batch, begin * p.y.position + channel);

  Four groups[2][kGroup] = {};
  const auto read_group = [&](Four(&group)[kGroup], int left) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i, from += x_step)
      if (left > i) group[i] = *reinterpret_cast<const Four*>(from);
  };
  Four last[kBefore];  // before the segment
#pragma unroll
  for (int i = 0; i < kBefore; ++i)
    last[i] = *reinterpret_cast<const Four*>(from - (begin > 0 ? (kBefore - i) * x_step : 0));
  read_group(groups[0], left), read_group(groups[1], left - kGroup);
  const Filters<kTaps, kChannels> filters(p.filter, channel);
  float before[kBefore][kChannels];
#pragma unroll
  for (int i = 0; i < kBefore; ++i) last[i].unpack(before[i]);
  if (begin == 0) read_initial(before, p, batch, channel);

#pragma unroll 1
  while (left > 0) {
#pragma unroll
    for (int g = 0; g < 2; ++g, left -= kGroup) {
      float v[kBefore + kGroup][kChannels];
      memcpy(v, before, sizeof before);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) groups[g][i].unpack(v[kBefore + i]);
      memcpy(before, v + kGroup, sizeof before);
      read_group(groups[g], left - 2 * kGroup);
#pragma unroll
      for (int i = 0; i < kGroup; ++i, to += y_step) {
        float s[kChannels];
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          s[c] = filters.sum(v, i, c);
          if constexpr (kSilu) s[c] *= sigmoid_for<T>(s[c]);
        }
        if (left > i) *reinterpret_cast<Four*>(to) = Four::of(s);
      }
    }
  }
}

template <class T, int kTaps, bool kSilu>
__global__ void __launch_bounds__(kThreads, 6) positions_kernel(Plan p) {
  constexpr int kBefore = kTaps - 1, kCount = 16 / sizeof(T);
  using Own = Vector<T, kCount>;
  using Before = Vector<T, 4>;
  const unsigned thread = blockIdx.x * kThreads + threadIdx.x, outer = thread / p.vectors, batch = outer / p.pieces;
  if (batch >= p.batch) return;
  const int64_t channel = outer - batch * p.pieces;
  const int begin = static_cast<int>(thread - outer * p.vectors) * kCount, step = static_cast<int>(p.vectors) * kCount;
  const int left = static_cast<int>(p.length) - begin;
  const T* const from = start_of<const T>(p.x, batch, channel * p.x.channel + begin);
  T* const to = start_of<T>(p.y, batch, channel * p.y.channel + begin);
  Own own[kVectors];
  Before before[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {  // what there is not is read elsewhere: a condition would wait for the value
    const int at = left > i * step ? i * step : 0;
    own[i] = *reinterpret_cast<const Own*>(from + at);
    before[i] = *reinterpret_cast<const Before*>(from + (begin + at > 0 ? at - 4 : 0));
  }
  const Filters<kTaps, 1> filter(p.filter, channel);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float v[4 + kCount][1], s[kCount];
    before[i].unpack(v[0]), own[i].unpack(v[4]);
    if (i == 0 && begin == 0) {
      float initial[kBefore][1];
      read_initial(initial, p, batch, channel);
      memcpy(v + (4 - kBefore), initial, sizeof initial);
    }
#pragma unroll
    for (int l = 0; l < kCount; ++l) {
      s[l] = filter.sum(v, 4 - kBefore + l, 0);
      if constexpr (kSilu) s[l] *= sigmoid_for<T>(s[l]);
    }
    if (left > i * step) *reinterpret_cast<Own*>(to + i * step) = Own::of(s);
  }
}

Plan plan_of_channels(const CausalConv1dParams& params) {
  constexpr int64_t kWaves = 2, kLongest = 64, kLeast = 8;  // positions
  Plan p{params};
  const int64_t vectors = p.dim / kChannels, threads = multiprocessors() * kBlocksOfProcessor * kThreads * kWaves;
  const int64_t most = between(p.batch * vectors * p.length / threads, 1, kLongest);
  p.segment = static_cast<int>(ceil_div(share(p.length, most), kLeast) * kLeast);
  p.vectors = static_cast<unsigned>(vectors), p.pieces = static_cast<unsigned>(ceil_div(p.length, p.segment));
  return p;
}

Plan plan_of_positions(const CausalConv1dParams& params) {
  Plan p{params};
  p.vectors = static_cast<unsigned>(ceil_div(p.length * element_size(p.x.elements.dtype), 16 * kVectors));
  p.pieces = static_cast<unsigned>(p.dim);
  return p;
}

}  // namespace

bool causal_conv1d_takes_vectors(const CausalConv1dParams& p) {
  return in_vectors_of_channels(p) || in_vectors_of_positions(p);
}

cudaError_t causal_conv1d_vectors(const CausalConv1dParams& params, cudaStream_t stream) {
  const bool channels = in_vectors_of_channels(params);
  const Plan p = channels ? plan_of_channels(params) : plan_of_positions(params);
  return with_causal_variant(p, [&](auto element, auto taps, auto silu) {
    using T = decltype(element);
    const auto kernel = channels ? channels_kernel<T, taps, silu> : positions_kernel<T, taps, silu>;
    return launch_blocks(kernel, ceil_div(p.batch * p.pieces * p.vectors, kThreads), kThreads, 0, stream, p);
  });
}

}  // namespace mobilemamba
