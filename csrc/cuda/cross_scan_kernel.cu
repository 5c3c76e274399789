// cross_scan: each tile of an image is read once and written four times, by way of shared memory where it has to be
// written in another order. Elements are copied as they are, so that a kernel is of their size alone.
#include "cuda/cross_scan.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

template <class T, int kPositions, int kChannels, bool kCross>
__global__ void __launch_bounds__(kCrossThreads, 4) scan_kernel(CrossPlan p) {
  const CrossTile<T, kCross> tile(p);
  const Waiting<T, kPositions, kChannels> waiting(p);
  const auto store = [&](unsigned sequences, auto along, const Place& at, const auto& run) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (sequences >> k & 1) tile.template store<along>(k, at, run);
  };
  constexpr std::integral_constant<int, kChannel> channels;
  constexpr std::integral_constant<int, kColumn> rows;
  constexpr std::integral_constant<int, kRow> columns;

  if (p.image_inside) {
    tile.template walk<kChannel, kChannels, 2>(
        [&](const Place& at) { return tile.template load<kChannel, kChannels>(at); },
        [&](const Place& at, const auto& run) {
          p.sequence_inside ? store(tile.all(), channels, at, run) : waiting.template put<kChannel>(at, run);
        });
    if (p.sequence_inside) return;
    __syncthreads();
  }
  const auto by_rows = [&](auto load, auto keep) {
    tile.template walk<kColumn, kPositions, 2>(load, [&](const Place& at, const auto& run) {
      if (!p.sequence_inside) store(tile.by_rows(), rows, at, run);
      keep(at, run);
    });
  };
  if (p.image_inside) {
    by_rows([&](const Place& at) { return waiting.template get<kColumn, kPositions>(at); },
            [](const Place&, const auto&) {});
  } else {
    by_rows([&](const Place& at) { return tile.template load<kColumn, kPositions>(at); },
            [&](const Place& at, const auto& run) { waiting.template put<kColumn>(at, run); });
    __syncthreads();
  }
  if (p.sequence_inside) {
    tile.template walk<kChannel, kChannels, 1>(
        [&](const Place& at) { return waiting.template get<kChannel, kChannels>(at); },
        [&](const Place& at, const auto& run) { store(tile.all(), channels, at, run); });
  } else if (tile.by_columns()) {
    tile.template walk<kRow, kPositions, 1>(
        [&](const Place& at) { return waiting.template get<kRow, kPositions>(at); },
        [&](const Place& at, const auto& run) { store(tile.by_columns(), columns, at, run); });
  }
}

}  // namespace

cudaError_t cross_scan(const CrossScanParams& p, cudaStream_t stream) {
  const auto run = [&](auto bits) {
    using T = decltype(bits);
    return launch_cross<T>(
        p, sizeof(T),
        [](auto positions, auto channels, auto cross) {
          return scan_kernel<T, decltype(positions)::value, decltype(channels)::value, decltype(cross)::value>;
        },
        stream);
  };
  return element_size(p.image.elements.dtype) == 4 ? run(uint32_t{}) : run(uint16_t{});
}

}  // namespace mobilemamba
