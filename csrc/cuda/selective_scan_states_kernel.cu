// A selective scan with 1 or 16 states: a thread has one channel with all of its states in registers and goes along the
// positions, in two directions through chunks of them whose first direction leaves what it adds to y in shared memory.
//
// A block has up to 128 channels of a group. B and C of some positions wait in shared memory, where all lanes read the
// same. What is read a channel comes kAhead positions at a time, an element each where channels are dense, four where
// positions are, and is asked for while those before are computed. Where there are too few channels to fill the GPU,
// and before a backward, the sequence is in chunks, a block each: a first launch folds them (what a chunk makes of a
// zero state, and the product of its decays; of a zero adjoint), a second joins the folds. Bytes: u, delta, z and y
// once, in chunks u and delta twice. Bound by the special-function units: one exponential a state, two for softplus.
// Instructions of a position with 16 states, a warp: 120.
#include "cuda/launchers.h"
#include "cuda/scan_states.h"

namespace mobilemamba {
namespace {

// Of a position: kStates of B · ln 2, then of C; a row is longer, so that lanes write rows to different banks.
template <int kStates>
constexpr int kRow = kStates == 1 ? 2 : 2 * kStates + 4;

// What the states of a position are multiplied with: four at a time where there are so many.
template <int kStates>
__device__ __forceinline__ void load_row(float (&to)[kStates], const float* from) {
  if constexpr (kStates == 1) {
    to[0] = from[0];
  } else {
#pragma unroll
    for (int n = 0; n < kStates; n += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + n);
      to[n] = four.x, to[n + 1] = four.y, to[n + 2] = four.z, to[n + 3] = four.w;
    }
  }
}

// T: float, or 16 bits, for which the special-function units alone are exact enough.
template <class T, int kStates, Pass kPass, int kDirections>
__global__ void __launch_bounds__(kBlockWarps* kWarp, kStates == 1 ? 4 : 3)
    states_kernel(SelectiveScanCudaParams p, int64_t first_item) {
  constexpr bool kForward = kPass == Pass::kForward, kBoth = kPass == Pass::kFoldBoth, kReadsC = kPass != Pass::kFold;
  const StatesPlace x(p, first_item + blockIdx.x, kForward ? 1 : kDirections);
  const int64_t B_group = x.group / p.B_group, C_group = x.group / p.C_group;
  const int threads = static_cast<int>(blockDim.y) * kWarp, tiles = (x.positions + kTilePositions - 1) / kTilePositions;
  // (positions of the chunk, threads): what the first direction adds to y
  [[maybe_unused]] float* first_y = shared_memory + kTilePositions * kRow<kStates> + threadIdx.y * kWarp + threadIdx.x;

  const auto go_along = [&](auto direction) {
    constexpr int k = decltype(direction)::value;
    constexpr bool kReverse = k == 1, kLast = kForward && k == kDirections - 1;
    const int64_t fold = x.fold(p, k);
    float h[kStates], rate[kStates];
    [[maybe_unused]] float adjoint[kStates], decay[kStates];
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      rate[n] = load(p.A.at(0, k, x.channel, n, 0));
      h[n] = kForward && p.chunk_state ? p.chunk_state[fold + n * p.dim] : 0.0f;
      adjoint[n] = 0.0f, decay[n] = 1.0f;
    }
    const float bias = p.delta_bias ? kLog2E * load(p.delta_bias.at(0, k, x.channel, 0, 0)) : 0.0f;
    const float skip = p.D ? load(p.D.at(0, k, x.channel, 0, 0)) : 0.0f;
    const bool skips = static_cast<bool>(p.D);  // 0 · infinity is NaN
    const auto own = [&](const ScanTensor& t, int64_t of) { return t.at(x.batch, of, x.channel, 0, x.begin); };
    const Elements u = own(p.u, k), delta = own(p.delta, k), z = own(p.z, 0);
    const Elements y_or_dy = own(kForward ? p.out : p.grad_out, 0);
    const int64_t y_step = kForward ? p.out.position : p.grad_out.position;
    const Elements B = p.B.at(x.batch, k, B_group, 0, x.begin), C = p.C.at(x.batch, k, C_group, 0, x.begin);
    const bool gated = (kLast || kBoth) && p.z;

    float steps = 0.0f;  // their sum
    for (int i = 0; i < tiles; ++i) {
      const int tile = (kReverse ? tiles - 1 - i : i) * kTilePositions;
      const int of_tile = x.positions - tile < kTilePositions ? x.positions - tile : kTilePositions;
      __syncthreads();
      read_coefficients<kStates>(p.B, B + tile * p.B.position, of_tile, [](int n, int l, float value) {
        shared_memory[l * kRow<kStates> + n] = value * kLn2;
      });
      if (kReadsC)
        read_coefficients<kStates>(p.C, C + tile * p.C.position, of_tile, [](int n, int l, float value) {
          shared_memory[l * kRow<kStates> + kStates + n] = value;
        });
      __syncthreads();
      const int groups = (of_tile + kAhead - 1) / kAhead;
#pragma unroll 1
      for (int group = 0; group < groups; ++group) {
        const int l = (kReverse ? groups - 1 - group : group) * kAhead, at = tile + l;
        const int count = of_tile - l < kAhead ? of_tile - l : kAhead;
        float v[kAhead], dt[kAhead], gate[kAhead], y[kAhead];
        read_ahead(v, u + at * p.u.position, p.u.position, count);
        read_ahead(dt, delta + at * p.delta.position, p.delta.position, count);
        if (gated) read_ahead(gate, z + at * p.z.position, p.z.position, count);
        if (kBoth) read_ahead(y, y_or_dy + at * y_step, y_step, count);
        if (kReverse ? at != 0 : at + 2 * kAhead <= x.positions) {
          const int next = kReverse ? at - kAhead : at + kAhead;
          prefetch_ahead(u + next * p.u.position, p.u.position);
          prefetch_ahead(delta + next * p.delta.position, p.delta.position);
          if (gated) prefetch_ahead(z + next * p.z.position, p.z.position);
          if (kBoth) prefetch_ahead(y_or_dy + next * y_step, y_step);
        }
        const float* row = shared_memory + l * kRow<kStates>;
        const auto go = [&](auto whole) {
#pragma unroll
          for (int q = 0; q < kAhead; ++q) {
            const int j = kReverse ? kAhead - 1 - q : q;
            if (decltype(whole)::value || j < count) {
              float t = kLog2E * dt[j] + bias, b[kStates], c[kStates];
              if (p.softplus) t = softplus_of_two<T>(t, power_of_two<T>(t));
              const float drive = t * v[j];
              load_row<kStates>(b, row + j * kRow<kStates>);
              if (kReadsC) load_row<kStates>(c, row + j * kRow<kStates> + kStates);
              const float dy = kBoth && gated ? y[j] * quick_silu(gate[j]) : y[j];
              [[maybe_unused]] float sum = skips ? skip * v[j] : 0.0f;
#pragma unroll
              for (int n = 0; n < kStates; ++n) {
                const float a = power_of_two<T>(t * rate[n]);
                h[n] = a * h[n] + drive * b[n];
                if constexpr (kForward) sum += c[n] * h[n];
                if constexpr (kBoth) decay[n] *= a, adjoint[n] += decay[n] * (c[n] * dy);
              }
              steps += t;
              if constexpr (kForward) {
                if constexpr (k != 0) sum += first_y[(at + j) * threads];
                if constexpr (!kLast) first_y[(at + j) * threads] = sum;
                y[j] = gated ? sum * quick_silu(gate[j]) : sum;
              }
            }
          }
        };
        if (count == kAhead)
          go(std::true_type{});
        else
          go(std::false_type{});
        if (kLast && x.inside) write_ahead(y_or_dy + at * y_step, y_step, y, count);
      }
    }
    if (!x.inside) return;
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      if constexpr (kForward) {
        if (p.last_state && x.chunk == p.chunks - 1) store(p.last_state.at(x.batch, 0, x.channel, n, 0), h[n]);
      } else {
        p.chunk_state[fold + n * p.dim] = h[n];
        p.chunk_decay[fold + n * p.dim] = kBoth ? decay[n] : exp2f(steps * rate[n]);
        if (kBoth) p.chunk_adjoint[fold + n * p.dim] = adjoint[n];
      }
    }
  };
  using First = std::integral_constant<int, 0>;
  using Second = std::integral_constant<int, 1>;
  if (kForward || x.k == 0) go_along(First{});
  if constexpr (kDirections == 2)
    if (kForward || x.k == 1) go_along(Second{});
}

