// What the bindings of selective_state_update share.
#pragma once

#include "bindings/tensor.h"
#include "include/selective_state_update.h"

namespace mobilemamba {

// Runs a step, of which no dimension is empty; each device has its own.
void run_selective_state_update(SelectiveStateUpdateParams& p, const Tensor& like);

}  // namespace mobilemamba
