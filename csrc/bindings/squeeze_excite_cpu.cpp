// squeeze_excite_fwd on the CPU.
#include "bindings/products.h"
#include "include/squeeze_excite.h"

DECLARE_KERNEL(squeeze, SqueezeExciteParams)
DECLARE_KERNEL(excite, SqueezeExciteParams)

namespace mobilemamba {
namespace {

Tensor squeeze_excite_forward(Tensor x, Tensor w1, std::optional<Tensor> b1, Tensor w2, std::optional<Tensor> b2) {
  STD_TORCH_CHECK(x.dim() == 4 && w1.dim() == w2.dim() && (w1.dim() == 2 || w1.dim() == 3),
                  "mobilemamba: squeeze_excite got a wrong rank");
  const int64_t batch = x.size(0), channels = x.size(1), hidden = outputs_of(w1, b1);
  if (w1.dim() == 2) check_size(w1, 1, channels), check_size(w2, 1, hidden);
  STD_TORCH_CHECK(outputs_of(w2, b2) == channels, "mobilemamba: w2 must have as many outputs as x has channels");
  // Of a bfloat16 x, the means and the hidden channels stay float32, unless the weights are bfloat16 too.
  const Weights first = pack(w1, b1, channels, w1.scalar_type() == ScalarType::BFloat16);
  const Weights second = pack(w2, b2, hidden, w2.scalar_type() == ScalarType::BFloat16);
  check_depth(first, channels), check_depth(second, hidden);
  Tensor y = torch::stable::empty_like(x);
  if (y.numel() == 0) return y;

  const Tensor means = torch::stable::empty({batch, channels, 1, 1}, ScalarType::Float);
  const Tensor between = torch::stable::empty({batch, hidden, 1, 1}, ScalarType::Float);
  const Tensor weights = torch::stable::empty({batch, channels, 1, 1}, ScalarType::Float);
  SqueezeExciteParams p{channels, x.size(2), x.size(3), map_of(x), map_of(y), nullptr, nullptr, nullptr};
  p.means = static_cast<float*>(means.data_ptr()), p.weights = static_cast<const float*>(weights.data_ptr());
  const int64_t lanes = vector_lanes(), items = batch * ceil_div(channels, lanes), cost = 2 * p.height * p.width;
  parallel(KERNEL(squeeze), p, items, cost, squeeze_excite_scratch(lanes));
  Product product = product_of(means, first, between);
  product.activation = Activation::kRelu;
  run(product, batch);
  run(product_of(between, second, weights), batch);
  parallel(KERNEL(excite), p, items, cost, squeeze_excite_scratch(lanes));
  return y;
}

}  // namespace
}  // namespace mobilemamba

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, MOBILEMAMBA_DEVICE, m) {
  m.impl("squeeze_excite_fwd", TORCH_BOX(&mobilemamba::squeeze_excite_forward));
}
