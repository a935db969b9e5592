// group_norm_silu on CPUs, forward and backward, NCHW and channels_last.
//
// y = act((x - mean) * up + offset), up = rstd * weight * (1 + scale),
// offset = bias * (1 + scale) + shift. The backward sums d and d * (x - mean) of every channel of
// an image, where d = dy * act'; all gradients follow from these two and a second look at x and dy.
// A mean is a float and what rounding took from it (`rest`), which offset makes good: else a mean
// far from zero would cost as many digits as it has before the deviation's.
//
// NCHW: a piece of work is one group of one image, whose second reading comes from the cache.
// channels_last: a piece is a run of pixels; statistics are taken per channel, then per group.
// Statistics are means and sums of centred squares of small blocks, merged exactly.
#include "../native/isa.h"

namespace fastdiff {

// `pixels` pixels of `channels` channels of one image. Element (pixel, channel) of x and dx lies at
// pixel * x_pixel + channel * x_channel, of y and dy likewise; one of the two strides is 1.
// Vectors (channels,) belong to these channels of this image.
struct GroupNormTile {
  Type type;
  bool silu;
  int64_t pixels, channels, x_pixel, x_channel, y_pixel, y_channel;
  int64_t x_ahead, y_ahead;  // from an element to the one that the next tile has in its place
  const void* x;
  const void* dy;
  void* y;
  void* dx;
  const float *mean, *up, *offset;  // of the group of each channel; see above
  const float *slope, *constant;    // dx = up * d - constant - (x - mean) * slope
  float* d;  // what the first pass of the backward keeps of d for the second, as y lies; or null
  // (channels,), out: mean, centred squares and rest; or sums of d and of d * (x - mean)
  float *first, *second, *third;
};

// channels_last: what was measured of the pieces of one image, each (3, channels) as above.
struct GroupNormPieces {
  const float* measured;
  int64_t pieces, channels, run, pixels;  // a piece has `run` pixels, the last what is left
  double *means, *squares;                // (channels,), out: of the image
};

}  // namespace fastdiff

FASTDIFF_KERNEL(group_norm_statistics, void, (const GroupNormTile& a))
FASTDIFF_KERNEL(group_norm_merge, void, (const GroupNormPieces& a))
FASTDIFF_KERNEL(group_norm_apply, void, (const GroupNormTile& a))
FASTDIFF_KERNEL(group_norm_sums, void, (const GroupNormTile& a))
FASTDIFF_KERNEL(group_norm_apply_backward, void, (const GroupNormTile& a))

#ifdef FASTDIFF_ISA
#include "../native/simd.h"

