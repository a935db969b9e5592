// window_attention on CPUs, forward and backward.
//
// The pixels of a window are copied, in the order of memory, into float32 matrices that stay in the
// cache, one for each head; their products are taken by one small matrix kernel, and the results
// scattered back: no roll, no partition, no score tensor beyond a window's. The bias of a head is
// laid out once for all windows. The backward makes the probabilities again, so only the arguments
// are kept, and adds the gradient of the bias up over the windows of a piece of work.
#include "../native/isa.h"

namespace fastdiff {

// One window, some heads. Token n of the window is the pixel at offset pixel[n] (in elements, of
// the first head's first channel of q) or, where pixel[n] < 0, padding. Keys of another region are
// excluded; without regions every key takes part.
struct WindowTile {
  Type type;
  int64_t tokens, width, heads;  // N, d
  const void* qkv;               // k lies `apart` elements after q, v as many after k
  int64_t apart;
  const int64_t* pixel;
  const int64_t* out_pixel;  // the same of the result
  const int32_t* region;     // (N rounded up to 16,) or null
  const float* bias;         // (heads, N, N rounded up to 16) or null
  const float* pad;          // of q; `apart` on, of k and v: what padding holds; null for zeros
  float scale;
  void* out;
  const void* dout;
  void* dqkv;
  float* dbias;  // of the first head as bias, those of others dbias_apart on: added to
  float* dpad;   // of the first head (3, d), those of others dpad_apart on: added to
  int64_t dbias_apart, dpad_apart;
  float* scratch;  // window_scratch(N, d, heads) floats
};

constexpr int64_t window_round(int64_t n) { return (n + 15) / 16 * 16; }

// Floats of one (N, d). A row more than it needs: at a power of two from each other, the same row
// of all heads would have to share a few places of the cache.
constexpr int64_t window_matrix(int64_t tokens, int64_t width) {
  return (window_round(tokens) + 1) * window_round(width);
}

// Floats of scratch: of each head q, k, v and dout; and two squares.
constexpr int64_t window_scratch(int64_t tokens, int64_t width, int64_t heads) {
  const int64_t n = window_round(tokens);
  return (4 * heads + 1) * window_matrix(tokens, width) + 2 * n * n + n;
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

// The last rows, fewer than ROWS of them.
template <int ROWS>
void product_rest(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
                  float* c, int64_t c_row, int64_t rows, int64_t columns, int64_t depth) {
  if constexpr (ROWS > 1) {
    if (rows == ROWS - 1)
      product_rows<ROWS - 1>(a, a_row, a_column, b, b_row, c, c_row, columns, depth);
    else
      product_rest<ROWS - 1>(a, a_row, a_column, b, b_row, c, c_row, rows, columns, depth);
  }
}

// c = a b. a has any strides (so a transpose costs nothing); b and c have rows of whole vectors.
void product(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
             float* c, int64_t c_row, int64_t rows, int64_t columns, int64_t depth) {
  int64_t i = 0;
  for (; i + tile_rows <= rows; i += tile_rows)
    product_rows<tile_rows>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, columns,
                            depth);
  product_rest<tile_rows>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, rows - i,
                          columns, depth);
}

// Matrices of a window: (n, d) with rows of d rounded up, the squares with rows of n rounded up.
struct Matrices {
  int64_t n, d, n_row, d_row, wide;
  float *heads, *turned, *scores, *slopes, *inverse;

  explicit Matrices(const WindowTile& a)
      : n(a.tokens),
        d(a.width),
        n_row(window_round(n)),
        d_row(window_round(d)),
        wide(window_matrix(n, d)) {
    heads = a.scratch;
    turned = heads + 4 * a.heads * wide;
    scores = turned + wide;
    slopes = scores + n_row * n_row;
    inverse = slopes + n_row * n_row;
  }
  // Part 0 to 3: q, k, v and dout.
  float* of(int64_t head, int part) const { return heads + (4 * head + part) * wide; }
};

