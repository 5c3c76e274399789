// What the bindings share: kernels' views of tensors. Shapes were checked in Python; here only what memory safety needs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "include/capability.h"
#include "include/tensor_view.h"

namespace mobilemamba {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The elements of a CPU tensor of a type that the kernels take.
inline Elements elements(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), "mobilemamba: the CPU kernel got a tensor of another device; move it to the CPU");
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "mobilemamba: the kernels take float32, bfloat16 and float16; convert the tensor or use_backend(\"reference\")");
  return {t.data_ptr(), type == ScalarType::Float      ? DType::kFloat32
                        : type == ScalarType::BFloat16 ? DType::kBFloat16
                                                       : DType::kFloat16};
}
inline Elements elements(const std::optional<Tensor>& t) { return t ? elements(*t) : Elements{}; }

// The stride of a dimension, 0 for an absent tensor.
inline int64_t stride(const std::optional<Tensor>& t, int64_t dim) { return t ? t->stride(dim) : 0; }

inline void check_size(const Tensor& t, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(t.size(dim) == size, "mobilemamba: a tensor's size ", t.size(dim), " in dimension ", dim,
                  " does not match the other arguments' ", size, "; call the public function, which explains shapes");
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mobilemamba
