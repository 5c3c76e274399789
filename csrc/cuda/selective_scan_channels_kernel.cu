// The forward of a selective scan with one state whose channels are dense: a thread has two channels of one direction
// and goes through the whole sequence, its state in registers.
//
// A block has 64 channels of a group, a warp for each direction. B, C and, projected, the rows of Δ lie in shared
// memory, where all lanes read the same; what is read a channel comes in pairs, kAhead positions before it is used. Two
// directions meet in the middle: until then each leaves what it adds to y, from there on it finds the other's, adds it
// and writes the result. It leaves it in shared memory; of long sequences, which would leave room for few blocks a
// multiprocessor, in y itself where that is float32, and without the last bits where it is bfloat16 (what D adds, which
// may be large and cancel, comes last then). Bytes: u once and once more from the L2 cache, delta and z once, y once,
// or three times where it holds what was left. Bound by the special-function units: three operations an element and
// direction.
#include "cuda/launchers.h"
#include "cuda/scan_channels.h"

namespace mobilemamba {
namespace {

enum class Leaves { kFloats, kShortFloats, kInOut };  // what a direction leaves, and where

// Of long sequences.
template <class TOut>
constexpr Leaves kLongLeaves = std::is_same_v<TOut, float>           ? Leaves::kInOut
                               : std::is_same_v<TOut, __nv_bfloat16> ? Leaves::kShortFloats
                                                                     : Leaves::kFloats;

// Blocks that registers leave room for on a multiprocessor, as far as nothing spills.
template <class T, int kRank, Leaves kLeaves>
constexpr int kBlocks = kRank == 0 || sizeof(T) != 2 || (kRank > 12 && kLeaves == Leaves::kInOut) ? 1 : 6;

// T: of u, delta and z. kRank: 0, or what Δ's rank is filled up to with zeros.
template <class T, class TOut, int kRank, int kDirections, bool kSoftplus, Leaves kLeaves>
__global__ void __launch_bounds__(kDirections* kWarp, kBlocks<T, kRank, kLeaves>)
    channels_kernel(SelectiveScanCudaParams p, int64_t first_item) {
  constexpr int kThreads = kDirections * kWarp;
  constexpr bool kLeavesInOut = kLeaves == Leaves::kInOut;
  const int64_t item = first_item + blockIdx.x, per_group = p.dim / p.groups;
  const int64_t slice = item % p.slices, group = item / p.slices % p.groups, batch = item / p.slices / p.groups;
  const int lane = threadIdx.x, k = kDirections == 2 ? threadIdx.y : 0, thread = k * kWarp + lane;
  const int length = static_cast<int>(p.length);
  const int64_t first = slice * kChannels + 2 * lane;
  const bool inside = first < per_group;  // the lanes outside compute the last pair too
  const int64_t channel = group * per_group + (inside ? first : per_group - 2);

  // In shared memory, positions in the order of the direction.
  float2* coefficients = reinterpret_cast<float2*>(shared_memory);  // (directions, length) of B ln 2 and C
  float* low = shared_memory + kDirections * 2 * length;            // (directions, length, kRank)
  const LeftSums<std::conditional_t<kLeaves == Leaves::kShortFloats, TOut, float>> left(
      low + kDirections * kRank * length, length, lane);
  const int middle = kDirections == 2 ? (k ? length / 2 : length - length / 2) : 0;
  read_all_coefficients<kDirections>(coefficients, p, batch, group, kLn2);
#pragma unroll
  for (int d = 0; d < kDirections; ++d) {
    if constexpr (kRank != 0) {
      constexpr int kLanes = kRank <= 16 ? 16 : 32;  // that have a row together
      const int r = thread % kLanes;
      const auto* rows = static_cast<const float*>(p.dt_low.at(batch, d, 0, r, 0).data);
      for (int i = thread / kLanes; i < length && r < kRank; i += kThreads / kLanes) {
        float* to = low + (d * length + i) * kRank + r;
        if (r < p.rank)
          start_copy(to, rows + (d ? length - 1 - i : i) * p.dt_low.position);
        else
          *to = 0.0f;
      }
    }
  }
  float2 weights[kRank ? kRank : 1];
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    weights[r] = {0.0f, 0.0f};
    if (r < p.rank) weights[r] = read_pair(p.dt_proj, k, channel, r);
    weights[r].x *= kLog2E, weights[r].y *= kLog2E;
  }
  float2 A = read_pair(p.A, k, channel), bias = read_pair(p.delta_bias, k, channel);
  const float2 skip = read_pair(p.D, k, channel);
  const bool skips = static_cast<bool>(p.D);  // 0 · infinity is NaN
  [[maybe_unused]] const bool skips_last = kLeaves == Leaves::kShortFloats && p.u.direction == 0;
  [[maybe_unused]] float2 other_skip;
  if constexpr (kLeaves == Leaves::kShortFloats) other_skip = read_pair(p.D, 1 - k, channel);
  if (kRank != 0) A = {-expf(A.x), -expf(A.y)};
  bias = {kLog2E * bias.x, kLog2E * bias.y};
  wait_for_copies();
  __syncthreads();

