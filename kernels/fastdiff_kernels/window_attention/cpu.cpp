// window_attention on CPUs, forward and backward.
//
// A window of one head is gathered from the map into float32 matrices that stay in the cache, its
// products are taken by one small matrix kernel, and its result is scattered back: no roll, no
// partition, no score tensor. A piece of work is some windows of one head; the bias of a head is
// laid out once for all its windows. The backward makes the probabilities again, so only the
// arguments are kept, and adds the gradient of the bias up over the windows of a piece.
#include "../native/isa.h"

namespace fastdiff {

// One window of one head. Token n of the window is the pixel at offset pixel[n] (in elements, of
// that head's first channel of q) or, where pixel[n] < 0, padding. Keys of another region are
// excluded; without regions every key takes part.
struct WindowTile {
  Type type;
  int64_t tokens, width;  // N, d
  const void* qkv;        // k lies `apart` elements after q, v as many after k
  int64_t apart;
  const int64_t* pixel;
  const int64_t* out_pixel;  // the same of the result
  const int32_t* region;     // (N rounded up to 16,) or null
  const float* bias;         // (N, N rounded up to 16) or null
  const float* pad;          // (3, d): what padding holds, or null for zeros
  float scale;
  void* out;
  const void* dout;
  void* dqkv;
  float* dbias;    // as bias: added to
  float* dpad;     // (3, d): added to
  float* scratch;  // window_scratch(N, d) floats
};

constexpr int64_t window_round(int64_t n) { return (n + 15) / 16 * 16; }

// Floats of scratch of one thread: two square matrices, and eight of N x d.
constexpr int64_t window_scratch(int64_t tokens, int64_t width) {
  const int64_t n = window_round(tokens), d = window_round(width);
  return 2 * n * n + 9 * n * d + n;
}

}  // namespace fastdiff

FASTDIFF_KERNEL(window_attention_tile, void, (const WindowTile& a))
FASTDIFF_KERNEL(window_attention_tile_backward, void, (const WindowTile& a))

#ifdef FASTDIFF_ISA
#include "../native/simd.h"

namespace fastdiff::FASTDIFF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int tile_rows = 6, tile_vectors = 4;  // of 32 registers: 24 sums, 4 of b, 1 of a
#elif defined(__AVX2__)
constexpr int tile_rows = 4, tile_vectors = 2;
#else
constexpr int tile_rows = 4, tile_vectors = 2;
#endif

// A tile of c = a b: ROWS rows, VECTORS vectors of columns, over `depth`.
template <int ROWS, int VECTORS>
FASTDIFF_INLINE void product_tile(const float* a, int64_t a_row, int64_t a_column, const float* b,
                                  int64_t b_row, float* c, int64_t c_row, int64_t depth) {
  V sum[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V right[VECTORS];
    for (int j = 0; j < VECTORS; ++j) right[j] = load(b + k * b_row + j * W);
    for (int i = 0; i < ROWS; ++i) {
      const V left = all(a[i * a_row + k * a_column]);
      for (int j = 0; j < VECTORS; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) store(c + i * c_row + j * W, sum[i][j]);
}

template <int ROWS>
void product_rows(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
                  float* c, int64_t c_row, int64_t columns, int64_t depth) {
  constexpr int wide = tile_vectors * W;
  int64_t j = 0;
  for (; j + wide <= columns; j += wide)
    product_tile<ROWS, tile_vectors>(a, a_row, a_column, b + j, b_row, c + j, c_row, depth);
  for (; j < columns; j += W)
    product_tile<ROWS, 1>(a, a_row, a_column, b + j, b_row, c + j, c_row, depth);
}

// c = a b. a has any strides (so a transpose costs nothing); b and c have rows of whole vectors.
void product(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
             float* c, int64_t c_row, int64_t rows, int64_t columns, int64_t depth) {
  int64_t i = 0;
  for (; i + tile_rows <= rows; i += tile_rows)
    product_rows<tile_rows>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, columns,
                            depth);
  for (; i < rows; ++i)
    product_rows<1>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, columns, depth);
}

// Matrices of one window: (n, d) with rows of d rounded up, the squares with rows of n rounded up.
struct Matrices {
  int64_t n, d, n_row, d_row;
  float *q, *k, *v, *dout, *turned, *out, *scores, *slopes, *inverse;

