// y = W x + bias for one x and a dense W, row by row. Where a token meets a small layer, torch's product wakes all threads for
// microseconds of work; this one wakes them when there is something to do.
#include "zoo/export.hpp"
#include "zoo/parallel.hpp"
#include "zoo/rows.hpp"

namespace zoo {
namespace {

constexpr int64_t kRows = 4;  // taken together: as many streams of the memory are open, and a vector of x is loaded once

// y[r] = bias[r] + row r of W times x, for R rows; the order of sums does not depend on R.
template <int R, class T>
ZOO_INLINE void multiply(const T* w, int64_t cols, const float* x, const float* bias, float* y) {
  vf sums[R][2];
  for (int r = 0; r < R; ++r) sums[r][0] = zero(), sums[r][1] = zero();
  int64_t k = 0;
  for (; k + 2 * kLanes <= cols; k += 2 * kLanes) {
    const vf one = load(x + k), other = load(x + k + kLanes);
    for (int r = 0; r < R; ++r) {
      sums[r][0] = fma(load(w + r * cols + k), one, sums[r][0]);
      sums[r][1] = fma(load(w + r * cols + k + kLanes), other, sums[r][1]);
    }
  }
  for (int r = 0; r < R; ++r) {
    float total = sum(add(sums[r][0], sums[r][1]));
    for (int64_t i = k; i < cols; ++i) total += to_float(w[r * cols + i]) * x[i];
    y[r] = total + (bias != nullptr ? bias[r] : 0.0f);
  }
}

template <class T>
void multiply_some(const T* w, int64_t cols, const float* x, const float* bias, float* y, int64_t from, int64_t to) {
  const auto bias_of = [&](int64_t row) { return bias != nullptr ? bias + row : nullptr; };
  int64_t row = from;
  for (; row + kRows <= to; row += kRows) multiply<kRows>(w + row * cols, cols, x, bias_of(row), y + row);
  for (; row < to; ++row) multiply<1>(w + row * cols, cols, x, bias_of(row), y + row);
}

}  // namespace

void multiply_dense(const DenseRows* products, int64_t count, int64_t threads) {
  int64_t rows = 0, steps = 0;
  for (int64_t i = 0; i < count; ++i) rows += products[i].rows, steps += products[i].rows * products[i].cols / kLanes;
  parallel_for(rows, worthwhile(threads, steps), [&](int64_t from, int64_t to) {
    for (const DenseRows* p = products; p != products + count; from -= p->rows, to -= p->rows, ++p) {
      const int64_t first = std::max<int64_t>(from, 0), last = std::min(to, p->rows);
      if (first < last)
        with_type(p->type, [&](auto kind) {
          multiply_some(static_cast<const decltype(kind)*>(p->values), p->cols, p->x, p->bias, p->y, first, last);
        });
    }
  });
}

}  // namespace zoo

// x [cols], y [rows] and bias [rows] (or null) float; weight [rows, cols] of a value type.
ZOO_EXPORT int64_t zoo_dense_row(const float* x, const void* weight, const float* bias, float* y, int64_t rows, int64_t cols,
                                 int64_t type, int64_t threads) try {
  const zoo::DenseRows product{x, weight, bias, y, rows, cols, type};
  zoo::multiply_dense(&product, 1, threads);
  return zoo::kOk;
} ZOO_CATCH
