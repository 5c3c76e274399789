// The selective scan in one direction or both: forward, and its parts for long sequences.
//
// One state and dense channels: selective_scan_channels_kernel.cu; one state and dense positions:
// selective_scan_positions_kernel.cu; 1 or 16 states: selective_scan_states_kernel.cu. Else, short: one block goes
// through the whole sequence of its 32 channels, chunk by chunk where it does not fit; with two directions what the
// first adds to y waits in registers (one chunk) or in shared memory. Bytes: u once or twice (the second time from a
// cache), delta, z and the result once. Long, or too few blocks to fill the GPU: every chunk is folded by a block of
// its own (u and delta read), the folds are joined (chunk_decay and chunk_state, 2 of 16 · warps elements), and every
// chunk is computed by a block of its own (all read again).
#include "cuda/launchers.h"
#include "cuda/scan.h"
#include "cuda/scan_variants.h"

namespace mobilemamba {
namespace {

// Floats of shared memory: folds, tiles, carries, and what the first direction added to y.
int64_t kept_floats(const SelectiveScanCudaParams& p) {
  return p.directions == 2 && p.range > 1 ? p.range * p.warps * segment_of(p) * kWarp : 0;
}
int64_t forward_floats(const SelectiveScanCudaParams& p) {
  return fold_floats(2, p.warps) + private_floats(p) + carry_floats(p) + kept_floats(p);
}

// kGate: not the result but, before a backward, the gradients of z and of what it gates.
template <bool kOneState, bool kProjected, bool kGate>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1) forward_kernel(SelectiveScanCudaParams p, int64_t first_item) {
  constexpr int kSegment = kSegmentOf<kOneState>;
  const int64_t ranges = (p.chunks + p.range - 1) / p.range;
  const int warps = blockDim.y;
  Folds folds{shared_memory + kPlaceFloats, 2, 0};
  float* tile = shared_memory + kPlaceFloats + 4 * warps * kWarp;
  Carries<kOneState> carries{0.0f, tile + warps * kPrivate<kSegment>};
  float* kept = carries.memory + (kOneState ? 0 : p.state * kWarp);
  tile += threadIdx.y * kPrivate<kSegment>;
  float* rows = tile + kTile<kSegment>;

  const int64_t item = first_item + blockIdx.x;
  ScanPlace x = scan_place(p, item / ranges);
  const int first = static_cast<int>(item % ranges * p.range);
  const int last = static_cast<int>(first + p.range < p.chunks ? first + p.range : p.chunks) - 1;
  float y[kSegment];

  const auto chunk_of_direction = [&](auto direction, int chunk) {
    constexpr int k = decltype(direction)::value;
    const bool begins = k == 0, ends = k == p.directions - 1;
    move_to_chunk<kSegment>(x, p, chunk);
    float* waiting = kept + ((chunk - first) * warps + x.warp) * kSegment * kWarp + x.lane;
    if (begins || p.range > 1) {
#pragma unroll
      for (int l = 0; l < kSegment; ++l) y[l] = begins ? 0.0f : waiting[l * kWarp];
    }
    float u[kSegment], dt[kSegment];
    read_segment(u, p.u, x, k, tile);
    forget(x);
    read_steps<kProjected>(dt, p, x, k, tile, rows);
    add_outputs<kOneState, kProjected, k>(y, u, dt, p, x, rows, folds, carries);
    if (ends) {
      float z[kSegment];
      forget(x);
      if (p.z) read_segment(z, p.z, x, 0, tile);
      forget(x);
      if constexpr (kGate) {
        float dy[kSegment];
        read_segment(dy, p.grad_out, x, 0, tile);
#pragma unroll
        for (int l = 0; l < kSegment; ++l) {
          const float gate = sigmoid(z[l]), dz = dy[l] * y[l] * gate * (1.0f + z[l] * (1.0f - gate));
          dy[l] *= z[l] * gate;
          z[l] = dz;
        }
        write_segment(z, p.grad_z, x, 0, tile);
        forget(x);
        write_segment(dy, p.gated, x, 0, tile);
      } else {
#pragma unroll
        for (int l = 0; l < kSegment; ++l)
          if (p.z) y[l] *= silu(z[l]);
        write_segment(y, p.out, x, 0, tile);
      }
    } else if (p.range > 1) {
#pragma unroll
      for (int l = 0; l < kSegment; ++l) waiting[l * kWarp] = y[l];
    }
  };

  start_carries(carries, p.chunk_state, p, x, 0, first);
  for (int chunk = first; chunk <= last; ++chunk) chunk_of_direction(std::integral_constant<int, 0>{}, chunk);
  if (p.last_state && last == p.chunks - 1) {
    __syncthreads();
    if (x.warp == 0 && x.inside())
      for (int64_t n = 0; n < p.state; ++n)
        store(p.last_state.at(x.batch(), 0, x.channel() + x.lane, n, 0), carries.get(x, n));
  }
  if (p.directions == 2) {
    start_carries(carries, p.chunk_state, p, x, 1, last);
    for (int chunk = last; chunk >= first; --chunk) chunk_of_direction(std::integral_constant<int, 1>{}, chunk);
  }
}

}  // namespace

void plan_selective_scan(SelectiveScanCudaParams& p) {
  constexpr int64_t kBlocksAProcessor = 2;
  const int64_t processors = multiprocessors();
  p.by_channels = plan_selective_scan_channels(p);
  if (p.by_channels || plan_selective_scan_positions(p) || plan_selective_scan_states(p)) return;
  const int64_t segment = segment_of(p);
  p.slices = ceil_div(p.dim / p.groups, kWarp);
  p.chunks = ceil_div(p.length, kMostWarps * segment);
  p.warps = ceil_div(ceil_div(p.length, p.chunks), segment);
  p.chunks = ceil_div(p.length, p.warps * segment);
  p.range = 1;
  if (p.backward || p.chunks == 1) return;
  if (blocks_of(p) < kBlocksAProcessor * processors) return;
  p.range = p.chunks;
  if (forward_floats(p) * 4 > most_shared_bytes()) p.range = 1;
}

cudaError_t selective_scan_fwd(const SelectiveScanCudaParams& p, cudaStream_t stream) {
  if (p.by_channels) return selective_scan_channels(p, stream);
  if (p.by_positions) return selective_scan_positions(p, stream);
  if (p.by_states) return selective_scan_states(p, stream);
  if (p.range < p.chunks) {
    const cudaError_t error = selective_scan_chunks(p, stream);
    if (error != cudaSuccess) return error;
  }
  return with_variant(p, [&](auto one_state, auto projected) {
    return launch(forward_kernel<one_state, projected, false>, p, blocks_of(p) * ceil_div(p.chunks, p.range),
                  block_of(p), forward_floats(p), stream);
  });
}

cudaError_t selective_scan_gate(const SelectiveScanCudaParams& p, cudaStream_t stream) {
  const int64_t items = blocks_of(p) * p.chunks;
  return p.state == 1 ? launch(forward_kernel<true, false, true>, p, items, block_of(p), forward_floats(p), stream)
                      : launch(forward_kernel<false, false, true>, p, items, block_of(p), forward_floats(p), stream);
}

}  // namespace mobilemamba
