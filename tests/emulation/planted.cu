// A kernel that turns 64 values around by way of shared memory, with a mistake that the sanitizers must see:
// MISSING_BARRIER, OUT_OF_BOUNDS (of the result) or OUT_OF_SHARED; or with none.
#include <cstdio>
#include <vector>

#include "cuda/device.h"

struct Params {
  const float* from;
  float* to;
};

static __global__ void turn_kernel(Params p) {
  const int t = threadIdx.x, n = blockDim.x;
#ifdef OUT_OF_SHARED
  shared_memory[t + 1] = p.from[t];
#endif
  shared_memory[t] = p.from[t];
#ifndef MISSING_BARRIER
  __syncthreads();
#endif
#ifdef OUT_OF_BOUNDS
  p.to[t + 1] = shared_memory[n - 1 - t];
#else
  p.to[t] = shared_memory[n - 1 - t];
#endif
}

int main() {
  constexpr int kThreads = 64;
  std::vector<float> from(kThreads), to(kThreads);
  for (int i = 0; i < kThreads; ++i) from[i] = static_cast<float>(i);
  if (mobilemamba::launch(turn_kernel, Params{from.data(), to.data()}, 1, kThreads, kThreads, nullptr) != cudaSuccess)
    return 2;
  for (int i = 0; i < kThreads; ++i)
    if (to[i] != from[kThreads - 1 - i]) return 3;
  std::puts("turned around");
}
