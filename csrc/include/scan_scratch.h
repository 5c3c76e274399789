// How much a scan keeps in cache.
#pragma once

#include <cstdint>

namespace mobilemamba {

constexpr int64_t kScanTile = 256;       // positions of a tile of inputs
constexpr int64_t kScanStatesTile = 64;  // of one that many states go through, with their B and C
constexpr int64_t kScanChunk = 1024;     // positions of a sum that is converted when both directions are in it
constexpr int64_t kMaxState = 256;

// Floats of one thread's scratch for a forward over vectors of `lanes`.
inline int64_t scan_fwd_scratch(int64_t length, int64_t state, int64_t lanes) {
  const int64_t chunks = (length + kScanChunk - 1) / kScanChunk;
  return (4 * kScanTile + kScanChunk + kMaxState + chunks * state) * lanes + 2 * kScanTile;
}

}  // namespace mobilemamba
