// The sums of a matrix product: lanes are outputs, so that a number of x, spread over a register, meets a row of the
// weight. Up to eight positions of three registers of outputs stay in registers for the whole depth: eight numbers and
// three rows of the weight are loaded for 24 multiply-adds. The weight is read from beginning to end, panel by panel,
// which a processor foresees also where it comes from memory. Bias, activation and residual meet the sums in registers.
//
// A sum is always taken in the order of the depth, whichever thread has it and whatever positions go with it.
#include "cpu/products.h"

BEGIN_KERNELS
namespace {

#if defined(__AVX512F__)
constexpr int kPositions = 8, kVectors = 3;  // of 32 registers
#else
constexpr int kPositions = 6, kVectors = 2;  // of 16
#endif

// How numbers of x and of the weight are multiplied: a step of the depth is one number, or a pair of 16 bits.
struct Floats {
  using Number = float;
  static constexpr int kTogether = 1;
  Vec number;
  INLINE_MEMBER explicit Floats(const float* x) : number(splat(*x)) {}
  INLINE_MEMBER Vec times(const float* weight, Vec sum) const { return sum + number * load(weight); }
};

#if defined(__AVX512F__)
// With the processor's instruction for it, which a flag allows: the compiler's would need another set of kernels.
struct PairsInHardware {
  using Number = BFloat16;
  static constexpr int kTogether = 2;
  BitVec pair;
  INLINE_MEMBER explicit PairsInHardware(const BFloat16* x) {
    uint32_t both;
    std::memcpy(&both, x, 4);
    pair = BitVec{} + both;
  }
  INLINE_MEMBER Vec times(const BFloat16* weight, Vec sum) const {
    BitVec both;
    std::memcpy(&both, weight, sizeof both);
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(both), "v"(pair));
    return sum;
  }
};
#endif
struct Pairs {
  using Number = BFloat16;
  static constexpr int kTogether = 2;
  Vec first, second;
  INLINE_MEMBER explicit Pairs(const BFloat16* x)
      : first(from_bits(BitVec{} + (uint32_t{x[0].bits} << 16))),
        second(from_bits(BitVec{} + (uint32_t{x[1].bits} << 16))) {}
  INLINE_MEMBER Vec times(const BFloat16* weight, Vec sum) const {
    BitVec both;
    std::memcpy(&both, weight, sizeof both);
    return sum + first * from_bits(both << 16) + second * from_bits(both & 0xffff0000u);
  }
};

// kSome registers of outputs from `output` on, of which `width` lie behind each other in the panel.
template <class Numbers>
struct Columns {
  const typename Numbers::Number* weight;
  int64_t width, output, outputs;
};

// y = activation(sums) + residual + more of any type, for outputs that need not fill registers.
static void finish(const Slab& s, const float* sums, int64_t width, int64_t count, int64_t first, int64_t output,
                   int64_t outputs) {
  const auto rows = [&](auto* y) {
    const auto* residual = static_cast<decltype(y)>(s.residual.data);
    const auto* more = static_cast<decltype(y)>(s.more.data);
    with_activation(s.activation, [&](auto act) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < outputs; c += kLanes) {
          const int64_t some = outputs - c < kLanes ? outputs - c : kLanes;
          Vec v = act(load(sums + i * width + c));
          if (residual) v += load_some(residual + (first + i) * s.residual_step + output + c, some);
          if (more) v += load_some(more + (first + i) * s.more_step + output + c, some);
          store_some(y + (first + i) * s.y_step + output + c, v, some);
        }
    });
  };
  s.y.dtype == DType::kFloat32 ? rows(static_cast<float*>(s.y.data)) : rows(static_cast<BFloat16*>(s.y.data));
}

