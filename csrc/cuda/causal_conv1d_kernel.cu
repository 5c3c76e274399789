// causal_conv1d: a thread has one channel and, of each chunk of a sequence, kSegment consecutive positions, which it
// holds in registers with the filter and the positions before them.
//
// Channels dense: the lanes of a warp are channels and its segment is one of the block's chunk. Positions dense: a warp
// has one channel, its lanes' segments follow each other, and it transposes them in a row of shared memory of its own.
// So both layouts are read and written in whole sectors; a tensor in another layout than x is read as well, but not so.
// Backward, with s the sum under the SiLU and d its gradient, both computed again and also for the positions after the
// segment that its own reach:
//   dx_l = Σ_j weight_j d_{l+W-1-j},  dweight_j = Σ_l d_l x_{l-W+1+j},  dbias = Σ_l d_l
// The sums over l stay in a thread's registers for all chunks of its block, are added over the lanes or warps that
// share a channel, and over blocks by partial_sums, each in a fixed order. Bytes: every map once, weight once a block.
#include "cuda/device.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

constexpr int kWarps = 8;
constexpr int kSegment = 8;

using Params = CausalConv1dCudaParams;

// Segments in shared memory lie one float apart, so that lanes that go through their segments meet in no bank.
ANYWHERE constexpr int spread(int position) { return position + position / kSegment; }
constexpr int kRow = spread(kWarp * kSegment + 2 * (kMostTaps - 1));

ANYWHERE bool by_channels(const Params& p) { return p.x.channel == 1 && p.dim > 1; }
ANYWHERE int64_t blocks_of_channels(const Params& p) { return ceil_div(p.dim, by_channels(p) ? kWarp : kWarps); }
ANYWHERE int64_t chunk_of(const Params& p) { return (by_channels(p) ? kWarps : kWarp) * kSegment; }

// What a thread has; items count batch, parts of a sequence, blocks of channels.
struct Place {
  int64_t batch, part, channel, begin, end;  // its segments begin in [begin, end), a chunk apart
  int lane, warp;
  bool by_channels, inside;  // inside: of the channels

  __device__ Place(const Params& p, int64_t item)
      : lane(threadIdx.x), warp(threadIdx.y), by_channels(mobilemamba::by_channels(p)) {
    const int64_t blocks = blocks_of_channels(p), chunk = chunk_of(p);
    channel = item % blocks * (by_channels ? kWarp : kWarps) + (by_channels ? lane : warp), item /= blocks;
    inside = channel < p.dim;
    part = item % p.parts, batch = item / p.parts;
    const int64_t first = part * p.range * chunk, last = first + p.range * chunk;
    begin = first + (by_channels ? warp : lane) * kSegment;
    // Where lanes are segments they stay together.
    end = (last < p.length ? last : p.length) + (by_channels ? 0 : lane * kSegment);
  }
};

// v[i] = get(position + i).
template <class T, int kCount, class Get>
__device__ __forceinline__ void read(T (&v)[kCount], const Place& at, int64_t position, Get get) {
  if (at.by_channels) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = get(position + i);
  } else {
    T* row = reinterpret_cast<T*>(shared_memory) + at.warp * kRow;
    position -= at.lane * kSegment;
#pragma unroll
    for (int first = 0; first < (kWarp - 1) * kSegment + kCount; first += kWarp) {
      const int i = first + at.lane;
      if (i < (kWarp - 1) * kSegment + kCount) row[spread(i)] = get(position + i);
    }
    __syncwarp();
    row += spread(at.lane * kSegment);
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = row[spread(i)];
    __syncwarp();
  }
}

template <int kCount>
__device__ __forceinline__ void read(float (&v)[kCount], const Params& p, const Sequence& t, const Place& at,
                                     int64_t position) {
  visit(t.at(at.batch, at.channel, 0), [&](const auto* from) {
    read(v, at, position, [&](int64_t l) { return l >= 0 && l < p.length ? to_float(from[l * t.position]) : 0.0f; });
  });
}

// x with the positions before it.
template <int kTaps, int kCount>
__device__ __forceinline__ void read_inputs(float (&v)[kCount], const Params& p, const Place& at, int64_t start) {
  read(v, p, p.x, at, start - (kTaps - 1));
  if (p.initial && start == 0)
#pragma unroll
    for (int i = 0; i < kTaps - 1; ++i) v[i] = load(p.initial.at(at.batch, at.channel, i));
}