  explicit Matrices(const WindowTile& a)
      : n(a.tokens), d(a.width), n_row(window_round(n)), d_row(window_round(d)) {
    float* next = a.scratch;
    const auto take = [&](int64_t size) {
      float* p = next;
      next += size;
      return p;
    };
    const int64_t wide = n_row * d_row, square = n_row * n_row;
    q = take(wide), k = take(wide), v = take(wide), dout = take(wide), turned = take(wide);
    out = take(3 * wide);
    scores = take(square), slopes = take(square), inverse = take(n_row);
  }
};

// Rows of a map, or what padding holds, as a float32 matrix whose rows end in zeros.
template <class T>
void gather(const T* from, const int64_t* pixel, const float* pad, float by, const Matrices& m,
            float* to) {
  for (int64_t i = 0; i < m.n; ++i) {
    float* row = to + i * m.d_row;
    for (int64_t c = m.d / W * W; c < m.d_row; c += W) store(row + c, V{});
    for_vectors(m.d, [&](int64_t c, auto part) {
      V value{};
      if (pixel[i] >= 0) {
        value = load(from + pixel[i] + c, part);
      } else if (pad) {
        value = load(pad + c, part);
      }
      store(row + c, value * by, part);
    });
  }
}

template <class T>
void scatter(const float* from, const int64_t* pixel, const Matrices& m, T* to) {
  for (int64_t i = 0; i < m.n; ++i) {
    if (pixel[i] < 0) continue;
    const float* row = from + i * m.d_row;
    for_vectors(m.d,
                [&](int64_t c, auto part) { store(to + pixel[i] + c, load(row + c, part), part); });
  }
}

// Adds the rows of padding to `to`, a few at a time: short sums, as they may be many.
void add_padding(const float* from, const int64_t* pixel, const Matrices& m, float* to) {
  constexpr int64_t few = 16;
  for_vectors(m.d, [&](int64_t c, auto part) {
    V total{};
    for (int64_t start = 0; start < m.n; start += few) {
      V some{};
      for (int64_t i = start; i < start + few && i < m.n; ++i)
        if (pixel[i] < 0) some += load(from + i * m.d_row + c);
      total += some;
    }
    store(to + c, load(to + c, part) + total, part);
  });
}

// (n, d) as (d, n), its rows ending in zeros.
void turn(const float* from, const Matrices& m, float* to) {
  for (int64_t c = 0; c < m.d; ++c) {
    float* row = to + c * m.n_row;
    for (int64_t i = 0; i < m.n; ++i) row[i] = from[i * m.d_row + c];
    for (int64_t i = m.n; i < m.n_row; ++i) row[i] = 0.f;
  }
}

// exp(scores + bias + mask - maximum) and one over the sum of each row.
void softmax(const WindowTile& a, const Matrices& m) {
  constexpr float nothing = -__builtin_inff();
  for (int64_t i = 0; i < m.n; ++i) {
    float* row = m.scores + i * m.n_row;
    V top = all(nothing);
    for (int64_t j = 0; j < m.n_row; j += W) {
      V s = load(row + j);
      if (a.bias) s = s + load(a.bias + i * m.n_row + j);
      if (a.region) {
        I other;
        std::memcpy(&other, a.region + j, sizeof other);
        s = other == a.region[i] ? s : all(nothing);
      }
      if (j + W > m.n) {
        I lane;
        for (int l = 0; l < W; ++l) lane[l] = static_cast<int32_t>(j) + l;
        s = lane < static_cast<int32_t>(m.n) ? s : all(nothing);
      }
      store(row + j, s);
      top = max(top, s);
    }
    const float maximum = largest(top);
    V total{};
    for (int64_t j = 0; j < m.n_row; j += W) {
      const V s = load(row + j);
      const V p = s == nothing ? V{} : exp(s - maximum);
      store(row + j, p);
      total += p;
    }
    m.inverse[i] = 1.f / sum(total);
  }
}

template <class T>
void probabilities(const WindowTile& a, const Matrices& m) {
  const T* qkv = static_cast<const T*>(a.qkv);
  const float* pad = a.pad;
  gather(qkv, a.pixel, pad, a.scale, m, m.q);
  gather(qkv + a.apart, a.pixel, pad ? pad + a.width : nullptr, 1.f, m, m.k);
  gather(qkv + 2 * a.apart, a.pixel, pad ? pad + 2 * a.width : nullptr, 1.f, m, m.v);
  turn(m.k, m, m.turned);
  product(m.q, m.d_row, 1, m.turned, m.n_row, m.scores, m.n_row, m.n, m.n_row, m.d);
  softmax(a, m);
}

