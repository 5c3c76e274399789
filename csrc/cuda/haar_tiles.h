// haar_dwt2d and haar_idwt2d by tiles: some channels of a map, or of a strip of its rows.
//
// A thread takes two 2×2 blocks that follow each other, 16 bytes of channels (or two): eight loads and eight stores of
// 16 bytes where channels are inside, as all of channels-last maps are, bands with the four of a channel side by side.
// A tensor whose channels are outermost and dense goes through shared memory, where those of a tile lie one behind the
// other as in memory, from or to which they move 16 bytes a load and four on their way; threads then read and write
// single elements. 16 bytes are left free behind the channels of a thread where neighbours would else be in the same
// banks. Bytes: the pixels once, the bands once.
#pragma once

#include <numeric>

#include "cuda/haar.h"

namespace mobilemamba {

constexpr int kHaarThreads = 128;

// How the pixels or the bands of a tile lie in shared memory: pieces that are one run each in the tensor too.
struct HaarSlab {
  int length = 0, stride = 0, pitch = 0;  // of a piece, there, and here, in vectors
  int pieces = 0;                         // of the channels of a vector
  int channel = 0;                        // from one to the next in shared memory, in elements
  Divisor by_length;

  ANYWHERE int vector() const { return pieces * pitch; }  // from the channels of a vector to the next, in vectors
};

struct HaarTiles : HaarParams {
  bool pixels_inside, bands_inside;  // their channels, and those with the four bands of each
  int vectors, rows;                 // of a tile; rows and columns are those of bands
  int all_vectors, all_rows, columns;
  unsigned channel_tiles, row_tiles;
  Divisor by_vector, by_column;
  HaarSlab pixel_slab, band_slab;

  int64_t blocks() const { return batch * channel_tiles * row_tiles; }
  int64_t slab_vectors() const { return static_cast<int64_t>(vectors) * (pixel_slab.vector() + band_slab.vector()); }
};

// Copies so many pieces between a tensor and shared memory, of each what the tensor has of it: all, where kWhole.
template <bool kFill, bool kWhole, class Vector>
__device__ __forceinline__ void copy(const HaarSlab& slab, Vector* tensor, Vector* shared, int pieces, int length) {
  constexpr int kLoads = 4;
  const int count = pieces * slab.length;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kLoads * kHaarThreads) {
    Vector v[kLoads];
    int there[kLoads], here[kLoads];
    bool inside[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int index = i + j * kHaarThreads, piece = slab.by_length.quotient(index);
      there[j] = kWhole ? index : index + piece * (slab.stride - slab.length);
      here[j] = index + piece * (slab.pitch - slab.length);
      inside[j] = index < count && (kWhole || index - piece * slab.length < length);
      if (inside[j]) v[j] = kFill ? tensor[there[j]] : shared[here[j]];
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
      if (inside[j]) (kFill ? shared[here[j]] : tensor[there[j]]) = v[j];
  }
}

enum class HaarLayout {
  kShared,      // single elements
  kInside,      // vectors of channels, one of each of the four
  kInterleaved  // vectors of the four of a channel, then of the next
};

// The four pixels of a block or its four bands, of the channels of a vector.
template <class T, class Vector, HaarLayout kLayout>
struct HaarVectors {
  static constexpr int kPairs = sizeof(Vector) / sizeof(TwoChannels<T>);

  T* base;
  int channel;  // from one to the next, where they are kShared
  int place[4];
  bool exists[4];
  TwoChannels<T> words[4 * kPairs];

  __device__ __forceinline__ void load() {
    if constexpr (kLayout != HaarLayout::kShared) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Vector v{};
        if (exists[j]) v = *reinterpret_cast<const Vector*>(base + place[j]);
        memcpy(words + j * kPairs, &v, sizeof v);
      }
    }
  }
  // Of channels 2 pair and 2 pair + 1.
  __device__ __forceinline__ void get(int pair, HaarBlock& a, HaarBlock& b) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (kLayout == HaarLayout::kShared) {
        const T* from = base + (place[j] + 2 * pair * channel);
        a.v[j] = exists[j] ? to_float(from[0]) : 0.0f, b.v[j] = exists[j] ? to_float(from[channel]) : 0.0f;
      } else if constexpr (kLayout == HaarLayout::kInside) {
        const float2 two = words[j * kPairs + pair].floats();
        a.v[j] = two.x, b.v[j] = two.y;
      } else {
        const float2 two = words[4 * pair + j].floats();
        (j < 2 ? a : b).v[2 * j % 4] = two.x, (j < 2 ? a : b).v[2 * j % 4 + 1] = two.y;
      }
    }
  }
  __device__ __forceinline__ void put(int pair, const HaarBlock& a, const HaarBlock& b) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const HaarBlock& own = j < 2 ? a : b;
      const auto two =
          TwoChannels<T>::of(kLayout == HaarLayout::kInterleaved ? float2{own.v[2 * j % 4], own.v[2 * j % 4 + 1]}
                                                                 : float2{a.v[j], b.v[j]});
      if constexpr (kLayout == HaarLayout::kShared) {
        T both[2];
        memcpy(both, &two, sizeof both);
        T* to = base + (place[j] + 2 * pair * channel);
        if (exists[j]) to[0] = both[0], to[channel] = both[1];
      } else {
        words[kLayout == HaarLayout::kInside ? j * kPairs + pair : 4 * pair + j] = two;
      }
    }
  }
  __device__ __forceinline__ void store() const {
    if constexpr (kLayout != HaarLayout::kShared) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Vector v;
        memcpy(&v, words + j * kPairs, sizeof v);
        for (uint32_t& word : v.words) hide(word);  // or each is stored by itself
        if (exists[j]) *reinterpret_cast<Vector*>(base + place[j]) = v;
      }
    }
  }
};

