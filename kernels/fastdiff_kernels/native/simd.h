// Vectors of float32 for the kernels of one instruction set: loads and stores of every dtype, exp,
// SiLU and GELU with their slopes. Included where FASTDIFF_ISA is defined (isa.h).
//
// All names live in an anonymous namespace, hence no weak symbols. V is a GCC vector: + - * / and
// comparisons work lane by lane, `mask ? a : b` selects, a * b + c becomes one fused multiply-add.
#pragma once

#include "isa.h"

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FASTDIFF_INLINE [[maybe_unused]] inline __attribute__((always_inline))

namespace fastdiff::FASTDIFF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // lanes
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));

FASTDIFF_INLINE V all(float x) { return x - V{}; }  // x + 0 would not leave -0 as it is

using Lanes = std::make_integer_sequence<int, W>;
template <int... lane>
FASTDIFF_INLINE I lane_numbers(std::integer_sequence<int, lane...>) {
  return I{lane...};
}

// How much of a vector a load or a store touches: `load(p, n)` takes either.
struct Whole {};
struct Part {
  int n;
};

// --- loads and stores: W elements, or the first n of them (the other lanes are read as 0) --------

FASTDIFF_INLINE V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

FASTDIFF_INLINE void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }

#if defined(__AVX512F__)

FASTDIFF_INLINE V widen(__m256i bits, bf16) {
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
FASTDIFF_INLINE V widen(__m256i bits, f16) { return (V)_mm512_cvtph_ps(bits); }

// To nearest, ties to even; a NaN stays one.
FASTDIFF_INLINE __m256i narrow(V v, bf16) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh((__m512)v);
#else
  const __m512i bits = (__m512i)v;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0)));
#endif
}
FASTDIFF_INLINE __m256i narrow(V v, f16) {
  return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <class T>
FASTDIFF_INLINE V load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
FASTDIFF_INLINE void store(T* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, T{}));
}

FASTDIFF_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

FASTDIFF_INLINE V load(const float* p, int n) { return (V)_mm512_maskz_loadu_ps(first(n), p); }
FASTDIFF_INLINE void store(float* p, V v, int n) { _mm512_mask_storeu_ps(p, first(n), (__m512)v); }
template <class T>
FASTDIFF_INLINE V load(const T* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first(n), p), T{});
}
template <class T>
FASTDIFF_INLINE void store(T* p, V v, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(v, T{}));
}

#else

#if defined(__AVX2__)

