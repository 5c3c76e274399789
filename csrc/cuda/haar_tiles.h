// haar_dwt2d and haar_idwt2d by tiles: some channels of a map, or of a strip of its rows.
//
// A lane takes a 2×2 block of 16 bytes of channels (or of two): four loads, four stores, all of 16 bytes, where pixels
// and bands have their channels inside. A tensor whose channels are outermost and dense goes through shared memory: the
// channels of a tile of it lie one behind the other there, as in memory, from or to which they move 16 bytes a load and
// several on their way; lanes then read and write single elements. The slab of a lane's channels is followed by 16
// bytes where it would be an even number of those, so that neighbours are in different banks. Bytes: the pixels once,
// the bands once.
#pragma once

#include <numeric>

#include "cuda/haar.h"

namespace mobilemamba {

constexpr int kHaarThreads = 256;

// How the pixels or the bands of a tile lie in shared memory: pieces that are one run each in the tensor too.
struct HaarSlab {
  int length = 0, stride = 0, pitch = 0;  // of a piece, there, and here, in vectors
  int pieces = 0;                         // of the channels of a vector
  int channel = 0;                        // from one to the next in shared memory, in elements
  int threads = 1, at_once = 1;           // of a piece, and how many of these the block has
  Divisor by_threads;

  ANYWHERE int vector() const { return pieces * pitch; }  // from the channels of a vector to the next, in vectors
};

struct HaarTiles : HaarParams {
  bool pixels_inside, bands_inside;  // their channels
  int vectors, rows;                 // of a tile; rows and columns are those of bands
  int all_vectors, all_rows, columns;
  int channel_tiles, row_tiles;
  Divisor by_channel_tile, by_row_tile, by_vector, by_column;
  HaarSlab pixel_slab, band_slab;

  int64_t blocks() const { return batch * channel_tiles * row_tiles; }
  int64_t threads() const {
    return ceil_div(share(static_cast<int64_t>(vectors) * rows * columns, kHaarThreads), kWarp) * kWarp;
  }
  int64_t slab_vectors() const { return static_cast<int64_t>(vectors) * (pixel_slab.vector() + band_slab.vector()); }
};

// Copies pieces between a tensor and shared memory, of each so many vectors.
template <bool kFill, class Vector>
__device__ __forceinline__ void copy(const HaarSlab& slab, Vector* tensor, Vector* shared, int pieces, int length) {
  constexpr int kLoads = 4;
  const int first = slab.by_threads.quotient(threadIdx.x), step = slab.at_once;
  if (first >= step) return;
#pragma unroll 1
  for (int i = threadIdx.x - first * slab.threads; i < length; i += slab.threads) {
    unsigned there = first * slab.stride + i, here = first * slab.pitch + i;
#pragma unroll 1
    for (int piece = first; piece < pieces; piece += kLoads * step) {
      Vector v[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        if (piece + j * step < pieces)
          v[j] = kFill ? tensor[there + j * step * slab.stride] : shared[here + j * step * slab.pitch];
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        if (piece + j * step < pieces)
          (kFill ? shared[here + j * step * slab.pitch] : tensor[there + j * step * slab.stride]) = v[j];
      there += kLoads * step * slab.stride, here += kLoads * step * slab.pitch;
    }
  }
}

// The four pixels of a block or its four bands, of the channels of a vector.
template <class T, class Vector, bool kInside>
struct HaarVectors {
  static constexpr int kPairs = sizeof(Vector) / sizeof(TwoChannels<T>);

  T* base;
  unsigned place[4];  // from there
  bool inside[4];
  int channel;  // from one to the next, where not kInside
  TwoChannels<T> values[4][kPairs];

  __device__ __forceinline__ HaarVectors(T* base, int channel, int first, int one, int two, int three)
      : base(base),
        place{static_cast<unsigned>(first), static_cast<unsigned>(first + one), static_cast<unsigned>(first + two),
              static_cast<unsigned>(first + three)},
        inside{true, true, true, true},
        channel(channel) {}

  __device__ __forceinline__ void load() {
    if constexpr (kInside) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Vector v{};
        if (inside[j]) v = *reinterpret_cast<const Vector*>(base + place[j]);
        memcpy(values[j], &v, sizeof v);
      }
    }
  }
  __device__ __forceinline__ float2 get(int j, int pair) const {
    if constexpr (kInside) return values[j][pair].floats();
    const T* from = base + (place[j] + 2 * pair * channel);
    return inside[j] ? float2{to_float(from[0]), to_float(from[channel])} : float2{0.0f, 0.0f};
  }
  __device__ __forceinline__ void put(int j, int pair, float2 value) {
    const auto two = TwoChannels<T>::of(value);
    if constexpr (kInside) {
      values[j][pair] = two;
    } else if (inside[j]) {
      T both[2];
      memcpy(both, &two, sizeof both);
      T* to = base + (place[j] + 2 * pair * channel);
      to[0] = both[0], to[channel] = both[1];
    }
  }
  __device__ __forceinline__ void store() const {
    if constexpr (kInside) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Vector v;
        memcpy(&v, values[j], sizeof v);
        if (inside[j]) *reinterpret_cast<Vector*>(base + place[j]) = v;
      }
    }
  }
};

