// What the bindings of SS2D share.
#pragma once

#include "bindings/tensor.h"
#include "include/ss2d_bidirectional.h"

namespace mobilemamba {

// Checked; x, z and out have rows that follow each other, so that positions are one dimension.
struct Ss2dArguments {
  Tensor x;
  std::optional<Tensor> z;
  Tensor x_proj, dt_proj, dt_bias, A_log, D, norm_weight, norm_bias, out;
  float eps;

  int64_t batch() const { return x.size(0); }
  int64_t dim() const { return x.size(1); }
  int64_t length() const { return x.size(2) * x.size(3); }
  int64_t rank() const { return dt_proj.size(2); }
  int64_t state() const { return A_log.size(2); }
};

// The positions of a map as one dimension.
inline Sequence flattened(const Tensor& t) {
  return {elements(t), t.stride(0), t.stride(1), t.size(3) > 1 ? t.stride(3) : t.stride(2)};
}

// Runs the forward of an x that is not empty; each device has its own.
void run_ss2d(Ss2dArguments& arguments);

}  // namespace mobilemamba
