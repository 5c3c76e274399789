// depthwise_conv2d_act on the CPU.
#include "bindings/depthwise_conv2d_act.h"

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

}  // namespace

void run_depthwise_conv2d_act(DepthwiseConv2dActParams& p, const Tensor&) {
  const int64_t lanes = vector_lanes();
  divide(p, lanes);
  parallel(KERNEL(depthwise_conv2d_act), p, depthwise_items(p), p.rows * p.out_width * p.k * p.k * p.group / lanes,
           depthwise_scratch(p, lanes));
}

}  // namespace mobilemamba
