// What the scans by states share: a thread has one channel with all of its states, kAhead positions at a time in
// registers; a block has up to 128 channels of a group, and coefficients of kTilePositions in shared memory.
#pragma once

#include "cuda/scan_ahead.h"

namespace mobilemamba {

constexpr int kBlockWarps = 4;
constexpr int kTilePositions = 32;  // whose coefficients wait in shared memory
constexpr int kManyStates = 16;     // of a channel, where not one

// Calls put(state, position, value) with B or C of a tile whose first position is at `from`, zeros behind `count` of
// them; a thread has its neighbours' neighbours in memory.
template <int kStates, class Put>
__device__ __forceinline__ void read_coefficients(const ScanTensor& t, const Elements& from, int count, Put put) {
  const int thread = threadIdx.y * kWarp + threadIdx.x, threads = blockDim.y * kWarp;
  const bool along = t.position < t.state || kStates == 1;
  visit(from, [&](const auto* p) {
#pragma unroll 4
    for (int i = thread; i < kStates * kTilePositions; i += threads) {
      const int n = along ? i / kTilePositions : i % kStates, l = along ? i % kTilePositions : i / kStates;
      put(n, l, l < count ? to_float(p[n * t.state + l * t.position]) : 0.0f);
    }
  });
}

// Where a thread is.
struct StatesPlace {
  int64_t batch, group, slice, k, chunk, channel;
  bool inside;    // of the group; the threads outside compute its last channel too
  int64_t begin;  // the chunk's first position
  int positions;  // of the chunk

  // directions: 1 where a block has all of them, else each is an item.
  __device__ StatesPlace(const SelectiveScanCudaParams& p, int64_t item, int64_t directions) {
    chunk = item % p.chunks, item /= p.chunks;
    k = item % directions, item /= directions;
    slice = item % p.slices, item /= p.slices;
    group = item % p.groups, batch = item / p.groups;
    const int64_t per_group = p.dim / p.groups, own = (slice * blockDim.y + threadIdx.y) * kWarp + threadIdx.x;
    inside = own < per_group;
    channel = group * per_group + (inside ? own : per_group - 1);
    begin = chunk * p.segment;
    positions = static_cast<int>(p.length - begin < p.segment ? p.length - begin : p.segment);
  }
  // Of chunk_decay and its like; a state further is `dim` further.
  __device__ int64_t fold(const SelectiveScanCudaParams& p, int64_t direction) const {
    return ((batch * p.directions + direction) * p.chunks + chunk) * p.state * p.dim + channel;
  }
};

}  // namespace mobilemamba