template <class T, class Vector, bool kInverse, bool kPixelsInside, bool kBandsInside>
__global__ void __launch_bounds__(kHaarThreads, 5) tiles_kernel(HaarTiles p) {
  constexpr int kChannels = sizeof(Vector) / sizeof(T), kBlocks = 2;
  unsigned image = blockIdx.x / p.channel_tiles;
  const int first_vector = static_cast<int>(blockIdx.x - image * p.channel_tiles) * p.vectors;
  int first_row = 0;
  if (p.row_tiles != 1) first_row = static_cast<int>(image % p.row_tiles) * p.rows, image /= p.row_tiles;
  const int vectors = p.all_vectors - first_vector < p.vectors ? p.all_vectors - first_vector : p.vectors;
  const int rows = p.all_rows - first_row < p.rows ? p.all_rows - first_row : p.rows;
  const int height = static_cast<int>(p.height) - 2 * first_row, width = static_cast<int>(p.width);
  const auto begin = [&](const Map& map, int row) {
    const int64_t channel = int64_t{first_vector * kChannels} * static_cast<int>(map.channel);
    T* first = static_cast<T*>(map.elements.data) + (image * map.batch + channel + row * static_cast<int>(map.row));
    hide(first);  // an address is then one multiply-add
    return first;
  };
  T* const pixels = begin(p.pixels, 2 * first_row);
  T* const bands = begin(p.bands, first_row);
  auto* const pixel_slab = reinterpret_cast<Vector*>(shared_memory);
  auto* const band_slab = pixel_slab + (kPixelsInside ? 0 : p.vectors * p.pixel_slab.vector());
  const auto copy_slab = [&](auto fill, const HaarSlab& slab, T* tensor, Vector* shared, int part) {
    const int pieces = vectors * slab.pieces;
    if (p.row_tiles == 1)
      copy<decltype(fill)::value, true>(slab, reinterpret_cast<Vector*>(tensor), shared, pieces, 0);
    else
      copy<decltype(fill)::value, false>(slab, reinterpret_cast<Vector*>(tensor), shared, pieces, part / kChannels);
  };
  const auto copy_pixels = [&] {
    copy_slab(std::bool_constant<!kInverse>{}, p.pixel_slab, pixels, pixel_slab,
              (height < 2 * rows ? height : 2 * rows) * width);
  };
  const auto copy_bands = [&] {
    copy_slab(std::bool_constant<kInverse>{}, p.band_slab, bands, band_slab, rows * p.columns);
  };
  if constexpr (kInverse && !kBandsInside) copy_bands(), __syncthreads();
  if constexpr (!kInverse && !kPixelsInside) copy_pixels(), __syncthreads();

  const int positions = rows * p.columns, count = (positions + kBlocks - 1) / kBlocks * p.vectors;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kHaarThreads) {
    const int group = p.by_vector.quotient(i), vector = i - group * p.vectors, first = kBlocks * group;
    if (vector >= vectors) continue;
    HaarVectors<T, Vector, kPixelsInside ? HaarLayout::kInside : HaarLayout::kShared> pixel[kBlocks];
    HaarVectors<T, Vector, kBandsInside ? HaarLayout::kInterleaved : HaarLayout::kShared> band[kBlocks];
    int y = p.by_column.quotient(first), x = first - y * p.columns;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const bool exists = n == 0 || first + n < positions;
      auto& own = pixel[n];
      int row = width, column = 1, from = vector * p.pixel_slab.vector() * kChannels;
      if constexpr (kPixelsInside)
        row = static_cast<int>(p.pixels.row), column = static_cast<int>(p.pixels.column), from = vector * kChannels;
      own.base = kPixelsInside ? pixels : reinterpret_cast<T*>(pixel_slab), own.channel = p.pixel_slab.channel;
      own.place[0] = from + 2 * (y * row + x * column), own.place[1] = own.place[0] + column;
      own.place[2] = own.place[0] + row, own.place[3] = own.place[1] + row;
      own.exists[0] = exists, own.exists[1] = exists && 2 * x + 1 < width;
      own.exists[2] = exists && 2 * y + 1 < height, own.exists[3] = own.exists[1] && own.exists[2];
      auto& bands_of_it = band[n];
      bands_of_it.base = kBandsInside ? bands : reinterpret_cast<T*>(band_slab);
      bands_of_it.channel = p.band_slab.channel;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        bands_of_it.exists[j] = exists;
        if constexpr (kBandsInside)
          bands_of_it.place[j] =
              y * static_cast<int>(p.bands.row) + x * static_cast<int>(p.bands.column) + (4 * vector + j) * kChannels;
        else
          bands_of_it.place[j] = vector * p.band_slab.vector() * kChannels + j * (p.band_slab.channel / 4) + first + n;
      }
      if (++x == p.columns) x = 0, ++y;
    }
    const auto transform = [](auto& from, auto& to) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) from[n].load();