namespace fastdiff::FASTDIFF_ISA {
namespace {

constexpr int64_t block = 1024;  // elements whose mean and squares are taken at once

// A vector of a channel's constant: the same in all lanes, or one for each lane's channel.
struct Same {
  FASTDIFF_INLINE V operator()(const float* p, auto) const { return all(*p); }
};
struct Each {
  FASTDIFF_INLINE auto operator()(const float* p, auto part) const { return load(p, part); }
};

// f(x offset, y offset, channel, part, reader of constants) over a tile, in the order of memory.
template <class F>
FASTDIFF_INLINE void for_tile(const GroupNormTile& a, F f) {
  if (a.x_channel == 1 && a.y_channel == 1) {
    for (int64_t p = 0; p < a.pixels; ++p)
      for_pairs(a.channels, [&](int64_t c, auto part) {
        f(p * a.x_pixel + c, p * a.y_pixel + c, c, part, Each{});
      });
  } else {
    for (int64_t c = 0; c < a.channels; ++c)
      for_pairs(a.pixels, [&](int64_t p, auto part) {
        f(c * a.x_channel + p, c * a.y_channel + p, c, part, Same{});
      });
  }
}

// channels_last: f(first pixel, pixels, channel, part) for a few rows of pixels at a time, so that
// sums over rows stay in registers and are short.
template <class F>
FASTDIFF_INLINE void for_rows(const GroupNormTile& a, F f) {
  constexpr int64_t rows = 16;
  for (int64_t p = 0; p < a.pixels; p += rows)
    for_vectors(a.channels, [&](int64_t c, auto part) {
      f(p, a.pixels - p < rows ? a.pixels - p : rows, c, part);
    });
}

FASTDIFF_INLINE void clear(float* p, int64_t size) {
  for_vectors(size, [&](int64_t i, auto part) { store(p + i, V{}, part); });
}

// What rounding took from the mean is found as the mean of the centred values.
template <class T>
void statistics_of_channels(const GroupNormTile& a) {
  const T* x = static_cast<const T*>(a.x);
  const float count = static_cast<float>(a.pixels);
  clear(a.first, a.channels);
  clear(a.second, a.channels);
  clear(a.third, a.channels);
  for_rows(a, [&](int64_t p, int64_t rows, int64_t c, auto part) {
    V total{};
    for (int64_t k = p; k < p + rows; ++k) total += load(x + k * a.x_pixel + c, part);
    store(a.first + c, load(a.first + c, part) + total, part);
  });
  for_vectors(a.channels, [&](int64_t c, auto part) {
    store(a.first + c, load(a.first + c, part) / count, part);
  });
  for_rows(a, [&](int64_t p, int64_t rows, int64_t c, auto part) {
    const V mean = load(a.first + c, part);
    V squares{}, rest{};
    for (int64_t k = p; k < p + rows; ++k) {
      prefetch(x + k * a.x_pixel + c + a.x_ahead, part);
      const V centred = load(x + k * a.x_pixel + c, part) - mean;
      rest += centred;
      squares += centred * centred;
    }
    store(a.second + c, load(a.second + c, part) + squares, part);
    store(a.third + c, load(a.third + c, part) + rest, part);
  });
  for_vectors(a.channels, [&](int64_t c, auto part) {
    store(a.third + c, load(a.third + c, part) / count, part);
  });
}

template <class T>
void statistics_of_planes(const GroupNormTile& a) {
  for (int64_t c = 0; c < a.channels; ++c) {
    const T* x = static_cast<const T*>(a.x) + c * a.x_channel;
    double mean = 0, squares = 0;
    for (int64_t start = 0; start < a.pixels; start += block) {
      const int64_t size = a.pixels - start < block ? a.pixels - start : block;
      const V total = sum_vectors<1>(size, [&](int64_t i, auto part) {
                        return several(load(x + start + i, part));
                      }).of[0];
      const float middle = sum(total) / static_cast<float>(size);
      const auto about = sum_vectors<2>(size, [&](int64_t i, auto part) {
        const auto v = keep(load(x + start + i, part) - middle, part);
        return several(v, v * v);
      });
      const double n = static_cast<double>(size), all = static_cast<double>(start + size);
      const double correction = sum(about.of[0]) / n, delta = middle + correction - mean;
      mean += delta * n / all;
      squares +=
          sum(about.of[1]) - correction * correction * n + delta * delta * n * (all - n) / all;
    }
    a.first[c] = static_cast<float>(mean);
    a.second[c] = static_cast<float>(squares);
    a.third[c] = static_cast<float>(mean - a.first[c]);
  }
}

template <class T, bool SILU>
void apply(const GroupNormTile& a) {
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  for_tile(a, [&](int64_t at, int64_t to, int64_t c, auto part, auto constant) {
    prefetch(x + at + a.x_ahead, part);
    const auto v = (load(x + at, part) - constant(a.mean + c, part)) * constant(a.up + c, part) +
                   constant(a.offset + c, part);
    store(y + to, SILU ? silu(v) : v, part);
  });
}

// dy * act' where act was applied to (x - mean) * up + offset.
template <bool SILU, class X>
FASTDIFF_INLINE X before_activation(X dy, X centred, auto up, auto offset) {
  return SILU ? dy * silu_slope(centred * up + offset) : dy;
}

template <class T, bool SILU>
void sums(const GroupNormTile& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* dy = static_cast<const T*>(a.dy);
  // d, and d * centred.
  const auto both = [&](auto x_, auto dy_, V mean, V up, V offset) {
    const auto centred = x_ - mean;
    const auto d = before_activation<SILU>(dy_, centred, up, offset);
    return several(d, d * centred);
  };
  if (a.x_channel == 1 && a.y_channel == 1) {
    clear(a.first, a.channels);
    clear(a.second, a.channels);
    for_rows(a, [&](int64_t p, int64_t rows, int64_t c, auto part) {
      const V mean = load(a.mean + c, part), up = load(a.up + c, part);
      const V offset = load(a.offset + c, part);
      V d_sum{}, x_sum{};
      int64_t k = p;
      const auto keep_d = [&](int64_t i, V d) {
        if (a.d) store(a.d + i * a.y_pixel + c, d, part);
      };
      const auto x_at = [&](int64_t i) { return load(x + i * a.x_pixel + c, part); };
      const auto dy_at = [&](int64_t i) { return load(dy + i * a.y_pixel + c, part); };
      for (; k + 2 <= p + rows; k += 2) {
        for (int64_t i = k; i < k + 2; ++i) {
          prefetch(x + i * a.x_pixel + c + a.x_ahead, part);
          prefetch(dy + i * a.y_pixel + c + a.y_ahead, part);
        }
        const auto sums =
            both(Two{{x_at(k), x_at(k + 1)}}, Two{{dy_at(k), dy_at(k + 1)}}, mean, up, offset);
        keep_d(k, sums.of[0].v[0]);
        keep_d(k + 1, sums.of[0].v[1]);
        d_sum += sums.of[0].v[0] + sums.of[0].v[1];
        x_sum += sums.of[1].v[0] + sums.of[1].v[1];
      }
      if (k < p + rows) {
        const auto sums = both(x_at(k), dy_at(k), mean, up, offset);
        keep_d(k, sums.of[0]);
        d_sum += sums.of[0];
        x_sum += sums.of[1];
      }
      store(a.first + c, load(a.first + c, part) + d_sum, part);
      store(a.second + c, load(a.second + c, part) + x_sum, part);
    });
    return;
  }
  for (int64_t c = 0; c < a.channels; ++c) {
    const V mean = all(a.mean[c]), up = all(a.up[c]), offset = all(a.offset[c]);
    double first = 0, second = 0;
    for (int64_t start = 0; start < a.pixels; start += block) {
      const int64_t size = a.pixels - start < block ? a.pixels - start : block;
      const auto both_sums = sum_vectors<2>(size, [&](int64_t i, auto part) {
        const int64_t p = start + i, to = c * a.y_channel + p;
        // the sums are 0 beyond the part, as dy is
        const auto two =
            both(load(x + c * a.x_channel + p, part), load(dy + to, part), mean, up, offset);
        if (a.d) store(a.d + to, two.of[0], part);
        return two;
      });
      first += sum(both_sums.of[0]);
      second += sum(both_sums.of[1]);
    }
    a.first[c] = static_cast<float>(first);
    a.second[c] = static_cast<float>(second);
  }
}

template <class T, bool SILU, bool KEPT>
void apply_backward(const GroupNormTile& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* dy = static_cast<const T*>(a.dy);
  T* dx = static_cast<T*>(a.dx);
  for_tile(a, [&](int64_t at, int64_t to, int64_t c, auto part, auto constant) {
    prefetch(x + at + a.x_ahead, part);
    const auto centred = load(x + at, part) - constant(a.mean + c, part);
    const auto up = constant(a.up + c, part);
    const auto d = [&] {
      if constexpr (KEPT) return load(a.d + to, part);
      prefetch(dy + to + a.y_ahead, part);
      return before_activation<SILU>(load(dy + to, part), centred, up,
                                     constant(a.offset + c, part));
    }();
    const auto rest = constant(a.constant + c, part) + centred * constant(a.slope + c, part);
    store(dx + at, up * d - rest, part);
  });
}

}  // namespace

void group_norm_statistics(const GroupNormTile& a) {
  with_type(a.type, [&](auto t) {
    if (a.x_channel == 1 && a.x_pixel != 1) {
      statistics_of_channels<decltype(t)>(a);
    } else {
      statistics_of_planes<decltype(t)>(a);
    }
  });
}

void group_norm_merge(const GroupNormPieces& a) {
  const int64_t C = a.channels;
  double* __restrict means = a.means;
  double* __restrict squares = a.squares;
  const auto each = [&](auto f) {
    for (int64_t p = 0; p < a.pieces; ++p) {
      const int64_t left = a.pixels - p * a.run;
      const float* __restrict own = a.measured + p * 3 * C;
      f(own, static_cast<double>(left < a.run ? left : a.run));
    }
  };
  for (int64_t k = 0; k < C; ++k) means[k] = squares[k] = 0;
  each([&](const float* own, double count) {
    for (int64_t k = 0; k < C; ++k)
      means[k] += (static_cast<double>(own[k]) + own[2 * C + k]) * count;
  });
  for (int64_t k = 0; k < C; ++k) means[k] /= static_cast<double>(a.pixels);
  each([&](const float* own, double count) {
    for (int64_t k = 0; k < C; ++k) {
      // about `own[k]`, so without rest; moved to the mean of the image
      const double delta = own[k] - means[k], rest = own[2 * C + k];
      squares[k] += own[C + k] + delta * (delta + 2 * rest) * count;
    }
  });
}

void group_norm_apply(const GroupNormTile& a) {
  with_type(a.type,
            [&](auto t) { a.silu ? apply<decltype(t), true>(a) : apply<decltype(t), false>(a); });
}

void group_norm_sums(const GroupNormTile& a) {
  with_type(a.type,
            [&](auto t) { a.silu ? sums<decltype(t), true>(a) : sums<decltype(t), false>(a); });
}

void group_norm_apply_backward(const GroupNormTile& a) {
  with_type(a.type, [&](auto t) {
    using T = decltype(t);
    if (a.d) return apply_backward<T, true, true>(a);
    a.silu ? apply_backward<T, true, false>(a) : apply_backward<T, false, false>(a);
  });
}

}  // namespace fastdiff::FASTDIFF_ISA
#endif

