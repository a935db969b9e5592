// dwconv_gelu on CPUs, forward and backward, on tokens (B, P + H W, C).
//
// A piece of work is one image and a block of channels. It walks down the grid; the rows that a row
// of results needs lie in a ring of three, in float32 and with a column of zeros on either side, so
// that the cache has them at neighbouring addresses and no pixel is at a border. The backward keeps
// a second ring, of the gradient before the GELU: it reads z and dy once and writes dz once; it
// also writes y where the caller wants it again (fc2's weight gradient does). dz may be dy: a row
// of dz is written when that row and the next of dy have been read.
#include "../native/isa.h"

namespace fastdiff {

// Tokens of one image, `channels` of them; a token is `stride` elements after the one before.
struct DwconvTile {
  Type type;
  int64_t prefix, rows, columns, channels, stride;
  const void *z, *dy;
  const float *weight, *bias;  // (9, channels of all), weight_stride apart; (channels,)
  const float* z_bias;         // (channels,), to be added to z first; or null
  int64_t weight_stride;
  void *y, *dz;
  float* scratch;  // dwconv_scratch(columns) floats
  // (9, channels), (channels,), (channels,): sums over this image
  float *sum_weight, *sum_bias, *sum_dz;
};

// Channels of a piece, a multiple of every vector's lanes. Fewer would keep a wide grid's rings in
// the first cache, but then each pixel is a short run of memory: 32 cost half as much again.
constexpr int64_t dwconv_block = 128;

// Of a row of a ring, and of all scratch: two rings and a row of results.
constexpr int64_t dwconv_row(int64_t columns) { return (columns + 2) * dwconv_block; }
constexpr int64_t dwconv_scratch(int64_t columns) { return 7 * dwconv_row(columns); }

}  // namespace fastdiff

FASTDIFF_KERNEL(dwconv_gelu_tile, void, (const DwconvTile& a))
FASTDIFF_KERNEL(dwconv_gelu_tile_backward, void, (const DwconvTile& a))

#ifdef FASTDIFF_ISA
#include "../native/simd.h"

namespace fastdiff::FASTDIFF_ISA {
namespace {

// Three rows of the grid, by row number modulo 3: of each, `columns` pixels of dwconv_block
// channels between two of zeros.
struct Ring {
  float* first;
  int64_t columns;

  float* row(int64_t i) const { return first + (i + 3) % 3 * dwconv_row(columns); }

  // Fills row i: the pixels of `from`, `stride` apart, or zeros where it is null; plus `bias`.
  template <class T>
  void fill(int64_t i, const T* from, int64_t stride, int64_t channels, const float* bias) const {
    float* to = row(i);
    for (int64_t j = 0; j < columns + 2; ++j, to += dwconv_block)
      for_vectors(channels, [&](int64_t c, auto part) {
        const bool inside = from && 0 < j && j <= columns;
        V z = inside ? load(from + (j - 1) * stride + c, part) : V{};
        if (inside && bias) z += load(bias + c, part);
        store(to + c, z);
      });
  }
};

// f(j, z) for the pixels of row i and the nine values z around each, of the channels at c: two
// pixels at a time, as Two, while there are two.
template <class F>
FASTDIFF_INLINE void for_neighbours(const Ring& ring, int64_t i, int64_t c, F f) {
  constexpr int64_t next = dwconv_block;
  const float* from[3] = {ring.row(i - 1) + c, ring.row(i) + c, ring.row(i + 1) + c};
  V here[3][4];
  for (int k = 0; k < 3; ++k) here[k][2] = load(from[k]), here[k][3] = load(from[k] + next);
  int64_t j = 0;
  for (; j + 2 <= ring.columns; j += 2) {
    for (int k = 0; k < 3; ++k) {
      here[k][0] = here[k][2], here[k][1] = here[k][3];
      here[k][2] = load(from[k] + (j + 2) * next), here[k][3] = load(from[k] + (j + 3) * next);
    }
    Two z[9];
    for (int k = 0; k < 9; ++k) z[k] = {{here[k / 3][k % 3], here[k / 3][k % 3 + 1]}};
    f(j, z);
  }
  if (j < ring.columns) {
    V z[9];
    for (int k = 0; k < 9; ++k)
      z[k] = k % 3 < 2 ? here[k / 3][k % 3 + 2] : load(from[k / 3] + (j + 2) * next);
    f(j, z);
  }
}

// As a pair of neighbouring pixels in a row of a ring, or one pixel.
FASTDIFF_INLINE void store_pixels(float* p, V x) { store(p, x); }
FASTDIFF_INLINE void store_pixels(float* p, Two x) {
  store(p, x.v[0]);
  store(p + dwconv_block, x.v[1]);
}
FASTDIFF_INLINE V load_pixels(const float* p, V) { return load(p); }
FASTDIFF_INLINE Two load_pixels(const float* p, Two) { return {{load(p), load(p + dwconv_block)}}; }

// Asks for one pixel or for two, `stride` apart. A tile is many short runs far from each other,
// which the hardware does not foresee.
template <class T>
FASTDIFF_INLINE void prefetch_pixels(const T* p, int64_t, V) {
  prefetch(p, Whole{});
}
template <class T>
FASTDIFF_INLINE void prefetch_pixels(const T* p, int64_t stride, Two) {
  prefetch(p, Whole{});
  prefetch(p + stride, Whole{});
}

// The taps of the channels at c, and what they make of nine values.
struct Taps {
  V weight[9];

