// cross_scan: each block of an image is read once and written four times.
#include "cuda/cross_scan.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

__global__ void __launch_bounds__(kCrossScanThreads) scan_kernel(CrossScanParams p, int64_t first) {
  float* tile = shared_memory;
  const CrossScanItem at(p, first + blockIdx.x);
  at.for_elements(p.image_of(at.k), [&](auto& element, int place) { tile[place] = to_float(element); });
  __syncthreads();
  for (int64_t k = at.k; k < (p.one_by_one ? at.k + 1 : 4); ++k)
    at.for_elements(p.map_of(k), [&](auto& element, int place) {
      element = from_float<std::remove_reference_t<decltype(element)>>(tile[place]);
    });
}

}  // namespace

cudaError_t cross_scan(const CrossScanParams& p, cudaStream_t stream) {
  return launch(scan_kernel, p, cross_scan_items(p), kCrossScanThreads, kCrossScanShared, stream);
}

}  // namespace mobilemamba
