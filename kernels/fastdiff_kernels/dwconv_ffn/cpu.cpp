// dwconv_gelu on CPUs, forward and backward, on tokens (B, P + H W, C).
//
// A piece of work is one image and a block of channels. The backward keeps the gradient before the
// GELU of its piece in a scratch plane, so that it reads z and dy once and writes dz once; it also
// writes y where the caller wants it again (fc2's weight gradient does).
#include "../native/isa.h"

namespace fastdiff {

// Tokens of one image, `channels` of them; a token is `stride` elements after the one before.
struct DwconvTile {
  Type type;
  int64_t prefix, rows, columns, channels, stride;
  const void *z, *dy;
  const float *weight, *bias;  // (9, channels of all), weight_stride apart; (channels,)
  int64_t weight_stride;
  void *y, *dz;
  float* scratch;                // rows * columns * channels
  float *sum_weight, *sum_bias;  // (9, channels), (channels,): sums over this image
};

constexpr int64_t dwconv_block = 32;  // channels of a piece, a multiple of every vector's lanes

}  // namespace fastdiff

FASTDIFF_KERNEL(dwconv_gelu_tile, void, (const DwconvTile& a))
FASTDIFF_KERNEL(dwconv_gelu_tile_backward, void, (const DwconvTile& a))

#ifdef FASTDIFF_ISA
#include "../native/simd.h"

