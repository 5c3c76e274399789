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

// An item's channels, in three passes, so that one block's functions fill the time in which another's wait.
struct Item {
  const SelectiveStateUpdateParams& p;
  int64_t batch, head, channel, channels;

  // Calls f(channel in the item, how many) for every block.
  template <class F>
  INLINE_MEMBER void blocks(F f) const {
    for (int64_t c = 0; c < channels; c += kLanes) f(c, channels - c < kLanes ? channels - c : kLanes);
  }
  INLINE_MEMBER Vec vector(const StepTensor& t, int64_t c, int64_t some) const {
    return load_lanes(t.at(batch, head, channel + c), t.channel, some);
  }
  INLINE_MEMBER void write(int64_t c, int64_t some, Vec y) const {
    float lanes[kLanes];
    store(lanes, y);
    store_tile(lanes, p.y.at(batch, head, channel + c), p.y.channel, 0, some, 1);
  }
  StateRows rows(const StepTensor& t, int64_t at, int64_t h, int64_t c, int64_t i) const {
    return {t.at(at, h, c), t.channel, t.state, p.state, p.scratch + i * (kMostStates + kLanes)};
  }
};

static void update(const Item& item) {
  const SelectiveStateUpdateParams& p = item.p;
  const int64_t row = p.rows ? p.rows.at(item.batch) : item.batch, group = item.head / p.group;
  if (row < 0) return item.blocks([&](int64_t c, int64_t some) { item.write(c, some, Vec{}); });
  const bool shared = p.A.state == 0;
  float steps[kStepChannels], drives[kStepChannels], decays[kStepChannels], sums[kStepChannels];
  item.blocks([&](int64_t c, int64_t some) {
    Vec dt = item.vector(p.dt, c, some);
    if (p.dt_bias) dt += item.vector(p.dt_bias, c, some);
    if (p.softplus) dt = softplus(dt);
    store(drives + c, dt * item.vector(p.x, c, some));
    store(steps + c, dt * kLog2E);
    if (shared) store(decays + c, exp2(dt * kLog2E * item.vector(p.A, c, some)));
  });
  const float *b = item.rows(p.B, item.batch, group, 0, 0).get(0), *c = item.rows(p.C, item.batch, group, 0, 1).get(0);
  const StateRows states = item.rows(p.states, row, item.head, item.channel, 2),
                  rates = item.rows(p.A, 0, item.head, item.channel, 3);
  // Lanes behind the last state hold 0 · infinity where the drive is infinite.
  float held[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) held[lane] = (p.state - 1) % kLanes >= lane ? 1.0f : 0.0f;
  const IntVec exists = load(held) != 0.0f;
  // Of `channels` channels from i on, their sums into `sum`: so many share a pack of exponentials and its constants.
  const auto advance_channels = [&](int64_t i, Vec* sum, auto channels, auto vectors, auto one_decay) ALWAYS_INLINE {
    float* h[channels];
    const float* a[channels];
    Vec drive[channels], step[channels];
    for (int k = 0; k < channels; ++k) {
      h[k] = states.get(i + k);
      a[k] = one_decay ? nullptr : rates.get(i + k);
      drive[k] = splat(drives[i + k]);
      step[k] = splat((one_decay ? decays : steps)[i + k]);
      sum[k] = Vec{};
    }
    for (int64_t n = 0; n < p.state; n += vectors * kLanes) {
      Pack<channels * vectors> decay;
      for (int v = 0; v < channels * vectors; ++v) {
        const int k = v / vectors, at = v % vectors * kLanes;
        decay.v[v] = one_decay ? step[k] : load(a[k] + n + at) * step[k];
      }
      if (!one_decay) decay = are_moderate(decay) ? moderate_exp2(decay) : exp2(decay);
      for (int v = 0; v < channels * vectors; ++v) {
        const int k = v / vectors;
        const int64_t at = n + v % vectors * kLanes;
        const Vec after = decay.v[v] * load(h[k] + at) + load(b + at) * drive[k];
        store(h[k] + at, after);
        const Vec product = after * load(c + at);
        sum[k] += vectors == 1 && at + kLanes > p.state ? select(exists, product, Vec{}) : product;
      }
    }
    for (int k = 0; k < channels; ++k) states.put(i + k);
  };
  const auto advance = [&](auto vectors, auto one_decay) ALWAYS_INLINE {
    item.blocks([&](int64_t first, int64_t some) ALWAYS_INLINE {
      Vec of_channel[kLanes];
      int64_t i = 0;
      if (states.direct && (one_decay || rates.direct))  // copies are of one channel
        for (; i + 2 <= some; i += 2)
          advance_channels(first + i, of_channel + i, std::integral_constant<int, 2>{}, vectors, one_decay);
      for (; i < some; ++i)
        advance_channels(first + i, of_channel + i, std::integral_constant<int, 1>{}, vectors, one_decay);
      for (; i < kLanes; ++i) of_channel[i] = Vec{};
      store(sums + first, sum_lanes(of_channel));
    });
  };
  const auto with_decay = [&](auto vectors) ALWAYS_INLINE {
    shared ? advance(vectors, std::true_type{}) : advance(vectors, std::false_type{});
  };
  p.state % (2 * kLanes) == 0 ? with_decay(std::integral_constant<int, 2>{})
                              : with_decay(std::integral_constant<int, 1>{});
  item.blocks([&](int64_t c, int64_t some) {
    Vec y = load(sums + c);
    if (p.D) y += item.vector(p.D, c, some) * item.vector(p.x, c, some);
    if (p.z) y *= silu(item.vector(p.z, c, some));
    item.write(c, some, y);
  });
}

}  // namespace

// Items: batch × heads × kStepChannels channels.
void selective_state_update(const SelectiveStateUpdateParams& p, int64_t begin, int64_t end) {
  const int64_t parts = (p.dim + kStepChannels - 1) / kStepChannels;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t channel = i % parts * kStepChannels, rest = p.dim - channel;
    update({p, i / parts / p.heads, i / parts % p.heads, channel, rest < kStepChannels ? rest : kStepChannels});
  }
}

END_KERNELS
