// cross_merge_fwd and _bwd. What is added has the gradient of the sum.
#include "bindings/cross_scan.h"

namespace mobilemamba {
namespace {

Tensor forward(Tensor sequences, int64_t height, int64_t width, int64_t scans, bool one_by_one, bool channels_last) {
  STD_TORCH_CHECK(sequences.dim() == 4, "mobilemamba: sequences must have 4 dimensions, got ", sequences.dim());
  const int64_t batch = sequences.size(0), channels = sequences.size(2), length = sequences.size(3);
  std::vector<int64_t> shape{batch};
  if (channels_last) shape.push_back(length);
  if (one_by_one) shape.push_back(4);
  shape.push_back(channels);
  if (!channels_last) shape.push_back(length);
  Tensor images = torch::stable::new_empty(sequences, shape);
  CrossScanParams p = with_rows(images, height, width, scans, one_by_one, channels_last);
  set_sequences(p, sequences, false);
  run_cross_merge(p, sequences);
  return images;
}

Tensor backward(Tensor grad_images, Tensor sequences, int64_t height, int64_t width, int64_t scans, bool one_by_one,
                bool channels_last) {
  Tensor grad_sequences = torch::stable::empty_like(sequences);
  CrossScanParams p = with_rows(grad_images, height, width, scans, one_by_one, channels_last);
  set_sequences(p, grad_sequences, false);
  run_cross_scan(p, sequences);
  return grad_sequences;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, MOBILEMAMBA_DEVICE, m) {
  m.impl("cross_merge_fwd", TORCH_BOX(&forward));
  m.impl("cross_merge_bwd", TORCH_BOX(&backward));
}

}  // namespace mobilemamba
