// What a selective scan on a GPU has beside its operands.
#pragma once

#include "include/selective_scan.h"

namespace mobilemamba {

struct SelectiveScanCudaParams : SelectiveScanParams {
  // Set by plan_selective_scan, with slices: a block has 32 channels of a group, of which there are so many blocks, and
  // goes through `range` chunks of the sequence, all or one.
  int64_t warps;  // of a block; each has a segment of a chunk's positions
  int64_t chunks, range;
  bool backward;
  // Set too. By selective_scan_channels, whose slices have 64 channels; by selective_scan_positions, whose chunks have
  // `segment` positions; or by selective_scan_states, whose chunks do too, and whose slices have `warps` times 32.
  bool by_channels, by_positions, by_states;

  // Where range < chunks, float32 (batch, directions, chunks, state, dim): of each chunk the product of its decays, and
  // what it makes of a zero state (of a zero adjoint); then the state (the adjoint) that enters it. Null elsewhere.
  float *chunk_decay, *chunk_state, *chunk_adjoint;

  ScanTensor gated;  // float32 (batch, dim, length), where there is a z: the gradient of what z gates

  // In the place of delta, of SS2D: delta = dt_proj · dt_low, with A = -exp of what A holds.
  bool projected;
  int64_t rank;
  ScanTensor dt_low;   // (batch, directions, rank as "state", length)
  ScanTensor dt_proj;  // (directions, dim, rank as "state")
};

// to[o][i] = Σ_m from[o][m][i], in the order of m.
struct PartialSum {
  const float* from;
  float* to;
  int64_t outer, middle, inner;
};
struct PartialSumsParams {
  PartialSum sums[5];
  int count;
};

}  // namespace mobilemamba