template <class T>
void forward(const WindowTile& a) {
  const Matrices m(a);
  probabilities<T>(a, m);
  product(m.scores, m.n_row, 1, m.v, m.d_row, m.out, m.d_row, m.n, m.d_row, m.n);
  for (int64_t i = 0; i < m.n; ++i)
    for (int64_t c = 0; c < m.d_row; c += W) {
      float* p = m.out + i * m.d_row + c;
      store(p, load(p) * m.inverse[i]);
    }
  scatter(m.out, a.out_pixel, m, static_cast<T*>(a.out));
}

template <class T>
void backward(const WindowTile& a) {
  const Matrices m(a);
  probabilities<T>(a, m);
  for (int64_t i = 0; i < m.n; ++i)
    for (int64_t j = 0; j < m.n_row; j += W) {
      float* p = m.scores + i * m.n_row + j;
      store(p, load(p) * m.inverse[i]);
    }
  gather(static_cast<const T*>(a.dout), a.out_pixel, nullptr, 1.f, m, m.dout);
  turn(m.v, m, m.turned);
  product(m.dout, m.d_row, 1, m.turned, m.n_row, m.slopes, m.n_row, m.n, m.n_row, m.d);
  for (int64_t i = 0; i < m.n; ++i) {
    const float* p = m.scores + i * m.n_row;
    float* slope = m.slopes + i * m.n_row;
    V total{};
    for (int64_t j = 0; j < m.n_row; j += W) total += load(p + j) * load(slope + j);
    const float delta = sum(total);
    for (int64_t j = 0; j < m.n_row; j += W) {
      const V d = load(p + j) * (load(slope + j) - delta);
      store(slope + j, d);
      if (a.dbias) {
        float* bias = a.dbias + i * m.n_row + j;
        store(bias, load(bias) + d);
      }
    }
  }
  if (!a.dqkv && !a.dpad) return;
  const int64_t wide = m.n_row * m.d_row;
  float *dq = m.out, *dk = dq + wide, *dv = dk + wide;
  product(m.slopes, m.n_row, 1, m.k, m.d_row, dq, m.d_row, m.n, m.d_row, m.n);
  product(m.slopes, 1, m.n_row, m.q, m.d_row, dk, m.d_row, m.n, m.d_row, m.n);
  product(m.scores, 1, m.n_row, m.dout, m.d_row, dv, m.d_row, m.n, m.d_row, m.n);
  for (int64_t i = 0; i < wide; i += W) store(dq + i, load(dq + i) * a.scale);
  T* to = static_cast<T*>(a.dqkv);
  for (int part = 0; part < 3; ++part) {
    scatter(dq + part * wide, a.pixel, m, to + part * a.apart);
    if (a.dpad) add_padding(dq + part * wide, a.pixel, m, a.dpad + part * a.width);
  }
}

}  // namespace

void window_attention_tile(const WindowTile& a) {
  with_type(a.type, [&](auto t) { forward<decltype(t)>(a); });
}