#ifdef FASTDIFF_REGISTER
#include "../native/boundary.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <vector>

namespace fastdiff {
namespace {

constexpr const char* op = "group_norm_silu";

// One call: the images, x and skip behind each other along the channels, and the parameters.
struct Call {
  bool channels_last;
  Type type;
  ScalarType dtype;
  int64_t batch, pixels, channels, groups, bytes;
  int64_t part[2];      // channels of x, of skip
  const void* from[2];  // x, skip
  const float *weight, *bias, *scale, *shift;

  int64_t width() const { return channels / groups; }
  int64_t first(int source) const { return source ? part[0] : 0; }

  // Pixels of a piece in channels_last: about 2^14 elements.
  int64_t piece_pixels() const { return std::max<int64_t>(1, (int64_t{1} << 14) / channels); }
  int64_t pieces() const { return (pixels + piece_pixels() - 1) / piece_pixels(); }

  // The strides of a tile of one source, its pointers still to be set.
  GroupNormTile tile(int source, int64_t count, int64_t run) const {
    GroupNormTile t{};
    t.type = type;
    t.pixels = run;
    t.channels = count;
    t.x_pixel = channels_last ? part[source] : 1;
    t.x_channel = channels_last ? 1 : pixels;
    t.y_pixel = channels_last ? channels : 1;
    t.y_channel = channels_last ? 1 : pixels;
    t.x_ahead = channels_last ? run * t.x_pixel : count * t.x_channel;
    t.y_ahead = channels_last ? run * t.y_pixel : count * t.y_channel;
    return t;
  }

