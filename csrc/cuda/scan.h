// The selective scan within a block: lanes are channels, a warp has a segment of consecutive positions in registers.
//
// A segment is folded to (decay, state): what it multiplies an entering state by, and what it makes of none. Folds meet
// in shared memory, one barrier a state; then every warp knows the state that enters its segment and goes through its
// registers again. So each element is read from memory once, with as many loads in flight as there are positions, and
// the chain of dependent operations is a segment and as many steps as there are warps.
#pragma once

#include "cuda/device.h"
#include "include/selective_scan_cuda.h"

namespace mobilemamba {

constexpr int kMostWarps = 16;  // of a block: 512 threads may have 128 registers each

// Which channels a block has. It lies in shared memory and is read where it is used: registers are for segments.
struct BlockPlace {
  int64_t channel;               // the first
  uint32_t batch, group, block;  // a block of the group's channels
  int channels;                  // at most kWarp
};
constexpr int kPlaceFloats = 8;  // at the beginning of shared memory
static_assert(sizeof(BlockPlace) <= kPlaceFloats * sizeof(float));

// Which positions a thread has, of the channel of its lane.
struct ScanPlace {
  int lane, warp;
  int count;         // positions of the segment, 0 behind the end
  int64_t position;  // the first of the segment

  __device__ static const volatile BlockPlace& of_block() {
    return *reinterpret_cast<const volatile BlockPlace*>(shared_memory);
  }
  __device__ uint32_t batch() const { return of_block().batch; }
  __device__ uint32_t group() const { return of_block().group; }
  __device__ uint32_t block() const { return of_block().block; }
  __device__ int64_t channel() const { return of_block().channel; }
  __device__ int channels() const { return of_block().channels; }
  __device__ int warps() const { return blockDim.y; }
  __device__ bool inside() const { return lane < channels(); }
};

// Gives a block its place: `item` counts batch, group, block of channels.
__device__ inline ScanPlace scan_place(const SelectiveScanCudaParams& p, int64_t item) {
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    const int64_t per_group = p.dim / p.groups;
    BlockPlace& place = *reinterpret_cast<BlockPlace*>(shared_memory);
    const int64_t block = item % p.slices, group = item / p.slices % p.groups, rest = per_group - block * kWarp;
    place.batch = item / p.slices / p.groups, place.group = group, place.block = block;
    place.channel = group * per_group + block * kWarp;
    place.channels = rest < kWarp ? static_cast<int>(rest) : kWarp;
  }
  __syncthreads();
  return {static_cast<int>(threadIdx.x), static_cast<int>(threadIdx.y), 0, 0};
}

// Has addresses computed where they are used: of all tensors at once they would take the registers of the segments.
__device__ __forceinline__ void forget(ScanPlace& x) { hide(x.lane); }

template <int kSegment>
__device__ __forceinline__ void move_to_chunk(ScanPlace& x, const SelectiveScanCudaParams& p, int64_t chunk) {
  forget(x);
  x.position = (chunk * x.warps() + x.warp) * kSegment;
  const int64_t rest = p.length - x.position;
  x.count = rest < 0 ? 0 : rest < kSegment ? static_cast<int>(rest) : kSegment;
}

// Floats of a warp's tile, through which segments are transposed, and of its two rows behind it.
template <int kSegment>
constexpr int kTile = kWarp * (kSegment + 1);
template <int kSegment>
constexpr int kPrivate = kTile<kSegment> + 2 * kSegment;

// Positions lie side by side in memory and channels do not: a warp then reads its rows of positions and transposes.
__device__ __forceinline__ bool transposes(const ScanTensor& t) { return t.position == 1 && t.channel != 1; }

template <int kSegment>
__device__ __forceinline__ void read_segment(float (&v)[kSegment], const ScanTensor& t, const ScanPlace& x, int k,
                                             float* tile) {
  constexpr int kRows = kWarp / kSegment;  // that a warp reads at once
  const bool transposed = transposes(t);
  visit(t.at(x.batch(), k, x.channel(), 0, x.position), [&](const auto* p) {
    if (transposed) {
      const int row = x.lane / kSegment, column = x.lane % kSegment;
      p += row * t.channel + column;
#pragma unroll
      for (int i = 0; i < kSegment; ++i, p += kRows * t.channel)
        tile[(row + i * kRows) * (kSegment + 1) + column] =
            row + i * kRows < x.channels() && column < x.count ? to_float(*p) : 0.0f;
      __syncwarp();
#pragma unroll
      for (int l = 0; l < kSegment; ++l) v[l] = tile[x.lane * (kSegment + 1) + l];
      __syncwarp();
    } else {
      p += x.lane * t.channel;
#pragma unroll
      for (int l = 0; l < kSegment; ++l, p += t.position) v[l] = x.inside() && l < x.count ? to_float(*p) : 0.0f;
    }
  });
}

