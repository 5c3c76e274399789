// selective_scan_fwd and selective_scan_bwd.
#include "bindings/selective_scan.h"

#include <numeric>
#include <tuple>

namespace mobilemamba {
namespace {

ScanTensor sequence(const Tensor& t) { return {elements(t), t.stride(0), 0, t.stride(1), 0, t.stride(2)}; }
ScanTensor sequence(const std::optional<Tensor>& t) { return t ? sequence(*t) : ScanTensor{}; }
ScanTensor vector(const std::optional<Tensor>& t) { return {elements(t), 0, 0, stride(t, 0), 0, 0}; }

// B or C in any of its three shapes.
ScanTensor coefficients(const Tensor& t) {
  if (t.dim() == 2) return {elements(t), 0, 0, t.stride(0), t.stride(1), 0};
  if (t.dim() == 3) return {elements(t), t.stride(0), 0, 0, t.stride(1), t.stride(2)};
  return {elements(t), t.stride(0), 0, t.stride(1), t.stride(2), t.stride(3)};
}

void check_coefficients(const Tensor& t, const SelectiveScanParams& p) {
  STD_TORCH_CHECK(t.dim() >= 2 && t.dim() <= 4, "mobilemamba: B and C must have 2 to 4 dimensions, got ", t.dim());
  if (t.dim() == 2) return check_size(t, 0, p.dim), check_size(t, 1, p.state);
  check_size(t, 0, p.batch), check_size(t, t.dim() - 2, p.state), check_size(t, t.dim() - 1, p.length);
}

SelectiveScanParams scan_params(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                                const std::optional<Tensor>& D, const std::optional<Tensor>& z,
                                const std::optional<Tensor>& delta_bias, bool softplus) {
  SelectiveScanParams p{};
  STD_TORCH_CHECK(u.dim() == 3 && delta.dim() == 3 && A.dim() == 2, "mobilemamba: selective_scan got a wrong rank");
  p.batch = u.size(0), p.dim = u.size(1), p.length = u.size(2), p.state = A.size(1);
  STD_TORCH_CHECK(p.state >= 1 && p.state <= kMaxState, "mobilemamba: N must be between 1 and 256, got ", p.state);
  for (const Tensor& t : {delta, z.value_or(u)})
    check_size(t, 0, p.batch), check_size(t, 1, p.dim), check_size(t, 2, p.length);
  check_size(A, 0, p.dim);
  check_coefficients(B, p), check_coefficients(C, p);
  if (D) check_size(*D, 0, p.dim);
  if (delta_bias) check_size(*delta_bias, 0, p.dim);
  p.directions = 1;
  p.softplus = softplus;
  p.u = sequence(u), p.delta = sequence(delta), p.z = sequence(z);
  p.A = {elements(A), 0, 0, A.stride(0), A.stride(1), 0};
  p.B = coefficients(B), p.C = coefficients(C);
  p.B_varies = B.dim() > 2, p.C_varies = C.dim() > 2;
  const int64_t B_groups = B.dim() == 4 ? B.size(1) : 1, C_groups = C.dim() == 4 ? C.size(1) : 1;
  p.groups = std::max<int64_t>(1, std::lcm(B_groups, C_groups));
  STD_TORCH_CHECK(p.dim == 0 || (p.dim % p.groups == 0 && B_groups > 0 && C_groups > 0),
                  "mobilemamba: dim must be a multiple of the groups of B and of C");
  p.B_group = p.groups / std::max<int64_t>(1, B_groups), p.C_group = p.groups / std::max<int64_t>(1, C_groups);
  p.D = vector(D), p.delta_bias = vector(delta_bias);
  return p;
}

std::tuple<Tensor, Tensor> selective_scan_forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                                                  std::optional<Tensor> D, std::optional<Tensor> z,
                                                  std::optional<Tensor> delta_bias, bool softplus) {
  SelectiveScanParams p = scan_params(u, delta, A, B, C, D, z, delta_bias, softplus);
  Tensor out = torch::stable::empty_like(u);
  Tensor last = torch::stable::new_zeros(u, {p.batch, p.dim, p.state}, ScalarType::Float);
  p.out = sequence(out);
  p.last_state = {elements(last), last.stride(0), 0, last.stride(1), last.stride(2), 0};
  run_scan(p, u);
  return {out, last};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    Tensor grad_out, Tensor grad_last, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, std::optional<Tensor> D,
    std::optional<Tensor> z, std::optional<Tensor> delta_bias, bool softplus) {
  SelectiveScanParams p = scan_params(u, delta, A, B, C, D, z, delta_bias, softplus);
  for (int64_t i = 0; i < 3; ++i) check_size(grad_out, i, u.size(i));
  check_size(grad_last, 0, p.batch), check_size(grad_last, 1, p.dim), check_size(grad_last, 2, p.state);
  p.grad_out = sequence(grad_out);
  p.grad_last_state = {elements(grad_last), grad_last.stride(0), 0, grad_last.stride(1), grad_last.stride(2), 0};
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

Tensor like_argument(const Tensor& sum, const std::optional<Tensor>& argument, const Tensor& any) {
  if (!argument) return torch::stable::new_empty(any, {0});
  if (argument->numel() == 0) return torch::stable::empty_like(*argument);
  const Tensor shaped = torch::stable::view(sum, argument->sizes());
  if (argument->scalar_type() == ScalarType::Float && argument->is_contiguous()) return shaped;
  Tensor grad = torch::stable::empty_like(*argument);
  return torch::stable::copy_(grad, shaped);
}

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, MOBILEMAMBA_DEVICE, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&selective_scan_forward));
  m.impl("selective_scan_bwd", TORCH_BOX(&selective_scan_backward));
}

}  // namespace mobilemamba
