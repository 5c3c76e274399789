// selective_state_update: a block has some channels of one head of one sequence, first and last a thread each, for
// step sizes, D and z; between, `lanes` threads a channel.
//
// States dense: lanes are states, up to a warp of them, and sum by shuffles; channels follow each other, so that a warp
// reads and writes whole sectors. Channels dense: one thread a channel, which goes through its states. Either way
// kAtOnce states of a thread are in flight. B, C and what is the same for all states of a channel pass through shared
// memory; where A is the same for all states (Mamba-2), that is the decay, one exponential a channel. Bytes: the
// states, read and written once by the same thread; A once a sequence.
#include "cuda/device.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

constexpr int kThreads = 128;
constexpr int kAtOnce = 4;

struct Plan : SelectiveStateUpdateParams {
  int64_t channels;  // of a block
  int lanes;         // a power of two

  ANYWHERE int64_t blocks() const { return ceil_div(dim, channels); }  // of a head
  ANYWHERE int64_t items() const { return batch * heads * blocks(); }
  ANYWHERE int64_t shared_floats() const { return 2 * state + 3 * channels; }
};

// A thread has kStates states of kChannels channels at once.
template <int kChannels, int kStates>
__global__ void __launch_bounds__(kThreads) update_kernel(Plan p, int64_t first_item) {
  const int64_t item = first_item + blockIdx.x, all_heads = item / p.blocks();
  const int64_t first = item % p.blocks() * p.channels, head = all_heads % p.heads, batch = all_heads / p.heads;
  const int64_t row = p.rows ? p.rows.at(batch) : batch;
  const int thread = threadIdx.x, N = static_cast<int>(p.state);
  const int channels = static_cast<int>(p.dim - first < p.channels ? p.dim - first : p.channels);
  const int64_t own = first + thread;  // the thread's channel, first and last
  const bool has_own = thread < channels;
  if (row < 0) {
    if (has_own) store(p.y.at(batch, head, own), 0.0f);
    return;
  }

  float *B = shared_memory, *C = B + N, *rates = C + N, *drives = rates + p.channels, *sums = drives + p.channels;
  for (int n = thread; n < N; n += kThreads) {
    B[n] = load(p.B.at(batch, head / p.group, 0, n));
    C[n] = load(p.C.at(batch, head / p.group, 0, n));
  }
  const bool one_decay = p.A.state == 0;
  float x = 0.0f;
  if (has_own) {
    x = load(p.x.at(batch, head, own));
    float dt = load(p.dt.at(batch, head, own));
    if (p.dt_bias) dt += load(p.dt_bias.at(0, head, own));
    if (p.softplus) dt = softplus(dt);
    const float rate = dt * kLog2E;
    rates[thread] = one_decay ? exp2f(rate * load(p.A.at(0, head, own))) : rate;
    drives[thread] = dt * x;
  }
  __syncthreads();

  const int lane = thread % p.lanes, group = thread / p.lanes, groups = kThreads / p.lanes;
  visit(p.states.at(row, head, first), [&](auto* states) {
    using T = std::remove_pointer_t<decltype(states)>;
    // decay(c, n): of state n of channel c.
    const auto advance = [&](auto decay) {
#pragma unroll 1
      for (int c0 = group; c0 - group < channels; c0 += groups * kChannels) {
        float sum[kChannels] = {};
#pragma unroll 1
        for (int n0 = lane; n0 < N; n0 += p.lanes * kStates) {
          T* const state = states + (c0 * p.states.channel + n0 * p.states.state);
          float h[kChannels][kStates], factor[kChannels][kStates];
          const auto each = [&](auto f) {
#pragma unroll
            for (int i = 0; i < kChannels; ++i)
#pragma unroll
              for (int k = 0; k < kStates; ++k) {
                const int c = i * groups, n = k * p.lanes;
                if (c0 + c < channels && n0 + n < N)
                  f(i, k, c0 + c, n0 + n, state + (c * p.states.channel + n * p.states.state));
              }
          };
          each([&](int i, int k, int c, int n, const T* from) {
            h[i][k] = to_float(*from), factor[i][k] = decay(c, n);
          });
          each([&](int i, int k, int c, int n, T* to) {
            const float after = factor[i][k] * h[i][k] + drives[c] * B[n];
            *to = from_float<T>(after);
            sum[i] += after * C[n];
          });
        }
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
#pragma unroll 1
          for (int mask = 1; mask < p.lanes; mask *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], mask);
          if (lane == 0 && c0 + i * groups < channels) sums[c0 + i * groups] = sum[i];
        }
      }
    };
    if (one_decay)
      advance([&](int c, int) { return rates[c]; });
    else
      visit(p.A.at(0, head, first), [&](const auto* A) {
        advance([&](int c, int n) { return exp2f(rates[c] * to_float(A[c * p.A.channel + n * p.A.state])); });
      });
  });
  __syncthreads();

  if (has_own) {
    float y = sums[thread];
    if (p.D) y += load(p.D.at(0, head, own)) * x;
    if (p.z) y *= silu(load(p.z.at(batch, head, own)));
    store(p.y.at(batch, head, own), y);
  }
}

void plan(Plan& p) {
  constexpr int64_t kLeastChannels = 8, kBlocksOfProcessor = 2;
  const int64_t processors = multiprocessors();
  p.lanes = 1;
  if (p.states.state == 1 || p.states.channel != 1)
    while (p.lanes < p.state && p.lanes < kWarp) p.lanes *= 2;
  p.channels = kThreads;
  while (p.channels > kLeastChannels && (p.channels / 2 >= p.dim || p.items() < kBlocksOfProcessor * processors))
    p.channels /= 2;
}

}  // namespace

cudaError_t selective_state_update(const SelectiveStateUpdateParams& params, cudaStream_t stream) {
  Plan p{params};
  plan(p);
  return p.lanes < kWarp || p.state == kWarp
             ? launch(update_kernel<kAtOnce, 1>, p, p.items(), kThreads, p.shared_floats(), stream)
             : launch(update_kernel<1, kAtOnce>, p, p.items(), kThreads, p.shared_floats(), stream);
}

}  // namespace mobilemamba
