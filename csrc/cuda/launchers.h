// The launchers that csrc/cuda gives to the bindings: each runs on a stream and returns what its launches returned.
#pragma once

#include <cuda_runtime.h>

#include "include/causal_conv1d_cuda.h"
#include "include/causal_conv1d_update.h"
#include "include/cross_scan.h"
#include "include/depthwise_conv2d_act.h"
#include "include/haar.h"
#include "include/selective_scan_cuda.h"
#include "include/selective_state_update.h"
#include "include/ss2d_normalize.h"
#include "include/wavelet_depthwise_conv2d_cuda.h"

namespace mobilemamba {

// Chooses the sizes of a launch on the current device, from the operands' sizes.
void plan_causal_conv1d(CausalConv1dCudaParams& p);
cudaError_t causal_conv1d_fwd(const CausalConv1dCudaParams& p, cudaStream_t stream);
// Where channels or positions are dense, of which causal_conv1d_takes_vectors: the forward; the plan of a backward, and
// the backward.
bool causal_conv1d_takes_vectors(const CausalConv1dParams& p);
cudaError_t causal_conv1d_vectors(const CausalConv1dParams& p, cudaStream_t stream);
void plan_causal_conv1d_vectors_bwd(CausalConv1dCudaParams& p);
cudaError_t causal_conv1d_vectors_bwd(const CausalConv1dCudaParams& p, cudaStream_t stream);
// The gradients of x and of the initial states, and partial sums of those of the filter.
cudaError_t causal_conv1d_bwd(const CausalConv1dCudaParams& p, cudaStream_t stream);
cudaError_t causal_conv1d_update(const CausalConv1dUpdateParams& p, cudaStream_t stream);

cudaError_t cross_scan(const CrossScanParams& p, cudaStream_t stream);
cudaError_t cross_merge(const CrossScanParams& p, cudaStream_t stream);

cudaError_t depthwise_conv2d_act(const DepthwiseConv2dActParams& p, cudaStream_t stream);
// For maps whose channels are dense and even in number, of which depthwise_takes_pairs.
bool depthwise_takes_pairs(const DepthwiseConv2dActParams& p);
cudaError_t depthwise_conv2d_act_pairs(const DepthwiseConv2dActParams& p, cudaStream_t stream);

cudaError_t haar_dwt2d(const HaarParams& p, cudaStream_t stream);
cudaError_t haar_idwt2d(const HaarParams& p, cudaStream_t stream);

// Chooses the sizes of a launch on the current device, from the operands' sizes and `backward`.
void plan_wavelet_depthwise_conv2d(WaveletDepthwiseConv2dCudaParams& p);
cudaError_t wavelet_depthwise_conv2d_fwd(const WaveletDepthwiseConv2dCudaParams& p, cudaStream_t stream);
// The gradients of weight and scale.
cudaError_t wavelet_depthwise_conv2d_bwd(const WaveletDepthwiseConv2dCudaParams& p, cudaStream_t stream);

// Chooses the sizes of a scan's launches on the current device, from the operands' sizes and `backward`.
void plan_selective_scan(SelectiveScanCudaParams& p);
cudaError_t selective_scan_fwd(const SelectiveScanCudaParams& p, cudaStream_t stream);
// Plans a scan by channels where the operands allow it; says whether they do.
bool plan_selective_scan_channels(SelectiveScanCudaParams& p);
bool fits_selective_scan_channels_bwd(const SelectiveScanCudaParams& p);
cudaError_t selective_scan_channels(const SelectiveScanCudaParams& p, cudaStream_t stream);
cudaError_t selective_scan_channels_bwd(const SelectiveScanCudaParams& p, cudaStream_t stream);
// As plan_selective_scan_channels: one state, positions side by side.
bool plan_selective_scan_positions(SelectiveScanCudaParams& p);
// The forward, or the whole backward with selective_scan_positions_bwd as its last launch.
cudaError_t selective_scan_positions(const SelectiveScanCudaParams& p, cudaStream_t stream);
cudaError_t selective_scan_positions_bwd(const SelectiveScanCudaParams& p, cudaStream_t stream);
// As plan_selective_scan_channels: one or 16 states.
bool plan_selective_scan_states(SelectiveScanCudaParams& p);
// The forward, or the whole backward with selective_scan_states_bwd as its last launch.
cudaError_t selective_scan_states(const SelectiveScanCudaParams& p, cudaStream_t stream);
cudaError_t selective_scan_states_bwd(const SelectiveScanCudaParams& p, cudaStream_t stream);
cudaError_t selective_scan_bwd(const SelectiveScanCudaParams& p, cudaStream_t stream);
// Fills chunk_decay, chunk_state and, before a backward, chunk_adjoint.
cudaError_t selective_scan_chunks(const SelectiveScanCudaParams& p, cudaStream_t stream);
// Replaces each chunk's fold by what enters the chunk.
cudaError_t join_selective_scan_chunks(const SelectiveScanCudaParams& p, cudaStream_t stream);
// Before a backward with z: fills grad_z and gated.
cudaError_t selective_scan_gate(const SelectiveScanCudaParams& p, cudaStream_t stream);
cudaError_t partial_sums(const PartialSumsParams& p, cudaStream_t stream);

cudaError_t selective_state_update(const SelectiveStateUpdateParams& p, cudaStream_t stream);

cudaError_t ss2d_normalize(const Ss2dNormalizeParams& p, cudaStream_t stream);

}  // namespace mobilemamba
