// y = sum over i with g[i] != 0 of g[i] (U[i] x) D[i]: the two products of a gated feed-forward block behind its gate,
// for a batch of 1, 2, 4 or 8. U [hidden, in] and D [hidden, out] are stored row by row, so that a hidden channel whose
// gate is zero costs nothing: neither of its rows is read. A row is dense (float, bf16, f16) or packed by mask bits.
//
// One sweep over the active channels serves both products: while the rows of U are multiplied, those of D are on their
// way from memory, and the other way round. The channels are cut into a number of parts that does not depend on the
// threads; each part sums into its own copy of y, and the copies are added in order.
#include "zoo/check.hpp"
#include "zoo/export.hpp"
#include "zoo/packed.hpp"
#include "zoo/parallel.hpp"

namespace zoo {
namespace {

constexpr int64_t kParts = 16;
constexpr int64_t kLine = 64;  // bytes of a cache line

// Fetches a run of bytes little by little, so that the requests do not stand in each other's way.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;
  int64_t each = 0;  // bytes per step

  Ahead() = default;
  Ahead(const void* from, int64_t bytes, int64_t steps)
      : at(static_cast<const char*>(from)), end(at + bytes), each((bytes / steps + kLine) / kLine * kLine) {}
  ZOO_INLINE void step() {
    for (int64_t i = 0; i < each && at < end; i += kLine, at += kLine) __builtin_prefetch(at, 0, 2);
  }
};

// A matrix of dense rows; `cols` is padded to a multiple of 16 values.
template <class T>
struct DenseSource {
  const T* data;
  int64_t cols;
  static constexpr int kRows = 4;  // rows taken together: several streams of the memory are open

  void check(const int32_t*, int64_t) const {}  // there is no index

  // sums[r][b] = row rows[r] times x[b], where xs holds the vectors of the batch side by side, kLanes values of each.
  // Meanwhile the rows of `next` that have the same numbers are fetched.
  template <int R, int B, class Next>
  ZOO_INLINE void dot(const int32_t* rows, const float* xs, const Next& next, float (*sums)[B]) const {
    const T* row[R];
    for (int r = 0; r < R; ++r) row[r] = data + rows[r] * cols;
    vf acc[R][B];
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) acc[r][b] = zero();
    for (int64_t k = 0; k < cols; k += kLanes) {
      for (int r = 0; r < R; ++r) {
        const vf values = load(row[r] + k);
        next.prefetch(rows[r], k);
        for (int b = 0; b < B; ++b) acc[r][b] = fma(values, load(xs + k * B + b * kLanes), acc[r][b]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) sums[r][b] = sum(acc[r][b]);
  }

  // y[b] += sum over r of factors[r][b] * row rows[r]. Meanwhile the rows upcoming[r] of `next` are fetched.
  template <int R, int B, class Next>
  ZOO_INLINE void add_rows(const int32_t* rows, const float (*factors)[B], const Next& next, const int32_t* upcoming,
                           float* y, int64_t ldy) const {
    const T* row[R];
    vf factor[R][B];
    for (int r = 0; r < R; ++r) {
      row[r] = data + rows[r] * cols;
      for (int b = 0; b < B; ++b) factor[r][b] = splat(factors[r][b]);
    }
    for (int64_t k = 0; k < cols; k += kLanes) {
      vf values[R];
      for (int r = 0; r < R; ++r) {
        values[r] = load(row[r] + k);
        next.prefetch(upcoming[r], k);
      }
      for (int b = 0; b < B; ++b) {
        vf total = load(y + b * ldy + k);
        for (int r = 0; r < R; ++r) total = fma(factor[r][b], values[r], total);
        store(y + b * ldy + k, total);
      }
    }
  }

  // Asks for the cache line that holds value k of a row, once per line.
  ZOO_INLINE void prefetch(int64_t number, int64_t k) const {
    if (k < cols && k * static_cast<int64_t>(sizeof(T)) % kLine == 0) __builtin_prefetch(data + number * cols + k, 0, 2);
  }
};

// A matrix whose kept values are packed behind mask bits, in panels of columns (see packed.hpp).
template <class T>
struct BitSource {
  Packed<T> w;
  int64_t cols;  // padded to a multiple of 16
  int64_t entries;
  static constexpr int kRows = 1;

  void check(const int32_t* rows, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) check_rows(w, kBitmask, entries, rows[i], rows[i] + 1);
  }