// Part `part` of all heads from a map, or what padding holds, as matrices whose rows end in zeros.
template <class T>
FASTDIFF_INLINE void gather(const WindowTile& a, const Matrices& m, int part, int64_t i,
                            const T* from, const float* pad, float by) {
  for (int64_t head = 0; head < a.heads; ++head) {
    float* row = m.of(head, part) + i * m.d_row;
    if (m.d_row - m.d >= W) store(row + m.d_row - W, V{});
    for_vectors(m.d, [&](int64_t c, auto some) {
      V value{};
      if (from) {
        value = load(from + head * m.d + c, some);
      } else if (pad) {
        value = load(pad + head * m.d + c, some);
      }
      store(row + c, value * by);
    });
  }
}

// A pixel of a result from part `part` of all heads.
template <class T>
FASTDIFF_INLINE void scatter(const WindowTile& a, const Matrices& m, int part, int64_t i, T* to) {
  for (int64_t head = 0; head < a.heads; ++head) {
    const float* row = m.of(head, part) + i * m.d_row;
    for_vectors(
        m.d, [&](int64_t c, auto some) { store(to + head * m.d + c, load(row + c, some), some); });
  }
}

template <class T>
void gather_qkv(const WindowTile& a, const Matrices& m) {
  for (int64_t i = 0; i < m.n; ++i)
    for (int part = 0; part < 3; ++part) {
      const T* from =
          a.pixel[i] < 0 ? nullptr : static_cast<const T*>(a.qkv) + a.pixel[i] + part * a.apart;
      gather(a, m, part, i, from, a.pad ? a.pad + part * a.apart : nullptr, part ? 1.f : a.scale);
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
  for (int64_t i = 0; i < m.n_row; i += W)
    for (int64_t c = 0; c < m.d; c += W) {
      V square[W];
      for (int k = 0; k < W; ++k)
        square[k] = i + k < m.n ? load(from + (i + k) * m.d_row + c) : V{};
      transpose(square);
      for (int k = 0; k < W && c + k < m.d; ++k) store(to + (c + k) * m.n_row + i, square[k]);
    }
}

// exp(scores + bias + mask - maximum) and one over the sum of each row.
void softmax(const WindowTile& a, const Matrices& m, int64_t head) {
  constexpr float nothing = -__builtin_inff();
  const int64_t n = m.n, n_row = m.n_row;
  const float* bias = a.bias ? a.bias + head * n * n_row : nullptr;
  const int32_t* region = a.region;
  float* row = m.scores;
  for (int64_t i = 0; i < n; ++i, row += n_row) {
    V top = all(nothing);
    for (int64_t j = 0; j < n_row; j += W) {
      V s = load(row + j);
      if (bias) s += load(bias + i * n_row + j);
      if (region) {
        I other;
        std::memcpy(&other, region + j, sizeof other);
        s = other == region[i] ? s : all(nothing);
      }
      if (j + W > n) s = lane_numbers(Lanes{}) < static_cast<int32_t>(n - j) ? s : all(nothing);
      store(row + j, s);
      top = max(top, s);
    }
    const float maximum = largest(top);
    V total{};
    for_pairs(n_row, [&](int64_t j, auto part) {
      const auto s = load(row + j, part);
      const auto p = lanes([](V v, V e) { return v == nothing ? V{} : e; }, s, exp(s - maximum));
      store(row + j, p, part);
      total += both(p);
    });
    m.inverse[i] = 1.f / sum(total);
  }
}

// Of head `head`, not yet divided by the sums of rows.
void probabilities(const WindowTile& a, const Matrices& m, int64_t head) {
  turn(m.of(head, 1), m, m.turned);
  product(m.of(head, 0), m.d_row, 1, m.turned, m.n_row, m.scores, m.n_row, m.n, m.n_row, m.d);
  softmax(a, m, head);
}

// Multiplies row i of (n, row) by inverse[i].
void divide(const Matrices& m, float* from, int64_t row) {
  for (int64_t i = 0; i < m.n; ++i, from += row)
    for (int64_t j = 0; j < row; j += W) store(from + j, load(from + j) * m.inverse[i]);
}

template <class T>
void forward(const WindowTile& a) {
  const Matrices m(a);
  gather_qkv<T>(a, m);
  for (int64_t head = 0; head < a.heads; ++head) {
    probabilities(a, m, head);
    float* out = m.of(head, 0);  // q is done with
    product(m.scores, m.n_row, 1, m.of(head, 2), m.d_row, out, m.d_row, m.n, m.d_row, m.n);
    divide(m, out, m.d_row);
  }
  for (int64_t i = 0; i < m.n; ++i)
    if (a.out_pixel[i] >= 0) scatter(a, m, 0, i, static_cast<T*>(a.out) + a.out_pixel[i]);
}

// From the probabilities and the gradient of them that `slopes` holds to that of the scores; its
// sum is the bias's.
void slopes_of_scores(const Matrices& m, float* dbias) {
  for (int64_t i = 0; i < m.n; ++i) {
    const float* p = m.scores + i * m.n_row;
    float* slope = m.slopes + i * m.n_row;
    V total{};
    for (int64_t j = 0; j < m.n_row; j += W) total += load(p + j) * load(slope + j);
    const float delta = sum(total);
    for (int64_t j = 0; j < m.n_row; j += W) {
      const V d = load(p + j) * (load(slope + j) - delta);
      store(slope + j, d);
      if (!dbias) continue;
      float* bias = dbias + i * m.n_row + j;
      store(bias, load(bias) + d);
    }
  }
}

template <class T>
void backward(const WindowTile& a) {
  const Matrices m(a);
  gather_qkv<T>(a, m);
  for (int64_t i = 0; i < m.n; ++i) {
    const T* from = a.out_pixel[i] < 0 ? nullptr : static_cast<const T*>(a.dout) + a.out_pixel[i];
    gather(a, m, 3, i, from, nullptr, 1.f);
  }
  for (int64_t head = 0; head < a.heads; ++head) {
    probabilities(a, m, head);
    divide(m, m.scores, m.n_row);
    float *q = m.of(head, 0), *k = m.of(head, 1), *v = m.of(head, 2), *dout = m.of(head, 3);
    turn(v, m, m.turned);
    product(dout, m.d_row, 1, m.turned, m.n_row, m.slopes, m.n_row, m.n, m.n_row, m.d);
    slopes_of_scores(m, a.dbias ? a.dbias + head * a.dbias_apart : nullptr);
    if (!a.dqkv && !a.dpad) continue;
    // Each gradient takes the place of a matrix that is done with.
    float *dv = v, *dq = dout, *dk = k;
    product(m.scores, 1, m.n_row, dout, m.d_row, dv, m.d_row, m.n, m.d_row, m.n);
    product(m.slopes, m.n_row, 1, k, m.d_row, dq, m.d_row, m.n, m.d_row, m.n);
    product(m.slopes, 1, m.n_row, q, m.d_row, dk, m.d_row, m.n, m.d_row, m.n);
    for (int64_t i = 0; i < m.n * m.d_row; i += W) store(dq + i, load(dq + i) * a.scale);
    if (!a.dpad) continue;
    float* dpad = a.dpad + head * a.dpad_apart;
    for (const float* d : {dq, dk, dv}) {
      add_padding(d, a.pixel, m, dpad);
      dpad += m.d;
    }
  }
  if (!a.dqkv) return;
  constexpr int parts[] = {3, 1, 2};  // where dq, dk and dv are
  for (int64_t i = 0; i < m.n; ++i)
    for (int part = 0; part < 3 && a.pixel[i] >= 0; ++part)
      scatter(a, m, parts[part], i, static_cast<T*>(a.dqkv) + a.pixel[i] + part * a.apart);
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
constexpr int32_t outside = 9;  // the region of padding that takes no part, after the nine

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
    constexpr int64_t most = 1 << 15;  // so that no product below overflows
    STD_TORCH_CHECK(x.dim() == 4 && 0 < heads && heads <= most && 0 < h && h <= most && 0 < w &&
                        w <= most && x.size(3) % (3 * heads) == 0 && 0 <= shift_h && shift_h < h &&
                        0 <= shift_w && shift_w < w,
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
      const auto relative = relatives();
      for (int64_t n = 0; n < heads; ++n)
        for (int64_t i = 0; i < tokens; ++i)
          for (int64_t j = 0; j < tokens; ++j)
            bias[(n * tokens + i) * row() + j] = table[relative[i * row() + j] * heads + n];
    }
  }

  int64_t row() const { return window_round(tokens); }
  int64_t windows() const { return batch * down * across; }
  bool empty() const { return batch * H * W == 0; }
  // Pieces, whatever the number of threads: some windows each and, where these are few, some heads.
  int64_t pieces() const { return std::min<int64_t>(windows(), 32); }
  int64_t head_pieces() const { return std::clamp<int64_t>(32 / pieces(), 1, heads); }
  // Heads of a tile, whose matrices shall leave half of a cache of 2 MB for what is read and
  // written.
  int64_t most_heads() const {
    return std::max<int64_t>(1, (int64_t{1} << 18) / (4 * window_matrix(tokens, width)));
  }

  // Rows of the bias table: of (query i, key j) at i * row() + j.
  std::vector<int32_t> relatives() const {
    std::vector<int32_t> at(tokens * row());
    for (int64_t i = 0; i < tokens; ++i)
      for (int64_t j = 0; j < tokens; ++j)
        at[i * row() + j] =
            static_cast<int32_t>((i / w - j / w + h - 1) * (2 * w - 1) + (i % w - j % w + w - 1));
    return at;
  }

  // f(first head, part of that head, tile) for each window and run of heads; what belongs to one
  // part comes in order on one thread.
  template <class F>
  void each_tile(const F& f) const {
    if (empty()) return;
    for_pieces(pieces() * head_pieces(), [&](int64_t at) {
      const int64_t piece = at / head_pieces(), head_piece = at % head_pieces();
      const int64_t first = heads * head_piece / head_pieces();
      const int64_t last = heads * (head_piece + 1) / head_pieces();
      const int64_t most = std::min(most_heads(), last - first);
      const auto scratch =
          std::make_unique_for_overwrite<float[]>(window_scratch(tokens, width, most));
      Place place(*this);
      WindowTile t{};
      t.type = type;
      t.tokens = tokens;
      t.width = width;
      t.apart = C;
      t.scale = scale;
      t.scratch = scratch.get();
      t.pixel = place.pixel.data();
      t.out_pixel = place.out_pixel.data();
      const int64_t end = windows() * (piece + 1) / pieces();
      for (int64_t window = windows() * piece / pieces(); window < end; ++window) {
        place.fill(*this, window);
        t.region = regions && place.torn ? place.region.data() : nullptr;
        for (int64_t head = first; head < last; head += most) {
          t.heads = std::min(most, last - head);
          t.qkv = static_cast<const char*>(qkv) + head * width * bytes;
          t.bias = table ? &bias[head * tokens * row()] : nullptr;
          t.pad = pad ? pad + head * width : nullptr;
          f(head, head * pieces() + piece, t);
        }
      }
    });
  }

  // Where the tokens of a window lie in the map, rolled back; and their regions.
  struct Place {
    std::vector<int64_t> pixel, out_pixel;
    std::vector<int32_t> region;
    bool torn = false;  // into several regions

    explicit Place(const Call& c) : pixel(c.tokens), out_pixel(c.tokens), region(c.row()) {}

    void fill(const Call& c, int64_t window) {
      const int64_t image = window / (c.down * c.across);
      const int64_t i = window / c.across % c.down, j = window % c.across;
      const int64_t rows = c.down * c.h, columns = c.across * c.w;
      const auto rolled = [](int64_t position, int64_t shift, int64_t size) {
        return position + shift < size ? position + shift : position + shift - size;
      };
      const auto part = [](int64_t position, int64_t size, int64_t window, int64_t shift) {
        return static_cast<int32_t>((position >= size - window) + (position >= size - shift));
      };
      int64_t n = 0;
      torn = false;
      for (int64_t row = i * c.h; row < (i + 1) * c.h; ++row) {
        const int64_t y = rolled(row, c.shift_h, rows);
        const int32_t part_y = 3 * part(row, rows, c.h, c.shift_h);
        for (int64_t column = j * c.w; column < (j + 1) * c.w; ++column, ++n) {
          const int64_t x = rolled(column, c.shift_w, columns);
          const bool inside = y < c.H && x < c.W;
          const int64_t at = (image * c.H + y) * c.W + x;
          pixel[n] = inside ? at * 3 * c.C : -1;
          out_pixel[n] = inside ? at * c.C : -1;
          region[n] =
              inside || c.pad_is_value ? part_y + part(column, columns, c.w, c.shift_w) : outside;
          torn = torn || region[n] != region[0];
        }
      }
    }
  };
};