__device__ __forceinline__ void write(const float (&v)[kSegment], const Params& p, const Sequence& t, const Place& at,
                                      int64_t start) {
  visit(t.at(at.batch, at.channel, 0), [&](auto* to) {
    const auto put = [&](int64_t l, float value) {
      if (l < p.length) to[l * t.position] = from_float<std::remove_pointer_t<decltype(to)>>(value);
    };
    if (at.by_channels) {
#pragma unroll
      for (int i = 0; i < kSegment; ++i) put(start + i, v[i]);
    } else {
      float* row = shared_memory + at.warp * kRow;
#pragma unroll
      for (int i = 0; i < kSegment; ++i) row[spread(at.lane * kSegment) + i] = v[i];
      __syncwarp();
      start -= at.lane * kSegment;
#pragma unroll
      for (int i = 0; i < kSegment; ++i) put(start + i * kWarp + at.lane, row[spread(i * kWarp) + spread(at.lane)]);
      __syncwarp();
    }
  });
}

// Which taps count at kCount positions: those of the same sequence, and none behind the end or in padding.
template <int kTaps, bool kNumbered, int kCount>
struct Members {
  int taps[kNumbered ? kCount : 1];  // a bit a tap
  int count;

  __device__ __forceinline__ Members(const Params& p, const Place& at, int64_t start) {
    count = static_cast<int>(p.length - start < kCount ? p.length - start : kCount);
    if constexpr (kNumbered)
      read(taps, at, start, [&](int64_t l) {
        const int64_t number = l < p.length ? p.numbers.at(at.batch, l) : -1;
        int bits = 0;
        for (int64_t j = 0; j < kTaps && number >= 0; ++j) {
          const int64_t from = l - (kTaps - 1) + j;
          if (from >= 0 && p.numbers.at(at.batch, from) == number) bits |= 1 << j;
        }
        return bits;
      });
  }
  __device__ __forceinline__ bool any(int i) const {
    if constexpr (kNumbered) return taps[i] != 0;
    return i < count;
  }
  __device__ __forceinline__ bool has(int i, int j) const {
    if constexpr (kNumbered) return taps[i] >> j & 1;
    return i < count;
  }
};

template <int kTaps>
struct Filter {
  float taps[kTaps], bias;
  bool silu;

  __device__ __forceinline__ Filter(const CausalFilter& f, int64_t channel) : silu(f.silu) {
#pragma unroll
    for (int j = 0; j < kTaps; ++j) taps[j] = load(f.weight + (channel * f.weight_channel + j * f.weight_tap));
    bias = f.bias ? load(f.bias + channel * f.bias_channel) : 0.0f;
  }
  // The sum at position i, whose first tap meets x[i].
  template <class Members>
  __device__ __forceinline__ float sum(const float* x, const Members& members, int i) const {
    float s = bias;
#pragma unroll
    for (int j = 0; j < kTaps; ++j)
      if (members.has(i, j)) s += taps[j] * x[i + j];
    return s;
  }
};

template <int kTaps, bool kNumbered>
__global__ void __launch_bounds__(kWarps* kWarp, kNumbered ? 3 : 4) forward_kernel(Params p, int64_t first_item) {
  const Place at(p, first_item + blockIdx.x);
  if (!at.inside) return;
  const Filter<kTaps> filter(p.filter, at.channel);
#pragma unroll 1
  for (int64_t start = at.begin; start < at.end; start += chunk_of(p)) {
    float x[kSegment + kTaps - 1], y[kSegment];
    read_inputs<kTaps>(x, p, at, start);
    const Members<kTaps, kNumbered, kSegment> members(p, at, start);
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      const float s = filter.sum(x, members, i);
      y[i] = members.any(i) ? (filter.silu ? silu(s) : s) : 0.0f;
    }
    write(y, p, p.y, at, start);
  }
}

// Adds each sum over the threads of the block that share a channel and calls put(j, total) once for each.
template <int kCount, class Put>
__device__ __forceinline__ void sum_block(float (&sums)[kCount], const Place& at, Put put) {
  static_assert(kCount <= kWarps);
  if (at.by_channels) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) shared_memory[(j * kWarps + at.warp) * kWarp + at.lane] = sums[j];
    __syncthreads();
    if (at.warp >= kCount) return;
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += shared_memory[(at.warp * kWarps + w) * kWarp + at.lane];
    put(at.warp, total);
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      for (int mask = 1; mask < kWarp; mask *= 2) sums[j] += __shfl_xor_sync(0xffffffffu, sums[j], mask);
      if (at.lane == 0) put(j, sums[j]);
    }
  }
}

