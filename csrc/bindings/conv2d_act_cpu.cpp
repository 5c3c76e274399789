// conv2d_act_fwd on the CPU.
#include <vector>

#include "bindings/products.h"
#include "include/conv2d_act.h"

DECLARE_KERNEL(conv2d_act, Conv2dActParams)

namespace mobilemamba {
namespace {

constexpr int64_t kRows = 4;          // output rows of an item: few rows of the image are loaded twice
constexpr int64_t kItemsAThread = 4;  // at least, to divide evenly

// The weight as a dense (k, k, C, columns), itself where it lies in memory so.
Tensor pack(const Tensor& weight, int64_t columns) {
  const int64_t filters = weight.size(0), channels = weight.size(1), k = weight.size(2);
  const bool in_place = filters == columns && weight.stride(0) == 1 && weight.stride(1) == columns &&
                        weight.stride(3) == channels * columns && weight.stride(2) == k * channels * columns;
  if (in_place) return weight;
  const float* from = static_cast<const float*>(weight.data_ptr());
  Tensor packed = torch::stable::new_empty(weight, {k, k, channels, columns});
  constexpr int64_t kTogether = 16;  // filters: as many streams of memory as are read well
  for (int64_t first = 0; first < filters; first += kTogether)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t y = 0; y < k; ++y)
        for (int64_t x = 0; x < k; ++x) {
          const float* tap = from + c * weight.stride(1) + y * weight.stride(2) + x * weight.stride(3);
          float* to = static_cast<float*>(packed.data_ptr()) + ((y * k + x) * channels + c) * columns;
          for (int64_t f = first; f < std::min(first + kTogether, filters); ++f) to[f] = tap[f * weight.stride(0)];
        }
  return packed;
}

// PyTorch's convolution: for bfloat16 where the processor multiplies it, since matrix instructions are the vendor's
// business, and for padding too large to be written out.
Tensor vendor_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride,
                          int64_t padding, Activation activation, ScalarType type) {
  using torch::stable::detail::from;
  const auto both = [](int64_t n) { return std::vector<int64_t>{n, n}; };
  // Not aten::conv2d, which would follow the caller's autocast.
  std::array<StableIValue, 9> stack{from(convert(x, type)),
                                    from(convert(weight, type)),
                                    from(bias ? std::make_optional(convert(*bias, type)) : std::nullopt),
                                    from(both(stride)),
                                    from(both(padding)),
                                    from(both(1)),
                                    from(false),
                                    from(both(0)),
                                    from(int64_t{1})};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor y = torch::stable::detail::to<Tensor>(stack[0]);
  if (activation == Activation::kNone) return y;
  const char* name = activation == Activation::kRelu ? "aten::relu_" : "aten::silu_";
  std::array<StableIValue, 1> one{from(y)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", one.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(one[0]);
}

// Whether type and strides agree, those of dimensions of size 1 too: what follows chooses its layout by them.
bool same_form(const Tensor& a, const Tensor& b) {
  bool same = a.scalar_type() == b.scalar_type();
  for (int64_t i = 0; i < a.dim(); ++i) same = same && a.stride(i) == b.stride(i);
  return same;
}

Tensor conv2d_act_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t stride, int64_t padding,
                          std::string activation) {
  Conv2dActParams p{};
  p.x = map_of(x);
  STD_TORCH_CHECK(weight.dim() == 4, "mobilemamba: weight must have four dimensions, got ", weight.dim());
  p.batch = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3), p.filters = weight.size(0);
  p.k = weight.size(2), p.stride = stride, p.padding = padding;
  check_size(weight, 1, p.channels), check_size(weight, 3, p.k);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1, "mobilemamba: bias must have one dimension, got ", bias->dim());
    check_size(*bias, 0, p.filters);
  }
  p.out_height = output_size(p.height, p.k, stride, padding);
  p.out_width = output_size(p.width, p.k, stride, padding);
  Tensor y = empty_image(x, p.filters, p.out_height, p.out_width);
  if (y.numel() == 0) return y;
  p.y = map_of(y);
  p.activation = activation_of(activation);
  if (x.numel() == 0) p.channels = 0;  // the filters meet nothing but the border's zeros

  const int64_t lanes = vector_lanes();
  const int64_t bands = ceil_div(kItemsAThread * torch::stable::get_num_threads(), p.batch);
  // Rows of outputs whose filters do not overlap share none of the image.
  p.rows = stride < p.k ? std::clamp<int64_t>(p.out_height / bands, 1, kRows) : 1;
  const ScalarType type = product_type(x);
  if (x.numel() > 0 && (type == ScalarType::BFloat16 || !conv2d_scratch_is_small(p, lanes))) {
    const Tensor computed = vendor_convolution(x, weight, bias, stride, padding, p.activation, type);
    return same_form(computed, y) ? computed : torch::stable::copy_(y, computed);
  }

  p.columns = ceil_div(p.filters, lanes) * lanes;
  const Tensor weights = pack(convert(weight, ScalarType::Float), p.columns);
  std::vector<float> biases = bias ? values(*bias) : std::vector<float>();
  biases.resize(p.columns);
  p.weight = static_cast<const float*>(weights.data_ptr()), p.bias = biases.data();
  parallel(KERNEL(conv2d_act), p, p.batch * conv2d_bands(p),
           p.rows * p.out_width * p.k * p.k * p.channels * p.columns / lanes, conv2d_scratch(p, lanes));
  return y;
}

}  // namespace
}  // namespace mobilemamba

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, CPU, m) {
  m.impl("conv2d_act_fwd", TORCH_BOX(&mobilemamba::conv2d_act_forward));
}
