// pointwise_conv2d_act_fwd on the CPU.
#include "bindings/vendor_products.h"

namespace mobilemamba {
namespace {

Tensor pointwise_conv2d_act_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, std::string activation,
                                    std::optional<Tensor> residual, std::string input_activation,
                                    std::optional<Tensor> second, std::optional<Tensor> third) {
  STD_TORCH_CHECK(weight.dim() == 3 || weight.dim() == 2, "mobilemamba: weight must have two dimensions, or be packed");
  STD_TORCH_CHECK(x.dim() == 4, "mobilemamba: x must have four dimensions, got ", x.dim());
  std::vector<Tensor> inputs{x};
  int64_t channels = x.size(1);
  for (const std::optional<Tensor>& t : {second, third})
    if (t) {
      STD_TORCH_CHECK(t->dim() == 4, "mobilemamba: x must have four dimensions, got ", t->dim());
      for (const int64_t i : {0, 2, 3}) check_size(*t, i, x.size(i));
      inputs.push_back(*t);
      channels += t->size(1);
    }
  if (weight.dim() == 2) check_size(weight, 1, channels);
  Tensor y = empty_image(x, outputs_of(weight, bias), x.size(2), x.size(3));
  check_image(residual, y);
  const Activation before = activation_of(input_activation), after = activation_of(activation);
  if (vendor_multiplies(x, weight)) {
    if (y.numel()) vendor_pointwise(joined_channels(inputs), weight, bias, before, after, residual, y);
    return y;
  }
  const Weights weights = pack(weight, bias, channels, in_bfloat16(x, weight));
  check_depth(weights, channels);
  if (y.numel() == 0) return y;
  Product product = product_of(x, weights, y);
  for (size_t i = 0; i < inputs.size(); ++i) product.x[i] = {joined_map(inputs[i]), inputs[i].size(1)};
  product.weight.depth = channels;
  product.input_activation = before, product.activation = after;
  if (residual) product.residual = joined_map(*residual);
  run(product, x.size(0) * x.size(2) * x.size(3));
  return y;
}

}  // namespace
}  // namespace mobilemamba

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, MOBILEMAMBA_DEVICE, m) {
  m.impl("pointwise_conv2d_act_fwd", TORCH_BOX(&mobilemamba::pointwise_conv2d_act_forward));
}
