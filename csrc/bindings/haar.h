// What the bindings of the Haar wavelet family share.
#pragma once

#include "bindings/tensor.h"
#include "include/haar.h"

namespace mobilemamba {

// Runs haar_dwt2d or haar_idwt2d, whichever `kernel` is, between pixels and bands.
inline void run_haar(void (*kernel)(const HaarParams&, int64_t, int64_t), const Tensor& pixels, const Tensor& bands) {
  HaarParams p{};
  STD_TORCH_CHECK(pixels.dim() == 4 && bands.dim() == 5, "mobilemamba: pixels must have 4 dimensions, bands 5");
  p.batch = pixels.size(0), p.channels = pixels.size(1), p.height = pixels.size(2), p.width = pixels.size(3);
  check_size(bands, 0, p.batch), check_size(bands, 1, p.channels), check_size(bands, 2, 4);
  check_size(bands, 3, half(p.height)), check_size(bands, 4, half(p.width));
  if (pixels.numel() == 0) return;
  p.pixels = map_of(pixels);
  p.bands = {elements(bands), bands.stride(0), bands.stride(1), bands.stride(3), bands.stride(4)};
  p.band = bands.stride(2);
  const int64_t lanes = vector_lanes(), strips = ceil_div(half(p.height), kHaarStrip);
  const int64_t items = p.batch * ceil_div(p.channels, lanes) * strips;
  const int64_t positions = std::min(kHaarStrip, half(p.height)) * half(p.width);  // of an item, each about ten cycles
  torch::stable::parallel_for(0, items, std::max<int64_t>(1, 2048 / positions),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace mobilemamba
