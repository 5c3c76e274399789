// The gradient of causal_conv1d where channels or positions are dense; s and d as in causal_conv1d_kernel.cu.
//
// Channels dense: a thread goes along a segment of four channels and the positions behind it that its own reach. The
// last positions of x and d, the filters and the sums of their gradients stay in registers, two groups of positions are
// on their way, and a block adds up its segments' sums in shared memory. Positions dense: up to 32 lanes have a
// channel, each 16 bytes at a time with what lies before and behind, the next 16 on their way; sums meet by shuffles.
// All in a fixed order, as is partial_sums, which adds blocks.
//
// Bytes: x and both gradients once, and of x and that of y what lies beside a segment again. Instructions of 16 bytes
// of a map (sm_90, 16 bits, four taps, SiLU): 260 where channels are dense, 295 where positions are.
#include "cuda/causal_conv1d.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksOfProcessor = 2;
constexpr int kLeast = 8;  // positions of a segment, times `range`

struct Plan : CausalConv1dCudaParams {
  int side, rows;  // channels dense: vectors of channels side by side, segments of a block; else: lanes of a channel
};

template <class T, bool kSilu>
__device__ __forceinline__ float gradient_of_sum(float grad, float s) {
  if constexpr (!kSilu) return grad;
  const float gate = sigmoid_for<T>(s);
  return grad * (gate * (1.0f + s * (1.0f - gate)));
}

// The gradients of what precedes the first position, from d at the first positions.
template <int kTaps, int kCount>
__device__ __forceinline__ void write_initial(const Plan& p, int64_t batch, int64_t channel,
                                              const Filters<kTaps, kCount>& filters,
                                              const float (&d)[kTaps - 1][kCount]) {
  visit(p.grad_initial.at(batch, channel, 0), [&](auto* to) {
#pragma unroll
    for (int i = 0; i < kTaps - 1; ++i)
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j <= i; ++j)
          if (i - j < p.length) sum += filters.taps[j][c] * d[i - j][c];
        to[c * p.grad_initial.channel + i * p.grad_initial.position] =
            from_float<std::remove_pointer_t<decltype(to)>>(sum);
      }
  });
}

template <int kTaps>
__device__ __forceinline__ void write_sum(const Plan& p, int64_t batch, int64_t part, int64_t channel, int j,
                                          float sum) {
  const int64_t index = (batch * p.parts + part) * p.dim + channel;
  (j < kTaps ? p.partial_weight[index * kTaps + j] : p.partial_bias[index]) = sum;
}

template <class T, int kTaps, bool kSilu>
__global__ void __launch_bounds__(kThreads, kBlocksOfProcessor) channels_bwd_kernel(Plan p, int64_t first_item) {
  constexpr int kBefore = kTaps - 1, kGroup = 4 / sizeof(T), kSums = kTaps + 1;
  using Four = Vector<T, kChannels>;
  const int row = threadIdx.x / p.side, column = threadIdx.x - row * p.side, length = static_cast<int>(p.length);
  const int64_t blocks = ceil_div(p.dim, p.side * kChannels);
  int64_t item = first_item + blockIdx.x;
  const int64_t first_channel = item % blocks * p.side * kChannels, channel = first_channel + column * kChannels;
  item /= blocks;
  const int64_t part = item % p.parts, batch = item / p.parts;
  const int segment = static_cast<int>(p.range) * kLeast;
  const int64_t begin = (part * p.rows + row) * segment;

  float sums[kSums][kChannels] = {};
  if (channel < p.dim && begin < length) {
    const int x_step = static_cast<int>(p.x.position), grad_step = static_cast<int>(p.grad.position);
    const int to_step = static_cast<int>(p.grad_x.position);
    const T* x = start_of<const T>(p.x, batch, begin * p.x.position + channel);
    const T* grad = start_of<const T>(p.grad, batch, begin * p.grad.position + channel);
    T* to = start_of<T>(p.grad_x, batch, begin * p.grad_x.position + channel) - kBefore * to_step;
    int left = static_cast<int>(length - begin), own = left < segment ? left : segment;
    left = left < own + kBefore ? left : own + kBefore;  // that have an s

    Four x_groups[2][kGroup] = {}, grad_groups[2][kGroup] = {};
    const auto read_group = [&](int g, int left) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i, x += x_step, grad += grad_step)
        if (left > i) {
          x_groups[g][i] = *reinterpret_cast<const Four*>(x);
          grad_groups[g][i] = *reinterpret_cast<const Four*>(grad);
        }
    };
    Four last[kBefore];  // before the segment
#pragma unroll
    for (int i = 0; i < kBefore; ++i)
      last[i] = *reinterpret_cast<const Four*>(x - (begin > 0 ? (kBefore - i) * x_step : 0));
    read_group(0, left), read_group(1, left - kGroup);
    const Filters<kTaps, kChannels> filters(p.filter, channel);
    float before[kBefore][kChannels], d_before[kBefore][kChannels] = {};
