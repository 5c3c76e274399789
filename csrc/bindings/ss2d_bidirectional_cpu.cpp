// SS2D's forward on the CPU.
#include <vector>

#include "bindings/products.h"
#include "bindings/ss2d_bidirectional.h"

DECLARE_KERNEL(ss2d_pack, Ss2dPackParams)
DECLARE_KERNEL(ss2d_project, Ss2dParams)
DECLARE_KERNEL(ss2d_scan, Ss2dParams)
DECLARE_KERNEL(ss2d_normalize, Ss2dParams)

namespace mobilemamba {
namespace {

constexpr int64_t kOperations = 80;  // of one channel at one position in the scan phase, by the vector

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

}  // namespace

void run_ss2d(Ss2dArguments& a) {
  Ss2dParams p{};
  p.dim = a.dim(), p.length = a.length(), p.rank = a.rank(), p.state = a.state();
  const int64_t features = p.rank + 2 * p.state;
  p.padded_dim = packed_vectors(p.dim) * kPackedLanes, p.columns = packed_vectors(2 * features) * kPackedLanes;
  p.x = flattened(a.x), p.out = flattened(a.out);
  if (a.z) p.z = flattened(*a.z);
  p.eps = a.eps;

  const int64_t x_proj_size = p.columns * p.dim, plane = 2 * p.padded_dim;
  const int64_t size = x_proj_size + p.columns + plane * (p.state + p.rank + 2) + 2 * p.padded_dim;
  const Tensor packed = torch::stable::empty({size}, ScalarType::Float);
  float* next = static_cast<float*>(packed.data_ptr());
  const auto take = [&](int64_t floats) { return next += floats, next - floats; };
  const bool one_dimension = a.x_proj.stride(0) == features * a.x_proj.stride(1);
  const Tensor x_proj = one_dimension ? a.x_proj : torch::stable::contiguous(a.x_proj);
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
  p.A = add(a.A_log, 2, p.state), p.dt_proj = add(a.dt_proj, 2, p.rank), p.dt_bias = add(a.dt_bias, 2, 1),
  p.D = add(a.D, 2, 1);
  p.norm_weight = add(a.norm_weight, 1, 1), p.norm_bias = add(a.norm_bias, 1, 1);
  parallel(KERNEL(ss2d_pack), parameters, p.padded_dim / vector_lanes(), 4 * (p.rank + p.state),
           ss2d_pack_scratch(vector_lanes()));

  run(p, a.batch());
}

}  // namespace mobilemamba
