// One item is kLanes channels of one image (forward), or the channels of one slice (backward): lanes are channels, so a
// sequential scan keeps every lane busy and needs no communication. Both directions of an item run over the same rows
// in cache; memory sees u, delta and z read once and the result written once.
//
// Backward, with g the gradient of the state h:
//   g_l = C_l dy_l + a_{l+1} g_{l+1},  dB = Σ g dt u,  dC = Σ dy h,  du = g dt B + D dy,
//   ddt = Σ_n g (A a h_prev + B u),    dA = Σ g dt a h_prev
// States are recomputed chunk by chunk from those at the chunks' ends. Sums over channels are taken over the lanes,
// then over the blocks of a slice, in a fixed order; the binding adds slices and batch, in a fixed order too.
#include "cpu/scan.h"
#include "include/selective_scan.h"

BEGIN_KERNELS
namespace {

struct Block {
  int64_t batch, group, channel, channels;  // the first channel and how many, at most kLanes
};

static void read(float* tile, const ScanTensor& t, const Block& x, int64_t k, int64_t start, int64_t count) {
  load_tile(tile, t.at(x.batch, k, x.channel, 0, start), t.channel, t.position, x.channels, count);
}

static void write(const float* tile, const ScanTensor& t, const Block& x, int64_t k, int64_t start, int64_t count) {
  store_tile(tile, t.at(x.batch, k, x.channel, 0, start), t.channel, t.position, x.channels, count);
}

// The Source of scan.h: every input is a tensor.
struct TensorSource {
  const SelectiveScanParams& p;
  const Block x;
  const int64_t length = p.length, state = p.state, directions = p.directions;