  // visit(k, expanded, chain) for each kLanes columns of a row, chain = 0, 1, 2, 3, 0, ...
  template <class Visit>
  ZOO_INLINE void walk(int64_t number, const BitSource& next, int64_t upcoming, Visit&& visit) const {
    for (int64_t p = 0; p < w.panels(); ++p) {
      const int64_t segment = p * w.rows + number, first = p * w.panel;
      const int64_t columns = std::min(w.panel, w.cols - first);
      Ahead ahead = next.ahead(p, upcoming, (columns + 63) / 64);
      const T* values = w.values + w.pointer[segment];
      const uint8_t* bits = static_cast<const uint8_t*>(w.index) + segment * (w.panel / 8);
      constexpr int kSteps = 32 / kLanes;  // of a word of mask bits
      const auto step = [&](int64_t k, uint32_t key, int chain) {
        visit(first + k, expand(key, values), chain);
        values += __builtin_popcount(key);
      };
      uint32_t words[2];
      int64_t k = 0;
      for (; k + 64 <= columns; k += 64) {
        std::memcpy(words, bits + k / 8, 8);
        ahead.step();
#pragma GCC unroll 8
        for (int s = 0; s < 2 * kSteps; ++s)
          step(k + s * kLanes, key_at<T>(words[s / kSteps], s % kSteps), s % 4);
      }
      if (k < columns) std::memcpy(words, bits + k / 8, 8);
      for (int s = 0; k < columns; k += kLanes, ++s) step(k, key_at<T>(words[s / kSteps], s % kSteps), 0);
    }
  }

  template <int R, int B, class Next>
  ZOO_INLINE void dot(const int32_t* rows, const float* xs, const Next& next, float (*sums)[B]) const {
    constexpr int kChains = B >= 4 ? 1 : 4 / B;  // enough independent sums to hide the latency of fma
    for (int r = 0; r < R; ++r) {
      vf acc[kChains][B];
      for (int c = 0; c < kChains; ++c)
        for (int b = 0; b < B; ++b) acc[c][b] = zero();
      walk(rows[r], next, rows[r], [&](int64_t k, vf values, int chain) __attribute__((always_inline)) {
        for (int b = 0; b < B; ++b) {
          vf& total = acc[chain % kChains][b];
          total = fma(values, load(xs + k * B + b * kLanes), total);
        }
      });
      for (int b = 0; b < B; ++b) {
        vf total = acc[0][b];
        for (int c = 1; c < kChains; ++c) total = add(total, acc[c][b]);
        sums[r][b] = sum(total);
      }
    }
  }

  template <int R, int B, class Next>
  ZOO_INLINE void add_rows(const int32_t* rows, const float (*factors)[B], const Next& next, const int32_t* upcoming,
                           float* y, int64_t ldy) const {
    for (int r = 0; r < R; ++r) {
      vf factor[B];
      for (int b = 0; b < B; ++b) factor[b] = splat(factors[r][b]);
      walk(rows[r], next, upcoming[r], [&](int64_t k, vf values, int) __attribute__((always_inline)) {
        for (int b = 0; b < B; ++b) store(y + b * ldy + k, fma(factor[b], values, load(y + b * ldy + k)));
      });
    }
  }

  // The kept values of a row in panel p, to be fetched in `steps` steps; their mask bits are fetched at once.
  ZOO_INLINE Ahead ahead(int64_t p, int64_t number, int64_t steps) const {
    if (p >= w.panels()) return {};
    const int64_t segment = p * w.rows + number;
    const uint8_t* bits = static_cast<const uint8_t*>(w.index) + segment * (w.panel / 8);
    for (int64_t i = 0; i < w.panel / 8; i += kLine) __builtin_prefetch(bits + i, 0, 2);
    const int64_t first = w.pointer[segment], count = w.pointer[segment + 1] - first;
    return {w.values + first, count * static_cast<int64_t>(sizeof(T)), steps};
  }
};

struct Problem {
  const int32_t* active;  // the channels whose gate is not zero in some row of the batch
  const float* gates;     // [count, batch]
  const float* bias;      // of U, or null
  int64_t count;
  const float* xs;
  float* y;  // [parts, batch, ldy], zero
  int64_t ldy;
};

template <int R, int B, class Source>
ZOO_INLINE void channels(const Source& up, const Source& down, const Problem& p, int64_t i, int64_t end, float* y) {
  float h[R][B];
  up.template dot<R, B>(p.active + i, p.xs, down, h);
  int32_t upcoming[R];
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) {
      const float gate = p.gates[(i + r) * B + b];
      // A row of the batch in which this gate is zero must not see an infinite product.
      h[r][b] = gate == 0.0f ? 0.0f : gate * (h[r][b] + (p.bias != nullptr ? p.bias[p.active[i + r]] : 0.0f));
    }
    upcoming[r] = p.active[std::min(i + R + r, end - 1)];
  }
  down.template add_rows<R, B>(p.active + i, h, up, upcoming, y, p.ldy);
}

