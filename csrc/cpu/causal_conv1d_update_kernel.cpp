// Lanes are channels: an item is kLanes channels of one sequence, whose state and new positions fit into a tile.
#include "cpu/causal_filter.h"
#include "include/causal_conv1d_update.h"

BEGIN_KERNELS
namespace {

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
