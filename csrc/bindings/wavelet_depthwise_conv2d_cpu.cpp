// wavelet_depthwise_conv2d on the CPU.
#include "bindings/wavelet_depthwise_conv2d.h"

namespace mobilemamba {
namespace {

constexpr int64_t kGroups = 8;  // of units whose weight gradients are summed apart: enough work for many threads

// Multiply-adds of a vector in one unit.
int64_t unit_cost(const WaveletDepthwiseConv2dParams& p) {
  return 4 * std::min(half(p.height), kWaveletRows) * std::min(half(p.width), kWaveletColumns) * p.tap_rows *
         p.tap_columns;
}

}  // namespace

void run_wavelet_depthwise_conv2d(WaveletDepthwiseConv2dParams& p, const Tensor&) {
  const int64_t lanes = vector_lanes();
  parallel(KERNEL(wavelet_depthwise_conv2d_fwd), p, ceil_div(p.channels, lanes) * wavelet_units(p), unit_cost(p),
           wavelet_scratch(p, lanes));
}

void run_wavelet_depthwise_conv2d_weights(WaveletDepthwiseConv2dParams& p, const Tensor& like) {
  const int64_t lanes = vector_lanes(), blocks = ceil_div(p.channels, lanes), scratch = wavelet_scratch(p, lanes);
  const int64_t units = wavelet_units(p), taps = 4 * p.tap_rows * p.tap_columns;
  p.groups = std::min(units, kGroups);
  Tensor parts = torch::stable::new_empty(like, {p.groups * blocks * taps * lanes}, ScalarType::Float);
  p.parts = static_cast<float*>(parts.data_ptr());
  parallel(KERNEL(wavelet_depthwise_conv2d_bwd), p, blocks * p.groups, unit_cost(p) * ceil_div(units, p.groups),
           scratch);
  parallel(KERNEL(wavelet_depthwise_conv2d_bwd_sum), p, blocks, taps * p.groups, scratch);
}

}  // namespace mobilemamba
