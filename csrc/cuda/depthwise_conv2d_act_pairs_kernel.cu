// depthwise_conv2d_act of channels-last maps, 1×1 to 7×7 at stride 1 and 2: a lane has two channels.
//
// A block has 64 channels (or as many images of fewer as fill 32 lanes) of a tile of outputs, up to 16×16, of some
// images one after the other: one block for each place that the device has, or several where that would leave many
// empty. What lies under the filter, with zeros beside the map, and a residual that is not x, is copied to shared
// memory, 16 bytes a load, by copies that do not wait: those of the next image while this one is filtered, where there
// is room for both. A warp goes down strips of up to 8 outputs of a column, all of it unrolled: two filters and the
// open sums in registers, a row of the tile under the filter read once (k loads of 4 bytes at constant offsets) for all
// output rows that it meets. Bytes: x (with the rows and columns that tiles share), residual and y once; filters, in
// float32, once a block.
//
// Instructions of an output (sm_90, 16 bits, 14×14): about 24 at k = 3 and 96 at k = 7, of which k² multiply-adds, and
// ten for copying and what a block does once.
#include <cuda_pipeline_primitives.h>

#include "cuda/device.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

constexpr int kRows = 8;  // of a strip at most
template <int kK>
constexpr int kThreads = kK <= 3   ? 320
                         : kK == 5 ? 256
                                   : 192;
template <int kK>
constexpr int kBlocksOfProcessor = kK <= 3 ? 3 : 2;

struct Plan : DepthwiseConv2dActParams {
  int pairs, images;     // of a block at once: a lane each
  unsigned image_steps;  // that all images take, `images` at once
  unsigned channel_blocks, row_tiles, column_tiles;
  unsigned groups;                          // of steps: a block has one
  int tile_rows, tile_columns, in_columns;  // of outputs, and of what lies under the filter
  int strips, strip;                        // of a tile, and its rows
  int64_t warps;
  SmallDivisor by_column, by_pair;
  bool vectors;   // 16 bytes a load
  bool of_input;  // the residual is x itself
  int buffers;    // one or two steps in shared memory

  ANYWHERE int in_rows() const { return static_cast<int>((tile_rows - 1) * stride + k); }
  ANYWHERE int64_t filter_floats() const { return ceil_div(2 * pairs * k * k, 4) * 4; }
  int64_t tiles() const { return static_cast<int64_t>(channel_blocks) * row_tiles * column_tiles; }
  ANYWHERE int step_floats() const {
    const int positions = in_rows() * in_columns + (residual && !of_input ? tile_rows * tile_columns : 0);
    return positions * kWarp * static_cast<int>(element_size(x.elements.dtype)) / 2;
  }
  int64_t shared_floats() const { return filter_floats() + int64_t{buffers} * step_floats(); }
};

// Begins to copy a rectangle of a map to `tile`, [row][column][lane], zeros for what is beside the map and for absent
// channels. A warp has a row at a time.
template <class Vector, class T>
__device__ __forceinline__ void begin_copy(TwoChannels<T>* tile, const Plan& p, const Map& map, int64_t first_image,
                                           int first_channel, int top, int left, int rows, int columns, int height,
                                           int width) {
  constexpr int kVectors = kWarp * sizeof(TwoChannels<T>) / sizeof(Vector);  // of a position
  constexpr int kStep = kVectors < kWarp ? kWarp / kVectors : 1;             // positions of a warp at a time
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, thread = threadIdx.x % kWarp;
#pragma unroll 1
  for (int vector = thread % kVectors; vector < kVectors; vector += kWarp) {
    const int lane = vector * (kWarp / kVectors), image = static_cast<int>(p.by_pair.quotient(lane));
    const int channel = first_channel + 2 * (lane - image * p.pairs), begin = thread / kVectors;
    const bool inside = image < p.images && first_image + image < p.batch && channel < p.channels;
    const T* source = static_cast<const T*>(map.elements.data) + (first_image + image) * map.batch + channel;
    hide(source);  // an address is then one multiply-add
    const unsigned row = static_cast<unsigned>(map.row), column = static_cast<unsigned>(map.column);
    const int low = left < 0 ? -left : 0, high = width - left < columns ? width - left : columns;
    const unsigned met = inside && high > low ? high - low : 0;  // columns
#pragma unroll 1
    for (int r = warp; r < rows; r += warps) {
      const unsigned count = static_cast<unsigned>(top + r) < static_cast<unsigned>(height) ? met : 0;
      unsigned from = (top + r) * row + (left + begin) * column;
      Vector* to = reinterpret_cast<Vector*>(tile) + (r * columns + begin) * kVectors + vector;
#pragma unroll 2
      for (int x = begin; x < columns; x += kStep, to += kStep * kVectors, from += kStep * column)
        if (static_cast<unsigned>(x - low) < count)
          __pipeline_memcpy_async(to, source + from, sizeof(Vector));
        else
          *to = Vector{};
    }
  }
}

