// ss2d_bidirectional_fwd on the CPU. Its gradient is composed in ops/ss2d_bidirectional.py around the scan's kernel.
#include <vector>

#include "bindings/products.h"
#include "include/ss2d_bidirectional.h"

DECLARE_KERNEL(ss2d_pack, Ss2dPackParams)
DECLARE_KERNEL(ss2d_project, Ss2dParams)
DECLARE_KERNEL(ss2d_scan, Ss2dParams)
DECLARE_KERNEL(ss2d_normalize, Ss2dParams)

namespace mobilemamba {
namespace {

constexpr int64_t kOperations = 80;  // of one channel at one position in the scan phase, by the vector

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
  p.block = kSs2dPositions;
  if (batch >= torch::stable::get_num_threads()) {
    parallel<Images>(&run_images, {p, nullptr}, batch, scan_cost * scan_blocks(p), between(p) + ss2d_scratch(p, lanes));
    return;
  }
  std::vector<float> memory(batch * between(p));
  p.projected = memory.data(), p.sum = p.projected + batch * p.length * p.columns;
  const int64_t parts = ceil_div(ceil_div(p.length, kSs2dPositions), torch::stable::get_num_threads());
  p.block = ceil_div(p.length, parts * torch::stable::get_num_threads());
  const int64_t block_cost = p.block * p.dim, blocks = batch * ss2d_position_blocks(p);
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

  p.padded_dim = packed_vectors(p.dim) * kPackedLanes, p.columns = packed_vectors(2 * features) * kPackedLanes;
  x = with_positions(x);
  if (z) z = with_positions(*z);
  const Tensor written = with_positions(out);  // out's strides are those of the x that came in
  p.x = map(x), p.out = map(written);
  if (z) p.z = map(*z);
  p.eps = static_cast<float>(eps);

  const int64_t x_proj_size = p.columns * p.dim, plane = 2 * p.padded_dim;
  const int64_t size = x_proj_size + p.columns + plane * (p.state + p.rank + 2) + 2 * p.padded_dim;
  const Tensor packed = torch::stable::empty({size}, ScalarType::Float);
  float* next = static_cast<float*>(packed.data_ptr());
  const auto take = [&](int64_t floats) { return next += floats, next - floats; };
  if (x_proj.stride(0) != features * x_proj.stride(1)) x_proj = torch::stable::contiguous(x_proj);
  p.x_proj = pack({elements(x_proj), x_proj.stride(1), x_proj.stride(2), 0, 0}, 2 * features, p.dim, 1, 1, false,
                  take(x_proj_size));
  p.x_proj.outputs = p.columns;
  float* zeros = take(p.columns);
  std::fill_n(zeros, p.columns, 0.0f);
  p.zeros = zeros;
  Ss2dPackParams parameters{{}, p.dim, p.padded_dim, nullptr};
  Ss2dParameter* parameter = parameters.parameters;
  const auto add = [&](const Tensor& t, int64_t planes, int64_t count) {
    float* to = take(planes * count * p.padded_dim);
    const int64_t channel = planes == 2 ? 1 : 0;
    *parameter++ = {
        elements(t), planes, channel ? t.stride(0) : 0, t.stride(channel), count, t.dim() == 3 ? t.stride(2) : 0, to};
    return to;
  };
  p.A = add(A_log, 2, p.state), p.dt_proj = add(dt_proj, 2, p.rank), p.dt_bias = add(dt_bias, 2, 1), p.D = add(D, 2, 1);
  p.norm_weight = add(norm_weight, 1, 1), p.norm_bias = add(norm_bias, 1, 1);
  parallel(KERNEL(ss2d_pack), parameters, p.padded_dim / vector_lanes(), 4 * (p.rank + p.state),
           ss2d_pack_scratch(vector_lanes()));

  run(p, batch);
  if (written.data_ptr() != out.data_ptr()) torch::stable::copy_(out, written);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, CPU, m) { m.impl("ss2d_bidirectional_fwd", TORCH_BOX(&ss2d_forward)); }

}  // namespace mobilemamba
