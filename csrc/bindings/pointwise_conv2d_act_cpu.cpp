// pointwise_conv2d_act_fwd on the CPU.
#include "bindings/products.h"
#include "include/pointwise_conv2d_act.h"

namespace mobilemamba {
namespace {

Tensor pointwise_conv2d_act_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, std::string activation,
                                    std::optional<Tensor> residual, std::string input_activation) {
  STD_TORCH_CHECK(weight.dim() == 2, "mobilemamba: weight must have two dimensions, got ", weight.dim());
  STD_TORCH_CHECK(x.dim() == 4, "mobilemamba: x must have four dimensions, got ", x.dim());
  const int64_t channels = x.size(1), out = weight.size(0);
  check_size(weight, 1, channels);
  if (bias) check_size(*bias, 0, out);
  Tensor y = empty_image(x, out, x.size(2), x.size(3));
  check_image(residual, y);
  if (y.numel() == 0) return y;

  const ScalarType type = product_type(x);
  Positions positions{x.size(0), x.size(2), x.size(3), type, true};
  const Part from{positions.map(x)}, to{positions.map(y)};
  positions.join = to.map.batch == positions.height * to.map.row;
  const Map added = residual ? positions.map(*residual) : Map{};
  const Tensor weights = convert(weight, type);
  const Activation before = activation_of(input_activation), after = activation_of(activation);
  const bool reads_in_place = before == Activation::kNone && positions.is_matrix(from.map, x.scalar_type());
  const bool writes_in_place = positions.is_matrix(to.map, y.scalar_type());
  // The product adds a bias faster than a pass of our own, which adds it for nothing where it has to run anyway.
  const bool passes = residual || after != Activation::kNone || !writes_in_place;
  const std::optional<Tensor> product_bias = bias && !passes ? std::make_optional(convert(*bias, type)) : std::nullopt;

  if (reads_in_place && !passes && positions.join) {  // nothing of our own to keep in cache for
    positions.multiply(to, from, weights, 0, positions.batch * positions.height * positions.width, product_bias);
    return y;
  }
  positions.for_slabs((reads_in_place ? 0 : channels) + (writes_in_place ? 0 : out),
                      [&](int64_t first, int64_t count, char* memory) {
                        Part in = from, sums = to;
                        if (!reads_in_place) {
                          in = positions.buffer(memory, first, count, channels);
                          positions.pass(in, from, channels, first, count, before);
                        }
                        if (!writes_in_place) sums = positions.buffer(memory, first, count, out);
                        positions.multiply(sums, in, weights, first, count, product_bias);
                        if (passes) positions.pass(to, sums, out, first, count, after, bias, added);
                      });
  return y;
}

}  // namespace
}  // namespace mobilemamba

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, CPU, m) {
  m.impl("pointwise_conv2d_act_fwd", TORCH_BOX(&mobilemamba::pointwise_conv2d_act_forward));
}