void window_attention_tile_backward(const WindowTile& a) {
  with_type(a.type, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace fastdiff::FASTDIFF_ISA
#endif

#ifdef FASTDIFF_REGISTER
#include "../native/boundary.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace fastdiff {
namespace {

constexpr const char* op = "window_attention";

// One call: the map, its windows, and what the kernel reads besides qkv.
struct Call {
  Type type;
  ScalarType dtype;
  int64_t batch, H, W, C, heads, h, w, shift_h, shift_w, tokens, width, down, across, bytes;
  bool padded, regions, pad_is_value;
  float scale;
  const void* qkv;
  const float *table, *pad;
  std::vector<float> bias;  // (heads, tokens, tokens rounded up)

  Call(const Tensor& x, const MaybeTensor& bias_table, const MaybeTensor& pad_qkv, int64_t heads_,
       int64_t h_, int64_t w_, int64_t shift_h_, int64_t shift_w_, double scale_, bool value)
      : type(type_of(op, x)),
        dtype(x.scalar_type()),
        heads(heads_),
        h(h_),
        w(w_),
        shift_h(shift_h_),
        shift_w(shift_w_),
        pad_is_value(value),
        scale(static_cast<float>(scale_)) {
    STD_TORCH_CHECK(x.dim() == 4 && heads > 0 && h > 0 && w > 0 && x.size(3) % (3 * heads) == 0 &&
                        0 <= shift_h && shift_h < h && 0 <= shift_w && shift_w < w,
                    op, ": sizes do not fit");
    batch = x.size(0), H = x.size(1), W = x.size(2), C = x.size(3) / 3;
    bytes = x.element_size();
    tokens = h * w, width = C / heads;
    down = (H + h - 1) / h, across = (W + w - 1) / w;
    padded = down * h != H || across * w != W;
    regions = shift_h || shift_w || (padded && !pad_is_value);
    qkv = data(op, "qkv", x, dtype, batch * H * W * 3 * C);
    table = floats(op, "bias_table", bias_table, (2 * h - 1) * (2 * w - 1) * heads);
    pad = floats(op, "pad_qkv", pad_qkv, 3 * C);
    if (table) {
      bias.resize(heads * tokens * row());
      each_pair([&](int64_t i, int64_t j, int64_t relative) {
        for (int64_t n = 0; n < heads; ++n)
          bias[(n * tokens + i) * row() + j] = table[relative * heads + n];
      });
    }
  }

  int64_t row() const { return window_round(tokens); }
  int64_t windows() const { return batch * down * across; }
  bool empty() const { return batch * H * W == 0; }
  // Pieces of a head, whatever the number of threads: some windows each.
  int64_t pieces() const { return std::min<int64_t>(windows(), 16); }

  // f(query, key, row of the bias table)
  template <class F>
  void each_pair(const F& f) const {
    for (int64_t i = 0; i < tokens; ++i)
      for (int64_t j = 0; j < tokens; ++j)
        f(i, j, (i / w - j / w + h - 1) * (2 * w - 1) + (i % w - j % w + w - 1));
  }

  // f(head, piece, tile) for each window; windows of one (head, piece) come in order on one thread.
  template <class F>
  void each_window(const F& f) const {
    for_pieces(empty() ? 0 : heads * pieces(), [&](int64_t at) {
      const int64_t head = at / pieces(), piece = at % pieces();
      const auto scratch = std::make_unique_for_overwrite<float[]>(window_scratch(tokens, width));
      std::vector<int64_t> pixel(tokens), out_pixel(tokens);
      std::vector<int32_t> region(row());
      std::vector<float> own_pad(pad ? 3 * width : 0);
      for (int64_t i = 0; i < static_cast<int64_t>(own_pad.size()); ++i)
        own_pad[i] = pad[i / width * C + head * width + i % width];
      WindowTile t{};
      t.type = type;
      t.tokens = tokens;
      t.width = width;
      t.apart = C;
      t.scale = scale;
      t.scratch = scratch.get();
      t.bias = table ? &bias[head * tokens * row()] : nullptr;
      t.pad = pad ? own_pad.data() : nullptr;
      t.qkv = static_cast<const char*>(qkv) + head * width * bytes;
      t.pixel = pixel.data();
      t.out_pixel = out_pixel.data();
      const int64_t end = windows() * (piece + 1) / pieces();
      for (int64_t window = windows() * piece / pieces(); window < end; ++window) {
        const int64_t image = window / (down * across);
        const int64_t i = window / across % down, j = window % across;
        for (int64_t n = 0; n < tokens; ++n)
          place(i, j, n, image, &pixel[n], &out_pixel[n], &region[n]);
        const bool torn = std::any_of(region.begin(), region.begin() + tokens,
                                      [&](int32_t r) { return r != region[0]; });
        t.region = regions && torn ? region.data() : nullptr;
        f(head, at, t);
      }
    });
  }

  // Where token n of window (i, j) lies in the map, rolled back; and its region.
  void place(int64_t i, int64_t j, int64_t n, int64_t image, int64_t* pixel, int64_t* out_pixel,
             int32_t* region) const {
    const int64_t rows = down * h, columns = across * w;
    const int64_t rolled_y = i * h + n / w, rolled_x = j * w + n % w;
    const int64_t y = (rolled_y + shift_h) % rows, x = (rolled_x + shift_w) % columns;
    const bool inside = y < H && x < W;
    const int64_t at = (image * H + y) * W + x;
    *pixel = inside ? at * 3 * C : -1;
    *out_pixel = inside ? at * C : -1;
    const auto part = [](int64_t position, int64_t size, int64_t window, int64_t shift) {
      return static_cast<int32_t>((position >= size - window) + (position >= size - shift));
    };
    *region = 3 * part(rolled_y, rows, h, shift_h) + part(rolled_x, columns, w, shift_w);
    if (!inside && !pad_is_value) *region = 9;
  }
};

void forward(const Tensor& qkv, const MaybeTensor& bias_table, const MaybeTensor& pad_qkv,
             int64_t heads, int64_t h, int64_t w, int64_t shift_h, int64_t shift_w, double scale,
             bool pad_is_value, const Tensor& out) {
  const Call c(qkv, bias_table, pad_qkv, heads, h, w, shift_h, shift_w, scale, pad_is_value);
  char* to = static_cast<char*>(data(op, "out", out, c.dtype, c.batch * c.H * c.W * c.C));
  const auto kernel = FASTDIFF_PICK(window_attention_tile);
  c.each_window([&](int64_t head, int64_t, WindowTile& t) {
    t.out = to + head * c.width * c.bytes;
    kernel(t);
  });
}

void backward(const Tensor& dout, const Tensor& qkv, const MaybeTensor& bias_table,
              const MaybeTensor& pad_qkv, int64_t heads, int64_t h, int64_t w, int64_t shift_h,
              int64_t shift_w, double scale, bool pad_is_value, const Tensor& dqkv,
              const MaybeTensor& dtable, const MaybeTensor& dpad) {
  const Call c(qkv, bias_table, pad_qkv, heads, h, w, shift_h, shift_w, scale, pad_is_value);
  const char* from =
      static_cast<const char*>(data(op, "dout", dout, c.dtype, c.batch * c.H * c.W * c.C));
  char* to = static_cast<char*>(data(op, "dqkv", dqkv, c.dtype, c.batch * c.H * c.W * 3 * c.C));
  const int64_t relatives = (2 * h - 1) * (2 * w - 1), square = c.tokens * c.row();
  float* dtable_ = floats(op, "dtable", dtable, relatives * heads);
  float* dpad_ = floats(op, "dpad", dpad, 3 * c.C);
  const int64_t pieces = c.empty() ? 0 : heads * c.pieces();
  std::vector<float> bias_parts(dtable_ ? pieces * square : 0);
  std::vector<float> pad_parts(dpad_ ? pieces * 3 * c.width : 0);
  const auto kernel = FASTDIFF_PICK(window_attention_tile_backward);
  c.each_window([&](int64_t head, int64_t piece, WindowTile& t) {
    t.dout = from + head * c.width * c.bytes;
    t.dqkv = to + head * c.width * c.bytes;
    t.dbias = dtable_ ? &bias_parts[piece * square] : nullptr;
    t.dpad = dpad_ ? &pad_parts[piece * 3 * c.width] : nullptr;
    kernel(t);
  });
  if (dtable_)
    for_pieces(heads, [&](int64_t head) {
      std::vector<double> total(relatives);
      for (int64_t p = head * c.pieces(); pieces && p < (head + 1) * c.pieces(); ++p)
        c.each_pair([&](int64_t i, int64_t j, int64_t relative) {
          total[relative] += bias_parts[p * square + i * c.row() + j];
        });
      for (int64_t r = 0; r < relatives; ++r)
        dtable_[r * heads + head] = static_cast<float>(total[r]);
    });
  for (int64_t i = 0; dpad_ && i < 3 * c.C; ++i) {
    const int64_t head = i % c.C / c.width, at = i / c.C * c.width + i % c.width;
    double total = 0;
    for (int64_t p = head * c.pieces(); pieces && p < (head + 1) * c.pieces(); ++p)
      total += pad_parts[p * 3 * c.width + at];
    dpad_[i] = static_cast<float>(total);
  }
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_native, m) {
  m.def(
      "window_attention_forward(Tensor qkv, Tensor? bias_table, Tensor? pad_qkv, int heads, "
      "int h, int w, int shift_h, int shift_w, float scale, bool pad_is_value, Tensor(a!) out) "
      "-> ()");
  m.def(
      "window_attention_backward(Tensor dout, Tensor qkv, Tensor? bias_table, Tensor? pad_qkv, "
      "int heads, int h, int w, int shift_h, int shift_w, float scale, bool pad_is_value, "
      "Tensor(a!) dqkv, Tensor(b!)? dtable, Tensor(c!)? dpad) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff_native, CPU, m) {
  m.impl("window_attention_forward", TORCH_BOX(&fastdiff::forward));
  m.impl("window_attention_backward", TORCH_BOX(&fastdiff::backward));
}
#endif
