// What the CUDA kernels of the Haar wavelet family share.
#pragma once

#include "cuda/columns.h"
#include "include/haar.h"

namespace mobilemamba {

// The four pixels of a 2×2 block in row-major order, or its four bands: the transform is its own inverse.
struct HaarBlock {
  float v[4];
  __device__ __forceinline__ HaarBlock transformed() const {
    const float top = v[0] + v[1], left = v[0] - v[1], bottom = v[2] + v[3], right = v[2] - v[3];
    const float half_top = 0.5f * top, half_left = 0.5f * left;
    return {{half_top + 0.5f * bottom, half_top - 0.5f * bottom, half_left + 0.5f * right, half_left - 0.5f * right}};
  }
};

constexpr int64_t kHaarRows = 4;  // band rows of a thread

ANYWHERE inline Columns haar_columns(const HaarParams& p) {
  return {p.batch, p.channels, half(p.height), half(p.width), kHaarRows, p.pixels.channel == 1};
}

}  // namespace mobilemamba
