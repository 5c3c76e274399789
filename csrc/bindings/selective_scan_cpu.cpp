// The running of the scan kernels on the CPU, for every scan operator.
#include "bindings/selective_scan.h"
#include "include/capability.h"

DECLARE_KERNEL(selective_scan_fwd, SelectiveScanParams)
DECLARE_KERNEL(selective_scan_fold, SelectiveScanParams)
DECLARE_KERNEL(selective_scan_bwd, SelectiveScanParams)

namespace mobilemamba {
namespace {

constexpr int64_t kOperations = 40;  // of one state at one position, forward
constexpr int64_t kSegment = 4096;   // positions that are worth a fold
constexpr int64_t kItems = 64;       // wanted of a backward, whatever the number of threads

// out[i] = Σ_j partial[i / inner][j][i % inner], in the order of j.
void sum_middle(float* out, const float* partial, int64_t outer, int64_t middle, int64_t inner) {
  torch::stable::parallel_for(0, outer * inner, 1 + 4096 / std::max<int64_t>(1, middle),
                              [=](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  const float* p = partial + i / inner * middle * inner + i % inner;
                                  float sum = 0;
                                  for (int64_t j = 0; j < middle; ++j) sum += p[j * inner];
                                  out[i] = sum;
                                }
                              });
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> size) {
  return torch::stable::new_zeros(like, size, ScalarType::Float);
}

float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

}  // namespace

void run_scan(SelectiveScanParams& p, const Tensor& like) {
  const int64_t lanes = vector_lanes(), items = p.batch * p.groups * scan_blocks(p, lanes);
  const int64_t threads = torch::stable::get_num_threads(), scratch = scan_fwd_scratch(p.length, p.state, lanes);
  const int64_t wanted = p.directions == 2 || items == 0 || items >= threads ? 1 : ceil_div(2 * threads, items);
  p.segments = std::max<int64_t>(1, std::min(wanted, p.length / kSegment));
  p.segment = p.length / p.segments;
  const int64_t cost = p.segment * p.state * p.directions * kOperations;
  Tensor folds = torch::stable::new_empty(like, {items * (p.segments - 1) * p.state * 2 * lanes}, ScalarType::Float);
  p.folds = floats(folds);
  if (p.segments > 1) parallel(KERNEL(selective_scan_fold), p, items * (p.segments - 1), cost, scratch);
  parallel(KERNEL(selective_scan_fwd), p, items * p.segments, cost, scratch);
}

ScanSums run_scan_backward(SelectiveScanParams& p, const Tensor& like) {
  const int64_t lanes = vector_lanes(), blocks = scan_blocks(p, lanes), K = p.directions;
  p.slices = std::min(blocks, std::max<int64_t>(1, kItems / std::max<int64_t>(1, p.batch * p.groups)));
  p.slices = std::max<int64_t>(1, p.slices);
  const int64_t states = p.state * p.length;
  auto coefficient = [&](bool varies, float*& partial, float*& fixed) {
    Tensor t =
        varies ? zeros(like, {p.batch, K, p.groups, p.slices, states}) : zeros(like, {p.batch, K, p.dim, p.state});
    (varies ? partial : fixed) = floats(t);
    return t;
  };
  Tensor B = coefficient(p.B_varies, p.partial_B, p.partial_fixed_B);
  Tensor C = coefficient(p.C_varies, p.partial_C, p.partial_fixed_C);
  Tensor A = zeros(like, {p.batch, K, p.dim, p.state}), D = zeros(like, {p.batch, K, p.dim});
  Tensor bias = zeros(like, {p.batch, K, p.dim});
  p.partial_A = floats(A), p.partial_D = floats(D), p.partial_delta_bias = floats(bias);
  parallel(KERNEL(selective_scan_bwd), p, p.batch * p.groups * p.slices,
           blocks / p.slices * p.length * p.state * K * 3 * kOperations, scan_bwd_scratch(p, lanes));
  auto over_batch = [&](const Tensor& t, int64_t inner) {
    Tensor sum = K == 1 ? zeros(like, {p.dim, inner}) : zeros(like, {K, p.dim, inner});
    sum_middle(floats(sum), floats(t), 1, p.batch, K * p.dim * inner);
    return sum;
  };
  // The kernel's groups may be finer than those of B or C, `group` of them to one.
  auto over_channels = [&](const Tensor& t, bool varies, int64_t group) {
    if (!varies) return over_batch(t, p.state);
    Tensor sum = zeros(like, {p.batch, K, p.groups / group, p.state, p.length});
    sum_middle(floats(sum), floats(t), p.batch * K * (p.groups / group), group * p.slices, states);
    return sum;
  };
  return {over_batch(A, p.state), over_channels(B, p.B_varies, p.B_group), over_channels(C, p.C_varies, p.C_group),
          over_batch(D, 1), over_batch(bias, 1)};
}

}  // namespace mobilemamba
