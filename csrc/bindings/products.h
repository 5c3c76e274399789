// Matrix products of positions and weights: packing, and the division of the work.
#pragma once

#include <string>
#include <vector>

#include "bindings/convolution.h"
#include "include/pack_weight.h"
#include "include/pointwise_conv2d_act.h"

DECLARE_KERNEL(pack_weight, PackWeightParams)
DECLARE_KERNEL(pointwise_conv2d_act, PointwiseConv2dActParams)

namespace mobilemamba {

inline Tensor convert(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// The outputs of a weight, plain or packed, whose bias then tells. The bias has as many, whoever reads it.
inline int64_t outputs_of(const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(!bias || bias->dim() == 1, "mobilemamba: bias must have one dimension, got ", bias->dim());
  STD_TORCH_CHECK(bias || weight.dim() != 3, "mobilemamba: a packed weight needs a bias");
  if (weight.dim() == 3) return bias->size(0);
  if (bias) check_size(*bias, 0, weight.size(0));
  return weight.size(0);
}

// Whether products of bfloat16 have instructions of their own.
inline bool bfloat16_in_hardware() { return capability() >= Capability::kAvx512Bf16; }

// Whether x and weight are multiplied in bfloat16: where the weight has it; and where x has it, the weight is not
// packed as something else, and the processor has the instructions, without which a weight of float32 loses nothing.
inline bool in_bfloat16(const Tensor& x, const Tensor& weight) {
  return weight.scalar_type() == ScalarType::BFloat16 ||
         (x.scalar_type() == ScalarType::BFloat16 && weight.dim() != 3 && bfloat16_in_hardware());
}
// Matrix instructions are the vendor's business. Its convolutions round their results, which suits maps of bfloat16
// only.
inline bool vendor_multiplies(const Tensor& x, const Tensor& weight) {
  return capability() == Capability::kAmx && in_bfloat16(x, weight) && weight.dim() != 3;
}

// Packs (outputs, channels, rows, columns) at `weight`, whose batch are the outputs.
inline PackedWeight pack(const Map& weight, int64_t outputs, int64_t channels, int64_t rows, int64_t columns,
                         bool bfloat16, void* to) {
  const PackedWeight packed{to, bfloat16, bfloat16_in_hardware(), outputs, rows * columns * channels};
  const PackWeightParams p{weight, channels, rows, columns, packed, to, nullptr};
  const int64_t size = packed_size(outputs, packed.depth, bfloat16), panels = packed_panels(outputs);
  if (size > 0) parallel(KERNEL(pack_weight), p, panels, size / panels / 4, pack_weight_scratch(vector_lanes()));
  return packed;
}

// A weight as the kernels read it, with its bias as float32, and what keeps them in memory.
struct Weights {
  PackedWeight packed;
  Tensor memory;
  std::vector<float> bias;
};

// weight: packed, or (outputs, channels) or (outputs, channels, k, k), whose depth runs over (k, k, channels).
inline Weights pack(const Tensor& weight, const std::optional<Tensor>& bias, int64_t channels, bool bfloat16) {
  const int64_t outputs = outputs_of(weight, bias);
  Weights result{{nullptr, bfloat16, bfloat16_in_hardware(), outputs, 0}, weight, {}};
  result.bias = bias ? values(*bias) : std::vector<float>();
  result.bias.resize(packed_vectors(outputs) * kPackedLanes);
  const ScalarType type = bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  if (weight.dim() == 3) {
    const int64_t together = bfloat16 ? 2 : 1;
    STD_TORCH_CHECK(weight.scalar_type() == type && weight.is_contiguous() && weight.size(2) == 16 * together &&
                        weight.size(0) == packed_vectors(outputs),
                    "mobilemamba: a packed weight must be as pack_weight made it, of as many outputs as the bias");
    result.packed.data = elements(weight).data;
    result.packed.depth = weight.size(1) * together;
    return result;
  }
  Map map{elements(weight), weight.stride(0), weight.stride(1), 0, 0};
  int64_t rows = 1, columns = 1;
  if (weight.dim() == 4) {
    rows = weight.size(2), columns = weight.size(3);
    map.row = weight.stride(2), map.column = weight.stride(3);
  }
  const int64_t size = packed_size(outputs, rows * columns * channels, bfloat16);
  result.memory = torch::stable::new_empty(weight, {size}, type);
  result.packed = pack(map, outputs, channels, rows, columns, bfloat16, result.memory.data_ptr());
  return result;
}

// Requires that a weight's depth is that of `channels` channels.
inline void check_depth(const Weights& weights, int64_t channels) {
  const int64_t depth = weights.packed.depth;
  STD_TORCH_CHECK(depth == packed_depth(channels, weights.packed.bfloat16) || depth == channels,
                  "mobilemamba: a weight of depth ", depth, " does not match ", channels,
                  " channels; call the public function, which explains shapes");
}

// A map whose dimensions of size 1, whose strides mean nothing, split no positions.
inline Map joined_map(const Tensor& t) {
  Map m = map_of(t);
  if (t.size(3) == 1) m.column = t.size(2) == 1 ? m.batch : m.row;
  if (t.size(2) == 1) m.row = t.size(3) * m.column;
  if (t.size(0) == 1) m.batch = t.size(2) * m.row;
  return m;
}

inline Product product_of(const Tensor& x, const Weights& weights, const Tensor& y) {
  Product p{};
  p.height = x.size(2), p.width = x.size(3);
  p.x[0] = {joined_map(x), x.size(1)}, p.y = joined_map(y);
  p.weight = weights.packed, p.weight.depth = x.size(1);
  p.bias = weights.bias.data();
  return p;
}

// Positions of a block: their x and what else they have stay in the second cache while the weight goes by.
inline int64_t block_of(int64_t floats_a_position) {
  return std::clamp<int64_t>((1 << 16) / (floats_a_position + 1), 16, 96);
}
// Whether there are positions enough to give every thread some.
inline bool positions_suffice(int64_t positions) { return positions >= 64 * torch::stable::get_num_threads(); }
inline int64_t blocks_of(int64_t positions, int64_t block) {
  const int64_t blocks = ceil_div(positions, block), threads = torch::stable::get_num_threads();
  return positions_suffice(positions) ? ceil_div(blocks, threads) * threads : blocks;
}

inline void run(const Product& product, int64_t positions) {
  const PackedWeight& w = product.weight;
  if (w.outputs == 0) return;
  const int64_t blocks = blocks_of(positions, block_of(w.depth));
  const int64_t groups = std::clamp<int64_t>(torch::stable::get_num_threads() / blocks, 1, packed_panels(w.outputs));
  const PointwiseConv2dActParams p{product, positions, blocks, groups, nullptr};
  const int64_t block = ceil_div(positions, blocks);
  parallel(KERNEL(pointwise_conv2d_act), p, blocks * groups,
           block * w.depth * ceil_div(w.outputs, groups) / vector_lanes(), product_scratch(product, block));
}

}  // namespace mobilemamba