  Walk<T> u(p.u, batch, k, channel, length, k), delta(p.delta, batch, k, channel, length, k);
  Walk<T> z(p.z, batch, 0, channel, length, k);
  Walk<TOut> out(p.out, batch, 0, channel, length, k);
  const float2* coefficient = coefficients + k * length;
  const float* row = low + k * length * kRank;
  int leave = k ? length - length / 2 : 0, find = k ? length - middle - 1 : length - 1;

  TwoChannels<T> next_u[kAhead], next_delta[kAhead], next_z[kAhead];
  const auto read_ahead = [&](int count, bool gated) {
    each(count, [&](int j) {
      next_u[j] = u[j];
      if (kRank == 0) next_delta[j] = delta[j];
    });
    if (gated) each(count, [&](int j) { next_z[j] = z[j]; });
    u.advance(count), delta.advance(count), z.advance(count);
  };
  float2 h{0.0f, 0.0f};
  // `count` positions, all of them kAhead if kWhole; kLast: y is complete with them.
  const auto go = [&](auto whole, auto last, int count, int count_ahead, bool gated_ahead) {
    constexpr bool kWhole = decltype(whole)::value, kLast = decltype(last)::value;
    float2 x[kAhead], dt[kAhead], gate[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      x[j] = next_u[j].floats();
      if (kRank == 0) dt[j] = next_delta[j].floats();
      if (kLast) gate[j] = next_z[j].floats();
    }
    read_ahead(count_ahead, gated_ahead);
    [[maybe_unused]] TwoChannels<TOut> found[kAhead];
    if constexpr (kDirections == 2 && kLast && kLeavesInOut) each(count, [&](int j) { found[j] = out[j]; });
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (kWhole || j < count) {
        float2 t;
        if constexpr (kRank != 0) {
          t = bias;
#pragma unroll
          for (int r = 0; r < kRank; r += 4) {
            const float4 v = *reinterpret_cast<const float4*>(row + j * kRank + r);
            const float values[] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int q = 0; q < 4; ++q) t.x += weights[r + q].x * values[q], t.y += weights[r + q].y * values[q];
          }
        } else {
          t = {kLog2E * dt[j].x + bias.x, kLog2E * dt[j].y + bias.y};
        }
        if (kSoftplus)
          t = {softplus_of_two<T>(t.x, power_of_two<T>(t.x)), softplus_of_two<T>(t.y, power_of_two<T>(t.y))};
        const float2 bc = coefficient[j];
        h.x = power_of_two<T>(t.x * A.x) * h.x + t.x * x[j].x * bc.x;
        h.y = power_of_two<T>(t.y * A.y) * h.y + t.y * x[j].y * bc.x;
        float2 y{bc.y * h.x, bc.y * h.y};
        if constexpr (kLeaves == Leaves::kShortFloats) {
          if (skips && (kLast || !skips_last)) y.x += skip.x * x[j].x, y.y += skip.y * x[j].y;
          if (kLast && skips && skips_last) y.x += other_skip.x * x[j].x, y.y += other_skip.y * x[j].y;
        } else if (skips) {
          y.x += skip.x * x[j].x, y.y += skip.y * x[j].y;
        }
        x[j] = y;
        if constexpr (kDirections == 2 && kLast) {
          const float2 other = kLeavesInOut ? found[j].floats() : left.get(find - j);
          x[j].x += other.x, x[j].y += other.y;
        } else if constexpr (!kLast && !kLeavesInOut) {
          left.put(leave + j, x[j]);
        }
      }
    if constexpr (kLast) {
      if (p.z) {
#pragma unroll
        for (int j = 0; j < kAhead; ++j) x[j].x *= silu(gate[j].x), x[j].y *= silu(gate[j].y);
      }
    }
    if ((kLast || kLeavesInOut) && inside) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (kWhole || j < count) out[j] = TwoChannels<TOut>::of(x[j]);
    }
    out.advance(count), coefficient += count, row += count * kRank, leave += count;
    if constexpr (kLast) find -= count;
  };
  const auto count_at = [&](int i) {
    const int rest = (i < middle ? middle : length) - i;
    return rest < kAhead ? rest : kAhead;
  };
  read_ahead(count_at(0), p.z && middle == 0);
  for (int i = 0, count = count_at(0); count > 0;) {
    if (kDirections == 2 && i == middle) __syncthreads();
    const int count_ahead = count_at(i + count);
    const bool gated_ahead = p.z && i + count >= middle;
    const auto of_part = [&](auto last) {
      if (count == kAhead)
        go(std::true_type{}, last, count, count_ahead, gated_ahead);
      else
        go(std::false_type{}, last, count, count_ahead, gated_ahead);
    };
    if (kDirections == 2 && i < middle)
      of_part(std::false_type{});
    else
      of_part(std::true_type{});
    i += count, count = count_ahead;
  }
  if (kDirections == 2 && middle == length) __syncthreads();
  if (p.last_state && k == 0 && inside) {
    store(p.last_state.at(batch, 0, channel, 0, 0), h.x);
    store(p.last_state.at(batch, 0, channel + 1, 0, 0), h.y);
  }
}

