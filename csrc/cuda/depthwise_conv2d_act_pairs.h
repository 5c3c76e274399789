// The kernels of depthwise_conv2d_act for maps whose channels are dense and even in number.
#pragma once

#include <cuda_runtime.h>

#include "include/depthwise_conv2d_act.h"

namespace mobilemamba {

bool depthwise_takes_pairs(const DepthwiseConv2dActParams& p);
cudaError_t depthwise_conv2d_act_pairs(const DepthwiseConv2dActParams& params, cudaStream_t stream);

}  // namespace mobilemamba
