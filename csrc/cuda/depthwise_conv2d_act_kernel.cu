// depthwise_conv2d_act; channels-last maps are mostly taken by depthwise_conv2d_act_pairs. A thread has one channel and
// one column of outputs and goes down a strip of rows.
//
// A block has some channels and columns, in whose order its threads read whole sectors of either layout: 32 channels by
// 8 columns where channels are dense, else whole rows. Its filters pass through shared memory, in whole sectors too, to
// registers, where they stay for a strip of several images. There, too, are the sums of the output rows that are not
// complete: a row of the image, read once by a thread, meets the whole filter at once and adds to all of them. At k = 7
// that is 49 multiply-adds and 7 loads an output, which the columns beside it find in the first cache. Bytes: x (with
// the few rows that strips share), residual and y once; the filters once for each block and strip.
#include "cuda/device.h"
#include "cuda/launchers.h"

namespace mobilemamba {
namespace {

constexpr int kThreads = 256;

struct Plan : DepthwiseConv2dActParams {
  int64_t block_channels, block_columns;  // a thread each
  int64_t images;                         // of an item, which has `rows` rows of outputs of each

  ANYWHERE int64_t channel_blocks() const { return ceil_div(channels, block_channels); }
  ANYWHERE int64_t column_blocks() const { return ceil_div(out_width, block_columns); }
  ANYWHERE int64_t strips() const { return ceil_div(out_height, rows); }
  ANYWHERE int64_t items() const { return channel_blocks() * column_blocks() * strips() * ceil_div(batch, images); }
};

// What an item and a thread have. Channel blocks vary fastest: they lie side by side in channels-last maps.
struct Place {
  int64_t first_channel, channel, column, begin, end, image, last_image;
  int lane;     // channel - first_channel
  bool inside;  // of the map

  __device__ Place(const Plan& p, int64_t item, bool channels_inside) {
    first_channel = item % p.channel_blocks() * p.block_channels, item /= p.channel_blocks();
    column = item % p.column_blocks() * p.block_columns, item /= p.column_blocks();
    begin = item % p.strips() * p.rows, item /= p.strips();
    end = begin + p.rows < p.out_height ? begin + p.rows : p.out_height;
    image = item * p.images;
    last_image = image + p.images < p.batch ? image + p.images : p.batch;
    const unsigned inner = static_cast<unsigned>(channels_inside ? p.block_channels : p.block_columns);
    const unsigned high = threadIdx.x / inner, low = threadIdx.x % inner;
    lane = static_cast<int>(channels_inside ? low : high);
    channel = first_channel + lane, column += channels_inside ? high : low;
    inside = channel < p.channels && column < p.out_width;
  }
};

__device__ __forceinline__ bool channels_inside(const Plan& p) { return p.x.channel == 1 && p.channels > 1; }

// Writes outputs down a column of an image.
template <class T>
struct Outputs {
  T* y;
  Elements residual;
  int64_t row, residual_row;
  Activation activation;
  float scale = 1.0f, shift = 0.0f;