// What rank is filled up to, 0 where it is too large.
int rank_of(const SelectiveScanCudaParams& p) { return p.rank <= 12 ? 12 : p.rank <= 20 ? 20 : 0; }

int64_t floats_of(const SelectiveScanCudaParams& p, Leaves leaves) {
  const int64_t low = p.projected ? rank_of(p) : 0;
  const int64_t waiting = p.directions == 1 || leaves == Leaves::kInOut ? 0
                          : leaves == Leaves::kFloats                   ? left_floats(DType::kFloat32)
                                                                        : left_floats(DType::kBFloat16);
  return (p.directions * (2 + low) + waiting) * p.length;
}

Leaves leaves_of(const SelectiveScanCudaParams& p) {
  constexpr int64_t kFewFloats = 8 << 10;  // of which a large multiprocessor has room for six blocks
  if (p.directions == 1 || (p.softplus && floats_of(p, Leaves::kFloats) <= kFewFloats)) return Leaves::kFloats;
  return with_element(p.out.elements.dtype, [](auto element) { return kLongLeaves<decltype(element)>; });
}

bool fits_forward(const SelectiveScanCudaParams& p) {
  const DType dtype = p.u.elements.dtype;
  const bool projects = p.directions == 2 && rank_of(p) != 0 && p.dt_low.elements.dtype == DType::kFloat32;
  return floats_of(p, leaves_of(p)) <= most_floats() && (!p.projected || projects) &&
         (!p.z || reads_pairs(p.z, dtype)) && reads_pairs(p.out, p.projected ? DType::kFloat32 : dtype);
}

template <class T, class TOut, int kRank, int kDirections, bool kSoftplus>
cudaError_t launch_kernel(const SelectiveScanCudaParams& p, cudaStream_t stream) {
  constexpr Leaves kLong = kLongLeaves<TOut>;
  const Leaves leaves = leaves_of(p);
  const auto go = [&](auto kernel) {
    const dim3 block(kWarp, kDirections);
    return launch(kernel, p, p.batch * p.groups * p.slices, block, floats_of(p, leaves), stream);
  };
  if constexpr (kDirections == 2)
    if (leaves == kLong) return go(channels_kernel<T, TOut, kRank, 2, kSoftplus, kLong>);
  if constexpr (kDirections == 1 || kSoftplus || kLong == Leaves::kFloats)
    return go(channels_kernel<T, TOut, kRank, kDirections, kSoftplus, Leaves::kFloats>);
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t launch_type(const SelectiveScanCudaParams& p, cudaStream_t stream) {
  if (p.projected)
    return rank_of(p) == 12 ? launch_kernel<T, float, 12, 2, true>(p, stream)
                            : launch_kernel<T, float, 20, 2, true>(p, stream);
  if (p.directions == 2)
    return p.softplus ? launch_kernel<T, T, 0, 2, true>(p, stream) : launch_kernel<T, T, 0, 2, false>(p, stream);
  return p.softplus ? launch_kernel<T, T, 0, 1, true>(p, stream) : launch_kernel<T, T, 0, 1, false>(p, stream);
}

}  // namespace

bool plan_selective_scan_channels(SelectiveScanCudaParams& p) {
  const DType dtype = p.u.elements.dtype;
  if (p.state != 1 || !p.B_varies || !p.C_varies || p.dim / p.groups % 2 != 0 || p.length > kLongest) return false;
  if (!reads_pairs(p.u, dtype) || (!p.projected && !reads_pairs(p.delta, dtype))) return false;
  if (p.backward ? !fits_selective_scan_channels_bwd(p) : !fits_forward(p)) return false;
  const int64_t slices = ceil_div(p.dim / p.groups, kChannels), blocks = p.batch * p.groups * slices;
  if (p.length > 256 && blocks < 2 * multiprocessors()) return false;
  p.slices = slices, p.chunks = p.range = 1, p.warps = p.directions;
  return true;
}

cudaError_t selective_scan_channels(const SelectiveScanCudaParams& p, cudaStream_t stream) {
  return with_element(p.u.elements.dtype, [&](auto element) { return launch_type<decltype(element)>(p, stream); });
}

}  // namespace mobilemamba
