// What the kernels of wavelet_depthwise_conv2d share.
//
// A block has 32 channels, a lane each, and a warp for each band. Its threads take 2×2 pixels in the order in which
// they lie in memory, for reading and for writing; between the two lie the bands in shared memory, where a thread has
// the whole column [row][column] of its band and channel to itself and filters it in registers.
#pragma once

#include "cuda/haar.h"
#include "include/wavelet_depthwise_conv2d_cuda.h"

namespace mobilemamba {

using WaveletParams = WaveletDepthwiseConv2dCudaParams;

constexpr int kBands = 4, kWaveletThreads = kBands * kWarp;
constexpr int kPosition = kWarp + 1;  // floats from one position to the next: odd, for threads along positions
constexpr float kWaveletNormalization = 0.25f;  // of both transforms together

constexpr int kStep = 4;  // rows of the bands of a large map that a block reads at a time

// Any filter is applied with this many of its columns at a time to this many rows of outputs.
constexpr int kChunk = 16, kAnyRows = 4, kAnyColumns = 8;

// Blocks that fit into a processor at once: so many that nothing has to leave the registers.
template <int kK, int kColumns>
constexpr int kBlocksOfProcessor = kColumns == 4 ? 4 : 3;

// What a block has of the bands.
struct WaveletUnit {
  int64_t image, channel;  // the first channel
  int channels;
  int64_t top, left;
  int rows, columns;

  // whole: a unit is an image.
  __device__ __forceinline__ WaveletUnit(const WaveletParams& p, int64_t block, int64_t unit, bool whole = false) {
    channel = block * kWarp;
    channels = static_cast<int>(p.channels - channel < kWarp ? p.channels - channel : kWarp);
    image = unit, top = left = 0;
    rows = static_cast<int>(p.unit_rows), columns = static_cast<int>(p.unit_columns);
    if (whole) return;
    left = unit % p.units_across * p.unit_columns, unit /= p.units_across;
    top = unit % p.units_down * p.unit_rows, image = unit / p.units_down;
    if (p.rows - top < rows) rows = static_cast<int>(p.rows - top);
    if (p.columns - left < columns) columns = static_cast<int>(p.columns - left);
  }
};

// The units of a group; the first groups have one more where they are not the same.
struct UnitsOf {
  int64_t first;
  int count;
};
__device__ __forceinline__ UnitsOf units_of(const WaveletParams& p, int64_t group) {
  const int64_t count = p.units / p.groups, more = p.units - count * p.groups;
  return {group * count + (group < more ? group : more), static_cast<int>(count + (group < more))};
}

// The bands of a unit, or of some rows of it, in shared memory: [band][slot][column][lane].
struct Bands {
  float* memory;
  int slots, columns;

  __device__ __forceinline__ float* at(int band, int slot, int column) const {
    return memory + ((band * slots + slot) * columns + column) * kPosition;
  }
};
ANYWHERE constexpr int64_t bands_floats(int64_t slots, int64_t columns) { return kBands * slots * columns * kPosition; }

__device__ __forceinline__ int thread_of_block() { return static_cast<int>(threadIdx.y * kWarp + threadIdx.x); }

// Calls f(k, lane, row, column) for rows × columns positions of a block's channels; k counts to kBatch. Before each
// batch of a thread, and after it, it calls the other two.
template <int kBatch, class Before, class F, class After>
__device__ __forceinline__ void for_positions(const Map& map, int channels, int rows, int columns, Before before, F f,
                                              After after) {
  const unsigned positions = static_cast<unsigned>(rows * columns);
  const bool lanes_inside = map.channel == 1 && !(channels == 1 && map.column == 1);
  const unsigned inner = lanes_inside ? kWarp : positions;
  const unsigned total = positions * static_cast<unsigned>(lanes_inside ? kWarp : channels);
  const SmallDivisor by_inner(inner), by_column(columns);
  unsigned first = static_cast<unsigned>(thread_of_block());
  hide(first);
#pragma unroll 1
  for (; first < total; first += kBatch * kWaveletThreads) {
    before();
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const unsigned i = first + static_cast<unsigned>(k) * kWaveletThreads;
      const unsigned high = by_inner.quotient(i), low = i - high * inner;
      const unsigned lane = lanes_inside ? low : high, position = lanes_inside ? high : low;
      const unsigned row = by_column.quotient(position);
      if (i < total && static_cast<int>(lane) < channels)
        f(k, static_cast<int>(lane), static_cast<int>(row), static_cast<int>(position - row * columns));
    }
    after();
  }
}

// Where pixels of a map lie, by rows and columns counted from a position of the bands.
struct Pixels {
  int64_t offset;
  int64_t channel, row, column;
  int begin, end, bottom;  // columns inside the map, and the first row that is not

  __device__ Pixels(const WaveletParams& p, const WaveletUnit& at, const Map& map, int64_t top, int64_t left, int rows,
                    int columns)
      : offset(at.image * map.batch + at.channel * map.channel + 2 * top * map.row + 2 * left * map.column),
        channel(map.channel),
        row(map.row),
        column(map.column),
        begin(between(-2 * left, 0, 2 * columns)),
        end(between(p.width - 2 * left, 0, 2 * columns)),
        bottom(between(p.height - 2 * top, 0, 2 * rows)) {}

  __device__ __forceinline__ bool has(int y, int x) const { return y < bottom && x >= begin && x < end; }
  __device__ __forceinline__ int64_t at(int lane, int y, int x) const {
    return offset + lane * channel + y * row + x * column;
  }
};

