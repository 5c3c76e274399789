// feed_forward_fwd on the CPU.
#include "bindings/vendor_products.h"
#include "include/feed_forward.h"

DECLARE_KERNEL(feed_forward, FeedForwardParams)

namespace mobilemamba {
namespace {

Tensor feed_forward_forward(Tensor x, Tensor w1, std::optional<Tensor> b1, Tensor w2, std::optional<Tensor> b2,
                            std::string activation, std::optional<Tensor> residual) {
  STD_TORCH_CHECK(x.dim() == 4 && w1.dim() == w2.dim() && (w1.dim() == 3 || w1.dim() == 2),
                  "mobilemamba: feed_forward got a wrong rank");
  const int64_t channels = x.size(1), hidden = outputs_of(w1, b1), positions = x.size(0) * x.size(2) * x.size(3);
  if (w1.dim() == 2) check_size(w1, 1, channels), check_size(w2, 1, hidden);
  STD_TORCH_CHECK(outputs_of(w2, b2) == channels, "mobilemamba: w2 must have as many outputs as x has channels");
  Tensor y = torch::stable::empty_like(x);
  check_image(residual, y);
  const Activation between = activation_of(activation);
  if (vendor_multiplies(x, w1)) {
    if (y.numel()) vendor_feed_forward(x, w1, b1, w2, b2, between, residual, y);
    return y;
  }
  const Weights first = pack(w1, b1, channels, in_bfloat16(x, w1));
  const Weights second = pack(w2, b2, hidden, in_bfloat16(x, w2));
  check_depth(first, channels), check_depth(second, hidden);
  if (y.numel() == 0) return y;

  FeedForwardParams p{product_of(x, first, y), product_of(x, second, y), positions, 1, nullptr};
  p.first.activation = between;
  p.second.weight.depth = hidden, p.second.residual = p.first.x[0].map;
  if (residual) p.second.more = joined_map(*residual);
  if (!positions_suffice(positions)) {  // the threads share the outputs, first of one product, then of the other
    const ScalarType type = second.packed.bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
    const int64_t step = packed_depth(hidden, second.packed.bfloat16);
    const Tensor between = torch::stable::empty({positions, step}, type);
    const Map map{elements(between), p.first.height * p.first.width * step, 1, p.first.width * step, step};
    p.first.y = map, p.second.x[0] = {map, hidden};
    run(p.first, positions);
    run(p.second, positions);
    return y;
  }
  p.second.x[0] = {{{nullptr, second.packed.bfloat16 ? DType::kBFloat16 : DType::kFloat32}, 0, 1, 0, 0}, hidden};
  p.blocks = blocks_of(positions, block_of(channels + hidden));
  const int64_t block = ceil_div(positions, p.blocks);
  parallel(KERNEL(feed_forward), p, p.blocks, 2 * block * channels * hidden / vector_lanes(),
           feed_forward_scratch(p, block));
  return y;
}

}  // namespace
}  // namespace mobilemamba

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, MOBILEMAMBA_DEVICE, m) {
  m.impl("feed_forward_fwd", TORCH_BOX(&mobilemamba::feed_forward_forward));
}