  __device__ Outputs(const Plan& p, const Place& at, int64_t image)
      : y(static_cast<T*>(p.y.at(image, at.channel, at.begin, at.column).data)),
        row(p.y.row),
        residual_row(p.residual.row),
        activation(p.activation) {
    if (p.residual) residual = p.residual.at(image, at.channel, at.begin, at.column);
    if (p.scale) scale = load(p.scale + at.channel * p.scale_stride);
    if (p.shift) shift = load(p.shift + at.channel * p.shift_stride);
  }
  __device__ __forceinline__ void put(float sum) {
    sum = activate(sum, activation) * scale + shift;
    if (residual) {
      sum += load(residual);
      residual = residual + residual_row;
    }
    *y = from_float<T>(sum);
    y += row;
  }
};

template <int kK, int kStride>
__global__ void __launch_bounds__(kThreads, kK == 3   ? 3
                                            : kK == 5 ? 2
                                                      : 1) filter_kernel(Plan p) {
  constexpr int kTaps = kK * kK;
  constexpr int kOpen = (kK + kStride - 1) / kStride;  // rows of outputs that a row of the image adds to
  for (int64_t item = blockIdx.x; item < p.items(); item += gridDim.x) {
    const Place at(p, item, channels_inside(p));

    const int64_t rest = p.channels - at.first_channel;
    const int filters = static_cast<int>(rest < p.block_channels ? rest : p.block_channels);
    visit(p.weight + at.first_channel * kTaps, [&](const auto* weight) {
      for (int i = threadIdx.x; i < filters * kTaps; i += blockDim.x) shared_memory[i] = to_float(weight[i]);
    });
    __syncthreads();
    float w[kTaps];
#pragma unroll
    for (int i = 0; i < kTaps; ++i) w[i] = at.inside ? shared_memory[at.lane * kTaps + i] : 0.0f;
    __syncthreads();
    if (!at.inside) continue;
    const float bias = p.bias ? load(p.bias + at.channel * p.bias_stride) : 0.0f;

    const int64_t left = at.column * kStride - p.padding, top = at.begin * kStride - p.padding;
    bool within[kK];
#pragma unroll
    for (int i = 0; i < kK; ++i) within[i] = left + i >= 0 && left + i < p.width;
    const int64_t steps = at.end - at.begin + kOpen - 1;
    visit(p.x.elements, [&](const auto* x) {
      for (int64_t image = at.image; image < at.last_image; ++image) {
        Outputs<std::remove_cv_t<std::remove_pointer_t<decltype(x)>>> outputs(p, at, image);
        int64_t row = top;
        int64_t in = image * p.x.batch + at.channel * p.x.channel + row * p.x.row + left * p.x.column;
        float open[kOpen];  // the sums of the output rows that `row` meets, the next one first
#pragma unroll
        for (int j = 0; j < kOpen; ++j) open[j] = bias;
        for (int64_t first = 0; first < steps; first += kOpen) {
#pragma unroll
          for (int u = 0; u < kOpen; ++u) {  // as many as give every sum its old register back
            if (first + u >= steps) break;
#pragma unroll
            for (int i = 0; i < kStride; ++i) {
              if (row >= 0 && row < p.height) {
                float v[kK];
#pragma unroll
                for (int t = 0; t < kK; ++t) v[t] = within[t] ? to_float(x[in + t * p.x.column]) : 0.0f;
#pragma unroll
                for (int j = 0; i + j * kStride < kK; ++j)
#pragma unroll
                  for (int t = 0; t < kK; ++t) open[j] += v[t] * w[(i + j * kStride) * kK + t];
              }
              ++row, in += p.x.row;
            }
            if (first + u >= kOpen - 1) outputs.put(open[kOpen - 1]);
#pragma unroll
            for (int j = kOpen - 1; j > 0; --j) open[j] = open[j - 1];
            open[0] = bias;
          }
        }
      }
    });
  }
}

// Any filter: an output at a time, and the filter from the caches.
__global__ void __launch_bounds__(kThreads, 2) any_filter_kernel(Plan p) {
  for (int64_t item = blockIdx.x; item < p.items(); item += gridDim.x) {
    const Place at(p, item, channels_inside(p));
    if (!at.inside) continue;
    const float bias = p.bias ? load(p.bias + at.channel * p.bias_stride) : 0.0f;
    const int64_t left = at.column * p.stride - p.padding;
    const int64_t t0 = left < 0 ? -left : 0, t1 = left + p.k > p.width ? p.width - left : p.k;
    visit(p.x.elements, [&](const auto* maps) {
      visit(p.weight + at.channel * p.k * p.k, [&](const auto* weight) {
        for (int64_t image = at.image; image < at.last_image; ++image) {
          Outputs<std::remove_cv_t<std::remove_pointer_t<decltype(maps)>>> outputs(p, at, image);
          const auto* x = maps + image * p.x.batch + at.channel * p.x.channel;
          for (int64_t y = at.begin; y < at.end; ++y) {
            const int64_t top = y * p.stride - p.padding;
            const int64_t r0 = top < 0 ? -top : 0, r1 = top + p.k > p.height ? p.height - top : p.k;
            float sum = bias;
            for (int64_t r = r0; r < r1; ++r)
              for (int64_t t = t0; t < t1; ++t)
                sum += to_float(x[(top + r) * p.x.row + (left + t) * p.x.column]) * to_float(weight[r * p.k + t]);
            outputs.put(sum);
          }
        }
      });
    });
  }
}

void plan(Plan& p) {
  constexpr int64_t kMostChannels = 64, kThreadsOfProcessor = 2048, kItemsOfProcessor = 16;
  constexpr int64_t kLeastRows = 4, kMostRows = 32, kMostImages = 8;
  const int64_t processors = multiprocessors();
  if (p.x.channel == 1 && p.channels > 1) {
    p.block_channels = p.channels < kWarp ? p.channels : kWarp;
    p.block_columns = share(p.out_width, kThreads / p.block_channels);
  } else {
    p.block_columns = share(p.out_width, kThreads);
    p.block_channels = between(kThreads / p.block_columns, 1, p.channels < kMostChannels ? p.channels : kMostChannels);
  }
  const int64_t threads = p.batch * p.channels * p.out_width;
  const int64_t strips = between(ceil_div(processors * kThreadsOfProcessor, threads), ceil_div(p.out_height, kMostRows),
                                 ceil_div(p.out_height, kLeastRows));
  p.rows = ceil_div(p.out_height, strips);
  p.images = 1;
  p.images = between(p.items() / (processors * kItemsOfProcessor), 1, kMostImages);
}

}  // namespace

cudaError_t depthwise_conv2d_act(const DepthwiseConv2dActParams& params, cudaStream_t stream) {
  if (depthwise_takes_pairs(params)) return depthwise_conv2d_act_pairs(params, stream);
  Plan p{params};
  plan(p);
  const int64_t threads = p.block_channels * p.block_columns, floats = p.block_channels * p.k * p.k;
  const auto start = [&](void (*kernel)(Plan), int64_t shared) {
    return launch(kernel, p, p.items(), static_cast<unsigned>(threads), shared, stream);
  };
  if (p.k == 3 && p.stride == 1) return start(filter_kernel<3, 1>, floats);
  if (p.k == 3 && p.stride == 2) return start(filter_kernel<3, 2>, floats);
  if (p.k == 5 && p.stride == 1) return start(filter_kernel<5, 1>, floats);
  if (p.k == 5 && p.stride == 2) return start(filter_kernel<5, 2>, floats);
  if (p.k == 7 && p.stride == 1) return start(filter_kernel<7, 1>, floats);
  if (p.k == 7 && p.stride == 2) return start(filter_kernel<7, 2>, floats);
  return start(any_filter_kernel, 0);
}

}  // namespace mobilemamba
