// causal_conv1d_update: a thread has one channel of one sequence; in its registers are the filter and the positions
// under it, which come from the state before anything is written there.
//
// Threads that follow each other have channels that do. A state is a few positions long: where positions are dense,
// those of a warp's channels lie side by side and its reads meet them in the first cache. Bytes: x and y once; of the
// state what the filter still needs and what changes, once.
#include "cuda/device.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

constexpr int kThreads = 128;

template <int kTaps>
__global__ void __launch_bounds__(kThreads) update_kernel(CausalConv1dUpdateParams p, int64_t first_item) {
  constexpr int kBefore = kTaps - 1;
  const int64_t item = (first_item + blockIdx.x) * kThreads + threadIdx.x;
  if (item >= p.batch * p.dim) return;
  const int64_t batch = item / p.dim, channel = item % p.dim, row = p.rows ? p.rows.at(batch) : batch;
  visit(p.x.at(batch, channel, 0), [&](const auto* x) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(x)>>;
    T* y = static_cast<T*>(p.y.at(batch, channel, 0).data);
    if (row < 0) {
      for (int64_t l = 0; l < p.steps; ++l) y[l * p.y.position] = from_float<T>(0.0f);
      return;
    }
    float next = to_float(*x), taps[kTaps], known[kTaps];
#pragma unroll
    for (int j = 0; j < kTaps; ++j)
      taps[j] = load(p.filter.weight + (channel * p.filter.weight_channel + j * p.filter.weight_tap));
    const float bias = p.filter.bias ? load(p.filter.bias + channel * p.filter.bias_channel) : 0.0f;

    visit(p.state.at(row, channel, 0), [&](auto* state) {
      const int64_t step = p.state.position;
      // Where the next position belongs: round the end of the buffer, or behind it until the positions moved on.
      int64_t place = p.kept;
      if (p.offsets) {
        place = p.offsets.at(batch) % p.kept;
        if (place < 0) place += p.kept;
      }
#pragma unroll
      for (int j = 0; j < kBefore; ++j) {
        const int64_t from = place - kBefore + j;
        known[j] = to_float(state[(from < 0 ? from + p.kept : from) * step]);
      }
      if (!p.offsets) {
        for (int64_t l = 0; l < p.kept - p.steps; ++l) state[l * step] = state[(l + p.steps) * step];
        place -= p.steps;  // negative for what leaves again
      }
      for (int64_t l = 0; l < p.steps; ++l) {
        known[kBefore] = next;
        if (l + 1 < p.steps) next = to_float(x[(l + 1) * p.x.position]);
        if (place >= 0) state[place * step] = from_float<std::remove_pointer_t<decltype(state)>>(known[kBefore]);
        if (++place == p.kept) place = 0;  // without offsets only behind the last one
        float s = bias;
#pragma unroll
        for (int j = 0; j < kTaps; ++j) s += taps[j] * known[j];
        y[l * p.y.position] = from_float<T>(p.filter.silu ? silu(s) : s);
#pragma unroll
        for (int j = 0; j < kBefore; ++j) known[j] = known[j + 1];
      }
    });
  });
}

}  // namespace

cudaError_t causal_conv1d_update(const CausalConv1dUpdateParams& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.batch * p.dim, kThreads);
  if (p.filter.width == 2) return launch(update_kernel<2>, p, blocks, kThreads, 0, stream);
  if (p.filter.width == 3) return launch(update_kernel<3>, p, blocks, kThreads, 0, stream);
  return launch(update_kernel<4>, p, blocks, kThreads, 0, stream);
}

}  // namespace mobilemamba
