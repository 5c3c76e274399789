// The transforms on a GPU.
#include "bindings/cuda.h"
#include "bindings/haar.h"
#include "cuda/launchers.h"

namespace mobilemamba {

void run_haar_dwt2d(const Tensor& pixels, const Tensor& bands) {
  const HaarParams p = haar_params(pixels, bands);
  if (pixels.numel() != 0) OnDeviceOf(pixels).run(haar_dwt2d, p);
}

void run_haar_idwt2d(const Tensor& pixels, const Tensor& bands) {
  const HaarParams p = haar_params(pixels, bands);
  if (pixels.numel() != 0) OnDeviceOf(pixels).run(haar_idwt2d, p);
}

}  // namespace mobilemamba
