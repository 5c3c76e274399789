// One vector register of float32 and the functions of it that the kernels need.
//
// The compiler's own vector extension does the arithmetic, so one text serves every instruction set; intrinsics appear
// only where it has no operator. Everything is internal to its translation unit: a function that the linker merged
// between instruction sets could run AVX-512 code on a machine without it.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "include/tensor_view.h"

#define MOBILEMAMBA_CONCAT_(a, b) a##b
#define MOBILEMAMBA_CONCAT(a, b) MOBILEMAMBA_CONCAT_(a, b)
#define BEGIN_KERNELS namespace mobilemamba { namespace MOBILEMAMBA_CONCAT(cpu_, CPU_CAPABILITY) {
#define END_KERNELS } }
#define INLINE static inline __attribute__((always_inline))
#define ALWAYS_INLINE __attribute__((always_inline))  // of a lambda, behind its parameters
#define INLINE_MEMBER inline __attribute__((always_inline))

BEGIN_KERNELS
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

INLINE Vec splat(float x) { return x - Vec{}; }  // x - 0 is x, -0 and NaN included, so the compiler drops it
INLINE BitVec bits(Vec x) { return reinterpret_cast<BitVec>(x); }
INLINE Vec from_bits(BitVec x) { return reinterpret_cast<Vec>(x); }

// Where the mask (all ones or zeros in each lane) is set, a, else b.
INLINE Vec select(IntVec mask, Vec a, Vec b) { return mask ? a : b; }
// NaN in x stays NaN: the instructions return their second operand then.
#if defined(__AVX512F__)
INLINE Vec at_least(Vec x, Vec low) { return reinterpret_cast<Vec>(_mm512_max_ps((__m512)low, (__m512)x)); }
INLINE Vec at_most(Vec x, Vec high) { return reinterpret_cast<Vec>(_mm512_min_ps((__m512)high, (__m512)x)); }
#elif defined(__AVX2__)
INLINE Vec at_least(Vec x, Vec low) { return reinterpret_cast<Vec>(_mm256_max_ps((__m256)low, (__m256)x)); }
INLINE Vec at_most(Vec x, Vec high) { return reinterpret_cast<Vec>(_mm256_min_ps((__m256)high, (__m256)x)); }
#else
INLINE Vec at_least(Vec x, Vec low) { return select(x < low, low, x); }
INLINE Vec at_most(Vec x, Vec high) { return select(x > high, high, x); }
#endif
INLINE bool all(IntVec mask) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) == 0xff;
#else
  int32_t both = -1;
  for (int i = 0; i < kLanes; ++i) both &= mask[i];
  return both != 0;
#endif
}
INLINE Vec magnitude(Vec x) { return from_bits(bits(x) & 0x7fffffffu); }

INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Keeps v in a register: compilers would rather read it from memory again for each operation that can take it there.
INLINE Vec held(Vec v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__SSE2__)
  __asm__("" : "+x"(v));
#endif
  return v;
}

// 16-bit floats are only ever stored and loaded, each through its bits.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

INLINE HalfVec load_bits(const void* p) {
  HalfVec h;
  std::memcpy(&h, p, sizeof h);
  return h;
}
INLINE Vec load(const BFloat16* p) { return from_bits(__builtin_convertvector(load_bits(p), BitVec) << 16); }
INLINE void store(BFloat16* p, Vec v) {
  const BitVec b = bits(v);
  const BitVec rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const BitVec nan = (b >> 16) | 0x40u;
  const HalfVec h = __builtin_convertvector(v != v ? nan : rounded, HalfVec);
  std::memcpy(p, &h, sizeof h);
}

