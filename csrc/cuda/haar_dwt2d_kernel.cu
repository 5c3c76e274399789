// haar_dwt2d, by tiles where these take pixels and bands. Else a thread reads 2×2 blocks down a column, element by
// element, and writes their bands. Bytes: the pixels once, the bands once.
#include "cuda/haar_tiles.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

__global__ void __launch_bounds__(Columns::kThreads) dwt_kernel(HaarParams p) {
  const Columns columns = haar_columns(p);
  for (int64_t item = blockIdx.x; item < columns.items(); item += gridDim.x) {
    const Column t(columns, item);
    for (int64_t y = t.begin; y < t.end; ++y) {
      HaarBlock x{};
      for (int i = 0; i < 4; ++i) {
        const int64_t row = 2 * y + i / 2, column = 2 * t.column + i % 2;
        if (row < p.height && column < p.width) x.v[i] = load(p.pixels.at(t.batch, t.channel, row, column));
      }
      const HaarBlock bands = x.transformed();
      for (int i = 0; i < 4; ++i) store(p.bands.at(t.batch, t.channel, y, t.column) + i * p.band, bands.v[i]);
    }
  }
}

}  // namespace

cudaError_t haar_dwt2d(const HaarParams& p, cudaStream_t stream) { return launch_haar<false>(dwt_kernel, p, stream); }

}  // namespace mobilemamba
