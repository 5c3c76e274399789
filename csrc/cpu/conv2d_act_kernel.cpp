// Dense convolution, as a matrix product.
//
// An item is a band of output rows. Its rows of the image come first into scratch, channels innermost, with their
// border of zeros: what is under a filter is then k runs of k · C numbers, and the sum over them needs no case of its
// own at the edges. A panel of filters' weights is met by all positions of the band before the next panel's.
#include "cpu/products.h"
#include "include/capability.h"
#include "include/conv2d_act.h"

DECLARE_KERNEL(conv2d_act, Conv2dActParams)

BEGIN_KERNELS
namespace {

// Rows of the image from `first` on, as many as the band needs, into scratch.
template <class T>
static void load_image(const Conv2dActParams& p, T* image, float* tile, int64_t b, int64_t first, int64_t rows) {
  const int64_t size = conv2d_padded_row(p), border = p.padding * p.channels, row = p.width * p.channels;
  const bool dense = p.x.channel == 1 && p.x.column == p.channels;
  for (int64_t y = first; y < first + rows; ++y, image += size) {
    if (y < 0 || y >= p.height || p.width == 0) {
      std::memset(image, 0, size * sizeof(T));
      continue;
    }
    std::memset(image, 0, border * sizeof(T));
    std::memset(image + size - border, 0, border * sizeof(T));
    T* to = image + border;
    if (dense) {
      with_type(p.x.at(b, 0, y, 0), [&](const auto* x) {
        for (int64_t i = 0; i < row; i += kLanes) {
          const int64_t some = row - i < kLanes ? row - i : kLanes;
          store_some(to + i, load_some(x + i, some), some);
        }
      });
      continue;
    }
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      const int64_t channels = p.channels - c < kLanes ? p.channels - c : kLanes;
      load_tile(tile, p.x.at(b, c, y, 0), p.x.channel, p.x.column, channels, p.width);
      for (int64_t x = 0; x < p.width; ++x) store_some(to + x * p.channels + c, load(tile + x * kLanes), channels);
    }
  }
}

}  // namespace

void conv2d_act(const Conv2dActParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kStep = kPanelVectors * kPackedLanes;
  const int64_t bands = conv2d_bands(p), size = conv2d_padded_row(p), bytes = p.weight.bfloat16 ? 2 : 4;
  char* image = reinterpret_cast<char*>(p.scratch);
  float* tile = p.scratch + conv2d_padded_rows(p) * size;
  float* sums = tile + (p.width + p.out_width) * kLanes;
  const bool in_place = p.y.channel == 1 && p.y.elements.dtype != DType::kFloat16;
  Slab slab{p.weight, p.bias, p.activation, nullptr, p.stride * p.channels, p.k, size, p.out_width, {}, 0, {}, {},
            0,        0};
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / bands, top = item % bands * p.rows, first = top * p.stride - p.padding;
    const int64_t bottom = top + p.rows < p.out_height ? top + p.rows : p.out_height;
    const int64_t rows = (bottom - top - 1) * p.stride + p.k;
    if (p.weight.bfloat16)
      load_image(p, reinterpret_cast<BFloat16*>(image), tile, b, first, rows);
    else
      load_image(p, reinterpret_cast<float*>(image), tile, b, first, rows);
    for (int64_t panel = 0; panel < packed_panels(p.filters); ++panel) {
      const int64_t from = panel_begin(p.filters, panel), to = panel_begin(p.filters, panel + 1);
      for (int64_t y = top; y < bottom; ++y) {
        slab.x = image + (y - top) * p.stride * size * bytes;
        slab.y = in_place ? p.y.at(b, 0, y, 0) : Elements{sums, DType::kFloat32} + -from;
        slab.y_step = in_place ? p.y.column : kStep;
        multiply(slab, panel, panel + 1);
        for (int64_t c = from; !in_place && c < to && c < p.filters; c += kLanes) {
          for (int64_t x = 0; x < p.out_width; ++x) store(tile + x * kLanes, load(sums + x * kStep + c - from));
          store_tile(tile, p.y.at(b, c, y, 0), p.y.channel, p.y.column, p.filters - c < kLanes ? p.filters - c : kLanes,
                     p.out_width);
        }
      }
    }
  }
}

END_KERNELS