#if defined(__AVX512F__)
INLINE Vec load(const Float16* p) {
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
INLINE void store(Float16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
}
#elif defined(__F16C__)
INLINE Vec load(const Float16* p) {
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
INLINE void store(Float16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
}
#else
INLINE Vec load(const Float16* p) {
  const BitVec h = __builtin_convertvector(load_bits(p), BitVec);
  const BitVec sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13;
  const BitVec finite = bits(from_bits(rest) * 0x1p112f);  // moves the exponent and normalizes subnormals
  return from_bits(sign | ((h & 0x7c00u) == 0x7c00u ? rest | 0x7f800000u : finite));
}
INLINE void store(Float16* p, Vec v) {
  const BitVec b = bits(v), sign = (b >> 16) & 0x8000u, rest = b & 0x7fffffffu;
  const BitVec normal = (rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u) >> 13;
  // Adding 1/2 aligns a subnormal's bits with the end of the mantissa, rounded as every addition is.
  const BitVec subnormal = bits(from_bits(rest) + 0.5f) - 0x3f000000u;
  BitVec h = rest < 0x38800000u ? subnormal : normal;
  h = rest >= 0x477ff000u ? BitVec{} + 0x7c00u : h;  // rounds to infinity
  h = rest > 0x7f800000u ? BitVec{} + 0x7e00u : h;
  const HalfVec out = __builtin_convertvector(h | sign, HalfVec);
  std::memcpy(p, &out, sizeof out);
}
#endif

// The first n elements of a vector's worth, with no access behind them: never a call of memcpy, whose time would show.
#if defined(__AVX512F__)
INLINE void copy_to_full(float* to, const float* from, int64_t n) {
  _mm512_storeu_ps(to, _mm512_maskz_loadu_ps((1u << n) - 1, from));
}
INLINE void copy_from_full(float* to, const float* from, int64_t n) {
  _mm512_mask_storeu_ps(to, (1u << n) - 1, _mm512_loadu_ps(from));
}
template <class T>
INLINE void copy_to_full(T* to, const T* from, int64_t n) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_loadu_epi16((1u << n) - 1, from));
}
template <class T>
INLINE void copy_from_full(T* to, const T* from, int64_t n) {
  _mm256_mask_storeu_epi16(to, (1u << n) - 1, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#else
template <class T>
INLINE void copy_from_full(T* to, const T* from, int64_t n) {
  for (int part = kLanes / 2; part > 0; part /= 2)
    if (n & part) std::memcpy(to, from, part * sizeof(T)), to += part, from += part;
}
template <class T>
INLINE void copy_to_full(T* to, const T* from, int64_t n) {
  std::memset(to, 0, kLanes * sizeof(T));
  copy_from_full(to, from, n);
}
#endif

// The first n lanes; zeros behind them.
template <class T>
INLINE Vec load_some(const T* p, int64_t n) {
  if (n == kLanes) return load(p);
  T buffer[kLanes];
  copy_to_full(buffer, p, n);
  return load(buffer);
}
template <class T>
INLINE void store_some(T* p, Vec v, int64_t n) {
  if (n == kLanes) return store(p, v);
  T buffer[kLanes];
  store(buffer, v);
  copy_from_full(p, buffer, n);
}

// Calls f with a typed pointer to the elements.
template <class F>
INLINE void with_type(Elements e, F f) {
  if (e.dtype == DType::kFloat32) return f(static_cast<float*>(e.data));
  if (e.dtype == DType::kBFloat16) return f(static_cast<BFloat16*>(e.data));
  f(static_cast<Float16*>(e.data));
}
INLINE Vec load_some(Elements e, int64_t n) {
  Vec v;
  with_type(e, [&](auto* p) { v = load_some(p, n); });
  return v;
}
INLINE void store_some(Elements e, Vec v, int64_t n) {
  with_type(e, [&](auto* p) { store_some(p, v, n); });
}

// One element. Float16 goes through a vector, which has the only conversion that every instruction set shares.
INLINE float load_one(const float* p) { return *p; }
INLINE float load_one(const BFloat16* p) { return from_bits(BitVec{} + (uint32_t{p->bits} << 16))[0]; }
INLINE float load_one(const Float16* p) { return load_some(p, 1)[0]; }
INLINE void store_one(float* p, float x) { *p = x; }
template <class T>
INLINE void store_one(T* p, float x) {
  store_some(p, splat(x), 1);
}

// Several vectors side by side: the operations of one fill the time in which another's wait for their operands.
template <int kCount>
struct Pack {
  Vec v[kCount];
};
template <int kCount, class F>
INLINE Pack<kCount> each(Pack<kCount> a, F f) {
  for (int i = 0; i < kCount; ++i) a.v[i] = f(a.v[i]);
  return a;
}
template <int kCount, class F>
INLINE Pack<kCount> each(Pack<kCount> a, Pack<kCount> b, F f) {
  for (int i = 0; i < kCount; ++i) a.v[i] = f(a.v[i], b.v[i]);
  return a;
}
template <int kCount>
INLINE Pack<kCount> operator+(Pack<kCount> a, Pack<kCount> b) {
  return each(a, b, [](Vec x, Vec y) { return x + y; });
}
template <int kCount>
INLINE Pack<kCount> operator-(Pack<kCount> a, Pack<kCount> b) {
  return each(a, b, [](Vec x, Vec y) { return x - y; });
}
template <int kCount>
INLINE Pack<kCount> operator*(Pack<kCount> a, Pack<kCount> b) {
  return each(a, b, [](Vec x, Vec y) { return x * y; });
}
template <int kCount, class T>
INLINE Pack<kCount> operator+(Pack<kCount> a, T b) {
  return each(a, [b](Vec x) { return x + b; });
}
template <int kCount, class T>
INLINE Pack<kCount> operator-(Pack<kCount> a, T b) {
  return each(a, [b](Vec x) { return x - b; });
}
template <int kCount, class T>
INLINE Pack<kCount> operator*(Pack<kCount> a, T b) {
  return each(a, [b](Vec x) { return x * b; });
}
template <int kCount>
INLINE Pack<kCount> magnitude(Pack<kCount> a) {
  return each(a, [](Vec x) { return magnitude(x); });
}
template <int kCount>
INLINE Pack<kCount> at_least(Pack<kCount> a, Vec low) {
  return each(a, [low](Vec x) { return at_least(x, low); });
}

// Calls f with 0, 1, … at compile time, which keeps arrays of vectors in registers.
template <class F, int... kIndex>
INLINE void unrolled(std::integer_sequence<int, kIndex...>, F f) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}

// Calls f with count, from 1 to kMost, as a constant.
template <int kMost, int kCount = 1, class F>
INLINE void with_count(int64_t count, F f) {
  if constexpr (kCount == kMost)
    f(std::integral_constant<int, kCount>{});
  else
    count == kCount ? f(std::integral_constant<int, kCount>{}) : with_count<kMost, kCount + 1>(count, f);
}

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kModerateExponent = 125.0f;

// 2^x to about one unit in the last place, and log(1 + e^x) = max(x, 0) + log1p(e^-|x|), whose second term beyond 20 is
// under half a unit in the last place of x, which makes it PyTorch's identity there. Subnormal results, infinities and
// NaN are right.
#if defined(__AVX512F__)
// Tables of one register halve the polynomials' degrees; the scans are bound by multiply-adds.
alignas(64) constexpr float kExp2[kLanes] = {1.0f,       1.0442737f, 1.0905077f, 1.1387886f, 1.1892071f, 1.2418578f,
                                             1.2968396f, 1.3542556f, 1.4142135f, 1.4768262f, 1.5422108f, 1.6104903f,
                                             1.6817929f, 1.7562522f, 1.8340081f, 1.9152066f};
// log1p(t) / t as a cubic of t for t in ((15 - i) / 16, (16 - i) / 16], near-minimax, relative error 4e-8; exact at 0.
alignas(64) constexpr float kLog1p[4][kLanes] = {
    {0.982275188f, 0.984833002f, 0.987222373f, 0.989430547f, 0.991445005f, 0.993254185f, 0.994848013f, 0.996218622f,
     0.99736172f, 0.998277485f, 0.998972476f, 0.999461412f, 0.999768615f, 0.999929547f, 0.999989808f, 1.0f},
    {-0.41299668f, -0.421184212f, -0.429379165f, -0.437535226f, -0.445596039f, -0.453493655f, -0.461146861f,
     -0.468459666f, -0.475320369f, -0.481601477f, -0.487162024f, -0.491853923f, -0.495535791f, -0.498100907f,
     -0.499529809f, -0.499991864f},
    {0.15175724f, 0.160494968f, 0.169865727f, 0.17990993f, 0.190664724f, 0.202160478f, 0.214415416f, 0.227427572f,
     0.241162613f, 0.255535364f, 0.270381749f, 0.285415769f, 0.300162822f, 0.31385529f, 0.32526651f, 0.33253783f},
    {-0.0278885644f, -0.0309974365f, -0.0345699489f, -0.0386941209f, -0.0434785448f, -0.0490581915f, -0.0556021184f,
     -0.0633238703f, -0.0724956468f, -0.0834678039f, -0.0966961607f, -0.112780645f, -0.132520914f, -0.156997815f,
     -0.187694877f, -0.227567837f}};

// table[i], where the low four bits of `index`, as a float32 of unit 1, are i.
INLINE Vec look_up(const float* table, Vec index) {
  return reinterpret_cast<Vec>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), _mm512_load_ps(table)));
}
// x - the nearest 16th, 0 for infinities.
INLINE Vec beside_16th(Vec x) { return reinterpret_cast<Vec>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), 0x48)); }
// a - x, rounded down.
INLINE Vec below(float a, Vec x) {
  return reinterpret_cast<Vec>(_mm512_sub_round_ps(reinterpret_cast<__m512>(splat(a)), reinterpret_cast<__m512>(x),
                                                   _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}
// p times 2^floor(x).
INLINE Vec scale(Vec p, Vec x) {
  return reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(x)));
}
template <int kCount>
INLINE Pack<kCount> look_up(const float* table, Pack<kCount> index) {
  return each(index, [table](Vec x) { return look_up(table, x); });
}
template <int kCount>
INLINE Pack<kCount> beside_16th(Pack<kCount> a) {
  return each(a, [](Vec x) { return beside_16th(x); });
}
template <int kCount>
INLINE Pack<kCount> below(float a, Pack<kCount> x) {
  return each(x, [a](Vec v) { return below(a, v); });
}
template <int kCount>
INLINE Pack<kCount> scale(Pack<kCount> p, Pack<kCount> x) {
  return each(p, x, [](Vec a, Vec b) { return scale(a, b); });
}
template <class V>
INLINE V exp2(V x) {
  // From the nearest 16th, not the next lower one: small x get 1 as their power, which no rounding biases; in a scan
  // that forgets little such a bias would add up over thousands of positions.
  const V r = beside_16th(x), power = look_up(kExp2, x + 0x1.8p19f);
  // (2^r - 1) / r, near-minimax on [-1/32, 1/32], relative error of the result 2.3e-9.
  V p = r * 0.0555054108f + 0.2402335513f;
  p = p * r + 0.6931471804f;
  p = p * r * power + power;
  return scale(p, x - r);
}
constexpr bool kHasModerate = false;  // the instructions take every exponent
template <class V>
INLINE bool are_moderate(V) {
  return true;
}
template <class V>
INLINE V moderate_exp2(V x) {
  return exp2(x);
}
template <class V>
INLINE V softplus(V x) {
  const V t = exp2(magnitude(x) * -kLog2E), index = below(0x1.8p19f, t);
  V p = look_up(kLog1p[3], index) * t + look_up(kLog1p[2], index);
  p = p * t + look_up(kLog1p[1], index);
  p = p * t + look_up(kLog1p[0], index);
  return p * t + at_least(x, splat(0.0f));
}
#else
// 2^r for r in [-1/2, 1/2], near-minimax, relative error 2e-9.
INLINE Vec exp2_of_fraction(Vec r) {
  Vec p = splat(0.0001534580806f);
  p = p * r + 0.001339993090f;
  p = p * r + 0.009618489072f;
  p = p * r + 0.05550328642f;
  p = p * r + 0.2402264625f;
  p = p * r + 0.6931471825f;
  return p * r + 1.0f;
}
INLINE Vec exp2(Vec x) {
  x = at_most(at_least(x, splat(-151.0f)), splat(129.0f));
  const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are x rounded to an integer
  const Vec p = exp2_of_fraction(x - (shifted - 12582912.0f));
  // Two factors, because 2^n itself may overflow or be subnormal.
  const IntVec n = reinterpret_cast<IntVec>(bits(shifted) - 0x4b400000u);
  const IntVec half = n >> 1;
  const Vec a = reinterpret_cast<Vec>((half + 127) << 23), b = reinterpret_cast<Vec>((n - half + 127) << 23);
  return select(x != x, x, p * a * b);
}
constexpr bool kHasModerate = true;
// exp2 of what is below kModerateExponent in magnitude, in half the operations.
template <int kCount>
INLINE Pack<kCount> moderate_exp2(Pack<kCount> x) {
  return each(x, [](Vec v) {
    const Vec shifted = v + 12582912.0f;
    // What is not an integer in `shifted` has no bits below the 23rd.
    return from_bits(bits(exp2_of_fraction(v - (shifted - 12582912.0f))) + (bits(shifted) << 23));
  });
}
template <int kCount>
INLINE bool are_moderate(Pack<kCount> x) {
  IntVec mask = magnitude(x.v[0]) < kModerateExponent;
  for (int i = 1; i < kCount; ++i) mask &= magnitude(x.v[i]) < kModerateExponent;
  return all(mask);
}
INLINE Vec softplus_of(Vec x, Vec t) {
  // log1p(t) / t, near-minimax on [0, 1], relative error 5e-9.
  Vec p = splat(-0.003243980929f);
  p = p * t + 0.01985126175f;
  p = p * t - 0.05695915966f;
  p = p * t + 0.1060362171f;
  p = p * t - 0.1530556977f;
  p = p * t + 0.1967593133f;
  p = p * t - 0.2495413274f;
  p = p * t + 0.3332996368f;
  p = p * t - 0.4999990165f;
  p = p * t + 1.0f;
  return at_least(x, splat(0.0f)) + p * t;
}
INLINE Vec softplus(Vec x) { return softplus_of(x, exp2(magnitude(x) * -kLog2E)); }
template <int kCount>
INLINE Pack<kCount> exp2(Pack<kCount> x) {
  return each(x, [](Vec v) { return exp2(v); });
}
template <int kCount>
INLINE Pack<kCount> softplus(Pack<kCount> x) {
  const Pack<kCount> power = each(x, [](Vec v) { return magnitude(v) * -kLog2E; });
  return each(x, are_moderate(power) ? moderate_exp2(power) : exp2(power),
              [](Vec v, Vec t) { return softplus_of(v, t); });
}
#endif
INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp2(x * -kLog2E)); }
INLINE Vec silu(Vec x) { return x * sigmoid(x); }
template <int kCount>
INLINE Pack<kCount> silu(Pack<kCount> x) {
  const Pack<kCount> power = x * -kLog2E, e = are_moderate(power) ? moderate_exp2(power) : exp2(power);
  return each(x, e, [](Vec v, Vec exponential) { return v / (1.0f + exponential); });
}