FASTDIFF_INLINE V widen(__m128i bits, bf16) {
  return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
FASTDIFF_INLINE V widen(__m128i bits, f16) { return (V)_mm256_cvtph_ps(bits); }

FASTDIFF_INLINE __m128i narrow(V v, bf16) {
  const __m256i bits = (__m256i)v;
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  const __m256i high =
      _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_packus_epi32(high, high);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
FASTDIFF_INLINE __m128i narrow(V v, f16) {
  return _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <class T>
FASTDIFF_INLINE V load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <class T>
FASTDIFF_INLINE void store(T* p, V v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, T{}));
}

#else

FASTDIFF_INLINE float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

FASTDIFF_INLINE float widen(f16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  // Exponent and fraction in a float's place, then 2^112 for the difference of the two biases.
  uint32_t bits = magnitude << 13;
  if (magnitude >= 0x7c00u) bits |= 0x7f800000u;
  float y;
  std::memcpy(&y, &bits, 4);
  if (magnitude < 0x7c00u) y *= 0x1p112f;
  std::memcpy(&bits, &y, 4);
  bits |= sign;
  std::memcpy(&y, &bits, 4);
  return y;
}

FASTDIFF_INLINE void narrow(float x, bf16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

FASTDIFF_INLINE void narrow(float x, f16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits >= 0x47800000u) {  // 65536 and more, infinity, NaN
    half = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (bits < 0x38800000u) {  // under 2^-14: the sum rounds to units of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&half, &magnitude, 4);
    half -= 0x3f000000u;
  } else {
    half = (bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

template <class T>
FASTDIFF_INLINE V load(const T* p) {
  V v;
  for (int i = 0; i < W; ++i) v[i] = widen(p[i]);
  return v;
}
template <class T>
FASTDIFF_INLINE void store(T* p, V v) {
  for (int i = 0; i < W; ++i) narrow(v[i], p + i);
}

#endif

template <class T>
FASTDIFF_INLINE V load(const T* p, int n) {
  T copy[W] = {};
  std::memcpy(copy, p, n * sizeof(T));
  return load(copy);
}
template <class T>
FASTDIFF_INLINE void store(T* p, V v, int n) {
  T copy[W];
  store(copy, v);
  std::memcpy(p, copy, n * sizeof(T));
}

#endif

template <class T>
FASTDIFF_INLINE V load(const T* p, Whole) {
  return load(p);
}
template <class T>
FASTDIFF_INLINE void store(T* p, V v, Whole) {
  store(p, v);
}
template <class T>
FASTDIFF_INLINE V load(const T* p, Part part) {
  return load(p, part.n);
}
template <class T>
FASTDIFF_INLINE void store(T* p, V v, Part part) {
  store(p, v, part.n);
}
// The vector with lanes beyond its part set to 0: before a sum over lanes.
FASTDIFF_INLINE V keep(V v, Whole) { return v; }
FASTDIFF_INLINE V keep(V v, Part part) { return lane_numbers(Lanes{}) < part.n ? v : V{}; }

// Asks for what `load(p, part)` will read later; p may point anywhere.
template <int vectors, class T>
FASTDIFF_INLINE void prefetch_vectors(const T* p) {
  for (unsigned i = 0; i < vectors * W * sizeof(T); i += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + i, 0, 3);
}
template <class T>
FASTDIFF_INLINE void prefetch(const T* p, Whole) {
  prefetch_vectors<1>(p);
}
template <class T>
FASTDIFF_INLINE void prefetch(const T*, Part) {}  // a last piece: not worth an instruction

// Calls f with a value of the type that `type` names: one switch at a kernel's door.
template <class F>
FASTDIFF_INLINE void with_type(Type type, F f) {
  switch (type) {
    case Type::f32:
      return f(float{});
    case Type::bf16:
      return f(bf16{});
    case Type::f16:
      return f(f16{});
  }
}

// Calls f(i, n) for the vectors that make up `size` elements: n is W, and fewer for the last. The
// body is compiled twice, so whole vectors are loaded without a mask.
template <class F>
FASTDIFF_INLINE void for_vectors(int64_t size, F f) {
  int64_t i = 0;
  for (; i + W <= size; i += W) f(i, Whole{});
  if (i < size) f(i, Part{static_cast<int>(size - i)});
}

// Two vectors that go through a function side by side. A chain of dependent operations, as exp is,
// takes several times as long as the units need for it, and a CPU looks ahead by two or three only.
struct Two {
  V v[2];
};
struct Pair {};

FASTDIFF_INLINE Two all(V x) { return {{x, x}}; }

#define FASTDIFF_OPERATOR(op)                                                                      \
  FASTDIFF_INLINE Two operator op(Two a, Two b) { return {{a.v[0] op b.v[0], a.v[1] op b.v[1]}}; } \
  FASTDIFF_INLINE Two operator op(Two a, V b) { return {{a.v[0] op b, a.v[1] op b}}; }             \
  FASTDIFF_INLINE Two operator op(V a, Two b) { return {{a op b.v[0], a op b.v[1]}}; }             \
  FASTDIFF_INLINE Two operator op(Two a, float b) { return {{a.v[0] op b, a.v[1] op b}}; }         \
  FASTDIFF_INLINE Two operator op(float a, Two b) { return {{a op b.v[0], a op b.v[1]}}; }
FASTDIFF_OPERATOR(+)
FASTDIFF_OPERATOR(-)
FASTDIFF_OPERATOR(*)
#undef FASTDIFF_OPERATOR
FASTDIFF_INLINE Two operator-(Two a) { return {{-a.v[0], -a.v[1]}}; }

template <class T>
FASTDIFF_INLINE Two load(const T* p, Pair) {
  return {{load(p), load(p + W)}};
}
template <class T>
FASTDIFF_INLINE void store(T* p, Two x, Pair) {
  store(p, x.v[0]);
  store(p + W, x.v[1]);
}
FASTDIFF_INLINE Two keep(Two x, Pair) { return x; }
template <class T>
FASTDIFF_INLINE void prefetch(const T* p, Pair) {
  prefetch_vectors<2>(p);
}
// The sum of the two, or the one.
FASTDIFF_INLINE V both(Two x) { return x.v[0] + x.v[1]; }
FASTDIFF_INLINE V both(V x) { return x; }

// As for_vectors, two at a time as long as there are two: f takes and makes V or Two.
template <class F>
FASTDIFF_INLINE void for_pairs(int64_t size, F f) {
  int64_t i = 0;
  for (; i + 2 * W <= size; i += 2 * W) f(i, Pair{});
  if (i + W <= size) f(i, Whole{}), i += W;
  if (i < size) f(i, Part{static_cast<int>(size - i)});
}

// --- across lanes --------------------------------------------------------------------------------

// Lanes of a and, from W on, of b: lane i of the result is the one that f(i) names. A constant: an
// index that is made at run time costs more than what it moves.
template <class F, int... lane>
FASTDIFF_INLINE V pick(V a, V b, F f, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, f(lane)...);
#else
  return __builtin_shuffle(a, b, I{f(lane)...});
#endif
}

template <int by>
FASTDIFF_INLINE V rotate(V v) {
  return pick(v, v, [](int i) constexpr { return (i + by) % W; }, Lanes{});
}

// Always in the same order, pairwise.
template <int half = W / 2>
FASTDIFF_INLINE float sum(V v) {
  if constexpr (half > 0)
    return sum<half / 2>(v + rotate<half>(v));
  else
    return v[0];
}

template <int half = W / 2>
FASTDIFF_INLINE float largest(V v) {
  if constexpr (half > 0) {
    const V other = rotate<half>(v);
    return largest<half / 2>(v > other ? v : other);
  } else {
    return v[0];
  }
}

// A square of W x W, in place: halves change places, then halves of halves.
template <int half = W / 2>
FASTDIFF_INLINE void transpose(V* row) {
  if constexpr (half > 0) {
    constexpr auto low = [](int i) constexpr { return i & half ? W + i - half : i; };
    constexpr auto high = [](int i) constexpr { return i & half ? W + i : i + half; };
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & half) continue;
      const V a = row[i], b = row[i + half];
      row[i] = pick(a, b, low, Lanes{});
      row[i + half] = pick(a, b, high, Lanes{});
    }
    transpose<half / 2>(row);
  }
}

FASTDIFF_INLINE V max(V a, V b) { return a > b ? a : b; }

// N sums over `size` elements: f(i, part) gives the N vectors, or pairs of these, to add: 0 beyond
// a part. Eight running sums each, added in pairs at the end: a large element meets few others.
template <class X, int N>
struct Several {
  X of[N];
};
template <class X, class... Xs>
FASTDIFF_INLINE Several<X, 1 + sizeof...(Xs)> several(X x, Xs... xs) {
  return {{x, xs...}};
}
template <int N>
using Sums = Several<V, N>;

template <int N, class F>
FASTDIFF_INLINE Sums<N> sum_vectors(int64_t size, F f) {
  constexpr int ways = 8;
  Sums<N> total[ways] = {};
  const auto add = [&](Sums<N>& to, const Sums<N>& one) {
    for (int n = 0; n < N; ++n) to.of[n] += one.of[n];
  };
  const auto add_pair = [&](int k, const Several<Two, N>& two) {
    for (int n = 0; n < N; ++n) {
      total[k].of[n] += two.of[n].v[0];
      total[k + 1].of[n] += two.of[n].v[1];
    }
  };
  int64_t i = 0;
  for (; i + ways * W <= size; i += ways * W)
#pragma GCC unroll 4
    for (int k = 0; k < ways; k += 2) add_pair(k, f(i + k * W, Pair{}));
  for (int k = 0; i + W <= size; i += W, ++k) add(total[k], f(i, Whole{}));
  if (i < size) add(total[ways - 1], f(i, Part{static_cast<int>(size - i)}));
  for (int half = ways / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) add(total[k], total[k + half]);
  return total[0];
}

// --- functions of V and of Two -------------------------------------------------------------------

// Lane by lane: what has no operator.
template <class F>
FASTDIFF_INLINE V lanes(F f, V x) {
  return f(x);
}
template <class F>
FASTDIFF_INLINE Two lanes(F f, Two x) {
  return {{f(x.v[0]), f(x.v[1])}};
}
template <class F>
FASTDIFF_INLINE V lanes(F f, V x, V y) {
  return f(x, y);
}
template <class F>
FASTDIFF_INLINE Two lanes(F f, Two x, Two y) {
  return {{f(x.v[0], y.v[0]), f(x.v[1], y.v[1])}};
}

// x held at a bound; a NaN stays one (the instruction gives its second operand then).
FASTDIFF_INLINE V at_least(float low, V x) {
#if defined(__AVX512F__)
  return (V)_mm512_max_ps((__m512)all(low), (__m512)x);
#elif defined(__AVX2__)
  return (V)_mm256_max_ps((__m256)all(low), (__m256)x);
#else
  return low > x ? all(low) : x;
#endif
}
FASTDIFF_INLINE V at_most(float high, V x) {
#if defined(__AVX512F__)
  return (V)_mm512_min_ps((__m512)all(high), (__m512)x);
#elif defined(__AVX2__)
  return (V)_mm256_min_ps((__m256)all(high), (__m256)x);
#else
  return high < x ? all(high) : x;
#endif
}

template <class X>
FASTDIFF_INLINE X magnitude(X x) {
  return lanes([](V v) { return (V)((I)v & 0x7fffffff); }, x);
}

// e^x to 1 unit in the last place for -87.3 <= x <= 88; held at the ends beyond (no infinity, no
// denormal). x = n ln 2 + r, |r| <= ln 2 / 2; e^r = 1 + r + r^2 q(r), q minimax (error 8e-9).
template <class X>
FASTDIFF_INLINE X exp(X x) {
  x = lanes([](V v) { return at_most(88.f, at_least(-87.3f, v)); }, x);
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const X shifted = x * 1.44269504f + 0x1.8p23f;
  const X whole = shifted - 0x1.8p23f;
  const X r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  X q = r * 0.001394132692f + 0.008363294962f;
  q = q * r + 0.04166637285f;
  q = q * r + 0.1666657629f;
  q = q * r + 0.5000000027f;
  const X e = (q * (r * r) + r) + 1.f;
  return lanes([](V v, V n) { return (V)((I)v + (((I)n - 0x4b400000) << 23)); }, e, shifted);
}

// 1 / x for 1 <= x <= 2^127 to 1 unit in the last place, in a third of a division's time.
template <class X>
FASTDIFF_INLINE X reciprocal(X x) {
#if defined(__AVX512F__)
  const X r = lanes([](V v) { return (V)_mm512_rcp14_ps((__m512)v); }, x);
  return r + r * (1.f - x * r);
#elif defined(__AVX2__)
  const X r = lanes([](V v) { return (V)_mm256_rcp_ps((__m256)v); }, x);
  return r + r * (1.f - x * r);
#else
  return lanes([](V v) { return 1.f / v; }, x);
#endif
}

template <class X>
FASTDIFF_INLINE X sigmoid(X x) {
  return reciprocal(1.f + exp(-x));
}

template <class X>
FASTDIFF_INLINE X silu(X x) {
  return x * sigmoid(x);
}

// sigmoid + x sigmoid (1 - sigmoid), where 1 - sigmoid = e^-x sigmoid loses no digits.
template <class X>
FASTDIFF_INLINE X silu_slope(X x) {
  const X e = exp(-x);
  const X s = reciprocal(1.f + e);
  return s * (1.f + x * (e * s));
}

// The normal distribution function Phi(x) = 1/2 + x p(s), s = 2 x^2 / 5.6^2 - 1; p is minimax in
// the error of Phi, 2.5e-9 (as rounded, no more than 1/2 + erf / 2). x is held at +-5.6, where the
// sum gives 0 and 1.
template <class X>
FASTDIFF_INLINE X normal_cdf(X x) {
  x = lanes([](V v) { return at_most(5.6f, at_least(-5.6f, v)); }, x);
  const X s = x * x * 0.0637755096f - 1.f;
  X p = s * 0.0001423450158f + -0.0003872124362f;
  p = p * s + 0.0003176495375f;
  p = p * s + -0.0004309516225f;
  p = p * s + 0.001582241268f;
  p = p * s + -0.003138815518f;
  p = p * s + 0.004738320597f;
  p = p * s + -0.007349333726f;
  p = p * s + 0.01122949179f;
  p = p * s + -0.01582564972f;
  p = p * s + 0.02088819072f;
  p = p * s + -0.02629843354f;
  p = p * s + 0.03197548911f;
  p = p * s + -0.03834661841f;
  p = p * s + 0.04698066413f;
  p = p * s + -0.06305126101f;
  // The last step with what its rounding takes away: in the negative tail that is most of the
  // error.
  const X last = p * s + 0.1262595952f;
  const X rest = p * s + (0.1262595952f - last);
  return lanes([](V held, V v) { return held <= -5.6f ? all(0.f) : at_least(0.f, v); }, x,
               x * rest + (x * last + 0.5f));
}

// The normal density, to 1e-7 of its largest value: 2^t, t = -x^2 / (2 ln 2), from t's nearest
// integer and what is left, as in `exp`; the error of the polynomial is 8e-8.
template <class X>
FASTDIFF_INLINE X normal_density(X x) {
  const X t = lanes([](V v) { return at_least(-120.f, v); }, x * x * -0.7213475204f);
  const X shifted = t + 0x1.8p23f;
  const X f = t - (shifted - 0x1.8p23f);
  X q = f * 0.001326697039f + 0.009675459746f;
  q = q * f + 0.05550742616f;
  q = q * f + 0.2402212175f;
  q = q * f + 0.6931469492f;
  q = q * f + 1.000000071f;
  const X e = lanes([](V v, V n) { return (V)((I)v + ((I)n << 23)); }, q, shifted);
  return e * 0.398942280f;
}

template <class X>
FASTDIFF_INLINE X gelu(X x) {
  return x * normal_cdf(x);
}

// gelu(x), and its slope Phi(x) + x phi(x).
template <class X>
FASTDIFF_INLINE X gelu_and_slope(X x, X* slope) {
  const X cdf = normal_cdf(x);
  *slope = cdf + x * normal_density(x);
  return x * cdf;
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_ISA