// With one state there is little to compute, and what is read an element at a time takes longer.
bool reads_fast(const ScanTensor& t) {
  const int64_t size = element_size(t.elements.dtype);
  return !t || t.channel == 1 ||
         (t.position == 1 && t.channel % kNarrow == 0 && t.batch % kNarrow == 0 &&
          reinterpret_cast<uintptr_t>(t.elements.data) % (kNarrow * size) == 0);
}

template <Pass kPass>
cudaError_t launch_pass(const SelectiveScanCudaParams& p, cudaStream_t stream) {
  constexpr bool kForward = kPass == Pass::kForward;
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Many = std::integral_constant<int, kManyStates>;
  const auto go = [&](auto element, auto states, auto directions) {
    constexpr int kStates = decltype(states)::value, kDirections = decltype(directions)::value;
    const dim3 block(kWarp, static_cast<unsigned>(p.warps));
    const int64_t kept = kForward && kDirections == 2 ? p.segment * p.warps * kWarp : 0;
    return launch(states_kernel<decltype(element), kStates, kPass, kDirections>, p,
                  p.batch * p.groups * p.slices * p.chunks * (kForward ? 1 : kDirections), block,
                  kTilePositions * kRow<kStates> + kept, stream);
  };
  const auto with_states = [&](auto element) {
    if constexpr (kPass == Pass::kFoldBoth) {
      return go(element, Many{}, One{});
    } else {
      if (p.directions == 2) return p.state == 1 ? go(element, One{}, Two{}) : go(element, Many{}, Two{});
      return p.state == 1 ? go(element, One{}, One{}) : go(element, Many{}, One{});
    }
  };
  return p.u.elements.dtype == DType::kFloat32 ? with_states(float{}) : with_states(__half{});
}

}  // namespace

