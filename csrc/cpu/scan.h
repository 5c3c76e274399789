// The recurrence on a tile: lanes are channels, positions run one after the other, the state stays in a register.
#pragma once

#include "cpu/tile.h"

BEGIN_KERNELS
namespace {

// One state of kLanes channels through `count` positions, upwards or (reverse) downwards:
//   h = 2^(dt A) h + dt u B,   y += C h
// dt, u, y: tiles. a: A · log2(e). b, c: a value a position, or nullptr for the fixed values of the lanes.
// About 20 vector operations a position, 12 of them the exponential; the chain through h is one fused multiply-add.
template <bool kOutput>
INLINE Vec scan_tile(float* y, const float* dt, const float* u, Vec a, const float* b, Vec fixed_b, const float* c,
                     Vec fixed_c, Vec h, bool reverse, int64_t count) {
  const int64_t step = reverse ? -1 : 1;
  for (int64_t i = 0, l = reverse ? count - 1 : 0; i < count; ++i, l += step) {
    const Vec delta = load(dt + l * kLanes);
    const Vec drive = delta * load(u + l * kLanes) * (b ? splat(b[l]) : fixed_b);
    h = exp2(delta * a) * h + drive;
    if (kOutput) store(y + l * kLanes, load(y + l * kLanes) + (c ? splat(c[l]) : fixed_c) * h);
  }
  return h;
}

}  // namespace
END_KERNELS