#pragma unroll
    for (int i = 0; i < kBefore; ++i) last[i].unpack(before[i]);
    if (begin == 0) {
      read_initial(before, p, batch, channel);
      if (p.initial) {
        float v[2 * kBefore][kChannels], d[kBefore][kChannels] = {};
        memcpy(v, before, sizeof before);
#pragma unroll
        for (int i = 0; i < kBefore; ++i) {
          if (i >= length) break;
          reinterpret_cast<const Four*>(x + (i - 2 * kGroup) * x_step)->unpack(v[kBefore + i]);
          reinterpret_cast<const Four*>(grad + (i - 2 * kGroup) * grad_step)->unpack(d[i]);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) d[i][c] = gradient_of_sum<T, kSilu>(d[i][c], filters.sum(v, i, c));
        }
        write_initial(p, batch, channel, filters, d);
      }
    }

#pragma unroll 1
    for (int l = 0; l < own + kBefore; l += 2 * kGroup) {
#pragma unroll
      for (int g = 0; g < 2; ++g, left -= kGroup) {
        float v[kBefore + kGroup][kChannels], d[kBefore + kGroup][kChannels];
        memcpy(v, before, sizeof before), memcpy(d, d_before, sizeof before);
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          x_groups[g][i].unpack(v[kBefore + i]), grad_groups[g][i].unpack(d[kBefore + i]);
        memcpy(before, v + kGroup, sizeof before);
        read_group(g, left - 2 * kGroup);
#pragma unroll
        for (int i = 0; i < kGroup; ++i, to += to_step) {
          const int at = l + g * kGroup + i;
          float dx[kChannels];
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            float& own_d = d[kBefore + i][c];
            own_d = gradient_of_sum<T, kSilu>(own_d, filters.sum(v, i, c));
            if (at < own) {
              sums[kTaps][c] += own_d;
#pragma unroll
              for (int j = 0; j < kTaps; ++j) sums[j][c] += own_d * v[i + j][c];
            }
            dx[c] = 0.0f;
#pragma unroll
            for (int j = 0; j < kTaps; ++j)
              if (left > i - j) dx[c] += filters.taps[j][c] * d[kBefore + i - j][c];
          }
          if (at >= kBefore && at < own + kBefore) *reinterpret_cast<Four*>(to) = Four::of(dx);
        }
        memcpy(d_before, d + kGroup, sizeof d_before);
      }
    }
  }

#pragma unroll
  for (int j = 0; j < kSums; ++j)
#pragma unroll
    for (int c = 0; c < kChannels; ++c) shared_memory[(j * kChannels + c) * blockDim.x + threadIdx.x] = sums[j][c];
  __syncthreads();
  for (int i = threadIdx.x; i < kSums * kChannels * p.side; i += blockDim.x) {
    const int which = i / p.side, j = which / kChannels, at = i - which * p.side;
    const int64_t own = first_channel + at * kChannels + which % kChannels;
    float total = 0.0f;
    for (int r = 0; r < p.rows; ++r) total += shared_memory[which * blockDim.x + r * p.side + at];
    if (own < p.dim) write_sum<kTaps>(p, batch, part, own, j, total);
  }
}