template <class T, class Vector, bool kInverse, bool kPixelsInside, bool kBandsInside>
__global__ void __launch_bounds__(kHaarThreads, 4) tiles_kernel(HaarTiles p) {
  constexpr int kChannels = sizeof(Vector) / sizeof(T);
  int item = p.by_channel_tile.quotient(blockIdx.x);
  const int first_vector = (static_cast<int>(blockIdx.x) - item * p.channel_tiles) * p.vectors;
  int first_row = 0;
  if (p.row_tiles != 1) {
    const int image = p.by_row_tile.quotient(item);
    first_row = (item - image * p.row_tiles) * p.rows, item = image;
  }
  const int vectors = p.all_vectors - first_vector < p.vectors ? p.all_vectors - first_vector : p.vectors;
  const int rows = p.all_rows - first_row < p.rows ? p.all_rows - first_row : p.rows;
  const int height = static_cast<int>(p.height) - 2 * first_row, width = static_cast<int>(p.width);
  const auto begin = [&](const Map& map, int row) {
    T* const image = static_cast<T*>(map.elements.data) + item * map.batch;
    return image +
           (int64_t{first_vector * kChannels} * static_cast<int>(map.channel) + row * static_cast<int>(map.row));
  };
  T* pixels = begin(p.pixels, 2 * first_row);
  T* bands = begin(p.bands, first_row);
  hide(pixels), hide(bands);  // an address is then one multiply-add
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(pixels)), __builtin_assume(__isGlobal(bands));
#endif
  auto* const pixel_slab = reinterpret_cast<Vector*>(shared_memory);
  auto* const band_slab = pixel_slab + (kPixelsInside ? 0 : p.vectors * p.pixel_slab.vector());

  const auto copy_pixels = [&] {
    const int used = (height < 2 * rows ? height : 2 * rows) * width / kChannels;
    copy<!kInverse>(p.pixel_slab, reinterpret_cast<Vector*>(pixels), pixel_slab, vectors * p.pixel_slab.pieces,
                    p.row_tiles == 1 ? p.pixel_slab.length : used);
  };
  const auto copy_bands = [&] {
    copy<kInverse>(p.band_slab, reinterpret_cast<Vector*>(bands), band_slab, vectors * p.band_slab.pieces,
                   p.row_tiles == 1 ? p.band_slab.length : rows * p.columns / kChannels);
  };
  if constexpr (kInverse ? !kBandsInside : !kPixelsInside) {
    kInverse ? copy_bands() : copy_pixels();
    __syncthreads();
  }

  const int count = p.vectors * rows * p.columns;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int position = p.by_vector.quotient(i), vector = i - position * p.vectors;
    const int y = p.by_column.quotient(position), x = position - y * p.columns;
    if (vector >= vectors) continue;
    const auto block = [&] {
      if constexpr (kPixelsInside) {
        const int row = static_cast<int>(p.pixels.row), column = static_cast<int>(p.pixels.column);
        return HaarVectors<T, Vector, true>(pixels, 1, 2 * y * row + 2 * x * column + vector * kChannels, column, row,
                                            row + column);
      } else {
        return HaarVectors<T, Vector, false>(reinterpret_cast<T*>(pixel_slab), p.pixel_slab.channel,
                                             vector * p.pixel_slab.vector() * kChannels + 2 * y * width + 2 * x, 1,
                                             width, width + 1);
      }
    };
    const auto block_of_bands = [&] {
      const int band = kBandsInside ? static_cast<int>(p.band) : p.band_slab.channel / 4;
      if constexpr (kBandsInside) {
        const int row = static_cast<int>(p.bands.row), column = static_cast<int>(p.bands.column);
        return HaarVectors<T, Vector, true>(bands, 1, y * row + x * column + vector * kChannels, band, 2 * band,
                                            3 * band);
      } else {
        return HaarVectors<T, Vector, false>(reinterpret_cast<T*>(band_slab), p.band_slab.channel,
                                             vector * p.band_slab.vector() * kChannels + position, band, 2 * band,
                                             3 * band);
      }
    };
    HaarVectors own = block();
    HaarVectors transformed = block_of_bands();
    own.inside[1] = 2 * x + 1 < width, own.inside[2] = 2 * y + 1 < height;
    own.inside[3] = own.inside[1] && own.inside[2];
    const auto transform = [](auto& from, auto& to) {
      from.load();
#pragma unroll
      for (int pair = 0; pair < kChannels / 2; ++pair) {
        HaarBlock a, b;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 two = from.get(j, pair);
          a.v[j] = two.x, b.v[j] = two.y;
        }
        a = a.transformed(), b = b.transformed();
#pragma unroll
        for (int j = 0; j < 4; ++j) to.put(j, pair, {a.v[j], b.v[j]});
      }
      to.store();
    };
    if constexpr (kInverse)
      transform(transformed, own);
    else
      transform(own, transformed);
  }

  if constexpr (kInverse ? !kPixelsInside : !kBandsInside) {
    __syncthreads();
    kInverse ? copy_pixels() : copy_bands();
  }
}