template <int kTaps, bool kNumbered>
__global__ void __launch_bounds__(kWarps* kWarp, 2) backward_kernel(Params p, int64_t first_item) {
  constexpr int kBefore = kTaps - 1;
  const Place at(p, first_item + blockIdx.x);
  float sums[kTaps + 1] = {};
  if (at.inside) {
    const Filter<kTaps> filter(p.filter, at.channel);
#pragma unroll 1
    for (int64_t start = at.begin; start < at.end; start += chunk_of(p)) {
      float x[kSegment + 2 * kBefore], d[kSegment + kBefore];
      read_inputs<kTaps>(x, p, at, start);
      read(d, p, p.grad, at, start);
      const Members<kTaps, kNumbered, kSegment + kBefore> members(p, at, start);
#pragma unroll
      for (int i = 0; i < kSegment + kBefore; ++i) {
        if (filter.silu) {
          const float s = filter.sum(x, members, i), gate = sigmoid(s);
          d[i] *= gate * (1.0f + s * (1.0f - gate));
        }
        if (i < kSegment && members.any(i)) sums[kTaps] += d[i];
#pragma unroll
        for (int j = 0; j < kTaps; ++j)
          if (i < kSegment && members.has(i, j)) sums[j] += d[i] * x[i + j];
      }
      // The gradient of the input kBefore positions before the i-th one.
      const auto gradient = [&](int i) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kTaps; ++j)
          if (j <= i && members.has(i - j, j)) sum += filter.taps[j] * d[i - j];
        return sum;
      };
      if (p.initial && start == 0)
#pragma unroll
        for (int i = 0; i < kBefore; ++i) store(p.grad_initial.at(at.batch, at.channel, i), gradient(i));
      float dx[kSegment];
#pragma unroll
      for (int i = 0; i < kSegment; ++i) dx[i] = gradient(i + kBefore);
      write(dx, p, p.grad_x, at, start);
    }
  }
  sum_block(sums, at, [&](int j, float total) {
    const int64_t index = (at.batch * p.parts + at.part) * p.dim + at.channel;
    if (at.inside) (j < kTaps ? p.partial_weight[index * kTaps + j] : p.partial_bias[index]) = total;
  });
}

// Calls f with the number of taps, and with whether positions have numbers, as constants.
template <class F>
cudaError_t with_variant(const Params& p, F f) {
  const auto with_taps = [&](auto taps) { return p.numbers ? f(taps, std::true_type{}) : f(taps, std::false_type{}); };
  if (p.filter.width == 2) return with_taps(std::integral_constant<int, 2>{});
  if (p.filter.width == 3) return with_taps(std::integral_constant<int, 3>{});
  return with_taps(std::integral_constant<int, 4>{});
}

int64_t items_of(const Params& p) { return p.batch * p.parts * blocks_of_channels(p); }

const dim3 kBlock(kWarp, kWarps);

}  // namespace

void plan_causal_conv1d(CausalConv1dCudaParams& p) {
  if (p.grad && causal_conv1d_takes_vectors(p)) return plan_causal_conv1d_vectors_bwd(p);
  constexpr int64_t kBlocksOfProcessor = 8;
  p.parts = ceil_div(p.length, chunk_of(p));
  p.range = between(items_of(p) / (multiprocessors() * kBlocksOfProcessor), 1, p.parts);
  p.parts = ceil_div(p.parts, p.range);
}

cudaError_t causal_conv1d_fwd(const CausalConv1dCudaParams& p, cudaStream_t stream) {
  if (causal_conv1d_takes_vectors(p)) return causal_conv1d_vectors(p, stream);
  return with_variant(p, [&](auto taps, auto numbered) {
    return launch(forward_kernel<taps, numbered>, p, items_of(p), kBlock, kWarps * kRow, stream);
  });
}

cudaError_t causal_conv1d_bwd(const CausalConv1dCudaParams& p, cudaStream_t stream) {
  if (causal_conv1d_takes_vectors(p)) return causal_conv1d_vectors_bwd(p, stream);
  return with_variant(p, [&](auto taps, auto numbered) {
    return launch(backward_kernel<taps, numbered>, p, items_of(p), kBlock, kWarps * kRow, stream);
  });
}

}  // namespace mobilemamba
