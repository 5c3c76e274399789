// Lanes are channels, but for a forward along positions. An item of the forward is kLanes channels of some positions of
// one sequence, an item of the backward those of all positions. Where x is float32 with channels side by side it is
// read where it lies.
//
// Backward, with s the sum under the SiLU and d its gradient:
//   dx_l = Σ_j weight_j d_{l+W-1-j},  dweight_j = Σ_l d_l x_{l-W+1+j},  dbias = Σ_l d_l
#include "cpu/causal_filter.h"
#include "include/causal_conv1d.h"

BEGIN_KERNELS
namespace {

struct Item {
  const CausalConv1dParams& p;
  int64_t batch, channel, channels;
  Filter filter;

  Item(const CausalConv1dParams& p_, int64_t b, int64_t block)
      : p(p_),
        batch(b),
        channel(block * kLanes),
        channels(p_.dim - channel < kLanes ? p_.dim - channel : kLanes),
        filter(p_.filter, channel, channels) {}

  // Rows from W - 1 positions before `start` on.
  Rows known(float* tile, int64_t start, int64_t count) const {
    const int64_t before = p.filter.width - 1;
    if (start > 0)
      return load_rows(tile, p.x.at(batch, channel, start - before), p.x.channel, p.x.position, channels,
                       count + before);
    if (p.initial)
      load_tile(tile, p.initial.at(batch, channel, 0), p.initial.channel, p.initial.position, channels, before);
    else
      std::memset(tile, 0, before * kLanes * sizeof(float));
    load_tile(tile + before * kLanes, p.x.at(batch, channel, 0), p.x.channel, p.x.position, channels, count);
    return {tile};
  }

  // Whether tap j of position l is of its sequence, and whether l is of any.
  bool together(int64_t l, int j) const {
    const int64_t from = l - p.filter.width + 1 + j;
    return !p.numbers || (from >= 0 && p.numbers.at(batch, from) == p.numbers.at(batch, l));
  }
  bool padding(int64_t l) const { return p.numbers && p.numbers.at(batch, l) < 0; }

