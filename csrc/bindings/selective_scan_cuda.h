// What the CUDA bindings of the scans share.
#pragma once

#include "bindings/cuda.h"
#include "bindings/selective_scan.h"
#include "include/selective_scan_cuda.h"

namespace mobilemamba {

// Plans and runs a forward; `like` gives its memory a device.
void run_scan_forward(SelectiveScanCudaParams& params, const Tensor& like, const OnDeviceOf& device);

}  // namespace mobilemamba