// kCount positions from `first` on.
template <class Numbers, int kCount, int kSome>
static void sum_products(const Slab& s, const Columns<Numbers>& columns, int64_t first) {
  constexpr std::make_integer_sequence<int, kCount> positions{};
  constexpr std::make_integer_sequence<int, kSome> vectors{};
  using Number = typename Numbers::Number;
  const int64_t step = columns.width * Numbers::kTogether, run = s.weight.depth / s.runs;
  const Number* weight = columns.weight;
  const Number* x = static_cast<const Number*>(s.x) + first * s.x_step;
  Vec sum[kCount][kSome];
  unrolled(positions, [&](auto i) ALWAYS_INLINE {
    unrolled(vectors, [&](auto v) ALWAYS_INLINE { sum[i][v] = load(s.bias + columns.output + v * kLanes); });
  });
  for (int64_t r = 0; r < s.runs; ++r, x += s.run_step)
    for (int64_t j = 0; j < run; j += Numbers::kTogether, weight += step)
      unrolled(positions, [&](auto i) ALWAYS_INLINE {
        const Numbers number(x + i * s.x_step + j);
        unrolled(vectors, [&](auto v) ALWAYS_INLINE {
          sum[i][v] = number.times(weight + v * kLanes * Numbers::kTogether, sum[i][v]);
        });
      });

  if (s.y.dtype == DType::kFloat32 && s.activation != Activation::kSilu) {
    const Vec low = splat(s.activation == Activation::kRelu ? 0.0f : -__builtin_inff());
    float* y = static_cast<float*>(s.y.data) + first * s.y_step + columns.output;
    const bool whole = columns.outputs >= kSome * kLanes;
    if (whole && s.residual) {
      const float* residual = static_cast<float*>(s.residual.data) + first * s.residual_step + columns.output;
      unrolled(positions, [&](auto i) ALWAYS_INLINE {
        unrolled(vectors, [&](auto v) ALWAYS_INLINE {
          const Vec added = load(residual + i * s.residual_step + v * kLanes);
          store(y + i * s.y_step + v * kLanes, at_least(sum[i][v], low) + added);
        });
      });
      if (!s.more) return;
      const float* more = static_cast<float*>(s.more.data) + first * s.more_step + columns.output;
      unrolled(positions, [&](auto i) ALWAYS_INLINE {
        unrolled(vectors, [&](auto v) ALWAYS_INLINE {
          float* to = y + i * s.y_step + v * kLanes;
          store(to, load(to) + load(more + i * s.more_step + v * kLanes));
        });
      });
      return;
    }
    if (!s.residual && !s.more) {
      unrolled(positions, [&](auto i) ALWAYS_INLINE {
        unrolled(vectors, [&](auto v) ALWAYS_INLINE {
          const int64_t left = columns.outputs - v * kLanes;
          if (whole || left >= kLanes)
            store(y + i * s.y_step + v * kLanes, at_least(sum[i][v], low));
          else if (left > 0)
            store_some(y + i * s.y_step + v * kLanes, at_least(sum[i][v], low), left);
        });
      });
      return;
    }
  }
  float sums[kCount * kSome * kLanes];
  unrolled(positions, [&](auto i) ALWAYS_INLINE {
    unrolled(vectors, [&](auto v) ALWAYS_INLINE { store(sums + (i * kSome + v) * kLanes, sum[i][v]); });
  });
  const int64_t width = kSome * kLanes;
  finish(s, sums, width, kCount, first, columns.output, columns.outputs < width ? columns.outputs : width);
}

template <class Numbers>
static void multiply_panels(const Slab& s, int64_t begin, int64_t end) {
  const int64_t outputs = s.weight.outputs, depth = packed_depth(s.weight.depth, s.weight.bfloat16);
  const int64_t parts = (s.count + kPositions - 1) / kPositions;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t from = panel_begin(outputs, panel), to = panel_begin(outputs, panel + 1);
    const auto* weight = static_cast<const typename Numbers::Number*>(s.weight.data) + from * depth;
    for (int64_t output = from; output < to && output < outputs;) {
      const int64_t vectors = (to - output) / kLanes;
      with_count<kVectors>(vectors < kVectors ? vectors : kVectors, [&](auto some) {
        const Columns<Numbers> columns{weight + (output - from) * Numbers::kTogether, to - from, output,
                                       outputs - output};
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t first = part * s.count / parts, last = (part + 1) * s.count / parts;
          with_count<kPositions>(last - first,
                                 [&](auto count) { sum_products<Numbers, count, some>(s, columns, first); });
        }
        output += some * kLanes;
      });
    }
  }
}

}  // namespace

// Items: panels of the weight.
void multiply(const Slab& s, int64_t begin, int64_t end) {
  if (!s.weight.bfloat16) return multiply_panels<Floats>(s, begin, end);
#if defined(__AVX512F__)
  if (s.weight.in_hardware) return multiply_panels<PairsInHardware>(s, begin, end);
#endif
  multiply_panels<Pairs>(s, begin, end);
}

END_KERNELS
