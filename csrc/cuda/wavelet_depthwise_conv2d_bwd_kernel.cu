// The gradients of wavelet_depthwise_conv2d's weight and scale: with X the bands of x and G those of the gradient,
//   grad_weight[t][tap] = scale Σ G[row][column] X[row + t - pad][column + tap - pad],
//   grad_scale = Σ weight · grad_weight / scale
//
// A block goes through the units of a group as the forward does, with both kinds of bands in shared memory. A thread
// keeps the sums of its filter (49 registers at 7×7) for the whole group, and the k rows of G that a row of X meets (49
// at 7 columns): every element of either is read once from shared memory and meets all it has to. The groups' sums, 25
// KB of a block at 7×7, go to memory, and are added in the order of the groups by a second kernel. Bytes: x and the
// gradient once.
#include "cuda/launchers.h"
#include "cuda/wavelet_depthwise_conv2d.h"

namespace mobilemamba {
namespace {

// Where a thread's sum of a tap goes.
__device__ __forceinline__ float* part_of(const WaveletParams& p, int64_t group, int64_t block, int band, int64_t tap) {
  const int64_t taps = p.tap_rows * p.tap_columns;
  return p.parts + ((((group * p.blocks + block) * kBands + band) * taps + tap) * kWarp + threadIdx.x);
}

// What a thread knows while it goes down the rows of a unit: the rows of G that the next row of X meets, the last
// first.
template <int kK, int kColumns, bool kWhole>
struct Correlating {
  static constexpr int kPad = kK / 2, kMargin = kWhole ? 0 : kPad, kRead = kColumns + 2 * kMargin;
  float g[kK][kColumns] = {};

  // Takes in a row of G.
  __device__ __forceinline__ void next(const float* row) {
#pragma unroll
    for (int t = kK - 1; t > 0; --t)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) g[t][c] = g[t - 1][c];
    if (row) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) g[0][c] = row[c * kPosition];
    }
  }
  // Adds the products of row r of X with what it meets of `rows` rows of G, the last of which taken in is r + kPad.
  __device__ __forceinline__ void add(float (&sums)[kK][kK], const float* in, int r, int rows) {
    constexpr int kOffset = kPad - kMargin;
    float v[kRead];
#pragma unroll
    for (int x = 0; x < kRead; ++x) v[x] = in[x * kPosition];
#pragma unroll
    for (int t = 0; t < kK; ++t) {
      if (static_cast<unsigned>(r + kPad - t) >= static_cast<unsigned>(rows)) continue;
#pragma unroll
      for (int x = 0; x < kRead; ++x)
#pragma unroll
        for (int tap = 0; tap < kK; ++tap)
          if (x + kOffset - tap >= 0 && x + kOffset - tap < kColumns) sums[t][tap] += v[x] * g[t][x + kOffset - tap];
    }
  }
};

