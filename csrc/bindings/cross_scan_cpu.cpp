// Both ways on the CPU.
#include "bindings/cross_scan.h"

namespace mobilemamba {
namespace {

void run(void (*kernel)(const CrossScanParams&, int64_t, int64_t), const CrossScanParams& p) {
  if (p.batch * p.channels * p.height * p.width == 0) return;
  const CrossScanBlock block(p);
  const int64_t items = p.images() * ceil_div(p.channels, block.size[0]) * ceil_div(p.height, block.size[1]);
  const int64_t pixels = std::min(block.size[0], p.channels) * std::min(block.size[1], p.height) * p.width;
  torch::stable::parallel_for(0, items, std::max<int64_t>(1, 8192 / pixels),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

void run_cross_scan(const CrossScanParams& p, const Tensor&) { run(KERNEL(cross_scan), p); }
void run_cross_merge(const CrossScanParams& p, const Tensor&) { run(KERNEL(cross_merge), p); }

}  // namespace mobilemamba