// Plans tiles of vectors of v channels; says whether pixels and bands allow them.
inline bool plan_haar_tiles(HaarTiles& p, int v) {
  constexpr int64_t kMost = 1 << 28, kMostWidth = 1 << 16, kMostBytes = 64 << 10, kSectors = 64;
  const int64_t h = half(p.height), w = half(p.width), pixels = p.height * p.width, bands = h * w;
  const int64_t vector_bytes = v * element_size(p.pixels.elements.dtype);
  if (p.height == 1) p.pixels.row = 0;
  if (p.width == 1) p.pixels.column = 0;
  if (h == 1) p.bands.row = 0;
  if (w == 1) p.bands.column = 0;
  const auto inside = [&](const Map& map, int64_t rows, int64_t columns, int64_t band) {
    const int64_t last = (rows - 1) * map.row + (columns - 1) * map.column + 3 * band + p.channels;
    return map.channel == 1 && (map.row | map.column | band) % v == 0 && last <= kMost;
  };
  const auto dense = [&](const Map& map, int64_t channel, int64_t rows, int64_t columns) {
    return map.channel == channel && (rows == 1 || map.row == columns) && (columns == 1 || map.column == 1) &&
           channel * v <= kMost;
  };
  p.pixels_inside = inside(p.pixels, p.height, p.width, 0), p.bands_inside = inside(p.bands, h, w, p.band);
  const bool pixels_dense = dense(p.pixels, pixels, p.height, p.width);
  const bool bands_dense = dense(p.bands, 4 * bands, h, w) && p.band == bands;
  if (pixels_dense && bands_dense && p.pixels.batch == p.channels * pixels && p.bands.batch == 4 * p.channels * bands)
    p.channels *= p.batch, p.batch = 1;
  if (p.batch == 1) p.pixels.batch = p.bands.batch = 0;
  const auto aligned = [&](const Map& map) {
    return map.elements.dtype == p.pixels.elements.dtype && map.batch % v == 0 &&
           reinterpret_cast<uintptr_t>(map.elements.data) % vector_bytes == 0;
  };
  if (!(p.pixels_inside || pixels_dense) || !(p.bands_inside || bands_dense) || !aligned(p.pixels) ||
      !aligned(p.bands) || p.channels % v != 0 || p.channels > kMost || p.width > kMostWidth)
    return false;

  p.all_vectors = static_cast<int>(p.channels / v), p.all_rows = static_cast<int>(h), p.columns = static_cast<int>(w);
  p.by_column = Divisor(w);
  const auto divide = [&](int64_t most_vectors, int64_t rows) {
    p.vectors = static_cast<int>(share(p.all_vectors, most_vectors)), p.rows = static_cast<int>(rows);
    p.channel_tiles = static_cast<int>(ceil_div(p.all_vectors, p.vectors));
    p.row_tiles = static_cast<int>(ceil_div(h, rows));
    p.by_vector = Divisor(p.vectors), p.by_channel_tile = Divisor(p.channel_tiles);
    p.by_row_tile = Divisor(p.row_tiles);
    const int threads = static_cast<int>(p.threads());
    const auto slab = [&](bool needed, int runs, int run, int part) {  // of a channel; of elements; what a tile has
      if (!needed) return HaarSlab{};
      const int channel = runs * run;
      HaarSlab s = rows == h ? HaarSlab{channel, channel, channel | 1, 1, channel}
                             : HaarSlab{part / v, run / v, part / v, runs * v, runs * part};
      s.threads = static_cast<int>(share(s.length, threads)), s.at_once = threads / s.threads;
      s.by_threads = Divisor(s.threads);
      return s;
    };
    p.pixel_slab = slab(!p.pixels_inside, 1, pixels, 2 * rows * p.width);
    p.band_slab = slab(!p.bands_inside, 4, bands, rows * w);
    return p.slab_vectors() * vector_bytes;
  };
  if (p.pixels_inside && p.bands_inside) {
    const int64_t vectors = share(p.all_vectors, kWarp);
    divide(vectors, share(h, between(kHaarThreads / (vectors * w), 1, h)));
  } else {
    const int64_t least = p.pixels_inside || p.bands_inside ? kSectors / vector_bytes : 1;
    if (divide(between(kHaarThreads / bands, least, kHaarThreads), h) > kMostBytes) {
      const int64_t step = v / std::gcd(w, int64_t{v}), bytes = divide(least, step);
      if (pixels % v != 0 || bands % v != 0 || 2 * step * p.width % v != 0 || step >= h || bytes > kMostBytes)
        return false;
      divide(least, step * between(kMostBytes / 2 / bytes, 1, (h - 1) / step));
    }
  }
  return (p.blocks() + 1) * p.channel_tiles * p.row_tiles < UINT32_MAX && p.blocks() < kMostBlocks;
}

