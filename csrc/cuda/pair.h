// Two neighbouring channels, read and written at once where channels are dense.
#pragma once

#include "cuda/device.h"

namespace mobilemamba {

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
  __device__ float2 floats() const { return {to_float(first), to_float(second)}; }
};

template <class T>
__device__ __forceinline__ Pair<T> pair_of(float2 v) {
  return {from_float<T>(v.x), from_float<T>(v.y)};
}

// Whether elements of a type can be read in pairs from there, and from there plus any of the strides.
template <class... Strides>
bool in_pairs(const Elements& e, DType dtype, Strides... strides) {
  return e.dtype == dtype && ((strides % 2 == 0) && ...) &&
         reinterpret_cast<uintptr_t>(e.data) % (2 * element_size(dtype)) == 0;
}

}  // namespace mobilemamba
