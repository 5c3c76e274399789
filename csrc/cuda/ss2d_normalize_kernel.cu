// The last phase of SS2D: LayerNorm over channels, times SiLU(z). Mean, then the squares around it, then the results: y
// is read from memory once and twice from cache.
//
// Channels dense: a warp has one position, its lanes channels, and sums by shuffles. Positions dense: a block has 32
// positions, a lane each, its warps a part of the channels each, and sums in shared memory in the order of the warps.
// Bytes: y (float32), z and the result once.
#include "cuda/device.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

constexpr int kWarps = 8;

bool by_channels(const Ss2dNormalizeParams& p) { return p.y.channel == 1; }

template <bool kByChannels>
__global__ void __launch_bounds__(kWarps* kWarp, 3) normalize_kernel(Ss2dNormalizeParams p) {
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t positions = kByChannels ? kWarps : kWarp, blocks = (p.length + positions - 1) / positions;
  const auto sum_all = [&](float sum) {
    if constexpr (kByChannels) {
#pragma unroll
      for (int mask = 1; mask < kWarp; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    } else {
      __syncthreads();
      shared_memory[warp * kWarp + lane] = sum;
      __syncthreads();
      sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) sum += shared_memory[w * kWarp + lane];
    }
    return sum;
  };
  for (int64_t item = blockIdx.x; item < p.batch * blocks; item += gridDim.x) {
    const int64_t batch = item / blocks, position = item % blocks * positions + (kByChannels ? warp : lane);
    const bool inside = position < p.length;
    const int64_t first = kByChannels ? lane : warp, step = kByChannels ? kWarp : kWarps;
    const auto* y = static_cast<const float*>(p.y.at(batch, 0, position).data);
    float sum = 0.0f, squares = 0.0f;
    if (inside)
      for (int64_t c = first; c < p.dim; c += step) sum += y[c * p.y.channel];
    const float mean = sum_all(sum) / static_cast<float>(p.dim);
    if (inside)
      for (int64_t c = first; c < p.dim; c += step) {
        const float difference = y[c * p.y.channel] - mean;
        squares += difference * difference;
      }
    const float scale = 1.0f / sqrtf(sum_all(squares) / static_cast<float>(p.dim) + p.eps);
    if (inside)
      for (int64_t c = first; c < p.dim; c += step) {
        float value = (y[c * p.y.channel] - mean) * scale * load(p.weight + c * p.weight_stride) +
                      load(p.bias + c * p.bias_stride);
        if (p.z.elements) value *= silu(load(p.z.at(batch, c, position)));
        store(p.out.at(batch, c, position), value);
      }
  }
}

}  // namespace

cudaError_t ss2d_normalize(const Ss2dNormalizeParams& p, cudaStream_t stream) {
  const dim3 block(kWarp, kWarps);
  if (by_channels(p)) return launch(normalize_kernel<true>, p, p.batch * ceil_div(p.length, kWarps), block, 0, stream);
  return launch(normalize_kernel<false>, p, p.batch * ceil_div(p.length, kWarp), block, kWarps * kWarp, stream);
}

}  // namespace mobilemamba
