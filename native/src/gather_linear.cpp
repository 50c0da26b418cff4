// Products that skip whole rows of a dense weight, for a batch of 1, 2, 4 or 8:
//   input-sparse:  y = x W^T where few columns of x are not zero; W^T is stored input-major [in, out], and the rows of
//                  the inactive inputs are not read;
//   output-sparse: y = x W^T at some outputs only; W is stored output-major [out, in].
// Values are float, bf16, f16, or int8 / int4 with an f16 scale per `group` consecutive stored values. The stored rows
// are padded to `stride` values, a multiple of 16 and of the group.
#include <type_traits>

#include "zoo/export.hpp"
#include "zoo/parallel.hpp"
#include "zoo/simd.hpp"

namespace zoo {
namespace {

constexpr int kMostBatch = 8;
constexpr int64_t kChunk = 2048;  // outputs whose sums stay in the first-level cache
constexpr int kRowsAtOnce = 4;    // active rows per pass over a chunk: one load and store of a sum per four products

enum Kind : int64_t { kF32 = 0, kBF16 = 1, kF16 = 2, kInt8 = 3, kInt4 = 4 };

// Stored rows: where one begins, and the scale of the `block` values at i (1 for the float kinds).
template <class T>
struct Rows {
  const T* data;
  int64_t stride, block;
  const f16* scales;
  static constexpr int64_t kPerItem = std::is_same_v<T, int4> ? 2 : 1;

  ZOO_INLINE const T* row(int64_t number) const { return data + number * stride / kPerItem; }
  ZOO_INLINE float scale(int64_t number, int64_t i) const {
    return scales == nullptr ? 1.0f : to_float(scales[(number * stride + i) / block]);
  }
};

// visit(rows) with the accessor of a kind of storage.
template <class Visit>
void with_rows(int64_t kind, const void* data, const void* scales, int64_t stride, int64_t group, Visit&& visit) {
  const auto* s = static_cast<const f16*>(scales);
  switch (kind) {
    case kF32: return visit(Rows<float>{static_cast<const float*>(data), stride, stride, nullptr});
    case kBF16: return visit(Rows<bf16>{static_cast<const bf16*>(data), stride, stride, nullptr});
    case kF16: return visit(Rows<f16>{static_cast<const f16*>(data), stride, stride, nullptr});
    case kInt8: return visit(Rows<int8_t>{static_cast<const int8_t*>(data), stride, group, s});
    default: return visit(Rows<int4>{static_cast<const int4*>(data), stride, group, s});
  }
}

// y[b, from..to) += sum over R active rows of factor[r][b] * row. R streams of the memory are open at a time, which
// brings more than one stream does, and more than asking for the rows that follow.
template <int R, int B, class Source>
ZOO_INLINE void add_rows(const Source& w, const int32_t* active, const float* factors, float* y,
                         int64_t ldy, int64_t from, int64_t to) {
  decltype(w.row(0)) row[R];
  for (int r = 0; r < R; ++r) row[r] = w.row(active[r]);
  for (int64_t start = from; start < to;) {
    const int64_t end = std::min(to, (start / w.block + 1) * w.block);
    vf factor[R][B];
    for (int r = 0; r < R; ++r) {
      const float scale = w.scale(active[r], start);
      for (int b = 0; b < B; ++b) factor[r][b] = splat(factors[r * B + b] * scale);
    }
    for (int64_t n = start; n < end; n += kLanes) {
      vf values[R];
      for (int r = 0; r < R; ++r) values[r] = load(row[r] + n / w.kPerItem);
      for (int b = 0; b < B; ++b) {
        vf sum = load(y + b * ldy + n);
        for (int r = 0; r < R; ++r) sum = fma(factor[r][b], values[r], sum);
        store(y + b * ldy + n, sum);
      }
    }
    start = end;
  }
}

template <int B, class Source>
void input_sparse(const Source& w, const int32_t* active, const float* factors, int64_t count, float* y, int64_t ldy,
                  int64_t begin, int64_t end) {
  for (int64_t from = begin; from < end; from += kChunk) {
    const int64_t to = std::min(from + kChunk, end);
    int64_t i = 0;
    for (; i + kRowsAtOnce <= count; i += kRowsAtOnce)
      add_rows<kRowsAtOnce, B>(w, active + i, factors + i * B, y, ldy, from, to);
    for (; i < count; ++i) add_rows<1, B>(w, active + i, factors + i * B, y, ldy, from, to);
  }
}

// y[b, active[0..R)] += row * x: R rows at a time, so that several streams of the memory are open. xs holds the rows of
// x chunk by chunk, kLanes values of each.
template <int R, int B, class Source>
ZOO_INLINE void dot_rows(const Source& w, const int32_t* active, const float* xs, float* y, int64_t ldy) {
  decltype(w.row(0)) row[R];
  for (int r = 0; r < R; ++r) row[r] = w.row(active[r]);
  vf acc[R][B];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) acc[r][b] = zero();
  for (int64_t start = 0; start < w.stride; start += w.block) {
    vf scale[R];
    for (int r = 0; r < R; ++r) scale[r] = splat(w.scale(active[r], start));
    for (int64_t k = start; k < start + w.block; k += kLanes)
      for (int r = 0; r < R; ++r) {
        vf values = load(row[r] + k / w.kPerItem);
        if (w.scales != nullptr) values = mul(values, scale[r]);
        for (int b = 0; b < B; ++b) acc[r][b] = fma(values, load(xs + k * B + b * kLanes), acc[r][b]);
      }
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) y[b * ldy + active[r]] += sum(acc[r][b]);
}

template <int B, class Source>
void output_sparse(const Source& w, const int32_t* active, int64_t begin, int64_t end, const float* xs, float* y,
                   int64_t ldy) {
  constexpr int kRows = B >= 4 ? 1 : 4;
  int64_t i = begin;
  for (; i + kRows <= end; i += kRows) dot_rows<kRows, B>(w, active + i, xs, y, ldy);
  for (; i < end; ++i) dot_rows<1, B>(w, active + i, xs, y, ldy);
}

// Calls body(std::integral_constant<int, batch>).
template <class Body>
void with_batch(int64_t batch, Body&& body) {
  switch (batch) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 4: return body(std::integral_constant<int, 4>{});
    default: return body(std::integral_constant<int, kMostBatch>{});
  }
}

}  // namespace
}  // namespace zoo

