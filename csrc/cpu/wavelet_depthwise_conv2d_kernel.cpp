// One item is kLanes channels of an image (of a part of it, where it is large): lanes are channels, whatever the
// layout.
//
// The image streams through a ring of band rows, kWaveletGroup rows of results at a time: two rows of pixels become a
// row of the four bands; when a group's neighbours are there, each band of it is filtered, then it is transformed back
// and written. So a pixel of x and of base is read once, one of out is written once, and the bands never leave the
// cache. The weights are transposed to [band][tap][lane] once for all images of a span, with the scale and the
// transforms' normalization in them.
//
// Filtering holds up to kSegment outputs of a row in registers and, for one row of taps at a time, its weights: every
// band element is loaded once and serves all outputs that it meets, every weight serves all outputs. At 7 columns and
// 7 taps that is 14 loads to 37 multiply-adds; taps beyond the edge are left out when the code is generated, rows
// beyond it when it runs.
//
// The gradient of x is the same with the taps reversed, the transform being orthonormal. That of the weights holds the
// sums of one row of taps in registers instead and multiplies the bands of x with those of the gradient.
#include "cpu/haar.h"
#include "include/wavelet_depthwise_conv2d.h"

BEGIN_KERNELS
namespace {

using Params = WaveletDepthwiseConv2dParams;

constexpr int kSegment = 8;

// The band elements that a segment of a row meets: `count` rows in a ring, which wraps after `before_wrap` of them.
struct Window {
  const float* in;  // column 0 of the segment
  int64_t stride, count, before_wrap, ring;
  int64_t taps;
};

template <class F>
INLINE void for_rows(const Window& window, F f) {
  const float* in = window.in;
  for (int64_t r = 0; r < window.count; ++r) {
    f(r, in);
    in += window.stride;
    if (r + 1 == window.before_wrap) in -= window.ring;
  }
}

// Calls f(column, output, tap) for every band element of a segment, output and tap that belong together.
// kLeft, kRight: the segment begins, ends at the image's edge.
template <int kTaps, int kCount, bool kLeft, bool kRight, class Load, class F>
INLINE void for_products(Load load_column, F f) {
  constexpr int kPad = kTaps / 2, kFirst = kLeft ? 0 : -kPad, kLast = kRight ? kCount : kCount + kPad;
#pragma GCC unroll 32
  for (int x = kFirst; x < kLast; ++x) {
    const Vec element = load_column(x);
#pragma GCC unroll 16
    for (int tap = 0; tap < kTaps; ++tap)
      if (x + kPad - tap >= 0 && x + kPad - tap < kCount) f(element, x + kPad - tap, tap);
  }
}

// kTaps 0: any number of taps, known when it runs; elements beyond the image are zeros in the ring.
struct Filter {
  template <int kTaps, int kCount, bool kLeft, bool kRight>
  static void run(const Window& window, const float* weights, float* out) {
    const int64_t taps = kTaps ? kTaps : window.taps;
    Vec sum[kCount] = {};
    for_rows(window, [&](int64_t r, const float* in) {
      const float* w = weights + r * taps * kLanes;
      if constexpr (kTaps) {
        Vec weight[kTaps];
#pragma GCC unroll 16
        for (int tap = 0; tap < kTaps; ++tap) weight[tap] = load(w + tap * kLanes);
        for_products<kTaps, kCount, kLeft, kRight>(
            [&](int x) { return load(in + x * kLanes); },
            [&](Vec element, int x, int tap) { sum[x] += element * weight[tap]; });
      } else {
        in -= taps / 2 * kLanes;
        for (int64_t tap = 0; tap < taps; ++tap, in += kLanes, w += kLanes) {
          const Vec weight = load(w);
#pragma GCC unroll 16
          for (int x = 0; x < kCount; ++x) sum[x] += weight * load(in + x * kLanes);
        }
      }
    });
#pragma GCC unroll 16
    for (int x = 0; x < kCount; ++x) store(out + x * kLanes, sum[x]);
  }
};

// Adds the products of the window's elements with a segment's gradients to the sums of their taps.
struct Correlate {
  template <int kTaps, int kCount, bool kLeft, bool kRight>
  static void run(const Window& window, const float* gradients, float* sums) {
    const int64_t taps = kTaps ? kTaps : window.taps;
    Vec gradient[kCount];
#pragma GCC unroll 16
    for (int x = 0; x < kCount; ++x) gradient[x] = load(gradients + x * kLanes);
    for_rows(window, [&](int64_t r, const float* in) {
      float* s = sums + r * taps * kLanes;
      if constexpr (kTaps) {
        Vec sum[kTaps];
#pragma GCC unroll 16
        for (int tap = 0; tap < kTaps; ++tap) sum[tap] = load(s + tap * kLanes);
        for_products<kTaps, kCount, kLeft, kRight>(
            [&](int x) { return load(in + x * kLanes); },
            [&](Vec element, int x, int tap) { sum[tap] += element * gradient[x]; });
#pragma GCC unroll 16
        for (int tap = 0; tap < kTaps; ++tap) store(s + tap * kLanes, sum[tap]);
      } else {
        in -= taps / 2 * kLanes;
        for (int64_t tap = 0; tap < taps; ++tap, in += kLanes, s += kLanes) {
          Vec sum = load(s);
#pragma GCC unroll 16
          for (int x = 0; x < kCount; ++x) sum += gradient[x] * load(in + x * kLanes);
          store(s, sum);
        }
      }
    });
  }
};

INLINE bool has_segments(int64_t taps) { return taps == 3 || taps == 5 || taps == 7; }

using Segment = void (*)(const Window&, const float*, float*);

// A segment that is not at the right edge is a whole one.
template <class Work, int kTaps, int... kLess>
static Segment segment(int64_t count, bool left, bool right, std::integer_sequence<int, kLess...>) {
  static constexpr Segment both_edges[] = {Work::template run<kTaps, kLess + 1, true, true>...};
  static constexpr Segment right_edge[] = {Work::template run<kTaps, kLess + 1, false, true>...};
  if (right) return (left ? both_edges : right_edge)[count - 1];
  return left ? Work::template run<kTaps, kSegment, true, false> : Work::template run<kTaps, kSegment, false, false>;
}
template <class Work, int... kLess>
static Segment any_taps(int64_t count, std::integer_sequence<int, kLess...>) {
  static constexpr Segment segments[] = {Work::template run<0, kLess + 1, false, false>...};
  return segments[count - 1];
}
template <class Work>
static Segment segment(int64_t taps, int64_t count, bool left, bool right) {
  constexpr std::make_integer_sequence<int, kSegment> counts{};
  if (taps == 3) return segment<Work, 3>(count, left, right, counts);
  if (taps == 5) return segment<Work, 5>(count, left, right, counts);
  if (taps == 7) return segment<Work, 7>(count, left, right, counts);
  return any_taps<Work>(count, counts);
}

// Channels of an image, and the rows and columns of its bands.
struct Part {
  int64_t image, channel, channels, top, bottom, left, right;
};
static Part part(const Params& p, int64_t block, int64_t unit) {
  const int64_t height = half(p.height), width = half(p.width);
  const int64_t across = (width + kWaveletColumns - 1) / kWaveletColumns;
  const int64_t down = (height + kWaveletRows - 1) / kWaveletRows;
  const int64_t left = unit % across * kWaveletColumns, top = unit / across % down * kWaveletRows;
  const int64_t channel = block * kLanes;
  return {unit / across / down,
          channel,
          smaller(kLanes, p.channels - channel),
          top,
          smaller(top + kWaveletRows, height),
          left,
          smaller(left + kWaveletColumns, width)};
}

// One thread's scratch.
struct Scratch {
  const Params& p;
  int64_t columns = wavelet_columns(p), row = columns * kLanes;
  int64_t slots = wavelet_slots(p), band = slots * row, result_band = kWaveletGroup * row;
  float* weights = p.scratch;                                                 // [band][tap][lane]
  float* ring = weights + 4 * p.tap_rows * p.tap_columns * kLanes;            // [band][row % slots][column][lane]
  float* result = ring + 4 * band;                                            // [band][row of the group][column][lane]
  float* tile = result + 4 * result_band;                                     // two rows of pixels
  bool edges_met = half(p.width) > kSegment || !has_segments(p.tap_columns);  // the zeros beside the image are read