bool plan_selective_scan_states(SelectiveScanCudaParams& p) {
  constexpr int64_t kEnoughWarps = 8, kWantedWarps = 16;  // of a multiprocessor
  constexpr int64_t kLeastPositions = 64;                 // of a chunk, and the most where a block has two directions
  if (p.projected || !p.B_varies || !p.C_varies) return false;
  if (p.backward ? p.state != kManyStates || p.directions != 1 : p.state != 1 && p.state != kManyStates) return false;
  if (p.state == 1 && !(reads_fast(p.u) && reads_fast(p.delta) && reads_fast(p.z) && reads_fast(p.out))) return false;
  const int64_t per_group = p.dim / p.groups, processors = multiprocessors();
  p.by_states = true;
  p.slices = ceil_div(per_group, kBlockWarps * kWarp);
  p.warps = ceil_div(ceil_div(per_group, p.slices), kWarp);
  p.segment = kTilePositions, p.range = 1;
  if (p.directions == 2) {
    p.segment = kLeastPositions;
  } else if (!p.backward) {
    const int64_t warps = p.batch * p.groups * ceil_div(per_group, kWarp);
    const int64_t wanted = warps < kEnoughWarps * processors ? ceil_div(kWantedWarps * processors, warps) : 1;
    const int64_t chunks = between(wanted, 1, ceil_div(p.length, kLeastPositions));
    p.segment = ceil_div(ceil_div(p.length, chunks), kTilePositions) * kTilePositions;
  }
  p.chunks = ceil_div(p.length, p.segment);
  return true;
}

cudaError_t selective_scan_states(const SelectiveScanCudaParams& p, cudaStream_t stream) {
  if (p.chunks > 1) {
    const cudaError_t error =
        p.backward ? launch_pass<Pass::kFoldBoth>(p, stream) : launch_pass<Pass::kFold>(p, stream);
    if (error != cudaSuccess) return error;
    const cudaError_t joined = join_selective_scan_chunks(p, stream);
    if (joined != cudaSuccess) return joined;
  }
  return p.backward ? selective_scan_states_bwd(p, stream) : launch_pass<Pass::kForward>(p, stream);
}

}  // namespace mobilemamba
