// The selective scan over rows: lanes are channels, positions run one after the other, a state stays in a register.
//
// Where u, Δ, B, C, A and D come from is a Source's business:
//   int64_t length, state, directions;
//   Rows u(float* tile, int64_t k, int64_t start, int64_t count), dt(the same);
//   Coefficient B(float* row, int64_t k, int64_t n, int64_t start, int64_t count), C(the same);
//   Vec A(int64_t k, int64_t n), D(int64_t k);  bool skips();  // whether there is a D
#pragma once

#include "cpu/tile.h"
#include "include/scan_scratch.h"

BEGIN_KERNELS
namespace {

// B or C of one state: a value a position, or (values == nullptr) a fixed value a lane.
struct Coefficient {
  const float* values;
  int64_t step;
  Vec fixed;
  INLINE_MEMBER Vec operator[](int64_t l) const { return values ? splat(values[l * step]) : fixed; }
};

// Calls f(start, count) for every tile of at most kScanTile positions in [begin, end), in the order of direction k.
template <class F>
INLINE void each_tile(int64_t k, int64_t begin, int64_t end, F f, int64_t tile = kScanTile) {
  const int64_t tiles = (end - begin + tile - 1) / tile;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t start = begin + (k == 1 ? tiles - 1 - i : i) * tile;
    f(start, end - start < tile ? end - start : tile);
  }
}

// Positions whose exponentials are taken together, and how far ahead rows are fetched: about 16 positions take as long
// as the last level of cache.
constexpr int kAhead = 4;
constexpr int64_t kPrefetch = 16;

// One state through `count` positions, upwards or (reverse) downwards: h = 2^(dt a) h + dt u B, y += C h, with a = A
// log2 e. The chain through h is one fused multiply-add a position. kModerate: |dt a| is below kModerateExponent
// everywhere. kDriven: `u` is dt u already, and y has begun, as it is where there are many states. A single state
// begins it with skip u, or nothing if it does not skip.
struct Start {
  bool accumulates, skips;
  Vec skip;
};
template <bool kOutput, bool kDriven, bool kModerate>
INLINE Vec scan_tile(Rows y, Rows dt, Rows u, Vec a, Coefficient b, Coefficient c, Vec h, bool reverse, int64_t count,
                     Start start) {
  const int64_t first = reverse ? count - 1 : 0, step = reverse ? -1 : 1;
  const auto positions = [&](auto together, int64_t l) {
    Pack<together> decay;
    for (int i = 0; i < together; ++i) decay.v[i] = dt.get(l + i * step) * a;
    decay = kModerate ? moderate_exp2(decay) : exp2(decay);
    for (int i = 0; i < together; ++i, l += step) {
      const Vec input = u.get(l);
      if (!kDriven) u.prefetch(l + step * kPrefetch);
      // Held, lest the compiler fuse this product with the sum and leave two operations in the chain through h.
      const Vec inflow = held((kDriven ? input : dt.get(l) * input) * b[l]);
      h = decay.v[i] * h + inflow;
      if (!kOutput) continue;
      if (!kDriven) y.prefetch(l + step * kPrefetch);
      Vec sum = kDriven || start.accumulates ? y.get(l) : Vec{};
      if (!kDriven && start.skips) sum += start.skip * input;
      y.set(l, sum + c[l] * h);
    }
  };
  int64_t i = 0;
  for (; i + kAhead <= count; i += kAhead) positions(std::integral_constant<int, kAhead>{}, first + i * step);
  for (; i < count; ++i) positions(std::integral_constant<int, 1>{}, first + i * step);
  return h;
}

