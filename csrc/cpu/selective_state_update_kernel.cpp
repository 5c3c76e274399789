// Lanes are states, which lie side by side in memory; an item is kLanes channels of one head of one sequence, whose
// sums over the states are taken together. Where A is the same for all states of a channel (Mamba-2), so is the decay.
#include "cpu/tile.h"
#include "include/selective_state_update.h"

BEGIN_KERNELS
namespace {

// `count` states from e on: where they lie, or a copy. What is behind them, up to a whole vector, is 0 in a copy.
INLINE const float* states_of(float* row, Elements e, int64_t stride, int64_t count) {
  if (e.dtype == DType::kFloat32 && stride == 1 && count % kLanes == 0) return static_cast<const float*>(e.data);
  store(row + count / kLanes * kLanes, Vec{});
  load_row(row, e, stride, count);
  return row;
}

INLINE void store_states(Elements e, const float* row, int64_t stride, int64_t count) {
  with_type(e, [&](auto* p) {
    for (int64_t n = 0; n < count; n += stride == 1 ? kLanes : 1)
      store_some(p + n * stride, load(row + n), stride == 1 ? (count - n < kLanes ? count - n : kLanes) : 1);
  });
}

static void update(const SelectiveStateUpdateParams& p, int64_t batch, int64_t head, int64_t channel,
                   int64_t channels) {
  const Elements out = p.y.at(batch, head, channel);
  const int64_t row = p.rows ? p.rows.at(batch) : batch;
  float lanes[kLanes];
  if (row < 0) {
    store(lanes, Vec{});
    return store_tile(lanes, out, p.y.channel, 0, channels, 1);
  }
  const auto vector = [&](const StepTensor& t) { return load_lanes(t.at(batch, head, channel), t.channel, channels); };
  const Vec x = vector(p.x);
  Vec dt = vector(p.dt);
  if (p.dt_bias) dt += vector(p.dt_bias);
  if (p.softplus) dt = softplus(dt);
  constexpr int64_t kRow = kMostStates + kLanes;
  float *a_row = p.scratch + 2 * kRow, *h_row = a_row + kRow;
  const float *b = states_of(p.scratch, p.B.at(batch, head / p.group, 0), p.B.state, p.state),
              *c = states_of(p.scratch + kRow, p.C.at(batch, head / p.group, 0), p.C.state, p.state);
  const bool shared = p.A.state == 0;
  const Vec step = dt * kLog2E, drive = dt * x, decay = shared ? exp2(step * vector(p.A)) : Vec{};
  const int64_t vectors = (p.state + kLanes - 1) / kLanes;
  Vec sums[kLanes] = {};
  for (int64_t i = 0; i < channels; ++i) {
    const Elements states = p.states.at(row, head, channel + i);
    const bool direct = states.dtype == DType::kFloat32 && p.states.state == 1 && p.state % kLanes == 0;
    const float* before = states_of(h_row, states, p.states.state, p.state);
    const float* a = shared ? nullptr : states_of(a_row, p.A.at(0, head, channel + i), p.A.state, p.state);
    float* after = direct ? static_cast<float*>(states.data) : h_row;
    for (int64_t v = 0; v < vectors * kLanes; v += kLanes) {
      const Vec factor = shared ? splat(decay[i]) : exp2(load(a + v) * step[i]);
      const Vec h = factor * load(before + v) + load(b + v) * drive[i];
      store(after + v, h);
      sums[i] += h * load(c + v);
    }
    if (!direct) store_states(states, h_row, p.states.state, p.state);
  }
  Vec y = sum_lanes(sums);
  if (p.D) y += vector(p.D) * x;
  if (p.z) y *= silu(vector(p.z));
  store(lanes, y);
  store_tile(lanes, out, p.y.channel, 0, channels, 1);
}

}  // namespace

// Items: batch × heads × blocks of channels.
void selective_state_update(const SelectiveStateUpdateParams& p, int64_t begin, int64_t end) {
  const int64_t blocks = (p.dim + kLanes - 1) / kLanes;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t channel = i % blocks * kLanes, rest = p.dim - channel;
    update(p, i / blocks / p.heads, i / blocks % p.heads, channel, rest < kLanes ? rest : kLanes);
  }
}

END_KERNELS