  Taps(const DwconvTile& a, int64_t c, auto part) {
    for (int k = 0; k < 9; ++k) weight[k] = load(a.weight + k * a.weight_stride + c, part);
  }
  template <class X>
  FASTDIFF_INLINE X convolve(V start, const X* z) const {
    X x = start + weight[0] * z[0];
    for (int k = 1; k < 9; ++k) x = x + weight[k] * z[k];
    return x;
  }
  template <class X>
  FASTDIFF_INLINE X transposed(const X* d) const {
    X x = weight[8] * d[0];
    for (int k = 1; k < 9; ++k) x = x + weight[8 - k] * d[k];
    return x;
  }
};

// f(i) for the rows in their order, with rows i - 1, i and i + 1 of z in the ring.
template <class T, class F>
FASTDIFF_INLINE void for_grid_rows(const DwconvTile& a, const T* grid, const Ring& ring, F f) {
  const auto fill = [&](int64_t i) {
    const bool inside = 0 <= i && i < a.rows;
    ring.fill(i, inside ? grid + i * a.columns * a.stride : nullptr, a.stride, a.channels,
              a.z_bias);
  };
  fill(-1);
  fill(0);
  for (int64_t i = 0; i < a.rows; ++i) {
    fill(i + 1);
    f(i);
  }
}

// Writes a row of results, pixels dwconv_block apart, to pixels `stride` apart.
template <class T>
void write_row(const DwconvTile& a, const float* from, T* to) {
  for (int64_t j = 0; j < a.columns; ++j, from += dwconv_block, to += a.stride)
    for_vectors(a.channels,
                [&](int64_t c, auto part) { store(to + c, load(from + c, part), part); });
}

// The channels at c of a token outside the grid.
template <class T>
FASTDIFF_INLINE V outside(const DwconvTile& a, const T* z, int64_t c, auto part) {
  const V x = load(z + c, part);
  return a.z_bias ? x + load(a.z_bias + c, part) : x;
}

template <class T>
void forward(const DwconvTile& a) {
  const T* z = static_cast<const T*>(a.z);
  T* y = static_cast<T*>(a.y);
  for (int64_t t = 0; t < a.prefix; ++t)
    for_vectors(a.channels, [&](int64_t c, auto part) {
      store(y + t * a.stride + c, gelu(outside(a, z + t * a.stride, c, part)), part);
    });
  const int64_t first = a.prefix * a.stride;
  const Ring ring{a.scratch, a.columns};
  float* results = a.scratch + 6 * dwconv_row(a.columns);
  const auto at_row = [&](auto* grid, int64_t i) { return grid + i * a.columns * a.stride; };
  for_grid_rows(a, z + first, ring, [&](int64_t i) {
    for_vectors(a.channels, [&](int64_t c, auto part) {
      const Taps taps(a, c, part);
      const V bias = load(a.bias + c, part);
      for_neighbours(ring, i, c, [&](int64_t j, const auto* around) {
        prefetch_pixels(at_row(z + first, i + 2) + j * a.stride + c, a.stride, around[0]);
        prefetch_pixels(at_row(y + first, i) + j * a.stride + c, a.stride, around[0]);
        store_pixels(results + j * dwconv_block + c, gelu(taps.convolve(bias, around)));
      });
    });
    write_row(a, results, at_row(y + first, i));
  });
}

// From a row of dy in the ring of d to the gradient before the GELU, in place; y into `results`.
// ahead(offset of a pixel in a row, one or two pixels) is called at each.
template <class F>
FASTDIFF_INLINE void slopes_of_row(const DwconvTile& a, const Ring& ring, const Ring& d_ring,
                                   int64_t i, float* results, F ahead) {
  for_vectors(a.channels, [&](int64_t c, auto part) {
    const Taps taps(a, c, part);
    const V bias = load(a.bias + c, part);
    float* d = d_ring.row(i) + dwconv_block + c;
    for_neighbours(ring, i, c, [&](int64_t j, const auto* around) {
      auto slope = around[0];
      ahead(j * a.stride + c, slope);
      const auto out = gelu_and_slope(taps.convolve(bias, around), &slope);
      if (results) store_pixels(results + j * dwconv_block + c, out);
      float* at = d + j * dwconv_block;
      store_pixels(at, load_pixels(at, slope) * slope);
    });
  });
}

// Adds the row's part of the gradients of the taps and the bias.
void sums_of_row(const DwconvTile& a, const Ring& ring, const Ring& d_ring, int64_t i) {
  for_vectors(a.channels, [&](int64_t c, auto part) {
    const float* d_row = d_ring.row(i) + dwconv_block + c;
    V sums[9] = {}, sum_bias{};
    for_neighbours(ring, i, c, [&](int64_t j, const auto* around) {
      const auto d = load_pixels(d_row + j * dwconv_block, around[0]);
      for (int k = 0; k < 9; ++k) sums[k] += both(d * around[k]);
      sum_bias += both(d);
    });
    const auto add = [&](float* to, V sum) { store(to + c, load(to + c, part) + sum, part); };
    for (int k = 0; k < 9; ++k) add(a.sum_weight + k * a.channels, sums[k]);
    add(a.sum_bias, sum_bias);
  });
}

template <class T>
void backward(const DwconvTile& a) {
  const T* z = static_cast<const T*>(a.z);
  const T* dy = static_cast<const T*>(a.dy);
  T* y = static_cast<T*>(a.y);
  T* dz = static_cast<T*>(a.dz);
  for (int64_t t = 0; t < a.prefix; ++t)
    for_vectors(a.channels, [&](int64_t c, auto part) {
      const int64_t at = t * a.stride + c;
      V slope;
      const V out = gelu_and_slope(outside(a, z + t * a.stride, c, part), &slope);
      if (y) store(y + at, out, part);
      const V d = load(dy + at, part) * slope;
      if (dz) store(dz + at, d, part);
      if (a.sum_dz) store(a.sum_dz + c, load(a.sum_dz + c, part) + d, part);
    });
  const int64_t first = a.prefix * a.stride;
  const Ring ring{a.scratch, a.columns};
  const Ring d_ring{a.scratch + 3 * dwconv_row(a.columns), a.columns};
  float* results = a.scratch + 6 * dwconv_row(a.columns);
  const auto at = [&](auto* grid, int64_t i) { return grid + first + i * a.columns * a.stride; };
  const auto no_row = [&](int64_t i) { d_ring.fill<float>(i, nullptr, 0, a.channels, nullptr); };
  const auto write_dz = [&](int64_t i) {
    for_vectors(a.channels, [&](int64_t c, auto part) {
      const Taps taps(a, c, part);
      V sum{};
      for_neighbours(d_ring, i, c, [&](int64_t j, const auto* around) {
        prefetch_pixels(at(dz, i) + j * a.stride + c, a.stride, around[0]);
        const auto d = taps.transposed(around);
        store_pixels(results + j * dwconv_block + c, d);
        sum += both(d);
      });
      if (a.sum_dz) store(a.sum_dz + c, load(a.sum_dz + c, part) + sum, part);
    });
    write_row(a, results, at(dz, i));
  };
  no_row(-1);
  for_grid_rows(a, z + first, ring, [&](int64_t i) {
    d_ring.fill(i, at(dy, i), a.stride, a.channels, nullptr);
    slopes_of_row(a, ring, d_ring, i, y ? results : nullptr, [&](int64_t offset, auto pixels) {
      prefetch_pixels(at(z, i + 2) + offset, a.stride, pixels);
      prefetch_pixels(at(dy, i + 1) + offset, a.stride, pixels);
      if (y) prefetch_pixels(at(y, i) + offset, a.stride, pixels);
    });
    if (y) write_row(a, results, at(y, i));
    if (a.sum_weight) sums_of_row(a, ring, d_ring, i);
    if (dz && i > 0) write_dz(i - 1);
  });
  if (!dz || a.rows == 0) return;
  no_row(a.rows);
  write_dz(a.rows - 1);
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

struct Call {
  ScalarType dtype;
  int64_t batch, tokens, channels, bytes, blocks;
  DwconvTile all{};

  Call(const Tensor& z, const MaybeTensor& z_bias, const Tensor& weight, const Tensor& bias,
       int64_t rows, int64_t columns, int64_t prefix)
      : dtype(z.scalar_type()),
        batch(z.size(0)),
        tokens(z.size(1)),
        channels(z.size(2)),
        bytes(z.element_size()),
        blocks((channels + dwconv_block - 1) / dwconv_block) {
    // divided, because a product of wrong sizes overflows
    const int64_t pixels = tokens - std::clamp<int64_t>(prefix, 0, tokens);
    const bool fits = pixels == 0 ? rows == 0 || columns == 0
                                  : rows > 0 && pixels % rows == 0 && columns == pixels / rows;
    STD_TORCH_CHECK(z.dim() == 3 && prefix == tokens - pixels && fits, op,
                    ": tokens do not fit the grid");
    all.type = type_of(op, z);
    all.prefix = prefix;
    all.rows = pixels ? rows : 0;
    all.columns = pixels ? columns : 0;
    all.stride = all.weight_stride = channels;
    all.z = data(op, "z", z, dtype, numel());
    all.z_bias = floats(op, "z_bias", z_bias, channels);
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
      const auto scratch = std::make_unique_for_overwrite<float[]>(dwconv_scratch(all.columns));
      DwconvTile t = all;
      t.scratch = scratch.get();
      t.channels = std::min(dwconv_block, channels - c);
      t.z = moved(all.z);
      t.dy = moved(all.dy);
      t.y = moved(all.y);
      t.dz = moved(all.dz);
      t.weight = all.weight + c;
      t.bias = all.bias + c;
      if (all.z_bias) t.z_bias = all.z_bias + c;
      f(image, c, t);
    });
  }
};

void forward(const Tensor& z, const MaybeTensor& z_bias, const Tensor& weight, const Tensor& bias,
             int64_t rows, int64_t columns, int64_t prefix, const Tensor& y) {
  Call c(z, z_bias, weight, bias, rows, columns, prefix);
  c.all.y = fresh(data(op, "y", y, c.dtype, c.numel()), c.numel() * c.bytes);
  const auto kernel = FASTDIFF_PICK(dwconv_gelu_tile);
  c.each_piece([&](int64_t, int64_t, const DwconvTile& t) { kernel(t); });
}

void backward(const Tensor& dy, const Tensor& z, const MaybeTensor& z_bias, const Tensor& weight,
              const Tensor& bias, int64_t rows, int64_t columns, int64_t prefix,
              const MaybeTensor& y, const MaybeTensor& dz, const MaybeTensor& dweight,
              const MaybeTensor& dbias, const MaybeTensor& sum_dz) {
  Call c(z, z_bias, weight, bias, rows, columns, prefix);
  const int64_t C = c.channels;
  c.all.dy = data(op, "dy", dy, c.dtype, c.numel());
  c.all.y = fresh(data(op, "y", y, c.dtype, c.numel()), c.numel() * c.bytes);
  c.all.dz = fresh(data(op, "dz", dz, c.dtype, c.numel()), c.numel() * c.bytes);
  float* dweight_ = floats(op, "dweight", dweight, 9 * C);
  float* dbias_ = floats(op, "dbias", dbias, C);
  float* sum_dz_ = floats(op, "sum_dz", sum_dz, C);
  STD_TORCH_CHECK(dz || !sum_dz, op, ": sum_dz without dz");
  const auto kernel = FASTDIFF_PICK(dwconv_gelu_tile_backward);
  // Of every image and block of channels: nine of the taps, one of the bias, one of dz.
  constexpr int64_t kinds = 11;
  const bool wanted = c.numel() && (dweight_ || dbias_ || sum_dz_);
  std::vector<float> sums(wanted ? c.batch * kinds * C : 0);
  c.each_piece([&](int64_t image, int64_t channel, DwconvTile t) {
    float* own = wanted ? &sums[(image * C + channel) * kinds] : nullptr;
    if (dweight_ || dbias_) t.sum_weight = own, t.sum_bias = own + 9 * t.channels;
    if (sum_dz_) t.sum_dz = own + 10 * t.channels;
    kernel(t);
  });

  for (int64_t i = 0; i < C; ++i) {
    const int64_t first = i / dwconv_block * dwconv_block;
    const int64_t width = std::min(dwconv_block, C - first);
    double total[kinds] = {};
    for (int64_t image = 0; wanted && image < c.batch; ++image)
      for (int64_t k = 0; k < kinds; ++k)
        total[k] += sums[(image * C + first) * kinds + k * width + i - first];
    for (int64_t k = 0; dweight_ && k < 9; ++k) dweight_[k * C + i] = static_cast<float>(total[k]);
    if (dbias_) dbias_[i] = static_cast<float>(total[9]);
    if (sum_dz_) sum_dz_[i] = static_cast<float>(total[10]);
  }
}

// For what a matrix product is about to fill.
void huge_pages(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), "huge_pages: x is not contiguous");
  fresh(x.data_ptr(), x.numel() * x.element_size());
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_native, m) {
  m.def("huge_pages(Tensor(a!) x) -> ()");
  m.def(
      "dwconv_gelu_forward(Tensor z, Tensor? z_bias, Tensor weight, Tensor bias, int rows, int "
      "columns, "
      "int prefix, Tensor(a!) y) -> ()");
  m.def(
      "dwconv_gelu_backward(Tensor dy, Tensor z, Tensor? z_bias, Tensor weight, Tensor bias, int "
      "rows, "
      "int columns, int prefix, Tensor(a!)? y, Tensor(b!)? dz, Tensor(c!)? dweight, "
      "Tensor(d!)? dbias, Tensor(e!)? sum_dz) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff_native, CPU, m) {
  m.impl("huge_pages", TORCH_BOX(&fastdiff::huge_pages));
  m.impl("dwconv_gelu_forward", TORCH_BOX(&fastdiff::forward));
  m.impl("dwconv_gelu_backward", TORCH_BOX(&fastdiff::backward));
}
#endif