  Vec lanes(const ScanTensor& t, int64_t k, int64_t n) const {
    return t ? load_lanes(t.at(0, k, x.channel, n, 0), t.channel, x.channels) : Vec{};
  }
  Vec A(int64_t k, int64_t n) const { return lanes(p.A, k, n); }
  bool skips() const { return static_cast<bool>(p.D); }
  Vec D(int64_t k) const { return lanes(p.D, k, 0); }
  Coefficient coefficient(float* row, const ScanTensor& t, bool varies, int64_t group, int64_t k, int64_t n,
                          int64_t start, int64_t count) const {
    if (!varies) return {nullptr, 0, lanes(t, 0, n)};
    const Elements e = t.at(x.batch, k, x.group / group, n, start);
    if (e.dtype == DType::kFloat32) return {static_cast<const float*>(e.data), t.position, Vec{}};
    load_row(row, e, t.position, count);
    return {row, 1, Vec{}};
  }
  Coefficient B(float* row, int64_t k, int64_t n, int64_t start, int64_t count) const {
    return coefficient(row, p.B, p.B_varies, p.B_group, k, n, start, count);
  }
  Coefficient C(float* row, int64_t k, int64_t n, int64_t start, int64_t count) const {
    return coefficient(row, p.C, p.C_varies, p.C_group, k, n, start, count);
  }
  Rows rows(float* tile, const ScanTensor& t, int64_t k, int64_t start, int64_t count) const {
    return load_rows(tile, t.at(x.batch, k, x.channel, 0, start), t.channel, t.position, x.channels, count);
  }
  Rows u(float* tile, int64_t k, int64_t start, int64_t count) const { return rows(tile, p.u, k, start, count); }
  Rows dt(float* tile, int64_t k, int64_t start, int64_t count) const {
    return steps(tile, rows(tile, p.delta, k, start, count), k, count);
  }
  Rows steps(float* tile, Rows delta, int64_t k, int64_t count) const {
    const Vec bias = lanes(p.delta_bias, k, 0);
    int64_t l = 0;
    for (; p.softplus && l + kAhead <= count; l += kAhead) {
      Pack<kAhead> raw;
      for (int i = 0; i < kAhead; ++i) {
        raw.v[i] = delta.get(l + i) + bias;
        delta.prefetch(l + i + kPrefetch);
      }
      raw = softplus(raw);
      for (int i = 0; i < kAhead; ++i) store(tile + (l + i) * kLanes, raw.v[i]);
    }
    for (; l < count; ++l) {
      const Vec raw = delta.get(l) + bias;
      store(tile + l * kLanes, p.softplus ? softplus(raw) : raw);
    }
    return {tile};
  }
};

// A long sequence of few channels is divided into segments, so that every thread has work. But for the last one each is
// folded to the product of its decays, the exponential of the sum of its steps, and its last state from zero.
struct Segment {
  int64_t begin, end;
  Segment(const SelectiveScanParams& p, int64_t index)
      : begin(index * p.segment), end(index + 1 < p.segments ? begin + p.segment : p.length) {}
};
INLINE float* fold_of(const SelectiveScanParams& p, int64_t item, int64_t segment) {
  return p.folds + (item * (p.segments - 1) + segment) * 2 * p.state * kLanes;
}

static void fold_segment(const SelectiveScanParams& p, const Block& x, const ScanScratch& s, int64_t item,
                         int64_t index) {
  const TensorSource source{p, x};
  const Segment segment(p, index);
  float* fold = fold_of(p, item, index);
  std::memset(s.up, 0, p.state * kLanes * sizeof(float));
  scan_positions<false>({}, s.up, s, source, 0, segment.begin, segment.end);
  Vec steps{};
  each_tile(0, segment.begin, segment.end, [&](int64_t start, int64_t count) {
    const Rows dt = source.dt(s.dt, 0, start, count);
    for (int64_t l = 0; l < count; ++l) steps += dt.get(l);
  });
  for (int64_t n = 0; n < p.state; ++n, fold += 2 * kLanes) {
    store(fold, exp2(steps * source.A(0, n) * kLog2E));
    store(fold + kLanes, load(s.up + n * kLanes));
  }
}

// The states that enter a segment. An infinite one and zero stay: the product underflows, or overflows where decays are
// above 1, before its factors do.
static void enter_segment(const SelectiveScanParams& p, float* states, int64_t item, int64_t index) {
  std::memset(states, 0, p.state * kLanes * sizeof(float));
  for (int64_t i = 0; i < index; ++i) {
    const float* fold = fold_of(p, item, i);
    for (int64_t n = 0; n < p.state; ++n, fold += 2 * kLanes) {
      const Vec h = load(states + n * kLanes);
      store(states + n * kLanes, select((h - h == 0.0f) & (h != 0.0f), h * load(fold), h) + load(fold + kLanes));
    }
  }
}

static void forward_block(const SelectiveScanParams& p, const Block& x, const ScanScratch& s, int64_t item,
                          int64_t index) {
  const TensorSource source{p, x};
  const Segment segment(p, index);
  const Elements out = p.out.at(x.batch, 0, x.channel, 0, segment.begin);
  const Rows place = needs_no_tile(out, p.out.channel, x.channels) ? in_place(out, p.out.position) : Rows{};
  enter_segment(p, s.up, item, index);
  scan_forward(source, s, place, segment.begin, segment.end, [&](Rows y, int64_t begin, int64_t count) {
    if (p.z)
      each_tile(0, begin, begin + count, [&](int64_t start, int64_t some) {
        const Rows z = source.rows(s.u, p.z, 0, start, some);
        const Rows sums = {y[start - begin], y.step};
        const auto gate = [&](auto together, int64_t l) {
          Pack<together> of_z;
          for (int i = 0; i < together; ++i) {
            of_z.v[i] = z.get(l + i);
            z.prefetch(l + i + kPrefetch);
          }
          of_z = silu(of_z);
          for (int i = 0; i < together; ++i) sums.set(l + i, sums.get(l + i) * of_z.v[i]);
        };
        int64_t l = 0;
        for (; l + kAhead <= some; l += kAhead) gate(std::integral_constant<int, kAhead>{}, l);
        for (; l < some; ++l) gate(std::integral_constant<int, 1>{}, l);
      });
    if (!place.data) write(y.data, p.out, x, 0, begin, count);
  });
  if (p.last_state && index + 1 == p.segments)
    store_tile(s.up, p.last_state.at(x.batch, 0, x.channel, 0, 0), p.last_state.channel, p.last_state.state, x.channels,
               p.state);
}

// row[l] += the sum over the lanes of tile[l].
static void add_lane_sums(float* row, const float* tile, int64_t count) {
  for (int64_t l = 0; l < count; l += kLanes) {
    const int64_t some = count - l < kLanes ? count - l : kLanes;
    Vec vectors[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) vectors[i] = i < some ? load(tile + (l + i) * kLanes) : Vec{};
    store_some(row + l, load_some(row + l, some) + sum_lanes(vectors), some);
  }
}

INLINE void add_lanes(float* values, Vec v, int64_t stride, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) values[c * stride] += v[c];
}

