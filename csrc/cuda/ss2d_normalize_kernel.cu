// The last phase of SS2D: LayerNorm over channels, times SiLU(z). Mean, then the squares around it, then the results: y
// is read from memory once, and twice from cache where it does not stay in registers.
//
// Channels dense, an even number of them up to 1024: a warp has one position after the other, its lanes pairs of
// channels, all of them in registers with their weights, and sums by shuffles. Otherwise, channels dense: a warp has
// one position, its lanes channels, and sums by shuffles. Positions dense: a block has 32 positions, a lane each, its
// warps a part of the channels each, and sums in shared memory in the order of the warps. Bytes: y (float32), z and the
// result once.
#include "cuda/device.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

constexpr int kWarps = 8;

bool by_channels(const Ss2dNormalizeParams& p) { return p.y.channel == 1; }

__device__ __forceinline__ float sum_lanes(float sum) {
#pragma unroll
  for (int mask = 1; mask < kWarp; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  return sum;
}

template <bool kByChannels>
__global__ void __launch_bounds__(kWarps* kWarp, 3) normalize_kernel(Ss2dNormalizeParams p) {
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t positions = kByChannels ? kWarps : kWarp, blocks = (p.length + positions - 1) / positions;
  const auto sum_all = [&](float sum) {
    if constexpr (kByChannels) {
      return sum_lanes(sum);
    } else {
      __syncthreads();
      shared_memory[warp * kWarp + lane] = sum;
      __syncthreads();
      sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) sum += shared_memory[w * kWarp + lane];
      return sum;
    }
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

// T: of z and the result. kPairs of channels a lane.
template <class T, int kPairs>
__global__ void __launch_bounds__(kWarps* kWarp) pairs_kernel(Ss2dNormalizeParams p) {
  const int lane = threadIdx.x, dim = static_cast<int>(p.dim);
  const auto channel = [&](int i) { return 2 * (lane + i * kWarp); };
  float2 weight[kPairs], bias[kPairs];
  const auto read = [&](float2(&to)[kPairs], const Elements& from, int64_t stride) {
    visit(from, [&](const auto* values) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        if (channel(i) < dim)
          to[i] = {to_float(values[channel(i) * stride]), to_float(values[(channel(i) + 1) * stride])};
    });
  };
  read(weight, p.weight, p.weight_stride), read(bias, p.bias, p.bias_stride);
  const auto count = static_cast<uint32_t>(p.batch * p.length), length = static_cast<uint32_t>(p.length);
  for (uint32_t item = blockIdx.x * kWarps + threadIdx.y; item < count; item += gridDim.x * kWarps) {
    const int64_t batch = item / length, position = item % length;
    const auto* y = static_cast<const float2*>(p.y.at(batch, 0, position).data);
    const auto* z = static_cast<const TwoChannels<T>*>(p.z.at(batch, 0, position).data);
    auto* out = static_cast<TwoChannels<T>*>(p.out.at(batch, 0, position).data);
    float2 value[kPairs];
    TwoChannels<T> gate[kPairs];
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      value[i] = {0.0f, 0.0f};
      if (channel(i) < dim) {
        value[i] = y[channel(i) / 2];
        if (z) gate[i] = z[channel(i) / 2];
      }
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) sum += value[i].x + value[i].y;
    const float mean = sum_lanes(sum) / static_cast<float>(dim);
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      if (channel(i) < dim) {
        value[i].x -= mean, value[i].y -= mean;
        squares += value[i].x * value[i].x + value[i].y * value[i].y;
      }
    const float scale = 1.0f / sqrtf(sum_lanes(squares) / static_cast<float>(dim) + p.eps);
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      if (channel(i) < dim) {
        float2 result{value[i].x * scale * weight[i].x + bias[i].x, value[i].y * scale * weight[i].y + bias[i].y};
        if (z) {
          const float2 g = gate[i].floats();
          result.x *= silu(g.x), result.y *= silu(g.y);
        }
        out[channel(i) / 2] = TwoChannels<T>::of(result);
      }
  }
}

bool by_pairs(const Ss2dNormalizeParams& p) {
  const DType dtype = p.out.elements.dtype;
  const auto fits = [](const Sequence& s, DType type) {
    return s.channel == 1 && in_pairs(s.elements, type, s.batch, s.position);
  };
  return p.dim % 2 == 0 && p.dim <= 1024 && p.batch * p.length < int64_t{1} << 31 && fits(p.y, DType::kFloat32) &&
         fits(p.out, dtype) && (!p.z || fits(p.z, dtype));
}

template <class T>
cudaError_t launch_pairs(const Ss2dNormalizeParams& p, cudaStream_t stream) {
  const auto go = [&](auto kernel) {
    constexpr int64_t kBlocks = 512;  // about a wave; each warp then has several positions for its weights
    const int64_t items = ceil_div(p.batch * p.length, kWarps);
    return launch(kernel, p, items < kBlocks ? items : kBlocks, dim3(kWarp, kWarps), 0, stream);
  };
  const int64_t pairs = ceil_div(p.dim, 2 * kWarp);
  return pairs <= 3   ? go(pairs_kernel<T, 3>)
         : pairs <= 5 ? go(pairs_kernel<T, 5>)
         : pairs <= 9 ? go(pairs_kernel<T, 9>)
                      : go(pairs_kernel<T, 16>);
}

}  // namespace

cudaError_t ss2d_normalize(const Ss2dNormalizeParams& p, cudaStream_t stream) {
  if (by_pairs(p)) {
    return with_element(p.out.elements.dtype, [&](auto element) { return launch_pairs<decltype(element)>(p, stream); });
  }
  const dim3 block(kWarp, kWarps);
  if (by_channels(p)) return launch(normalize_kernel<true>, p, p.batch * ceil_div(p.length, kWarps), block, 0, stream);
  return launch(normalize_kernel<false>, p, p.batch * ceil_div(p.length, kWarp), block, kWarps * kWarp, stream);
}

}  // namespace mobilemamba
