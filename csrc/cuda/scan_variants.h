// What the launchers of the scan kernels share: the kernels' variants, and the sizes of their launches.
#pragma once

#include "cuda/scan.h"

namespace mobilemamba {

// Positions of a warp's segment: with many states more of each position stays in registers.
template <bool kOneState>
constexpr int kSegmentOf = kOneState ? 16 : 8;
inline int64_t segment_of(const SelectiveScanCudaParams& p) {
  return p.state == 1 ? kSegmentOf<true> : kSegmentOf<false>;
}

inline int64_t blocks_of(const SelectiveScanCudaParams& p) { return p.batch * p.groups * p.slices; }
inline dim3 block_of(const SelectiveScanCudaParams& p) { return dim3(kWarp, static_cast<unsigned>(p.warps)); }
inline int64_t private_floats(const SelectiveScanCudaParams& p) {
  return p.warps * (p.state == 1 ? kPrivate<kSegmentOf<true>> : kPrivate<kSegmentOf<false>>);
}
// The block's place and its folds.
inline int64_t fold_floats(int64_t values, int64_t warps) { return kPlaceFloats + 2 * values * warps * kWarp; }
inline int64_t carry_floats(const SelectiveScanCudaParams& p) { return p.state == 1 ? 0 : p.state * kWarp; }

// Calls f(one_state, projected) with types of those constants.
template <class F>
cudaError_t with_variant(const SelectiveScanCudaParams& p, F f) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (p.projected) return p.state == 1 ? f(Yes{}, Yes{}) : f(No{}, Yes{});
  return p.state == 1 ? f(Yes{}, No{}) : f(No{}, No{});
}

}  // namespace mobilemamba
