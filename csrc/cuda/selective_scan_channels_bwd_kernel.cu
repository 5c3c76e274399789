// The gradient of a selective scan with one state whose channels are dense; formulas in selective_scan_bwd_kernel.cu.
//
// A block has 64 channels of a group, a warp for each direction, a lane two channels. It goes through the sequence in
// its direction first and keeps the state before every kAhead positions in shared memory; then backwards, from one of
// these states to the next: the states between them again, in registers, and from the last to the first the adjoint.
// What B and C get is summed over the lanes for kAhead positions at once, each lane ending with one of the sums. u of
// two directions gets its gradient as the forward's result: from the middle on each finds in shared memory what the
// other left. Bytes: u, delta and the gradient of y twice, partly from the L2 cache, the gradients of u and delta once.
// Bound by the special-function units: seven operations an element and direction.
#include "cuda/launchers.h"
#include "cuda/scan_channels.h"

namespace mobilemamba {
namespace {

// Δ and the decay from the raw step times log2 e; `slope` is d softplus / d raw.
template <class T, bool kSoftplus>
__device__ __forceinline__ void step_of(float raw, float rate, float& dt, float& decay, float& slope) {
  float t = raw;
  slope = 1.0f;
  if (kSoftplus) {
    const float power = power_of_two<T>(raw);
    t = softplus_of_two<T>(raw, power);
    slope = slope_of_two<T>(raw, power);
  }
  decay = power_of_two<T>(t * rate);
  dt = t * kLn2;
}

// One u for both directions. Of two that are one in memory the gradients are not.
ANYWHERE bool shares_u(const SelectiveScanCudaParams& p) { return p.directions == 2 && p.grad_u.direction == 0; }

template <class T, int kDirections, bool kSoftplus>
__global__ void __launch_bounds__(kDirections* kWarp)
    channels_backward_kernel(SelectiveScanCudaParams p, int64_t first_item) {
  const int64_t item = first_item + blockIdx.x, per_group = p.dim / p.groups;
  const int64_t slice = item % p.slices, group = item / p.slices % p.groups, batch = item / p.slices / p.groups;
  const int lane = threadIdx.x, k = kDirections == 2 ? threadIdx.y : 0, length = static_cast<int>(p.length);
  const int64_t first = slice * kChannels + 2 * lane;
  const bool inside = first < per_group;  // the lanes outside compute the last pair too
  const int64_t channel = group * per_group + (inside ? first : per_group - 2);

  const bool shared_u = shares_u(p);
  // Positions below `middle`, in the order of the direction, are those whose gradient of u this warp writes.
  const int half = length - length / 2;
  const int middle = !shared_u ? length : k ? length - half : half;
  const int low_groups = (middle + kAhead - 1) / kAhead;
  const int groups = low_groups + (length - middle + kAhead - 1) / kAhead;
  const auto begin_of = [&](int q) { return q < low_groups ? q * kAhead : middle + (q - low_groups) * kAhead; };
  const auto count_of = [&](int q) {
    const int rest = (q < low_groups ? middle : length) - begin_of(q);
    return rest < kAhead ? rest : kAhead;
  };
  // In shared memory.
  const int most_groups = (length + kAhead - 1) / kAhead + 1;
  float2* coefficients = reinterpret_cast<float2*>(shared_memory);  // (directions, length) of B and C
  float2* states = coefficients + kDirections * length + k * most_groups * kWarp + lane;  // (directions, groups, lanes)
  const LeftSums<T> left(reinterpret_cast<float*>(coefficients + kDirections * (length + most_groups * kWarp)), length,
                         lane);
  read_all_coefficients<kDirections>(coefficients, p, batch, group, 1.0f);
  const float2* coefficient = coefficients + k * length;
  const float2 A = read_pair(p.A, k, channel), skip = read_pair(p.D, k, channel);
  float2 bias = read_pair(p.delta_bias, k, channel);
  bias = {kLog2E * bias.x, kLog2E * bias.y};
  __syncthreads();

  const auto walk = [&](const ScanTensor& t, int64_t direction) {
    return Walk<T>(t, batch, direction, channel, length, k);
  };
  const Walk<T> u = walk(p.u, k), delta = walk(p.delta, k), dy = walk(p.grad_out, 0);
  const Walk<T> du = walk(p.grad_u, k), ddelta = walk(p.grad_delta, k);
  constexpr bool kReadsAhead = sizeof(T) == 2;  // on the way back, where float32 has no registers left for it
  TwoChannels<T> next_u[kAhead], next_delta[kAhead], next_dy[kAhead];
  const auto read_ahead = [&](int q, bool backward) {
    const int begin = begin_of(q), count = count_of(q);
    Walk<T> at_u = u, at_delta = delta, at_dy = dy;
    at_u.advance(begin), at_delta.advance(begin), at_dy.advance(begin);
    each(count, [&](int j) { next_u[j] = at_u[j], next_delta[j] = at_delta[j]; });
    if (backward) each(count, [&](int j) { next_dy[j] = at_dy[j]; });
  };

  float2 h{0.0f, 0.0f};
  read_ahead(0, false);
  for (int q = 0; q < groups; ++q) {
    float2 x[kAhead], raw[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) x[j] = next_u[j].floats(), raw[j] = next_delta[j].floats();
    const int begin = begin_of(q), count = count_of(q);
    const bool turns = q == groups - 1;
    read_ahead(turns ? q : q + 1, turns);
    states[q * kWarp] = h;
    if (turns) break;
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (j < count) {
        const float B = coefficient[begin + j].x;
        float2 dt, decay, slope;
        step_of<T, kSoftplus>(kLog2E * raw[j].x + bias.x, A.x, dt.x, decay.x, slope.x);
        step_of<T, kSoftplus>(kLog2E * raw[j].y + bias.y, A.y, dt.y, decay.y, slope.y);
        h.x = decay.x * h.x + dt.x * x[j].x * B;
        h.y = decay.y * h.y + dt.y * x[j].y * B;
      }
  }

  float2 g{0.0f, 0.0f}, dA{0.0f, 0.0f}, dskip{0.0f, 0.0f}, dbias{0.0f, 0.0f};
  if (k == 0 && p.grad_last_state && inside)
    g = {load(p.grad_last_state.at(batch, 0, channel, 0, 0)), load(p.grad_last_state.at(batch, 0, channel + 1, 0, 0))};
  const int64_t row = (((batch * kDirections + k) * p.groups + group) * p.slices + slice) * length;
  const auto go = [&](auto whole, int q, int count) {
    constexpr bool kWhole = decltype(whole)::value;
    float2 x[kAhead], dt[kAhead], decay[kAhead], slope[kAhead], grad[kAhead], before[kAhead];
    const int begin = begin_of(q);
    float2 state = states[q * kWarp];
    if (!kReadsAhead) read_ahead(q, true);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      x[j] = next_u[j].floats(), dt[j] = next_delta[j].floats(), grad[j] = next_dy[j].floats();
      if (!kWhole && j >= count) grad[j] = {0.0f, 0.0f};
    }
    if (kReadsAhead && q > 0) read_ahead(q - 1, true);
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (kWhole || j < count) {
        const float B = coefficient[begin + j].x;
        step_of<T, kSoftplus>(kLog2E * dt[j].x + bias.x, A.x, dt[j].x, decay[j].x, slope[j].x);
        step_of<T, kSoftplus>(kLog2E * dt[j].y + bias.y, A.y, dt[j].y, decay[j].y, slope[j].y);
        before[j] = {decay[j].x * state.x, decay[j].y * state.y};
        state = {before[j].x + dt[j].x * x[j].x * B, before[j].y + dt[j].y * x[j].y * B};
      }
    float sums[2 * kAhead];
#pragma unroll
    for (int j = kAhead - 1; j >= 0; --j) {
      sums[j] = sums[kAhead + j] = 0.0f;
      if (kWhole || j < count) {
        const float2 bc = coefficient[begin + j];
        const auto of_channel = [&](float u, float dt, float decay, float slope, float& dy, float before, float A,
                                    float skip, float& g, float& dA, float& dskip, float& dbias) {
          g += bc.y * dy;
          const float drive = dt * u, gh = g * before, gb = g * bc.x;
          sums[j] += g * drive;
          sums[kAhead + j] += dy * (before + drive * bc.x);
          dA += gh * dt, dskip += dy * u;
          const float draw = (gh * A + gb * u) * slope;
          dbias += draw;
          dy = p.D ? gb * dt + skip * dy : gb * dt;  // 0 · infinity is NaN
          g *= decay;
          return draw;
        };
        float2 draw;
        draw.x = of_channel(x[j].x, dt[j].x, decay[j].x, slope[j].x, grad[j].x, before[j].x, A.x, skip.x, g.x, dA.x,
                            dskip.x, dbias.x);
        draw.y = of_channel(x[j].y, dt[j].y, decay[j].y, slope[j].y, grad[j].y, before[j].y, A.y, skip.y, g.y, dA.y,
                            dskip.y, dbias.y);
        x[j] = draw;
      }
    }
    if (!inside)
#pragma unroll
      for (float& sum : sums) sum = 0.0f;
    const float sum = sum_and_scatter(sums, lane);
    const int j = lane % kAhead;
    if (lane < 2 * kAhead && j < count)
      (lane < kAhead ? p.partial_B : p.partial_C)[row + (k ? length - 1 - begin - j : begin + j)] = sum;
    Walk<T> to_u = du, to_delta = ddelta;
    to_u.advance(begin), to_delta.advance(begin);
    const bool leaves = q >= low_groups;
    const int leave = k ? begin : begin - middle, find = (k ? middle : length) - 1 - begin;
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (kWhole || i < count) {
        if (inside) to_delta[i] = TwoChannels<T>::of(x[i]);
        if (leaves) {
          left.put(leave + i, grad[i]);
        } else {
          if (shared_u) {
            const float2 other = left.get(find - i);
            grad[i].x += other.x, grad[i].y += other.y;
          }
          if (inside) to_u[i] = TwoChannels<T>::of(grad[i]);
        }
      }
  };
  for (int q = groups - 1; q >= 0; --q) {
    if (shared_u && q == low_groups - 1) __syncthreads();
    const int count = count_of(q);
    if (count == kAhead)
      go(std::true_type{}, q, count);
    else
      go(std::false_type{}, q, count);
  }
  if (shared_u && low_groups == 0) __syncthreads();
  if (!inside) return;
  const int64_t at = (batch * kDirections + k) * p.dim + channel;
  const auto keep = [&](float* to, float2 v) {
    if (to) to[at] = v.x, to[at + 1] = v.y;
  };
  keep(p.partial_A, dA), keep(p.partial_D, dskip), keep(p.partial_delta_bias, dbias);
}

int64_t backward_floats(const SelectiveScanCudaParams& p) {
  const int64_t most_groups = ceil_div(p.length, kAhead) + 1;
  return p.directions * (2 * p.length + most_groups * kChannels) +
         (shares_u(p) ? p.length * left_floats(p.u.elements.dtype) : 0);
}

template <class T>
cudaError_t launch_type(const SelectiveScanCudaParams& p, cudaStream_t stream) {
  const auto go = [&](auto kernel) {
    const dim3 block(kWarp, static_cast<unsigned>(p.directions));
    return launch(kernel, p, p.batch * p.groups * p.slices, block, backward_floats(p), stream);
  };
  if (p.directions == 2)
    return p.softplus ? go(channels_backward_kernel<T, 2, true>) : go(channels_backward_kernel<T, 2, false>);
  return p.softplus ? go(channels_backward_kernel<T, 1, true>) : go(channels_backward_kernel<T, 1, false>);
}

}  // namespace

bool fits_selective_scan_channels_bwd(const SelectiveScanCudaParams& p) {
  const DType dtype = p.u.elements.dtype;
  return !p.z && !p.projected && backward_floats(p) <= most_floats() && reads_pairs(p.grad_out, dtype) &&
         reads_pairs(p.grad_u, dtype) && reads_pairs(p.grad_delta, dtype);
}

cudaError_t selective_scan_channels_bwd(const SelectiveScanCudaParams& p, cudaStream_t stream) {
  return with_element(p.u.elements.dtype, [&](auto element) { return launch_type<decltype(element)>(p, stream); });
}

}  // namespace mobilemamba
