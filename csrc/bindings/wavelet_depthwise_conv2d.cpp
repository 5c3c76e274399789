// wavelet_depthwise_conv2d_fwd and _bwd.
#include "bindings/wavelet_depthwise_conv2d.h"

#include <tuple>

namespace mobilemamba {
namespace {

// The part of the weights, or of their gradient, whose taps can meet an element of a band.
Map reachable_taps(const Tensor& weight, const WaveletDepthwiseConv2dParams& p) {
  Map map = map_of(weight);
  map.channel = map.batch, map.batch = 0;
  map.elements = map.at(0, 0, (weight.size(2) - p.tap_rows) / 2, (weight.size(3) - p.tap_columns) / 2);
  return map;
}

WaveletDepthwiseConv2dParams params_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale) {
  WaveletDepthwiseConv2dParams p{};
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && (!scale || scale->dim() == 1),
                  "mobilemamba: wavelet_depthwise_conv2d got a wrong rank");
  p.batch = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
  check_size(weight, 0, 4 * p.channels), check_size(weight, 1, 1);
  if (scale) check_size(*scale, 0, 4 * p.channels);
  STD_TORCH_CHECK(weight.size(2) % 2 == 1 && weight.size(3) % 2 == 1, "mobilemamba: the kernel size must be odd");
  if (x.numel() == 0) return p;
  p.tap_rows = std::min(weight.size(2), 2 * half(p.height) - 1);
  p.tap_columns = std::min(weight.size(3), 2 * half(p.width) - 1);
  p.x = map_of(x);
  p.weight = reachable_taps(weight, p);
  p.scale = elements(scale), p.scale_stride = stride(scale, 0);
  return p;
}

void check_like(const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 4, "mobilemamba: wavelet_depthwise_conv2d got a wrong rank");
  for (int64_t i = 0; i < 4; ++i) check_size(t, i, x.size(i));
}

Tensor forward(Tensor x, Tensor weight, std::optional<Tensor> scale, std::optional<Tensor> base) {
  Tensor out = torch::stable::empty_like(x);
  WaveletDepthwiseConv2dParams p = params_of(x, weight, scale);
  if (base) check_like(*base, x);
  if (x.numel() == 0) return out;
  p.out = map_of(out);
  if (base) p.base = map_of(*base);
  run_wavelet_depthwise_conv2d(p, x);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> scale,
                                                    std::optional<Tensor> base) {
  WaveletDepthwiseConv2dParams p = params_of(x, weight, scale);
  check_like(grad, x);
  Tensor grad_x = torch::stable::empty_like(x), grad_weight = torch::stable::empty_like(weight);
  Tensor grad_scale = empty_for(scale, x);
  Tensor grad_base = empty_for(base, x);
  if (base) torch::stable::copy_(grad_base, grad);
  if (p.tap_rows < weight.size(2) || p.tap_columns < weight.size(3)) torch::stable::zero_(grad_weight);
  if (x.numel() == 0) {
    if (scale) torch::stable::zero_(grad_scale);
    return {grad_x, grad_weight, grad_scale, grad_base};
  }
  p.grad = map_of(grad);
  p.grad_weight = reachable_taps(grad_weight, p);
  if (scale) p.grad_scale = elements(grad_scale);
  run_wavelet_depthwise_conv2d_weights(p, x);

  p.x = p.grad, p.out = map_of(grad_x), p.reverse = true;
  run_wavelet_depthwise_conv2d(p, x);
  return {grad_x, grad_weight, grad_scale, grad_base};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, MOBILEMAMBA_DEVICE, m) {
  m.impl("wavelet_depthwise_conv2d_fwd", TORCH_BOX(&forward));
  m.impl("wavelet_depthwise_conv2d_bwd", TORCH_BOX(&backward));
}

}  // namespace mobilemamba