  // The sum under the SiLU at position l, whose taps begin at rows[i].
  template <int kTaps>
  INLINE_MEMBER Vec sum(Rows rows, int64_t i, int64_t l) const {
    if (!p.numbers) return filter.sum<kTaps>(rows, i);
    Vec s = filter.bias;
    for (int j = 0; j < kTaps; ++j)
      if (together(l, j)) s += filter.taps[j] * rows.get(i + j);
    return s;
  }
};

// Where positions lie side by side lanes are positions, one channel after the other.
template <int kTaps>
static void forward_along(const Item& item, int64_t start, int64_t count) {
  const CausalConv1dParams& p = item.p;
  constexpr int64_t kBefore = kTaps - 1;
  float* row = p.scratch;
  for (int64_t c = 0; c < item.channels; ++c) {
    const int64_t channel = item.channel + c;
    const float* known = row;
    if (start > 0 && p.x.elements.dtype == DType::kFloat32) {
      known = static_cast<const float*>(p.x.at(item.batch, channel, start - kBefore).data);
    } else if (start > 0) {
      load_row(row, p.x.at(item.batch, channel, start - kBefore), 1, count + kBefore);
    } else {
      std::memset(row, 0, kBefore * sizeof(float));
      if (p.initial) load_row(row, p.initial.at(item.batch, channel, 0), p.initial.position, kBefore);
      load_row(row + kBefore, p.x.at(item.batch, channel, 0), 1, count);
    }
    Vec taps[kTaps];
    for (int j = 0; j < kTaps; ++j) taps[j] = splat(item.filter.taps[j][c]);
    const Vec bias = splat(item.filter.bias[c]);
    with_type(p.y.at(item.batch, channel, start), [&](auto* y) {
      const auto vectors = [&](auto together, int64_t l, int64_t some) ALWAYS_INLINE {
        Pack<together> s;
        for (int i = 0; i < together; ++i) {
          s.v[i] = bias;
          for (int j = 0; j < kTaps; ++j) s.v[i] += taps[j] * load_some(known + l + i * kLanes + j, some);
        }
        if (p.filter.silu) s = silu(s);
        for (int i = 0; i < together; ++i) store_some(y + l + i * kLanes, s.v[i], some);
      };
      int64_t l = 0;
      for (; l + 4 * kLanes <= count; l += 4 * kLanes) vectors(std::integral_constant<int, 4>{}, l, kLanes);
      for (; l < count; l += kLanes)
        vectors(std::integral_constant<int, 1>{}, l, count - l < kLanes ? count - l : kLanes);
    });
  }
}

template <int kTaps>
static void forward(const Item& item, int64_t start, int64_t count) {
  const CausalConv1dParams& p = item.p;
  if (along_positions(p)) return forward_along<kTaps>(item, start, count);
  float* out = p.scratch + (kCausalChunk + kMostTaps - 1) * kLanes;
  const Rows rows = item.known(p.scratch, start, count);
  const Elements to = p.y.at(item.batch, item.channel, start);
  const bool direct = needs_no_tile(to, p.y.channel, item.channels);
  const Rows y = direct ? in_place(to, p.y.position) : Rows{out};
  for (int64_t i = 0; i < count; ++i) {
    Vec s = item.sum<kTaps>(rows, i, start + i);
    if (p.filter.silu) s = silu(s);
    y.set(i, item.padding(start + i) ? Vec{} : s);
  }
  if (!direct) store_tile(out, to, p.y.channel, p.y.position, item.channels, count);
}

// Writes gradients of the inputs from position `first` on, which is negative among the initial ones.
static void write_inputs(const Item& item, const float* tile, int64_t first, int64_t count) {
  const CausalConv1dParams& p = item.p;
  const int64_t before = first < 0 ? (count < -first ? count : -first) : 0;
  if (before && p.initial)
    store_tile(tile, p.grad_initial.at(item.batch, item.channel, first + p.filter.width - 1), p.grad_initial.channel,
               p.grad_initial.position, item.channels, before);
  store_tile(tile + before * kLanes, p.grad_x.at(item.batch, item.channel, first + before), p.grad_x.channel,
             p.grad_x.position, item.channels, count - before);
}

template <int kTaps>
static void backward(const Item& item) {
  const CausalConv1dParams& p = item.p;
  constexpr int64_t kBefore = kTaps - 1;
  float *inputs = p.scratch + (kCausalChunk + kMostTaps - 1) * kLanes,
        *grads = inputs + (kCausalChunk + kMostTaps - 1) * kLanes;
  Vec sums[kTaps + 1] = {};
  std::memset(inputs, 0, kBefore * kLanes * sizeof(float));
  for (int64_t start = 0; start < p.length; start += kCausalChunk) {
    const int64_t count = p.length - start < kCausalChunk ? p.length - start : kCausalChunk;
    const Rows rows = item.known(p.scratch, start, count);
    const Rows dy = load_rows(grads, p.grad.at(item.batch, item.channel, start), p.grad.channel, p.grad.position,
                              item.channels, count);
    std::memset(inputs + kBefore * kLanes, 0, count * kLanes * sizeof(float));
    for (int64_t i = 0; i < count; ++i) {
      if (item.padding(start + i)) continue;
      Vec d = dy.get(i);
      if (p.filter.silu) {
        const Vec s = item.sum<kTaps>(rows, i, start + i), gate = sigmoid(s);
        d *= gate * (1.0f + s * (1.0f - gate));
      }
      sums[kTaps] += d;
      for (int j = 0; j < kTaps; ++j) {
        if (!item.together(start + i, j)) continue;
        sums[j] += d * rows.get(i + j);
        float* input = inputs + (i + j) * kLanes;
        store(input, load(input) + d * item.filter.taps[j]);
      }
    }
    write_inputs(item, inputs, start - kBefore, count);
    std::memmove(inputs, inputs + count * kLanes, kBefore * kLanes * sizeof(float));
  }
  write_inputs(item, inputs, p.length - kBefore, kBefore);
  float* to = p.partial + (item.batch * p.dim + item.channel) * (kTaps + 1);
  for (int j = 0; j <= kTaps; ++j)
    for (int64_t c = 0; c < item.channels; ++c) to[c * (kTaps + 1) + j] = sums[j][c];
}

}  // namespace

// Items: batch × chunks of positions × blocks of channels.
void causal_conv1d_fwd(const CausalConv1dParams& p, int64_t begin, int64_t end) {
  const int64_t positions = causal_conv1d_item(p), blocks = (p.dim + kLanes - 1) / kLanes;
  const int64_t chunks = (p.length + positions - 1) / positions;
  for (int64_t i = begin; i < end; ++i) {
    const Item item(p, i / blocks / chunks, i % blocks);
    const int64_t start = i / blocks % chunks * positions, rest = p.length - start;
    with_taps(p.filter.width, [&](auto taps) { forward<taps>(item, start, rest < positions ? rest : positions); });
  }
}

// Items: batch × blocks of channels.
void causal_conv1d_bwd(const CausalConv1dParams& p, int64_t begin, int64_t end) {
  const int64_t blocks = (p.dim + kLanes - 1) / kLanes;
  for (int64_t i = begin; i < end; ++i) {
    const Item item(p, i / blocks, i % blocks);
    with_taps(p.filter.width, [&](auto taps) { backward<taps>(item); });
  }
}

END_KERNELS