__device__ __forceinline__ float2 activate(float2 x, Activation activation) {
  if (activation == Activation::kSilu) return {quick_silu(x.x), quick_silu(x.y)};
  if (activation == Activation::kNone) return x;
  return {x.x < 0.0f ? 0.0f : x.x, x.y < 0.0f ? 0.0f : x.y};  // NaN stays
}

template <class T, int kK, int kStride>
__global__ void __launch_bounds__(kThreads<kK>, kBlocksOfProcessor<kK>) pairs_kernel(Plan p) {
  constexpr int kTaps = kK * kK;
  unsigned item = blockIdx.x / p.channel_blocks;
  const int first_channel = static_cast<int>(blockIdx.x - item * p.channel_blocks) * 2 * p.pairs;
  int first_row = 0, first_column = 0;
  if (p.row_tiles * p.column_tiles != 1) {
    first_column = static_cast<int>(item % p.column_tiles) * p.tile_columns, item /= p.column_tiles;
    first_row = static_cast<int>(item % p.row_tiles) * p.tile_rows, item /= p.row_tiles;
  }
  const unsigned whole = p.image_steps / p.groups, more = p.image_steps - whole * p.groups;
  const unsigned steps = whole + (item < more), first_step = item * whole + (item < more ? item : more);

  const auto tile_of = [&](unsigned step) {
    return reinterpret_cast<TwoChannels<T>*>(shared_memory + p.filter_floats() +
                                             (p.buffers == 2 ? step % 2 : 0) * p.step_floats());
  };
  const int residual_at = p.in_rows() * p.in_columns * kWarp, padding = static_cast<int>(p.padding);
  const auto begin_step = [&](unsigned step) {
    TwoChannels<T>* const tile = tile_of(step);
    const int64_t first_image = static_cast<int64_t>(first_step + step) * p.images;
    const auto begin_all = [&](auto vector) {
      using Vector = decltype(vector);
      begin_copy<Vector>(tile, p, p.x, first_image, first_channel, first_row * kStride - padding,
                         first_column * kStride - padding, p.in_rows(), p.in_columns, static_cast<int>(p.height),
                         static_cast<int>(p.width));
      if (p.residual && !p.of_input)
        begin_copy<Vector>(tile + residual_at, p, p.residual, first_image, first_channel, first_row, first_column,
                           p.tile_rows, p.tile_columns, static_cast<int>(p.out_height), static_cast<int>(p.out_width));
    };
    if (p.vectors)
      begin_all(SixteenBytes{});
    else
      begin_all(TwoChannels<T>{});
    __pipeline_commit();
  };

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int image = static_cast<int>(p.by_pair.quotient(lane)), pair = lane - image * p.pairs;
  const int channel = first_channel + 2 * pair;
  const bool has_channels = image < p.images && channel < p.channels;
  float2 w[kTaps] = {}, bias{}, scale{}, shift{};
  const auto copy_filters = [&] {
    const int rest = static_cast<int>(p.channels) - first_channel;
    visit(p.weight + static_cast<int64_t>(first_channel) * kTaps, [&](const auto* weight) {
      const int count = (rest < 2 * p.pairs ? rest : 2 * p.pairs) * kTaps;
      for (int i = threadIdx.x; i < count; i += blockDim.x) shared_memory[i] = to_float(weight[i]);
    });
  };
  const auto read_filters = [&] {
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {  // side by side in shared memory: that of one channel, then that of the other
      const float2 two = reinterpret_cast<const float2*>(shared_memory)[pair * kTaps + i];
      (2 * i < kTaps ? w[2 * i].x : w[2 * i - kTaps].y) = two.x;
      (2 * i + 1 < kTaps ? w[2 * i + 1].x : w[2 * i + 1 - kTaps].y) = two.y;
    }
    const auto read = [&](const Elements& vector, int64_t stride, float absent) {
      const Elements own = vector + channel * stride;
      return vector && has_channels ? float2{load(own), load(own + stride)} : float2{absent, absent};
    };
    bias = read(p.bias, p.bias_stride, 0.0f);
    scale = read(p.scale, p.scale_stride, 1.0f), shift = read(p.shift, p.shift_stride, 0.0f);
  };
  const int y_row = static_cast<int>(p.y.row);

  const auto filter = [&](unsigned step) {
    const TwoChannels<T>* const tile = tile_of(step);
    const int64_t own_image = static_cast<int64_t>(first_step + step) * p.images + image;
    if (!has_channels || own_image >= p.batch) return;
    const TwoChannels<T>* const added_tile =
        tile + (p.of_input ? (padding * p.in_columns + padding) * kWarp : residual_at) + lane;
    const int added_columns = p.of_input ? p.in_columns : p.tile_columns;
    T* const y = static_cast<T*>(p.y.elements.data) + own_image * p.y.batch + channel;
#pragma unroll 1
    for (int strand = warp; strand < p.strips * p.tile_columns; strand += warps) {
      const int of_tile = static_cast<int>(p.by_column.quotient(strand)), column = strand - of_tile * p.tile_columns;
      const int top = of_tile * p.strip, row = first_row + top;
      int rows = p.tile_rows - top < p.strip ? p.tile_rows - top : p.strip;
      if (p.out_height - row < rows) rows = static_cast<int>(p.out_height) - row;
      if (rows <= 0 || first_column + column >= p.out_width) continue;
      const TwoChannels<T>* in = tile + (top * kStride * p.in_columns + column * kStride) * kWarp + lane;
      const TwoChannels<T>* added = added_tile + (top * added_columns + column) * kWarp;
      T* out = y + (row * y_row + (first_column + column) * static_cast<int>(p.y.column));
      float2 sums[kRows];
#pragma unroll
      for (int o = 0; o < kRows; ++o) sums[o] = bias;
#pragma unroll
      for (int i = 0; i < (kRows - 1) * kStride + kK; ++i) {
        float2 v[kK];
#pragma unroll
        for (int t = 0; t < kK; ++t) v[t] = in[t * kWarp].floats();
        in += p.in_columns * kWarp;
#pragma unroll
        for (int o = 0; o < kRows; ++o) {
          const int r = i - o * kStride;
          if (r < 0 || r >= kK) continue;
#pragma unroll
          for (int t = 0; t < kK; ++t) {
            sums[o].x += v[t].x * w[r * kK + t].x;
            sums[o].y += v[t].y * w[r * kK + t].y;
          }
          if (r < kK - 1) continue;
          float2 sum = activate(sums[o], p.activation);
          sum = {sum.x * scale.x + shift.x, sum.y * scale.y + shift.y};
          if (p.residual) {
            const float2 more = added->floats();
            sum = {sum.x + more.x, sum.y + more.y}, added += added_columns * kWarp;
          }
          *reinterpret_cast<TwoChannels<T>*>(out) = TwoChannels<T>::of(sum);
          out += y_row;
          if (o + 1 == rows) goto complete;
        }
      }
    complete:;
    }
  };
#pragma unroll 1
  for (unsigned step = 0, begun = 0; step < steps; ++step) {
    if (step > 0) __syncthreads();
#pragma unroll 1
    for (; begun < steps && begun < step + p.buffers; ++begun) begin_step(begun);
    if (step == 0) copy_filters();
    if (begun > step + 1)
      __pipeline_wait_prior(1);
    else
      __pipeline_wait_prior(0);
    __syncthreads();
    if (step == 0) read_filters();
    filter(step);
  }
}

