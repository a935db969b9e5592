// One source, several instruction sets.
//
// A kernel file is compiled once per level of the table in CMakeLists.txt, each time with other
// flags and another FASTDIFF_ISA, and once more with the baseline flags and FASTDIFF_REGISTER
// defined: that pass holds the argument checks, the threading and the registration, and calls the
// kernels of the level that cpuid allows.
//
//   FASTDIFF_KERNEL(silu, void, (const float* x, float* y, int64_t n))   // declares every level's
//
//   #ifdef FASTDIFF_ISA
//   namespace fastdiff::FASTDIFF_ISA { void silu(const float* x, float* y, int64_t n) { ... } }
//   #endif
//
//   #ifdef FASTDIFF_REGISTER
//   ... FASTDIFF_PICK(silu)(x, y, n) ...
//   #endif
//
// Kernel code must define nothing with a weak symbol (no inline function or template outside an
// anonymous namespace, no <vector>, <string>, torch header): the linker keeps one copy of a weak
// function for all levels, and it may be the one that uses AVX-512. tests/test_native.py reads the
// objects' symbols.
#pragma once

#include <cstdint>

namespace fastdiff {

// Elements of 16 bits; arithmetic is float32 throughout (simd.h).
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Of a call's activations. All that is small beside them comes as float32.
enum class Type { f32, bf16, f16 };

// Ordered: a machine of one level runs every lower one. The numbers and the names in isa.cpp are
// what tests and `fastdiff info` see.
enum class Level : int64_t { portable = 0, x86_64_v3 = 1, avx512 = 2, avx512_bf16 = 3 };

// The level whose kernels run: the highest that was compiled and that this CPU has, or the lower
// one that FASTDIFF_CPU_LEVEL names. Settled when the library is loaded.
Level level();

// Whether AMX tiles may be used at level avx512_bf16: the CPU has them for bfloat16 and the kernel
// lets this process.
bool has_amx();

}  // namespace fastdiff

#define FASTDIFF_KERNEL(name, result, args) \
  namespace fastdiff {                      \
  namespace portable {                      \
  result name args;                         \
  }                                         \
  namespace x86_64_v3 {                     \
  result name args;                         \
  }                                         \
  namespace avx512 {                        \
  result name args;                         \
  }                                         \
  namespace avx512_bf16 {                   \
  result name args;                         \
  }                                         \
  }

// FASTDIFF_HAVE_x is 1 for each level that CMake compiled; an absent one is never returned by
// level().
#if FASTDIFF_HAVE_X86_64_V3
#define FASTDIFF_AT_X86_64_V3(name) x86_64_v3::name
#else
#define FASTDIFF_AT_X86_64_V3(name) portable::name
#endif
#if FASTDIFF_HAVE_AVX512
#define FASTDIFF_AT_AVX512(name) avx512::name
#else
#define FASTDIFF_AT_AVX512(name) portable::name
#endif
#if FASTDIFF_HAVE_AVX512_BF16
#define FASTDIFF_AT_AVX512_BF16(name) avx512_bf16::name
#else
#define FASTDIFF_AT_AVX512_BF16(name) portable::name
#endif

// Used inside namespace fastdiff.
#define FASTDIFF_PICK(name)                                      \
  (level() == Level::avx512_bf16 ? FASTDIFF_AT_AVX512_BF16(name) \
   : level() == Level::avx512    ? FASTDIFF_AT_AVX512(name)      \
   : level() == Level::x86_64_v3 ? FASTDIFF_AT_X86_64_V3(name)   \
                                 : portable::name)