  // Rows of pixels that band row y has.
  int64_t rows(int64_t y) const { return smaller(2, p.height - 2 * y); }

  // Transforms the columns of a row that the part itself has, and as many on either side as its taps meet.
  void transform(float* out, int64_t band_stride, const Map& map, const Part& at, int64_t y, int64_t margin) const {
    const int64_t begin = larger(0, at.left - margin), end = smaller(half(p.width), at.right + margin);
    const int64_t pixels = smaller(p.width, 2 * end) - 2 * begin;
    float* to = out + (begin - (at.left - margin)) * kLanes;
    with_input(tile, map.at(at.image, at.channel, 2 * y, 2 * begin), map, at.channels, rows(y), pixels,
               [&](auto in) ALWAYS_INLINE {
                 forward_row(to, band_stride, in, rows(y), pixels, [](Vec value) { return value; });
               });
    if (!edges_met) return;
    for (int b = 0; b < 4; ++b) {
      float* edge = out + b * band_stride;
      for (float* zero = edge; zero < to + b * band_stride; zero += kLanes) store(zero, Vec{});
      for (int64_t x = end; x < at.right + margin; ++x) store(edge + (x - at.left + margin) * kLanes, Vec{});
    }
  }

  // Runs f(top, bottom) for every group of the part's rows, with the band rows of x around them in the ring.
  template <class F>
  void for_groups(const Part& at, F f) const {
    const int64_t pad = p.tap_rows / 2, last = smaller(half(p.height), at.bottom + pad);
    int64_t next = larger(0, at.top - pad);
    for (int64_t y = at.top; y < at.bottom; y += kWaveletGroup) {
      const int64_t bottom = smaller(y + kWaveletGroup, at.bottom);
      for (; next < smaller(last, bottom + pad); ++next)
        transform(ring + next % slots * row, band, p.x, at, next, p.tap_columns / 2);
      f(y, bottom);
    }
  }

