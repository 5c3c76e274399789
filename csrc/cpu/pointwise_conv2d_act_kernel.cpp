// Pointwise convolution: a matrix product of a block of positions and a group of the weight's panels. The positions
// come to it where they lie or, of another type or layout or with an activation, from scratch in cache.
#include "cpu/products.h"
#include "include/capability.h"
#include "include/pointwise_conv2d_act.h"

DECLARE_KERNEL(pointwise_conv2d_act, PointwiseConv2dActParams)

BEGIN_KERNELS

void pointwise_conv2d_act(const PointwiseConv2dActParams& p, int64_t begin, int64_t end) {
  const int64_t panels = packed_panels(p.product.weight.outputs);
  Input in{};
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / p.groups, group = item % p.groups;
    const int64_t first = p.positions * block / p.blocks, count = p.positions * (block + 1) / p.blocks - first;
    float* memory = p.scratch + product_input(p.product, count);
    if (item == begin || group == 0) in = read_input(p.product, first, count, p.scratch, memory);
    run_product(p.product, in, first, count, panels * group / p.groups, panels * (group + 1) / p.groups, memory);
  }
}

END_KERNELS
