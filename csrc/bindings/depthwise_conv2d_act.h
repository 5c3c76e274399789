// What the bindings of depthwise_conv2d_act share.
#pragma once

#include "bindings/convolution.h"
#include "include/depthwise_conv2d_act.h"

namespace mobilemamba {

// Computes p.y, which is not empty and has a place on the device of `like`; each device has its own.
void run_depthwise_conv2d_act(DepthwiseConv2dActParams& p, const Tensor& like);

}  // namespace mobilemamba
