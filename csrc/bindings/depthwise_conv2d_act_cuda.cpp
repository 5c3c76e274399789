// depthwise_conv2d_act on a GPU.
#include "bindings/cuda.h"
#include "bindings/depthwise_conv2d_act.h"
#include "cuda/launchers.h"

namespace mobilemamba {

void run_depthwise_conv2d_act(DepthwiseConv2dActParams& p, const Tensor& like) {
  OnDeviceOf(like).run(depthwise_conv2d_act, p);
}

}  // namespace mobilemamba
