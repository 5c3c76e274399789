// The gradient of a selective scan in one direction with 16 states; formulas in selective_scan_bwd_kernel.cu.
//
// A block has a chunk of kTilePositions of up to 128 channels, which states and adjoints enter from the folds. A thread
// goes through its chunk's positions first and keeps its states before every kAhead of them in shared memory (with a z
// it also has the outputs now, of which the gradient of z is made); then from the last kAhead back: state by state,
// eight decays and states are in registers, and the adjoint passes them. What B and C get is summed over the lanes for
// eight positions at once, then over the block's warps. Bytes: u, delta, z and the gradient of y three times with the
// folds', mostly from the L2 cache; 12 a state for 32 positions of a channel. Bound by the special-function units and
// the shuffles: three exponentials and two shuffles a state.
#include "cuda/launchers.h"
#include "cuda/scan_states.h"

namespace mobilemamba {
namespace {

constexpr int kGroups = kTilePositions / kAhead;
constexpr int kSums = 2 * kAhead;  // of a state: what B gets at kAhead positions, and what C gets

// In shared memory.
struct Memory {
  float* B;  // (states, positions)
  float* C;
  float* sums;     // (warps, states, kSums)
  float* states;   // (kGroups, states, threads), from this thread on: before each group
  float* adjoint;  // (states, threads), as the next two
  float* grad_A;
  float* A;
  int threads;

  static int64_t floats(int64_t warps) {
    return 2 * kManyStates * kTilePositions + warps * kManyStates * kSums + (kGroups + 3) * kManyStates * warps * kWarp;
  }
  __device__ Memory() : threads(static_cast<int>(blockDim.y) * kWarp) {
    B = shared_memory, C = B + kManyStates * kTilePositions;
    sums = C + kManyStates * kTilePositions;
    states = sums + blockDim.y * kManyStates * kSums + threadIdx.y * kWarp + threadIdx.x;
    adjoint = states + kGroups * kManyStates * threads;
    grad_A = adjoint + kManyStates * threads, A = grad_A + kManyStates * threads;
  }
};

__device__ __forceinline__ void load_eight(float (&to)[kAhead], const float* from) {
#pragma unroll
  for (int i = 0; i < kAhead; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

template <class T>
__global__ void __launch_bounds__(kBlockWarps* kWarp, 3)
    backward_kernel(SelectiveScanCudaParams p, int64_t first_item) {
  const StatesPlace x(p, first_item + blockIdx.x, 1);
  const int64_t B_group = x.group / p.B_group, C_group = x.group / p.C_group, fold = x.fold(p, 0);
  const int lane = threadIdx.x, thread = threadIdx.y * kWarp + lane, groups = (x.positions + kAhead - 1) / kAhead;
  const Memory memory;
  const auto read_rows = [&](float* rows, const ScanTensor& t, int64_t group) {
    read_coefficients<kManyStates>(t, t.at(x.batch, 0, group, 0, x.begin), x.positions,
                                   [&](int n, int l, float value) { rows[n * kTilePositions + l] = value; });
  };
  read_rows(memory.B, p.B, B_group);
  read_rows(memory.C, p.C, C_group);
#pragma unroll 1
  for (int n = 0; n < kManyStates; ++n) {
    const int at = n * memory.threads;
    const bool entered = p.chunk_state;
    memory.states[at] = entered ? p.chunk_state[fold + n * p.dim] : 0.0f;
    memory.adjoint[at] = entered             ? p.chunk_adjoint[fold + n * p.dim]
                         : p.grad_last_state ? load(p.grad_last_state.at(x.batch, 0, x.channel, n, 0))
                                             : 0.0f;
    memory.grad_A[at] = 0.0f;
    memory.A[at] = load(p.A.at(0, 0, x.channel, n, 0));
  }
  const float bias = p.delta_bias ? kLog2E * load(p.delta_bias.at(0, 0, x.channel, 0, 0)) : 0.0f;
  const float skip = p.D ? load(p.D.at(0, 0, x.channel, 0, 0)) : 0.0f;
  const bool skips = static_cast<bool>(p.D);  // 0 · infinity is NaN
  const auto read = [&](float (&v)[kAhead], const ScanTensor& t, int group, int count) {
    read_ahead(v, t.at(x.batch, 0, x.channel, 0, x.begin + group * kAhead), t.position, count);
  };
  const auto put = [&](const ScanTensor& t, const float (&v)[kAhead], int group, int count) {
    if (x.inside) write_ahead(t.at(x.batch, 0, x.channel, 0, x.begin + group * kAhead), t.position, v, count);
  };
  const auto count_of = [&](int group) {
    return x.positions - group * kAhead < kAhead ? x.positions - group * kAhead : kAhead;
  };
  // Δ in units of ln 2, 0 behind the end, and the slope of softplus.
  const auto step = [&](float raw, bool exists, float& slope) {
    float t = kLog2E * raw + bias;
    slope = 1.0f;
    if (p.softplus) {
      const float power = power_of_two<T>(t);
      slope = slope_of_two<T>(t, power), t = softplus_of_two<T>(t, power);
    }
    return exists ? t : 0.0f;
  };
  __syncthreads();

#pragma unroll 1
  for (int group = 0; group < (p.z ? groups : groups - 1); ++group) {
    const int count = count_of(group);
    float v[kAhead], t[kAhead], drive[kAhead], y[kAhead], slope;
    read(v, p.u, group, count), read(t, p.delta, group, count);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      t[j] = step(t[j], j < count, slope), drive[j] = t[j] * kLn2 * v[j];
      y[j] = skips ? skip * v[j] : 0.0f;
    }
#pragma unroll 2
    for (int n = 0; n < kManyStates; ++n) {
      const float A = memory.A[n * memory.threads];
      float h = memory.states[(group * kManyStates + n) * memory.threads], b[kAhead], c[kAhead];
      load_eight(b, memory.B + n * kTilePositions + group * kAhead);
      if (p.z) load_eight(c, memory.C + n * kTilePositions + group * kAhead);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        h = power_of_two<T>(t[j] * A) * h + drive[j] * b[j];
        if (p.z) y[j] += c[j] * h;
      }
      if (group + 1 < groups) memory.states[((group + 1) * kManyStates + n) * memory.threads] = h;
    }
    if (p.z) {
      read(v, p.z, group, count), read(t, p.grad_out, group, count);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const float gate = sigmoid(v[j]);
        y[j] = t[j] * y[j] * gate * (1.0f + v[j] * (1.0f - gate));
      }
      put(p.grad_z, y, group, count);
    }
  }