// x [batch, inputs] float; y [batch, stride] float, holding the bias or zeros, is added to. batch is 1, 2, 4 or 8. An input
// is active where any row of x is not zero there; finding them is part of this call.
ZOO_EXPORT int64_t zoo_gather_linear_input(const float* x, const void* weight, const void* scales, float* y, int64_t batch,
                                        int64_t inputs, int64_t stride, int64_t kind, int64_t group, int64_t threads) try {
  auto* active = zoo::scratch_of<int32_t>(inputs + 1, 0);
  auto* factors = zoo::scratch_of<float>((inputs + 1) * batch, 1);
  zoo::with_rows(kind, weight, scales, stride, group, [&](const auto& rows) {
    zoo::with_batch(batch, [&](auto b) {
      constexpr int B = decltype(b)::value;
      int64_t count = 0;
      for (int64_t k = 0; k < inputs; ++k) {  // each is written, and kept by counting it: no branch to guess
        bool any = false;
        for (int i = 0; i < B; ++i) {
          const float value = x[i * inputs + k];
          factors[count * B + i] = value;
          any |= !(value == 0.0f);
        }
        active[count] = static_cast<int32_t>(k);
        count += any;
      }
      zoo::parallel_for(stride / 16, zoo::worthwhile(threads, count * stride), [&](int64_t begin, int64_t end) {
        zoo::input_sparse<B>(rows, active, factors, count, y, stride, 16 * begin, 16 * end);
      });
    });
  });
  return zoo::kOk;
} ZOO_CATCH

// x [batch, inputs] float; y [batch, outputs] float, holding the bias or zeros, is added to at the outputs that any row
// of `wanted` [batch, outputs] marks. batch is 1, 2, 4 or 8; stride >= inputs.
ZOO_EXPORT int64_t zoo_gather_linear_output(const float* x, const void* weight, const void* scales, const uint8_t* wanted,
                                         float* y, int64_t batch, int64_t inputs, int64_t outputs, int64_t stride,
                                         int64_t kind, int64_t group, int64_t threads) try {
  using zoo::kLanes;
  auto* xs = zoo::scratch_of<float>(stride * batch, 0);
  auto* active = zoo::scratch_of<int32_t>(outputs + 1, 1);
  zoo::with_rows(kind, weight, scales, stride, group, [&](const auto& rows) {
    zoo::with_batch(batch, [&](auto b) {
      constexpr int B = decltype(b)::value;
      for (int64_t k = 0; k < stride; k += kLanes)
        for (int i = 0; i < B; ++i) {
          const float* from = x + i * inputs + k;
          for (int64_t lane = 0; lane < kLanes; ++lane)
            xs[k * B + i * kLanes + lane] = k + lane < inputs ? from[lane] : 0;
        }
      int64_t count = 0;
      for (int64_t row = 0; row < outputs; ++row) {
        uint8_t any = 0;
        for (int i = 0; i < B; ++i) any |= wanted[i * outputs + row];
        active[count] = static_cast<int32_t>(row);
        count += any != 0;
      }
      zoo::parallel_for(count, zoo::worthwhile(threads, count * stride), [&](int64_t begin, int64_t end) {
        zoo::output_sparse<B>(rows, active, begin, end, xs, y, outputs);
      });
    });
  });
  return zoo::kOk;
} ZOO_CATCH
