// Lanes are states, which lie side by side in memory; an item is kLanes channels of one head of one sequence, whose
// sums over the states are taken together. Where A is the same for all states of a channel (Mamba-2), so is the decay.
#include "cpu/tile.h"
#include "include/selective_state_update.h"

BEGIN_KERNELS
namespace {

// Rows of states of one channel after the other: where they lie, or copies, filled with zeros up to a whole vector.
struct StateRows {
  Elements first;
  int64_t channel, state, count;
  float* copy;
  bool direct;

  StateRows(Elements e, int64_t channel_stride, int64_t state_stride, int64_t states, float* row)
      : first(e),
        channel(channel_stride),
        state(state_stride),
        count(states),
        copy(row),
        direct(e.dtype == DType::kFloat32 && state_stride == 1 && states % kLanes == 0) {}

  INLINE_MEMBER float* get(int64_t i) const {
    if (direct) return static_cast<float*>(first.data) + i * channel;
    store(copy + count / kLanes * kLanes, Vec{});
    load_row(copy, first + i * channel, state, count);
    return copy;
  }
  INLINE_MEMBER void put(int64_t i) const {
    if (direct) return;
    with_type(first + i * channel, [&](auto* p) {
      if (state == 1)
        for (int64_t n = 0; n < count; n += kLanes)
          store_some(p + n, load(copy + n), count - n < kLanes ? count - n : kLanes);
      else
        for (int64_t n = 0; n < count; ++n) store_one(p + n * state, copy[n]);
    });
  }
};

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
  const auto row_of = [&](const StepTensor& t, int64_t at, int64_t h, int64_t c, int64_t i) {
    return StateRows(t.at(at, h, c), t.channel, t.state, p.state, p.scratch + i * kRow);
  };
  const int64_t group = head / p.group;
  const float *b = row_of(p.B, batch, group, 0, 0).get(0), *c = row_of(p.C, batch, group, 0, 1).get(0);
  const StateRows states = row_of(p.states, row, head, channel, 2), rates = row_of(p.A, 0, head, channel, 3);
  const bool shared = p.A.state == 0;
  float steps[kLanes], drives[kLanes], decays[kLanes];
  store(steps, dt * kLog2E), store(drives, dt * x);
  if (shared) store(decays, exp2(load(steps) * vector(p.A)));
  const int64_t padded = (p.state + kLanes - 1) / kLanes * kLanes;
  Vec sums[kLanes] = {};
  for (int64_t i = 0; i < channels; ++i) {
    float* h = states.get(i);
    const float* a = shared ? nullptr : rates.get(i);
    const Vec step = splat(steps[i]), drive = splat(drives[i]), decay = shared ? splat(decays[i]) : Vec{};
    Vec sum{};
    for (int64_t n = 0; n < padded; n += kLanes) {
      const Vec after = (shared ? decay : exp2(load(a + n) * step)) * load(h + n) + load(b + n) * drive;
      store(h + n, after);
      sum += after * load(c + n);
    }
    sums[i] = sum;
    states.put(i);
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