// Launches the kernel on tiles if pixels and bands allow it, else `general`.
template <bool kInverse>
cudaError_t launch_haar(void (*general)(HaarParams), const HaarParams& params, cudaStream_t stream) {
  HaarTiles p{params};
  const bool wide = plan_haar_tiles(p, static_cast<int>(16 / element_size(p.pixels.elements.dtype)));
  if (!wide && !plan_haar_tiles(p = HaarTiles{params}, 2))
    return launch(general, params, haar_columns(params).items(), Columns::kThreads, 0, stream);
  const auto start = [&](auto element, auto vector) {
    using T = decltype(element);
    using Vector = decltype(vector);
    const auto kernel = p.pixels_inside  ? p.bands_inside ? tiles_kernel<T, Vector, kInverse, true, true>
                                                          : tiles_kernel<T, Vector, kInverse, true, false>
                        : p.bands_inside ? tiles_kernel<T, Vector, kInverse, false, true>
                                         : tiles_kernel<T, Vector, kInverse, false, false>;
    const int64_t floats = ceil_div(p.slab_vectors() * static_cast<int64_t>(sizeof(Vector)), sizeof(float));
    return launch_blocks(kernel, p.blocks(), static_cast<unsigned>(p.threads()), floats, stream, p);
  };
  return with_element(p.pixels.elements.dtype, [&](auto element) {
    return wide ? start(element, SixteenBytes{}) : start(element, TwoChannels<decltype(element)>{});
  });
}

}  // namespace mobilemamba
