// How kernels see a tensor: a pointer, an element type, strides in elements.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ANYWHERE __host__ __device__
#else
#define ANYWHERE
#endif

namespace mobilemamba {

enum class DType : int8_t { kFloat32, kBFloat16, kFloat16 };

ANYWHERE constexpr int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A pointer to elements of a type that is known only when the kernel runs.
struct Elements {
  void* data = nullptr;  // nullptr: the tensor is absent
  DType dtype = DType::kFloat32;

  ANYWHERE explicit operator bool() const { return data != nullptr; }
  ANYWHERE Elements operator+(int64_t elements) const {
    return {static_cast<char*>(data) + elements * element_size(dtype), dtype};
  }
};

// (batch, channels, rows, columns); strides in elements.
struct Map {
  Elements elements;
  int64_t batch = 0, channel = 0, row = 0, column = 0;

  ANYWHERE explicit operator bool() const { return static_cast<bool>(elements); }
  ANYWHERE Elements at(int64_t b, int64_t c, int64_t y, int64_t x) const {
    return elements + (b * batch + c * channel + y * row + x * column);
  }
};

// (batch, channels, positions); strides in elements.
struct Sequence {
  Elements elements;
  int64_t batch = 0, channel = 0, position = 0;

  ANYWHERE explicit operator bool() const { return static_cast<bool>(elements); }
  ANYWHERE Elements at(int64_t b, int64_t c, int64_t l) const {
    return elements + (b * batch + c * channel + l * position);
  }
};

// Integers of (batch, positions) or (batch): int32 or int64; strides in elements.
struct Indices {
  const void* data = nullptr;  // nullptr: the tensor is absent
  bool wide = false;           // int64
  int64_t batch = 0, position = 0;

  ANYWHERE explicit operator bool() const { return data != nullptr; }
  ANYWHERE int64_t at(int64_t b, int64_t l = 0) const {
    const int64_t i = b * batch + l * position;
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

}  // namespace mobilemamba