// Divides the outputs of a map into tiles of a size.
void divide(Plan& p, int64_t rows, int64_t columns) {
  p.tile_rows = static_cast<int>(rows), p.tile_columns = static_cast<int>(columns);
  p.row_tiles = static_cast<unsigned>(ceil_div(p.out_height, rows));
  p.column_tiles = static_cast<unsigned>(ceil_div(p.out_width, columns));
  p.in_columns = static_cast<int>((columns - 1) * p.stride + p.k);
}

Plan plan(const DepthwiseConv2dActParams& params, int64_t processors) {
  constexpr int64_t kMostSide = 16, kLeastSide = 4, kMostFloats = (64 << 10) / sizeof(float);
  constexpr int64_t kReserved = (1 << 10) / sizeof(float);  // of a block's shared memory
  Plan p{params};
  const int64_t pairs = p.channels / 2;
  p.pairs = static_cast<int>(pairs < kWarp ? pairs : kWarp);
  p.images = kWarp / p.pairs;
  p.image_steps = static_cast<unsigned>(ceil_div(p.batch, p.images));
  p.channel_blocks = static_cast<unsigned>(ceil_div(pairs, p.pairs));
  p.of_input = p.residual && p.residual.elements.data == p.x.elements.data && p.residual.batch == p.x.batch &&
               p.residual.row == p.x.row && p.residual.column == p.x.column && p.stride == 1 &&
               2 * p.padding + 1 == p.k;
  p.buffers = 1;
  divide(p, share(p.out_height, kMostSide), share(p.out_width, kMostSide));
  const auto smaller = [&] {
    if (p.tile_rows >= p.tile_columns)
      divide(p, ceil_div(p.tile_rows, 2), p.tile_columns);
    else
      divide(p, p.tile_rows, ceil_div(p.tile_columns, 2));
  };
  while (p.shared_floats() > kMostFloats && p.tile_rows + p.tile_columns > 2) smaller();
  while (p.tiles() * p.image_steps < processors && (p.tile_rows > kLeastSide || p.tile_columns > kLeastSide)) smaller();
  p.strips = static_cast<int>(ceil_div(p.tile_rows, kRows));
  p.strip = static_cast<int>(ceil_div(p.tile_rows, p.strips));
  p.by_column = SmallDivisor(p.tile_columns);
  p.by_pair = SmallDivisor(p.pairs);
  const auto fits = [&](const Map& map) { return channels_are_vectors(map, p.channels); };
  p.vectors = fits(p.x) && (!p.residual || fits(p.residual));
  const int64_t threads = p.k <= 3 ? kThreads<3> : p.k == 5 ? kThreads<5> : kThreads<7>;
  p.warps = share(static_cast<int64_t>(p.strips) * p.tile_columns, threads / kWarp);
  const int64_t whole_blocks = p.k <= 3 ? kBlocksOfProcessor<3> : kBlocksOfProcessor<7>;
  const int64_t floats = most_shared_bytes() / sizeof(float) + kReserved;
  const auto fitting = [&] { return floats / (p.shared_floats() + kReserved); };
  p.buffers = 2;
  if (fitting() < whole_blocks) p.buffers = 1;
  const int64_t resident = processors * between(fitting(), 1, whole_blocks * threads / (p.warps * kWarp));
  const auto group_for = [&](int64_t blocks) {
    p.groups = static_cast<unsigned>(between(blocks / p.tiles(), 1, p.image_steps));
  };
  group_for(resident);
  const int64_t blocks = p.tiles() * p.groups;
  if (blocks > resident || 8 * blocks < 7 * resident) group_for(8 * resident);  // where one wave would not be full
  if (p.groups == p.image_steps) p.buffers = 1;
  return p;
}

}  // namespace

