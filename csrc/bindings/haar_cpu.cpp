// The transforms on the CPU.
#include "bindings/haar.h"
#include "include/haar_dwt2d.h"
#include "include/haar_idwt2d.h"

namespace mobilemamba {
namespace {

void run(void (*kernel)(const HaarParams&, int64_t, int64_t), const Tensor& pixels, const Tensor& bands) {
  const HaarParams p = haar_params(pixels, bands);
  if (pixels.numel() == 0) return;
  const int64_t strips = ceil_div(half(p.height), kHaarStrip);
  const int64_t items = p.batch * ceil_div(p.channels, vector_lanes()) * strips;
  const int64_t positions = std::min(kHaarStrip, half(p.height)) * half(p.width);  // of an item, each about ten cycles
  torch::stable::parallel_for(0, items, std::max<int64_t>(1, 2048 / positions),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

void run_haar_dwt2d(const Tensor& pixels, const Tensor& bands) { run(KERNEL(haar_dwt2d), pixels, bands); }
void run_haar_idwt2d(const Tensor& pixels, const Tensor& bands) { run(KERNEL(haar_idwt2d), pixels, bands); }

}  // namespace mobilemamba