template <class T, int kTaps, bool kSilu>
__global__ void __launch_bounds__(kThreads, kBlocksOfProcessor) positions_bwd_kernel(Plan p, int64_t first_item) {
  constexpr int kBefore = kTaps - 1, kCount = 16 / sizeof(T);
  using Own = Vector<T, kCount>;
  using Four = Vector<T, 4>;
  const int lane = threadIdx.x % p.side, length = static_cast<int>(p.length);
  int64_t item = (first_item + blockIdx.x) * (kThreads / p.side) + threadIdx.x / p.side;
  const int64_t channel = item % p.dim;
  item /= p.dim;
  const int64_t part = item % p.parts, batch = item / p.parts;
  const bool inside = batch < p.batch;
  const int step = p.side * kCount, segment = static_cast<int>(p.range) * step;
  const int64_t first = part * segment;
  const int end = static_cast<int>(length - first < segment ? length : first + segment);

  float sums[kTaps + 1] = {};
  if (inside) {
    int l = static_cast<int>(first) + lane * kCount;
    const T* x = start_of<const T>(p.x, batch, channel * p.x.channel + l);
    const T* grad = start_of<const T>(p.grad, batch, channel * p.grad.channel + l);
    T* to = start_of<T>(p.grad_x, batch, channel * p.grad_x.channel + l);
    struct {
      Own x, grad;
      Four x_before, x_after, grad_after;
    } ahead;
    const auto read = [&](int l) {  // what there is not is read elsewhere: a condition would wait for the value
      const int before = l > 0 ? -4 : 0, after = length - l > kCount ? kCount : 0;
      ahead.x = *reinterpret_cast<const Own*>(x), ahead.grad = *reinterpret_cast<const Own*>(grad);
      ahead.x_before = *reinterpret_cast<const Four*>(x + before);
      ahead.x_after = *reinterpret_cast<const Four*>(x + after);
      ahead.grad_after = *reinterpret_cast<const Four*>(grad + after);
      x += step, grad += step;
    };
    if (l < end) read(l);
    const Filters<kTaps, 1> filter(p.filter, channel);
#pragma unroll 1
    for (; l < end; l += step, to += step) {
      float v[4 + kCount + 4][1], d[kCount + 4][1], dx[kCount];
      ahead.x_before.unpack(v[0]), ahead.x.unpack(v[4]), ahead.x_after.unpack(v[4 + kCount]);
      ahead.grad.unpack(d[0]), ahead.grad_after.unpack(d[kCount]);
      if (l + step < end) read(l + step);
      const bool last = l + kCount >= length;
      float initial[kBefore][1];
      if (l == 0) {
        read_initial(initial, p, batch, channel);
        memcpy(v + (4 - kBefore), initial, sizeof initial);
      }
#pragma unroll
      for (int i = 0; i < kCount + kBefore; ++i)
        d[i][0] = gradient_of_sum<T, kSilu>(d[i][0], filter.sum(v, 4 - kBefore + i, 0));
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        sums[kTaps] += d[i][0];
        dx[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < kTaps; ++j) {
          sums[j] += d[i][0] * v[4 - kBefore + i + j][0];
          if (i + kBefore - j < kCount || !last) dx[i] += filter.taps[j][0] * d[i + kBefore - j][0];
        }
      }
      *reinterpret_cast<Own*>(to) = Own::of(dx);
      if (l == 0 && p.initial) {
        memcpy(initial, d, sizeof initial);
        write_initial(p, batch, channel, filter, initial);
      }
    }
  }
#pragma unroll
  for (int j = 0; j <= kTaps; ++j) {
    for (int mask = 1; mask < p.side; mask *= 2) sums[j] += __shfl_xor_sync(0xffffffffu, sums[j], mask);
    if (inside && lane == 0) write_sum<kTaps>(p, batch, part, channel, j, sums[j]);
  }
}

// Lanes of a channel where positions are dense: a power of two.
int lanes_of(const CausalConv1dParams& p) {
  const int64_t vectors = p.length * element_size(p.x.elements.dtype) / 16;
  int lanes = 1;
  while (lanes < kWarp && lanes * 8 <= vectors) lanes *= 2;
  return lanes;
}

Plan plan_of(const CausalConv1dCudaParams& params) {
  Plan p{params};
  const bool channels = in_vectors_of_channels(p);
  p.side = channels ? static_cast<int>(share(p.dim / kChannels, kWarp)) : lanes_of(p);
  p.rows = channels ? kThreads / p.side : 1;
  return p;
}

}  // namespace

void plan_causal_conv1d_vectors_bwd(CausalConv1dCudaParams& params) {
  constexpr int64_t kWaves = 2, kLongest = 16;
  const Plan p = plan_of(params);
  const bool channels = in_vectors_of_channels(p);
  const int64_t least = channels ? kLeast : 16 / element_size(p.x.elements.dtype);
  const int64_t threads = p.batch * (channels ? p.dim / kChannels : p.dim) * ceil_div(p.length, least);
  const int64_t chunk = (channels ? p.rows : p.side) * least, parts = ceil_div(p.length, chunk);
  const int64_t wanted = multiprocessors() * kBlocksOfProcessor * kThreads * kWaves;
  params.range = between(threads / wanted, 1, between(parts, 1, kLongest));
  params.parts = ceil_div(parts, params.range);
}

cudaError_t causal_conv1d_vectors_bwd(const CausalConv1dCudaParams& params, cudaStream_t stream) {
  const Plan p = plan_of(params);
  const bool channels = in_vectors_of_channels(p);
  return with_causal_variant(p, [&](auto element, auto taps, auto silu) {
    using T = decltype(element);
    constexpr int64_t kSums = (taps + 1) * kChannels;
    if (!channels)
      return launch(positions_bwd_kernel<T, taps, silu>, p, ceil_div(p.batch * p.parts * p.dim * p.side, kThreads),
                    kThreads, 0, stream);
    const int64_t items = p.batch * p.parts * ceil_div(p.dim, p.side * kChannels), threads = p.side * p.rows;
    return launch(channels_bwd_kernel<T, taps, silu>, p, items, static_cast<unsigned>(threads), kSums * threads,
                  stream);
  });
}

}  // namespace mobilemamba
