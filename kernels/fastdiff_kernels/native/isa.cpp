// What this CPU can run, by cpuid, and which level of the kernels is used.
#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastdiff {
namespace {

constexpr const char* names[] = {"portable", "x86-64-v3", "avx512", "avx512_bf16"};
constexpr int64_t count = sizeof(names) / sizeof(names[0]);

#if defined(__x86_64__)
struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx,
                    &r.edx);  // zeros where the leaf is absent
  return r;
}

bool all(unsigned value, unsigned bits) { return (value & bits) == bits; }

// The register files that the operating system saves on a context switch; without it the
// instructions fault.
unsigned saved_states() {
  constexpr unsigned osxsave = 1u << 27;
  if (!all(cpuid(1).ecx, osxsave)) return 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

Level detect() {
  constexpr unsigned ymm = 0x6, zmm = 0xe6;
  const Registers one = cpuid(1), seven = cpuid(7), extended = cpuid(0x80000001);
  const unsigned saved = saved_states();
  // x86-64-v3: FMA, MOVBE, AVX, F16C | BMI1, AVX2, BMI2 | LZCNT
  const bool v3 = all(saved, ymm) && all(one.ecx, 1u << 12 | 1u << 22 | 1u << 28 | 1u << 29) &&
                  all(seven.ebx, 1u << 3 | 1u << 5 | 1u << 8) && all(extended.ecx, 1u << 5);
  if (!v3) return Level::portable;
  // AVX-512 F, DQ, CD, BW, VL
  const bool avx512 =
      all(saved, zmm) && all(seven.ebx, 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31);
  if (!avx512) return Level::x86_64_v3;
  constexpr unsigned bf16 = 1u << 5;
  return all(cpuid(7, 1).eax, bf16) ? Level::avx512_bf16 : Level::avx512;
}
#else
Level detect() { return Level::portable; }
#endif

bool compiled(Level level) {
  switch (level) {
    case Level::portable:
      return true;
    case Level::x86_64_v3:
      return FASTDIFF_HAVE_X86_64_V3;
    case Level::avx512:
      return FASTDIFF_HAVE_AVX512;
    case Level::avx512_bf16:
      return FASTDIFF_HAVE_AVX512_BF16;
  }
  return false;
}

Level pick() {
  auto best = static_cast<int64_t>(detect());
  while (!compiled(static_cast<Level>(best))) --best;

  const char* asked = std::getenv("FASTDIFF_CPU_LEVEL");
  if (asked == nullptr || *asked == '\0') return static_cast<Level>(best);
  for (int64_t i = 0; i < count; ++i) {
    if (std::strcmp(asked, names[i]) != 0) continue;
    STD_TORCH_CHECK(compiled(static_cast<Level>(i)) && i <= best, "FASTDIFF_CPU_LEVEL=", asked,
                    ": this CPU and this build go up to ", names[best]);
    return static_cast<Level>(i);
  }
  STD_TORCH_CHECK(false, "FASTDIFF_CPU_LEVEL=", asked,
                  ": expected portable, x86-64-v3, avx512 or avx512_bf16");
}

}  // namespace

// Not a static initialiser: an exception there would end the process instead of reaching Python.
Level level() {
  static const Level picked = pick();
  return picked;
}

bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool usable = [] {
    constexpr unsigned tiles = 1u << 24, tiles_bf16 = 1u << 22, tile_states = 0x60000;
    if (!all(cpuid(7).edx, tiles | tiles_bf16) || !all(saved_states(), tile_states)) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return usable && level() == Level::avx512_bf16;
#else
  return false;
#endif
}

int64_t cpu_level() { return static_cast<int64_t>(level()); }

}  // namespace fastdiff

STABLE_TORCH_LIBRARY(fastdiff_native, m) {
  m.def("cpu_level() -> int");
  m.def("has_amx() -> bool");
}

// No tensor argument, hence no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(fastdiff_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&fastdiff::cpu_level));
  m.impl("has_amx", TORCH_BOX(&fastdiff::has_amx));
}
