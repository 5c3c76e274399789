// conv2d_act_fwd on the CPU.
#include <vector>

#include "bindings/products.h"
#include "include/conv2d_act.h"

DECLARE_KERNEL(conv2d_act, Conv2dActParams)

namespace mobilemamba {
namespace {

constexpr int64_t kRows = 4;          // output rows of an item: few rows of the image are loaded twice
constexpr int64_t kItemsAThread = 4;  // at least, to divide evenly

// The weight as (k, k, C, columns), in place where it lies in memory so.
const float* pack(const Tensor& weight, int64_t columns, std::vector<float>& packed) {
  const int64_t filters = weight.size(0), channels = weight.size(1), k = weight.size(2);
  const bool in_place = filters == columns && weight.stride(0) == 1 && weight.stride(1) == columns &&
                        weight.stride(3) == channels * columns && weight.stride(2) == k * channels * columns;
  const float* from = static_cast<const float*>(weight.data_ptr());
  if (in_place) return from;
  packed.resize(k * k * channels * columns);
  constexpr int64_t kTogether = 16;  // filters: as many streams of memory as are read well
  for (int64_t first = 0; first < filters; first += kTogether)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t y = 0; y < k; ++y)
        for (int64_t x = 0; x < k; ++x) {
          const float* tap = from + c * weight.stride(1) + y * weight.stride(2) + x * weight.stride(3);
          float* to = packed.data() + ((y * k + x) * channels + c) * columns;
          for (int64_t f = first; f < std::min(first + kTogether, filters); ++f) to[f] = tap[f * weight.stride(0)];
        }
  return packed.data();
}

// PyTorch's convolution, for bfloat16 where the processor multiplies it: matrix instructions are the vendor's business.
Tensor vendor_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride,
                          int64_t padding, Activation activation) {
  using torch::stable::detail::from;
  const auto both = [](int64_t n) { return std::vector<int64_t>{n, n}; };
  const ScalarType type = ScalarType::BFloat16;
  std::array<StableIValue, 7> stack{from(x),
                                    from(convert(weight, type)),
                                    from(bias ? std::make_optional(convert(*bias, type)) : std::nullopt),
                                    from(both(stride)),
                                    from(both(padding)),
                                    from(both(1)),
                                    from(int64_t{1})};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::conv2d", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor y = torch::stable::detail::to<Tensor>(stack[0]);
  if (activation == Activation::kNone) return y;
  const char* name = activation == Activation::kRelu ? "aten::relu_" : "aten::silu_";
  std::array<StableIValue, 1> one{from(y)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", one.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(one[0]);
}

bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
  return true;
}

Tensor conv2d_act_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t stride, int64_t padding,
                          std::string activation) {
  Conv2dActParams p{};
  p.x = map_of(x);
  STD_TORCH_CHECK(weight.dim() == 4, "mobilemamba: weight must have four dimensions, got ", weight.dim());
  p.batch = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3), p.filters = weight.size(0);
  p.k = weight.size(2), p.stride = stride, p.padding = padding;
  STD_TORCH_CHECK(
      p.k >= 1 && stride >= 1 && padding >= 0 && p.height + 2 * padding >= p.k && p.width + 2 * padding >= p.k,
      "mobilemamba: the filter does not fit into the padded image; call the public function, which explains");
  check_size(weight, 1, p.channels), check_size(weight, 3, p.k);
  if (bias) check_size(*bias, 0, p.filters);
  p.out_height = (p.height + 2 * padding - p.k) / stride + 1;
  p.out_width = (p.width + 2 * padding - p.k) / stride + 1;
  Tensor y = empty_image(x, p.filters, p.out_height, p.out_width);
  if (y.numel() == 0) return y;
  p.y = map_of(y);
  p.activation = activation_of(activation);
  if (product_type(x) == ScalarType::BFloat16 && x.numel() > 0) {
    const Tensor computed = vendor_convolution(x, weight, bias, stride, padding, p.activation);
    return same_layout(computed, y) ? computed : torch::stable::copy_(y, computed);
  }

  const int64_t lanes = vector_lanes();
  p.columns = ceil_div(p.filters, lanes) * lanes;
  const Tensor weights = convert(weight, ScalarType::Float);
  std::vector<float> packed, biases(p.columns);
  p.weight = pack(weights, p.columns, packed);
  if (bias) {
    const Tensor values = convert(*bias, ScalarType::Float);
    for (int64_t f = 0; f < p.filters; ++f)
      biases[f] = static_cast<const float*>(values.data_ptr())[f * values.stride(0)];
  }
  p.bias = biases.data();

  const int64_t bands = ceil_div(kItemsAThread * torch::stable::get_num_threads(), p.batch);
  p.rows = std::clamp<int64_t>(p.out_height / bands, 1, kRows);
  parallel(KERNEL(conv2d_act), p, p.batch * conv2d_bands(p),
           p.rows * p.out_width * p.k * p.k * p.channels * p.columns / lanes, conv2d_scratch(p, lanes));
  return y;
}

}  // namespace
}  // namespace mobilemamba

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, CPU, m) {
  m.impl("conv2d_act_fwd", TORCH_BOX(&mobilemamba::conv2d_act_forward));
}