void forward(const Tensor& qkv, const MaybeTensor& bias_table, const MaybeTensor& pad_qkv,
             int64_t heads, int64_t h, int64_t w, int64_t shift_h, int64_t shift_w, double scale,
             bool pad_is_value, const Tensor& out) {
  const Call c(qkv, bias_table, pad_qkv, heads, h, w, shift_h, shift_w, scale, pad_is_value);
  const int64_t elements = c.batch * c.H * c.W * c.C;
  char* to = static_cast<char*>(fresh(data(op, "out", out, c.dtype, elements), elements * c.bytes));
  const auto kernel = FASTDIFF_PICK(window_attention_tile);
  c.each_tile([&](int64_t head, int64_t, WindowTile& t) {
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
  const int64_t elements = c.batch * c.H * c.W * 3 * c.C;
  char* to =
      static_cast<char*>(fresh(data(op, "dqkv", dqkv, c.dtype, elements), elements * c.bytes));
  const int64_t relatives = (2 * h - 1) * (2 * w - 1), square = c.tokens * c.row();
  float* dtable_ = floats(op, "dtable", dtable, relatives * heads);
  float* dpad_ = floats(op, "dpad", dpad, 3 * c.C);
  const int64_t pieces = c.empty() ? 0 : c.pieces(), parts = heads * pieces;
  std::vector<float> bias_parts(dtable_ ? parts * square : 0);
  std::vector<float> pad_parts(dpad_ ? parts * 3 * c.width : 0);
  const auto kernel = FASTDIFF_PICK(window_attention_tile_backward);
  c.each_tile([&](int64_t head, int64_t part, WindowTile& t) {
    t.dout = from + head * c.width * c.bytes;
    t.dqkv = to + head * c.width * c.bytes;
    t.dbias_apart = pieces * square;
    t.dpad_apart = pieces * 3 * c.width;
    t.dbias = dtable_ ? &bias_parts[part * square] : nullptr;
    t.dpad = dpad_ ? &pad_parts[part * 3 * c.width] : nullptr;
    kernel(t);
  });
  if (dtable_) {
    const auto relative = c.relatives();
    for_pieces(heads, [&](int64_t head) {
      std::vector<float> pairs(square);
      for (int64_t p = head * pieces; p < (head + 1) * pieces; ++p)
        for (int64_t i = 0; i < square; ++i) pairs[i] += bias_parts[p * square + i];
      std::vector<double> total(relatives);
      for (int64_t i = 0; i < c.tokens; ++i)
        for (int64_t j = 0; j < c.tokens; ++j)
          total[relative[i * c.row() + j]] += pairs[i * c.row() + j];
      for (int64_t r = 0; r < relatives; ++r)
        dtable_[r * heads + head] = static_cast<float>(total[r]);
    });
  }
  for (int64_t i = 0; dpad_ && i < 3 * c.C; ++i) {
    const int64_t head = i % c.C / c.width, at = i / c.C * c.width + i % c.width;
    double total = 0;
    for (int64_t p = head * pieces; p < (head + 1) * pieces; ++p)
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
