// wavelet_depthwise_conv2d of channels-last maps whose bands are at most 8×8, with filters of 3, 5 or 7.
//
// A block has 32 channels, and some images of them one after another, several at once where they are small. For reading
// and writing a thread has two channels and some 2×2 pixels, all of whose loads of 4 bytes are on their way together.
// Between the two it has one channel and one band: all bands wait in shared memory, [band][position][channel], and a
// thread filters its own in registers, in code without loops: the filter (49 registers at 7×7), a row of the band and
// the output rows that it meets. What lies beside the map is left out when the kernel is compiled: 1369 multiply-adds
// of a band of 7×7. Bytes: x, base and out once; the filters, 25 KB at 7×7, once a block.
//
// Instructions of a thread and an image of 14×14, k = 7 (sm_90): 490 to read, 1500 to filter, 680 to write.
#include "cuda/launchers.h"
#include "cuda/wavelet_depthwise_conv2d.h"

namespace mobilemamba {
namespace {

constexpr int kPairs = kWarp / 2, kAtATime = kWaveletThreads / kPairs;  // positions that a block has at a time
constexpr int64_t kMostPositions = 64;                                  // of images at once

template <int kK, int kColumns>
constexpr int kResident = kK == 7 && kColumns == 8 ? 3 : 4;  // blocks of a multiprocessor

struct Plan : WaveletParams {
  int images;  // at once
  SmallDivisor by_row, by_width;
};

// The filters of a block's channels, each of a thread's in its registers, with scale and normalization in them.
template <int kK>
__device__ __forceinline__ void read_filters(float (&w)[kK * kK], const Plan& p, int64_t channel, int channels) {
  constexpr int kTaps = kK * kK, kLoads = 7;
  const int lane = threadIdx.x, band = threadIdx.y, count = channels * kBands * kTaps;
  const Elements weight = p.weight.elements + channel * kBands * p.weight.channel;
  if (weight.dtype == DType::kFloat32 && p.weight.channel == kTaps && p.weight.row == kK && p.weight.column == 1 &&
      reinterpret_cast<uintptr_t>(weight.data) % 16 == 0) {
    const auto* from = static_cast<const SixteenBytes*>(weight.data);
    for (int first = thread_of_block(); first < count / 4; first += kLoads * kWaveletThreads) {
      SixteenBytes v[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        if (first + j * kWaveletThreads < count / 4) v[j] = from[first + j * kWaveletThreads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        if (first + j * kWaveletThreads < count / 4)
          reinterpret_cast<SixteenBytes*>(shared_memory)[first + j * kWaveletThreads] = v[j];
    }
  } else {
    visit(weight, [&](const auto* from) {
      for (int i = thread_of_block(); i < count; i += kWaveletThreads) {
        const int filter = i / kTaps, tap = i % kTaps;
        shared_memory[i] =
            to_float(from[filter * p.weight.channel + tap / kK * p.weight.row + tap % kK * p.weight.column]);
      }
    });
  }
  __syncthreads();
  const bool inside = lane < channels;
  const float scale = inside ? read_scale(p, channel + lane, band) * kWaveletNormalization : 0.0f;
  const float* filter = shared_memory + (lane * kBands + band) * kTaps;
#pragma unroll
  for (int i = 0; i < kTaps; ++i) w[i] = inside ? filter[i] * scale : 0.0f;
  if (p.reverse) {
#pragma unroll
    for (int i = 0; i < kTaps / 2; ++i) {
      const float kept = w[i];
      w[i] = w[kTaps - 1 - i], w[kTaps - 1 - i] = kept;
    }
  }
  __syncthreads();
}

// How a thread finds 2×2 pixels of two channels. It keeps to a column of the bands; lines are rows of one image after
// the other.
template <class T, int kColumns>
struct PixelPairs {
  static constexpr int kAcross = kColumns <= 2 ? 2 : kColumns <= 4 ? 4 : 8;  // threads for a line
  static constexpr int kLines = kAtATime / kAcross;                          // that a block has at a time

  T* pixels;
  unsigned batch, row, column;

  __device__ __forceinline__ PixelPairs(const Map& map, int64_t image, int64_t channel, int band_column)
      : pixels(static_cast<T*>(map.elements.data) + image * map.batch + channel + 2 * band_column * map.column),
        batch(static_cast<unsigned>(map.batch)),
        row(static_cast<unsigned>(map.row)),
        column(static_cast<unsigned>(map.column)) {
    hide(pixels), hide(row), hide(column);  // an address is then one multiply-add
  }
  // Pixel i of a 2×2 block.
  __device__ __forceinline__ TwoChannels<T>* at(unsigned image, unsigned band_row, int i) const {
    const unsigned top = image * batch + 2 * band_row * row, offset = i == 0   ? top
                                                                      : i == 1 ? top + column
                                                                      : i == 2 ? top + row
                                                                               : top + row + column;
    return reinterpret_cast<TwoChannels<T>*>(pixels + offset);
  }
};

__device__ __forceinline__ void sums_of(const float2 (&from)[4], float2 (&to)[4]) {
  const HaarBlock a = sums_of(HaarBlock{{from[0].x, from[1].x, from[2].x, from[3].x}});
  const HaarBlock b = sums_of(HaarBlock{{from[0].y, from[1].y, from[2].y, from[3].y}});
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = {a.v[i], b.v[i]};
}

// Filters a thread's band of an image in place: `rows` rows of kColumns, zeros beyond the map.
template <int kK, int kColumns>
__device__ __forceinline__ void filter_band(float* band, const float (&w)[kK * kK], int rows) {
  constexpr int kPad = kK / 2;
  float sums[kColumns][kColumns] = {};
#pragma unroll
  for (int r = 0; r < kColumns + kPad; ++r) {
    if (r < kColumns && r < rows) {
      float v[kColumns];
#pragma unroll
      for (int x = 0; x < kColumns; ++x) v[x] = band[(r * kColumns + x) * kWarp];
#pragma unroll
      for (int o = 0; o < kColumns; ++o)
#pragma unroll
        for (int x = 0; x < kColumns; ++x)
#pragma unroll
          for (int c = 0; c < kColumns; ++c)
            if (r - o >= -kPad && r - o <= kPad && x - c >= -kPad && x - c <= kPad)
              sums[o][c] += v[x] * w[(r - o + kPad) * kK + x - c + kPad];
    }
    const int o = r - kPad;
    if (o < 0 || o >= rows) continue;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) band[(o * kColumns + c) * kWarp] = sums[o][c];
  }
}

// From memory to the L2 cache: 64 bytes a pixel of 16 bits, a thread a pixel.
template <class T>
__device__ __forceinline__ void announce(const Plan& p, const Map& map, int64_t first_image, int64_t channel,
                                         int images) {
  const int pixels = static_cast<int>(p.height * p.width);
  for (int image = 0; image < images; ++image) {
    const T* from = static_cast<const T*>(map.elements.data) + (first_image + image) * map.batch + channel;
    for (int i = thread_of_block(); i < pixels; i += kWaveletThreads) {
      const unsigned y = p.by_width.quotient(i), x = i - y * p.by_width.divisor;
      prefetch(from + (y * static_cast<unsigned>(map.row) + x * static_cast<unsigned>(map.column)));
    }
  }
}

template <class T, int kK, int kColumns>
__global__ void __launch_bounds__(kWaveletThreads, kResident<kK, kColumns>) pairs_kernel(Plan p, int64_t first_item) {
  using Pixels = PixelPairs<T, kColumns>;
  constexpr int kBatch = sizeof(T) == 4 ? 2 : kColumns == 7 ? 7 : 4, kLines = Pixels::kLines;
  const int64_t item = first_item + blockIdx.x;
  const int64_t group = item / p.blocks, channel = (item - group * p.blocks) * kWarp;
  const int channels = static_cast<int>(p.channels - channel < kWarp ? p.channels - channel : kWarp);
  const int rows = static_cast<int>(p.rows), height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  const int pair = thread_of_block() % kPairs, slot = thread_of_block() / kPairs;
  const int column = slot % Pixels::kAcross, first_line = slot / Pixels::kAcross;
  const bool left = 2 * pair < channels && 2 * column < width, right = left && 2 * column + 1 < width;
  const UnitsOf units = units_of(p, group);
  float w[kK * kK];
  read_filters<kK>(w, p, channel, channels);
  for (int done = 0; done < units.count; done += p.images) {
    const int64_t first_image = units.first + done;
    const int rest = units.count - done, images = rest < p.images ? rest : p.images, lines = images * rows;
    const int band_floats = p.images * rows * kColumns * kWarp;
    const auto bands_at = [&](int band, int line) {
      return reinterpret_cast<float2*>(shared_memory + band * band_floats + (line * kColumns + column) * kWarp) + pair;
    };
    // Loads the pixels of kBatch lines, zeros for absent ones.
    const auto load_lines = [&](TwoChannels<T>(&v)[kBatch][4], const Pixels& from, int line) {
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int l = line + k * kLines;
        const unsigned image = p.by_row.quotient(l), r = l - image * rows;
        const bool above = l < lines, below = above && 2 * static_cast<int>(r) + 1 < height;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[k][i] = TwoChannels<T>{};
          if ((i < 2 ? above : below) && (i % 2 == 0 ? left : right)) v[k][i] = *from.at(image, r, i);
        }
      }
    };

    const Pixels x(p.x, first_image, channel + 2 * pair, column);
#pragma unroll 1
    for (int line = first_line; line < lines; line += kBatch * kLines) {
      TwoChannels<T> v[kBatch][4];
      load_lines(v, x, line);
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        float2 pixels[4], bands[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) pixels[i] = v[k][i].floats();
        sums_of(pixels, bands);
        if (column < kColumns && line + k * kLines < lines) {
#pragma unroll
          for (int i = 0; i < 4; ++i) *bands_at(i, line + k * kLines) = bands[i];
        }
      }
    }
    if (p.base) announce<T>(p, p.base, first_image, channel, images);
    if (rest > images)
      announce<T>(p, p.x, first_image + images, channel, rest - images < images ? rest - images : images);
    __syncthreads();
#pragma unroll 1
    for (int image = 0; image < images; ++image)
      filter_band<kK, kColumns>(
          shared_memory + threadIdx.y * band_floats + image * rows * kColumns * kWarp + threadIdx.x, w, rows);
    __syncthreads();
    const Pixels base(p.base, first_image, channel + 2 * pair, column),
        out(p.out, first_image, channel + 2 * pair, column);
#pragma unroll 1
    for (int line = first_line; line < lines; line += kBatch * kLines) {
      TwoChannels<T> v[kBatch][4] = {};
      if (p.base) load_lines(v, base, line);
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int l = line + k * kLines;
        if (l >= lines || column >= kColumns) break;
        const unsigned image = p.by_row.quotient(l), r = l - image * rows;
        const bool below = 2 * static_cast<int>(r) + 1 < height;
        float2 bands[4], sums[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) bands[i] = *bands_at(i, l);
        sums_of(bands, sums);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 added = v[k][i].floats();
          const auto two = TwoChannels<T>::of({sums[i].x + added.x, sums[i].y + added.y});
          if ((i < 2 || below) && (i % 2 == 0 ? left : right)) *out.at(image, r, i) = two;
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace

bool wavelet_takes_pairs(const WaveletDepthwiseConv2dCudaParams& p) {
  const auto fits = [&](const Map& map) {
    return map.elements.dtype == p.x.elements.dtype && channels_are_pairs(map, p.channels, p.height, p.width);
  };
  return p.taps != 0 && p.whole && fits(p.x) && fits(p.out) && (!p.base || fits(p.base));
}

cudaError_t wavelet_depthwise_conv2d_pairs(const WaveletDepthwiseConv2dCudaParams& params, cudaStream_t stream) {
  Plan p{params};
  const auto start = [&](auto taps, auto columns) {
    constexpr int kK = decltype(taps)::value, kColumns = decltype(columns)::value;
    const int64_t resident = multiprocessors() * kResident<kK, kColumns>, positions = p.rows * kColumns;
    p.groups = between(resident / p.blocks, 1, p.units);
    const int64_t of_group = ceil_div(p.units, p.groups), most = kMostPositions / positions;
    p.images = static_cast<int>(most < 1 ? 1 : most < of_group ? most : of_group);
    p.by_row = SmallDivisor(p.rows), p.by_width = SmallDivisor(p.width);
    const auto far = [&](const Map& map) { return map && map.batch > INT32_MAX / kMostPositions; };
    if (far(p.x) || far(p.base) || far(p.out)) p.images = 1;  // offsets within images at once have 32 bits
    const int64_t bands = kBands * p.images * positions * kWarp, filters = kBands * kWarp * kK * kK;
    return with_element(p.x.elements.dtype, [&](auto element) {
      return launch(pairs_kernel<decltype(element), kK, kColumns>, p, p.blocks * p.groups, dim3(kWarp, kBands),
                    bands > filters ? bands : filters, stream);
    });
  };
  using std::integral_constant;
  const auto eight = integral_constant<int, 8>{};
  const auto four = integral_constant<int, 4>{};
  const int64_t side = p.rows > p.columns ? p.rows : p.columns;
  if (p.taps == 7 && side <= 7) return start(integral_constant<int, 7>{}, integral_constant<int, 7>{});
  if (p.taps == 7) return start(integral_constant<int, 7>{}, eight);
  if (p.taps == 5)
    return side <= 4 ? start(integral_constant<int, 5>{}, four) : start(integral_constant<int, 5>{}, eight);
  const auto three = integral_constant<int, 3>{};
  if (side <= 2) return start(three, integral_constant<int, 2>{});
  return side <= 4 ? start(three, four) : start(three, eight);
}

}  // namespace mobilemamba
