// What the CUDA kernels share: elements of a type known only at run time, activations, launches.
//
// Kernels compute in float32 and take every dtype and stride at run time: the branches are the same for a whole block,
// stand outside the loops, and keep the number of compiled kernels small. All shared memory is dynamic, so that the
// tests' emulation (tests/emulation) knows its size.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "include/activation.h"
#include "include/tensor_view.h"

extern __shared__ __align__(16) float shared_memory[];

namespace mobilemamba {

constexpr int kWarp = 32;
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16(x);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half(x);
  else
    return x;
}

// Hides where a value comes from, so that what is computed from it is not computed ahead and kept in registers.
template <class T>
__device__ __forceinline__ void hide(T& value) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+l"(value));
  else
    asm volatile("" : "+r"(value));
#endif
}

// Calls f with a pointer of the elements' type.
template <class F>
__device__ __forceinline__ void visit(const Elements& e, F f) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(e.data));
#endif
  if (e.dtype == DType::kFloat32)
    f(static_cast<float*>(e.data));
  else if (e.dtype == DType::kBFloat16)
    f(static_cast<__nv_bfloat16*>(e.data));
  else
    f(static_cast<__half*>(e.data));
}

// One element, of parameters: what has many of them takes visit() out of its loop.
__device__ __forceinline__ float load(const Elements& e) {
  float value = 0;
  visit(e, [&](auto* p) { value = to_float(*p); });
  return value;
}
__device__ __forceinline__ void store(const Elements& e, float value) {
  visit(e, [&](auto* p) { *p = from_float<std::remove_pointer_t<decltype(p)>>(value); });
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exp2f(-kLog2E * x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(exp2f(kLog2E * x)); }

__device__ __forceinline__ float activate(float x, Activation activation) {
  if (activation == Activation::kRelu) return x < 0.0f ? 0.0f : x;  // NaN stays
  return activation == Activation::kSilu ? silu(x) : x;
}

ANYWHERE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;  // of a grid

// Launches kernel(arguments) on so many blocks.
template <class... Parameters>
cudaError_t launch_blocks(void (*kernel)(Parameters...), int64_t blocks, dim3 block, int64_t shared_floats,
                          cudaStream_t stream, Parameters... arguments) {
  constexpr size_t kWithoutAsking = 48 << 10;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_floats) * sizeof(float);
  config.stream = stream;
  if (config.dynamicSmemBytes > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(config.dynamicSmemBytes));
    if (error != cudaSuccess) return error;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Launches kernel(params), which goes over `items` in steps of the grid's blocks.
template <class Params>
cudaError_t launch(void (*kernel)(Params), const Params& params, int64_t items, dim3 block, int64_t shared_floats,
                   cudaStream_t stream) {
  return launch_blocks(kernel, items < kMostBlocks ? items : kMostBlocks, block, shared_floats, stream, params);
}

// Launches kernel(params, first), whose blocks have one item each, from `first` on: a loop around a kernel that fills
// the registers would keep more in them.
template <class Params>
cudaError_t launch(void (*kernel)(Params, int64_t), const Params& params, int64_t items, dim3 block,
                   int64_t shared_floats, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; first < items && error == cudaSuccess; first += kMostBlocks)
    error = launch_blocks(kernel, items - first < kMostBlocks ? items - first : kMostBlocks, block, shared_floats,
                          stream, params, first);
  return error;
}

}  // namespace mobilemamba
