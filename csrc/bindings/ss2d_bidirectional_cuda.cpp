// SS2D's forward on a GPU: the library's product, the scan with Δ computed in it, LayerNorm and gate.
#include <array>

#include "bindings/selective_scan_cuda.h"
#include "bindings/ss2d_bidirectional.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

// W · u in float32: (batch, features, length) of W (features, dim) and u (batch, dim, length). Where both have the same
// 16 bits they are multiplied in those; else in float32, for which u is converted.
Tensor project(const Tensor& W, const Tensor& u) {
  using torch::stable::detail::from;
  const bool dense = u.stride(1) == 1 && u.stride(0) == u.size(2) * u.stride(2);
  if (W.scalar_type() == ScalarType::Float || W.scalar_type() != u.scalar_type() || !dense)
    return torch::stable::matmul(torch::stable::to(W, ScalarType::Float), torch::stable::to(u, ScalarType::Float));
  const Tensor tokens = torch::stable::flatten(torch::stable::transpose(u, 1, 2), 0, 1);
  std::array<StableIValue, 3> stack{from(tokens), from(torch::stable::transpose(W, 0, 1)), from(ScalarType::Float)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
  const Tensor rows = torch::stable::detail::to<Tensor>(stack[0]);
  return torch::stable::transpose(torch::stable::view(rows, {u.size(0), u.size(2), W.size(0)}), 1, 2);
}

}  // namespace

void run_ss2d(Ss2dArguments& a) {
  const OnDeviceOf device(a.x);
  const int64_t rank = a.rank(), state = a.state(), features = rank + 2 * state;
  const Tensor u = torch::stable::flatten(a.x, 2, 3);
  // (batch, 2 features, length), float32: for each direction dt_low, B, C.
  const Tensor projected = project(torch::stable::flatten(a.x_proj, 0, 1), u);
  const auto rows = [&](int64_t first) {
    const Elements e = elements(projected) + first * projected.stride(1);
    return ScanTensor{e, projected.stride(0), features * projected.stride(1),
                      0, projected.stride(1), projected.stride(2)};
  };
  const auto parameter = [](const Tensor& t) {
    return ScanTensor{elements(t), 0, t.stride(0), t.stride(1), t.dim() == 3 ? t.stride(2) : 0, 0};
  };
  const bool channels_last = a.out.stride(1) == 1;
  const int64_t dim = a.dim(), length = a.length();
  const Tensor y = torch::stable::new_empty(a.x, {a.batch(), dim, length}, ScalarType::Float);
  Ss2dNormalizeParams norm{a.batch(), dim, length, a.eps, {}, {}, flattened(a.out), {}, {}, 0, 0};
  norm.y = {elements(y), dim * length, channels_last ? 1 : length, channels_last ? dim : 1};
  if (a.z) norm.z = flattened(*a.z);
  norm.weight = elements(a.norm_weight), norm.weight_stride = a.norm_weight.stride(0);
  norm.bias = elements(a.norm_bias), norm.bias_stride = a.norm_bias.stride(0);

  SelectiveScanCudaParams p{};
  p.batch = a.batch(), p.dim = dim, p.length = length, p.state = state;
  p.directions = 2, p.groups = p.B_group = p.C_group = 1;
  p.B_varies = p.C_varies = p.softplus = p.projected = true;
  const Sequence x = flattened(a.x);
  p.u = {x.elements, x.batch, 0, x.channel, 0, x.position};
  p.out = {norm.y.elements, norm.y.batch, 0, norm.y.channel, 0, norm.y.position};
  p.rank = rank, p.dt_low = rows(0), p.B = rows(rank), p.C = rows(rank + state);
  p.dt_proj = parameter(a.dt_proj), p.A = parameter(a.A_log), p.D = parameter(a.D);
  p.delta_bias = parameter(a.dt_bias);
  run_scan_forward(p, a.x, device);
  device.run(ss2d_normalize, norm);
}

}  // namespace mobilemamba
