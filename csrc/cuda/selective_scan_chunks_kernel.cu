// Long sequences: the folds of all chunks, and what enters each chunk. And sums of partial gradients, in a fixed order.
#include "cuda/launchers.h"
#include "cuda/scan.h"
#include "cuda/scan_variants.h"

namespace mobilemamba {
namespace {

// A block folds one chunk of its 32 channels: chunk_decay and chunk_state, before a backward chunk_adjoint too.
template <bool kOneState, bool kProjected, bool kBackward>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1) fold_kernel(SelectiveScanCudaParams p, int64_t first_item) {
  constexpr int kSegment = kSegmentOf<kOneState>;
  const int warps = blockDim.y;
  Folds folds{shared_memory + kPlaceFloats, 3, 0};
  float* tile = shared_memory + kPlaceFloats + 6 * warps * kWarp + threadIdx.y * kPrivate<kSegment>;
  float* rows = tile + kTile<kSegment>;

  const int64_t item = first_item + blockIdx.x;
  ScanPlace x = scan_place(p, item / p.chunks);
  const int64_t chunk = item % p.chunks;
  move_to_chunk<kSegment>(x, p, chunk);
  const auto direction = [&](auto constant) {
    constexpr int k = decltype(constant)::value;
    constexpr bool kReverse = k == 1;
    float u[kSegment], dt[kSegment], decays[kSegment];
    float (&a)[kSegment] = kOneState ? dt : decays;
    [[maybe_unused]] float dy[kSegment];
    forget(x);
    read_segment(u, p.u, x, k, tile);
    forget(x);
    read_steps<kProjected>(dt, p, x, k, tile, rows);
    forget(x);
    if constexpr (kBackward) read_output_gradient(dy, p, x, tile);
#pragma unroll
    for (int l = 0; l < kSegment; ++l) u[l] *= dt[l];
    const int64_t states = kOneState ? 1 : p.state;
#pragma unroll 1
    for (int64_t n = 0; n < states; ++n) {
      forget(x);
      const float rate = read_decay_rate<kProjected>(p, x, k, n);
      Coefficient B, C;
      read_coefficients<kSegment>(B, C, rows, p, x, k, n);
      float decay = 1.0f, state = 0.0f;
      each_position<kReverse, kSegment>(x.count, [&](int l) {
        a[l] = exp2f(dt[l] * rate);
        decay *= a[l];
        state = a[l] * state + u[l] * B[l];
      });
      folds.at(x, 0, x.warp) = decay, folds.at(x, 1, x.warp) = state;
      if constexpr (kBackward) {
        float adjoint = 0.0f;
        each_position<!kReverse, kSegment>(x.count, [&](int l) { adjoint = a[l] * (C[l] * dy[l] + adjoint); });
        folds.at(x, 2, x.warp) = adjoint;
      }
      __syncthreads();
      if (x.warp == 0) {
        float product = 1.0f, leaving;
#pragma unroll 1
        for (int w = 0; w < warps; ++w) product *= folds.at(x, 0, w);
        const int64_t index = chunk_index(p, x, k, chunk, n);
        folds.template enter<kReverse>(x, 1, 0.0f, leaving);
        if (x.inside()) p.chunk_decay[index] = product, p.chunk_state[index] = leaving;
        if constexpr (kBackward) {
          folds.template enter<!kReverse>(x, 2, 0.0f, leaving);
          if (x.inside()) p.chunk_adjoint[index] = leaving;
        }
      }
      folds.parity ^= 1;
    }
  };
  direction(std::integral_constant<int, 0>{});
  if (p.directions == 2) direction(std::integral_constant<int, 1>{});
}

// Joins the folds of the chunks: of a sequence of (decay, own) what enters each. A thread has one state of one channel.
__global__ void __launch_bounds__(256) join_kernel(SelectiveScanCudaParams p) {
  const int64_t inner = p.state * p.dim, threads = p.batch * p.directions * inner;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t t = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; t < threads; t += stride) {
    const int64_t outer = t / inner, k = outer % p.directions, start = outer * p.chunks * inner + t % inner;
    const auto join = [&](float* values, bool reverse, float entering) {
      for (int64_t i = 0; i < p.chunks; ++i) {
        const int64_t index = start + (reverse ? p.chunks - 1 - i : i) * inner;
        const float own = values[index];
        values[index] = entering;
        entering = through(p.chunk_decay[index], entering, own);
      }
    };
    join(p.chunk_state, k == 1, 0.0f);
    if (p.chunk_adjoint) {
      const int64_t n = t % inner / p.dim, channel = t % p.dim, batch = outer / p.directions;
      join(p.chunk_adjoint, k == 0, p.grad_last_state ? load(p.grad_last_state.at(batch, 0, channel, n, 0)) : 0.0f);
    }
  }
}

__global__ void __launch_bounds__(256) sums_kernel(PartialSumsParams p) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int s = 0; s < p.count; ++s) {
    const PartialSum& sum = p.sums[s];
    for (int64_t t = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; t < sum.outer * sum.inner; t += stride) {
      const float* from = sum.from + t / sum.inner * sum.middle * sum.inner + t % sum.inner;
      float total = 0.0f;
#pragma unroll 16
      for (int64_t m = 0; m < sum.middle; ++m) total += from[m * sum.inner];
      sum.to[t] = total;
    }
  }
}

}  // namespace

cudaError_t selective_scan_chunks(const SelectiveScanCudaParams& p, cudaStream_t stream) {
  const int64_t items = blocks_of(p) * p.chunks, floats = fold_floats(3, p.warps) + private_floats(p);
  const cudaError_t error = with_variant(p, [&](auto one_state, auto projected) {
    return p.backward ? launch(fold_kernel<one_state, projected, true>, p, items, block_of(p), floats, stream)
                      : launch(fold_kernel<one_state, projected, false>, p, items, block_of(p), floats, stream);
  });
  return error == cudaSuccess ? join_selective_scan_chunks(p, stream) : error;
}

cudaError_t join_selective_scan_chunks(const SelectiveScanCudaParams& p, cudaStream_t stream) {
  return launch(join_kernel, p, ceil_div(p.batch * p.directions * p.state * p.dim, 256), 256, 0, stream);
}

cudaError_t partial_sums(const PartialSumsParams& p, cudaStream_t stream) {
  int64_t most = 1;
  for (int s = 0; s < p.count; ++s)
    if (p.sums[s].outer * p.sums[s].inner > most) most = p.sums[s].outer * p.sums[s].inner;
  return launch(sums_kernel, p, ceil_div(most, 256), 256, 0, stream);
}

}  // namespace mobilemamba
