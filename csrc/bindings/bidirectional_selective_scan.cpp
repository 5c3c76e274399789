// bidirectional_selective_scan_fwd and _bwd: the scan kernels with two directions.
#include <tuple>

#include "bindings/selective_scan.h"

namespace mobilemamba {
namespace {

ScanTensor sequence(const Tensor& t) {
  if (t.dim() == 3) return {elements(t), t.stride(0), 0, t.stride(1), 0, t.stride(2)};
  return {elements(t), t.stride(0), t.stride(1), t.stride(2), 0, t.stride(3)};
}
ScanTensor coefficients(const Tensor& t) {
  return {elements(t), t.stride(0), t.stride(1), 0, t.stride(2), t.stride(3)};
}
ScanTensor vector(const std::optional<Tensor>& t) { return {elements(t), 0, stride(t, 0), stride(t, 1), 0, 0}; }

SelectiveScanParams scan_params(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                                const std::optional<Tensor>& D, const std::optional<Tensor>& z,
                                const std::optional<Tensor>& delta_bias, bool softplus) {
  SelectiveScanParams p{};
  STD_TORCH_CHECK((u.dim() == 3 || u.dim() == 4) && delta.dim() == 4 && A.dim() == 3 && B.dim() == 4 && C.dim() == 4,
                  "mobilemamba: bidirectional_selective_scan got a wrong rank");
  p.batch = delta.size(0), p.dim = delta.size(2), p.length = delta.size(3), p.state = A.size(2);
  STD_TORCH_CHECK(p.state >= 1 && p.state <= kMaxState, "mobilemamba: N must be between 1 and 256, got ", p.state);
  for (const Tensor& t : {u, z.value_or(u)})
    check_size(t, 0, p.batch), check_size(t, t.dim() - 2, p.dim), check_size(t, t.dim() - 1, p.length);
  for (const Tensor& t : {B, C})
    check_size(t, 0, p.batch), check_size(t, 1, 2), check_size(t, 2, p.state), check_size(t, 3, p.length);
  if (u.dim() == 4) check_size(u, 1, 2);
  check_size(delta, 1, 2), check_size(A, 0, 2), check_size(A, 1, p.dim);
  for (const std::optional<Tensor>& t : {D, delta_bias})
    if (t) check_size(*t, 0, 2), check_size(*t, 1, p.dim);
  p.directions = 2, p.groups = 1, p.B_group = 1, p.C_group = 1;
  p.B_varies = p.C_varies = true;
  p.softplus = softplus;
  p.u = sequence(u), p.delta = sequence(delta);
  if (z) p.z = sequence(*z);
  p.A = {elements(A), 0, A.stride(0), A.stride(1), A.stride(2), 0};
  p.B = coefficients(B), p.C = coefficients(C);
  p.D = vector(D), p.delta_bias = vector(delta_bias);
  return p;
}

Tensor bidirectional_forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, std::optional<Tensor> D,
                             std::optional<Tensor> z, std::optional<Tensor> delta_bias, bool softplus) {
  SelectiveScanParams p = scan_params(u, delta, A, B, C, D, z, delta_bias, softplus);
  Tensor out = torch::stable::empty_like(u.dim() == 3 ? u : torch::stable::select(u, 1, 0));
  p.out = sequence(out);
  run_scan(p, u);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bidirectional_backward(
    Tensor grad_out, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, std::optional<Tensor> D,
    std::optional<Tensor> z, std::optional<Tensor> delta_bias, bool softplus) {
  SelectiveScanParams p = scan_params(u, delta, A, B, C, D, z, delta_bias, softplus);
  STD_TORCH_CHECK(grad_out.dim() == 3, "mobilemamba: bidirectional_selective_scan got a gradient of a wrong rank");
  check_size(grad_out, 0, p.batch), check_size(grad_out, 1, p.dim), check_size(grad_out, 2, p.length);
  p.grad_out = sequence(grad_out);
  Tensor grad_u = torch::stable::empty_like(u), grad_delta = torch::stable::empty_like(delta);
  Tensor grad_z = empty_for(z, u);
  p.grad_u = sequence(grad_u), p.grad_delta = sequence(grad_delta);
  if (z) p.grad_z = sequence(grad_z);
  const ScanSums sums = run_scan_backward(p, u);
  return {grad_u,
          grad_delta,
          like_argument(sums.A, A, u),
          like_argument(sums.B, B, u),
          like_argument(sums.C, C, u),
          like_argument(sums.D, D, u),
          grad_z,
          like_argument(sums.delta_bias, delta_bias, u)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, MOBILEMAMBA_DEVICE, m) {
  m.impl("bidirectional_selective_scan_fwd", TORCH_BOX(&bidirectional_forward));
  m.impl("bidirectional_selective_scan_bwd", TORCH_BOX(&bidirectional_backward));
}

}  // namespace mobilemamba
