// Depthwise convolution: one lane a channel, so a tap is one multiply-add of a vector of inputs and one of weights.
//
// An item is a band of output rows of a group of blocks of kLanes channels. The group's weights are transposed once, to
// [tap][lane], and stay in cache for the images that follow. Up to eight output columns are computed together: their
// sums and a row of the filter live in registers, so that an input loaded once meets all the taps it has there, and
// taps over the border are skipped when the kernel is compiled. At k = 3 that is 9 multiply-adds and 5 loads an output,
// at k = 7 49 and 19. Filters other than the common ones load an input for each tap.
//
// A float32 channels-last image is read in place, row by row, all blocks of a row one after the other, as it lies in
// memory; its outputs go from registers to memory. Other images become float32 tiles first: k rows of the group at a
// time when channels-last, else the whole band of one block, transposed; and their sums pass through the first cache to
// activation, residual and store. Memory sees x, residual and y once each.
#include "cpu/activation.h"
#include "cpu/tile.h"
#include "include/capability.h"
#include "include/depthwise_conv2d_act.h"

DECLARE_KERNEL(depthwise_conv2d_act, DepthwiseConv2dActParams)

BEGIN_KERNELS
namespace {

constexpr int kColumns = 8;  // at least twice the padding of the filters with compiled borders

// What one row of outputs of a block of channels is made of, and where it goes.
struct Window {
  const float* x;        // column 0 of the first row of the image under the filter
  const float* wrap;     // where a tile ends, and
  int64_t size;          // how far back its first row is
  int64_t row, column;   // strides
  int64_t rows;          // that the filter has in the image
  const float* weights;  // [tap][lane], from the filter's first row in the image on
  const float* bias;     // [lane]
  float* y;              // [column][lane]: y itself when `stored`, else the sums, to be finished later
  const float* residual;
  int64_t y_column, residual_column;  // strides
  bool stored;
  float low;             // the least that activation leaves of a sum
  int64_t part, longer;  // columns computed together, and how often one more
};

// Asks for a row of a block in the second cache. A block is too short a piece of memory for the processor to foresee
// the next row; from memory the kernel takes two thirds of the time with this, from the last cache a twentieth more.
INLINE void prefetch(const float* row, int64_t column, int64_t columns) {
  for (int64_t i = 0; i < columns; ++i) __builtin_prefetch(row + i * column, 0, 2);
}

// Outputs from column `first` on leave the registers.
template <int... kIndex>
INLINE void emit(const Window& w, int64_t first, const Vec* acc, std::integer_sequence<int, kIndex...> outputs) {
  float* y = w.y + first * w.y_column;
  if (w.residual) {
    const float* residual = w.residual + first * w.residual_column;
    unrolled(outputs, [&](auto n) {
      store(y + n * w.y_column, at_least(acc[n], splat(w.low)) + load(residual + n * w.residual_column));
    });
  } else if (w.stored) {
    unrolled(outputs, [&](auto n) { store(y + n * w.y_column, at_least(acc[n], splat(w.low))); });
  } else {
    unrolled(outputs, [&](auto n) { store(y + n * kLanes, acc[n]); });
  }
}

// kCount outputs from column `first` on: kK×kK taps, padded by kK / 2, at the left or right border or not.
template <int kK, int kStride, int kCount, bool kLeft, bool kRight>
static void sum_columns(const Window& w, int64_t first) {
  constexpr int kPadding = kK / 2, kColumnsIn = (kCount - 1) * kStride + kK;
  constexpr int kBegin = kLeft ? kPadding : 0, kEnd = kColumnsIn - (kRight ? kPadding : 0);
  constexpr std::make_integer_sequence<int, kCount> outputs{};
  constexpr std::make_integer_sequence<int, kK> taps{};
  const float* x = w.x;
  const float* weights = w.weights;
  Vec acc[kCount], tap[kK];
  unrolled(outputs, [&](auto n) { acc[n] = load(w.bias); });
  for (int64_t row = 0; row < w.rows; ++row, weights += kK * kLanes) {
    unrolled(taps, [&](auto t) { tap[t] = load(weights + t * kLanes); });
    const float* in = x + (first * kStride - kPadding + kBegin) * w.column;
    unrolled(std::make_integer_sequence<int, kEnd - kBegin>{}, [&](auto i) {
      const Vec v = held(load(in));
      unrolled(outputs, [&](auto n) {
        constexpr int t = kBegin + i - n * kStride;
        if constexpr (t >= 0 && t < kK) acc[n] += v * tap[t];
      });
      in += w.column;
    });
    x += w.row;
    if (x == w.wrap) x -= w.size;
  }
  emit(w, first, acc, outputs);
}

// kCount outputs from column `first` on, of any filter.
template <int kCount>
static void sum_columns(const DepthwiseConv2dActParams& p, const Window& w, int64_t first) {
  constexpr std::make_integer_sequence<int, kCount> outputs{};
  const int64_t left = first * p.stride - p.padding;
  const float* x = w.x;
  const float* weights = w.weights;
  Vec acc[kCount];
  unrolled(outputs, [&](auto n) { acc[n] = load(w.bias); });
  for (int64_t row = 0; row < w.rows; ++row) {
    for (int64_t column = left; column < left + p.k; ++column, weights += kLanes) {
      const Vec tap = load(weights);
      unrolled(outputs, [&](auto n) {
        const int64_t c = column + n * p.stride;
        if (c >= 0 && c < p.width) acc[n] += load(x + c * w.column) * tap;
      });
    }
    x += w.row;
    if (x == w.wrap) x -= w.size;
  }
  emit(w, first, acc, outputs);
}

// A row of outputs, part by part. kK = 0: any filter.
template <int kK, int kStride>
static void sum_row(const DepthwiseConv2dActParams& p, const Window& w) {
  for (int64_t first = 0, end; first < p.out_width; first = end) {
    end = first + w.part + (first < w.longer * (w.part + 1));
    const bool left = first == 0, right = (end - 1) * p.stride - p.padding + p.k > p.width;
    with_count<kColumns>(end - first, [&](auto count) {
      if constexpr (kK == 0) {
        sum_columns<count>(p, w, first);
      } else if (left) {
        right ? sum_columns<kK, kStride, count, true, true>(w, first)
              : sum_columns<kK, kStride, count, true, false>(w, first);
      } else {
        right ? sum_columns<kK, kStride, count, false, true>(w, first)
              : sum_columns<kK, kStride, count, false, false>(w, first);
      }
    });
  }
}

using SumRow = void (*)(const DepthwiseConv2dActParams&, const Window&);

static SumRow choose(const DepthwiseConv2dActParams& p) {
  if (p.padding == p.k / 2) {
    if (p.k == 3 && p.stride == 1) return sum_row<3, 1>;
    if (p.k == 3 && p.stride == 2) return sum_row<3, 2>;
    if (p.k == 5 && p.stride == 1) return sum_row<5, 1>;
    if (p.k == 7 && p.stride == 1) return sum_row<7, 1>;
  }
  return sum_row<0, 0>;
}

// What follows the activation, [lane] of a group's channels; null where there is none.
struct Scaling {
  const float* scale;
  const float* shift;

