// causal_conv1d_fwd and causal_conv1d_bwd.
#include "bindings/causal_conv1d.h"

#include <tuple>

#include "bindings/selective_scan.h"

namespace mobilemamba {
namespace {

CausalConv1dParams params_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& seq_idx, const std::optional<Tensor>& initial, bool silu) {
  CausalConv1dParams p{};
  p.x = sequence_of(x);
  p.batch = x.size(0), p.dim = x.size(1), p.length = x.size(2);
  p.filter = filter_of(weight, bias, p.dim, silu);
  p.numbers = indices_of(seq_idx, 2, p.batch);
  if (seq_idx) check_size(*seq_idx, 1, p.length);
  if (initial) {
    p.initial = sequence_of(*initial);
    check_size(*initial, 0, p.batch), check_size(*initial, 1, p.dim), check_size(*initial, 2, p.filter.width - 1);
  }
  return p;
}

Tensor forward(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> seq_idx,
               std::optional<Tensor> initial, bool silu) {
  CausalConv1dParams p = params_of(x, weight, bias, seq_idx, initial, silu);
  Tensor y = torch::stable::empty_like(x);
  p.y = sequence_of(y);
  if (x.numel() != 0) run_causal_conv1d(p, x);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor weight,
                                                            std::optional<Tensor> bias, std::optional<Tensor> seq_idx,
                                                            std::optional<Tensor> initial, bool silu) {
  CausalConv1dParams p = params_of(x, weight, bias, seq_idx, initial, silu);
  p.grad = sequence_of(grad);
  for (int64_t i = 0; i < 3; ++i) check_size(grad, i, x.size(i));
  Tensor grad_x = torch::stable::empty_like(x), grad_initial = empty_for(initial, x);
  Tensor of_indices = empty_for(std::nullopt, x);
  p.grad_x = sequence_of(grad_x);
  if (initial) p.grad_initial = sequence_of(grad_initial);
  if (x.numel() == 0) {
    if (initial) torch::stable::zero_(grad_initial);
    Tensor grad_weight = torch::stable::empty_like(weight), grad_bias = empty_for(bias, x);
    return {grad_x, torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias), of_indices, grad_initial};
  }
  const FilterSums sums = run_causal_conv1d_backward(p, x);
  return {grad_x, like_argument(sums.weight, weight, x), like_argument(sums.bias, bias, x), of_indices, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, MOBILEMAMBA_DEVICE, m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&forward));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&backward));
}

}  // namespace mobilemamba
