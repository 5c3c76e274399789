// cross_scan_fwd and _bwd. What is copied four times has the sum of four gradients.
#include "bindings/cross_scan.h"

namespace mobilemamba {
namespace {

Tensor forward(Tensor images, int64_t scans, bool channels_last) {
  CrossScanParams p = with_maps(images, scans);
  const int64_t length = p.height * p.width;
  Tensor sequences = channels_last ? torch::stable::new_empty(images, {p.batch, length, 4, p.channels})
                                   : torch::stable::new_empty(images, {p.batch, 4, p.channels, length});
  set_sequences(p, sequences, channels_last);
  run_cross_scan(p, images);
  return sequences;
}

Tensor backward(Tensor grad_sequences, Tensor images, int64_t scans, bool channels_last) {
  Tensor grad_images = torch::stable::empty_like(images);
  CrossScanParams p = with_maps(grad_images, scans);
  set_sequences(p, grad_sequences, channels_last);
  run_cross_merge(p, images);
  return grad_images;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, MOBILEMAMBA_DEVICE, m) {
  m.impl("cross_scan_fwd", TORCH_BOX(&forward));
  m.impl("cross_scan_bwd", TORCH_BOX(&backward));
}

}  // namespace mobilemamba