  Scaling operator+(int64_t lane) const { return {scale ? scale + lane : nullptr, shift ? shift + lane : nullptr}; }
  explicit operator bool() const { return scale || shift; }
  Vec operator()(Vec v) const {
    if (scale) v *= load(scale);
    return shift ? v + load(shift) : v;
  }
};

// y = activation(y) · scale + shift + residual for a row of y, of channels that fill vectors.
static void finish_row(const DepthwiseConv2dActParams& p, float* y, const float* residual, const Scaling& scaling,
                       int64_t channels) {
  with_activation(p.activation, [&](auto act) {
    for (int64_t i = 0; i < p.out_width; ++i, y += p.y.column, residual += residual ? p.residual.column : 0)
      for (int64_t c = 0; c < channels; c += kLanes) {
        const Vec v = (scaling + c)(act(load(y + c)));
        store(y + c, residual ? v + load(residual + c) : v);
      }
  });
}

// y = activation(sums) · scale + shift + residual for `positions` positions from (b, c, row, 0) on, in joined rows.
static void finish(const DepthwiseConv2dActParams& p, const Scaling& scaling, float* sums, float* added, int64_t b,
                   int64_t c, int64_t row, int64_t channels, int64_t positions) {
  const Elements y = p.y.at(b, c, row, 0);
  const Elements residual = p.residual ? p.residual.at(b, c, row, 0) : Elements{};
  if (p.activation != Activation::kNone || scaling)
    with_activation(p.activation, [&](auto act) {
      for (int64_t i = 0; i < positions * kLanes; i += kLanes) store(sums + i, scaling(act(load(sums + i))));
    });
  if (residual && p.residual.channel == 1 && p.y.channel == 1) {
    with_type(residual, [&](const auto* r) {
      with_type(y, [&](auto* out) {
        for (int64_t i = 0; i < positions; ++i)
          store_some(out + i * p.y.column, load(sums + i * kLanes) + load_some(r + i * p.residual.column, channels),
                     channels);
      });
    });
    return;
  }
  if (residual) {
    load_tile(added, residual, p.residual.channel, p.residual.column, channels, positions);
    for (int64_t i = 0; i < positions * kLanes; i += kLanes) store(sums + i, load(sums + i) + load(added + i));
  }
  store_tile(sums, y, p.y.channel, p.y.column, channels, positions);
}

}  // namespace

