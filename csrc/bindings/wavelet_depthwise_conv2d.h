// What the bindings of wavelet_depthwise_conv2d share.
#pragma once

#include "bindings/tensor.h"
#include "include/wavelet_depthwise_conv2d.h"

namespace mobilemamba {

// Both have a pixel to compute, and a place on the device of `like`; each device has its own. The second computes
// p.grad_weight and p.grad_scale.
void run_wavelet_depthwise_conv2d(WaveletDepthwiseConv2dParams& p, const Tensor& like);
void run_wavelet_depthwise_conv2d_weights(WaveletDepthwiseConv2dParams& p, const Tensor& like);

}  // namespace mobilemamba
