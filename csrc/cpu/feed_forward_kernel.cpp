// The feed-forward pair: both products of a block of positions one after the other, their hidden channels in cache.
#include "cpu/products.h"
#include "include/capability.h"
#include "include/feed_forward.h"

DECLARE_KERNEL(feed_forward, FeedForwardParams)

BEGIN_KERNELS

void feed_forward(const FeedForwardParams& p, int64_t begin, int64_t end) {
  const PackedWeight &w1 = p.first.weight, &w2 = p.second.weight;
  const int64_t step = packed_depth(w2.depth, w2.bfloat16);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = p.positions * block / p.blocks, count = p.positions * (block + 1) / p.blocks - first;
    float* hidden = p.scratch;
    float* x = hidden + count * step;
    float* memory = x + product_input(p.first, count);
    const Input in = read_input(p.first, first, count, x, memory);
    const DType type = w2.bfloat16 ? DType::kBFloat16 : DType::kFloat32;
    const Slab slab{
        w1, p.first.bias, p.first.activation, in.data, in.step, 1, 0, count, {hidden, type}, step, {}, {}, 0, 0};
    multiply(slab, 0, packed_panels(w1.outputs));
    if (step > w2.depth)
      for (int64_t i = 0; i < count; ++i) reinterpret_cast<BFloat16*>(hidden)[i * step + w2.depth] = {};
    run_product(p.second, {hidden, step}, first, count, 0, packed_panels(w2.outputs), memory);
  }
}

END_KERNELS
