// What the CUDA bindings share: the device and stream of a call, and errors of a launch.
//
// MOBILEMAMBA_DEVICE is the dispatch key under which they register; the tests' emulation registers them for CPU.
#pragma once

#include <cuda_runtime.h>

#include "bindings/current_stream.h"
#include "bindings/tensor.h"

namespace mobilemamba {

// Makes a tensor's device the current one while it lives, and knows the stream that PyTorch uses there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : current_(t.get_device_index()) {}

  template <class Params>
  void run(cudaError_t (*kernel)(const Params&, cudaStream_t), const Params& params) const {
    const cudaError_t error = kernel(params, current_.stream());
    STD_TORCH_CHECK(error == cudaSuccess,
                    "mobilemamba: a CUDA kernel could not be launched: ", cudaGetErrorString(error));
  }

 private:
  CurrentStream current_;
};

}  // namespace mobilemamba
