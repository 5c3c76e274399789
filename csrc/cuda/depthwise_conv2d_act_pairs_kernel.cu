// depthwise_conv2d_act of channels-last maps, 1×1 to 7×7 at stride 1 and 2: a lane has two channels.
//
// A block has 64 channels (or as many images of fewer as fill 32 lanes) of a tile of outputs, up to 16×16. It copies
// what lies under the filter, with zeros beside the map, and the residual into shared memory, 16 bytes a load and
// several on their way, so that whole tiles and not single rows wait for memory. Then a warp goes down strips of up to
// 8 outputs of a column, all of it unrolled: two filters and the open sums in registers, a row of the tile under the
// filter read once (k loads of 4 bytes at constant offsets) for all output rows that it meets. Bytes: x (with the rows
// and columns that tiles share), residual and y once; filters, in float32, once a block.
//
// Instructions of an output (sm_90, 16 bits, 14×14): about 25 at k = 3 and 97 at k = 7, of which k² multiply-adds, and
// ten for copying and what a block does once.
#include "cuda/device.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

constexpr int kRows = 8;   // of a strip at most
constexpr int kLoads = 4;  // of a thread on their way
template <int kK>
constexpr int kThreads = kK <= 3 ? 384 : 192;
template <int kK>
constexpr int kBlocksOfProcessor = kK == 7 ? 2 : 3;

struct Plan : DepthwiseConv2dActParams {
  int pairs, images;  // of a block: a lane each
  unsigned channel_blocks, row_tiles, column_tiles;
  int tile_rows, tile_columns, in_columns;  // of outputs, and of what lies under the filter
  int strips, strip;                        // of a tile, and its rows
  SmallDivisor by_column, by_pair;
  bool vectors;  // 16 bytes a load

  ANYWHERE int in_rows() const { return static_cast<int>((tile_rows - 1) * stride + k); }
  ANYWHERE int64_t filter_floats() const { return ceil_div(2 * pairs * k * k, 4) * 4; }
  int64_t blocks() const {
    return static_cast<int64_t>(channel_blocks) * row_tiles * column_tiles * ceil_div(batch, images);
  }
  int64_t shared_floats() const {
    const int64_t positions = in_rows() * in_columns + (residual ? tile_rows * tile_columns : 0);
    return filter_floats() + positions * kWarp * element_size(x.elements.dtype) / 2;
  }
};

// Copies a rectangle of a map to `tile`, [row][column][lane], zeros for what is beside the map and for absent channels.
// A warp has a row at a time.
template <class Vector, class T>
__device__ __forceinline__ void copy(TwoChannels<T>* tile, const Plan& p, const Map& map, int64_t first_image,
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
#pragma unroll 1
      for (int x = begin; x < columns; x += kLoads * kStep) {
        Vector v[kLoads];
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
          v[j] = Vector{};
          if (static_cast<unsigned>(x + j * kStep - low) < count)
            v[j] = *reinterpret_cast<const Vector*>(source + from);
          from += kStep * column;
        }
#pragma unroll
        for (int j = 0; j < kLoads; ++j)
          if (x + j * kStep < columns) to[j * kStep * kVectors] = v[j];
        to += kLoads * kStep * kVectors;
      }
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
  const int64_t first_image = static_cast<int64_t>(item) * p.images;

  auto* tile = reinterpret_cast<TwoChannels<T>*>(shared_memory + p.filter_floats());
  auto* residuals = tile + p.in_rows() * p.in_columns * kWarp;
  const auto copy_all = [&](auto vector) {
    using Vector = decltype(vector);
    const int padding = static_cast<int>(p.padding);
    copy<Vector>(tile, p, p.x, first_image, first_channel, first_row * kStride - padding,
                 first_column * kStride - padding, p.in_rows(), p.in_columns, static_cast<int>(p.height),
                 static_cast<int>(p.width));
    if (p.residual)
      copy<Vector>(residuals, p, p.residual, first_image, first_channel, first_row, first_column, p.tile_rows,
                   p.tile_columns, static_cast<int>(p.out_height), static_cast<int>(p.out_width));
  };
  if (p.vectors)
    copy_all(SixteenBytes{});
  else
    copy_all(TwoChannels<T>{});
  const int rest = static_cast<int>(p.channels) - first_channel;
  visit(p.weight + static_cast<int64_t>(first_channel) * kTaps, [&](const auto* weight) {
    const int count = (rest < 2 * p.pairs ? rest : 2 * p.pairs) * kTaps;
    for (int i = threadIdx.x; i < count; i += blockDim.x) shared_memory[i] = to_float(weight[i]);
  });
  __syncthreads();

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int image = static_cast<int>(p.by_pair.quotient(lane)), pair = lane - image * p.pairs;
  const int channel = first_channel + 2 * pair;
  if (image >= p.images || first_image + image >= p.batch || channel >= p.channels) return;
  float2 w[kTaps];
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {  // side by side in shared memory: the filter of one channel, then that of the other
    const float2 two = reinterpret_cast<const float2*>(shared_memory)[pair * kTaps + i];
    (2 * i < kTaps ? w[2 * i].x : w[2 * i - kTaps].y) = two.x;
    (2 * i + 1 < kTaps ? w[2 * i + 1].x : w[2 * i + 1 - kTaps].y) = two.y;
  }
  const auto read = [&](const Elements& vector, int64_t stride, float absent) {
    const Elements own = vector + channel * stride;
    return vector ? float2{load(own), load(own + stride)} : float2{absent, absent};
  };
  const float2 bias = read(p.bias, p.bias_stride, 0.0f);
  const float2 scale = read(p.scale, p.scale_stride, 1.0f), shift = read(p.shift, p.shift_stride, 0.0f);
  T* const y = static_cast<T*>(p.y.elements.data) + (first_image + image) * p.y.batch + channel;
  const int y_row = static_cast<int>(p.y.row);

