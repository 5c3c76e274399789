// What the bindings of the convolution operators share.
#pragma once

#include <string>

#include "bindings/tensor.h"
#include "include/activation.h"

namespace mobilemamba {

inline Activation activation_of(const std::string& name) {
  return name == "relu" ? Activation::kRelu : name == "silu" ? Activation::kSilu : Activation::kNone;
}

// A result of the given size in the layout of x: channels-last for channels-last, else channels-first, whose strides it
// also has where both layouts are the same bytes.
inline Tensor empty_image(const Tensor& x, int64_t channels, int64_t height, int64_t width) {
  const bool differ = channels != 1 && height * width != 1, last = x.stride(1) == 1 && x.size(1) > 1 && differ;
  return torch::stable::empty(
      {x.size(0), channels, height, width}, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
      last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

// Outputs along a dimension of `size`; refuses what does not fit and numbers whose sums would overflow.
inline int64_t output_size(int64_t size, int64_t k, int64_t stride, int64_t padding) {
  constexpr int64_t kEnd = int64_t{1} << 31;
  STD_TORCH_CHECK(
      k >= 1 && stride >= 1 && stride < kEnd && padding >= 0 && padding < kEnd && size + 2 * padding >= k,
      "mobilemamba: the filter does not fit into the padded image; call the public function, which explains");
  return (size + 2 * padding - k) / stride + 1;
}

inline void check_image(const std::optional<Tensor>& t, const Tensor& shaped_as) {
  for (int64_t i = 0; t && i < 4; ++i) check_size(*t, i, shaped_as.size(i));
}

}  // namespace mobilemamba