struct BackwardScratch {
  float *u, *delta, *dt, *dy, *du, *ddt, *decay, *carried, *product_b, *product_c, *rows, *adjoint, *states, *sum_u,
      *sum_y;
  BackwardScratch(float* s, const SelectiveScanParams& p) {
    constexpr int64_t tile = kScanBackwardChunk * kLanes;
    float** tiles[] = {&u, &delta, &dt, &dy, &du, &ddt, &decay, &carried, &product_b, &product_c};
    for (float** t : tiles) *t = s, s += tile;
    rows = s, s += 2 * kScanBackwardChunk;
    adjoint = s, s += kMaxState * kLanes;
    states = s, s += (p.length + kScanBackwardChunk - 1) / kScanBackwardChunk * p.state * kLanes;
    sum_u = s, s += p.length * kLanes;
    sum_y = s;
  }
};

// Direction k of one block over one chunk, positions against the scan's direction.
static void backward_chunk(const TensorSource& source, const BackwardScratch& s, int64_t k, int64_t start,
                           int64_t count, const float* entering, int64_t slice_index) {
  const SelectiveScanParams& p = source.p;
  const Block& x = source.x;
  const int64_t first = k == 1 ? count - 1 : 0, last = k == 1 ? 0 : count - 1, step = k == 1 ? -1 : 1;
  std::memset(s.ddt, 0, count * kLanes * sizeof(float));
  std::memset(s.du, 0, count * kLanes * sizeof(float));
  const int64_t channel_index = (x.batch * p.directions + k) * p.dim + x.channel;
  for (int64_t n = 0; n < p.state; ++n) {
    const Coefficient b = source.B(s.rows, k, n, start, count),
                      c = source.C(s.rows + kScanBackwardChunk, k, n, start, count);
    const Vec a = source.A(k, n);
    Vec h = load(entering + n * kLanes);
    for (int64_t i = 0, l = first; i < count; ++i, l += step) {
      const Vec dt = load(s.dt + l * kLanes), decay = exp2(dt * (a * kLog2E)), carried = decay * h;
      store(s.decay + l * kLanes, decay);
      store(s.carried + l * kLanes, carried);
      h = carried + dt * load(s.u + l * kLanes) * b[l];
    }
    Vec g = load(s.adjoint + n * kLanes), da{}, db{}, dc{};
    for (int64_t i = 0, l = last; i < count; ++i, l -= step) {
      const Vec u = load(s.u + l * kLanes), dt = load(s.dt + l * kLanes), dy = load(s.dy + l * kLanes);
      const Vec carried = load(s.carried + l * kLanes), drive = dt * u;
      g += c[l] * dy;
      const Vec gc = g * carried, gb = g * b[l], product_b = g * drive, product_c = dy * (carried + drive * b[l]);
      store(s.du + l * kLanes, load(s.du + l * kLanes) + gb * dt);
      store(s.ddt + l * kLanes, load(s.ddt + l * kLanes) + gc * a + gb * u);
      da += gc * dt;
      db += product_b;
      dc += product_c;
      store(s.product_b + l * kLanes, product_b);
      store(s.product_c + l * kLanes, product_c);
      g *= load(s.decay + l * kLanes);
    }
    store(s.adjoint + n * kLanes, g);
    add_lanes(p.partial_A + channel_index * p.state + n, da, p.state, x.channels);
    const int64_t row = (slice_index * p.state + n) * p.length + start;
    if (p.B_varies)
      add_lane_sums(p.partial_B + row, s.product_b, count);
    else
      add_lanes(p.partial_fixed_B + channel_index * p.state + n, db, p.state, x.channels);
    if (p.C_varies)
      add_lane_sums(p.partial_C + row, s.product_c, count);
    else
      add_lanes(p.partial_fixed_C + channel_index * p.state + n, dc, p.state, x.channels);
  }
  const Vec skip = source.D(k), bias = source.lanes(p.delta_bias, k, 0);
  Vec dd{}, dbias{};
  for (int64_t l = 0; l < count; ++l) {
    const Vec dy = load(s.dy + l * kLanes);
    Vec ddt = load(s.ddt + l * kLanes);
    if (p.softplus) {
      const Vec raw = load(s.delta + l * kLanes) + bias;
      ddt *= select(raw > 20.0f, splat(1.0f), sigmoid(raw));
    }
    store(s.ddt + l * kLanes, ddt);
    if (source.skips()) store(s.du + l * kLanes, load(s.du + l * kLanes) + skip * dy);
    dd += dy * load(s.u + l * kLanes);
    dbias += ddt;
  }
  add_lanes(p.partial_D + channel_index, dd, 1, x.channels);
  add_lanes(p.partial_delta_bias + channel_index, dbias, 1, x.channels);
}