// Two states at once through a tile, as scan_tile<kOutput, true, kModerate> takes them one by one: what they share is
// loaded once. B and C have a value a position.
template <bool kOutput, bool kModerate>
INLINE void scan_two(float* y, const float* dt, const float* drive, Vec (&a)[2], const Coefficient (&b)[2],
                     const Coefficient (&c)[2], float* states, bool reverse, int64_t count) {
  const int64_t first = reverse ? count - 1 : 0, step = reverse ? -1 : 1;
  y += first * kLanes, dt += first * kLanes, drive += first * kLanes;
  const float *b0 = b[0].values + first * b[0].step, *b1 = b[1].values + first * b[1].step;
  const float *c0 = kOutput ? c[0].values + first * c[0].step : nullptr,
              *c1 = kOutput ? c[1].values + first * c[1].step : nullptr;
  const int64_t row = step * kLanes, b_step = step * b[0].step, c_step = step * c[0].step;
  Vec h0 = load(states), h1 = load(states + kLanes);
  const Vec a0 = a[0], a1 = a[1];
  const auto positions = [&](auto together) ALWAYS_INLINE {
    Pack<2 * together> decay;
    for (int i = 0; i < together; ++i) {
      const Vec steps = load(dt + i * row);
      decay.v[2 * i] = steps * a0;
      decay.v[2 * i + 1] = steps * a1;
    }
    decay = kModerate ? moderate_exp2(decay) : exp2(decay);
    for (int i = 0; i < together; ++i) {
      const Vec input = load(drive);
      const Vec inflow0 = held(input * splat(*b0)), inflow1 = held(input * splat(*b1));
      h0 = decay.v[2 * i] * h0 + inflow0;
      h1 = decay.v[2 * i + 1] * h1 + inflow1;
      if (kOutput) {
        store(y, load(y) + splat(*c0) * h0 + splat(*c1) * h1);
        y += row, c0 += c_step, c1 += c_step;
      }
      drive += row, b0 += b_step, b1 += b_step;
    }
    dt += together * row;
  };
  int64_t i = 0;
  for (; i + kAhead <= count; i += kAhead) positions(std::integral_constant<int, kAhead>{});
  for (; i < count; ++i) positions(std::integral_constant<int, 1>{});
  store(states, h0);
  store(states + kLanes, h1);
}

// One thread's tiles: scan_fwd_scratch floats.
struct ScanScratch {
  float *u, *dt, *drive, *sums, *rows, *y, *up, *down;
  explicit ScanScratch(float* s)
      : u(s),
        dt(u + kScanTile * kLanes),
        drive(dt + kScanTile * kLanes),
        sums(drive + kScanTile * kLanes),
        rows(sums + kScanTile * kLanes),
        y(rows + 2 * kScanTile),
        up(y + kScanChunk * kLanes),
        down(up + kMaxState * kLanes) {}
};