bool depthwise_takes_pairs(const DepthwiseConv2dActParams& p) {
  if (!(p.k == 1 || p.k == 3 || p.k == 5 || p.k == 7) || !(p.stride == 1 || p.stride == 2)) return false;
  const auto same = [&](const Map& map) {
    return map.elements.dtype == p.x.elements.dtype && channels_are_pairs(map, p.channels, p.out_height, p.out_width);
  };
  constexpr int64_t kMost = 1 << 20;  // of a side: tiles then count in 32 bits
  return channels_are_pairs(p.x, p.channels, p.height, p.width) && same(p.y) && (!p.residual || same(p.residual)) &&
         p.height < kMost && p.width < kMost && p.padding < kMost && plan(p, 1).tiles() * p.batch * 16 < kMostBlocks;
}

cudaError_t depthwise_conv2d_act_pairs(const DepthwiseConv2dActParams& params, cudaStream_t stream) {
  const Plan p = plan(params, multiprocessors());
  const auto start = [&](void (*kernel)(Plan)) {
    return launch_blocks(kernel, p.tiles() * p.groups, static_cast<unsigned>(p.warps * kWarp), p.shared_floats(),
                         stream, p);
  };
  return with_element(p.x.elements.dtype, [&](auto element) {
    using T = decltype(element);
    const bool one = p.stride == 1;
    if (p.k == 1) return start(one ? pairs_kernel<T, 1, 1> : pairs_kernel<T, 1, 2>);
    if (p.k == 3) return start(one ? pairs_kernel<T, 3, 1> : pairs_kernel<T, 3, 2>);
    if (p.k == 5) return start(one ? pairs_kernel<T, 5, 1> : pairs_kernel<T, 5, 2>);
    return start(one ? pairs_kernel<T, 7, 1> : pairs_kernel<T, 7, 2>);
  });
}

}  // namespace mobilemamba
