// feed_forward_fwd on the CPU: both products for a slab of positions while its hidden channels are in cache, which are
// never in memory as a whole.
#include "bindings/products.h"

namespace mobilemamba {
namespace {

Tensor feed_forward_forward(Tensor x, Tensor w1, std::optional<Tensor> b1, Tensor w2, std::optional<Tensor> b2,
                            std::string activation) {
  STD_TORCH_CHECK(x.dim() == 4 && w1.dim() == 2 && w2.dim() == 2, "mobilemamba: feed_forward got a wrong rank");
  const int64_t channels = x.size(1), hidden = w1.size(0);
  check_size(w1, 1, channels), check_size(w2, 0, channels), check_size(w2, 1, hidden);
  if (b1) check_size(*b1, 0, hidden);
  if (b2) check_size(*b2, 0, channels);
  Tensor y = torch::stable::empty_like(x);
  if (y.numel() == 0) return y;

  const ScalarType type = product_type(x);
  Positions positions{x.size(0), x.size(2), x.size(3), type, true};
  const Part from{positions.map(x)}, to{positions.map(y)};
  positions.join = to.map.batch == positions.height * to.map.row;
  const Tensor first_weight = convert(w1, type), second_weight = convert(w2, type);
  const bool reads_in_place = positions.is_matrix(from.map, x.scalar_type());
  const bool writes_in_place = positions.is_matrix(to.map, y.scalar_type());

  positions.for_slabs(hidden + (reads_in_place ? 0 : channels) + (writes_in_place ? 0 : channels),
                      [&](int64_t first, int64_t count, char* memory) {
                        const Part inner = positions.buffer(memory, first, count, hidden);
                        Part in = from, sums = to;
                        if (!reads_in_place) {
                          in = positions.buffer(memory, first, count, channels);
                          positions.pass(in, from, channels, first, count, Activation::kNone);
                        }
                        if (!writes_in_place) sums = positions.buffer(memory, first, count, channels);
                        positions.multiply(inner, in, first_weight, first, count);
                        positions.pass(inner, inner, hidden, first, count, activation_of(activation), b1);
                        positions.multiply(sums, inner, second_weight, first, count);
                        positions.pass(to, sums, channels, first, count, Activation::kNone, b2, from.map);
                      });
  return y;
}

}  // namespace
}  // namespace mobilemamba

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, CPU, m) {
  m.impl("feed_forward_fwd", TORCH_BOX(&mobilemamba::feed_forward_forward));
}
