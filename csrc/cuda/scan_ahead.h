// Eight consecutive positions of a thread, read and written in vectors where they lie side by side.
#pragma once

#include "cuda/scan_channels.h"

namespace mobilemamba {

// What a scan in chunks launches: kFoldBoth folds states and, before a backward, adjoints.
enum class Pass { kForward, kFold, kFoldBoth };

// As memory has them.
template <class T>
struct Ahead {
  TwoChannels<T> pairs[kAhead / 2];

  __device__ __forceinline__ void floats(float (&v)[kAhead]) const {
#pragma unroll
    for (int j = 0; j < kAhead; j += 2) {
      const float2 two = pairs[j / 2].floats();
      v[j] = two.x, v[j + 1] = two.y;
    }
  }
};

template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  TwoChannels<T> pairs[kCount / 2];
};
template <int kCount, class T>
__device__ __forceinline__ bool in_vectors(const T* p, int64_t stride) {
  return stride == 1 && reinterpret_cast<uintptr_t>(p) % (kCount * sizeof(T)) == 0;
}
template <int kCount, class T>
__device__ __forceinline__ void load_vectors(Ahead<T>& to, const T* p) {
#pragma unroll
  for (int i = 0; i < kAhead / kCount; ++i) {
    const auto vector = reinterpret_cast<const Vector<T, kCount>*>(p)[i];
#pragma unroll
    for (int j = 0; j < kCount / 2; ++j) to.pairs[i * kCount / 2 + j] = vector.pairs[j];
  }
}
template <int kCount, class T>
__device__ __forceinline__ void store_vectors(T* p, const float (&v)[kAhead]) {
#pragma unroll
  for (int i = 0; i < kAhead / kCount; ++i) {
    Vector<T, kCount> vector;
#pragma unroll
    for (int j = 0; j < kCount / 2; ++j) {
      const float* two = v + i * kCount + 2 * j;
      vector.pairs[j] = TwoChannels<T>::of({two[0], two[1]});
    }
    reinterpret_cast<Vector<T, kCount>*>(p)[i] = vector;
  }
}

// Elements of 16 bytes, and of half as many where a row begins between two of them.
template <class T>
constexpr int kWide = 16 / sizeof(T);
constexpr int kNarrow = 4;

// `count` positions from p on, zeros behind them.
template <class T>
__device__ __forceinline__ void load_ahead(Ahead<T>& to, const T* p, int64_t stride, int count) {
  if (count == kAhead && in_vectors<kWide<T>>(p, stride)) {
    load_vectors<kWide<T>>(to, p);
  } else if (kWide<T> != kNarrow && count == kAhead && in_vectors<kNarrow>(p, stride)) {
    load_vectors<kNarrow>(to, p);
  } else {
    T values[kAhead];
    if (count == kAhead) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) values[j] = p[j * stride];
    } else {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) values[j] = j < count ? p[j * stride] : from_float<T>(0.0f);
    }
    memcpy(&to, values, sizeof to);
  }
}
__device__ __forceinline__ void read_ahead(float (&v)[kAhead], const Elements& from, int64_t stride, int count) {
  visit(from, [&](const auto* p) {
    Ahead<std::remove_cv_t<std::remove_pointer_t<decltype(p)>>> ahead;
    load_ahead(ahead, p, stride, count);
    ahead.floats(v);
  });
}

// Asks for kAhead positions from `from` on.
__device__ __forceinline__ void prefetch_ahead(const Elements& from, int64_t stride) {
  const int64_t step = stride * element_size(from.dtype);
  if (stride == 1) {
    prefetch(from.data);
  } else {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) prefetch(static_cast<const char*>(from.data) + j * step);
  }
}

template <class T>
__device__ __forceinline__ void store_ahead(T* p, int64_t stride, const float (&v)[kAhead], int count) {
  if (count == kAhead && in_vectors<kWide<T>>(p, stride)) {
    store_vectors<kWide<T>>(p, v);
  } else if (kWide<T> != kNarrow && count == kAhead && in_vectors<kNarrow>(p, stride)) {
    store_vectors<kNarrow>(p, v);
  } else {
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (j < count) p[j * stride] = from_float<T>(v[j]);
  }
}
__device__ __forceinline__ void write_ahead(const Elements& to, int64_t stride, const float (&v)[kAhead], int count) {
  visit(to, [&](auto* p) { store_ahead(p, stride, v, count); });
}

}  // namespace mobilemamba
