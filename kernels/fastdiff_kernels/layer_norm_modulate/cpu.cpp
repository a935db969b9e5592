// layer_norm_modulate on CPUs, forward and backward. Rows are contiguous: (B, R, C).
//
// y = (r - mean) * rstd * (weight * (1 + scale)) + (bias * (1 + scale) + shift), with the two
// combined vectors made once for an image. The backward sums dy and dy * x_hat over the rows of an
// image; the gradients of weight, bias, scale and shift all follow from these two.
#include "../native/isa.h"

namespace fastdiff {

// Rows of one image. What is absent is null.
struct LayerNormRows {
  Type type;
  int64_t rows, channels;
  const void *x, *residual;
  const float *gate, *weight, *bias, *scale, *shift;  // (C,): of this image
  float eps;
  void *y, *r;         // r only with residual
  float *mean, *rstd;  // (rows,)
};

struct LayerNormRowsBackward {
  Type type;
  int64_t rows, channels;
  const void *dy, *dr, *r, *x;  // x only for dgate
  const float *gate, *weight, *scale, *mean, *rstd;
  void *dx, *dresidual;
  float *sum_dy, *sum_dy_xhat, *dgate;  // (C,): sums over these rows
};

}  // namespace fastdiff

FASTDIFF_KERNEL(layer_norm_rows, void, (const LayerNormRows& a))
FASTDIFF_KERNEL(layer_norm_rows_backward, void, (const LayerNormRowsBackward& a))

#ifdef FASTDIFF_ISA
#include "../native/simd.h"

