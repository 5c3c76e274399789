// wavelet_depthwise_conv2d forward, and the gradient of x, which is the same with the taps reversed. Whole
// channels-last maps are mostly taken by wavelet_depthwise_conv2d_pairs.
//
// A block goes through the units of a group: it reads pixels and transforms them into shared memory, filters every
// band, and writes what the inverse makes of them. At 14×14 or 7×7 pixels a unit is an image and all is done at once; a
// large map is cut into columns of 8 bands, which stream through some rows of shared memory.
//
// A thread filters one band of one channel in place. The filter (49 registers at 7×7, read once a group) and the sums
// of the k rows of outputs that are not complete (49 at 7 columns) stay in registers, so that a band element is read
// from shared memory once and meets the whole filter: one read for up to 49 multiply-adds. Columns beside the map are
// left out when the kernel is compiled (units of whole rows), rows above and below it when it runs.
//
// Bytes: x (large maps: with the columns that units share, from the caches), base and out once; the filters, 25 KB of a
// block at 7×7, once a group.
#include "cuda/launchers.h"
#include "cuda/wavelet_depthwise_conv2d.h"

namespace mobilemamba {
namespace {

// The filters of a block's channels, each of a thread's in its registers, with scale and normalization in them.
template <int kK>
__device__ __forceinline__ void read_filters(float (&w)[kK][kK], const WaveletParams& p, int64_t block) {
  constexpr int kTaps = kK * kK;
  const int64_t channel = block * kWarp;
  const int channels = static_cast<int>(p.channels - channel < kWarp ? p.channels - channel : kWarp);
  const int lane = threadIdx.x, band = threadIdx.y;
  __syncthreads();
  visit(p.weight.at(0, 4 * channel, 0, 0), [&](const auto* weight) {
    int i = thread_of_block();
    for (hide(i); i < channels * 4 * kTaps; i += kWaveletThreads) {
      const int filter = i / kTaps, tap = i % kTaps;
      shared_memory[(filter % 4 * kWarp + filter / 4) * kTaps + tap] =
          to_float(weight[filter * p.weight.channel + tap / kK * p.weight.row + tap % kK * p.weight.column]);
    }
  });
  __syncthreads();
  const bool inside = lane < channels;
  const float scale = inside ? read_scale(p, channel + lane, band) * kWaveletNormalization : 0.0f;
  const float* filter = shared_memory + (band * kWarp + lane) * kTaps;
#pragma unroll
  for (int i = 0; i < kTaps; ++i) w[i / kK][i % kK] = inside ? filter[i] * scale : 0.0f;
  if (p.reverse) {
#pragma unroll
    for (int i = 0; i < kTaps / 2; ++i) {
      const float kept = w[i / kK][i % kK], other = w[kK - 1 - i / kK][kK - 1 - i % kK];
      w[i / kK][i % kK] = other, w[kK - 1 - i / kK][kK - 1 - i % kK] = kept;
    }
  }
  __syncthreads();
}

// What a thread knows while it goes down the rows of a unit: `open` has the sums of the output rows that the next row
// of its band meets, the last one first. Rows and outputs count from the unit's top.
template <int kK, int kColumns, bool kWhole>
struct Filtering {
  static constexpr int kPad = kK / 2, kMargin = kWhole ? 0 : kPad, kRead = kColumns + 2 * kMargin;
  float open[kK][kColumns] = {};

