// The selective scan over tiles: lanes are channels, positions run one after the other, a state stays in a register.
//
// Where u, Δ, B, C, A and D come from is a Source's business:
//   int64_t length, state, directions; bool shared_u;
//   void inputs(float* u, float* dt, int64_t k, int64_t start, int64_t count);  // u = nullptr: it is kept for k = 1 if
//   shared Coefficient B(float* row, int64_t k, int64_t n, int64_t start, int64_t count), C(the same); Vec A(int64_t k,
//   int64_t n), D(int64_t k);  bool skips();  // whether there is a D
#pragma once

#include "cpu/tile.h"
#include "include/scan_scratch.h"

BEGIN_KERNELS
namespace {

// B or C of one state: a row with a value a position, or (row == nullptr) a fixed value a lane.
struct Coefficient {
  const float* row;
  Vec fixed;
  INLINE_MEMBER Vec operator[](int64_t l) const { return row ? splat(row[l]) : fixed; }
};

// One state through `count` positions, upwards or (reverse) downwards: h = 2^(dt a) h + dt u B, y += C h, with a = A
// log2 e. About 20 vector operations a position, 12 of them the exponential; the chain through h is one fused
// multiply-add.
// The first state of a direction starts its share of y with skip u, or nothing if it does not skip.
enum class Output { kNone, kFirst, kFurther };
struct Start {
  bool accumulates, skips;
  Vec skip;
};
template <Output kOutput>
INLINE Vec scan_tile(float* y, const float* dt, const float* u, Vec a, Coefficient b, Coefficient c, Vec h,
                     bool reverse, int64_t count, Start start) {
  const int64_t step = reverse ? -1 : 1;
  for (int64_t i = 0, l = reverse ? count - 1 : 0; i < count; ++i, l += step) {
    const Vec delta = load(dt + l * kLanes);
    const Vec input = load(u + l * kLanes);
    h = exp2(delta * a) * h + delta * input * b[l];
    if (kOutput == Output::kNone) continue;
    Vec sum = kOutput == Output::kFurther || start.accumulates ? load(y + l * kLanes) : Vec{};
    if (kOutput == Output::kFirst && start.skips) sum += start.skip * input;
    store(y + l * kLanes, sum + c[l] * h);
  }
  return h;
}

// Every state of direction k over a chunk whose u and dt are in tiles; h: kLanes values a state, updated.
template <bool kOutput, class Source>
static void scan_chunk(float* y, const float* dt, const float* u, float* h, float* rows, const Source& source,
                       int64_t k, int64_t start, int64_t count) {
  // An absent D is not D = 0: 0 · infinity is NaN.
  const Start first = {k == 1, source.skips(), source.skips() ? source.D(k) : Vec{}};
  for (int64_t n = 0; n < source.state; ++n) {
    const Coefficient b = source.B(rows, k, n, start, count);
    const Coefficient c = kOutput ? source.C(rows + kScanChunk, k, n, start, count) : Coefficient{};
    const Vec a = source.A(k, n) * kLog2E, entering = load(h + n * kLanes);
    const Vec leaving = !kOutput ? scan_tile<Output::kNone>(y, dt, u, a, b, c, entering, k == 1, count, first)
                        : n == 0 ? scan_tile<Output::kFirst>(y, dt, u, a, b, c, entering, k == 1, count, first)
                                 : scan_tile<Output::kFurther>(y, dt, u, a, b, c, entering, k == 1, count, first);
    store(h + n * kLanes, leaving);
  }
}

// Writes the states that enter every chunk of direction k: `state` times kLanes values a chunk.
template <class Source>
static void entering_states(float* states, float* dt, float* u, float* rows, const Source& source, int64_t k,
                            int64_t chunk) {
  const int64_t chunks = (source.length + chunk - 1) / chunk, size = source.state * kLanes;
  const int64_t first = k == 1 ? chunks - 1 : 0, step = k == 1 ? -1 : 1;
  std::memset(states + first * size, 0, size * sizeof(float));
  for (int64_t i = 0, c = first; i + 1 < chunks; ++i, c += step) {
    const int64_t start = c * chunk, count = source.length - start < chunk ? source.length - start : chunk;
    float* next = states + (c + step) * size;
    std::memcpy(next, states + c * size, size * sizeof(float));
    source.inputs(u, dt, k, start, count);
    scan_chunk<false>(nullptr, dt, u, next, rows, source, k, start, count);
  }
}

// One thread's tiles for scan_forward: scan_fwd_scratch floats.
struct ScanScratch {
  float *u, *dt, *y, *rows, *up, *down;
  explicit ScanScratch(float* s)
      : u(s),
        dt(u + kScanChunk * kLanes),
        y(dt + kScanChunk * kLanes),
        rows(y + kScanChunk * kLanes),
        up(rows + 2 * kScanChunk),
        down(up + kMaxState * kLanes) {}
};

// Scans all directions chunk by chunk and hands each chunk's sum to write(y, start, count). The second direction's
// states at the chunks' ends are found first, by a pass of their own that a sequence of one chunk does not need. On
// return scratch.up holds the last states of direction 0.
template <class Source, class Write>
static void scan_forward(const Source& source, const ScanScratch& s, Write write) {
  const int64_t size = source.state * kLanes;
  std::memset(s.up, 0, size * sizeof(float));
  if (source.directions == 2) entering_states(s.down, s.dt, s.u, s.rows, source, 1, kScanChunk);
  for (int64_t start = 0; start < source.length; start += kScanChunk) {
    const int64_t count = source.length - start < kScanChunk ? source.length - start : kScanChunk;
    for (int64_t k = 0; k < source.directions; ++k) {
      source.inputs(k == 1 && source.shared_u ? nullptr : s.u, s.dt, k, start, count);
      float* h = k == 0 ? s.up : s.down + start / kScanChunk * size;
      scan_chunk<true>(s.y, s.dt, s.u, h, s.rows, source, k, start, count);
    }
    write(s.y, start, count);
  }
}

}  // namespace
END_KERNELS
