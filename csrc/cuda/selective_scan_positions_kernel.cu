// A selective scan with one state whose positions lie side by side, forward: a block has one channel, and goes along it
// in tiles of up to 1024 positions, eight a thread, in two directions if there are, of which the first leaves what it
// adds to y in shared memory.
//
// A thread folds its positions, a warp's folds meet in five steps of shuffles, the warps' in shared memory behind one
// barrier a tile; then the thread goes through its registers again with the state that enters. Where there are too few
// channels to fill the GPU, where two directions are too long for shared memory, and before a backward, a channel is in
// chunks, a block each: a first launch folds them (of a zero state, of a zero adjoint), a second joins the folds.
// Bytes: u, delta, z and y once, in chunks u and delta twice; B and C once a channel, from the caches. 46 instructions
// a position and direction, three of them special functions.
#include "cuda/launchers.h"
#include "cuda/scan_positions.h"

namespace mobilemamba {
namespace {

template <class T, Pass kPass, int kDirections>
__global__ void __launch_bounds__(kTileWarps* kWarp, kPass == Pass::kFoldBoth ? 4 : 5)
    positions_kernel(SelectiveScanCudaParams p, int64_t first_item) {
  constexpr bool kForward = kPass == Pass::kForward, kBoth = kPass == Pass::kFoldBoth, kReadsC = kPass != Pass::kFold;
  int64_t item = first_item + blockIdx.x;
  const int64_t chunk = item % p.chunks;
  item /= p.chunks;
  const int64_t channel = item % p.dim;
  item /= p.dim;
  const int64_t batch = item % p.batch, only = item / p.batch;  // only: the direction that is folded
  const int64_t group = channel / (p.dim / p.groups), begin = chunk * p.segment;
  const int positions = static_cast<int>(p.length - begin < p.segment ? p.length - begin : p.segment);
  const int threads = static_cast<int>(blockDim.y) * kWarp, lane = threadIdx.x, warp = threadIdx.y;
  const int thread = warp * kWarp + lane, of_tile = threads * kAhead, tiles = (positions + of_tile - 1) / of_tile;
  // (tiles, kAhead, threads): what the first direction adds to y
  [[maybe_unused]] float* first_y = shared_memory + kFoldFloats + thread;
  WarpFolds folds;

  const auto go_along = [&](auto direction) {
    constexpr int k = decltype(direction)::value;
    constexpr bool kReverse = k == 1, kLast = kForward && k == kDirections - 1;
    const float rate = load(p.A.at(0, k, channel, 0, 0));
    const float bias = p.delta_bias ? kLog2E * load(p.delta_bias.at(0, k, channel, 0, 0)) : 0.0f;
    const float skip = p.D ? load(p.D.at(0, k, channel, 0, 0)) : 0.0f;
    const bool skips = static_cast<bool>(p.D), gated = kLast && p.z;  // 0 · infinity is NaN
    const T* u = row_of<T>(p.u, batch, k, channel, begin);
    const T* delta = row_of<T>(p.delta, batch, k, channel, begin);
    const T* B = row_of<T>(p.B, batch, k, group / p.B_group, begin);
    const T* C = row_of<T>(p.C, batch, k, group / p.C_group, begin);
    const T* z = row_of<T>(p.z, batch, 0, channel, begin);
    T* y_or_dy = row_of<T>(kForward ? p.out : p.grad_out, batch, 0, channel, begin);
    const int64_t fold = ((batch * p.directions + k) * p.chunks + chunk) * p.dim + channel;
    float state = kForward && p.chunk_state ? p.chunk_state[fold] : 0.0f;  // that enters a tile
    [[maybe_unused]] float decay = 1.0f, adjoint = 0.0f;                   // of the tiles so far, the latter a thread's

#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      const int at = ((kReverse ? tiles - 1 - i : i) * threads + thread) * kAhead;
      const int count = static_cast<int>(between(positions - at, 0, kAhead));
      Ahead<T> ahead_u, ahead_delta, ahead_B, ahead_C, ahead_dy, ahead_z;
      load_ahead(ahead_u, u + at, 1, count);
      load_ahead(ahead_delta, delta + at, 1, count);
      load_ahead(ahead_B, B + at * p.B.position, p.B.position, count);
      if (kReadsC) load_ahead(ahead_C, C + at * p.C.position, p.C.position, count);
      if (kBoth) load_ahead(ahead_dy, y_or_dy + at, 1, count);
      if (gated) load_ahead(ahead_z, z + at, 1, count);
      if (kReverse ? at >= of_tile : at + of_tile < positions) {
        const int next = kReverse ? at - of_tile : at + of_tile;
        prefetch(u + next), prefetch(delta + next);
        if (gated) prefetch(z + next);
        if (kBoth) prefetch(y_or_dy + next);
      }
      float v[kAhead], a[kAhead], x[kAhead], c[kAhead];  // x: what a position adds to the state
      ahead_u.floats(v), ahead_delta.floats(a), ahead_B.floats(x);
      if (kReadsC) ahead_C.floats(c);
      if constexpr (kBoth) {
        float dy[kAhead];
        ahead_dy.floats(dy);
#pragma unroll
        for (int j = 0; j < kAhead; ++j) c[j] *= dy[j];
      }
      Fold own;
      [[maybe_unused]] float back = 0.0f;
      with_count(count, [&](auto whole) {
#pragma unroll
        for (int q = 0; q < kAhead; ++q) {
          const int j = kReverse ? kAhead - 1 - q : q;
          if (decltype(whole)::value || j < count) {
            float t = kLog2E * a[j] + bias;
            if (p.softplus) t = softplus_of_two<T>(t, power_of_two<T>(t));
            a[j] = power_of_two<T>(t * rate);
            x[j] *= t * kLn2 * v[j];
            own = {own.decay * a[j], a[j] * own.own + x[j]};
          }
        }
        if constexpr (kBoth) {
#pragma unroll
          for (int q = 0; q < kAhead; ++q) {
            const int j = kReverse ? q : kAhead - 1 - q;
            if (decltype(whole)::value || j < count) back = a[j] * (c[j] + back);
          }
        }
      });
      const Fold before = fold_lanes<kReverse>(own, lane);
      if (lane == kLastLane<kReverse>) folds.at(0, warp) = own.decay, folds.at(1, warp) = own.own;
      __syncthreads();
      const float entering = folds.template enter<kReverse>(1, state);
      if constexpr (kForward) {
        float h = through(before.decay, entering, before.own), y[kAhead];
        float* kept = first_y + (at - thread * kAhead);
#pragma unroll
        for (int q = 0; q < kAhead; ++q) {
          const int j = kReverse ? kAhead - 1 - q : q;
          h = a[j] * h + x[j];
          y[j] = skips ? c[j] * h + skip * v[j] : c[j] * h;
          if constexpr (k != 0) y[j] += kept[j * threads];
          if constexpr (!kLast) kept[j * threads] = y[j];
        }
        if constexpr (kLast) {
          if (gated) {
            ahead_z.floats(x);
#pragma unroll
            for (int j = 0; j < kAhead; ++j) y[j] *= quick_silu(x[j]);
          }
          store_ahead(y_or_dy + at, 1, y, count);
        }
      } else {
        float passed = before.decay;  // by an adjoint from here to the chunk's beginning
        for (int w = 0; w < static_cast<int>(blockDim.y); ++w)
          if (kReverse ? w > warp : w < warp) passed *= folds.at(0, w);
        if (kBoth) adjoint = through(decay * passed, back, adjoint);
        for (int w = 0; w < static_cast<int>(blockDim.y); ++w) decay *= folds.at(0, w);
      }
      folds.parity ^= 1;
    }
    if constexpr (kBoth) {
#pragma unroll
      for (int mask = kWarp / 2; mask > 0; mask /= 2) adjoint += __shfl_xor_sync(0xffffffffu, adjoint, mask);
      if (lane == 0) folds.at(2, warp) = adjoint;
      __syncthreads();
      adjoint = 0.0f;
      for (int w = 0; w < static_cast<int>(blockDim.y); ++w) adjoint += folds.at(2, w);
    }
    if (thread != 0) return;
    if constexpr (kForward) {
      if (p.last_state && chunk == p.chunks - 1) store(p.last_state.at(batch, 0, channel, 0, 0), state);
    } else {
      p.chunk_state[fold] = state, p.chunk_decay[fold] = decay;
      if (kBoth) p.chunk_adjoint[fold] = adjoint;
    }
  };
  using First = std::integral_constant<int, 0>;
  using Second = std::integral_constant<int, 1>;
  if (kForward || only == 0) go_along(First{});
  if constexpr (kDirections == 2)
    if (kForward || only == 1) go_along(Second{});
}

template <Pass kPass>
cudaError_t launch_pass(const SelectiveScanCudaParams& p, cudaStream_t stream) {
  constexpr bool kForward = kPass == Pass::kForward;
  return with_element(p.u.elements.dtype, [&](auto element) {
    const auto go = [&](auto kernel) {
      const dim3 block(kWarp, static_cast<unsigned>(p.warps));
      const int64_t kept = kForward && p.directions == 2 ? p.segment : 0;
      return launch(kernel, p, p.batch * p.dim * p.chunks * (kForward ? 1 : p.directions), block, kFoldFloats + kept,
                    stream);
    };
    using T = decltype(element);
    return p.directions == 2 ? go(positions_kernel<T, kPass, 2>) : go(positions_kernel<T, kPass, 1>);
  });
}

}  // namespace