template <int kK, int kColumns, bool kWhole>
__global__ void __launch_bounds__(kWaveletThreads, kBlocksOfProcessor<kK, kColumns>)
    weight_kernel(WaveletParams p, int64_t first_item) {
  using State = Correlating<kK, kColumns, kWhole>;
  constexpr int kPad = State::kPad, kBatch = kK == 7 && kColumns == 8 ? 1 : 2;
  const int lane = threadIdx.x, band = threadIdx.y, step = static_cast<int>(p.step);
  const Bands xs{shared_memory, step, State::kRead};
  const Bands gs{shared_memory + bands_floats(step, State::kRead), step, kColumns};
  const int64_t item = first_item + blockIdx.x;
  const int64_t block = item % p.blocks, group = item / p.blocks;
  const UnitsOf units = units_of(p, group);
  float sums[kK][kK] = {};
  for (int i = 0; i < units.count; ++i) {
    const WaveletUnit at(p, block, units.first + i, kWhole);
    State state;
    if constexpr (kWhole) {
      read_bands<kBatch>(xs, 0, p.x, p, at, 0, 0, at.rows, at.columns);
      read_bands<kBatch>(gs, 0, p.grad, p, at, 0, 0, at.rows, at.columns);
      __syncthreads();
      for (int s = 0; s < at.rows + kPad; ++s) {
        state.next(s < at.rows ? gs.at(band, s, 0) + lane : nullptr);
        if (s >= kPad) state.add(sums, xs.at(band, s - kPad, 0) + lane, s - kPad, at.rows);
      }
      __syncthreads();
    } else {
      const int64_t above = p.rows - at.top;
      const int first = at.top < kPad ? -static_cast<int>(at.top) : -kPad;  // rows of X that are in the bands
      const int last = between(above, 0, at.rows + kPad);
      for (int s = 0; s < last + kPad; s += step) {  // G's row s meets X's rows from s - kPad on
        const int x_begin = s - kPad > first ? s - kPad : first, end = s + step < last + kPad ? s + step : last + kPad;
        read_bands<1>(xs, x_begin - (s - kPad), p.x, p, at, at.top + x_begin, at.left - kPad, end - kPad - x_begin,
                      State::kRead);
        read_bands<1>(gs, 0, p.grad, p, at, at.top + s, at.left, (end < at.rows ? end : at.rows) - s, at.columns);
        __syncthreads();
        for (int r = s; r < end; ++r) {
          state.next(r < at.rows ? gs.at(band, r - s, 0) + lane : nullptr);
          if (r - kPad >= first) state.add(sums, xs.at(band, r - s, 0) + lane, r - kPad, at.rows);
        }
        __syncthreads();
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kK * kK; ++i) *part_of(p, group, block, band, i) = sums[i / kK][i % kK];
}

// Any filter: a thread keeps kAnyRows by kAnyColumns elements of G in registers while the filter goes over X, as in the
// forward; the sums of the filter stay in memory.
__global__ void __launch_bounds__(kWaveletThreads, 3) any_weight_kernel(WaveletParams p) {
  constexpr int kRead = kAnyColumns + kChunk - 1, kUnroll = 4;
  const int lane = threadIdx.x, band = threadIdx.y;
  const Bands bands{shared_memory, kAnyRows, kRead};
  for (int64_t item = blockIdx.x; item < p.blocks * p.groups; item += gridDim.x) {
    const int64_t block = item % p.blocks, group = item / p.blocks;
    const UnitsOf units = units_of(p, group);
    for (int i = 0; i < units.count; ++i) {
      const WaveletUnit at(p, block, units.first + i);
      const int64_t top = at.top - p.tap_rows / 2, left = at.left - p.tap_columns / 2;  // under the filter's first tap
      __syncthreads();
      read_bands<4>(bands, 0, p.grad, p, at, at.top, at.left, at.rows, at.columns);
      __syncthreads();
      float g[kAnyRows][kAnyColumns];
#pragma unroll
      for (int o = 0; o < kAnyRows; ++o)
#pragma unroll
        for (int c = 0; c < kAnyColumns; ++c)
          g[o][c] = o < at.rows && c < at.columns ? bands.at(band, o, c)[lane] : 0.0f;
      for (int64_t chunk = 0; chunk < p.tap_columns; chunk += kChunk) {
        const int taps = between(p.tap_columns - chunk, 0, kChunk);
        for (int64_t t = 0; t < p.tap_rows; ++t) {
          __syncthreads();
          for (int64_t r = t == 0 ? 0 : t + at.rows - 1; r < t + at.rows; ++r)
            if (top + r >= 0 && top + r < p.rows)
              read_bands<4>(bands, static_cast<int>(r % kAnyRows), p.x, p, at, top + r, left + chunk, 1, kRead);
          __syncthreads();
          for (int tap = 0; tap < taps; tap += kUnroll) {
            float sums[kUnroll] = {};
#pragma unroll
            for (int o = 0; o < kAnyRows; ++o) {
              const int64_t r = t + o;
              if (o >= at.rows || top + r < 0 || top + r >= p.rows) continue;
              const float* in = bands.at(band, static_cast<int>(r % kAnyRows), tap) + lane;
              float v[kAnyColumns + kUnroll - 1];
#pragma unroll
              for (int x = 0; x < kAnyColumns + kUnroll - 1; ++x) v[x] = in[x * kPosition];
#pragma unroll
              for (int u = 0; u < kUnroll; ++u)
#pragma unroll
                for (int c = 0; c < kAnyColumns; ++c) sums[u] += v[c + u] * g[o][c];
            }
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
              if (tap + u >= taps) continue;
              float* part = part_of(p, group, block, band, t * p.tap_columns + chunk + tap + u);
              *part = i == 0 ? sums[u] : *part + sums[u];
            }
          }
        }
      }
    }
  }
}

// A block adds up the parts of one band of kSumChannels channels: a thread those of one tap and a share of the groups,
// then one the shares. Then the scale is taken into account.
constexpr int kSumChannels = 8, kSumRows = 64;
constexpr int kSumThreads = kSumChannels * kSumRows;

__global__ void __launch_bounds__(kSumThreads, 2) sum_kernel(WaveletParams p) {
  const int64_t taps = p.tap_rows * p.tap_columns;
  const int64_t blocks = (p.channels + kSumChannels - 1) / kSumChannels;
  const int lane = static_cast<int>(threadIdx.x) % kSumChannels, row = static_cast<int>(threadIdx.x) / kSumChannels;
  const int round = static_cast<int>(taps < kSumRows ? taps : kSumRows);  // taps at a time
  const int shares = kSumRows / round, tap = row % round, share = row / round;
  for (int64_t item = blockIdx.x; item < blocks * kBands; item += gridDim.x) {
    const int band = static_cast<int>(item % kBands);
    const int64_t channel = item / kBands * kSumChannels + lane;
    const bool inside = channel < p.channels;
    const float scale = inside ? read_scale(p, channel, band) : 0.0f;
    float grad_scale = 0.0f;
    for (int64_t first = 0; first < taps; first += round) {
      float sum = 0.0f;
      if (inside && share < shares && first + tap < taps) {
        const int64_t stride = p.blocks * kBands * taps * kWarp;
        const float* part =
            p.parts + ((channel / kWarp * kBands + band) * taps + first + tap) * kWarp + channel % kWarp;
#pragma unroll 4
        for (int64_t g = share; g < p.groups; g += shares) sum += part[g * stride];
      }
      shared_memory[row * kSumChannels + lane] = sum;
      __syncthreads();
      if (inside && share == 0 && first + tap < taps) {
        for (int s = 1; s < shares; ++s) sum += shared_memory[(s * round + tap) * kSumChannels + lane];
        sum *= kWaveletNormalization;
        const int64_t filter = 4 * channel + band, y = (first + tap) / p.tap_columns, x = (first + tap) % p.tap_columns;
        if (p.grad_scale) grad_scale += sum * load(p.weight.at(0, filter, y, x));
        store(p.grad_weight.at(0, filter, y, x), sum * scale);
      }
      __syncthreads();
    }
    if (p.grad_scale) {
      shared_memory[row * kSumChannels + lane] = grad_scale;
      __syncthreads();
      if (row == 0 && inside) {
        for (int r = 1; r < round; ++r) grad_scale += shared_memory[r * kSumChannels + lane];
        store(p.grad_scale + (4 * channel + band), grad_scale);
      }
      __syncthreads();
    }
  }
}

}  // namespace

cudaError_t wavelet_depthwise_conv2d_bwd(const WaveletDepthwiseConv2dCudaParams& p, cudaStream_t stream) {
  const int64_t items = p.blocks * p.groups;
  const dim3 block(kWarp, kBands);
  const auto weights = [&](auto taps, auto columns, auto whole) {
    const int64_t floats = bands_floats(p.step, columns + (whole ? 0 : taps - 1)) + bands_floats(p.step, columns);
    return launch(weight_kernel<taps, columns, whole>, p, items, block, floats, stream);
  };
  const cudaError_t error =
      p.taps ? with_taps(p, weights)
             : launch(any_weight_kernel, p, items, block, bands_floats(kAnyRows, kAnyColumns + kChunk - 1), stream);
  if (error != cudaSuccess) return error;
  return launch(sum_kernel, p, ceil_div(p.channels, kSumChannels) * kBands, kSumThreads, kSumThreads, stream);
}

}  // namespace mobilemamba
