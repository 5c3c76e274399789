// Dense convolution: lanes are filters, so that an element of the image, spread over a register, meets a row of
// weights.
//
// An item is a band of output rows. Its rows of the image come first into scratch, as float32, channels innermost, with
// their border of zeros: a row under the filter is then k · C numbers in a row, and the sum over them needs no case of
// its own at the edges. Up to kPositions outputs of kVectors registers of filters stay in registers for all k · k · C
// products: eight elements and three rows of weights are loaded for 24 multiply-adds. A block of filters' weights is
// met by all positions of the band before the next block's.
#include "cpu/activation.h"
#include "cpu/tile.h"
#include "include/capability.h"
#include "include/conv2d_act.h"

DECLARE_KERNEL(conv2d_act, Conv2dActParams)

BEGIN_KERNELS
namespace {

#if defined(__AVX512F__)
constexpr int kPositions = 8, kVectors = 3;  // of 32 registers
#else
constexpr int kPositions = 6, kVectors = 2;  // of 16
#endif

// Rows of the image from `first` on, as many as the band needs, into scratch.
static void load_image(const Conv2dActParams& p, float* image, float* tile, int64_t b, int64_t first, int64_t rows) {
  const int64_t size = conv2d_padded_row(p), border = p.padding * p.channels;
  const bool dense = p.x.channel == 1 && p.x.column == p.channels;
  for (int64_t y = first; y < first + rows; ++y, image += size) {
    if (y < 0 || y >= p.height || p.width == 0) {
      std::memset(image, 0, size * sizeof(float));
      continue;
    }
    std::memset(image, 0, border * sizeof(float));
    std::memset(image + size - border, 0, border * sizeof(float));
    if (dense) {
      load_row(image + border, p.x.at(b, 0, y, 0), 1, p.width * p.channels);
      continue;
    }
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      const int64_t channels = p.channels - c < kLanes ? p.channels - c : kLanes;
      load_tile(tile, p.x.at(b, c, y, 0), p.x.channel, p.x.column, channels, p.width);
      for (int64_t x = 0; x < p.width; ++x)
        store_some(image + border + x * p.channels + c, load(tile + x * kLanes), channels);
    }
  }
}

// kCount outputs of kSome registers of filters; x: the first element under the first output's filter.
template <int kCount, int kSome>
static void sum_products(const Conv2dActParams& p, float* y, int64_t y_step, const float* x, const float* weight,
                         const float* bias) {
  const int64_t row = conv2d_padded_row(p), step = p.stride * p.channels, run = p.k * p.channels;
  constexpr std::make_integer_sequence<int, kCount> outputs{};
  constexpr std::make_integer_sequence<int, kSome> vectors{};
  Vec sum[kCount][kSome];
  unrolled(outputs, [&](auto i) { unrolled(vectors, [&](auto v) { sum[i][v] = load(bias + v * kLanes); }); });
  for (int64_t r = 0; r < p.k; ++r, x += row)
    for (int64_t j = 0; j < run; ++j, weight += p.columns) {
      Vec w[kSome];
      unrolled(vectors, [&](auto v) { w[v] = load(weight + v * kLanes); });
      unrolled(outputs, [&](auto i) {
        const Vec element = splat(x[i * step + j]);
        unrolled(vectors, [&](auto v) { sum[i][v] += element * w[v]; });
      });
    }
  with_activation(p.activation, [&](auto act) {
    unrolled(outputs,
             [&](auto i) { unrolled(vectors, [&](auto v) { store(y + i * y_step + v * kLanes, act(sum[i][v])); }); });
  });
}

// A row of outputs of a block of filters, in parts of equal size.
template <int kSome>
static void sum_row(const Conv2dActParams& p, float* y, int64_t y_step, const float* x, const float* weight,
                    const float* bias) {
  const int64_t parts = (p.out_width + kPositions - 1) / kPositions;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = part * p.out_width / parts, end = (part + 1) * p.out_width / parts;
    with_count<kPositions>(end - first, [&](auto count) {
      sum_products<count, kSome>(p, y + first * y_step, y_step, x + first * p.stride * p.channels, weight, bias);
    });
  }
}

}  // namespace

void conv2d_act(const Conv2dActParams& p, int64_t begin, int64_t end) {
  const int64_t bands = conv2d_bands(p), size = conv2d_padded_row(p);
  float* image = p.scratch;
  float* tile = image + conv2d_padded_rows(p) * size;
  float* sums = tile + p.width * kLanes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / bands, top = item % bands * p.rows;
    const int64_t bottom = top + p.rows < p.out_height ? top + p.rows : p.out_height;
    load_image(p, image, tile, b, top * p.stride - p.padding, (bottom - top - 1) * p.stride + p.k);
    for (int64_t c = 0; c < p.filters;) {
      const int64_t left = p.filters - c, vectors = left < kVectors * kLanes ? (left + kLanes - 1) / kLanes : kVectors;
      const bool direct = p.y.channel == 1 && p.y.elements.dtype == DType::kFloat32 && left >= vectors * kLanes;
      with_count<kVectors>(direct ? vectors : 1, [&](auto some) {
        const int64_t filters = left < some * kLanes ? left : some * kLanes;
        for (int64_t y = top; y < bottom; ++y) {
          const Elements out = p.y.at(b, c, y, 0);
          float* to = direct ? static_cast<float*>(out.data) : sums;
          sum_row<some>(p, to, direct ? p.y.column : kLanes, image + (y - top) * p.stride * size, p.weight + c,
                        p.bias + c);
          if (!direct) store_tile(sums, out, p.y.channel, p.y.column, filters, p.out_width);
        }
        c += some * kLanes;
      });
    }
  }
}

END_KERNELS
