// cross_merge: cross_scan the other way round, with sums in float32 and in a fixed order.
#include "cuda/cross_scan.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

__global__ void __launch_bounds__(kCrossScanThreads) merge_kernel(CrossScanParams p, int64_t first) {
  float* tile = shared_memory;
  const CrossScanItem at(p, first + blockIdx.x);
  for (int64_t k = at.k; k < (p.one_by_one ? at.k + 1 : 4); ++k) {
    at.for_elements(p.map_of(k), [&](auto& element, int place) {
      tile[place] = k == at.k ? to_float(element) : tile[place] + to_float(element);
    });
    __syncthreads();
  }
  at.for_elements(p.image_of(at.k), [&](auto& element, int place) {
    element = from_float<std::remove_reference_t<decltype(element)>>(tile[place]);
  });
}

}  // namespace

cudaError_t cross_merge(const CrossScanParams& p, cudaStream_t stream) {
  return launch(merge_kernel, p, cross_scan_items(p), kCrossScanThreads, kCrossScanShared, stream);
}

}  // namespace mobilemamba
