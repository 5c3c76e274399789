// conv2d_act_fwd on the CPU.
#include <cmath>
#include <vector>

#include "bindings/vendor_products.h"
#include "include/conv2d_act.h"

DECLARE_KERNEL(conv2d_act, Conv2dActParams)

namespace mobilemamba {
namespace {

constexpr int64_t kRows = 4;          // output rows of an item: few rows of the image are loaded twice
constexpr int64_t kItemsAThread = 4;  // at least, to divide evenly

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
  STD_TORCH_CHECK(weight.dim() == 4 || weight.dim() == 3,
                  "mobilemamba: weight must have four dimensions, or be packed");
  p.batch = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
  p.filters = outputs_of(weight, bias), p.stride = stride, p.padding = padding;
  if (weight.dim() == 4) {
    p.k = weight.size(2);
  } else {
    const double depth = static_cast<double>(weight.size(1)) * (weight.size(2) / kPackedLanes);
    p.k = std::max<int64_t>(1, std::llround(std::sqrt(depth / std::max<int64_t>(1, p.channels))));
  }
  if (weight.dim() == 4) check_size(weight, 1, p.channels), check_size(weight, 3, p.k);
  // A pair of bfloat16 must not reach over the end of a run under the filter.
  const bool bfloat16 = in_bfloat16(x, weight) && (weight.dim() == 3 || p.k * p.channels % 2 == 0);
  const bool vendor = vendor_multiplies(x, weight) && x.scalar_type() == ScalarType::BFloat16 && x.numel() > 0;
  Weights weights;
  if (!vendor) {
    weights = pack(weight, bias, p.channels, bfloat16);
    STD_TORCH_CHECK(weights.packed.depth == p.k * p.k * p.channels && (!bfloat16 || p.k * p.channels % 2 == 0),
                    "mobilemamba: a packed weight does not match the image; call the public function, which explains");
  }
  p.out_height = output_size(p.height, p.k, stride, padding);
  p.out_width = output_size(p.width, p.k, stride, padding);
  Tensor y = empty_image(x, p.filters, p.out_height, p.out_width);
  if (y.numel() == 0) return y;
  p.y = map_of(y);
  p.activation = activation_of(activation);
  if (x.numel() == 0) p.channels = 0;  // the filters meet nothing but the border's zeros

  const int64_t bands = ceil_div(kItemsAThread * torch::stable::get_num_threads(), p.batch);
  // Rows of outputs whose filters do not overlap share none of the image.
  p.rows = stride < p.k ? std::clamp<int64_t>(p.out_height / bands, 1, kRows) : 1;
  if (vendor || (x.numel() > 0 && !conv2d_scratch_is_small(p))) {
    STD_TORCH_CHECK(weight.dim() == 4, "mobilemamba: padding ", padding, " is too large for a packed weight");
    const ScalarType type = vendor ? ScalarType::BFloat16 : ScalarType::Float;
    const Tensor computed = vendor_convolution(x, weight, bias, stride, padding, p.activation, type);
    return same_form(computed, y) ? computed : torch::stable::copy_(y, computed);
  }

  p.weight = weights.packed, p.bias = weights.bias.data();
  if (p.channels == 0) p.weight.depth = 0;
  parallel(KERNEL(conv2d_act), p, p.batch * conv2d_bands(p),
           p.rows * p.out_width * p.k * p.k * p.channels * ceil_div(p.filters, vector_lanes()),
           conv2d_scratch(p, vector_lanes()));
  return y;
}

}  // namespace
}  // namespace mobilemamba

STABLE_TORCH_LIBRARY_IMPL(mobilemamba, MOBILEMAMBA_DEVICE, m) {
  m.impl("conv2d_act_fwd", TORCH_BOX(&mobilemamba::conv2d_act_forward));
}
