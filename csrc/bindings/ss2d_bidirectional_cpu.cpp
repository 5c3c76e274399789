// ss2d_bidirectional_fwd on the CPU. Its gradient is composed in ops/ss2d_bidirectional.py around the scan's kernel.
#include <cmath>
#include <vector>

#include "bindings/tensor.h"
#include "include/ss2d_bidirectional.h"

DECLARE_KERNEL(ss2d_project, Ss2dParams)
DECLARE_KERNEL(ss2d_scan, Ss2dParams)
DECLARE_KERNEL(ss2d_normalize, Ss2dParams)

namespace mobilemamba {
namespace {

constexpr int64_t kOperations = 80;  // of one channel at one position in the scan phase, by the vector

// (planes, dim, inner) to (planes, inner, padded), channels innermost.
std::vector<float> pack(const Tensor& t, int64_t planes, int64_t dim, int64_t inner, int64_t padded) {
  const std::vector<float> from = values(t);
  std::vector<float> to(planes * inner * padded);
  for (int64_t k = 0; k < planes; ++k)
    for (int64_t c = 0; c < dim; ++c)
      for (int64_t i = 0; i < inner; ++i) to[(k * inner + i) * padded + c] = from[(k * dim + c) * inner + i];
  return to;
}

// A tensor whose height and width are one dimension of positions, copied only if they are not.
Tensor with_positions(const Tensor& t) {
  return t.size(2) <= 1 || t.stride(2) == t.size(3) * t.stride(3) ? t : torch::stable::contiguous(t);
}
Sequence map(const Tensor& t) {
  return {elements(t), t.stride(0), t.stride(1), t.size(3) > 1 ? t.stride(3) : t.stride(2)};
}

// Floats between the phases, an image.
int64_t between(const Ss2dParams& p) { return p.length * (p.columns + p.padded_dim); }
int64_t scan_blocks(const Ss2dParams& p) { return ceil_div(p.dim, vector_lanes()); }

// With an image or more a thread, a thread takes all phases of an image: what lies between them stays in its cache.
struct Images {
  Ss2dParams params;
  float* scratch;
};
void run_images(const Images& images, int64_t begin, int64_t end) {
  Ss2dParams p = images.params;
  p.projected = images.scratch, p.sum = p.projected + p.length * p.columns, p.scratch = images.scratch + between(p);
  for (p.first_image = begin; p.first_image < end; ++p.first_image) {
    KERNEL(ss2d_project)(p, 0, ss2d_position_blocks(p));
    KERNEL(ss2d_scan)(p, 0, scan_blocks(p));
    KERNEL(ss2d_normalize)(p, 0, ss2d_position_blocks(p));
  }
}

void run(Ss2dParams& p, int64_t batch) {
  const int64_t lanes = vector_lanes(), scan_cost = p.length * p.state * kOperations;
  if (batch >= torch::stable::get_num_threads()) {
    parallel<Images>(&run_images, {p, nullptr}, batch, scan_cost * scan_blocks(p), between(p) + ss2d_scratch(p, lanes));
    return;
  }
  std::vector<float> memory(batch * between(p));
  p.projected = memory.data(), p.sum = p.projected + batch * p.length * p.columns;
  const int64_t block_cost = kSs2dPositions * p.dim, blocks = batch * ss2d_position_blocks(p);
  parallel(KERNEL(ss2d_project), p, blocks, block_cost * p.columns / lanes, ss2d_scratch(p, lanes));
  parallel(KERNEL(ss2d_scan), p, batch * scan_blocks(p), scan_cost, ss2d_scratch(p, lanes));
  parallel(KERNEL(ss2d_normalize), p, blocks, block_cost, 0);
}

Tensor ss2d_forward(Tensor x, std::optional<Tensor> z, Tensor x_proj, Tensor dt_proj, Tensor dt_bias, Tensor A_log,
                    Tensor D, Tensor norm_weight, Tensor norm_bias, double eps) {
  STD_TORCH_CHECK(x.dim() == 4 && x_proj.dim() == 3 && dt_proj.dim() == 3 && A_log.dim() == 3,
                  "mobilemamba: ss2d_bidirectional got a wrong rank");
  Ss2dParams p{};
  const int64_t batch = x.size(0);
  p.dim = x.size(1), p.length = x.size(2) * x.size(3), p.rank = dt_proj.size(2), p.state = A_log.size(2);
  STD_TORCH_CHECK(p.state >= 1 && p.state <= kMaxState, "mobilemamba: N must be between 1 and 256, got ", p.state);
  const int64_t features = p.rank + 2 * p.state;
  if (z)
    for (int64_t i = 0; i < 4; ++i) check_size(*z, i, x.size(i));
  check_size(x_proj, 0, 2), check_size(x_proj, 1, features), check_size(x_proj, 2, p.dim);
  for (const Tensor& t : {dt_proj, A_log, dt_bias, D}) check_size(t, 0, 2), check_size(t, 1, p.dim);
  check_size(norm_weight, 0, p.dim), check_size(norm_bias, 0, p.dim);
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;

  p.padded_dim = ceil_div(p.dim, kSs2dLanes) * kSs2dLanes;
  p.columns = ceil_div(2 * features, kSs2dLanes) * kSs2dLanes;
  x = with_positions(x);
  if (z) z = with_positions(*z);
  const Tensor written = with_positions(out);  // out's strides are those of the x that came in
  p.x = map(x), p.out = map(written);
  if (z) p.z = map(*z);
  p.eps = static_cast<float>(eps);

  const std::vector<float> x_proj_packed = [&] {  // (2, features, dim) to (dim, columns)
    const std::vector<float> from = values(x_proj);
    std::vector<float> to(p.dim * p.columns);
    for (int64_t i = 0; i < 2 * features; ++i)
      for (int64_t c = 0; c < p.dim; ++c) to[c * p.columns + i] = from[i * p.dim + c];
    return to;
  }();
  std::vector<float> A = pack(A_log, 2, p.dim, p.state, p.padded_dim);
  for (float& a : A) a = -std::exp(a);
  const std::vector<float> dt_proj_packed = pack(dt_proj, 2, p.dim, p.rank, p.padded_dim);
  const std::vector<float> bias = pack(dt_bias, 2, p.dim, 1, p.padded_dim), skip = pack(D, 2, p.dim, 1, p.padded_dim);
  const std::vector<float> weight = pack(norm_weight, 1, p.dim, 1, p.padded_dim);
  const std::vector<float> shift = pack(norm_bias, 1, p.dim, 1, p.padded_dim);
  p.x_proj = x_proj_packed.data(), p.dt_proj = dt_proj_packed.data(), p.dt_bias = bias.data();
  p.A = A.data(), p.D = skip.data(), p.norm_weight = weight.data(), p.norm_bias = shift.data();

  run(p, batch);
  if (written.data_ptr() != out.data_ptr()) torch::stable::copy_(out, written);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, CPU, m) { m.impl("ss2d_bidirectional_fwd", TORCH_BOX(&ss2d_forward)); }

}  // namespace mobilemamba