// Four times, without the halves of both transforms, what HaarBlock computes; the weights have them.
__device__ __forceinline__ HaarBlock sums_of(const HaarBlock& x) {
  const float top = x.v[0] + x.v[1], left = x.v[0] - x.v[1], bottom = x.v[2] + x.v[3], right = x.v[2] - x.v[3];
  return {{top + bottom, top - bottom, left + right, left - right}};
}

// Reads pixels and writes their bands to slots [slot, slot + rows): `columns` from `left` on, zeros for those beside
// the map and behind. `top` may not be above the map.
template <int kBatch>
__device__ __forceinline__ void read_bands(const Bands& bands, int slot, const Map& map, const WaveletParams& p,
                                           const WaveletUnit& at, int64_t top, int64_t left, int rows, int columns) {
  if (rows <= 0) return;
  const Pixels pixels(p, at, map, top, left, rows, columns);
  visit(map.elements, [&](const auto* x) {
    HaarBlock blocks[kBatch];
    int to[kBatch];
    for_positions<kBatch>(
        map, at.channels, rows, bands.columns,
        [&] {
#pragma unroll
          for (int k = 0; k < kBatch; ++k) to[k] = -1;
        },
        [&](int k, int lane, int row, int column) {
          to[k] = ((slot + row) * bands.columns + column) * kPosition + lane;
          const int64_t from = pixels.at(lane, 2 * row, 2 * column);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            blocks[k].v[i] = pixels.has(2 * row + i / 2, 2 * column + i % 2)
                                 ? to_float(x[from + i / 2 * pixels.row + i % 2 * pixels.column])
                                 : 0.0f;
        },
        [&] {
          const int band = bands.slots * bands.columns * kPosition;
#pragma unroll
          for (int k = 0; k < kBatch; ++k) {
            if (to[k] < 0) continue;
            const HaarBlock sums = sums_of(blocks[k]);
#pragma unroll
            for (int i = 0; i < 4; ++i) bands.memory[to[k] + i * band] = sums.v[i];
          }
        });
  });
}

// Transforms what is in slots [slot, slot + rows) back, adds the base and writes the rows of the unit from `top` on.
template <int kBatch>
__device__ __forceinline__ void write_pixels(const Bands& bands, int slot, const WaveletParams& p,
                                             const WaveletUnit& at, int64_t top, int rows) {
  if (rows <= 0) return;
  const Pixels outs(p, at, p.out, top, at.left, rows, at.columns), bases(p, at, p.base, top, at.left, rows, at.columns);
  visit(p.out.elements, [&](auto* out) {
    using T = std::remove_pointer_t<decltype(out)>;
    const bool same_type = p.base.elements.dtype == p.out.elements.dtype;
    const T* base = static_cast<const T*>(p.base.elements.data);
    HaarBlock blocks[kBatch];
    int64_t to[kBatch];
    int from[kBatch], inside[kBatch];
    for_positions<kBatch>(
        p.out, at.channels, rows, at.columns,
        [&] {
#pragma unroll
          for (int k = 0; k < kBatch; ++k) from[k] = -1;
        },
        [&](int k, int lane, int row, int column) {
          from[k] = ((slot + row) * bands.columns + column) * kPosition + lane;
          to[k] = outs.at(lane, 2 * row, 2 * column), inside[k] = 0;
          const int64_t at_base = bases.at(lane, 2 * row, 2 * column);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const bool has = outs.has(2 * row + i / 2, 2 * column + i % 2);
            const int64_t pixel = at_base + i / 2 * bases.row + i % 2 * bases.column;
            blocks[k].v[i] = 0.0f;
            if (has && base) blocks[k].v[i] = same_type ? to_float(base[pixel]) : load(p.base.elements + pixel);
            inside[k] |= has << i;
          }
        },
        [&] {
          const int band = bands.slots * bands.columns * kPosition;
#pragma unroll
          for (int k = 0; k < kBatch; ++k) {
            if (from[k] < 0) continue;
            HaarBlock filtered;
#pragma unroll
            for (int i = 0; i < 4; ++i) filtered.v[i] = bands.memory[from[k] + i * band];
            const HaarBlock sums = sums_of(filtered);
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (inside[k] >> i & 1)
                out[to[k] + i / 2 * outs.row + i % 2 * outs.column] = from_float<T>(sums.v[i] + blocks[k].v[i]);
          }
        });
  });
}

// The scale of a lane's channel and band.
__device__ __forceinline__ float read_scale(const WaveletParams& p, int64_t channel, int band) {
  return p.scale ? load(p.scale + (4 * channel + band) * p.scale_stride) : 1.0f;
}

// The forward of channels-last maps that are whole in shared memory.
bool wavelet_takes_pairs(const WaveletDepthwiseConv2dCudaParams& p);
cudaError_t wavelet_depthwise_conv2d_pairs(const WaveletDepthwiseConv2dCudaParams& params, cudaStream_t stream);

// Calls f with the kernel's constants: taps, columns computed together, whether a unit is an image.
template <class F>
auto with_taps(const WaveletParams& p, F f) {
  const auto segment = [&](auto taps, auto columns) {
    return p.whole ? f(taps, columns, std::true_type{}) : f(taps, columns, std::false_type{});
  };
  using std::integral_constant;
  const auto seven = integral_constant<int, 7>{};
  const auto four = integral_constant<int, 4>{};
  const auto eight = integral_constant<int, 8>{};
  if (p.taps == 7) return p.whole && p.segment == 7 ? f(seven, seven, std::true_type{}) : segment(seven, eight);
  if (p.taps == 5)
    return p.segment == 4 ? f(integral_constant<int, 5>{}, four, std::true_type{})
                          : segment(integral_constant<int, 5>{}, eight);
  return p.segment == 4 ? f(integral_constant<int, 3>{}, four, std::true_type{})
                        : segment(integral_constant<int, 3>{}, eight);
}

}  // namespace mobilemamba
