// The running of the scan kernels on a GPU, for every scan operator.
#include "bindings/selective_scan_cuda.h"

#include "bindings/cuda.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}

// Plans the launches of a scan that is not empty; says whether it is not.
bool plan(SelectiveScanCudaParams& p) {
  constexpr int64_t kEnd = int64_t{1} << 32;  // kernels number images and groups in 32 bits
  STD_TORCH_CHECK(p.batch < kEnd && p.groups < kEnd,
                  "mobilemamba: a scan on a GPU takes fewer than 2^32 sequences and groups, got ", p.batch, " and ",
                  p.groups, "; divide the batch");
  if (p.batch * p.dim * p.length == 0) return false;
  plan_selective_scan(p);
  return true;
}

SelectiveScanCudaParams on_gpu(const SelectiveScanParams& params) {
  SelectiveScanCudaParams p{};
  static_cast<SelectiveScanParams&>(p) = params;
  return p;
}

}  // namespace

void run_scan_forward(SelectiveScanCudaParams& p, const Tensor& like, const OnDeviceOf& device) {
  if (!plan(p)) return;
  Tensor chunks;
  if (p.range < p.chunks) {
    chunks = new_floats(like, {2, p.batch, p.directions, p.chunks, p.state, p.dim});
    p.chunk_decay = floats(chunks), p.chunk_state = p.chunk_decay + chunks.numel() / 2;
  }
  device.run(selective_scan_fwd, p);
}

void run_scan(SelectiveScanParams& params, const Tensor& like) {
  const OnDeviceOf device(like);
  SelectiveScanCudaParams p = on_gpu(params);
  run_scan_forward(p, like, device);
}

ScanSums run_scan_backward(SelectiveScanParams& params, const Tensor& like) {
  const OnDeviceOf device(like);
  SelectiveScanCudaParams p = on_gpu(params);
  p.backward = true;
  const bool runs = plan(p);
  const int64_t K = p.directions, parts = p.batch * p.chunks;  // no chunks where there is nothing to scan
  Tensor chunks, gated, found[5], partial[5];
  PartialSumsParams sums{};
  // A sum over the parts of the sequences, an element a channel; or over the channels, an element a position.
  const auto add = [&](Tensor& sum, float*& from, int64_t outer, int64_t middle, int64_t inner) {
    sum = new_floats(like, {outer, inner});
    partial[sums.count] = new_floats(like, {outer, middle, inner});
    from = floats(partial[sums.count]);
    sums.sums[sums.count++] = {from, floats(sum), outer, middle, inner};
  };
  const auto coefficient = [&](Tensor& sum, bool varies, int64_t group, float*& rows, float*& fixed) {
    if (varies)
      add(sum, rows, p.batch * K * (p.groups / group), group * p.slices, p.state * p.length);
    else
      add(sum, fixed, 1, parts, K * p.dim * p.state);
  };
  add(found[0], p.partial_A, 1, parts, K * p.dim * p.state);
  coefficient(found[1], p.B_varies, p.B_group, p.partial_B, p.partial_fixed_B);
  coefficient(found[2], p.C_varies, p.C_group, p.partial_C, p.partial_fixed_C);
  if (p.D) add(found[3], p.partial_D, 1, parts, K * p.dim);
  if (p.delta_bias) add(found[4], p.partial_delta_bias, 1, parts, K * p.dim);
  if (runs) {
    if (p.chunks > 1) {
      chunks = new_floats(like, {3, p.batch, K, p.chunks, p.state, p.dim});
      const int64_t size = chunks.numel() / 3;
      p.chunk_decay = floats(chunks), p.chunk_state = p.chunk_decay + size, p.chunk_adjoint = p.chunk_state + size;
    }
    if (p.z && !p.by_states) {
      // In the layout of z: (batch, dim, length), of which dim or length may be the dense one.
      const bool last = p.z.channel == 1;
      gated = new_floats(like, {p.batch, p.dim, p.length});
      p.gated = {elements(gated), p.dim * p.length, 0, last ? 1 : p.length, 0, last ? p.dim : 1};
    }
    device.run(selective_scan_bwd, p);
  }
  device.run(partial_sums, sums);
  return {found[0], found[1], found[2], found[3], found[4]};
}

}  // namespace mobilemamba
