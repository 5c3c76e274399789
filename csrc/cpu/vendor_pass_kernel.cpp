// What surrounds a matrix product: bias, activation and residual after it, conversion and activation before it.
//
// A span is a range of positions, in runs that are evenly spaced in every tensor. Where all of them have channels, or
// all positions, side by side, a vector goes from load to store in registers; where they differ, tiles of kLanes
// channels are transposed in cache. Every element is read and written once, right after the product left it in cache.
#include "cpu/activation.h"
#include "cpu/tile.h"
#include "include/capability.h"
#include "include/vendor_pass.h"

DECLARE_KERNEL(vendor_pass, VendorPassParams)

BEGIN_KERNELS
namespace {

// The same positions of the three tensors.
struct Run {
  Elements x, residual, y;
  int64_t positions;
};

// y[i][j] = act(x[i][j] + bias) + residual[i][j], j contiguous, with one bias for each i or for each j.
template <bool kBiasOfInner, class X, class R, class Y, class Act>
INLINE void rows(const X* x, int64_t x_stride, const R* residual, int64_t residual_stride, Y* y, int64_t y_stride,
                 const float* bias, int64_t outer, int64_t inner, Act act) {
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; j += kLanes) {
      const int64_t n = inner - j < kLanes ? inner - j : kLanes;
      Vec v = load_some(x + i * x_stride + j, n);
      v = act(v + (kBiasOfInner ? load(bias + j) : splat(bias[i])));
      if (residual) v += load_some(residual + i * residual_stride + j, n);
      store_some(y + i * y_stride + j, v, n);
    }
  }
}

static void run_rows(const VendorPassParams& p, const Run& run, const float* bias, bool channels_inside) {
  with_type(run.x, [&](const auto* x) {
    with_type(run.y, [&](auto* y) {
      with_activation(p.activation, [&](auto act) {
        const auto* residual = static_cast<decltype(y)>(run.residual.data);
        if (channels_inside)
          rows<true>(x, p.x.column, residual, p.residual.column, y, p.y.column, bias, run.positions, p.channels, act);
        else
          rows<false>(x, p.x.channel, residual, p.residual.channel, y, p.y.channel, bias, p.channels, run.positions,
                      act);
      });
    });
  });
}

static void run_tiles(const VendorPassParams& p, const Run& run, const float* bias, float* tile) {
  float* added = tile + kVendorPassTile * kLanes;
  for (int64_t l = 0; l < run.positions; l += kVendorPassTile) {
    const int64_t positions = run.positions - l < kVendorPassTile ? run.positions - l : kVendorPassTile;
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      const int64_t channels = p.channels - c < kLanes ? p.channels - c : kLanes;
      load_tile(tile, run.x + (l * p.x.column + c * p.x.channel), p.x.channel, p.x.column, channels, positions);
      if (run.residual)
        load_tile(added, run.residual + (l * p.residual.column + c * p.residual.channel), p.residual.channel,
                  p.residual.column, channels, positions);
      with_activation(p.activation, [&](auto act) {
        for (int64_t i = 0; i < positions * kLanes; i += kLanes) {
          Vec v = act(load(tile + i) + load(bias + c));
          if (run.residual) v += load(added + i);
          store(tile + i, v);
        }
      });
      store_tile(tile, run.y + (l * p.y.column + c * p.y.channel), p.y.channel, p.y.column, channels, positions);
    }
  }
}

}  // namespace

void vendor_pass(const VendorPassParams& p, int64_t begin, int64_t end) {
  float* bias = p.scratch;
  float* tile = bias + (p.channels + kLanes - 1) / kLanes * kLanes;
  for (int64_t c = 0; c < p.channels; c += kLanes)
    store(bias + c, p.bias ? load_lanes(p.bias + c * p.bias_stride, p.bias_stride,
                                        p.channels - c < kLanes ? p.channels - c : kLanes)
                           : Vec{});

  const auto every = [&](auto holds) { return holds(p.x) && holds(p.y) && (!p.residual || holds(p.residual)); };
  const bool rows_join = every([&](const Map& m) { return m.row == p.width * m.column; });
  const bool images_join = rows_join && every([&](const Map& m) { return m.batch == p.height * m.row; });
  const bool same_type = !p.residual || p.residual.elements.dtype == p.y.elements.dtype;
  const bool channels_inside = every([](const Map& m) { return m.channel == 1; });
  const bool positions_inside = every([](const Map& m) { return m.column == 1; });

  const int64_t image = p.height * p.width, stretch = images_join ? INT64_MAX : rows_join ? image : p.width;
  for (int64_t at = p.first + begin, stop = p.first + end; at < stop;) {
    const int64_t left = stretch - at % stretch;
    const int64_t b = at / image, row = at / p.width % p.height, column = at % p.width;
    const auto offset = [&](const Map& m) { return b * m.batch + row * m.row + column * m.column; };
    Run run{p.x.elements + (offset(p.x) - p.x_skip),
            {},
            p.y.elements + (offset(p.y) - p.y_skip),
            left < stop - at ? left : stop - at};
    if (p.residual) run.residual = p.residual.elements + offset(p.residual);
    if (same_type && (channels_inside || positions_inside))
      run_rows(p, run, bias, channels_inside);
    else
      run_tiles(p, run, bias, tile);
    at += run.positions;
  }
}

END_KERNELS
