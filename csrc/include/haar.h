// What the operators of the Haar wavelet family share.
#pragma once

#include "include/tensor_view.h"

namespace mobilemamba {

// Both directions: haar_dwt2d reads the pixels and writes the bands, haar_idwt2d the other way round.
struct HaarParams {
  int64_t batch, channels, height, width;  // of the pixels
  Map pixels;
  Map bands;     // half the rows and columns, rounded up
  int64_t band;  // the stride from one band to the next
};

// A work item is kLanes channels of an image (or of a strip of this many band rows of a large one).
constexpr int64_t kHaarStrip = 64;

ANYWHERE constexpr int64_t half(int64_t size) { return size / 2 + size % 2; }

}  // namespace mobilemamba