template <int kStep, int... kLane>
INLINE Vec interleave_low(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, ((kLane & kStep) ? kLane - kStep + kLanes : kLane)...);
}
template <int kStep, int... kLane>
INLINE Vec interleave_high(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, ((kLane & kStep) ? kLane + kLanes : kLane + kStep)...);
}

// Transposes kLanes vectors of kLanes lanes in place, one bit of the indices after the other.
template <int kStep = 1>
INLINE void transpose(Vec* rows) {
  if constexpr (kStep < kLanes) {
    constexpr std::make_integer_sequence<int, kLanes> lanes{};
    for (int i = 0; i < kLanes; ++i) {
      if (i & kStep) continue;
      const Vec a = rows[i], b = rows[i + kStep];
      rows[i] = interleave_low<kStep>(a, b, lanes);
      rows[i + kStep] = interleave_high<kStep>(a, b, lanes);
    }
    transpose<kStep * 2>(rows);
  }
}

// The sum over the lanes of each of kLanes vectors, as one vector; always added in the same order.
template <int kStep = 1>
INLINE Vec sum_lanes(Vec* rows) {
  if constexpr (kStep < kLanes) {
    constexpr std::make_integer_sequence<int, kLanes> lanes{};
    for (int i = 0; i < kLanes; i += 2 * kStep) {
      const Vec a = rows[i], b = rows[i + kStep];
      rows[i] = interleave_low<kStep>(a, b, lanes) + interleave_high<kStep>(a, b, lanes);
    }
    return sum_lanes<kStep * 2>(rows);
  }
  return rows[0];
}

}  // namespace
END_KERNELS