  // Offsets in bytes of (image, channel, pixel) in a source, and in y.
  int64_t in(int source, int64_t image, int64_t channel, int64_t pixel) const {
    const int64_t c = channel - first(source), C = part[source];
    return bytes * (image * pixels * C + (channels_last ? pixel * C + c : c * pixels + pixel));
  }
  int64_t out(int64_t image, int64_t channel, int64_t pixel) const {
    return bytes * (image * pixels * channels +
                    (channels_last ? pixel * channels + channel : channel * pixels + pixel));
  }

  // f(source, first channel, channels) for what of the channels c..c+n-1 lies in x and in skip.
  template <class F>
  void each_source(int64_t c, int64_t n, const F& f) const {
    for (int source = 0; source < 2; ++source) {
      const int64_t begin = std::max(c, first(source));
      const int64_t end = std::min(c + n, first(source) + part[source]);
      if (begin < end) f(source, begin, end - begin);
    }
  }

  // An image like x, with so many channels: its data.
  void* image(const char* name, const MaybeTensor& t, int64_t channels) const {
    return t ? dense(op, name, *t, dtype, channels_last, batch * pixels * channels) : nullptr;
  }

  void* result(const char* name, const MaybeTensor& t, int64_t channels) const {
    return fresh(image(name, t, channels), batch * pixels * channels * bytes);
  }

