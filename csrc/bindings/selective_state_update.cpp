// selective_state_update.
#include "bindings/selective_state_update.h"

namespace mobilemamba {
namespace {

// A tensor with a batch (`batched`) or none, with heads (`headed`) or none, dim and state as they are there.
StepTensor step_tensor(const std::optional<Tensor>& t, bool batched, bool headed, bool has_dim, bool has_state) {
  if (!t) return {};
  STD_TORCH_CHECK(t->dim() == batched + headed + has_dim + has_state,
                  "mobilemamba: selective_state_update got a wrong rank");
  StepTensor view{elements(t)};
  int64_t dim = 0;
  if (batched) view.batch = t->stride(dim++);
  if (headed) view.head = t->stride(dim++);
  if (has_dim) view.channel = t->stride(dim++);
  if (has_state) view.state = t->stride(dim++);
  return view;
}

void check_sizes(const std::optional<Tensor>& t, std::initializer_list<int64_t> sizes) {
  int64_t dim = 0;
  if (t)
    for (int64_t size : sizes)
      if (size >= 0) check_size(*t, dim++, size);
}

Tensor update(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, std::optional<Tensor> D,
              std::optional<Tensor> z, std::optional<Tensor> dt_bias, bool softplus,
              std::optional<Tensor> state_batch_indices) {
  SelectiveStateUpdateParams p{};
  const bool headed = state.dim() == 4, grouped = B.dim() == 3;
  p.states = step_tensor(state, true, headed, true, true);
  p.x = step_tensor(x, true, headed, true, false), p.dt = step_tensor(dt, true, headed, true, false);
  p.z = step_tensor(z, true, headed, true, false), p.A = step_tensor(A, false, headed, true, true);
  p.B = step_tensor(B, true, grouped, false, true), p.C = step_tensor(C, true, grouped, false, true);
  p.D = step_tensor(D, false, headed, true, false), p.dt_bias = step_tensor(dt_bias, false, headed, true, false);
  p.batch = x.size(0), p.state = state.size(headed + 2), p.dim = state.size(headed + 1);
  p.heads = headed ? state.size(1) : 1;
  const int64_t heads = headed ? p.heads : -1, groups = grouped ? B.size(1) : -1;  // -1: no such dimension
  STD_TORCH_CHECK(p.state >= 1 && p.state <= kMostStates, "mobilemamba: N must be between 1 and 256, got ", p.state);
  STD_TORCH_CHECK(!grouped || (headed && groups > 0 && p.heads % groups == 0),
                  "mobilemamba: heads must be a multiple of the groups of B");
  p.group = grouped ? p.heads / groups : std::max<int64_t>(1, p.heads);
  for (const std::optional<Tensor>& t : {std::optional<Tensor>(x), std::optional<Tensor>(dt), z})
    check_sizes(t, {p.batch, heads, p.dim});
  check_sizes(A, {heads, p.dim, p.state});
  check_sizes(D, {heads, p.dim}), check_sizes(dt_bias, {heads, p.dim});
  check_sizes(B, {p.batch, groups, p.state}), check_sizes(C, {p.batch, groups, p.state});
  p.rows = indices_of(state_batch_indices, 1, p.batch);
  if (!p.rows) check_size(state, 0, p.batch);
  check_dense("selective_state_update", "state", state);
  check_rows("selective_state_update", "state_batch_indices", p.rows, p.batch, state.size(0));
  p.softplus = softplus;
  Tensor y = torch::stable::empty_like(x);
  p.y = step_tensor(y, true, headed, true, false);
  if (x.numel() != 0) run_selective_state_update(p, x);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, MOBILEMAMBA_DEVICE, m) { m.impl("selective_state_update", TORCH_BOX(&update)); }

}  // namespace mobilemamba
