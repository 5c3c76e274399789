// depthwise_conv2d_act_fwd on the CPU.
#include "bindings/convolution.h"
#include "include/depthwise_conv2d_act.h"

DECLARE_KERNEL(depthwise_conv2d_act, DepthwiseConv2dActParams)

namespace mobilemamba {
namespace {

// Floats that a thread keeps close: a group's weights, and its tiles or the band of a transposed block.
constexpr int64_t kWeights = 1 << 14, kTiles = 1 << 15;
constexpr int64_t kLeastBlocks = 4;  // of channels side by side in memory, for its pages and prefetching

// Divides the work: whole rows of channels as they lie in memory, fewer channels and rows only to occupy the threads.
void divide(DepthwiseConv2dActParams& p, int64_t lanes) {
  const int64_t blocks = ceil_div(p.channels, lanes), threads = torch::stable::get_num_threads();
  p.transposes = p.x.channel != 1 || p.y.channel != 1;
  if (p.transposes) {
    p.group = lanes;
    p.rows = std::clamp<int64_t>(kTiles / lanes / std::max(p.width * p.stride, p.out_width), 1, p.out_height);
  } else {
    const int64_t most =
        std::min(kWeights / (p.k * p.k),
                 depthwise_reads_in_place(p) ? kWeights : kTiles / (p.k * std::max<int64_t>(1, p.width)));
    const int64_t share = std::max(kLeastBlocks, ceil_div(blocks * p.batch, threads));
    p.group = std::clamp<int64_t>(std::min(most / lanes, share), 1, blocks) * lanes;
    p.rows = p.out_height;
  }
  const int64_t items = ceil_div(p.channels, p.group) * p.batch;
  if (items < threads) p.rows = std::min(p.rows, ceil_div(p.out_height, ceil_div(threads, items)));
}

Tensor depthwise_conv2d_act_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t stride,
                                    int64_t padding, std::string activation, std::optional<Tensor> residual) {
  DepthwiseConv2dActParams p{};
  p.x = map_of(x);
  STD_TORCH_CHECK(weight.dim() == 4, "mobilemamba: weight must have four dimensions, got ", weight.dim());
  p.batch = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
  p.k = weight.size(2), p.stride = stride, p.padding = padding;
  check_size(weight, 0, p.channels), check_size(weight, 1, 1), check_size(weight, 3, p.k);
  if (bias) check_size(*bias, 0, p.channels);
  p.out_height = output_size(p.height, p.k, stride, padding);
  p.out_width = output_size(p.width, p.k, stride, padding);
  Tensor y = empty_image(x, p.channels, p.out_height, p.out_width);
  check_image(residual, y);
  const Tensor filters = weight.is_contiguous() ? weight : torch::stable::contiguous(weight);
  p.weight = elements(filters);
  p.bias = elements(bias), p.bias_stride = mobilemamba::stride(bias, 0);
  p.y = map_of(y);
  if (residual) p.residual = map_of(*residual);
  p.activation = activation_of(activation);

  if (y.numel() == 0) return y;
  const int64_t lanes = vector_lanes();
  divide(p, lanes);
  parallel(KERNEL(depthwise_conv2d_act), p, depthwise_items(p), p.rows * p.out_width * p.k * p.k * p.group / lanes,
           depthwise_scratch(p, lanes));
  return y;
}

}  // namespace
}  // namespace mobilemamba

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, CPU, m) {
  m.impl("depthwise_conv2d_act_fwd", TORCH_BOX(&mobilemamba::depthwise_conv2d_act_forward));
}
