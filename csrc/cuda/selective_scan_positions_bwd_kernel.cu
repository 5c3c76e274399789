// The gradient of a selective scan with one state whose positions lie side by side; formulas in
// selective_scan_bwd_kernel.cu.
//
// A block has a chunk of up to 1024 positions, eight a thread, and goes through some channels of a group, whose states
// and adjoints enter from the folds; what these make of B and C stays in registers for all of them. States and adjoints
// pass a block as in the forward, from opposite ends, behind one barrier. What A, D and the bias get is summed over the
// lanes for both directions at once, over the warps at the end. Bytes: u, delta and the gradients of y, u and delta
// once, beside what the folds read; B and C once a channel, from the caches. With a z the general kernels run.
#include "cuda/launchers.h"
#include "cuda/scan_positions.h"

namespace mobilemamba {
namespace {

constexpr int kSums = 8;  // of a channel: what A, D and the bias get, of one direction and of the other; two unused
constexpr int kSumsOfDirection = 3;

ANYWHERE int64_t channels_of_slice(const SelectiveScanCudaParams& p) { return ceil_div(p.dim / p.groups, p.slices); }

template <class T, int kDirections>
__global__ void __launch_bounds__(kTileWarps* kWarp, 3) backward_kernel(SelectiveScanCudaParams p, int64_t first_item) {
  int64_t item = first_item + blockIdx.x;
  const auto chunk = static_cast<uint32_t>(item % p.chunks);
  item /= p.chunks;
  const auto slice = static_cast<uint32_t>(item % p.slices);
  item /= p.slices;
  const auto group = static_cast<uint32_t>(item % p.groups), batch = static_cast<uint32_t>(item / p.groups);
  const int64_t per_group = p.dim / p.groups, most = channels_of_slice(p), begin = chunk * p.segment;
  const int64_t first_channel = group * per_group + slice * most;
  const int channels = static_cast<int>(between(per_group - slice * most, 0, most));
  const int warps = static_cast<int>(blockDim.y), lane = threadIdx.x, warp = threadIdx.y, thread = warp * kWarp + lane;
  const int count = static_cast<int>(between(p.length - begin - thread * kAhead, 0, kAhead));
  const int64_t l = begin + thread * kAhead;
  const bool shared_u = kDirections == 2 && p.grad_u.direction == 0;
  float* sums = shared_memory + kFoldFloats;                                // (channels, warps, kSums)
  [[maybe_unused]] float* first_du = sums + most * warps * kSums + thread;  // (kAhead, threads)
  WarpFolds folds;
  float of_B[kDirections][kAhead] = {}, of_C[kDirections][kAhead] = {};

#pragma unroll 1
  for (int i = 0; i < channels; ++i) {
    int64_t channel = first_channel + i;
    float of_channel[kSums] = {};
    const auto go_along = [&](auto direction) {
      constexpr int k = decltype(direction)::value;
      constexpr bool kReverse = k == 1;
      hide(channel);  // addresses that a loop carries along would take the registers of the positions
      const int64_t fold = ((batch * p.directions + k) * p.chunks + chunk) * p.dim + channel;
      Ahead<T> ahead_u, ahead_delta, ahead_dy, ahead_B, ahead_C;
      load_ahead(ahead_u, row_of<T>(p.u, batch, k, channel, l), 1, count);
      load_ahead(ahead_delta, row_of<T>(p.delta, batch, k, channel, l), 1, count);
      load_ahead(ahead_dy, row_of<T>(p.grad_out, batch, 0, channel, l), 1, count);
      load_ahead(ahead_B, row_of<T>(p.B, batch, k, group / p.B_group, 0) + l * p.B.position, p.B.position, count);
      load_ahead(ahead_C, row_of<T>(p.C, batch, k, group / p.C_group, 0) + l * p.C.position, p.C.position, count);
      const float rate = load(p.A.at(0, k, channel, 0, 0));
      const float bias = p.delta_bias ? kLog2E * load(p.delta_bias.at(0, k, channel, 0, 0)) : 0.0f;
      const float skip = p.D ? load(p.D.at(0, k, channel, 0, 0)) : 0.0f;
      const bool skips = static_cast<bool>(p.D);  // 0 · infinity is NaN
      float state = 0.0f, adjoint = 0.0f;         // that enter the chunk, from either end
      if (p.chunk_state)
        state = p.chunk_state[fold], adjoint = p.chunk_adjoint[fold];
      else if (k == 0 && p.grad_last_state)
        adjoint = load(p.grad_last_state.at(batch, 0, channel, 0, 0));
      if (i + 1 < channels && count > 0) {
        prefetch(row_of<T>(p.u, batch, k, channel + 1, l));
        prefetch(row_of<T>(p.delta, batch, k, channel + 1, l));
        if (k == 0) prefetch(row_of<T>(p.grad_out, batch, 0, channel + 1, l));
      }

      float v[kAhead], t[kAhead], dy[kAhead], b[kAhead], c[kAhead], a[kAhead], slope[kAhead], before[kAhead];
      ahead_u.floats(v), ahead_delta.floats(t), ahead_dy.floats(dy), ahead_B.floats(b), ahead_C.floats(c);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) of_channel[k * kSumsOfDirection + 1] += dy[j] * v[j];
      Fold up, down;
      with_count(count, [&](auto whole) {
#pragma unroll
        for (int q = 0; q < kAhead; ++q) {
          const int j = kReverse ? kAhead - 1 - q : q;
          if (!decltype(whole)::value) a[j] = 1.0f, slope[j] = 0.0f;
          if (decltype(whole)::value || j < count) {
            t[j] = kLog2E * t[j] + bias, slope[j] = 1.0f;
            if (p.softplus) {
              const float power = power_of_two<T>(t[j]);
              slope[j] = slope_of_two<T>(t[j], power), t[j] = softplus_of_two<T>(t[j], power);
            }
            a[j] = power_of_two<T>(t[j] * rate);
            t[j] *= kLn2;
            up = {up.decay * a[j], a[j] * up.own + t[j] * v[j] * b[j]};
          }
        }
      });
#pragma unroll
      for (int q = 0; q < kAhead; ++q) {
        const int j = kReverse ? q : kAhead - 1 - q;
        down.own = a[j] * (c[j] * dy[j] + down.own);
      }
      down.decay = up.decay;
      const Fold up_before = fold_lanes<kReverse>(up, lane), down_before = fold_lanes<!kReverse>(down, lane);
      if (lane == kLastLane<kReverse>) folds.at(0, warp) = up.decay, folds.at(1, warp) = up.own;
      if (lane == kLastLane<!kReverse>) folds.at(2, warp) = down.own;
      __syncthreads();
      float h = folds.template enter<kReverse>(1, state), g = folds.template enter<!kReverse>(2, adjoint);
      folds.parity ^= 1;
      h = through(up_before.decay, h, up_before.own), g = through(down_before.decay, g, down_before.own);
#pragma unroll
      for (int q = 0; q < kAhead; ++q) {
        const int j = kReverse ? kAhead - 1 - q : q;
        before[j] = a[j] * h;
        h = before[j] + t[j] * v[j] * b[j];
      }
      with_count(count, [&](auto whole) {
#pragma unroll
        for (int q = 0; q < kAhead; ++q) {
          const int j = kReverse ? q : kAhead - 1 - q;
          if (decltype(whole)::value || j < count) {
            g += c[j] * dy[j];
            const float gb = g * b[j], gh = g * before[j], drive = t[j] * v[j];
            of_B[k][j] += g * drive, of_C[k][j] += dy[j] * (before[j] + drive * b[j]);
            of_channel[k * kSumsOfDirection] += gh * t[j];
            const float of_step = (gh * rate + gb * v[j]) * slope[j], of_u = gb * t[j];
            of_channel[k * kSumsOfDirection + 2] += of_step;
            v[j] = skips ? of_u + skip * dy[j] : of_u, t[j] = of_step;
            g *= a[j];
          }
        }
      });
      store_ahead(row_of<T>(p.grad_delta, batch, k, channel, l), 1, t, count);
      if (shared_u) {
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (k == 0)
            first_du[j * warps * kWarp] = v[j];
          else
            v[j] += first_du[j * warps * kWarp];
        }
      }
      if (!shared_u || k == 1) store_ahead(row_of<T>(p.grad_u, batch, k, channel, l), 1, v, count);
    };
    go_along(std::integral_constant<int, 0>{});
    if constexpr (kDirections == 2) go_along(std::integral_constant<int, 1>{});
    halve<4>(of_channel, lane), halve<2>(of_channel, lane), halve<1>(of_channel, lane);
#pragma unroll
    for (int mask = kSums; mask < kWarp; mask *= 2) of_channel[0] += __shfl_xor_sync(0xffffffffu, of_channel[0], mask);
    if (lane < kSums) sums[(i * warps + warp) * kSums + lane] = of_channel[0];
  }

#pragma unroll
  for (int k = 0; k < kDirections; ++k) {
    const int64_t row = (((batch * kDirections + k) * p.groups + group) * p.slices + slice) * p.length + l;
    store_ahead(p.partial_B + row, 1, of_B[k], count);
    store_ahead(p.partial_C + row, 1, of_C[k], count);
  }
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < channels * kSums; i += warps * kWarp) {
    const int c = i / kSums, k = i % kSums / kSumsOfDirection, which = i % kSums % kSumsOfDirection;
    float* const to = which == 0 ? p.partial_A : which == 1 ? p.partial_D : p.partial_delta_bias;
    if (k >= kDirections || !to) continue;
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += sums[(c * warps + w) * kSums + i % kSums];
    to[((batch * p.chunks + chunk) * kDirections + k) * p.dim + first_channel + c] = sum;
  }
}

}  // namespace

cudaError_t selective_scan_positions_bwd(const SelectiveScanCudaParams& p, cudaStream_t stream) {
  return with_element(p.u.elements.dtype, [&](auto element) {
    const auto go = [&](auto kernel) {
      const dim3 block(kWarp, static_cast<unsigned>(p.warps));
      const int64_t first_du = p.directions == 2 ? p.segment : 0;
      return launch(kernel, p, p.batch * p.groups * p.slices * p.chunks, block,
                    kFoldFloats + channels_of_slice(p) * p.warps * kSums + first_du, stream);
    };
    using T = decltype(element);
    return p.directions == 2 ? go(backward_kernel<T, 2>) : go(backward_kernel<T, 1>);
  });
}

}  // namespace mobilemamba