  float grad_skip = 0.0f, grad_bias = 0.0f;
#pragma unroll 1
  for (int group = groups - 1; group >= 0; --group) {
    const int count = count_of(group);
    float v[kAhead], t[kAhead], dy[kAhead], slope[kAhead], drive[kAhead];
    float of_decay[kAhead], of_drive[kAhead];  // Σ_n g A a h_prev and Σ_n g B
    read(v, p.u, group, count), read(t, p.delta, group, count), read(dy, p.grad_out, group, count);
    if (p.z) {
      read(drive, p.z, group, count);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) dy[j] *= quick_silu(drive[j]);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      t[j] = step(t[j], j < count, slope[j]), drive[j] = t[j] * kLn2 * v[j];
      of_decay[j] = of_drive[j] = 0.0f;
    }
    const auto go = [&](auto whole) {
#pragma unroll 1
      for (int n = 0; n < kManyStates; ++n) {
        const int at = n * memory.threads;
        const float A = memory.A[at];
        float h = memory.states[group * kManyStates * memory.threads + at], a[kAhead], before[kAhead];
        float b[kAhead], c[kAhead], sums[kSums];
        load_eight(b, memory.B + n * kTilePositions + group * kAhead);
        load_eight(c, memory.C + n * kTilePositions + group * kAhead);
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          a[j] = power_of_two<T>(t[j] * A), before[j] = a[j] * h;
          h = before[j] + drive[j] * b[j];
        }
        float g = memory.adjoint[at], grad_A = memory.grad_A[at];
#pragma unroll
        for (int j = kAhead - 1; j >= 0; --j) {
          sums[j] = sums[kAhead + j] = 0.0f;
          if (decltype(whole)::value || j < count) {
            g += c[j] * dy[j];
            if (x.inside) sums[j] = g * drive[j], sums[kAhead + j] = dy[j] * (before[j] + drive[j] * b[j]);
            const float gh = g * before[j];
            grad_A += gh * (t[j] * kLn2);
            of_decay[j] += gh * A, of_drive[j] += g * b[j];
            g *= a[j];
          }
        }
        memory.adjoint[at] = g, memory.grad_A[at] = grad_A;
        const float sum = sum_and_scatter(sums, lane);
        if (lane < kSums) memory.sums[(threadIdx.y * kManyStates + n) * kSums + lane] = sum;
      }
    };
    if (count == kAhead)
      go(std::true_type{});
    else
      go(std::false_type{});
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (j < count) {
        const float grad_raw = (of_decay[j] + of_drive[j] * v[j]) * slope[j];
        grad_skip += dy[j] * v[j], grad_bias += grad_raw;
        v[j] = of_drive[j] * (t[j] * kLn2);
        if (skips) v[j] += skip * dy[j];
        t[j] = grad_raw;
      }
    put(p.grad_u, v, group, count), put(p.grad_delta, t, group, count);
    __syncthreads();
    const int64_t row = (x.batch * p.groups + x.group) * p.slices + x.slice;
#pragma unroll 1
    for (int i = thread; i < kManyStates * kSums; i += memory.threads) {
      const int n = i / kSums, j = i % kAhead;
      float sum = 0.0f;
      for (int w = 0; w < static_cast<int>(blockDim.y); ++w) sum += memory.sums[w * kManyStates * kSums + i];
      if (j < count)
        (i % kSums < kAhead ? p.partial_B
                            : p.partial_C)[(row * kManyStates + n) * p.length + x.begin + group * kAhead + j] = sum;
    }
    __syncthreads();
  }
  if (!x.inside) return;
  const int64_t at = (x.batch * p.chunks + x.chunk) * p.dim + x.channel;
#pragma unroll 1
  for (int n = 0; n < kManyStates; ++n) p.partial_A[at * kManyStates + n] = memory.grad_A[n * memory.threads];
  if (p.partial_D) p.partial_D[at] = grad_skip;
  if (p.partial_delta_bias) p.partial_delta_bias[at] = grad_bias;
}

}  // namespace

cudaError_t selective_scan_states_bwd(const SelectiveScanCudaParams& p, cudaStream_t stream) {
  const auto go = [&](auto kernel) {
    const dim3 block(kWarp, static_cast<unsigned>(p.warps));
    return launch(kernel, p, p.batch * p.groups * p.slices * p.chunks, block, Memory::floats(p.warps), stream);
  };
  return p.u.elements.dtype == DType::kFloat32 ? go(backward_kernel<float>) : go(backward_kernel<__half>);
}

}  // namespace mobilemamba