  // Runs f(segment of Work, window, result, first tap) for every segment of a group's rows. The rows are innermost: a
  // band's taps stay in the first level of cache.
  template <class Work, class F>
  void for_segments(const Part& at, int64_t top, int64_t bottom, F f) const {
    const int64_t pad = p.tap_rows / 2, height = half(p.height), first_slot = larger(0, top - pad) % slots;
    for (int b = 0; b < 4; ++b) {
      for (int64_t x = at.left; x < at.right; x += kSegment) {
        const int64_t count = smaller(kSegment, at.right - x);
        const Segment run = segment<Work>(p.tap_columns, count, x == 0, x + count == half(p.width));
        const float* column = ring + b * band + (x - at.left + p.tap_columns / 2) * kLanes;
        float* out = result + b * result_band + (x - at.left) * kLanes;
        for (int64_t y = top, slot = first_slot; y < bottom; ++y, out += row) {
          const int64_t begin = larger(0, y - pad), end = smaller(height, y + pad + 1);
          f(run, Window{column + slot * row, row, end - begin, slots - slot, band, p.tap_columns}, out,
            (b * p.tap_rows + begin - (y - pad)) * p.tap_columns * kLanes);
          if (y >= pad) slot = slot + 1 == slots ? 0 : slot + 1;
        }
      }
    }
  }
};

// Calls f(tile, first element, positions) for the stretches of a block's taps.
template <class F>
INLINE void for_taps(float* tile, const Map& weight, const Params& p, int64_t channel, F f) {
  const Elements taps = weight.at(0, 4 * channel, 0, 0);
  if (weight.channel == p.tap_rows * weight.row)
    return for_stretches(tile, taps, weight, 4 * p.tap_rows, p.tap_columns, f);
  for (int b = 0; b < 4; ++b)
    for_stretches(tile + b * p.tap_rows * p.tap_columns * kLanes, taps + b * weight.channel, weight, p.tap_rows,
                  p.tap_columns, f);
}
static void read_taps(float* tile, const Params& p, int64_t channel, int64_t channels) {
  for_taps(tile, p.weight, p, channel, [&](float* to, Elements from, int64_t count) {
    load_tile(to, from, 4 * p.weight.channel, p.weight.column, channels, count);
  });
}
INLINE Vec read_scale(const Params& p, int64_t channel, int64_t channels, int band) {
  if (!p.scale) return splat(1.0f);
  return load_lanes(p.scale + (4 * channel + band) * p.scale_stride, 4 * p.scale_stride, channels);
}

constexpr float kNormalization = 0.25f;  // of both transforms together

static void read_weights(float* weights, const Params& p, int64_t channel, int64_t channels) {
  read_taps(weights, p, channel, channels);
  const int64_t taps = p.tap_rows * p.tap_columns;
  for (int b = 0; b < 4; ++b, weights += taps * kLanes) {
    const Vec scale = read_scale(p, channel, channels, b) * kNormalization;
    for (int64_t i = 0; i < taps; ++i) store(weights + i * kLanes, load(weights + i * kLanes) * scale);
    for (int64_t i = 0, j = taps - 1; p.reverse && i < j; ++i, --j) {
      const Vec first = load(weights + i * kLanes), last = load(weights + j * kLanes);
      store(weights + i * kLanes, last), store(weights + j * kLanes, first);
    }
  }
}

static void write_row(const Scratch& s, const float* result, const Part& at, int64_t y) {
  const Params& p = s.p;
  const int64_t rows = s.rows(y), columns = smaller(p.width, 2 * at.right) - 2 * at.left, band = s.result_band;
  const auto first = [&](const Map& map) { return map.at(at.image, at.channel, 2 * y, 2 * at.left); };
  with_output(s.tile, first(p.out), p.out, at.channels, rows, columns, [&](auto out) ALWAYS_INLINE {
    if (!p.base.elements)
      return inverse_row(out, result, band, rows, columns, [](Vec value, int64_t, int64_t, int64_t) { return value; });
    // Where both go by way of the tile it is the same: each pixel is read, then written.
    with_input(s.tile, first(p.base), p.base, at.channels, rows, columns, [&](auto base) ALWAYS_INLINE {
      out.channels = smaller(out.channels, base.channels);
      inverse_row(out, result, band, rows, columns,
                  [=](Vec value, int64_t row, int64_t column, int64_t channels) ALWAYS_INLINE {
                    return value + load_some(base.data + row * base.row + column * base.column, channels);
                  });
    });
  });
}

}  // namespace

