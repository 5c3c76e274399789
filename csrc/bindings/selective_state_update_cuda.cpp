// selective_state_update on a GPU.
#include "bindings/cuda.h"
#include "bindings/selective_state_update.h"
#include "cuda/launchers.h"

namespace mobilemamba {

void run_selective_state_update(SelectiveStateUpdateParams& p, const Tensor& like) {
  OnDeviceOf(like).run(selective_state_update, p);
}

}  // namespace mobilemamba
