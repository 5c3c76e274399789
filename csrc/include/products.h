// Matrix products over the positions of a map: y = activation(weight · input_activation(x) + bias) + residual.
#pragma once

#include "include/activation.h"
#include "include/tensor_view.h"

namespace mobilemamba {

// A packed weight (outputs, depth) lies in panels of up to 48 outputs, so that a kernel reads it from beginning to end:
// [panel][depth][output], outputs padded with zeros to a multiple of 16 and panels as equal as they can be. Bfloat16
// keeps pairs of the depth together, [panel][depth / 2][output][2], an odd depth padded with zeros.
constexpr int64_t kPackedLanes = 16, kPanelVectors = 3;

inline int64_t packed_vectors(int64_t outputs) { return (outputs + kPackedLanes - 1) / kPackedLanes; }
// As few as there can be, or one more where that makes them even in number, to divide, and leaves them wide.
inline int64_t packed_panels(int64_t outputs) {
  const int64_t vectors = packed_vectors(outputs), least = (vectors + kPanelVectors - 1) / kPanelVectors;
  const int64_t even = least + least % 2;
  return 5 * even <= 2 * vectors ? even : least;
}
// The output that a panel begins with; of the last but one, where they end.
inline int64_t panel_begin(int64_t outputs, int64_t panel) {
  return packed_vectors(outputs) * panel / packed_panels(outputs) * kPackedLanes;
}
inline int64_t packed_depth(int64_t depth, bool bfloat16) { return bfloat16 ? (depth + 1) / 2 * 2 : depth; }
inline int64_t packed_size(int64_t outputs, int64_t depth, bool bfloat16) {
  return packed_vectors(outputs) * kPackedLanes * packed_depth(depth, bfloat16);
}

struct PackedWeight {
  const void* data;
  bool bfloat16, in_hardware;  // in_hardware: the processor has instructions for products of bfloat16
  int64_t outputs, depth;
};

// What a product reads: the channels of one map, or of several one behind the other.
constexpr int kMostInputs = 3;
struct ProductInput {
  Map map;
  int64_t channels;
};

struct Product {
  int64_t height,
      width;  // positions are (batch, height, width), whose maps have no dimension of size 1 that splits them
  ProductInput x[kMostInputs];
  Map residual, more, y;  // residual and more, which are added, may be absent
  Activation input_activation, activation;
  PackedWeight weight;
  const float* bias;  // (outputs), padded to a multiple of kPackedLanes
};

// Whether rows and images of a map follow each other as positions do.
inline bool positions_join(const Product& p, const Map& m) {
  return m.row == p.width * m.column && m.batch == p.height * m.row;
}
inline bool channels_inside(const Product& p, const Map& m) { return m.channel == 1 && positions_join(p, m); }
// Whether a product reads x, or writes y, where it lies.
inline bool reads_in_place(const Product& p) {
  const bool whole = p.weight.depth == packed_depth(p.weight.depth, p.weight.bfloat16);
  const DType type = p.weight.bfloat16 ? DType::kBFloat16 : DType::kFloat32;
  const Map& x = p.x[0].map;
  return p.input_activation == Activation::kNone && p.x[0].channels == p.weight.depth && x.elements.dtype == type &&
         whole && channels_inside(p, x);
}
inline bool writes_in_place(const Product& p) {
  const auto fits = [&](const Map& m) {
    return !m || (channels_inside(p, m) && m.elements.dtype == p.y.elements.dtype);
  };
  return fits(p.y) && p.y.elements.dtype != DType::kFloat16 && fits(p.residual) && fits(p.more);
}

// `count` positions as the kernel reads and writes them: channels side by side, the depth in equal runs.
struct Slab {
  PackedWeight weight;
  const float* bias;
  Activation activation;
  const void* x;  // float32, or bfloat16 for a weight of bfloat16
  int64_t x_step, runs, run_step;
  int64_t count;
  Elements y;  // float32 or bfloat16, as residual and more, which may be absent
  int64_t y_step;
  Elements residual, more;
  int64_t residual_step, more_step;
};

// Floats of scratch for `positions` of a product: x as the product reads it, a panel's sums and a tile of the residual.
constexpr int64_t kProductTile = 64;  // positions that are transposed together
inline int64_t product_input(const Product& p, int64_t positions) {
  const int64_t depth = packed_depth(p.weight.depth, p.weight.bfloat16);
  return reads_in_place(p) ? 0 : positions * (p.weight.bfloat16 ? depth / 2 : depth);
}
inline int64_t product_scratch(const Product& p, int64_t positions) {
  return product_input(p, positions) + (positions * kPanelVectors + 2 * kProductTile) * kPackedLanes;
}

}  // namespace mobilemamba