// Items: [block of channels][unit].
void wavelet_depthwise_conv2d_fwd(const Params& p, int64_t begin, int64_t end) {
  const Scratch s{p};
  const int64_t units = wavelet_units(p);
  for (int64_t item = begin; item < end; ++item) {
    const Part at = part(p, item / units, item % units);
    if (item == begin || item % units == 0) read_weights(s.weights, p, at.channel, at.channels);
    s.for_groups(at, [&](int64_t top, int64_t bottom) {
      s.for_segments<Filter>(at, top, bottom, [&](Segment filter, const Window& window, float* out, int64_t tap) {
        filter(window, s.weights + tap, out);
      });
      for (int64_t y = top; y < bottom; ++y) write_row(s, s.result + (y - top) * s.row, at, y);
    });
  }
}

// Items: [block of channels][group of units]. Rounding errors grow with the number of terms added one to another, so
// sums over about kTerms positions are taken first, and then added up.
void wavelet_depthwise_conv2d_bwd(const Params& p, int64_t begin, int64_t end) {
  constexpr int64_t kTerms = 128;
  const Scratch s{p};
  const int64_t units = wavelet_units(p), taps = p.tap_rows * p.tap_columns;
  const int64_t blocks = (p.channels + kLanes - 1) / kLanes;
  float* sums = s.weights;
  for (int64_t i = 0; i < 4 * taps; ++i) store(sums + i * kLanes, Vec{});
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / p.groups, group = item % p.groups;
    float* total = p.parts + (group * blocks + block) * 4 * taps * kLanes;
    for (int64_t i = 0; i < 4 * taps; ++i) store(total + i * kLanes, Vec{});
    int64_t terms = 0;
    const auto add_up = [&] {
      for (int64_t i = 0; i < 4 * taps; ++i) {
        store(total + i * kLanes, load(total + i * kLanes) + load(sums + i * kLanes));
        store(sums + i * kLanes, Vec{});
      }
      terms = 0;
    };
    for (int64_t unit = units * group / p.groups; unit < units * (group + 1) / p.groups; ++unit) {
      const Part at = part(p, block, unit);
      s.for_groups(at, [&](int64_t top, int64_t bottom) {
        for (int64_t y = top; y < bottom; ++y)
          s.transform(s.result + (y - top) * s.row, s.result_band, p.grad, at, y, 0);
        s.for_segments<Correlate>(at, top, bottom,
                                  [&](Segment correlate, const Window& window, float* in, int64_t tap) {
                                    correlate(window, in, sums + tap);
                                  });
        terms += (bottom - top) * (at.right - at.left);
        if (terms >= kTerms) add_up();
      });
    }
    add_up();
  }
}

// Items: blocks of channels. Adds the groups' parts, then takes the scale into account.
void wavelet_depthwise_conv2d_bwd_sum(const Params& p, int64_t begin, int64_t end) {
  const Scratch s{p};
  const int64_t taps = p.tap_rows * p.tap_columns, blocks = (p.channels + kLanes - 1) / kLanes;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t channel = block * kLanes, channels = smaller(kLanes, p.channels - channel);
    read_taps(s.weights, p, channel, channels);
    for (int b = 0; b < 4; ++b) {
      const Vec scale = read_scale(p, channel, channels, b);
      Vec grad_scale = {};
      for (int64_t i = b * taps; i < (b + 1) * taps; ++i) {
        Vec sum = {};
        for (int64_t g = 0; g < p.groups; ++g) sum += load(p.parts + ((g * blocks + block) * 4 * taps + i) * kLanes);
        sum *= kNormalization;
        grad_scale += sum * load(s.weights + i * kLanes);
        store(s.weights + i * kLanes, sum * scale);
      }
      if (p.grad_scale) {
        float lanes[kLanes];
        store(lanes, grad_scale);
        store_tile(lanes, p.grad_scale + (4 * channel + b), 4, 1, channels, 1);
      }
    }
    for_taps(s.weights, p.grad_weight, p, channel, [&](float* from, Elements to, int64_t count) {
      store_tile(from, to, 4 * p.grad_weight.channel, p.grad_weight.column, channels, count);
    });
  }
}

END_KERNELS
