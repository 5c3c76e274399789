// What the scans by channels share: a thread has two channels of one direction, whose positions it goes along one by
// one; a block has 64 channels of a group, a warp for each direction.
#pragma once

#include "cuda/scan.h"

namespace mobilemamba {

constexpr int kChannels = 2 * kWarp;  // of a block
constexpr int kAhead = 8;             // positions that are on their way while as many are computed
constexpr int64_t kLongest = 2048;    // positions

// Floats of shared memory that a block may have: on large devices two of them share a multiprocessor.
inline int64_t most_floats() {
  constexpr int64_t kMost = 108 << 10;
  const int64_t most = most_shared_bytes();
  return (most < kMost ? most : kMost) / static_cast<int64_t>(sizeof(float));
}

// log2(1 + power) of power = 2^x, to 17 bits where it is not float32. The special-function units' logarithm is exact to
// 2^-22, which is much of a small one: that is the first terms of its series.
template <class T>
__device__ __forceinline__ float softplus_of_two(float x, float power) {
  if constexpr (std::is_same_v<T, float>) return x > 20.0f * kLog2E ? x : kLog2E * log1pf(power);
  const float series = power * (kLog2E - power * (kLog2E / 2 - kLog2E / 3 * power));
  float value = 1.0f + power;
#ifdef __CUDA_ARCH__
  asm("lg2.approx.ftz.f32 %0, %0;" : "+f"(value));
#else
  value = log2f(value);
#endif
  value = power < 0.03125f ? series : value;
  return x > 20.0f * kLog2E ? x : value;
}

// The slope of softplus at x ln 2, of power = 2^x.
template <class T>
__device__ __forceinline__ float slope_of_two(float x, float power) {
  return x > 20.0f * kLog2E ? 1.0f : power * reciprocal<T>(1.0f + power);
}

// Of v[0] to v[2 · kHalf - 1] lanes whose number has the bit kHalf keep the upper half, added up with their
// neighbour's.
template <int kHalf>
__device__ __forceinline__ void halve(float* v, int lane) {
  const bool upper = lane & kHalf;
#pragma unroll
  for (int q = 0; q < kHalf; ++q) {
    const float given = upper ? v[q] : v[q + kHalf], kept = upper ? v[q + kHalf] : v[q];
    v[q] = kept + __shfl_xor_sync(0xffffffffu, given, kHalf);
  }
}

// Lane i gets the sum over all lanes of v[i % 16].
__device__ __forceinline__ float sum_and_scatter(float (&v)[16], int lane) {
  halve<8>(v, lane), halve<4>(v, lane), halve<2>(v, lane), halve<1>(v, lane);
  return v[0] + __shfl_xor_sync(0xffffffffu, v[0], 16);
}

// What one direction leaves of a sum for the other, in shared memory: (length, lanes) of two channels. Of what becomes
// bfloat16 the last eight bits of a float are left out: 2^-15 of it, where the result is rounded to 2^-9. The room that
// it takes decides how many blocks a multiprocessor has.
template <class T>
struct LeftSums {
  float2* sums;

  __device__ LeftSums(float* memory, int64_t, int lane) : sums(reinterpret_cast<float2*>(memory) + lane) {}
  __device__ __forceinline__ void put(int position, float2 sum) const { sums[position * kWarp] = sum; }
  __device__ __forceinline__ float2 get(int position) const { return sums[position * kWarp]; }
};
template <>
struct LeftSums<__nv_bfloat16> {
  uint32_t* upper;  // halves of both floats
  uint16_t* lower;  // bytes of both

  __device__ LeftSums(float* memory, int64_t length, int lane)
      : upper(reinterpret_cast<uint32_t*>(memory) + lane),
        lower(reinterpret_cast<uint16_t*>(memory + length * kWarp) + lane) {}
  __device__ __forceinline__ void put(int position, float2 sum) const {
    uint32_t bits[2];
    memcpy(bits, &sum, sizeof sum);
    upper[position * kWarp] = bits[0] >> 16 | (bits[1] & 0xffff0000u);
    lower[position * kWarp] = static_cast<uint16_t>((bits[0] >> 8 & 0xffu) | (bits[1] & 0xff00u));
  }
  __device__ __forceinline__ float2 get(int position) const {
    const uint32_t halves = upper[position * kWarp], bytes = lower[position * kWarp];
    const uint32_t bits[2] = {halves << 16 | (bytes & 0xffu) << 8, (halves & 0xffff0000u) | (bytes & 0xff00u)};
    float2 sum;
    memcpy(&sum, bits, sizeof sum);
    return sum;
  }
};
// Floats of a position.
inline int64_t left_floats(DType dtype) { return dtype == DType::kBFloat16 ? kChannels * 3 / 4 : kChannels; }

// Starts a copy of one float to shared memory, which wait_for_copies() waits for.
__device__ __forceinline__ void start_copy(float* to, const float* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
#else
  *to = *from;
#endif
}
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// A pointer that goes along the positions, with a step in bytes that fits 32 bits.
template <class T>
struct Walk {
  char* at;
  int32_t step;
  __device__ Walk(const ScanTensor& t, int64_t batch, int64_t k, int64_t channel, int64_t length, bool reverse)
      : at(static_cast<char*>(t.at(batch, k, channel, 0, reverse ? length - 1 : 0).data)),
        step(static_cast<int32_t>(reverse ? -t.position : t.position) * static_cast<int32_t>(sizeof(T))) {}
  __device__ TwoChannels<T>& operator[](int j) const {
    return *reinterpret_cast<TwoChannels<T>*>(at + static_cast<int64_t>(step) * j);
  }
  __device__ void advance(int count) { at += static_cast<int64_t>(step) * count; }
};

// Calls f(j) for j below `count`; for kAhead of them without conditions, so that their loads leave one after the other.
template <class F>
__device__ __forceinline__ void each(int count, F f) {
  if (count == kAhead) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) f(j);
  } else {
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (j < count) f(j);
  }
}

inline bool reads_pairs(const ScanTensor& t, DType dtype) {
  return t.channel == 1 && t.position * 8 <= INT32_MAX && in_pairs(t.elements, dtype, t.batch, t.direction, t.position);
}

// Fills (directions, length) of B · scale and C, positions in the order of the direction.
template <int kDirections>
__device__ __forceinline__ void read_all_coefficients(float2* to, const SelectiveScanCudaParams& p, int64_t batch,
                                                      int64_t group, float scale) {
  constexpr int kThreads = kDirections * kWarp;
  const int length = static_cast<int>(p.length), thread = threadIdx.y * kWarp + threadIdx.x;
#pragma unroll
  for (int d = 0; d < kDirections; ++d) {
    const auto position = [&](int i) { return d ? length - 1 - i : i; };
    visit(p.B.at(batch, d, group / p.B_group, 0, 0), [&](const auto* B) {
#pragma unroll 4
      for (int i = thread; i < length; i += kThreads)
        to[d * length + i].x = to_float(B[position(i) * p.B.position]) * scale;
    });
    visit(p.C.at(batch, d, group / p.C_group, 0, 0), [&](const auto* C) {
#pragma unroll 4
      for (int i = thread; i < length; i += kThreads) to[d * length + i].y = to_float(C[position(i) * p.C.position]);
    });
  }
}

// A parameter of a direction's channel and the next, 0 where it is absent.
__device__ __forceinline__ float2 read_pair(const ScanTensor& t, int64_t k, int64_t channel, int64_t n = 0) {
  return t ? float2{load(t.at(0, k, channel, n, 0)), load(t.at(0, k, channel + 1, n, 0))} : float2{0.0f, 0.0f};
}

}  // namespace mobilemamba
