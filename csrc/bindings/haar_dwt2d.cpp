// haar_dwt2d_fwd and _bwd. The transform is orthonormal: its gradient is its inverse.
#include "bindings/haar.h"

namespace mobilemamba {
namespace {

Tensor forward(Tensor x) {
  STD_TORCH_CHECK(x.dim() == 4, "mobilemamba: haar_dwt2d takes 4 dimensions");
  Tensor bands = torch::stable::new_empty(x, {x.size(0), x.size(1), 4, half(x.size(2)), half(x.size(3))});
  run_haar_dwt2d(x, bands);
  return bands;
}

Tensor backward(Tensor grad_bands, Tensor x) {
  Tensor grad_x = torch::stable::empty_like(x);
  run_haar_idwt2d(grad_x, grad_bands);
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, MOBILEMAMBA_DEVICE, m) {
  m.impl("haar_dwt2d_fwd", TORCH_BOX(&forward));
  m.impl("haar_dwt2d_bwd", TORCH_BOX(&backward));
}

}  // namespace mobilemamba
