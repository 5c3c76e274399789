// A device and PyTorch's stream on it. The tests' emulation has a file of this name instead.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

// In libtorch_cuda; declared here because the header that declares it depends on how PyTorch was built.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace mobilemamba {

class CurrentStream {
 public:
  explicit CurrentStream(int32_t device) : guard_(device) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_));
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace mobilemamba
