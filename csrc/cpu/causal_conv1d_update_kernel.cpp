// Lanes are channels: an item is kLanes channels of one sequence, whose state and new positions fit into a tile.
// Mamba's own step, of four taps and four positions that lie side by side, has a short vector for each channel instead.
#include "cpu/causal_filter.h"
#include "include/causal_conv1d_update.h"

BEGIN_KERNELS
namespace {

typedef float Four __attribute__((vector_size(16)));
INLINE Four load_four(const float* p) {
  Four v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

INLINE bool is_mambas(const CausalConv1dUpdateParams& p) {
  const CausalFilter& f = p.filter;
  return f.width == 4 && p.kept == 4 && p.steps == 1 && !p.offsets && p.state.position == 1 && f.weight_tap == 1 &&
         p.state.elements.dtype == DType::kFloat32 && f.weight.dtype == DType::kFloat32;
}

static void update_mambas(const CausalConv1dUpdateParams& p, int64_t batch, int64_t row, int64_t channel,
                          int64_t channels) {
  const CausalFilter& f = p.filter;
  float* state = static_cast<float*>(p.state.at(row, channel, 0).data);
  const float* weight = static_cast<const float*>((f.weight + channel * f.weight_channel).data);
  float x[kLanes], sums[kLanes] = {};
  store(x, load_lanes(p.x.at(batch, channel, 0), p.x.channel, channels));
  for (int64_t c = 0; c < channels; ++c) {
    float* kept = state + c * p.state.channel;
    const Four now = __builtin_shufflevector(load_four(kept), Four{x[c]}, 1, 2, 3, 4);
    std::memcpy(kept, &now, sizeof now);
    const Four products = now * load_four(weight + c * f.weight_channel);
    sums[c] = (products[0] + products[1]) + (products[2] + products[3]);
  }
  Vec y = load(sums);
  if (f.bias) y += load_lanes(f.bias + channel * f.bias_channel, f.bias_channel, channels);
  store(sums, f.silu ? silu(y) : y);
  store_tile(sums, p.y.at(batch, channel, 0), p.y.channel, 0, channels, 1);
}

template <int kTaps>
static void update(const CausalConv1dUpdateParams& p, int64_t batch, int64_t channel, int64_t channels) {
  constexpr int64_t kBefore = kTaps - 1;
  const Elements y = p.y.at(batch, channel, 0);
  float *state = p.scratch, *known = state + p.kept * kLanes;
  const int64_t row = p.rows ? p.rows.at(batch) : batch;
  if (row < 0) {
    std::memset(known, 0, p.steps * kLanes * sizeof(float));
    return store_tile(known, y, p.y.channel, p.y.position, channels, p.steps);
  }
  if (kTaps == 4 && is_mambas(p)) return update_mambas(p, batch, row, channel, channels);
  const Filter filter(p.filter, channel, channels);
  const Elements states = p.state.at(row, channel, 0);
  load_tile(state, states, p.state.channel, p.state.position, channels, p.kept);
  load_tile(known + kBefore * kLanes, p.x.at(batch, channel, 0), p.x.channel, p.x.position, channels, p.steps);
  const int64_t past = p.offsets ? (p.offsets.at(batch) % p.kept + p.kept) % p.kept : 0;
  const auto place = [&](int64_t l) { return (past + l + p.kept) % p.kept; };  // in the buffer, l from -kBefore on
  for (int64_t j = 0; j < kBefore; ++j)
    std::memcpy(known + j * kLanes, state + place(j - kBefore) * kLanes, kLanes * sizeof(float));
  if (p.offsets) {
    for (int64_t l = 0; l < p.steps; ++l)
      std::memcpy(state + place(l) * kLanes, known + (kBefore + l) * kLanes, kLanes * sizeof(float));
  } else {
    const int64_t stay = p.kept > p.steps ? p.kept - p.steps : 0, fresh = p.kept - stay;
    std::memmove(state, state + (p.kept - stay) * kLanes, stay * kLanes * sizeof(float));
    std::memcpy(state + stay * kLanes, known + (kBefore + p.steps - fresh) * kLanes, fresh * kLanes * sizeof(float));
  }
  store_tile(state, states, p.state.channel, p.state.position, channels, p.kept);
  for (int64_t l = 0; l < p.steps; ++l) {
    const Vec s = filter.sum<kTaps>({known}, l);
    store(known + l * kLanes, p.filter.silu ? silu(s) : s);
  }
  store_tile(known, y, p.y.channel, p.y.position, channels, p.steps);
}

}  // namespace

// Items: batch × blocks of channels.
void causal_conv1d_update(const CausalConv1dUpdateParams& p, int64_t begin, int64_t end) {
  const int64_t blocks = (p.dim + kLanes - 1) / kLanes;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t channel = i % blocks * kLanes, rest = p.dim - channel;
    with_taps(p.filter.width, [&](auto taps) { update<taps>(p, i / blocks, channel, rest < kLanes ? rest : kLanes); });
  }
}

END_KERNELS
