// The gradient of the selective scan, with g the gradient of the state h:
//   g_l = C_l dy_l + a_{l+1} g_{l+1},  dB = Σ g dt u,  dC = Σ dy h,  du = g dt B + D dy,
//   ddt = Σ_n g (A a h_prev + B u),    dA = Σ g dt a h_prev
// A block has one chunk of 32 channels. It folds states and adjoints at once, from opposite ends, and keeps decays and
// states in registers: nothing is saved by the forward. Sums over channels are taken in the warp's tile, those over
// positions over the warps, each in a fixed order; what blocks add up goes to memory and is added by sums_kernel.
// Bytes: u, delta, the gradients of y, u and delta once, a sixteenth of that for partial sums. With a z a forward that
// keeps nothing (selective_scan_gate) runs before, for the gradients of z and of what it gates.
#include "cuda/launchers.h"
#include "cuda/scan.h"
#include "cuda/scan_variants.h"

namespace mobilemamba {
namespace {

int64_t backward_floats(const SelectiveScanCudaParams& p) {
  const int64_t kept = p.directions == 2 && p.grad_u.direction == 0 ? p.warps * segment_of(p) * kWarp : 0;
  return fold_floats(3, p.warps) + p.warps * kWarp + private_floats(p) + kept;
}

// to[l] = the sum over the lanes of v[l].
template <int kSegment>
__device__ __forceinline__ void sum_lanes(float* to, const float (&v)[kSegment], const ScanPlace& x, float* tile) {
#pragma unroll
  for (int l = 0; l < kSegment; ++l) tile[x.lane * (kSegment + 1) + l] = x.inside() ? v[l] : 0.0f;
  __syncwarp();
  const int l = x.lane % kSegment, part = x.lane / kSegment;
  float sum = 0.0f;
#pragma unroll
  for (int r = 0; r < kSegment; ++r) sum += tile[(part * kSegment + r) * (kSegment + 1) + l];
#pragma unroll
  for (int mask = kSegment; mask < kWarp; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (x.lane < x.count) to[x.lane] = sum;
  __syncwarp();
}

// The sum over the warps of a value a lane, in warp 0.
__device__ __forceinline__ float sum_warps(float value, const ScanPlace& x, float* memory) {
  memory[x.warp * kWarp + x.lane] = value;
  __syncthreads();
  float sum = 0.0f;
  if (x.warp == 0)
#pragma unroll 1
    for (int w = 0; w < x.warps(); ++w) sum += memory[w * kWarp + x.lane];
  __syncthreads();
  return sum;
}

template <bool kOneState>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1) backward_kernel(SelectiveScanCudaParams p, int64_t first_item) {
  constexpr int kSegment = kSegmentOf<kOneState>;
  const int warps = blockDim.y;
  Folds folds{shared_memory + kPlaceFloats, 3, 0};
  float* sums = shared_memory + kPlaceFloats + 6 * warps * kWarp;
  float* tile = sums + warps * kWarp;
  const bool shared_u = p.directions == 2 && p.grad_u.direction == 0;
  float* kept = tile + warps * kPrivate<kSegment> + threadIdx.y * kSegment * kWarp + threadIdx.x;
  tile += threadIdx.y * kPrivate<kSegment>;
  float* rows = tile + kTile<kSegment>;

  const int64_t item = first_item + blockIdx.x;
  ScanPlace x = scan_place(p, item / p.chunks);
  const auto chunk = static_cast<uint32_t>(item % p.chunks);
  move_to_chunk<kSegment>(x, p, chunk);

  const auto direction = [&](auto constant) {
    constexpr int k = decltype(constant)::value;
    constexpr bool kReverse = k == 1;
    float u[kSegment], dt[kSegment], dy[kSegment], own_du[kSegment], own_ddt[kSegment];
    // With one state each position is finished at once, and its gradients take the place of its inputs.
    float (&du)[kSegment] = kOneState ? u : own_du;
    float (&ddt)[kSegment] = kOneState ? dt : own_ddt;
    forget(x);
    read_segment(u, p.u, x, k, tile);
    forget(x);
    read_steps<false>(dt, p, x, k, tile, rows);
    forget(x);
    read_segment(dy, p.z ? p.gated : p.grad_out, x, 0, tile);
    const float skip = read_channel(p.D, x, k, 0);
    float dskip = 0.0f, dbias = 0.0f;
#pragma unroll
    for (int l = 0; l < kSegment; ++l) {
      dskip += dy[l] * u[l];
      if (!kOneState) du[l] = ddt[l] = 0.0f;
    }
    const auto finish = [&](int l, float du_of_states, float ddt_of_states, float step) {
      du[l] = p.D ? du_of_states + skip * dy[l] : du_of_states;
      ddt[l] = p.softplus ? ddt_of_states * -expm1f(-step) : ddt_of_states;  // the sigmoid of what softplus took
      dbias += ddt[l];
    };
    const auto at_channel = [&] {  // of partial_A and its like
      return ((x.batch() * p.chunks + chunk) * p.directions + k) * p.dim + x.channel() + x.lane;
    };
    const auto at_row = [&](int64_t n) {  // of partial_B and partial_C
      const int64_t row = ((x.batch() * p.directions + k) * p.groups + x.group()) * p.slices + x.block();
      return (row * p.state + n) * p.length + x.position;
    };
    const int64_t states = kOneState ? 1 : p.state;
#pragma unroll 1
    for (int64_t n = 0; n < states; ++n) {
      forget(x);
      const float rate = read_decay_rate<false>(p, x, k, n);
      float a[kSegment], own_of_c[kSegment];
      float (&of_c)[kSegment] = kOneState ? dy : own_of_c;
      float* h = tile + x.lane;  // before the drive; a thread has its own
      Coefficient B, C;
      read_coefficients<kSegment>(B, C, rows, p, x, k, n);
      float decay = 1.0f, state = 0.0f, adjoint = 0.0f;
      each_position<kReverse, kSegment>(x.count, [&](int l) {
        a[l] = exp2f(dt[l] * rate);
        decay *= a[l];
        state = a[l] * state + dt[l] * u[l] * B[l];
      });
      each_position<!kReverse, kSegment>(x.count, [&](int l) { adjoint = a[l] * (C[l] * dy[l] + adjoint); });
      folds.at(x, 0, x.warp) = decay, folds.at(x, 1, x.warp) = state, folds.at(x, 2, x.warp) = adjoint;
      __syncthreads();
      float entering = 0.0f, gradient = 0.0f, leaving;
      if (x.inside()) {
        if (p.chunk_state) {
          const int64_t index = chunk_index(p, x, k, chunk, n);
          entering = p.chunk_state[index], gradient = p.chunk_adjoint[index];
        } else if (k == 0 && p.grad_last_state) {
          gradient = load(p.grad_last_state.at(x.batch(), 0, x.channel() + x.lane, n, 0));
        }
      }
      float previous = folds.template enter<kReverse>(x, 1, entering, leaving);
      float g = folds.template enter<!kReverse>(x, 2, gradient, leaving);
      folds.parity ^= 1;
      each_position<kReverse, kSegment>(x.count, [&](int l) {
        h[l * kWarp] = a[l] * previous;
        previous = h[l * kWarp] + dt[l] * u[l] * B[l];
      });
      float da = 0.0f;
      each_position<!kReverse, kSegment>(x.count, [&](int l) {
        g += C[l] * dy[l];
        const float step = dt[l], before = h[l * kWarp], gh = g * before, gb = g * B[l], drive = step * u[l];
        const float of_b = g * drive, product_c = dy[l] * (before + drive * B[l]);
        da += gh * step;
        const float of_u = gb * step, of_step = gh * (rate * kLn2) + gb * u[l];
        if constexpr (kOneState)
          finish(l, of_u, of_step, step);
        else
          du[l] += of_u, ddt[l] += of_step;
        g *= a[l];
        a[l] = of_b, of_c[l] = product_c;
      });
      forget(x);
      const int64_t fixed = at_channel() * p.state + n;
      da = sum_warps(da, x, sums);
      if (x.warp == 0 && x.inside()) p.partial_A[fixed] = da;
      const auto coefficient = [&](bool varies, const float (&of)[kSegment], float* to, float* one) {
        if (varies) {
          sum_lanes(to + at_row(n), of, x, tile);
        } else {
          float sum = 0.0f;
          each_position<false, kSegment>(x.count, [&](int l) { sum += of[l]; });
          sum = sum_warps(sum, x, sums);
          if (x.warp == 0 && x.inside()) one[fixed] = sum;
        }
      };
      coefficient(p.B_varies, a, p.partial_B, p.partial_fixed_B);
      coefficient(p.C_varies, of_c, p.partial_C, p.partial_fixed_C);
    }
    if constexpr (!kOneState) each_position<false, kSegment>(x.count, [&](int l) { finish(l, du[l], ddt[l], dt[l]); });
    forget(x);
    write_segment(ddt, p.grad_delta, x, k, tile);
    if (p.D) {
      dskip = sum_warps(dskip, x, sums);
      if (x.warp == 0 && x.inside()) p.partial_D[at_channel()] = dskip;
    }
    if (p.delta_bias) {
      dbias = sum_warps(dbias, x, sums);
      if (x.warp == 0 && x.inside()) p.partial_delta_bias[at_channel()] = dbias;
    }
    if (shared_u) {
#pragma unroll
      for (int l = 0; l < kSegment; ++l) {
        if (k == 0)
          kept[l * kWarp] = du[l];
        else
          du[l] += kept[l * kWarp];
      }
    }
    forget(x);
    if (!shared_u || k == 1) write_segment(du, p.grad_u, x, k, tile);
  };
  direction(std::integral_constant<int, 0>{});
  if (p.directions == 2) direction(std::integral_constant<int, 1>{});
}

}  // namespace

cudaError_t selective_scan_bwd(const SelectiveScanCudaParams& p, cudaStream_t stream) {
  if (p.by_channels) return selective_scan_channels_bwd(p, stream);
  if (p.by_positions) return selective_scan_positions(p, stream);
  if (p.by_states) return selective_scan_states(p, stream);
  if (p.chunks > 1) {
    const cudaError_t error = selective_scan_chunks(p, stream);
    if (error != cudaSuccess) return error;
  }
  if (p.z) {
    const cudaError_t error = selective_scan_gate(p, stream);
    if (error != cudaSuccess) return error;
  }
  const int64_t items = blocks_of(p) * p.chunks;
  return p.state == 1 ? launch(backward_kernel<true>, p, items, block_of(p), backward_floats(p), stream)
                      : launch(backward_kernel<false>, p, items, block_of(p), backward_floats(p), stream);
}

}  // namespace mobilemamba