#pragma unroll
      for (int pair = 0; pair < kChannels / 2; ++pair)
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          HaarBlock a, b;
          from[n].get(pair, a, b);
          to[n].put(pair, a.transformed(), b.transformed());
        }
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) to[n].store();
    };
    if constexpr (kInverse)
      transform(band, pixel);
    else
      transform(pixel, band);
  }

  if constexpr (kInverse && !kPixelsInside) __syncthreads(), copy_pixels();
  if constexpr (!kInverse && !kBandsInside) __syncthreads(), copy_bands();
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
  const auto inside = [&](const Map& map, int64_t channel, int64_t rows, int64_t columns) {
    const int64_t last = (rows - 1) * map.row + (columns - 1) * map.column + channel * p.channels;
    return map.channel == channel && (map.row | map.column) % v == 0 && last <= kMost;
  };
  const auto dense = [&](const Map& map, int64_t channel, int64_t rows, int64_t columns) {
    return map.channel == channel && (rows == 1 || map.row == columns) && (columns == 1 || map.column == 1) &&
           channel * v <= kMost;
  };
  p.pixels_inside = inside(p.pixels, 1, p.height, p.width);
  p.bands_inside = inside(p.bands, 4, h, w) && p.band == 1;
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
    p.channel_tiles = static_cast<unsigned>(ceil_div(p.all_vectors, p.vectors));
    p.row_tiles = static_cast<unsigned>(ceil_div(h, rows)), p.by_vector = Divisor(p.vectors);
    const auto slab = [&](bool needed, int runs, int run, int part) {  // of a channel; of elements; what a tile has
      if (!needed) return HaarSlab{};
      const int channel = runs * run;
      return rows == h ? HaarSlab{channel, channel, channel | 1, 1, channel, Divisor(channel)}
                       : HaarSlab{part / v, run / v, part / v, runs * v, runs * part, Divisor(part / v)};
    };
    p.pixel_slab = slab(!p.pixels_inside, 1, pixels, 2 * rows * p.width);
    p.band_slab = slab(!p.bands_inside, 4, bands, rows * w);
    return p.slab_vectors() * vector_bytes;
  };
  if (p.pixels_inside && p.bands_inside) {
    const int64_t vectors = share(p.all_vectors, kWarp);
    divide(vectors, share(h, between(2 * kHaarThreads / (vectors * w), 1, h)));
  } else {
    const int64_t least = p.pixels_inside || p.bands_inside ? kSectors / vector_bytes : 1;
    if (divide(between(kHaarThreads / ceil_div(bands, 2), least, kHaarThreads), h) > kMostBytes) {
      const int64_t step = v / std::gcd(w, int64_t{v}), bytes = divide(least, step);
      if (pixels % v != 0 || bands % v != 0 || 2 * step * p.width % v != 0 || step >= h || bytes > kMostBytes)
        return false;
      divide(least, step * between(kMostBytes / 2 / bytes, 1, (h - 1) / step));
    }
  }
  return p.blocks() <= kMostBlocks;
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
    return launch_blocks(kernel, p.blocks(), kHaarThreads, floats, stream, p);
  };
  return with_element(p.pixels.elements.dtype, [&](auto element) {
    return wide ? start(element, SixteenBytes{}) : start(element, TwoChannels<decltype(element)>{});
  });
}

}  // namespace mobilemamba