  // Adds row r, whose columns begin kMargin before the unit's, to what meets it of `rows` output rows.
  __device__ __forceinline__ void add(const float* in, const float (&w)[kK][kK], int r, int rows) {
    constexpr int kOffset = kPad - kMargin;
    float v[kRead];
#pragma unroll
    for (int x = 0; x < kRead; ++x) v[x] = in[x * kPosition];
#pragma unroll
    for (int t = 0; t < kK; ++t) {
      const int output = r + kPad - t;
      if (output < 0 || output >= rows) continue;
#pragma unroll
      for (int x = 0; x < kRead; ++x)
#pragma unroll
        for (int tap = 0; tap < kK; ++tap)
          if (x + kOffset - tap >= 0 && x + kOffset - tap < kColumns) open[t][x + kOffset - tap] += v[x] * w[t][tap];
    }
  }
  // Output row r - kPad.
  __device__ __forceinline__ void put(float* out) const {
#pragma unroll
    for (int x = 0; x < kColumns; ++x) out[x * kPosition] = open[kK - 1][x];
  }
  __device__ __forceinline__ void next() {
#pragma unroll
    for (int t = kK - 1; t > 0; --t)
#pragma unroll
      for (int x = 0; x < kColumns; ++x) open[t][x] = open[t - 1][x];
#pragma unroll
    for (int x = 0; x < kColumns; ++x) open[0][x] = 0.0f;
  }
};

template <int kK, int kColumns, bool kWhole>
__global__ void __launch_bounds__(kWaveletThreads, kBlocksOfProcessor<kK, kColumns>)
    filter_kernel(WaveletParams p, int64_t first_item) {
  using State = Filtering<kK, kColumns, kWhole>;
  constexpr int kPad = State::kPad, kBatch = kK == 7 && kColumns == 8 ? 1 : 2;
  const int lane = threadIdx.x, band = threadIdx.y;
  const int step = kWhole ? static_cast<int>(p.step) : kStep;
  const Bands bands{shared_memory, step, State::kRead};
  const int64_t item = first_item + blockIdx.x;
  const int64_t group = item / p.blocks, block = item - group * p.blocks;
  const UnitsOf units = kWhole ? units_of(p, group) : UnitsOf{group, 1};
  float w[kK][kK];
  read_filters(w, p, block);
  for (int i = 0; i < units.count; ++i) {
    const WaveletUnit at(p, block, units.first + i, kWhole);
    if constexpr (kWhole) {
      read_bands<kBatch>(bands, 0, p.x, p, at, 0, 0, at.rows, at.columns);
      __syncthreads();
      State state;
      for (int r = 0; r < at.rows + kPad; ++r) {
        if (r < at.rows) state.add(bands.at(band, r, 0) + lane, w, r, at.rows);
        if (r >= kPad) state.put(bands.at(band, r - kPad, 0) + lane);
        state.next();
      }
      __syncthreads();
      write_pixels<1>(bands, 0, p, at, 0, at.rows);
      __syncthreads();
    } else {
      const int first = at.top < kPad ? -static_cast<int>(at.top) : -kPad;
      const int last = between(p.rows - at.top, 0, at.rows + kPad);  // of the rows that the bands have
      State state;
      for (int r = first, slot = 0; r < at.rows + kPad; ++r) {
        if (slot == 0) {
          const int rows = between(last - r, 0, kStep);
          read_bands<1>(bands, 0, p.x, p, at, at.top + r, at.left - kPad, rows, State::kRead);
          __syncthreads();
        }
        float* mine = bands.at(band, slot, 0) + lane;
        if (r < last) state.add(mine, w, r, at.rows);
        if (r >= kPad) state.put(mine);
        state.next();
        ++slot;
        if (slot == kStep || r + 1 == at.rows + kPad) {
          __syncthreads();
          const int begin = between(kPad - (r + 1 - slot), 0, slot);  // the first slot with an output
          write_pixels<1>(bands, begin, p, at, at.top + (r + 1 - slot) + begin - kPad, slot - begin);
          __syncthreads();
          slot = 0;
        }
      }
    }
  }
}

// Any filter: a unit is kAnyRows by kAnyColumns outputs, which a thread sums in registers while the filter goes over
// them row by row, kChunk columns at a time. Shared memory has the rows of the bands under one row of the filter, in a
// ring.
__global__ void __launch_bounds__(kWaveletThreads, 2) any_filter_kernel(WaveletParams p) {
  constexpr int kRead = kAnyColumns + kChunk - 1, kUnroll = 4;
  const int lane = threadIdx.x, band = threadIdx.y;
  const Bands bands{shared_memory, kAnyRows, kRead};
  float* weights = shared_memory + bands_floats(kAnyRows, kRead);  // [band][tap][lane]
  for (int64_t item = blockIdx.x; item < p.blocks * p.groups; item += gridDim.x) {
    const int64_t block = item % p.blocks, group = item / p.blocks;
    const UnitsOf units = units_of(p, group);
    for (int i = 0; i < units.count; ++i) {
      const WaveletUnit at(p, block, units.first + i);
      const int64_t top = at.top - p.tap_rows / 2, left = at.left - p.tap_columns / 2;  // under the filter's first tap
      float sums[kAnyRows][kAnyColumns] = {};
      for (int64_t chunk = 0; chunk < p.tap_columns; chunk += kChunk) {
        const int taps = between(p.tap_columns - chunk, 0, kChunk);
        for (int64_t t = 0; t < p.tap_rows; ++t) {
          __syncthreads();
          for (int64_t r = t == 0 ? 0 : t + at.rows - 1; r < t + at.rows; ++r)
            if (top + r >= 0 && top + r < p.rows)
              read_bands<4>(bands, static_cast<int>(r % kAnyRows), p.x, p, at, top + r, left + chunk, 1, kRead);
          visit(p.weight.at(0, 4 * at.channel, p.reverse ? p.tap_rows - 1 - t : t, 0), [&](const auto* weight) {
            for (int i = thread_of_block(); i < at.channels * 4 * taps; i += kWaveletThreads) {
              const int filter = i / taps, tap = i % taps;
              const int64_t column = p.reverse ? p.tap_columns - 1 - chunk - tap : chunk + tap;
              weights[(filter % 4 * kChunk + tap) * kPosition + filter / 4] =
                  to_float(weight[filter * p.weight.channel + column * p.weight.column]);
            }
          });
          __syncthreads();
          const float* w = weights + band * kChunk * kPosition + lane;
          for (int tap = 0; tap < taps; tap += kUnroll) {
            float of_tap[kUnroll];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) of_tap[u] = w[(tap + u) * kPosition];
#pragma unroll
            for (int o = 0; o < kAnyRows; ++o) {
              const int64_t r = t + o;
              if (o >= at.rows || top + r < 0 || top + r >= p.rows) continue;
              const float* in = bands.at(band, static_cast<int>(r % kAnyRows), tap) + lane;
              float v[kAnyColumns + kUnroll - 1];
#pragma unroll
              for (int x = 0; x < kAnyColumns + kUnroll - 1; ++x) v[x] = in[x * kPosition];
#pragma unroll
              for (int u = 0; u < kUnroll; ++u) {
                if (tap + u >= taps) continue;
#pragma unroll
                for (int x = 0; x < kAnyColumns; ++x) sums[o][x] += v[x + u] * of_tap[u];
              }
            }
          }
        }
      }
      __syncthreads();
      const float scale = lane < at.channels ? read_scale(p, at.channel + lane, band) * kWaveletNormalization : 0.0f;
#pragma unroll
      for (int o = 0; o < kAnyRows; ++o)
#pragma unroll
        for (int x = 0; x < kAnyColumns; ++x) bands.at(band, o, x)[lane] = sums[o][x] * scale;
      __syncthreads();
      write_pixels<2>(bands, 0, p, at, at.top, at.rows);
    }
  }
}

}  // namespace