static void backward_block(const SelectiveScanParams& p, const Block& x, const BackwardScratch& s, int64_t item) {
  constexpr int64_t chunk = kScanBackwardChunk;
  const int64_t chunks = (p.length + chunk - 1) / chunk;
  const TensorSource source{p, x};
  const bool shared_u = p.directions == 2 && p.grad_u.direction == 0;
  const ScanScratch scratch(s.sum_y + p.length * kLanes);
  if (p.z) {
    // The gate's gradient needs the sum of both directions: run the forward, ungated, into float32 in scratch.
    SelectiveScanParams ungated = p;
    ungated.z = ungated.last_state = {};
    ungated.out = {{s.sum_y - x.channel, DType::kFloat32}, 0, 0, 1, 0, kLanes};
    ungated.segments = 1;
    forward_block(ungated, x, scratch, 0, 0);
  }
  for (int64_t k = 0; k < p.directions; ++k) {
    entering_states(s.states, scratch, source, k, chunk);
    std::memset(s.adjoint, 0, p.state * kLanes * sizeof(float));
    if (p.grad_last_state) {
      const ScanTensor& t = p.grad_last_state;
      load_tile(s.adjoint, t.at(x.batch, 0, x.channel, 0, 0), t.channel, t.state, x.channels, p.state);
    }
    // Slices are numbered batch, group, slice; their sums batch, direction, group, slice.
    const int64_t per_batch = p.groups * p.slices;
    const int64_t slice_index = (item / per_batch * p.directions + k) * per_batch + item % per_batch;
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t c = k == 1 ? i : chunks - 1 - i, start = c * chunk;
      const int64_t count = p.length - start < chunk ? p.length - start : chunk;
      read(s.u, p.u, x, k, start, count);
      read(s.delta, p.delta, x, k, start, count);
      read(s.dy, p.grad_out, x, 0, start, count);
      source.steps(s.dt, {s.delta}, k, count);
      if (p.z) {
        read(s.decay, p.z, x, 0, start, count);
        for (int64_t l = 0; l < count; ++l) {
          const Vec z = load(s.decay + l * kLanes), gate = sigmoid(z), dy = load(s.dy + l * kLanes);
          store(s.carried + l * kLanes, dy * load(s.sum_y + (start + l) * kLanes) * gate * (1.0f + z * (1.0f - gate)));
          store(s.dy + l * kLanes, dy * z * gate);
        }
        if (k == 0) write(s.carried, p.grad_z, x, 0, start, count);
      }
      backward_chunk(source, s, k, start, count, s.states + c * p.state * kLanes, slice_index);
      write(s.ddt, p.grad_delta, x, k, start, count);
      float* sum = s.sum_u + start * kLanes;
      if (shared_u && k == 0) {
        std::memcpy(sum, s.du, count * kLanes * sizeof(float));
        continue;
      }
      if (shared_u)
        for (int64_t l = 0; l < count; ++l) store(s.du + l * kLanes, load(s.du + l * kLanes) + load(sum + l * kLanes));
      write(s.du, p.grad_u, x, k, start, count);
    }
  }
}

INLINE Block block_at(const SelectiveScanParams& p, int64_t batch, int64_t group, int64_t block) {
  const int64_t channels = p.dim / p.groups, offset = block * kLanes;
  const int64_t rest = channels - offset;
  return {batch, group, group * channels + offset, rest < kLanes ? rest : kLanes};
}

INLINE Block block_of(const SelectiveScanParams& p, int64_t item) {
  const int64_t blocks = scan_blocks(p, kLanes);
  return block_at(p, item / blocks / p.groups, item / blocks % p.groups, item % blocks);
}

}  // namespace

// Items: batch × groups × blocks × segments.
void selective_scan_fwd(const SelectiveScanParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t item = i / p.segments;
    forward_block(p, block_of(p, item), ScanScratch(p.scratch), item, i % p.segments);
  }
}

// Items: batch × groups × blocks × (segments - 1).
void selective_scan_fold(const SelectiveScanParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t item = i / (p.segments - 1);
    fold_segment(p, block_of(p, item), ScanScratch(p.scratch), item, i % (p.segments - 1));
  }
}

// Items: batch × groups × slices.
void selective_scan_bwd(const SelectiveScanParams& p, int64_t begin, int64_t end) {
  const int64_t blocks = scan_blocks(p, kLanes), per_slice = (blocks + p.slices - 1) / p.slices;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t slice = i % p.slices, group = i / p.slices;
    for (int64_t block = slice * per_slice; block < blocks && block < (slice + 1) * per_slice; ++block)
      backward_block(p, block_at(p, group / p.groups, group % p.groups, block), BackwardScratch(p.scratch, p), i);
  }
}

END_KERNELS
