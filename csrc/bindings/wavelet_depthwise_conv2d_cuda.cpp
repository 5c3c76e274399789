// wavelet_depthwise_conv2d on a GPU.
#include "bindings/cuda.h"
#include "bindings/wavelet_depthwise_conv2d.h"
#include "cuda/launchers.h"

namespace mobilemamba {

void run_wavelet_depthwise_conv2d(WaveletDepthwiseConv2dParams& params, const Tensor& like) {
  const OnDeviceOf device(like);
  WaveletDepthwiseConv2dCudaParams p{params};
  plan_wavelet_depthwise_conv2d(p);
  device.run(wavelet_depthwise_conv2d_fwd, p);
}

void run_wavelet_depthwise_conv2d_weights(WaveletDepthwiseConv2dParams& params, const Tensor& like) {
  const OnDeviceOf device(like);
  WaveletDepthwiseConv2dCudaParams p{params};
  p.backward = true;
  plan_wavelet_depthwise_conv2d(p);
  const int64_t size = p.groups * p.blocks * 4 * p.tap_rows * p.tap_columns * 32;
  Tensor parts = torch::stable::new_empty(like, {size}, ScalarType::Float);
  p.parts = static_cast<float*>(parts.data_ptr());
  device.run(wavelet_depthwise_conv2d_bwd, p);
}

}  // namespace mobilemamba
