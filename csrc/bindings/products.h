// Products of positions and weights: the vendor's matrix product through PyTorch, in slabs whose results stay in cache
// until our own pass over them has run.
#pragma once

#include <array>

#include "bindings/convolution.h"
#include "include/pointwise_conv2d_act.h"

DECLARE_KERNEL(pointwise_conv2d_act, PointwiseConv2dActParams)

namespace mobilemamba {

// The type that products with x are computed in. Without instructions for 16 bits PyTorch's products are 10 times
// slower in them than in float32.
inline ScalarType product_type(const Tensor& x) {
#ifdef MOBILEMAMBA_X86
  const bool bfloat16 = __builtin_cpu_supports("avx512bf16");
#else
  const bool bfloat16 = true;
#endif
  return x.scalar_type() == ScalarType::BFloat16 && bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
}

inline Tensor convert(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// A map, or a buffer for the positions of one slab of it, which lacks the `skip` elements before them.
struct Part {
  Map map;
  int64_t skip = 0;
};

// Positions of (batch, height, width), worked on in slabs that are evenly spaced in the matrices' maps.
struct Positions {
  int64_t batch, height, width;
  ScalarType type;  // of the products
  bool join;        // images follow each other as rows do, so that a slab may span several

  // The strides of dimensions of size 1 mean nothing: make rows and images join where they can.
  Map map(const Tensor& t) const {
    Map m = map_of(t);
    if (width == 1) m.column = height == 1 ? m.batch : m.row;
    if (height == 1) m.row = width * m.column;
    if (batch == 1) m.batch = height * m.row;
    return m;
  }

  // Whether slabs of the map are matrices of the products' type, in place.
  bool is_matrix(const Map& m, ScalarType its_type) const {
    return its_type == type && (m.channel == 1 || m.column == 1) && m.row == width * m.column &&
           (!join || m.batch == height * m.row);
  }

  // A buffer of (positions, channels) for the slab that begins with `first`; moves `memory` behind it.
  Part buffer(char*& memory, int64_t first, int64_t positions, int64_t channels) const {
    const Elements e{memory, type == ScalarType::Float ? DType::kFloat32 : DType::kBFloat16};
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
                                      type);
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
    PointwiseConv2dActParams p{channels, height, width,  first,          activation,      x.map,  residual,
                               y.map,    x.skip, y.skip, elements(bias), stride(bias, 0), nullptr};
    parallel(KERNEL(pointwise_conv2d_act), p, positions, channels, pointwise_scratch(p, vector_lanes()));
  }

  // Calls f(first, positions, memory) for each slab on PyTorch's threads, with memory for `channels` of the products'
  // type. A slab that is alone, as too few positions to divide are, leaves the threads to the product and the pass.
  template <class F>
  void for_slabs(int64_t channels, const F& f) const {
    // Positions. Below `least` products slow down, beyond `most` results leave the cache; each product in 16 bits packs
    // the weights anew, which takes as long as 30 positions do.
    const int64_t least = type == ScalarType::Float ? 64 : 512, most = type == ScalarType::Float ? 128 : 1024;
    const int64_t groups = join ? 1 : batch, group = join ? batch * height * width : height * width;
    const int64_t threads = torch::stable::get_num_threads();
    int64_t parts = ceil_div(group, most);
    if (groups < threads) parts = std::clamp<int64_t>(group / least, 1, ceil_div(parts * groups, threads) * threads);
    const int64_t bytes = ceil_div(group, parts) * channels * (type == ScalarType::Float ? 4 : 2);
    torch::stable::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> memory(new char[bytes]);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t from = i % parts * group / parts, to = (i % parts + 1) * group / parts;
        f(i / parts * group + from, to - from, memory.get());
      }
    });
  }
};

}  // namespace mobilemamba
