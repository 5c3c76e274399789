// ss2d_bidirectional_fwd. Its gradient is composed in ops/ss2d_bidirectional.py around the scan's kernel.
#include "bindings/ss2d_bidirectional.h"

namespace mobilemamba {
namespace {

// A tensor whose height and width are one dimension of positions, copied only if they are not.
Tensor with_positions(const Tensor& t) {
  return t.size(2) <= 1 || t.stride(2) == t.size(3) * t.stride(3) ? t : torch::stable::contiguous(t);
}

Tensor forward(Tensor x, std::optional<Tensor> z, Tensor x_proj, Tensor dt_proj, Tensor dt_bias, Tensor A_log, Tensor D,
               Tensor norm_weight, Tensor norm_bias, double eps) {
  STD_TORCH_CHECK(x.dim() == 4 && x_proj.dim() == 3 && dt_proj.dim() == 3 && A_log.dim() == 3,
                  "mobilemamba: ss2d_bidirectional got a wrong rank");
  Ss2dArguments a{x, z, x_proj, dt_proj, dt_bias, A_log, D, norm_weight, norm_bias, {}, static_cast<float>(eps)};
  STD_TORCH_CHECK(a.state() >= 1 && a.state() <= kMaxState, "mobilemamba: N must be between 1 and 256, got ",
                  a.state());
  if (z)
    for (int64_t i = 0; i < 4; ++i) check_size(*z, i, x.size(i));
  check_size(x_proj, 0, 2), check_size(x_proj, 1, a.rank() + 2 * a.state()), check_size(x_proj, 2, a.dim());
  for (const Tensor& t : {dt_proj, A_log, dt_bias, D}) check_size(t, 0, 2), check_size(t, 1, a.dim());
  check_size(norm_weight, 0, a.dim()), check_size(norm_bias, 0, a.dim());
  const Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  a.x = with_positions(x);
  if (z) a.z = with_positions(*z);
  a.out = with_positions(out);  // out's strides are those of the x that came in
  run_ss2d(a);
  if (a.out.data_ptr() == out.data_ptr()) return out;
  Tensor copied = out;
  return torch::stable::copy_(copied, a.out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, MOBILEMAMBA_DEVICE, m) { m.impl("ss2d_bidirectional_fwd", TORCH_BOX(&forward)); }

}  // namespace mobilemamba