void plan_wavelet_depthwise_conv2d(WaveletDepthwiseConv2dCudaParams& p) {
  constexpr int64_t kMostColumns = 8;
  constexpr int64_t kLeastRows = 16, kMostRows = 64;                // of a unit of a large map
  const int64_t wanted = multiprocessors() * (p.backward ? 4 : 8);  // blocks: they fill the device once or twice
  const int64_t blocks = ceil_div(p.channels, kWarp), height = half(p.height), width = half(p.width);
  p.rows = height, p.columns = width;
  const bool fits = p.tap_rows == p.tap_columns && (p.tap_rows == 3 || p.tap_rows == 5 || p.tap_rows == 7);
  p.taps = fits ? p.tap_rows : 0;
  if (fits) {
    p.whole = width <= kMostColumns && height <= kMostColumns;
    const int64_t few = p.taps == 7 ? 7 : 4;
    p.segment = p.whole && width <= few ? few : kMostColumns;
    p.unit_columns = ceil_div(width, ceil_div(width, kMostColumns));
    p.unit_rows = p.step = height;
    if (!p.whole) {
      const int64_t others = p.batch * blocks * ceil_div(width, p.unit_columns), units = ceil_div(wanted, others);
      const int64_t rows = ceil_div(height, units);
      p.step = kStep;
      p.unit_rows = ceil_div(height, ceil_div(height, between(rows, kLeastRows, kMostRows)));
    }
  } else {
    p.whole = false, p.segment = p.unit_columns = kAnyColumns, p.unit_rows = p.step = kAnyRows;
  }
  p.units_down = ceil_div(height, p.unit_rows), p.units_across = ceil_div(width, p.unit_columns);
  p.units = p.batch * p.units_down * p.units_across, p.blocks = blocks;
  // Filtering a large map, a unit is long enough to be a group.
  p.groups = fits && !p.whole && !p.backward ? p.units : ceil_div(p.units, ceil_div(p.units * blocks, wanted));
}

cudaError_t wavelet_depthwise_conv2d_fwd(const WaveletDepthwiseConv2dCudaParams& p, cudaStream_t stream) {
  if (wavelet_takes_pairs(p)) return wavelet_depthwise_conv2d_pairs(p, stream);
  const int64_t items = p.blocks * p.groups;
  const dim3 block(kWarp, kBands);
  if (p.taps == 0) {
    const int64_t floats = bands_floats(kAnyRows, kAnyColumns + kChunk - 1) + kBands * kChunk * kPosition;
    return launch(any_filter_kernel, p, items, block, floats, stream);
  }
  return with_taps(p, [&](auto taps, auto columns, auto whole) {
    const int64_t bands = bands_floats(p.step, columns + (whole ? 0 : taps - 1));
    const int64_t filters = kBands * kWarp * taps * taps;
    return launch(filter_kernel<taps, columns, whole>, p, items, block, bands > filters ? bands : filters, stream);
  });
}

}  // namespace mobilemamba