// Every state of direction k over the positions from `begin` to `end`; h: kLanes values a state, updated; y: of begin.
template <bool kOutput, class Source>
static void scan_positions(Rows y, float* h, const ScanScratch& s, const Source& source, int64_t k, int64_t begin,
                           int64_t end) {
  // An absent D is not D = 0: 0 · infinity is NaN.
  const Start first = {k == 1, source.skips(), source.skips() ? source.D(k) : Vec{}};
  const bool driven = source.state > 1;
  const auto scan_one_tile = [&](int64_t start, int64_t count) {
    const Rows u = source.u(s.u, k, start, count), dt = source.dt(s.dt, k, start, count);
    const Rows out = {y[start - begin], y.step}, drive = {s.drive}, sums = {s.sums};
    IntVec largest{};  // as integers magnitudes have the same order, and NaN is above all
    for (int64_t l = 0; (driven || kHasModerate) && l < count; ++l) {
      const IntVec size = reinterpret_cast<IntVec>(magnitude(dt.get(l)));
      largest = size > largest ? size : largest;
      if (!driven) continue;
      const Vec input = u.get(l);
      u.prefetch(l + kPrefetch);
      drive.set(l, dt.get(l) * input);
      store(s.dt + l * kLanes, dt.get(l));
      if (kOutput) sums.set(l, first.skips ? first.skip * input : Vec{});
    }
    int64_t n = 0;
    for (; driven && n + 2 <= source.state; n += 2) {
      const Coefficient b[] = {source.B(s.rows, k, n, start, count),
                               source.B(s.rows + kScanStatesTile, k, n + 1, start, count)};
      const Coefficient none{}, c[] = {kOutput ? source.C(s.rows + 2 * kScanStatesTile, k, n, start, count) : none,
                                       kOutput ? source.C(s.rows + 3 * kScanStatesTile, k, n + 1, start, count) : none};
      if (!b[0].values || (kOutput && !c[0].values)) break;
      Vec a[] = {source.A(k, n) * kLog2E, source.A(k, n + 1) * kLog2E};
      const Vec most = magnitude(a[0]) > magnitude(a[1]) ? magnitude(a[0]) : magnitude(a[1]);
      if (kHasModerate && all(reinterpret_cast<Vec>(largest) * most < kModerateExponent))
        scan_two<kOutput, kHasModerate>(s.sums, s.dt, s.drive, a, b, c, h + n * kLanes, k == 1, count);
      else
        scan_two<kOutput, false>(s.sums, s.dt, s.drive, a, b, c, h + n * kLanes, k == 1, count);
    }
    for (; n < source.state; ++n) {
      const Coefficient b = source.B(s.rows, k, n, start, count);
      const Coefficient c = kOutput ? source.C(s.rows + kScanTile, k, n, start, count) : Coefficient{};
      const Vec a = source.A(k, n) * kLog2E;
      const auto scan = [&](auto is_driven, auto is_moderate) {
        const Vec entering = load(h + n * kLanes);
        store(h + n * kLanes,
              scan_tile<kOutput, is_driven, is_moderate>(is_driven ? sums : out, dt, is_driven ? drive : u, a, b, c,
                                                         entering, k == 1, count, first));
      };
      const bool moderate = kHasModerate && all(reinterpret_cast<Vec>(largest) * magnitude(a) < kModerateExponent);
      if (driven)
        moderate ? scan(std::true_type{}, std::bool_constant<kHasModerate>{})
                 : scan(std::true_type{}, std::false_type{});
      else
        moderate ? scan(std::false_type{}, std::bool_constant<kHasModerate>{})
                 : scan(std::false_type{}, std::false_type{});
    }
    for (int64_t l = 0; kOutput && driven && l < count; ++l)
      out.prefetch(l + kPrefetch), out.set(l, first.accumulates ? out.get(l) + sums.get(l) : sums.get(l));
  };
  each_tile(k, begin, end, scan_one_tile, driven ? kScanStatesTile : kScanTile);
}

// Writes the states that enter every chunk of direction k: `state` times kLanes values a chunk.
template <class Source>
static void entering_states(float* states, const ScanScratch& s, const Source& source, int64_t k, int64_t chunk) {
  const int64_t chunks = (source.length + chunk - 1) / chunk, size = source.state * kLanes;
  const int64_t first = k == 1 ? chunks - 1 : 0, step = k == 1 ? -1 : 1;
  std::memset(states + first * size, 0, size * sizeof(float));
  for (int64_t i = 0, c = first; i + 1 < chunks; ++i, c += step) {
    const int64_t start = c * chunk, end = source.length < start + chunk ? source.length : start + chunk;
    float* next = states + (c + step) * size;
    std::memcpy(next, states + c * size, size * sizeof(float));
    scan_positions<false>({}, next, s, source, k, start, end);
  }
}

// Scans all directions over the positions from `begin` (not 0 only of a single direction) to `last` and hands their sum
// to write(y, start, count). Where the result lies in memory as float32 rows, `in_place` is that memory, and the sum is
// made there, for all positions at once; else it is made chunk by chunk, after a pass that finds the second direction's
// states at the chunks' ends. scratch.up holds the states of direction 0 that enter and, on return, that leave.
template <class Source, class Write>
static void scan_forward(const Source& source, const ScanScratch& s, Rows in_place, int64_t begin, int64_t last,
                         Write write) {
  const int64_t size = source.state * kLanes, chunk = in_place.data ? last - begin : kScanChunk;
  if (begin == last) return;
  if (source.directions == 2) entering_states(s.down, s, source, 1, chunk);
  for (int64_t start = begin; start < last; start += chunk) {
    const int64_t end = last - start < chunk ? last : start + chunk;
    const Rows y = in_place.data ? in_place : Rows{s.y};
    for (int64_t k = 0; k < source.directions; ++k)
      scan_positions<true>(y, k == 0 ? s.up : s.down + start / chunk * size, s, source, k, start, end);
    write(y, start, end - start);
  }
}

}  // namespace
END_KERNELS
