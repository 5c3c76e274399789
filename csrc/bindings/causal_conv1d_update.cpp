// causal_conv1d_update.
#include "bindings/causal_conv1d.h"

namespace mobilemamba {
namespace {

// (batch, dim) is one position.
Sequence steps_of(const Tensor& t) {
  if (t.dim() == 2) return {elements(t), t.stride(0), t.stride(1), 0};
  return sequence_of(t);
}

Tensor update(Tensor x, Tensor state, Tensor weight, std::optional<Tensor> bias, bool silu,
              std::optional<Tensor> cache_seqlens, std::optional<Tensor> conv_state_indices) {
  CausalConv1dUpdateParams p{};
  p.x = steps_of(x), p.state = sequence_of(state);
  p.batch = x.size(0), p.dim = x.size(1), p.steps = x.dim() == 2 ? 1 : x.size(2), p.kept = state.size(2);
  p.filter = filter_of(weight, bias, p.dim, silu);
  p.offsets = indices_of(cache_seqlens, 1, p.batch);
  p.rows = indices_of(conv_state_indices, 1, p.batch);
  if (!p.rows) check_size(state, 0, p.batch);
  check_size(state, 1, p.dim);
  STD_TORCH_CHECK(p.kept >= p.filter.width - 1, "mobilemamba: conv_state must keep at least W - 1 positions, got ",
                  p.kept);
  check_dense("causal_conv1d_update", "conv_state", state);
  check_rows("causal_conv1d_update", "conv_state_indices", p.rows, p.batch, state.size(0));
  Tensor y = torch::stable::empty_like(x);
  p.y = steps_of(y);
  if (x.numel() != 0) run_causal_conv1d_update(p, x);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, MOBILEMAMBA_DEVICE, m) { m.impl("causal_conv1d_update", TORCH_BOX(&update)); }

}  // namespace mobilemamba
