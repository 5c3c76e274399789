// Products of positions and weights in bfloat16 by the vendor's library, through PyTorch, in slabs whose results stay
// in cache until our own pass over them has run: for processors with matrix instructions.
#pragma once

#include <array>

#include "bindings/products.h"
#include "include/vendor_pass.h"

DECLARE_KERNEL(vendor_pass, VendorPassParams)

namespace mobilemamba {

// A map, or a buffer for the positions of one slab of it, which lacks the `skip` elements before them.
struct Part {
  Map map;
  int64_t skip = 0;
};

// Positions of (batch, height, width), worked on in slabs that are evenly spaced in the matrices' maps.
struct Positions {
  static constexpr ScalarType kType = ScalarType::BFloat16;
  int64_t batch, height, width;
  bool join;  // images follow each other as rows do, so that a slab may span several

  // Whether slabs of the map are matrices of the products' type, in place.
  bool is_matrix(const Map& m) const {
    return m.elements.dtype == DType::kBFloat16 && (m.channel == 1 || m.column == 1) && m.row == width * m.column &&
           (!join || m.batch == height * m.row);
  }

  // A buffer of (positions, channels) for the slab that begins with `first`; moves `memory` behind it.
  Part buffer(char*& memory, int64_t first, int64_t positions, int64_t channels) const {
    const Elements e{memory, DType::kBFloat16};
    memory += positions * channels * element_size(e.dtype);
    return {{e, height * width * channels, 1, width * channels, channels}, first * channels};
  }

  // out = in · weightᵀ + bias for a slab. All are new tensors: the threads of a parallel_for know nothing of the
  // caller's grad mode, and out= refuses what requires a gradient.
  void multiply(const Part& out, const Part& in, const Tensor& weight, int64_t first, int64_t positions,
                const std::optional<Tensor>& bias = std::nullopt) const {
    using Numbers = torch::headeronly::IntHeaderOnlyArrayRef;
    const auto tensor = [&](void* data, Numbers sizes, Numbers strides) {
      return torch::stable::from_blob(data, sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                      kType);
    };
    const auto slab = [&](const Part& part, int64_t channels) {
      const Map& m = part.map;
      const int64_t image = height * width, offset = first / image * m.batch + first % image * m.column - part.skip;
      return tensor((m.elements + offset).data, {positions, channels}, {m.column, m.channel});
    };
    const auto same = [&](const Tensor& t) { return tensor(t.data_ptr(), t.sizes(), t.strides()); };
    using torch::stable::detail::from;
    std::array<StableIValue, 4> stack{from(slab(in, weight.size(1))), from(same(weight)),
                                      from(bias ? std::make_optional(same(*bias)) : std::nullopt),
                                      from(slab(out, weight.size(0)))};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }

  // y = activation(x + bias) + residual for a slab.
  void pass(const Part& y, const Part& x, int64_t channels, int64_t first, int64_t positions, Activation activation,
            const std::optional<Tensor>& bias = std::nullopt, const Map& residual = {}) const {
    VendorPassParams p{channels, height, width,  first,          activation,      x.map,  residual,
                       y.map,    x.skip, y.skip, elements(bias), stride(bias, 0), nullptr};
    parallel(KERNEL(vendor_pass), p, positions, channels, vendor_pass_scratch(p, vector_lanes()));
  }

  // Calls f(first, positions, memory) for each slab on PyTorch's threads, with memory for `channels` of the products'
  // type. A slab that is alone, as too few positions to divide are, leaves the threads to the product and the pass.
  template <class F>
  void for_slabs(int64_t channels, const F& f) const {
    // Positions. Below `least` products slow down, as each packs the weights anew, which takes as long as 30 positions
    // do; beyond `most` results leave the cache.
    constexpr int64_t least = 512, most = 1024;
    const int64_t groups = join ? 1 : batch, group = join ? batch * height * width : height * width;
    const int64_t threads = torch::stable::get_num_threads();
    int64_t parts = ceil_div(group, most);
    if (groups < threads) parts = std::clamp<int64_t>(group / least, 1, ceil_div(parts * groups, threads) * threads);
    const int64_t bytes = ceil_div(group, parts) * channels * element_size(DType::kBFloat16);
    torch::stable::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> memory(new char[bytes]);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t from = i % parts * group / parts, to = (i % parts + 1) * group / parts;
        f(i / parts * group + from, to - from, memory.get());
      }
    });
  }
};

// The channels of several maps in one.
inline Tensor joined_channels(const std::vector<Tensor>& maps) {
  if (maps.size() == 1) return maps[0];
  const Tensor& x = maps[0];
  int64_t channels = 0;
  for (const Tensor& t : maps) channels += t.size(1);
  const Tensor all = empty_image(x, channels, x.size(2), x.size(3));
  channels = 0;
  for (const Tensor& t : maps) {
    Tensor part = torch::stable::narrow(const_cast<Tensor&>(all), 1, channels, t.size(1));
    torch::stable::copy_(part, t);
    channels += t.size(1);
  }
  return all;
}

inline void vendor_pointwise(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                             Activation before, Activation after, const std::optional<Tensor>& residual,
                             const Tensor& y) {
  const int64_t channels = x.size(1), out = y.size(1);
  Positions positions{x.size(0), x.size(2), x.size(3), true};
  const Part from{joined_map(x)}, to{joined_map(y)};
  positions.join = to.map.batch == positions.height * to.map.row;
  const Map added = residual ? joined_map(*residual) : Map{};
  const Tensor weights = convert(weight, Positions::kType);
  const bool reads_in_place = before == Activation::kNone && positions.is_matrix(from.map);
  const bool writes_in_place = positions.is_matrix(to.map);
  // The product adds a bias faster than a pass of our own, which adds it for nothing where it has to run anyway.
  const bool passes = residual || after != Activation::kNone || !writes_in_place;
  const std::optional<Tensor> product_bias =
      bias && !passes ? std::make_optional(convert(*bias, Positions::kType)) : std::nullopt;

  if (reads_in_place && !passes && positions.join) {  // nothing of our own to keep in cache for
    positions.multiply(to, from, weights, 0, positions.batch * positions.height * positions.width, product_bias);
    return;
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
}

inline void vendor_feed_forward(const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
                                const std::optional<Tensor>& b2, Activation activation,
                                const std::optional<Tensor>& residual, Tensor& y) {
  const int64_t channels = x.size(1), hidden = w1.size(0);
  Positions positions{x.size(0), x.size(2), x.size(3), true};
  const Part from{joined_map(x)}, to{joined_map(y)};
  positions.join = to.map.batch == positions.height * to.map.row;
  const Tensor first_weight = convert(w1, Positions::kType), second_weight = convert(w2, Positions::kType);
  const bool reads_in_place = positions.is_matrix(from.map), writes_in_place = positions.is_matrix(to.map);
  const Map added = residual ? joined_map(*residual) : Map{};

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
                        positions.pass(inner, inner, hidden, first, count, activation, b1);
                        positions.multiply(sums, inner, second_weight, first, count);
                        positions.pass(to, sums, channels, first, count, Activation::kNone, b2, from.map);
                        if (residual) positions.pass(to, to, channels, first, count, Activation::kNone, {}, added);
                      });
}

}  // namespace mobilemamba
