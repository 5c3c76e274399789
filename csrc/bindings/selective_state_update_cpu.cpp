// selective_state_update on the CPU.
#include "bindings/selective_state_update.h"

DECLARE_KERNEL(selective_state_update, SelectiveStateUpdateParams)

namespace mobilemamba {

void run_selective_state_update(SelectiveStateUpdateParams& p, const Tensor&) {
  constexpr int64_t kOperations = 30;  // of a vector of states
  const int64_t lanes = vector_lanes();
  parallel(KERNEL(selective_state_update), p, p.batch * p.heads * ceil_div(p.dim, kStepChannels),
           std::min(p.dim, kStepChannels) * ceil_div(p.state, lanes) * kOperations,
           selective_state_update_scratch(lanes));
}

}  // namespace mobilemamba
