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

// N sums over `size` elements: f(i, part) gives the N vectors to add, 0 beyond a part. Eight
// running sums each, added in pairs at the end: a large element meets few others.
template <int N>
struct Sums {
  V of[N] = {};
};
template <int N, class F>
FASTDIFF_INLINE Sums<N> sum_vectors(int64_t size, F f) {
  constexpr int ways = 8;
  Sums<N> total[ways];
  const auto add = [&](Sums<N>& to, const Sums<N>& one) {
    for (int n = 0; n < N; ++n) to.of[n] += one.of[n];
  };
  int64_t i = 0;
  for (; i + ways * W <= size; i += ways * W)
    for (int k = 0; k < ways; ++k) add(total[k], f(i + k * W, Whole{}));
  for (int k = 0; i + W <= size; i += W, ++k) add(total[k], f(i, Whole{}));
  if (i < size) add(total[ways - 1], f(i, Part{static_cast<int>(size - i)}));
  for (int half = ways / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) add(total[k], total[k + half]);
  return total[0];
}

// --- functions -----------------------------------------------------------------------------------

FASTDIFF_INLINE V round_down_bits(V x, I* n) {
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const V shifted = x + 0x1.8p23f;
  *n = (I)shifted - 0x4b400000;
  return shifted - 0x1.8p23f;
}

// e^x to 1 unit in the last place for -87.3 <= x <= 88; held at the ends beyond (no infinity, no
// denormal). x = n ln 2 + r, |r| <= ln 2 / 2; e^r = 1 + r + r^2 q(r), q minimax (error 8e-9).
FASTDIFF_INLINE V exp(V x) {
  x = x < -87.3f ? all(-87.3f) : x;
  x = x > 88.f ? all(88.f) : x;
  I n;
  const V whole = round_down_bits(x * 1.44269504f, &n);
  const V r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  V q = all(0.001394132692f);
  q = q * r + 0.008363294962f;
  q = q * r + 0.04166637285f;
  q = q * r + 0.1666657629f;
  q = q * r + 0.5000000027f;
  const V e = (q * (r * r) + r) + 1.f;
  return (V)((I)e + (n << 23));
}

FASTDIFF_INLINE V sigmoid(V x) { return 1.f / (1.f + exp(-x)); }

FASTDIFF_INLINE V silu(V x) { return x / (1.f + exp(-x)); }

// sigmoid + x sigmoid (1 - sigmoid), where 1 - sigmoid = e^-x sigmoid loses no digits.
FASTDIFF_INLINE V silu_slope(V x) {
  const V e = exp(-x);
  const V s = 1.f / (1.f + e);
  return s * (1.f + x * (e * s));
}

// The normal distribution: Phi(x), and e^(-x^2 / 2) for its density. With z = |x| and
// t = 1 / (1 + 0.27 z), Phi(-z) = e^(-z^2 / 2) t p(t); p is minimax in relative error, 2.3e-8.
FASTDIFF_INLINE V normal_cdf(V x, V* bell) {
  const V z = x < 0.f ? -x : x;
  *bell = exp(z * z * -0.5f);
  const V t = 1.f / (1.f + 0.27f * z);
  V p = all(0.02877858975f);
  p = p * t + -0.1255648261f;
  p = p * t + 0.1678034376f;
  p = p * t + -0.06683796287f;
  p = p * t + 0.1061031029f;
  p = p * t + 0.07282444143f;
  p = p * t + 0.1016002236f;
  p = p * t + 0.1075743265f;
  p = p * t + 0.1077186786f;
  const V tail = *bell * (t * p);
  return x < 0.f ? tail : 1.f - tail;
}

FASTDIFF_INLINE V gelu(V x) {
  V bell;
  return x * normal_cdf(x, &bell);
}

// gelu(x), and its slope Phi(x) + x phi(x).
FASTDIFF_INLINE V gelu_and_slope(V x, V* slope) {
  V bell;
  const V cdf = normal_cdf(x, &bell);
  *slope = cdf + x * bell * 0.398942280f;
  return x * cdf;
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_ISA
