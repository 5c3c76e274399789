// What the scans by positions share: a thread has kAhead consecutive positions of one channel, a block up to 1024,
// whose folds meet by shuffles within a warp and in shared memory between warps.
#pragma once

#include "cuda/scan_ahead.h"

namespace mobilemamba {

constexpr int kTileWarps = 4;  // of a block, at most
constexpr int kWarpPositions = kWarp * kAhead;
constexpr int kFoldFloats = 2 * 3 * kTileWarps;  // of shared memory, at its beginning

// What consecutive positions multiply an entering state by, and what they make of none.
struct Fold {
  float decay = 1.0f, own = 0.0f;
};

// A value of the lane `by` before this one, behind it if kReverse.
template <bool kReverse>
__device__ __forceinline__ float of_lane_before(float value, int by) {
  return kReverse ? __shfl_down_sync(0xffffffffu, value, by) : __shfl_up_sync(0xffffffffu, value, by);
}

// The fold of the lanes before this one; `fold`, of this lane, becomes that of both.
template <bool kReverse>
__device__ __forceinline__ Fold fold_lanes(Fold& fold, int lane) {
  const int before = kReverse ? kWarp - 1 - lane : lane;  // so many lanes
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const float decay = of_lane_before<kReverse>(fold.decay, by), own = of_lane_before<kReverse>(fold.own, by);
    if (before >= by) fold = {decay * fold.decay, through(fold.decay, own, fold.own)};
  }
  const Fold others{of_lane_before<kReverse>(fold.decay, 1), of_lane_before<kReverse>(fold.own, 1)};
  return before ? others : Fold{};
}
template <bool kReverse>
constexpr int kLastLane = kReverse ? 0 : kWarp - 1;

// The folds of a block's warps, (decays, states, adjoints). Two sets take turns, so that one barrier a tile is enough.
struct WarpFolds {
  int parity = 0;

  __device__ __forceinline__ float& at(int value, int warp) const {
    return shared_memory[(parity * 3 + value) * kTileWarps + warp];
  }
  // What enters this warp's positions; `entering` the tile, and then what leaves it.
  template <bool kReverse>
  __device__ __forceinline__ float enter(int value, float& entering) const {
    const int warps = static_cast<int>(blockDim.y), warp = static_cast<int>(threadIdx.y);
    float mine = 0.0f;
#pragma unroll
    for (int i = 0; i < kTileWarps; ++i)
      if (i < warps) {
        const int w = kReverse ? warps - 1 - i : i;
        if (w == warp) mine = entering;
        entering = through(at(0, w), entering, at(value, w));
      }
    return mine;
  }
};

// A row of a tensor's elements.
template <class T>
__device__ __forceinline__ T* row_of(const ScanTensor& t, int64_t batch, int64_t k, int64_t channel, int64_t position) {
  T* row = static_cast<T*>(t.at(batch, k, channel, 0, position).data);
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(row));
#endif
  return row;
}

// Calls f(whole) with a constant: whether all of a thread's positions exist.
template <class F>
__device__ __forceinline__ void with_count(int count, F f) {
  if (count == kAhead)
    f(std::true_type{});
  else
    f(std::false_type{});
}

}  // namespace mobilemamba
