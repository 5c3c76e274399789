// haar_idwt2d: haar_dwt2d the other way round.
#include "cuda/haar_tiles.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

__global__ void __launch_bounds__(Columns::kThreads) idwt_kernel(HaarParams p) {
  const Columns columns = haar_columns(p);
  for (int64_t item = blockIdx.x; item < columns.items(); item += gridDim.x) {
    const Column t(columns, item);
    for (int64_t y = t.begin; y < t.end; ++y) {
      HaarBlock bands;
      for (int i = 0; i < 4; ++i) bands.v[i] = load(p.bands.at(t.batch, t.channel, y, t.column) + i * p.band);
      const HaarBlock x = bands.transformed();
      for (int i = 0; i < 4; ++i) {
        const int64_t row = 2 * y + i / 2, column = 2 * t.column + i % 2;
        if (row < p.height && column < p.width) store(p.pixels.at(t.batch, t.channel, row, column), x.v[i]);
      }
    }
  }
}

}  // namespace

cudaError_t haar_idwt2d(const HaarParams& p, cudaStream_t stream) { return launch_haar<true>(idwt_kernel, p, stream); }

}  // namespace mobilemamba
