// Packs a weight for the matrix products: transposes tiles of it, outputs side by side.
#include "cpu/tile.h"
#include "include/capability.h"
#include "include/pack_weight.h"

DECLARE_KERNEL(pack_weight, PackWeightParams)

BEGIN_KERNELS
namespace {

// Numbers `depth` … of the lanes' outputs, one number after the other or in pairs.
INLINE void put(float* panel, int64_t width, int64_t lane, int64_t depth, Vec v) {
  store(panel + depth * width + lane, v);
}
INLINE void put(BFloat16* panel, int64_t width, int64_t lane, int64_t depth, Vec v) {
  BFloat16 rounded[kLanes];
  store(rounded, v);
  BFloat16* to = panel + depth / 2 * 2 * width + lane * 2 + depth % 2;
  for (int i = 0; i < kLanes; ++i) to[2 * i] = rounded[i];
}

template <class T>
static void pack(const PackWeightParams& p, T* panel, int64_t begin, int64_t width) {
  const int64_t depth = p.packed.depth;
  for (int64_t lane = 0; lane < width; lane += kLanes) {
    const int64_t left = p.packed.outputs - begin - lane, outputs = left < 0 ? 0 : left < kLanes ? left : kLanes;
    int64_t at = 0;
    for (int64_t y = 0; y < p.rows; ++y)
      for (int64_t x = 0; x < p.columns; ++x)
        for (int64_t c = 0; c < p.channels; c += kPackTile) {
          const int64_t count = p.channels - c < kPackTile ? p.channels - c : kPackTile;
          if (outputs > 0)
            load_tile(p.scratch, p.weight.at(begin + lane, c, y, x), p.weight.batch, p.weight.channel, outputs, count);
          for (int64_t i = 0; i < count; ++i, ++at)
            put(panel, width, lane, at, outputs > 0 ? load(p.scratch + i * kLanes) : Vec{});
        }
    if (at < packed_depth(depth, p.packed.bfloat16)) put(panel, width, lane, at, Vec{});
  }
}

}  // namespace

void pack_weight(const PackWeightParams& p, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t from = panel_begin(p.packed.outputs, panel), to = panel_begin(p.packed.outputs, panel + 1);
    const int64_t offset = from * packed_depth(p.packed.depth, p.packed.bfloat16);
    if (p.packed.bfloat16)
      pack(p, static_cast<BFloat16*>(p.to) + offset, from, to - from);
    else
      pack(p, static_cast<float*>(p.to) + offset, from, to - from);
  }
}

END_KERNELS