void depthwise_conv2d_act(const DepthwiseConv2dActParams& p, int64_t begin, int64_t end) {
  const int64_t taps = p.k * p.k, bands = (p.out_height + p.rows - 1) / p.rows;
  const int64_t tile_rows = depthwise_tile_rows(p), tile_row = p.width * kLanes;
  const int64_t parts = (p.out_width + kColumns - 1) / kColumns;
  const SumRow sum_row = choose(p);
  float* biases = p.scratch;
  float* scales = biases + p.group;
  float* shifts = scales + p.group;
  float* weights = shifts + p.group;
  const Scaling scaling{p.scale ? scales : nullptr, p.shift ? shifts : nullptr};
  float* tiles = weights + p.group * taps;
  float* sums = tiles + depthwise_tiles(p, kLanes);
  float* added = sums + depthwise_sums(p) * kLanes;
  const bool in_place = depthwise_reads_in_place(p);
  const bool stores_in_place =
      !p.transposes && p.y.elements.dtype == DType::kFloat32 &&
      (!p.residual || (p.residual.elements.dtype == DType::kFloat32 && p.residual.channel == 1));
  const bool rows_join = p.transposes && p.x.row == p.width * p.x.column;
  const bool out_rows_join = p.transposes && p.y.row == p.out_width * p.y.column &&
                             (!p.residual || p.residual.row == p.out_width * p.residual.column);

  for (int64_t item = begin, weighed = -1; item < end; ++item) {
    const int64_t band = item % bands, b = item / bands % p.batch, group = item / bands / p.batch * p.group;
    const int64_t group_end = group + p.group < p.channels ? group + p.group : p.channels;
    const int64_t y0 = band * p.rows, y1 = y0 + p.rows < p.out_height ? y0 + p.rows : p.out_height;
    const int64_t top = y0 * p.stride - p.padding, bottom = (y1 - 1) * p.stride - p.padding + p.k;
    const int64_t in0 = top > 0 ? top : 0, in1 = bottom < p.height ? bottom : p.height;

    if (weighed != group)
      for (int64_t c = group; c < group_end; c += kLanes) {
        const int64_t channels = group_end - c < kLanes ? group_end - c : kLanes;
        load_tile(weights + (c - group) * taps, p.weight + c * taps, taps, 1, channels, taps);
        const auto gather = [&](float* to, const Elements& vector, int64_t stride) {
          store(to + c - group, vector ? load_lanes(vector + c * stride, stride, channels) : Vec{});
        };
        gather(biases, p.bias, p.bias_stride);
        gather(scales, p.scale, p.scale_stride), gather(shifts, p.shift, p.shift_stride);
      }
    weighed = group;

    int64_t loaded = in0;  // rows before it are in the tiles
    for (int64_t y = y0; y < y1; ++y) {
      const int64_t row = y * p.stride - p.padding;  // may lie over the border, as row + k may
      const int64_t first = row > 0 ? row : 0, last = row + p.k < p.height ? row + p.k : p.height;
      if (loaded < first) loaded = first;
      const int64_t wanted = p.transposes && loaded < in1 ? in1 : last;
      Window w{};
      w.part = p.out_width / parts, w.longer = p.out_width % parts;
      w.rows = last - first;
      w.weights = weights + (first - row) * p.k * kLanes;
      w.bias = biases;
      int64_t c = group;

      if (in_place && stores_in_place) {
        w.x = static_cast<const float*>(p.x.at(b, c, w.rows > 0 ? first : 0, 0).data);
        w.row = p.x.row, w.column = p.x.column;
        float* const out = static_cast<float*>(p.y.at(b, c, y, 0).data);
        const float* const residual = p.residual ? static_cast<const float*>(p.residual.at(b, c, y, 0).data) : nullptr;
        // On the row as a whole, which is still in cache.
        const bool finishes = p.activation == Activation::kSilu || scaling;
        w.y = out, w.y_column = p.y.column, w.stored = true;
        w.low = p.activation == Activation::kRelu && !finishes ? 0.0f : -__builtin_inff();
        w.residual = finishes ? nullptr : residual, w.residual_column = p.residual.column;
        for (; c + kLanes <= group_end; c += kLanes) {
          if (last < p.height)
            for (int64_t i = 0; i < p.stride; ++i) prefetch(w.x + (w.rows + i) * w.row, w.column, p.width);
          if (y + 1 < y1) {
            prefetch(w.y + p.y.row, w.y_column, p.out_width);
            if (w.residual) prefetch(w.residual + p.residual.row, w.residual_column, p.out_width);
          }
          sum_row(p, w);
          w.x += kLanes, w.y += kLanes, w.weights += taps * kLanes, w.bias += kLanes;
          if (w.residual) w.residual += kLanes;
        }
        if (finishes) finish_row(p, out, residual, scaling, c - group);
      }
      for (; c < group_end; c += kLanes) {
        const int64_t channels = group_end - c < kLanes ? group_end - c : kLanes;
        w.weights = weights + (c - group) * taps + (first - row) * p.k * kLanes;
        w.bias = biases + c - group;
        if (in_place && channels == kLanes) {
          w.x = static_cast<const float*>(p.x.at(b, c, w.rows > 0 ? first : 0, 0).data);
          w.row = p.x.row, w.column = p.x.column;
        } else {
          float* tile = in_place ? tiles : tiles + (c - group) * tile_rows * p.width;
          const int64_t step = rows_join ? wanted - loaded : 1;
          for (int64_t from = loaded; from < wanted; from += step)
            load_tile(tile + (from - in0) % tile_rows * tile_row, p.x.at(b, c, from, 0), p.x.channel, p.x.column,
                      channels, step * p.width);
          w.row = tile_row, w.column = kLanes;
          w.x = tile + (first - in0) % tile_rows * tile_row;
          w.wrap = tile + tile_rows * tile_row, w.size = tile_rows * tile_row;
        }
        w.y = sums + (p.transposes ? y - y0 : 0) * p.out_width * kLanes, w.y_column = kLanes;
        w.stored = false, w.residual = nullptr;
        sum_row(p, w);
        if (!out_rows_join) finish(p, scaling + (c - group), w.y, added, b, c, y, channels, p.out_width);
      }
      if (loaded < wanted) loaded = wanted;
    }
    if (out_rows_join) finish(p, scaling, sums, added, b, group, y0, group_end - group, (y1 - y0) * p.out_width);
  }
}

END_KERNELS