bool plan_selective_scan_positions(SelectiveScanCudaParams& p) {
  constexpr int64_t kFewest = 128;                        // positions, for which lanes are worth while
  constexpr int64_t kEnoughWarps = 8, kWantedWarps = 16;  // of a multiprocessor
  constexpr int64_t kMostKept = 8192;                     // positions of two directions
  constexpr int64_t kTile = kTileWarps * kWarpPositions;
  constexpr int64_t kMostChannels = 64, kWantedBlocks = 8;  // of a slice; of a multiprocessor
  if (p.state != 1 || p.projected || !p.B_varies || !p.C_varies || p.length < kFewest) return false;
  if (p.backward && p.z) return false;
  const DType dtype = p.u.elements.dtype;
  for (const ScanTensor* t : {&p.u, &p.delta, &p.z, &p.out, &p.grad_out, &p.grad_u, &p.grad_delta})
    if (*t && (t->position != 1 || t->elements.dtype != dtype)) return false;
  if (p.B.elements.dtype != dtype || p.C.elements.dtype != dtype) return false;

  p.by_positions = true, p.range = 1;
  const int64_t processors = multiprocessors();
  int64_t most = kTile;
  if (!p.backward) {
    const int64_t warps = p.batch * p.dim * between(ceil_div(p.length, kWarpPositions), 1, kTileWarps);
    const int64_t chunks = warps < kEnoughWarps * processors ? ceil_div(kWantedWarps * processors, warps) : 1;
    most = ceil_div(ceil_div(p.length, chunks), kTile) * kTile;
    if (p.directions == 2 && most > kMostKept) most = kMostKept;
  }
  p.chunks = ceil_div(p.length, most);
  p.warps = between(ceil_div(ceil_div(p.length, p.chunks), kWarpPositions), 1, kTileWarps);
  p.segment = ceil_div(ceil_div(p.length, p.chunks), p.warps * kWarpPositions) * p.warps * kWarpPositions;
  p.chunks = ceil_div(p.length, p.segment);
  if (p.backward) {
    const int64_t per_group = p.dim / p.groups, blocks = p.batch * p.groups * p.chunks;
    p.slices = between(ceil_div(kWantedBlocks * processors, blocks), ceil_div(per_group, kMostChannels), per_group);
    p.slices = ceil_div(per_group, ceil_div(per_group, p.slices));
  }
  return true;
}

cudaError_t selective_scan_positions(const SelectiveScanCudaParams& p, cudaStream_t stream) {
  if (p.chunks > 1) {
    const cudaError_t error =
        p.backward ? launch_pass<Pass::kFoldBoth>(p, stream) : launch_pass<Pass::kFold>(p, stream);
    if (error != cudaSuccess) return error;
    const cudaError_t joined = join_selective_scan_chunks(p, stream);
    if (joined != cudaSuccess) return joined;
  }
  return p.backward ? selective_scan_positions_bwd(p, stream) : launch_pass<Pass::kForward>(p, stream);
}

}  // namespace mobilemamba