  double gain(int64_t image, int64_t c) const {
    return scale ? 1. + scale[image * channels + c] : 1.;
  }
};

Call describe(const Tensor& x, const MaybeTensor& skip, const Tensor& weight, const Tensor& bias,
              const MaybeTensor& scale, const MaybeTensor& shift, int64_t groups,
              bool channels_last) {
  STD_TORCH_CHECK(x.dim() == 4 && (!skip || skip->dim() == 4), op, ": expected 4 dimensions");
  Call c{};
  c.channels_last = channels_last;
  c.type = type_of(op, x);
  c.dtype = x.scalar_type();
  c.bytes = x.element_size();
  c.batch = x.size(0);
  c.pixels = x.size(2) * x.size(3);
  c.part[0] = x.size(1);
  c.part[1] = skip ? skip->size(1) : 0;
  c.channels = c.part[0] + c.part[1];
  c.groups = groups;
  STD_TORCH_CHECK(groups > 0 && c.channels % groups == 0, op, ": groups do not divide channels");
  c.from[0] = c.image("x", x, c.part[0]);
  c.from[1] = c.image("skip", skip, c.part[1]);
  c.weight = floats(op, "weight", weight, c.channels);
  c.bias = floats(op, "bias", bias, c.channels);
  c.scale = floats(op, "scale", scale, c.batch * c.channels);
  c.shift = floats(op, "shift", shift, c.batch * c.channels);
  return c;
}

const char* at(const void* p, int64_t offset) { return static_cast<const char*>(p) + offset; }
char* at(void* p, int64_t offset) { return static_cast<char*>(p) + offset; }

// Of one group of one image; saved as four floats: a mean and a reciprocal deviation, each with
// what rounding took from it.
struct Statistics {
  float mean, rest, rstd, rstd_rest;

  double scale() const { return static_cast<double>(rstd) + rstd_rest; }

  // From those of n parts of it, of counts[i] elements each.
  static Statistics merge(const double* means, const double* squares, const int64_t* counts,
                          int64_t n, double eps) {
    double total = 0, within = 0, count = 0;
    for (int64_t i = 0; i < n; ++i) {
      total += means[i] * static_cast<double>(counts[i]);
      count += static_cast<double>(counts[i]);
    }
    const double middle = total / count;
    for (int64_t i = 0; i < n; ++i) {
      const double delta = means[i] - middle;
      within += squares[i] + delta * delta * static_cast<double>(counts[i]);
    }
    const double scale = 1 / std::sqrt(within / count + eps);
    const auto mean = static_cast<float>(middle), rstd = static_cast<float>(scale);
    return {mean, static_cast<float>(middle - mean), rstd, static_cast<float>(scale - rstd)};
  }
};

// Vectors (batch, channels) that a tile reads.
struct Vectors {
  int64_t channels;
  std::vector<float> mean, up, offset, slope, constant;

  explicit Vectors(const Call& c) : channels(c.channels) {
    for (auto* v : {&mean, &up, &offset}) v->resize(c.batch * channels);
  }
  // For the channels of a group of an image, once its statistics are known.
  void fill(const Call& call, int64_t image, int64_t group, const Statistics& s) {
    const int64_t D = call.width();
    for (int64_t i = group * D; i < (group + 1) * D; ++i) {
      const int64_t k = image * channels + i;
      const double gain = call.gain(image, i), slope = s.scale() * (call.weight[i] * gain);
      mean[k] = s.mean;
      up[k] = static_cast<float>(slope);
      offset[k] = static_cast<float>(call.bias[i] * gain + (call.shift ? call.shift[k] : 0.f) -
                                     s.rest * slope);
    }
  }
  void attach(GroupNormTile* t, int64_t image, int64_t c) const {
    const int64_t k = image * channels + c;
    t->mean = &mean[k];
    t->up = &up[k];
    t->offset = &offset[k];
    if (!slope.empty()) t->slope = &slope[k], t->constant = &constant[k];
  }
};

// f(i, kept) as for_pieces, with room for so many floats in `kept`: what a piece's first pass
// leaves for its second. Null where that would not stay in a cache.
template <class F>
void for_pieces_keeping(int64_t n, int64_t floats, const F& f) {
  constexpr int64_t most = 1 << 17;
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> kept(0 < floats && floats <= most ? new float[floats] : nullptr);
    for (int64_t i = begin; i < end; ++i) f(i, kept.get());
  });
}