template <int kSegment>
__device__ __forceinline__ void write_segment(const float (&v)[kSegment], const ScanTensor& t, const ScanPlace& x,
                                              int k, float* tile) {
  constexpr int kRows = kWarp / kSegment;
  const bool transposed = transposes(t);
  if (transposed) {
#pragma unroll
    for (int l = 0; l < kSegment; ++l) tile[x.lane * (kSegment + 1) + l] = v[l];
    __syncwarp();
  }
  visit(t.at(x.batch(), k, x.channel(), 0, x.position), [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    if (transposed) {
      const int row = x.lane / kSegment, column = x.lane % kSegment;
      p += row * t.channel + column;
#pragma unroll
      for (int i = 0; i < kSegment; ++i, p += kRows * t.channel)
        if (row + i * kRows < x.channels() && column < x.count)
          *p = from_float<T>(tile[(row + i * kRows) * (kSegment + 1) + column]);
    } else {
      p += x.lane * t.channel;
#pragma unroll
      for (int l = 0; l < kSegment; ++l, p += t.position)
        if (x.inside() && l < x.count) *p = from_float<T>(v[l]);
    }
  });
  if (transposed) __syncwarp();
}

// A parameter of this lane's channel.
__device__ __forceinline__ float read_channel(const ScanTensor& t, const ScanPlace& x, int k, int64_t n) {
  return t && x.inside() ? load(t.at(0, k, x.channel() + x.lane, n, 0)) : 0.0f;
}

// B or C of one state over a segment: a row in shared memory that all lanes read, or a value a lane that does not vary.
struct Coefficient {
  const float* row;
  float fixed;
  __device__ __forceinline__ float operator[](int l) const { return row ? row[l] : fixed; }
};

// Reads B and C of state n, one element a lane, into the warp's `rows`, (2, kSegment).
template <int kSegment>
__device__ __forceinline__ void read_coefficients(Coefficient& B, Coefficient& C, float* rows,
                                                  const SelectiveScanCudaParams& p, const ScanPlace& x, int k,
                                                  int64_t n) {
  __syncwarp();  // the lanes may still read the last state's
  const int l = x.lane % kSegment;
  const bool is_C = x.lane >= kSegment;
  if (x.lane < 2 * kSegment && (is_C ? p.C_varies : p.B_varies)) {
    const ScanTensor& t = is_C ? p.C : p.B;
    rows[x.lane] =
        l < x.count ? load(t.at(x.batch(), k, x.group() / (is_C ? p.C_group : p.B_group), n, x.position + l)) : 0.0f;
  }
  __syncwarp();
  B = p.B_varies ? Coefficient{rows, 0.0f} : Coefficient{nullptr, read_channel(p.B, x, 0, n)};
  C = p.C_varies ? Coefficient{rows + kSegment, 0.0f} : Coefficient{nullptr, read_channel(p.C, x, 0, n)};
}

// Step sizes after bias and softplus, 0 behind the end.
template <bool kProjected, int kSegment>
__device__ __forceinline__ void read_steps(float (&dt)[kSegment], const SelectiveScanCudaParams& p, const ScanPlace& x,
                                           int k, float* tile, float* rows) {
  if constexpr (kProjected) {
#pragma unroll
    for (int l = 0; l < kSegment; ++l) dt[l] = 0.0f;
#pragma unroll 1
    for (int64_t r = 0; r < p.rank; r += 2) {
      __syncwarp();
      const int64_t mine = r + x.lane / kSegment;
      const int l = x.lane % kSegment;
      if (x.lane < 2 * kSegment)
        rows[x.lane] = l < x.count && mine < p.rank ? load(p.dt_low.at(x.batch(), k, 0, mine, x.position + l)) : 0.0f;
      __syncwarp();
      const float w0 = read_channel(p.dt_proj, x, k, r);
      const float w1 = r + 1 < p.rank ? read_channel(p.dt_proj, x, k, r + 1) : 0.0f;
#pragma unroll
      for (int l = 0; l < kSegment; ++l) dt[l] += w0 * rows[l] + w1 * rows[kSegment + l];
    }
  } else {
    read_segment(dt, p.delta, x, k, tile);
  }
  const float bias = read_channel(p.delta_bias, x, k, 0);
#pragma unroll
  for (int l = 0; l < kSegment; ++l) {
    dt[l] += bias;
    if (p.softplus) dt[l] = softplus(dt[l]);
    if (l >= x.count) dt[l] = 0.0f;
  }
}

// The gradient of y before its gate.
template <int kSegment>
__device__ __forceinline__ void read_output_gradient(float (&dy)[kSegment], const SelectiveScanCudaParams& p,
                                                     const ScanPlace& x, float* tile) {
  read_segment(dy, p.grad_out, x, 0, tile);
  if (p.z) {
    float z[kSegment];
    read_segment(z, p.z, x, 0, tile);
#pragma unroll
    for (int l = 0; l < kSegment; ++l) dy[l] *= silu(z[l]);
  }
}