namespace fastdiff::FASTDIFF_ISA {
namespace {

// f(tap, row, column) for the taps of a pixel that lie on the grid.
template <class F>
FASTDIFF_INLINE void for_taps(const DwconvTile& a, int64_t i, int64_t j, F f) {
  if (i > 0 && i + 1 < a.rows && j > 0 && j + 1 < a.columns) {
#pragma GCC unroll 9
    for (int k = 0; k < 9; ++k) f(k, i + k / 3 - 1, j + k % 3 - 1);
    return;
  }
  for (int k = 0; k < 9; ++k) {
    const int64_t row = i + k / 3 - 1, column = j + k % 3 - 1;
    if (row >= 0 && row < a.rows && column >= 0 && column < a.columns) f(k, row, column);
  }
}

// The convolution and bias at a pixel, for the channels at c.
template <class T, class P>
FASTDIFF_INLINE V convolve(const DwconvTile& a, const T* grid, const V* weight, V bias, int64_t i,
                           int64_t j, P part) {
  V total = bias;
  for_taps(a, i, j, [&](int k, int64_t row, int64_t column) {
    total += weight[k] * load(grid + (row * a.columns + column) * a.stride, part);
  });
  return total;
}

template <class T>
void forward(const DwconvTile& a) {
  const T* z = static_cast<const T*>(a.z);
  T* y = static_cast<T*>(a.y);
  for_vectors(a.channels, [&](int64_t c, auto part) {
    for (int64_t t = 0; t < a.prefix; ++t)
      store(y + t * a.stride + c, gelu(load(z + t * a.stride + c, part)), part);
    V weight[9];
    for (int k = 0; k < 9; ++k) weight[k] = load(a.weight + k * a.weight_stride + c, part);
    const V bias = load(a.bias + c, part);
    const T* grid = z + a.prefix * a.stride + c;
    T* to = y + a.prefix * a.stride + c;
    for (int64_t i = 0; i < a.rows; ++i)
      for (int64_t j = 0; j < a.columns; ++j)
        store(to + (i * a.columns + j) * a.stride,
              gelu(convolve(a, grid, weight, bias, i, j, part)), part);
  });
}

template <class T>
void backward(const DwconvTile& a) {
  const T* z = static_cast<const T*>(a.z);
  const T* dy = static_cast<const T*>(a.dy);
  T* y = static_cast<T*>(a.y);
  T* dz = static_cast<T*>(a.dz);
  for_vectors(a.channels, [&](int64_t c, auto part) {
    for (int64_t t = 0; t < a.prefix; ++t) {
      V slope;
      const V out = gelu_and_slope(load(z + t * a.stride + c, part), &slope);
      if (y) store(y + t * a.stride + c, out, part);
      if (dz) store(dz + t * a.stride + c, load(dy + t * a.stride + c, part) * slope, part);
    }
    V weight[9], sums[9] = {}, sum_bias{};
    for (int k = 0; k < 9; ++k) weight[k] = load(a.weight + k * a.weight_stride + c, part);
    const V bias = load(a.bias + c, part);
    const int64_t first = a.prefix * a.stride + c;
    const T* grid = z + first;
    for (int64_t i = 0; i < a.rows; ++i)
      for (int64_t j = 0; j < a.columns; ++j) {
        const int64_t pixel = i * a.columns + j, at = first + pixel * a.stride;
        V slope;
        const V out = gelu_and_slope(convolve(a, grid, weight, bias, i, j, part), &slope);
        if (y) store(y + at, out, part);
        const V d = load(dy + at, part) * slope;
        store(a.scratch + pixel * W, d);
        sum_bias += d;
        if (a.sum_weight)
          for_taps(a, i, j, [&](int k, int64_t row, int64_t column) {
            sums[k] += d * load(grid + (row * a.columns + column) * a.stride, part);
          });
      }
    if (a.sum_weight)
      for (int k = 0; k < 9; ++k) store(a.sum_weight + k * a.channels + c, sums[k], part);
    if (a.sum_bias) store(a.sum_bias + c, sum_bias, part);
    if (!dz) return;
    for (int64_t i = 0; i < a.rows; ++i)
      for (int64_t j = 0; j < a.columns; ++j) {
        V total{};
        for_taps(a, i, j, [&](int k, int64_t row, int64_t column) {
          total += weight[8 - k] * load(a.scratch + (row * a.columns + column) * W);
        });
        store(dz + first + (i * a.columns + j) * a.stride, total, part);
      }
  });
}

}  // namespace

void dwconv_gelu_tile(const DwconvTile& a) {
  with_type(a.type, [&](auto t) { forward<decltype(t)>(a); });
}

void dwconv_gelu_tile_backward(const DwconvTile& a) {
  with_type(a.type, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace fastdiff::FASTDIFF_ISA
#endif

#ifdef FASTDIFF_REGISTER
#include "../native/boundary.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

namespace fastdiff {
namespace {

constexpr const char* op = "dwconv_gelu";
constexpr int64_t lanes = 16;  // of the widest vector: the scratch plane of one piece

struct Call {
  ScalarType dtype;
  int64_t batch, tokens, channels, bytes, blocks;
  DwconvTile all{};

  Call(const Tensor& z, const Tensor& weight, const Tensor& bias, int64_t rows, int64_t columns,
       int64_t prefix)
      : dtype(z.scalar_type()),
        batch(z.size(0)),
        tokens(z.size(1)),
        channels(z.size(2)),
        bytes(z.element_size()),
        blocks((channels + dwconv_block - 1) / dwconv_block) {
    STD_TORCH_CHECK(z.dim() == 3 && prefix >= 0 && rows >= 0 && columns >= 0 &&
                        tokens == prefix + rows * columns,
                    op, ": tokens do not fit the grid");
    all.type = type_of(op, z);
    all.prefix = prefix;
    all.rows = rows;
    all.columns = columns;
    all.stride = all.weight_stride = channels;
    all.z = data(op, "z", z, dtype, numel());
    all.weight = floats(op, "weight", weight, 9 * channels);
    all.bias = floats(op, "bias", bias, channels);
  }

  int64_t numel() const { return batch * tokens * channels; }

  // f(image, first channel, tile) for each piece; the tile's tensors of activations are moved to it
  template <class F>
  void each_piece(const F& f) const {
    for_pieces(numel() ? batch * blocks : 0, [&](int64_t piece) {
      const int64_t image = piece / blocks, c = piece % blocks * dwconv_block;
      const int64_t offset = (image * tokens * channels + c) * bytes;
      const auto moved = [&](auto* p) {
        using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(p)>>,
                                        const char, char>;
        return p ? static_cast<Byte*>(p) + offset : nullptr;
      };
      DwconvTile t = all;
      t.channels = std::min(dwconv_block, channels - c);
      t.z = moved(all.z);
      t.dy = moved(all.dy);
      t.y = moved(all.y);
      t.dz = moved(all.dz);
      t.weight = all.weight + c;
      t.bias = all.bias + c;
      f(image, c, t);
    });
  }
};

void forward(const Tensor& z, const Tensor& weight, const Tensor& bias, int64_t rows,
             int64_t columns, int64_t prefix, const Tensor& y) {
  Call c(z, weight, bias, rows, columns, prefix);
  c.all.y = data(op, "y", y, c.dtype, c.numel());
  const auto kernel = FASTDIFF_PICK(dwconv_gelu_tile);
  c.each_piece([&](int64_t, int64_t, const DwconvTile& t) { kernel(t); });
}

void backward(const Tensor& dy, const Tensor& z, const Tensor& weight, const Tensor& bias,
              int64_t rows, int64_t columns, int64_t prefix, const MaybeTensor& y,
              const MaybeTensor& dz, const MaybeTensor& dweight, const MaybeTensor& dbias) {
  Call c(z, weight, bias, rows, columns, prefix);
  const int64_t C = c.channels;
  c.all.dy = data(op, "dy", dy, c.dtype, c.numel());
  c.all.y = data(op, "y", y, c.dtype, c.numel());
  c.all.dz = data(op, "dz", dz, c.dtype, c.numel());
  float* dweight_ = floats(op, "dweight", dweight, 9 * C);
  float* dbias_ = floats(op, "dbias", dbias, C);
  const auto kernel = FASTDIFF_PICK(dwconv_gelu_tile_backward);
  std::vector<float> sums(c.numel() && (dweight_ || dbias_) ? c.batch * 10 * C : 0);
  c.each_piece([&](int64_t image, int64_t channel, DwconvTile t) {
    const auto plane = std::make_unique<float[]>(rows * columns * lanes);
    t.scratch = plane.get();
    if (!sums.empty()) {
      t.sum_weight = dweight_ ? &sums[image * 10 * C + channel * 10] : nullptr;
      t.sum_bias = &sums[image * 10 * C + channel * 10 + 9 * t.channels];
    }
    kernel(t);
  });

  std::vector<double> total(10);
  for (int64_t i = 0; i < C; ++i) {
    const int64_t first = i / dwconv_block * dwconv_block;
    const int64_t width = std::min(dwconv_block, C - first);
    std::fill(total.begin(), total.end(), 0.);
    for (int64_t image = 0; !sums.empty() && image < c.batch; ++image)
      for (int64_t k = 0; k < 10; ++k)
        total[k] += sums[image * 10 * C + first * 10 + k * width + i - first];
    for (int64_t k = 0; dweight_ && k < 9; ++k) dweight_[k * C + i] = static_cast<float>(total[k]);
    if (dbias_) dbias_[i] = static_cast<float>(total[9]);
  }
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_native, m) {
  m.def(
      "dwconv_gelu_forward(Tensor z, Tensor weight, Tensor bias, int rows, int columns, "
      "int prefix, Tensor(a!) y) -> ()");
  m.def(
      "dwconv_gelu_backward(Tensor dy, Tensor z, Tensor weight, Tensor bias, int rows, "
      "int columns, int prefix, Tensor(a!)? y, Tensor(b!)? dz, Tensor(c!)? dweight, "
      "Tensor(d!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff_native, CPU, m) {
  m.impl("dwconv_gelu_forward", TORCH_BOX(&fastdiff::forward));
  m.impl("dwconv_gelu_backward", TORCH_BOX(&fastdiff::backward));
}
#endif
