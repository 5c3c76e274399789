// Three phases over one image, whose intermediates (a few hundred positions of a few hundred channels) stay in cache:
//   project    positions × columns: every position's low-rank step, B and C of both directions; a
//              matrix product
//   scan       kLanes channels, all positions, both directions: Δ is expanded from its low rank inside the tile, so it
//              never exists in memory, and the two directions are added in the tile
//   normalize  LayerNorm over the channels of a position, then the gate
// x is read twice, z once, the result written once; the official network makes twelve passes.
#include "cpu/products.h"
#include "cpu/scan.h"
#include "include/ss2d_bidirectional.h"

BEGIN_KERNELS
namespace {

INLINE int64_t channels_from(const Ss2dParams& p, int64_t channel) {
  return p.dim - channel < kLanes ? p.dim - channel : kLanes;
}

// The Source of scan.h: u is x, everything else comes from the projection.
struct ProjectedSource {
  const Ss2dParams& p;
  const int64_t image, channel;
  const int64_t length = p.length, state = p.state, directions = 2;

  const float* column(int64_t k, int64_t i, int64_t start) const {
    return p.projected + ((image - p.first_image) * p.length + start) * p.columns + k * (p.rank + 2 * p.state) + i;
  }
  Vec A(int64_t k, int64_t n) const { return load(p.A + (k * p.state + n) * p.padded_dim + channel); }
  bool skips() const { return true; }
  Vec D(int64_t k) const { return load(p.D + k * p.padded_dim + channel); }
  Coefficient B(float*, int64_t k, int64_t n, int64_t start, int64_t) const {
    return {column(k, p.rank + n, start), p.columns, Vec{}};
  }
  Coefficient C(float*, int64_t k, int64_t n, int64_t start, int64_t) const {
    return {column(k, p.rank + p.state + n, start), p.columns, Vec{}};
  }
  Rows u(float* tile, int64_t, int64_t start, int64_t count) const {
    return load_rows(tile, p.x.at(image, channel, start), p.x.channel, p.x.position, channels_from(p, channel), count);
  }
  Rows dt(float* dt, int64_t k, int64_t start, int64_t count) const {
    const float* weights = p.dt_proj + k * p.rank * p.padded_dim + channel;
    const float* low = column(k, 0, start);
    const Vec bias = load(p.dt_bias + k * p.padded_dim + channel);
    int64_t l = 0;
    const auto positions = [&](auto together) {
      Pack<together> raw;
      for (Vec& v : raw.v) v = bias;
      for (int64_t r = 0; r < p.rank; ++r) {
        const Vec w = load(weights + r * p.padded_dim);
        for (int i = 0; i < together; ++i) raw.v[i] += splat(low[(l + i) * p.columns + r]) * w;
      }
      raw = softplus(raw);
      for (int i = 0; i < together; ++i) store(dt + (l + i) * kLanes, raw.v[i]);
      l += together;
    };
    while (l + kAhead <= count) positions(std::integral_constant<int, kAhead>{});
    while (l < count) positions(std::integral_constant<int, 1>{});
    return {dt};
  }
};

INLINE float sum_all(Vec v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

}  // namespace

// Items: blocks of kLanes channels.
void ss2d_pack(const Ss2dPackParams& p, int64_t begin, int64_t end) {
  for (int64_t c = begin * kLanes; c < end * kLanes; c += kLanes) {
    const int64_t left = p.dim - c, channels = left < 0 ? 0 : left < kLanes ? left : kLanes;
    for (const Ss2dParameter& t : p.parameters)
      for (int64_t k = 0; k < t.planes; ++k)
        for (int64_t first = 0; first < t.count; first += kSs2dPackTile) {
          const int64_t count = t.count - first < kSs2dPackTile ? t.count - first : kSs2dPackTile;
          if (channels > 0)
            load_tile(p.scratch, t.from + (k * t.plane + c * t.channel + first * t.step), t.channel, t.step, channels,
                      count);
          for (int64_t i = 0; i < count; ++i) {
            Vec v = channels > 0 ? load(p.scratch + i * kLanes) : Vec{};
            if (&t == p.parameters) v = -exp2(v * kLog2E);
            store(t.to + (k * t.count + first + i) * p.padded_dim + c, v);
          }
        }
  }
}

// Items: images × blocks of positions.
void ss2d_project(const Ss2dParams& p, int64_t begin, int64_t end) {
  const int64_t blocks = ss2d_position_blocks(p);
  const bool direct = p.x.channel == 1 && p.x.elements.dtype == DType::kFloat32;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = p.first_image + item / blocks, start = item % blocks * p.block;
    const int64_t count = p.length - start < p.block ? p.length - start : p.block;
    const float* x = static_cast<const float*>(p.x.at(image, 0, start).data);
    if (!direct) {
      for (int64_t c = 0; c < p.dim; c += kLanes) {
        float tile[kSs2dPositions * kLanes];
        load_tile(tile, p.x.at(image, c, start), p.x.channel, p.x.position, channels_from(p, c), count);
        for (int64_t l = 0; l < count; ++l) store(p.scratch + l * p.padded_dim + c, load(tile + l * kLanes));
      }
      x = p.scratch;
    }
    float* projected = p.projected + ((image - p.first_image) * p.length + start) * p.columns;
    const Slab slab{p.x_proj,
                    p.zeros,
                    Activation::kNone,
                    x,
                    direct ? p.x.position : p.padded_dim,
                    1,
                    0,
                    count,
                    {projected, DType::kFloat32},
                    p.columns,
                    {},
                    {},
                    0,
                    0};
    multiply(slab, 0, packed_panels(p.columns));
  }
}

