// A step of the selective scan.
#pragma once

#include "include/tensor_view.h"

namespace mobilemamba {

// Strides in elements; a dimension that a tensor lacks has stride 0.
struct StepTensor {
  Elements elements;
  int64_t batch = 0, head = 0, channel = 0, state = 0;

  ANYWHERE explicit operator bool() const { return static_cast<bool>(elements); }
  ANYWHERE Elements at(int64_t b, int64_t h, int64_t c, int64_t n = 0) const {
    return elements + (b * batch + h * head + c * channel + n * state);
  }
};

struct SelectiveStateUpdateParams {
  int64_t batch, heads, dim, state;
  int64_t group;  // heads that share B and C, whose `head` is a group
  bool softplus;
  StepTensor states;      // (rows, heads, dim, state)
  StepTensor x, dt, z;    // (batch, heads, dim); z may be absent
  StepTensor A;           // (heads, dim, state)
  StepTensor B, C;        // (batch, heads / group, state)
  StepTensor D, dt_bias;  // (heads, dim) or absent
  StepTensor y;           // (batch, heads, dim)
  Indices rows;           // of the states, (batch), or absent
  float* scratch;         // selective_state_update_scratch floats, one thread's
};

constexpr int64_t kMostStates = 256;
constexpr int64_t kStepChannels = 64;  // of an item on a CPU

// B, C, a row of A and a row of states.
inline int64_t selective_state_update_scratch(int64_t lanes) { return 4 * (kMostStates + lanes); }

}  // namespace mobilemamba