// channels_last: first(image, piece, kept), then between(image) when all pieces of the image are
// there, then second(image, piece, kept). An image is done as a whole, which finds it in the cache
// the second time, where there are enough of them for every thread; `kept` has room for that many
// floats then, and is null otherwise.
template <class First, class Between, class Second>
void for_images(int64_t batch, int64_t pieces, int64_t keep, const First& first,
                const Between& between, const Second& second) {
  const int64_t threads = torch::stable::get_num_threads();
  if (batch % threads == 0 || batch >= 4 * threads) {
    for_pieces_keeping(batch, keep, [&](int64_t image, float* kept) {
      for (int64_t p = 0; p < pieces; ++p) first(image, p, kept);
      between(image);
      for (int64_t p = 0; p < pieces; ++p) second(image, p, kept);
    });
    return;
  }
  for_pieces(batch * pieces, [&](int64_t i) { first(i / pieces, i % pieces, nullptr); });
  for_pieces(batch, between);
  for_pieces(batch * pieces, [&](int64_t i) { second(i / pieces, i % pieces, nullptr); });
}

void forward(const Tensor& x, const MaybeTensor& skip, const Tensor& weight, const Tensor& bias,
             const MaybeTensor& scale, const MaybeTensor& shift, int64_t groups, double eps,
             bool silu, bool channels_last, const Tensor& y, const Tensor& statistics) {
  const Call c = describe(x, skip, weight, bias, scale, shift, groups, channels_last);
  void* y_ = c.result("y", y, c.channels);
  auto* groups_ =
      reinterpret_cast<Statistics*>(floats(op, "statistics", statistics, c.batch * groups * 4));
  if (c.batch * c.pixels == 0) return;
  const auto measure_tile = FASTDIFF_PICK(group_norm_statistics);
  const auto merge = FASTDIFF_PICK(group_norm_merge);
  const auto apply_tile = FASTDIFF_PICK(group_norm_apply);
  const int64_t D = c.width(), C = c.channels;
  Vectors vectors(c);
  // Mean, squares and rest of n channels, behind each other in `own`.
  const auto measure = [&](int64_t image, int64_t channel, int64_t n, int64_t pixel, int64_t run,
                           float* own) {
    c.each_source(channel, n, [&](int source, int64_t begin, int64_t count) {
      GroupNormTile t = c.tile(source, count, run);
      t.x = at(c.from[source], c.in(source, image, begin, pixel));
      t.first = own + (begin - channel);
      t.second = t.first + n;
      t.third = t.second + n;
      measure_tile(t);
    });
  };
  const auto settle = [&](int64_t image, int64_t g, const Statistics& s) {
    groups_[image * groups + g] = s;
    vectors.fill(c, image, g, s);
  };
  const auto apply = [&](int64_t image, int64_t channel, int64_t n, int64_t pixel, int64_t run) {
    c.each_source(channel, n, [&](int source, int64_t begin, int64_t count) {
      GroupNormTile t = c.tile(source, count, run);
      t.silu = silu;
      t.x = at(c.from[source], c.in(source, image, begin, pixel));
      t.y = at(y_, c.out(image, begin, pixel));
      vectors.attach(&t, image, begin);
      apply_tile(t);
    });
  };

  if (!channels_last) {
    for_pieces(c.batch * groups, [&](int64_t i) {
      const int64_t image = i / groups, g = i % groups;
      // The planes of a source lie end to end: a run of them is one.
      std::array<double, 2> means, squares;
      std::array<int64_t, 2> counts;
      int64_t n = 0;
      c.each_source(g * D, D, [&](int source, int64_t begin, int64_t count) {
        float own[3];
        GroupNormTile t = c.tile(source, 1, count * c.pixels);
        t.x = at(c.from[source], c.in(source, image, begin, 0));
        t.first = own, t.second = own + 1, t.third = own + 2;
        measure_tile(t);
        means[n] = static_cast<double>(own[0]) + own[2];
        squares[n] = own[1];
        counts[n++] = count * c.pixels;
      });
      settle(image, g, Statistics::merge(means.data(), squares.data(), counts.data(), n, eps));
      apply(image, g * D, D, 0, c.pixels);
    });
    return;
  }
  const int64_t run = c.piece_pixels(), pieces = c.pieces();
  const auto size = [&](int64_t piece) { return std::min(run, c.pixels - piece * run); };
  std::vector<float> partial(c.batch * pieces * 3 * C);
  const auto measure_piece = [&](int64_t image, int64_t piece, float*) {
    measure(image, 0, C, piece * run, size(piece), &partial[(image * pieces + piece) * 3 * C]);
  };
  const auto settle_image = [&](int64_t image) {
    std::vector<double> means(C), squares(C);
    merge(
        {&partial[image * pieces * 3 * C], pieces, C, run, c.pixels, means.data(), squares.data()});
    const std::vector<int64_t> counts(D, c.pixels);
    for (int64_t g = 0; g < groups; ++g)
      settle(image, g, Statistics::merge(&means[g * D], &squares[g * D], counts.data(), D, eps));
  };
  const auto apply_piece = [&](int64_t image, int64_t piece, float*) {
    apply(image, 0, C, piece * run, size(piece));
  };
  for_images(c.batch, pieces, 0, measure_piece, settle_image, apply_piece);
}

