// selective_scan_fwd and selective_scan_bwd on the CPU, and the running of the scan kernels for every scan operator.
#include <numeric>
#include <tuple>

#include "bindings/selective_scan.h"

namespace mobilemamba {
namespace {

constexpr int64_t kOperations = 40;  // of one state at one position, forward
constexpr int64_t kItems = 64;       // wanted of a backward, whatever the number of threads

// out[i] = Σ_j partial[i / inner][j][i % inner], in the order of j.
void sum_middle(float* out, const float* partial, int64_t outer, int64_t middle, int64_t inner) {
  torch::stable::parallel_for(0, outer * inner, 1 + 4096 / std::max<int64_t>(1, middle),
                              [=](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  const float* p = partial + i / inner * middle * inner + i % inner;
                                  float sum = 0;
                                  for (int64_t j = 0; j < middle; ++j) sum += p[j * inner];
                                  out[i] = sum;
                                }
                              });
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> size) {
  return torch::stable::new_zeros(like, size, ScalarType::Float);
}

float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

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
  Tensor last = zeros(u, {p.batch, p.dim, p.state});
  p.out = sequence(out);
  p.last_state = {elements(last), last.stride(0), 0, last.stride(1), last.stride(2), 0};
  run_scan(p);
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
  Tensor grad_z = z ? torch::stable::empty_like(*z) : torch::stable::new_empty(u, {0});
  p.grad_u = sequence(grad_u), p.grad_delta = sequence(grad_delta);
  if (z) p.grad_z = sequence(grad_z);
  const ScanSums sums = run_scan_backward(p, u);
  // Channel groups of B and C may be finer in the kernel than in the argument: their sums are added up.
  auto coefficient = [&](const Tensor& sum, const Tensor& argument, int64_t group) {
    if (argument.dim() == 2) return like_argument(sum, argument, u);
    Tensor grad = zeros(u, {p.batch, p.groups / group, p.state, p.length});
    sum_middle(floats(grad), floats(sum), p.batch * (p.groups / group), group, p.state * p.length);
    return like_argument(argument.dim() == 3 ? torch::stable::squeeze(grad, 1) : grad, argument, u);
  };
  return {grad_u,
          grad_delta,
          like_argument(sums.A, A, u),
          coefficient(sums.B, B, p.B_group),
          coefficient(sums.C, C, p.C_group),
          like_argument(sums.D, D, u),
          grad_z,
          like_argument(sums.delta_bias, delta_bias, u)};
}

}  // namespace

void run_scan(SelectiveScanParams& p) {
  const int64_t lanes = vector_lanes();
  parallel(KERNEL(selective_scan_fwd), p, p.batch * p.groups * scan_blocks(p, lanes),
           p.length * lanes * p.state * p.directions * kOperations / lanes, scan_fwd_scratch(p.length, p.state, lanes));
}

ScanSums run_scan_backward(SelectiveScanParams& p, const Tensor& like) {
  const int64_t lanes = vector_lanes(), blocks = scan_blocks(p, lanes), K = p.directions;
  p.slices = std::min(blocks, std::max<int64_t>(1, kItems / std::max<int64_t>(1, p.batch * p.groups)));
  p.slices = std::max<int64_t>(1, p.slices);
  const int64_t states = p.state * p.length;
  auto coefficient = [&](bool varies, float*& partial, float*& fixed) {
    Tensor t =
        varies ? zeros(like, {p.batch, K, p.groups, p.slices, states}) : zeros(like, {p.batch, K, p.dim, p.state});
    (varies ? partial : fixed) = floats(t);
    return t;
  };
  Tensor B = coefficient(p.B_varies, p.partial_B, p.partial_fixed_B);
  Tensor C = coefficient(p.C_varies, p.partial_C, p.partial_fixed_C);
  Tensor A = zeros(like, {p.batch, K, p.dim, p.state}), D = zeros(like, {p.batch, K, p.dim});
  Tensor bias = zeros(like, {p.batch, K, p.dim});
  p.partial_A = floats(A), p.partial_D = floats(D), p.partial_delta_bias = floats(bias);
  parallel(KERNEL(selective_scan_bwd), p, p.batch * p.groups * p.slices,
           blocks / p.slices * p.length * p.state * K * 3 * kOperations, scan_bwd_scratch(p, lanes));
  auto over_batch = [&](const Tensor& t, int64_t inner) {
    Tensor sum = K == 1 ? zeros(like, {p.dim, inner}) : zeros(like, {K, p.dim, inner});
    sum_middle(floats(sum), floats(t), 1, p.batch, K * p.dim * inner);
    return sum;
  };
  auto over_slices = [&](const Tensor& t, bool varies) {
    if (!varies) return over_batch(t, p.state);
    Tensor sum = zeros(like, {p.batch, K, p.groups, p.state, p.length});
    sum_middle(floats(sum), floats(t), p.batch * K * p.groups, p.slices, states);
    return sum;
  };
  return {over_batch(A, p.state), over_slices(B, p.B_varies), over_slices(C, p.C_varies),
          torch::stable::squeeze(over_batch(D, 1), -1), torch::stable::squeeze(over_batch(bias, 1), -1)};
}

Tensor like_argument(const Tensor& sum, const std::optional<Tensor>& argument, const Tensor& any) {
  if (!argument) return torch::stable::new_empty(any, {0});
  Tensor grad = torch::stable::empty_like(*argument);
  return torch::stable::copy_(grad, sum);
}

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, CPU, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&selective_scan_forward));
  m.impl("selective_scan_bwd", TORCH_BOX(&selective_scan_backward));
}

}  // namespace mobilemamba