namespace fastdiff::FASTDIFF_ISA {
namespace {

FASTDIFF_INLINE V or_all(const float* p, int64_t i, auto part, float absent) {
  return p ? load(p + i, part) : all(absent);
}

// Rows of 16-bit types worked on side by side, while they stay in the first-level cache: their sums
// do not wait for each other, and vectors over the channels are loaded once for all of them.
// float32 moves twice the bytes, waits for those instead, and takes a row at a time.
constexpr int together = 4;
constexpr int64_t most_channels = 1024;

template <class T, int N>
FASTDIFF_INLINE void forward(const LayerNormRows& a, int64_t row) {
  const int64_t C = a.channels;
  const T* x = static_cast<const T*>(a.x) + row * C;
  const T* r = x;
  V total[N]{};
  if (a.residual) {
    const T* residual = static_cast<const T*>(a.residual) + row * C;
    T* written = static_cast<T*>(a.r) + row * C;
    for_vectors(C, [&](int64_t i, auto part) {
      const V gate = or_all(a.gate, i, part, 1.f);
      for (int n = 0; n < N; ++n) {
        const int64_t at = n * C + i;
        store(written + at, load(residual + at, part) + gate * load(x + at, part), part);
        total[n] += load(written + at, part);  // the statistics are those of the rounded sum
      }
    });
    r = written;
  } else {
    for_vectors(C, [&](int64_t i, auto part) {
      for (int n = 0; n < N; ++n) total[n] += load(x + n * C + i, part);
    });
  }
  // The second pass also corrects the mean, which a large one needs.
  float mean[N], rstd[N];
  V squares[N]{}, rest[N]{};
  for (int n = 0; n < N; ++n) mean[n] = sum(total[n]) / static_cast<float>(C);
  for_vectors(C, [&](int64_t i, auto part) {
    for (int n = 0; n < N; ++n) {
      const V centred = keep(load(r + n * C + i, part) - mean[n], part);
      rest[n] += centred;
      squares[n] += centred * centred;
    }
  });
  for (int n = 0; n < N; ++n) {
    const float correction = sum(rest[n]) / static_cast<float>(C);
    const float variance = sum(squares[n]) / static_cast<float>(C) - correction * correction;
    a.mean[row + n] = mean[n] += correction;
    a.rstd[row + n] = rstd[n] = 1.f / __builtin_sqrtf(variance + a.eps);
  }
  T* y = static_cast<T*>(a.y) + row * C;
  for_vectors(C, [&](int64_t i, auto part) {
    V v[N];
    for (int n = 0; n < N; ++n) v[n] = (load(r + n * C + i, part) - mean[n]) * rstd[n];
    const auto each = [&](const float* p, auto f) {
      if (!p) return;
      const V w = load(p + i, part);
      for (int n = 0; n < N; ++n) v[n] = f(v[n], w);
    };
    each(a.weight, [](V v_, V w) { return v_ * w; });
    each(a.bias, [](V v_, V w) { return v_ + w; });
    each(a.scale, [](V v_, V w) { return v_ * (1.f + w); });
    each(a.shift, [](V v_, V w) { return v_ + w; });
    for (int n = 0; n < N; ++n) store(y + n * C + i, v[n], part);
  });
}

template <class T, int N>
FASTDIFF_INLINE void backward(const LayerNormRowsBackward& a, int64_t row) {
  const int64_t C = a.channels;
  const T* dy = a.dy ? static_cast<const T*>(a.dy) + row * C : nullptr;
  const T* dr = a.dr ? static_cast<const T*>(a.dr) + row * C : nullptr;
  const T* r = static_cast<const T*>(a.r) + row * C;
  const T* x = a.x ? static_cast<const T*>(a.x) + row * C : nullptr;
  T* dx = a.dx ? static_cast<T*>(a.dx) + row * C : nullptr;
  T* dresidual = a.dresidual ? static_cast<T*>(a.dresidual) + row * C : nullptr;
  const float *mean = a.mean + row, *rstd = a.rstd + row;
  // weight * (1 + scale): dy times this is the gradient of x_hat
  const auto factor = [&](int64_t i, auto part) {
    const V w = or_all(a.weight, i, part, 1.f);
    return a.scale ? w * (1.f + load(a.scale + i, part)) : w;
  };
  V sum_g[N]{}, sum_gx[N]{};
  if (dy) {
    for_vectors(C, [&](int64_t i, auto part) {
      const V w = factor(i, part);
      V sum_dy{}, sum_dy_xhat{};
      if (a.sum_dy) {
        sum_dy = load(a.sum_dy + i, part);
        sum_dy_xhat = load(a.sum_dy_xhat + i, part);
      }
      for (int n = 0; n < N; ++n) {
        const int64_t at = n * C + i;
        const V d = load(dy + at, part), x_hat = (load(r + at, part) - mean[n]) * rstd[n];
        sum_dy += d;
        sum_dy_xhat += d * x_hat;
        const V g = d * w;  // 0 beyond the part, as d is
        sum_g[n] += g;
        sum_gx[n] += g * x_hat;
      }
      if (a.sum_dy) {
        store(a.sum_dy + i, sum_dy, part);
        store(a.sum_dy_xhat + i, sum_dy_xhat, part);
      }
    });
  }
  if (!dx && !dresidual && !a.dgate) return;
  float mean_g[N], mean_gx[N];
  for (int n = 0; n < N; ++n) {
    mean_g[n] = sum(sum_g[n]) / static_cast<float>(C);
    mean_gx[n] = sum(sum_gx[n]) / static_cast<float>(C);
  }
  for_vectors(C, [&](int64_t i, auto part) {
    const V w = factor(i, part), gate = or_all(a.gate, i, part, 1.f);
    V dgate = a.dgate ? load(a.dgate + i, part) : V{};
    for (int n = 0; n < N; ++n) {
      const int64_t at = n * C + i;
      V total = dr ? load(dr + at, part) : V{};
      if (dy) {
        const V g = load(dy + at, part) * w;
        const V x_hat = (load(r + at, part) - mean[n]) * rstd[n];
        total = total + rstd[n] * (g - mean_g[n] - x_hat * mean_gx[n]);
      }
      if (dresidual) store(dresidual + at, total, part);
      if (dx) store(dx + at, total * gate, part);
      if (a.dgate) dgate += total * load(x + at, part);
    }
    if (a.dgate) store(a.dgate + i, dgate, part);
  });
}

// f(a number of rows as a constant, the first of them), for all rows.
template <class T, class F>
FASTDIFF_INLINE void for_rows(int64_t rows, int64_t channels, F f) {
  int64_t row = 0;
  if constexpr (sizeof(T) == 2) {
    if (channels <= most_channels)
      for (; row + together <= rows; row += together)
        f(std::integral_constant<int, together>{}, row);
  }
  for (; row < rows; ++row) f(std::integral_constant<int, 1>{}, row);
}

template <class T>
void forward(const LayerNormRows& a) {
  for_rows<T>(a.rows, a.channels, [&](auto n, int64_t row) { forward<T, n>(a, row); });
}

template <class T>
void backward(const LayerNormRowsBackward& a) {
  for (int64_t i = 0; i < a.channels; ++i) {
    if (a.sum_dy) a.sum_dy[i] = a.sum_dy_xhat[i] = 0.f;
    if (a.dgate) a.dgate[i] = 0.f;
  }
  for_rows<T>(a.rows, a.channels, [&](auto n, int64_t row) { backward<T, n>(a, row); });
}

}  // namespace

void layer_norm_rows(const LayerNormRows& a) {
  with_type(a.type, [&](auto t) { forward<decltype(t)>(a); });
}

void layer_norm_rows_backward(const LayerNormRowsBackward& a) {
  with_type(a.type, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace fastdiff::FASTDIFF_ISA
#endif

#ifdef FASTDIFF_REGISTER
#include "../native/boundary.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

namespace fastdiff {
namespace {

constexpr const char* op = "layer_norm_modulate";

// Rows of a piece of work: about 2^15 elements, so that a piece and its sums stay in the cache.
int64_t piece_rows(int64_t channels) { return std::max<int64_t>(1, (1 << 15) / channels); }

// Where sums over the rows are taken, and rounded at every row, no longer than this.
constexpr int64_t longest_sum = 40;

struct Shape {
  ScalarType dtype;
  Type type;
  int64_t batch, rows, channels, pieces, piece;  // rows and pieces of one image, rows of a piece

  explicit Shape(const Tensor& x, int64_t most = std::numeric_limits<int64_t>::max())
      : dtype(x.scalar_type()), type(type_of(op, x)), batch(x.size(0)), channels(x.size(-1)) {
    const int64_t images = batch * channels;
    rows = images ? x.numel() / images : 0;
    piece = rows ? std::min(piece_rows(channels), most) : 1;
    pieces = (rows + piece - 1) / piece;
  }

  int64_t numel() const { return batch * rows * channels; }

  // f(image, piece of that image, its first row in all, its rows)
  template <class F>
  void each_piece(const F& f) const {
    if (numel() == 0) return;
    for_pieces(batch * pieces, [&](int64_t at) {
      const int64_t image = at / pieces, first = at % pieces * piece;
      f(image, at, image * rows + first, std::min(piece, rows - first));
    });
  }
};

template <class T>
T* at(T* p, int64_t offset) {
  return p ? p + offset : nullptr;
}

// Of elements that are `bytes` wide.
template <class T>
T* at(T* p, int64_t offset, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return p ? static_cast<Byte*>(p) + offset * bytes : nullptr;
}

void forward(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
             const MaybeTensor& scale, const MaybeTensor& shift, const MaybeTensor& residual,
             const MaybeTensor& gate, double eps, const Tensor& y, const MaybeTensor& r,
             const Tensor& mean, const Tensor& rstd) {
  const Shape s(x);
  const int64_t C = s.channels, images = s.batch * C, bytes = x.element_size();
  STD_TORCH_CHECK(residual.has_value() == r.has_value(), op, ": residual and r go together");
  LayerNormRows all{};
  all.type = s.type;
  all.channels = C;
  all.eps = static_cast<float>(eps);
  const void* x_ = data(op, "x", x, s.dtype, s.numel());
  const void* residual_ = data(op, "residual", residual, s.dtype, s.numel());
  void* y_ = fresh(data(op, "y", y, s.dtype, s.numel()), s.numel() * bytes);
  void* r_ = fresh(data(op, "r", r, s.dtype, s.numel()), s.numel() * bytes);
  all.weight = floats(op, "weight", weight, C);
  all.bias = floats(op, "bias", bias, C);
  const float* gate_ = floats(op, "gate", gate, images);
  const float* scale_ = floats(op, "scale", scale, images);
  const float* shift_ = floats(op, "shift", shift, images);
  float* mean_ = floats(op, "mean", mean, s.batch * s.rows);
  float* rstd_ = floats(op, "rstd", rstd, s.batch * s.rows);
  const auto kernel = FASTDIFF_PICK(layer_norm_rows);
  s.each_piece([&](int64_t image, int64_t, int64_t row, int64_t rows) {
    LayerNormRows a = all;
    a.rows = rows;
    a.x = at(x_, row * C, bytes);
    a.residual = at(residual_, row * C, bytes);
    a.y = at(y_, row * C, bytes);
    a.r = at(r_, row * C, bytes);
    a.gate = at(gate_, image * C);
    a.scale = at(scale_, image * C);
    a.shift = at(shift_, image * C);
    a.mean = mean_ + row;
    a.rstd = rstd_ + row;
    kernel(a);
  });
}

void backward(const MaybeTensor& dy, const MaybeTensor& dr, const Tensor& r, const MaybeTensor& x,
              const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& scale,
              const MaybeTensor& gate, const Tensor& mean, const Tensor& rstd,
              const MaybeTensor& dx, const MaybeTensor& dresidual, const MaybeTensor& dweight,
              const MaybeTensor& dbias, const MaybeTensor& dscale, const MaybeTensor& dshift,
              const MaybeTensor& dgate) {
  const Shape s(r, longest_sum);
  const int64_t C = s.channels, images = s.batch * C, bytes = r.element_size();
  STD_TORCH_CHECK(!dgate || x, op, ": the gradient of gate needs x");
  LayerNormRowsBackward all{};
  all.type = s.type;
  all.channels = C;
  const void* dy_ = data(op, "dy", dy, s.dtype, s.numel());
  const void* dr_ = data(op, "dr", dr, s.dtype, s.numel());
  const void* r_ = data(op, "r", r, s.dtype, s.numel());
  const void* x_ = dgate ? data(op, "x", x, s.dtype, s.numel()) : nullptr;
  void* dx_ = fresh(data(op, "dx", dx, s.dtype, s.numel()), s.numel() * bytes);
  void* dresidual_ = fresh(data(op, "dresidual", dresidual, s.dtype, s.numel()), s.numel() * bytes);
  all.weight = floats(op, "weight", weight, C);
  const float* bias_ = floats(op, "bias", bias, C);
  const float* scale_ = floats(op, "scale", scale, images);
  const float* gate_ = floats(op, "gate", gate, images);
  const float* mean_ = floats(op, "mean", mean, s.batch * s.rows);
  const float* rstd_ = floats(op, "rstd", rstd, s.batch * s.rows);
  float* dweight_ = floats(op, "dweight", dweight, C);
  float* dbias_ = floats(op, "dbias", dbias, C);
  float* dscale_ = floats(op, "dscale", dscale, images);
  float* dshift_ = floats(op, "dshift", dshift, images);
  float* dgate_ = floats(op, "dgate", dgate, images);

  // Sums of every piece: of dy, of dy * x_hat, and the gate's.
  const bool sums = dweight_ || dbias_ || dscale_ || dshift_;
  const int64_t vectors = 2 * sums + (dgate_ != nullptr), pieces = s.batch * s.pieces;
  std::optional<Tensor> partial;
  float* partial_ = nullptr;
  if (vectors && pieces) {
    partial = workspace(r, pieces * vectors * C);
    partial_ = static_cast<float*>(partial->data_ptr());
  }
  const auto kernel = FASTDIFF_PICK(layer_norm_rows_backward);
  s.each_piece([&](int64_t image, int64_t piece, int64_t row, int64_t rows) {
    LayerNormRowsBackward a = all;
    a.rows = rows;
    a.dy = at(dy_, row * C, bytes);
    a.dr = at(dr_, row * C, bytes);
    a.r = at(r_, row * C, bytes);
    a.x = at(x_, row * C, bytes);
    a.dx = at(dx_, row * C, bytes);
    a.dresidual = at(dresidual_, row * C, bytes);
    a.scale = at(scale_, image * C);
    a.gate = at(gate_, image * C);
    a.mean = mean_ + row;
    a.rstd = rstd_ + row;
    float* sum = at(partial_, piece * vectors * C);
    a.sum_dy = sums ? sum : nullptr;
    a.sum_dy_xhat = sums ? sum + C : nullptr;
    a.dgate = dgate_ ? sum + 2 * sums * C : nullptr;
    kernel(a);
  });

  if (!vectors) return;
  std::vector<double> total(static_cast<size_t>(s.batch * vectors * C));
  for_pieces(s.batch, [&](int64_t image) {
    double* to = total.data() + image * vectors * C;
    for (int64_t piece = image * s.pieces; piece < (image + 1) * s.pieces; ++piece) {
      const float* from = at(partial_, piece * vectors * C);
      for (int64_t i = 0; i < vectors * C; ++i) to[i] += from[i];
    }
  });
  for (int64_t i = 0; i < C; ++i) {
    const double w = all.weight ? all.weight[i] : 1., b = bias_ ? bias_[i] : 0.;
    double weight_sum = 0., bias_sum = 0.;
    for (int64_t image = 0; image < s.batch; ++image) {
      const double* sum = total.data() + image * vectors * C + i;
      const int64_t to = image * C + i;
      if (dgate_) dgate_[to] = static_cast<float>(sum[2 * sums * C]);
      if (!sums) continue;
      const double up = scale_ ? 1. + scale_[to] : 1., dy_sum = sum[0], dy_xhat = sum[C];
      weight_sum += up * dy_xhat;
      bias_sum += up * dy_sum;
      if (dscale_) dscale_[to] = static_cast<float>(w * dy_xhat + b * dy_sum);
      if (dshift_) dshift_[to] = static_cast<float>(dy_sum);
    }
    if (dweight_) dweight_[i] = static_cast<float>(weight_sum);
    if (dbias_) dbias_[i] = static_cast<float>(bias_sum);
  }
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_native, m) {
  m.def(
      "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
      "Tensor? residual, Tensor? gate, float eps, Tensor(a!) y, Tensor(b!)? r, Tensor(c!) mean, "
      "Tensor(d!) rstd) -> ()");
  m.def(
      "layer_norm_backward(Tensor? dy, Tensor? dr, Tensor r, Tensor? x, Tensor? weight, "
      "Tensor? bias, Tensor? scale, Tensor? gate, Tensor mean, Tensor rstd, Tensor(a!)? dx, "
      "Tensor(b!)? dresidual, Tensor(c!)? dweight, Tensor(d!)? dbias, Tensor(e!)? dscale, "
      "Tensor(f!)? dshift, Tensor(g!)? dgate) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff_native, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&fastdiff::forward));
  m.impl("layer_norm_backward", TORCH_BOX(&fastdiff::backward));
}
#endif