void backward(const Tensor& dy, const Tensor& x, const MaybeTensor& skip, const Tensor& weight,
              const Tensor& bias, const MaybeTensor& scale, const MaybeTensor& shift,
              const Tensor& statistics, int64_t groups, bool silu, bool channels_last,
              const MaybeTensor& dx, const MaybeTensor& dskip, const MaybeTensor& dweight,
              const MaybeTensor& dbias, const MaybeTensor& dscale, const MaybeTensor& dshift) {
  const Call c = describe(x, skip, weight, bias, scale, shift, groups, channels_last);
  const int64_t D = c.width(), C = c.channels;
  const void* dy_ = c.image("dy", dy, C);
  void* to[2] = {c.result("dx", dx, c.part[0]), c.result("dskip", dskip, c.part[1])};
  const auto* groups_ = reinterpret_cast<const Statistics*>(
      floats(op, "statistics", statistics, c.batch * groups * 4));
  float* dweight_ = floats(op, "dweight", dweight, C);
  float* dbias_ = floats(op, "dbias", dbias, C);
  float* dscale_ = floats(op, "dscale", dscale, c.batch * C);
  float* dshift_ = floats(op, "dshift", dshift, c.batch * C);

  Vectors vectors(c);
  vectors.slope.resize(c.batch * C);
  vectors.constant.resize(c.batch * C);
  std::vector<double> first(c.batch * C), second(c.batch * C);  // sums of d, of d * x_hat
  const auto sum_tile = FASTDIFF_PICK(group_norm_sums);
  const auto apply_tile = FASTDIFF_PICK(group_norm_apply_backward);
  // With SiLU the first pass keeps d for the second where it stays in the cache: of a group, or of
  // an image in channels_last. `kept` is null or takes them, in the order of y. Also where no
  // second pass follows: a sum's rounding may not depend on which gradients are wanted.
  const int64_t keep = silu ? (channels_last ? C : D) * c.pixels : 0;
  const auto tile = [&](int source, int64_t image, int64_t begin, int64_t count, int64_t pixel,
                        int64_t run, float* kept) {
    GroupNormTile t = c.tile(source, count, run);
    t.silu = silu;
    t.x = at(c.from[source], c.in(source, image, begin, pixel));
    t.dy = at(dy_, c.out(image, begin, pixel));
    const int64_t origin = c.out(image, channels_last ? 0 : begin / D * D, 0);
    t.d = kept ? kept + (c.out(image, begin, pixel) - origin) / c.bytes : nullptr;
    vectors.attach(&t, image, begin);
    return t;
  };
  // Sums of n channels over a run of pixels, behind each other in `own`.
  const auto add_up = [&](int64_t image, int64_t channel, int64_t n, int64_t pixel, int64_t run,
                          float* own, float* kept) {
    c.each_source(channel, n, [&](int source, int64_t begin, int64_t count) {
      GroupNormTile t = tile(source, image, begin, count, pixel, run, kept);
      t.first = own + (begin - channel);
      t.second = t.first + n;
      sum_tile(t);
    });
  };
  // dx = up * d - rstd * (m1 + x_hat * m2), m1 and m2 the means over the group of g * d and of
  // g * d * x_hat, where g = weight * (1 + scale).
  const auto settle = [&](int64_t image, int64_t g) {
    const Statistics& s = groups_[image * groups + g];
    double m1 = 0, m2 = 0;
    for (int64_t i = g * D; i < (g + 1) * D; ++i) {
      const int64_t k = image * C + i;
      second[k] = s.scale() * (second[k] - s.rest * first[k]);
      const double gain = c.weight[i] * c.gain(image, i);
      m1 += gain * first[k];
      m2 += gain * second[k];
    }
    const double share = s.scale() / static_cast<double>(D * c.pixels);
    const double slope = share * s.scale() * m2;
    for (int64_t k = image * C + g * D; k < image * C + (g + 1) * D; ++k) {
      vectors.slope[k] = static_cast<float>(slope);
      vectors.constant[k] = static_cast<float>(share * m1 - slope * s.rest);
    }
  };
  const auto apply = [&](int64_t image, int64_t channel, int64_t n, int64_t pixel, int64_t run,
                         float* kept) {
    c.each_source(channel, n, [&](int source, int64_t begin, int64_t count) {
      if (!to[source]) return;
      GroupNormTile t = tile(source, image, begin, count, pixel, run, kept);
      t.dx = at(to[source], c.in(source, image, begin, pixel));
      apply_tile(t);
    });
  };

  for (int64_t i = 0; c.pixels && i < c.batch * groups; ++i)
    vectors.fill(c, i / groups, i % groups, groups_[i]);
  if (c.batch * c.pixels == 0) {
    // no pixels, no sums: all gradients are 0
  } else if (!channels_last) {
    for_pieces_keeping(c.batch * groups, keep, [&](int64_t i, float* kept) {
      const int64_t image = i / groups, g = i % groups;
      std::vector<float> own(2 * D);
      add_up(image, g * D, D, 0, c.pixels, own.data(), kept);
      for (int64_t k = 0; k < D; ++k) {
        first[image * C + g * D + k] = own[k];
        second[image * C + g * D + k] = own[D + k];
      }
      settle(image, g);
      apply(image, g * D, D, 0, c.pixels, kept);
    });
  } else {
    const int64_t run = c.piece_pixels(), pieces = c.pieces();
    const auto size = [&](int64_t piece) { return std::min(run, c.pixels - piece * run); };
    std::vector<float> partial(c.batch * pieces * 2 * C);
    const auto add_up_piece = [&](int64_t image, int64_t piece, float* kept) {
      float* own = &partial[(image * pieces + piece) * 2 * C];
      add_up(image, 0, C, piece * run, size(piece), own, kept);
    };
    const auto settle_image = [&](int64_t image) {
      const float* own = &partial[image * pieces * 2 * C];
      for (int64_t p = 0; p < pieces; ++p, own += 2 * C)
        for (int64_t k = 0; k < C; ++k) {
          first[image * C + k] += own[k];
          second[image * C + k] += own[C + k];
        }
      for (int64_t g = 0; g < groups; ++g) settle(image, g);
    };
    const auto apply_piece = [&](int64_t image, int64_t piece, float* kept) {
      if (to[0] || to[1]) apply(image, 0, C, piece * run, size(piece), kept);
    };
    for_images(c.batch, pieces, keep, add_up_piece, settle_image, apply_piece);
  }

  for (int64_t i = 0; i < C; ++i) {
    double w = 0, b = 0;
    for (int64_t image = 0; image < c.batch; ++image) {
      const int64_t k = image * C + i;
      w += c.gain(image, i) * second[k];
      b += c.gain(image, i) * first[k];
      if (dscale_) dscale_[k] = static_cast<float>(c.weight[i] * second[k] + c.bias[i] * first[k]);
      if (dshift_) dshift_[k] = static_cast<float>(first[k]);
    }
    if (dweight_) dweight_[i] = static_cast<float>(w);
    if (dbias_) dbias_[i] = static_cast<float>(b);
  }
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_native, m) {
  m.def(
      "group_norm_forward(Tensor x, Tensor? skip, Tensor weight, Tensor bias, Tensor? scale, "
      "Tensor? shift, int groups, float eps, bool silu, bool channels_last, Tensor(a!) y, "
      "Tensor(b!) statistics) -> ()");
  m.def(
      "group_norm_backward(Tensor dy, Tensor x, Tensor? skip, Tensor weight, Tensor bias, "
      "Tensor? scale, Tensor? shift, Tensor statistics, int groups, bool silu, "
      "bool channels_last, Tensor(a!)? dx, Tensor(b!)? dskip, Tensor(c!)? dweight, "
      "Tensor(d!)? dbias, Tensor(e!)? dscale, Tensor(f!)? dshift) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff_native, CPU, m) {
  m.impl("group_norm_forward", TORCH_BOX(&fastdiff::forward));
  m.impl("group_norm_backward", TORCH_BOX(&fastdiff::backward));
}
#endif
