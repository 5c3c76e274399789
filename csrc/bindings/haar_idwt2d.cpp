// haar_idwt2d_fwd and _bwd. The gradient of the inverse is the transform; what was cropped counts as zero.
#include "bindings/haar.h"

namespace mobilemamba {
namespace {

Tensor forward(Tensor bands, int64_t height, int64_t width) {
  STD_TORCH_CHECK(bands.dim() == 5, "mobilemamba: haar_idwt2d takes 5 dimensions");
  Tensor x = torch::stable::new_empty(bands, {bands.size(0), bands.size(1), height, width});
  run_haar_idwt2d(x, bands);
  return x;
}

Tensor backward(Tensor grad_x, Tensor bands, int64_t, int64_t) {
  Tensor grad_bands = torch::stable::empty_like(bands);
  run_haar_dwt2d(grad_x, grad_bands);
  return grad_bands;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, MOBILEMAMBA_DEVICE, m) {
  m.impl("haar_idwt2d_fwd", TORCH_BOX(&forward));
  m.impl("haar_idwt2d_bwd", TORCH_BOX(&backward));
}

}  // namespace mobilemamba