template <int B, class Source>
void run(const Source& up, const Source& down, const Problem& p, int64_t parts, int64_t threads) {
  constexpr int kRows = B <= 2 ? Source::kRows : 1;
  parallel_for(parts, threads, [&](int64_t from, int64_t to) {
    const int64_t first = p.count * from / parts, last = p.count * to / parts;
    for (const Source* each : {&up, &down}) each->check(p.active + first, last - first);
    for (int64_t part = from; part < to; ++part) {
      float* y = p.y + part * B * p.ldy;
      int64_t i = p.count * part / parts;
      const int64_t end = p.count * (part + 1) / parts;
      for (; i + kRows <= end; i += kRows) channels<kRows, B>(up, down, p, i, end, y);
      for (; i < end; ++i) channels<1, B>(up, down, p, i, end, y);
    }
  });
}

template <class Source>
void run_batch(int64_t batch, const Source& up, const Source& down, const Problem& p, int64_t parts, int64_t threads) {
  switch (batch) {
    case 1: return run<1>(up, down, p, parts, threads);
    case 2: return run<2>(up, down, p, parts, threads);
    case 4: return run<4>(up, down, p, parts, threads);
    default: return run<8>(up, down, p, parts, threads);
  }
}

}  // namespace
}  // namespace zoo

// x [batch, in] and g [batch, hidden] float; batch is 1, 2, 4 or 8. U [hidden, up_stride] and D [hidden, down_stride] of
// `type`: with null bits dense, their rows padded to a multiple of 16 values; else packed by mask bits in panels of
// `panel` columns, of which in and out count. bias [hidden] or null. y [batch, down_stride] is written.
ZOO_EXPORT int64_t zoo_gated_product(const float* x, const float* g, const void* up, const void* up_bits,
                                  const int32_t* up_pointer, const float* bias, const void* down, const void* down_bits,
                                  const int32_t* down_pointer, float* y, int64_t batch, int64_t in, int64_t hidden,
                                  int64_t out, int64_t up_stride, int64_t down_stride, int64_t panel,
                                     int64_t up_entries, int64_t down_entries, int64_t type, int64_t threads) try {
  using zoo::kLanes;
  auto* active = zoo::scratch_of<int32_t>(hidden, 0);
  auto* gates = zoo::scratch_of<float>(hidden * batch + up_stride * batch, 1);
  int64_t count = 0;
  for (int64_t i = 0; i < hidden; ++i) {
    bool any = false;
    for (int64_t b = 0; b < batch; ++b) {
      gates[count * batch + b] = g[b * hidden + i];
      any |= !(g[b * hidden + i] == 0.0f);
    }
    active[count] = static_cast<int32_t>(i);
    count += any;
  }
  float* xs = gates + hidden * batch;
  for (int64_t k = 0; k < up_stride; k += kLanes)
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < kLanes; ++i)
        xs[k * batch + b * kLanes + i] = k + i < in ? x[b * in + k + i] : 0;
  const int64_t parts = std::max<int64_t>(1, std::min(zoo::kParts, count / 16)), size = batch * down_stride;
  auto* sums = zoo::scratch_of<float>(parts * size, 2);
  std::fill(sums, sums + parts * size, 0.0f);
  threads = zoo::worthwhile(threads, count * (up_stride + down_stride));
  const zoo::Problem problem{active, gates, bias, count, xs, sums, down_stride};
  zoo::with_type(type, [&](auto tag) {
    using T = decltype(tag);
    if (up_bits == nullptr) {
      zoo::run_batch(batch, zoo::DenseSource<T>{static_cast<const T*>(up), up_stride},
                     zoo::DenseSource<T>{static_cast<const T*>(down), down_stride}, problem, parts, threads);
    } else {
      const zoo::Packed<T> u{static_cast<const T*>(up), up_bits, up_pointer, hidden, in, panel, 1};
      const zoo::Packed<T> d{static_cast<const T*>(down), down_bits, down_pointer, hidden, out, panel, 1};
      zoo::run_batch(batch, zoo::BitSource<T>{u, up_stride, up_entries},
                     zoo::BitSource<T>{d, down_stride, down_entries}, problem, parts,
                     threads);
    }
  });
  for (int64_t k = 0; k < size; ++k) {
    float total = sums[k];
    for (int64_t part = 1; part < parts; ++part) total += sums[part * size + k];
    y[k] = total;
  }
  return zoo::kOk;
} ZOO_CATCH
