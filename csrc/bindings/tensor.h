// What the bindings share: kernels' views of tensors. Shapes were checked in Python; here is only what memory safety
// needs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "include/capability.h"
#include "include/tensor_view.h"

namespace mobilemamba {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The elements of a tensor of this library's device, and of a type that the kernels take.
inline Elements elements(const Tensor& t) {
#ifdef MOBILEMAMBA_CUDA
  STD_TORCH_CHECK(t.is_cuda(), "mobilemamba: the CUDA kernel got a tensor of another device; move all to one device");
#else
  STD_TORCH_CHECK(t.is_cpu(), "mobilemamba: the CPU kernel got a tensor of another device; move it to the CPU");
#endif
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "mobilemamba: the kernels take float32, bfloat16 and float16; convert the tensor or use_backend(\"reference\")");
  return {t.data_ptr(), type == ScalarType::Float      ? DType::kFloat32
                        : type == ScalarType::BFloat16 ? DType::kBFloat16
                                                       : DType::kFloat16};
}
inline Elements elements(const std::optional<Tensor>& t) { return t ? elements(*t) : Elements{}; }

// What an argument's gradient is written to. Empty for an absent one, and then too a tensor that no other result is.
inline Tensor empty_for(const std::optional<Tensor>& argument, const Tensor& any) {
  return argument ? torch::stable::empty_like(*argument) : torch::stable::new_empty(any, {0});
}

// The stride of a dimension, 0 for an absent tensor.
inline int64_t stride(const std::optional<Tensor>& t, int64_t dim) { return t ? t->stride(dim) : 0; }

inline Map map_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, "mobilemamba: a map must have four dimensions, got ", t.dim());
  return {elements(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

inline Sequence sequence_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 3, "mobilemamba: a sequence must have three dimensions, got ", t.dim());
  return {elements(t), t.stride(0), t.stride(1), t.stride(2)};
}

// Integers of `dims` dimensions, the first of size `batch`.
inline Indices indices_of(const std::optional<Tensor>& t, int64_t dims, int64_t batch) {
  if (!t) return {};
  const ScalarType type = t->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long,
                  "mobilemamba: indices must be int32 or int64; convert them");
#ifdef MOBILEMAMBA_CUDA
  STD_TORCH_CHECK(t->is_cuda(), "mobilemamba: the CUDA kernel got indices of another device; move all to one device");
#else
  STD_TORCH_CHECK(t->is_cpu(), "mobilemamba: the CPU kernel got indices of another device; move them to the CPU");
#endif
  STD_TORCH_CHECK(t->dim() == dims && t->size(0) == batch, "mobilemamba: indices must have ", dims,
                  " dimensions, the first of ", batch);
  return {t->data_ptr(), type == ScalarType::Long, t->stride(0), dims == 2 ? t->stride(1) : 0};
}

inline void check_size(const Tensor& t, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(t.size(dim) == size, "mobilemamba: a tensor's size ", t.size(dim), " in dimension ", dim,
                  " does not match the other arguments' ", size, "; call the public function, which explains shapes");
}

// Checks that indices are below `rows`. A GPU's are not looked at: that would wait for it.
inline void check_rows([[maybe_unused]] const char* op, [[maybe_unused]] const char* name,
                       [[maybe_unused]] const Indices& indices, [[maybe_unused]] int64_t batch,
                       [[maybe_unused]] int64_t rows) {
#ifndef MOBILEMAMBA_CUDA
  for (int64_t b = 0; indices && b < batch; ++b)
    STD_TORCH_CHECK(indices.at(b) < rows, op, ": ", name, " must be below ", rows, "; got ", indices.at(b));
#endif
}

// Checks that a tensor that is changed has every element once.
inline void check_dense(const char* op, const char* name, const Tensor& t) {
  for (int64_t i = 0; i < t.dim(); ++i)
    STD_TORCH_CHECK(t.stride(i) != 0 || t.size(i) <= 1, op, ": ", name,
                    " is expanded, so it cannot be changed in place");
}

// The elements of a small parameter in row-major order, as float32.
inline std::vector<float> values(const Tensor& t) {
  const bool ready = t.scalar_type() == ScalarType::Float && t.is_contiguous();  // converting takes microseconds
  const Tensor dense = ready ? t : torch::stable::contiguous(torch::stable::to(t, ScalarType::Float));
  const float* p = static_cast<const float*>(dense.data_ptr());
  return {p, p + t.numel()};
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs kernel(params, begin, end) over [0, count) on PyTorch's threads, each with `scratch` floats of its own.
// cost: of one item, in elementary operations; decides how many items are worth a thread.
template <class Params>
void parallel(void (*kernel)(const Params&, int64_t, int64_t), const Params& params, int64_t count, int64_t cost,
              int64_t scratch) {
  constexpr int64_t kWorthAThread = 1 << 15;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, cost));
  std::atomic<bool> refused{false};  // what is thrown within parallel_for loses its sentence
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    struct Free {
      void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
    };
    std::unique_ptr<float[], Free> memory(
        static_cast<float*>(::operator new[](scratch * 4, std::align_val_t(64), std::nothrow)));
    if (!memory) {
      refused = true;
      return;
    }
    Params mine = params;
    mine.scratch = memory.get();
    kernel(mine, begin, end);
  });
  STD_TORCH_CHECK(!refused, "mobilemamba: there is no memory for ", scratch * 4,
                  " bytes of scratch a thread; use smaller maps, padding or sequences, or fewer threads");
}

}  // namespace mobilemamba