// A log2 e.
template <bool kProjected>
__device__ __forceinline__ float read_decay_rate(const SelectiveScanCudaParams& p, const ScanPlace& x, int k,
                                                 int64_t n) {
  const float A = read_channel(p.A, x, k, n);
  return kLog2E * (kProjected ? -expf(A) : A);
}

// decay · entering + own of a product of decays, which may be infinite or 0 where none of them is: exactly `own` for an
// entering zero, and an entering infinity stays one.
__device__ __forceinline__ float through(float decay, float entering, float own) {
  constexpr float kLeast = 1.17549435e-38f;
  return entering == 0.0f ? own : fmaxf(decay, kLeast) * entering + own;
}

// The folds of a block's segments, in shared memory: `values` numbers a warp. Two sets take turns, so that one barrier
// a fold is enough.
struct Folds {
  float* memory;  // (2, values, warps, kWarp)
  int values;
  int parity;

  __device__ float& at(const ScanPlace& x, int value, int warp) {
    return memory[((parity * values + value) * x.warps() + warp) * kWarp + x.lane];
  }

  // What enters this warp's segment, given what enters the chunk: `value` is folded over the warps before it (behind it
  // if kReverse). `leaving` becomes what leaves the chunk.
  template <bool kReverse>
  __device__ float enter(const ScanPlace& x, int value, float entering, float& leaving) {
    float mine = 0.0f;
#pragma unroll 1
    for (int i = 0; i < x.warps(); ++i) {
      const int w = kReverse ? x.warps() - 1 - i : i;
      if (w == x.warp) mine = entering;
      entering = through(at(x, 0, w), entering, at(x, value, w));
    }
    leaving = entering;
    return mine;
  }
};

// Calls f(l) for the positions of a segment, in the order of the direction; l is a constant in each call.
template <bool kReverse, int kSegment, class F>
__device__ __forceinline__ void each_position(int count, F f) {
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int l = kReverse ? kSegment - 1 - i : i;
    if (l < count) f(l);
  }
}

// Carries of a block's chunks, a state and lane each: in a register for one state, else in shared memory.
template <bool kOneState>
struct Carries {
  float one;
  float* memory;  // (state, kWarp)

  __device__ float get(const ScanPlace& x, int64_t n) const { return kOneState ? one : memory[n * kWarp + x.lane]; }
  __device__ void set(const ScanPlace& x, int64_t n, float value) {
    if constexpr (kOneState)
      one = value;
    else if (x.warp == 0)
      memory[n * kWarp + x.lane] = value;
  }
};

__device__ __forceinline__ int64_t chunk_index(const SelectiveScanCudaParams& p, const ScanPlace& x, int k,
                                               int64_t chunk, int64_t n) {
  return (((x.batch() * p.directions + k) * p.chunks + chunk) * p.state + n) * p.dim + x.channel() + x.lane;
}

// Starts a direction: what enters its first chunk here. The barrier is for those who read another warp's memory.
template <bool kOneState>
__device__ __forceinline__ void start_carries(Carries<kOneState>& carries, const float* entering,
                                              const SelectiveScanCudaParams& p, const ScanPlace& x, int k,
                                              int64_t chunk) {
  __syncthreads();
#pragma unroll 1
  for (int64_t n = 0; n < p.state; ++n)
    carries.set(x, n, entering && x.inside() ? entering[chunk_index(p, x, k, chunk, n)] : 0.0f);
  __syncthreads();
}

// y += D u + Σ_n C h of one direction over one chunk. Uses up u and dt: what is in registers twice does not fit.
template <bool kOneState, bool kProjected, int k, int kSegment>
__device__ __forceinline__ void add_outputs(float (&y)[kSegment], float (&u)[kSegment], float (&dt)[kSegment],
                                            const SelectiveScanCudaParams& p, ScanPlace& x, float* rows, Folds& folds,
                                            Carries<kOneState>& carries) {
  constexpr bool kReverse = k == 1;
  float decays[kSegment];
  float (&a)[kSegment] = kOneState ? dt : decays;
  const float skip = read_channel(p.D, x, k, 0);
#pragma unroll
  for (int l = 0; l < kSegment; ++l) {
    if (p.D) y[l] += skip * u[l];
    u[l] *= dt[l];
  }
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
    const float entering = carries.get(x, n);
    __syncthreads();
    float leaving, h = folds.template enter<kReverse>(x, 1, entering, leaving);
    folds.parity ^= 1;
    carries.set(x, n, leaving);
    each_position<kReverse, kSegment>(x.count, [&](int l) {
      h = a[l] * h + u[l] * B[l];
      y[l] += C[l] * h;
    });
  }
}

}  // namespace mobilemamba
