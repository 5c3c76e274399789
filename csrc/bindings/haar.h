// What the bindings of the Haar wavelet family share.
#pragma once

#include "bindings/tensor.h"
#include "include/haar.h"

namespace mobilemamba {

// The arguments of haar_dwt2d and haar_idwt2d, which go between pixels and bands in one direction or the other.
inline HaarParams haar_params(const Tensor& pixels, const Tensor& bands) {
  HaarParams p{};
  STD_TORCH_CHECK(pixels.dim() == 4 && bands.dim() == 5, "mobilemamba: pixels must have 4 dimensions, bands 5");
  p.batch = pixels.size(0), p.channels = pixels.size(1), p.height = pixels.size(2), p.width = pixels.size(3);
  check_size(bands, 0, p.batch), check_size(bands, 1, p.channels), check_size(bands, 2, 4);
  check_size(bands, 3, half(p.height)), check_size(bands, 4, half(p.width));
  p.pixels = map_of(pixels);
  p.bands = {elements(bands), bands.stride(0), bands.stride(1), bands.stride(3), bands.stride(4)};
  p.band = bands.stride(2);
  return p;
}

// Between pixels and bands, which may be empty; each device has its own.
void run_haar_dwt2d(const Tensor& pixels, const Tensor& bands);
void run_haar_idwt2d(const Tensor& pixels, const Tensor& bands);

}  // namespace mobilemamba
