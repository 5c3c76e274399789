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
#include <cstring>
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

// Two channels side by side, as memory has them: what kernels for channels-last maps load and store at once.
template <class T>
struct alignas(2 * sizeof(T)) TwoChannels {
  uint32_t words[sizeof(T) / 2];

  __device__ __forceinline__ float2 floats() const {
    float2 f;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper halves of floats
      const uint32_t bits[2] = {words[0] << 16, words[0] & 0xffff0000u};
      memcpy(&f, bits, sizeof f);
    } else {
      uint32_t own[sizeof(T) / 2];  // memcpy would read shared memory byte by byte
#pragma unroll
      for (unsigned i = 0; i < sizeof(T) / 2; ++i) own[i] = words[i];
      T values[2];
      memcpy(values, own, sizeof values);
      f = {to_float(values[0]), to_float(values[1])};
    }
    return f;
  }
  static __device__ __forceinline__ TwoChannels of(float2 f) {
    TwoChannels two;
#ifdef __CUDA_ARCH__  // one instruction for both
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const __nv_bfloat162 values = __floats2bfloat162_rn(f.x, f.y);
      memcpy(two.words, &values, sizeof two);
      return two;
    } else if constexpr (std::is_same_v<T, __half>) {
      const __half2 values = __floats2half2_rn(f.x, f.y);
      memcpy(two.words, &values, sizeof two);
      return two;
    }
#endif
    const T values[2] = {from_float<T>(f.x), from_float<T>(f.y)};
    memcpy(two.words, values, sizeof two);
    return two;
  }
};

// Whether two channels of a type can be read at once from there, and from there plus any of the strides.
template <class... Strides>
bool in_pairs(const Elements& e, DType dtype, Strides... strides) {
  return e.dtype == dtype && ((strides % 2 == 0) && ...) &&
         reinterpret_cast<uintptr_t>(e.data) % (2 * element_size(dtype)) == 0;
}

struct alignas(16) SixteenBytes {
  uint32_t words[4];
};

// Divides numbers i for which i * divisor < 2^20.
struct SmallDivisor {
  static constexpr int kShift = 20;
  unsigned divisor = 1, reciprocal = 1u << kShift;

  SmallDivisor() = default;
  ANYWHERE explicit SmallDivisor(int64_t d)
      : divisor(static_cast<unsigned>(d)), reciprocal(((1u << kShift) + divisor - 1) / divisor) {}
  __device__ __forceinline__ unsigned quotient(unsigned i) const { return i * reciprocal >> kShift; }
};

// Divides numbers i for which i * divisor < 2^31.
struct Divisor {
  unsigned divisor = 1, reciprocal = 1u << 31;  // rounded up

  Divisor() = default;
  ANYWHERE explicit Divisor(int64_t d)
      : divisor(static_cast<unsigned>(d)), reciprocal(static_cast<unsigned>(((int64_t{1} << 31) + d - 1) / d)) {}
  template <class Int>
  __device__ __forceinline__ Int quotient(Int i) const {
    return static_cast<Int>(uint64_t{2 * static_cast<unsigned>(i)} * reciprocal >> 32);
  }
};

// Whether kernels may take a map two channels at a time, with 32-bit offsets within an image. The one row or column of
// a map has any stride.
inline bool channels_are_pairs(const Map& map, int64_t channels, int64_t rows, int64_t columns) {
  const int64_t last = (rows - 1) * map.row + (columns - 1) * map.column + channels;
  return map.channel == 1 && channels % 2 == 0 && last <= INT32_MAX && map.row <= INT32_MAX &&
         map.column <= INT32_MAX &&
         in_pairs(map.elements, map.elements.dtype, map.batch, rows > 1 ? map.row : 0, columns > 1 ? map.column : 0);
}
// And whether they may take 16 bytes at a time, where channels_are_pairs.
inline bool channels_are_vectors(const Map& map, int64_t channels) {
  const int64_t vector = 16 / element_size(map.elements.dtype);
  return channels % vector == 0 && map.batch % vector == 0 && map.row % vector == 0 && map.column % vector == 0 &&
         reinterpret_cast<uintptr_t>(map.elements.data) % 16 == 0;
}

// Asks for what will be read later to come into the L2 cache.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* address) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// Calls f(element) with a value of the elements' type, on the host.
template <class F>
auto with_element(DType dtype, F f) {
  if (dtype == DType::kFloat32) return f(float{});
  return dtype == DType::kBFloat16 ? f(__nv_bfloat16{}) : f(__half{});
}

// Hides where a value comes from, so that what is computed from it is not computed ahead and kept in registers; but of
// a pointer, that it points to global memory.
template <class T>
__device__ __forceinline__ void hide(T& value) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+l"(value));
  else
    asm volatile("" : "+r"(value));
  if constexpr (std::is_pointer_v<T>) __builtin_assume(__isGlobal(value));
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

// 2^x by the special-function units, to about 22 bits; float32 is computed with the library's function.
template <class T>
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  if constexpr (!std::is_same_v<T, float>) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
  }
#endif
  return exp2f(x);
}

template <class T>
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  if constexpr (!std::is_same_v<T, float>) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
  }
#endif
  return 1.0f / x;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exp2f(-kLog2E * x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
// To a unit or two in the last place, or 1e-36: without the slow path of a division, which a quotient of this form
// never takes.
__device__ __forceinline__ float quick_sigmoid(float x) { return reciprocal<__half>(1.0f + exp2f(-kLog2E * x)); }
__device__ __forceinline__ float quick_silu(float x) { return x * quick_sigmoid(x); }
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(exp2f(kLog2E * x)); }

__device__ __forceinline__ float activate(float x, Activation activation) {
  if (activation == Activation::kRelu) return x < 0.0f ? 0.0f : x;  // NaN stays
  return activation == Activation::kSilu ? silu(x) : x;
}

ANYWHERE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The largest of equal parts of `size` of at most `most`.
constexpr int64_t share(int64_t size, int64_t most) { return ceil_div(size, ceil_div(size, most)); }
ANYWHERE constexpr int64_t between(int64_t value, int64_t least, int64_t most) {
  return value < least ? least : value < most ? value : most;
}

// Of the current device; 1 where there is none, of which the launch will tell.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 1;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int64_t most_shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }  // of a block

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
  if (config.dynamicSmemBytes > kWithoutAsking) {  // as much as there is: another thread may launch it with more
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(most_shared_bytes()));
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