// Items: images × blocks of kLanes channels.
void ss2d_scan(const Ss2dParams& p, int64_t begin, int64_t end) {
  const int64_t blocks = (p.dim + kLanes - 1) / kLanes;
  for (int64_t item = begin; item < end; ++item) {
    const ProjectedSource source{p, p.first_image + item / blocks, item % blocks * kLanes};
    float* sum = p.sum + item / blocks * p.length * p.padded_dim + source.channel;
    const ScanScratch scratch(p.scratch);
    std::memset(scratch.up, 0, p.state * kLanes * sizeof(float));
    scan_forward(source, scratch, {sum, p.padded_dim}, 0, p.length, [](Rows, int64_t, int64_t) {});
  }
}

// Items: images × blocks of positions.
void ss2d_normalize(const Ss2dParams& p, int64_t begin, int64_t end) {
  const int64_t blocks = ss2d_position_blocks(p);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = p.first_image + item / blocks, start = item % blocks * p.block;
    const int64_t count = p.length - start < p.block ? p.length - start : p.block;
    const float* sum = p.sum + ((image - p.first_image) * p.length + start) * p.padded_dim;
    float means[kSs2dPositions], scales[kSs2dPositions];
    for (int64_t l = 0; l < count; ++l) {
      const float* y = sum + l * p.padded_dim;
      Vec total{}, squares{};
      for (int64_t c = 0; c < p.dim; c += kLanes) total += load_some(y + c, channels_from(p, c));
      means[l] = sum_all(total) / static_cast<float>(p.dim);
      for (int64_t c = 0; c < p.dim; c += kLanes) {
        Vec centred = load(y + c) - means[l];
        if (p.dim - c < kLanes)
          for (int64_t i = p.dim - c; i < kLanes; ++i) centred[i] = 0;
        squares += centred * centred;
      }
      scales[l] = 1.0f / __builtin_sqrtf(sum_all(squares) / static_cast<float>(p.dim) + p.eps);
    }
    for (int64_t c = 0; c < p.dim; c += kLanes) {
      const Vec weight = load(p.norm_weight + c), bias = load(p.norm_bias + c);
      float tile[kSs2dPositions * kLanes];
      if (p.z.elements) load_tile(tile, p.z.at(image, c, start), p.z.channel, p.z.position, channels_from(p, c), count);
      for (int64_t l = 0; l < count; ++l) {
        const Vec y = (load(sum + l * p.padded_dim + c) - means[l]) * scales[l] * weight + bias;
        store(tile + l * kLanes, p.z.elements ? y * silu(load(tile + l * kLanes)) : y);
      }
      store_tile(tile, p.out.at(image, c, start), p.out.channel, p.out.position, channels_from(p, c), count);
    }
  }
}

END_KERNELS