#pragma unroll 1
  for (int strand = warp; strand < p.strips * p.tile_columns; strand += warps) {
    const int of_tile = static_cast<int>(p.by_column.quotient(strand)), column = strand - of_tile * p.tile_columns;
    const int top = of_tile * p.strip, row = first_row + top;
    int rows = p.tile_rows - top < p.strip ? p.tile_rows - top : p.strip;
    if (p.out_height - row < rows) rows = static_cast<int>(p.out_height) - row;
    if (rows <= 0 || first_column + column >= p.out_width) continue;
    const TwoChannels<T>* in = tile + (top * kStride * p.in_columns + column * kStride) * kWarp + lane;
    const TwoChannels<T>* added = residuals + (top * p.tile_columns + column) * kWarp + lane;
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
          sum = {sum.x + more.x, sum.y + more.y}, added += p.tile_columns * kWarp;
        }
        *reinterpret_cast<TwoChannels<T>*>(out) = TwoChannels<T>::of(sum);
        out += y_row;
        if (o + 1 == rows) goto complete;
      }
    }
  complete:;
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
  Plan p{params};
  const int64_t pairs = p.channels / 2;
  p.pairs = static_cast<int>(pairs < kWarp ? pairs : kWarp);
  p.images = kWarp / p.pairs;
  p.channel_blocks = static_cast<unsigned>(ceil_div(pairs, p.pairs));
  divide(p, share(p.out_height, kMostSide), share(p.out_width, kMostSide));
  const auto smaller = [&] {
    if (p.tile_rows >= p.tile_columns)
      divide(p, ceil_div(p.tile_rows, 2), p.tile_columns);
    else
      divide(p, p.tile_rows, ceil_div(p.tile_columns, 2));
  };
  while (p.shared_floats() > kMostFloats && p.tile_rows + p.tile_columns > 2) smaller();
  while (p.blocks() < processors && (p.tile_rows > kLeastSide || p.tile_columns > kLeastSide)) smaller();
  p.strips = static_cast<int>(ceil_div(p.tile_rows, kRows));
  p.strip = static_cast<int>(ceil_div(p.tile_rows, p.strips));
  p.by_column = SmallDivisor(p.tile_columns);
  p.by_pair = SmallDivisor(p.pairs);
  const auto fits = [&](const Map& map) { return channels_are_vectors(map, p.channels); };
  p.vectors = fits(p.x) && (!p.residual || fits(p.residual));
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
         p.height < kMost && p.width < kMost && p.padding < kMost && plan(p, 1).blocks() * 16 < kMostBlocks;
}

cudaError_t depthwise_conv2d_act_pairs(const DepthwiseConv2dActParams& params, cudaStream_t stream) {
  const Plan p = plan(params, multiprocessors());
  const auto start = [&](void (*kernel)(Plan), int64_t most_threads) {
    const int64_t strands = static_cast<int64_t>(p.strips) * p.tile_columns;
    const int64_t warps = share(strands, most_threads / kWarp);
    return launch_blocks(kernel, p.blocks(), static_cast<unsigned>(warps * kWarp), p.shared_floats(), stream, p);
  };
  return with_element(p.x.elements.dtype, [&](auto element) {
    using T = decltype(element);
    const bool one = p.stride == 1;
    if (p.k == 1) return start(one ? pairs_kernel<T, 1, 1> : pairs_kernel<T, 1, 2>, kThreads<1>);
    if (p.k == 3) return start(one ? pairs_kernel<T, 3, 1> : pairs_kernel<T, 3, 2>, kThreads<3>);
    if (p.k == 5) return start(one ? pairs_kernel<T, 5, 1> : pairs_kernel<T, 5, 2>, kThreads<5>);
    return start(one ? pairs_kernel<T, 7, 1> : pairs_kernel<T, 7, 2>, kThreads<7>);
  });
}

}  // namespace mobilemamba
