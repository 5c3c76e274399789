// depthwise_conv2d_act_fwd.
#include "bindings/depthwise_conv2d_act.h"

namespace mobilemamba {
namespace {

Tensor depthwise_conv2d_act_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t stride,
                                    int64_t padding, std::string activation, std::optional<Tensor> residual,
                                    std::optional<Tensor> scale, std::optional<Tensor> shift) {
  DepthwiseConv2dActParams p{};
  p.x = map_of(x);
  STD_TORCH_CHECK(weight.dim() == 4, "mobilemamba: weight must have four dimensions, got ", weight.dim());
  p.batch = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
  p.k = weight.size(2), p.stride = stride, p.padding = padding;
  check_size(weight, 0, p.channels), check_size(weight, 1, 1), check_size(weight, 3, p.k);
  for (const auto& vector : {bias, scale, shift})
    if (vector) check_size(*vector, 0, p.channels);
  p.out_height = output_size(p.height, p.k, stride, padding);
  p.out_width = output_size(p.width, p.k, stride, padding);
  Tensor y = empty_image(x, p.channels, p.out_height, p.out_width);
  check_image(residual, y);
  const Tensor filters = weight.is_contiguous() ? weight : torch::stable::contiguous(weight);
  p.weight = elements(filters);
  p.bias = elements(bias), p.bias_stride = mobilemamba::stride(bias, 0);
  p.scale = elements(scale), p.scale_stride = mobilemamba::stride(scale, 0);
  p.shift = elements(shift), p.shift_stride = mobilemamba::stride(shift, 0);
  p.y = map_of(y);
  if (residual) p.residual = map_of(*residual);
  p.activation = activation_of(activation);
  if (y.numel() != 0) run_depthwise_conv2d_act(p, x);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, MOBILEMAMBA_DEVICE, m) {
  m.impl("depthwise_conv2d_act_fwd", TORCH_BOX(&depthwise_conv2d_act_forward));
}

}  // namespace mobilemamba
