// The CPU has one device and no streams.
#pragma once

#include <cuda_runtime.h>

namespace mobilemamba {

struct CurrentStream {
  explicit CurrentStream(int) {}
  cudaStream_t stream() const { return nullptr; }
};

}  // namespace mobilemamba
