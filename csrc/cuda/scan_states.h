// What the scans by states share: a thread has one channel with all of its states, kAhead positions at a time in
// registers; a block has up to 128 channels of a group, and coefficients of kTilePositions in shared memory.
#pragma once

#include "cuda/scan_channels.h"

namespace mobilemamba {

constexpr int kBlockWarps = 4;
constexpr int kTilePositions = 32;  // whose coefficients wait in shared memory
constexpr int kManyStates = 16;     // of a channel, where not one
constexpr int kVector = 4;          // elements of a channel that are read at once

template <class T>
struct alignas(kVector * sizeof(T)) FourElements {
  T values[kVector];
};

template <class T>
__device__ __forceinline__ bool in_fours(const T* p, int64_t stride) {
  return stride == 1 && reinterpret_cast<uintptr_t>(p) % (kVector * sizeof(T)) == 0;
}

// `count` positions of a channel from p on, zeros behind them.
__device__ __forceinline__ void read_ahead(float (&v)[kAhead], const Elements& from, int64_t stride, int count) {
  visit(from, [&](const auto* p) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(p)>>;
    if (count == kAhead && in_fours(p, stride)) {
      FourElements<T> fours[kAhead / kVector];
#pragma unroll
      for (int i = 0; i < kAhead / kVector; ++i) fours[i] = reinterpret_cast<const FourElements<T>*>(p)[i];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) v[j] = to_float(fours[j / kVector].values[j % kVector]);
    } else if (count == kAhead) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) v[j] = to_float(p[j * stride]);
    } else {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) v[j] = j < count ? to_float(p[j * stride]) : 0.0f;
    }
  });
}

// Asks for kAhead positions of a channel, from `from` on.
__device__ __forceinline__ void prefetch_ahead(const Elements& from, int64_t stride) {
  const int64_t step = stride * element_size(from.dtype);
  if (stride == 1) {
    prefetch(from.data);
  } else {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) prefetch(static_cast<const char*>(from.data) + j * step);
  }
}

__device__ __forceinline__ void write(const Elements& to, int64_t stride, const float (&v)[kAhead], int count) {
  visit(to, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    if (count == kAhead && in_fours(p, stride)) {
#pragma unroll
      for (int i = 0; i < kAhead / kVector; ++i) {
        FourElements<T> four;
#pragma unroll
        for (int j = 0; j < kVector; ++j) four.values[j] = from_float<T>(v[i * kVector + j]);
        reinterpret_cast<FourElements<T>*>(p)[i] = four;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (j < count) p[j * stride] = from_float<T>(v[j]);
    }
  });
}

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
