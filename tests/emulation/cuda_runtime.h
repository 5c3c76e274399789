// CUDA on the CPU, for tests: the part of its runtime that csrc/cuda uses, under its own names.
//
// A block's threads are threads, one for each CUDA thread; barriers stand for __syncthreads and, one a warp, for
// __syncwarp and shuffles; blocks run one after another. So AddressSanitizer sees every access and ThreadSanitizer a
// missing barrier. Shared memory is what the launch asked for, to the byte, and NaN before each block.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

namespace emulation {

constexpr size_t kSharedWithoutAsking = 48 << 10, kMostShared = 99 << 10;

using Barrier = std::barrier<>;
struct Warp {
  explicit Warp(unsigned threads) : barrier(threads) {}
  Barrier barrier;
  uint32_t slots[32] = {};
};
inline thread_local Barrier* block_barrier;
inline thread_local Warp* warp;
inline thread_local unsigned lane;
inline std::set<const void*> may_have_much_shared;  // functions

}  // namespace emulation

alignas(16) inline float shared_memory[emulation::kMostShared / sizeof(float)];

inline cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > emulation::kMostShared) return cudaErrorInvalidValue;
  emulation::may_have_much_shared.insert(function);
  return cudaSuccess;
}

// A small device: few blocks fill it, so that small cases take the ways of large ones.
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : static_cast<int>(emulation::kMostShared);
  return cudaSuccess;
}

inline void __syncthreads() { emulation::block_barrier->arrive_and_wait(); }
inline void __syncwarp(unsigned = ~0u) { emulation::warp->barrier.arrive_and_wait(); }

template <class T>
T shuffle(T value, unsigned from) {  // the lane's own where there is no such lane
  static_assert(sizeof(T) == 4);
  emulation::Warp& warp = *emulation::warp;
  std::memcpy(&warp.slots[emulation::lane], &value, 4);
  __syncwarp();
  std::memcpy(&value, &warp.slots[from < 32 ? from : emulation::lane], 4);
  __syncwarp();
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shuffle(value, emulation::lane ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned by) {
  return shuffle(value, emulation::lane - by);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned by) {
  return shuffle(value, emulation::lane + by);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace emulation;
  const dim3 grid = config->gridDim, block = config->blockDim;
  const unsigned threads = block.x * block.y * block.z, warps = (threads + 31) / 32;
  const size_t shared = config->dynamicSmemBytes;
  if (grid.x < 1 || grid.x > 2147483647u || grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535 ||
      threads < 1 || threads > 1024 || block.z > 64 || shared > kMostShared ||
      (shared > kSharedWithoutAsking && !may_have_much_shared.count(reinterpret_cast<const void*>(kernel))))
    return cudaErrorInvalidConfiguration;

  ASAN_UNPOISON_MEMORY_REGION(shared_memory, kMostShared);
  ASAN_POISON_MEMORY_REGION(reinterpret_cast<char*>(shared_memory) + shared, kMostShared - shared);
  Barrier together(threads);
  std::vector<std::unique_ptr<Warp>> all_warps;
  for (unsigned w = 0; w < warps; ++w)
    all_warps.push_back(std::make_unique<Warp>(w + 1 < warps ? 32 : threads - 32 * w));
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<std::thread> running;
  for (unsigned t = 0; t < threads; ++t)
    running.emplace_back([&, t] {
      threadIdx = dim3(t % block.x, t / block.x % block.y, t / block.x / block.y);
      blockDim = block, gridDim = grid;
      block_barrier = &together, warp = all_warps[t / 32].get(), lane = t % 32;
      for (uint64_t b = 0; b < blocks; ++b) {
        if (t == 0) std::memset(shared_memory, 0xff, shared);
        together.arrive_and_wait();
        blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
        kernel(arguments...);
        together.arrive_and_wait();
      }
    });
  for (std::thread& thread : running) thread.join();
  return cudaSuccess;
}
