// Activations of vectors.
#pragma once

#include "cpu/vec.h"
#include "include/activation.h"

BEGIN_KERNELS
namespace {

// Calls f with a function from Vec to Vec, so that the choice is made once for many vectors.
template <class F>
INLINE void with_activation(Activation activation, F f) {
  if (activation == Activation::kRelu) return f([](Vec v) { return at_least(v, splat(0.0f)); });
  if (activation == Activation::kSilu) return f([](Vec v) { return silu(v); });
  f([](Vec v) { return v; });
}

}  // namespace
END_KERNELS
