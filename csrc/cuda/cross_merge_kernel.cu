// cross_merge: cross_scan the other way round. Each sequence is read once and what they add up to is written once, with
// sums in float32 and in a fixed order: those of the sequences that go backwards with those that go forwards, first by
// rows, then by columns. Of a tile, float32 sums wait in shared memory for what lies in another order.
#include "cuda/cross_scan.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

template <class T, int kRun>
__device__ __forceinline__ Run<float, kRun> widened(const Run<T, kRun>& run) {
  using Narrow = Run<T, kRun>;
  Run<float, kRun> wide;
#pragma unroll
  for (int i = 0; i < Narrow::kWords; ++i) {
    if constexpr (Narrow::kPerWord == 2) {
      const float2 two = TwoChannels<T>{{run.words[i]}}.floats();
      wide.words[2 * i] = two.x, wide.words[2 * i + 1] = two.y;
    } else {
      wide.words[i] = to_float(run.words[i]);
    }
  }
  return wide;
}

template <class T, int kRun>
__device__ __forceinline__ Run<T, kRun> narrowed(const Run<float, kRun>& wide) {
  using Narrow = Run<T, kRun>;
  Narrow run;
#pragma unroll
  for (int i = 0; i < Narrow::kWords; ++i) {
    if constexpr (Narrow::kPerWord == 2)
      run.words[i] = TwoChannels<T>::of({wide.words[2 * i], wide.words[2 * i + 1]}).words[0];
    else
      run.words[i] = from_float<T>(wide.words[i]);
  }
  return run;
}

template <int kRun>
__device__ __forceinline__ void add(Run<float, kRun>& sum, const Run<float, kRun>& run) {
#pragma unroll
  for (int j = 0; j < kRun; ++j) sum.words[j] += run.words[j];
}

template <int kRun>
__device__ __forceinline__ Run<float, kRun> nothing() {  // −0 changes no sum
  Run<float, kRun> run;
#pragma unroll
  for (int j = 0; j < kRun; ++j) run.words[j] = -0.0f;
  return run;
}

// A run of some of the sequences, a bit each.
template <class T, int kRun>
struct Four {
  Run<T, kRun> runs[4];

  template <int kAlong, bool kCross>
  static __device__ __forceinline__ Four load(const CrossTile<T, kCross>& tile, unsigned sequences, const Place& at) {
    Four four;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (sequences >> k & 1) four.runs[k] = tile.template load<kAlong, kRun>(k, at);
    return four;
  }
  __device__ __forceinline__ Run<float, kRun> sum(unsigned sequences) const {
    Run<float, kRun> sum = nothing<kRun>();
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      Run<float, kRun> both = nothing<kRun>();
      if (sequences >> k & 1) both = widened(runs[k]);
      if (sequences >> k & 4) add(both, widened(runs[k + 2]));
      add(sum, both);
    }
    return sum;
  }
};

template <class T, int kPositions, int kChannels, bool kCross>
__global__ void __launch_bounds__(kCrossThreads, 3) merge_kernel(CrossPlan p) {
  constexpr auto loads = [](int run) { return (run * sizeof(T) < 16 ? 4 : 2) / (kCross ? 1 : 2); };  // registers
  constexpr int kChannelLoads = loads(kChannels), kPositionLoads = loads(kPositions);
  const CrossTile<T, kCross> tile(p);
  const Waiting<float, kPositions, kChannels> waiting(p);

  const auto by_rows = [&](unsigned sequences) {
    tile.template walk<kColumn, kPositions, kPositionLoads>(
        [&](const Place& at) { return Four<T, kPositions>::template load<kColumn>(tile, sequences, at); },
        [&](const Place& at, const auto& four) {
          auto sum = four.sum(sequences);
          if (!sequences || tile.by_columns()) add(sum, waiting.template get<kColumn, kPositions>(at));
          if (p.image_inside)
            waiting.template put<kColumn, kPositions>(at, sum);
          else
            tile.template store<kColumn, kPositions>(at, narrowed<T>(sum));
        });
  };

  if (p.sequence_inside) {
    tile.template walk<kChannel, kChannels, kChannelLoads>(
        [&](const Place& at) { return Four<T, kChannels>::template load<kChannel>(tile, tile.all(), at); },
        [&](const Place& at, const auto& four) {
          const auto sum = four.sum(tile.all());
          if (p.image_inside)
            tile.template store<kChannel, kChannels>(at, narrowed<T>(sum));
          else
            waiting.template put<kChannel, kChannels>(at, sum);
        });
    if (p.image_inside) return;
    __syncthreads();
    return by_rows(0);
  }
  if (const unsigned sequences = tile.by_columns()) {
    tile.template walk<kRow, kPositions, kPositionLoads>(
        [&](const Place& at) { return Four<T, kPositions>::template load<kRow>(tile, sequences, at); },
        [&](const Place& at, const auto& four) { waiting.template put<kRow, kPositions>(at, four.sum(sequences)); });
    __syncthreads();
  }
  by_rows(tile.by_rows());
  if (!p.image_inside) return;
  __syncthreads();
  tile.template walk<kChannel, kChannels, 1>(
      [&](const Place& at) { return waiting.template get<kChannel, kChannels>(at); },
      [&](const Place& at, const auto& sum) { tile.template store<kChannel, kChannels>(at, narrowed<T>(sum)); });
}

}  // namespace

cudaError_t cross_merge(const CrossScanParams& p, cudaStream_t stream) {
  return with_element(p.image.elements.dtype, [&](auto element) {
    using T = decltype(element);
    return launch_cross<T>(
        p, sizeof(float),
        [](auto positions, auto channels, auto cross) {
          return merge_kernel<T, decltype(positions)::value, decltype(channels)::value, decltype(cross)::value>;
        },
        stream);
  });
}

}  // namespace mobilemamba
