// philox_bits and philox_normal on CPUs. A piece of work is a run of elements of one picture; it is
// made in batches of whole size, the last of which is cut when it is copied: so an element goes
// through the same instructions wherever it stands.
#include "../native/isa.h"

namespace fastdiff {

constexpr int64_t philox_batch = 256;  // blocks of four elements made at once
constexpr int64_t philox_piece = 16 * philox_batch;

struct PhiloxPiece {
  uint64_t seed;
  uint32_t first, step, stream;  // first: the first block
  int64_t elements;
  void* y;  // float32, or with `raw` the words
  bool raw;
};

}  // namespace fastdiff

FASTDIFF_KERNEL(philox_piece_fill, void, (const PhiloxPiece& a))

#ifdef FASTDIFF_ISA
#include <cmath>
#include <cstring>

namespace fastdiff::FASTDIFF_ISA {
namespace {

constexpr int64_t N = philox_batch;

void philox(const PhiloxPiece& a, uint32_t first, uint32_t (*w)[N]) {
  for (int64_t i = 0; i < N; ++i) {
    uint32_t c0 = first + static_cast<uint32_t>(i), c1 = a.step, c2 = a.stream, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(a.seed), k1 = static_cast<uint32_t>(a.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(p1);
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    w[0][i] = c0, w[1][i] = c1, w[2][i] = c2, w[3][i] = c3;
  }
}

// ln((w + 1/2) / 2^32) by 2 atanh((m - 1) / (m + 1)), m in [sqrt(1/2), sqrt(2)); relative error
// 1e-15, also close to 0.
double log_uniform(uint32_t w) {
  const double u = (static_cast<double>(w) + 0.5) * 0x1p-32;
  constexpr int64_t root_half = 0x3FE6A09E667F3BCD;
  const int64_t bits = __builtin_bit_cast(int64_t, u);
  const int64_t exponent = (bits - root_half) >> 52;
  const double m = __builtin_bit_cast(double, bits - (exponent << 52));
  const double s = (m - 1.) / (m + 1.), z = s * s;
  double p = 1. / 19;
  for (int n = 17; n > 0; n -= 2) p = p * z + 1. / n;
  return static_cast<double>(static_cast<int32_t>(exponent)) * 0x1.62e42fefa39efp-1 + 2. * s * p;
}

// Box-Muller: w gives the radius, v the angle; reference.py says why by quarters of a turn.
void normal_pair(uint32_t w, uint32_t v, float* a, float* b) {
  const double radius = std::sqrt(-2. * log_uniform(w));
  const uint32_t quarter = (v + (1u << 29)) >> 30;  // 4, the whole turn, wraps to 0
  const int32_t rest = static_cast<int32_t>(v - (quarter << 30));
  const double x = (static_cast<double>(rest) + 0.5) * (0x1.921fb54442d18p+2 * 0x1p-32), z = x * x;
  // Taylor, |x| <= pi / 4: the errors are 2e-14 of sin, 1e-15 of cos.
  double sin = 1. / 6227020800, cos = -1. / 87178291200;
  sin = sin * z - 1. / 39916800;
  sin = sin * z + 1. / 362880;
  sin = sin * z - 1. / 5040;
  sin = sin * z + 1. / 120;
  sin = sin * z - 1. / 6;
  sin = (sin * z + 1.) * x;
  cos = cos * z + 1. / 479001600;
  cos = cos * z - 1. / 3628800;
  cos = cos * z + 1. / 40320;
  cos = cos * z - 1. / 720;
  cos = cos * z + 1. / 24;
  cos = cos * z - 1. / 2;
  cos = cos * z + 1.;
  const double scale = quarter & 2 ? -radius : radius;
  *a = static_cast<float>(scale * (quarter & 1 ? -sin : cos));
  *b = static_cast<float>(scale * (quarter & 1 ? cos : sin));
}

}  // namespace

void philox_piece_fill(const PhiloxPiece& a) {
  uint32_t w[4][N];
  float z[4][N];
  uint32_t block[4 * N];
  for (int64_t done = 0; done < a.elements; done += 4 * N) {
    philox(a, a.first + static_cast<uint32_t>(done / 4), w);
    if (!a.raw) {
      for (int64_t i = 0; i < N; ++i) normal_pair(w[0][i], w[1][i], &z[0][i], &z[1][i]);
      for (int64_t i = 0; i < N; ++i) normal_pair(w[2][i], w[3][i], &z[2][i], &z[3][i]);
      std::memcpy(w, z, sizeof w);
    }
    for (int64_t i = 0; i < N; ++i)
      for (int64_t k = 0; k < 4; ++k) block[4 * i + k] = w[k][i];
    const int64_t left = a.elements - done;
    std::memcpy(static_cast<char*>(a.y) + 4 * done, block, 4 * (left < 4 * N ? left : 4 * N));
  }
}

}  // namespace fastdiff::FASTDIFF_ISA
#endif

#ifdef FASTDIFF_REGISTER
#include "../native/boundary.h"

namespace fastdiff {
namespace {

void philox_fill(const Tensor& seeds, const Tensor& step, int64_t stream, Tensor y) {
  const char* op = "philox_normal";
  const int64_t pictures = seeds.numel();
  const auto* seed =
      static_cast<const int64_t*>(data(op, "seeds", seeds, ScalarType::Long, pictures));
  const auto* when = static_cast<const int64_t*>(data(op, "step", step, ScalarType::Long, 1));
  const bool raw = y.scalar_type() == ScalarType::Int;
  const int64_t elements = pictures ? y.numel() / pictures : 0;
  char* target = static_cast<char*>(
      data(op, "result", y, raw ? ScalarType::Int : ScalarType::Float, pictures * elements));
  STD_TORCH_CHECK(elements <= int64_t{1} << 34, op, ": pictures of ", elements, " elements");
  const int64_t pieces = (elements + philox_piece - 1) / philox_piece;
  const auto kernel = FASTDIFF_PICK(philox_piece_fill);
  for_pieces(pictures * pieces, [&](int64_t i) {
    const int64_t picture = i / pieces, from = i % pieces * philox_piece;
    const int64_t left = elements - from;
    kernel({.seed = static_cast<uint64_t>(seed[picture]),
            .first = static_cast<uint32_t>(from / 4),
            .step = static_cast<uint32_t>(*when),
            .stream = static_cast<uint32_t>(stream),
            .elements = left < philox_piece ? left : philox_piece,
            .y = target + 4 * (picture * elements + from),
            .raw = raw});
  });
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_native, m) {
  m.def("philox_fill(Tensor seeds, Tensor step, int stream, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff_native, CPU, m) {
  m.impl("philox_fill", TORCH_BOX(&fastdiff::philox_fill));
}
#endif
