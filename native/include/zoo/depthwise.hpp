// Depthwise convolution of one channel's map, which depthwise_conv and separable_conv share.
//
// A map is first copied with its border of zeros, its columns dealt out by their remainder modulo the stride; the taps of a
// row of results are then plain vector loads for every stride, and the copy (a map or less) stays in a near cache.
#pragma once

#include <algorithm>
#include <type_traits>

#include "zoo/activation.hpp"
#include "zoo/lanes.hpp"

namespace zoo {
namespace depthwise {

using Vec = Lanes<float>::Vec;
constexpr int64_t kLanes = Lanes<float>::kCount;

struct Shape {
  int64_t height, width, out_height, out_width, kernel, stride, padding;
  int64_t first = 0;  // of the rows of results, of which out_height are computed

  int64_t padded_height() const { return (out_height - 1) * stride + kernel; }
  // The rows of x that results meet.
  int64_t begin() const { return std::max<int64_t>(0, first * stride - padding); }
  int64_t end() const { return std::min(height, first * stride - padding + padded_height()); }
  // Columns of one remainder that a row of results reads, and what its last vector reads beyond.
  int64_t phase_width() const { return out_width + (kernel - 1) / stride + kLanes; }
  int64_t row() const { return stride * phase_width(); }
};

// to[n] = from[n] for n < count.
inline void copy_row(const float* from, int64_t count, float* to) {
  if (count < kLanes) {
    for (int64_t n = 0; n < count; ++n) to[n] = from[n];
    return;
  }
  for (int64_t n = 0; n + kLanes < count; n += kLanes) store_vec(to + n, load_vec(from + n));
  store_vec(to + count - kLanes, load_vec(from + count - kLanes));
}

// Every second lane of a, then of b, from lane kFirst on.
template <int kFirst>
inline Vec every_second(Vec a, Vec b) {
  constexpr int f = kFirst;
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, f, f + 2, f + 4, f + 6, f + 8, f + 10, f + 12, f + 14, f + 16, f + 18, f + 20,
                                 f + 22, f + 24, f + 26, f + 28, f + 30);
#else
  return __builtin_shufflevector(a, b, f, f + 2, f + 4, f + 6, f + 8, f + 10, f + 12, f + 14);
#endif
}

// even[n] = from[2 * n], odd[n] = from[2 * n + 1] for n < count, which is kLanes or more.
inline void halve_row(const float* from, int64_t count, float* even, float* odd) {
  for (int64_t n = 0;; n = std::min(n + kLanes, count - kLanes)) {
    const Vec a = load_vec(from + 2 * n), b = load_vec(from + 2 * n + kLanes);
    store_vec(even + n, every_second<0>(a, b));
    store_vec(odd + n, every_second<1>(a, b));
    if (n + kLanes >= count) return;
  }
}

// padded[i, p, j] = x[first * stride + i - padding, j * stride + p - padding] inside of x, whose rows from begin() on are
// given; what is outside is left alone, and so stays zero from map to map. S: the stride, 0 where it is not known here.
template <int S>
void deal(const Shape& s, const float* x, float* padded) {
  const int64_t stride = S > 0 ? S : s.stride, phase_width = s.phase_width();
  const int64_t begin = s.begin(), end = s.end(), offset = s.padding - s.first * stride;
  const bool halves = S == 2 && s.width % 2 == 0 && s.width >= 2 * kLanes &&
                      (s.padding + 1) / 2 + s.width / 2 <= phase_width;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = row + offset;
    const float* const from = x + (row - begin) * s.width;
    float* const line = padded + i * stride * phase_width;
    if (halves) {
      float* const places[] = {line + s.padding % 2 * phase_width + s.padding / 2,
                               line + (s.padding + 1) % 2 * phase_width + (s.padding + 1) / 2};
      halve_row(from, s.width / 2, places[0], places[1]);
      continue;
    }
    for (int64_t p = 0; p < stride; ++p) {
      // the first j with j * stride + p >= padding, and how many columns there are from there
      const int64_t first = (std::max<int64_t>(s.padding - p, 0) + stride - 1) / stride;
      const int64_t column = first * stride + p - s.padding;
      const int64_t there = column < s.width ? (s.width - column + stride - 1) / stride : 0;
      const int64_t count = std::min(there, phase_width - first);
      float* const to = line + p * phase_width + first;
      if constexpr (S == 1) copy_row(from + column, count, to);
      else
        for (int64_t n = 0; n < count; ++n) to[n] = from[column + n * stride];
    }
  }
}

inline Vec act(Vec sum, int64_t activation) {
  if (activation != kNone) sum = sum < Vec{} ? Vec{} : sum;  // a NaN stays
  if (activation == kRelu6) sum = sum > splat_vec(6.0f) ? splat_vec(6.0f) : sum;
  return sum;
}

// Stores a vector of a row of results of which `room` are left in the map: what runs over the end of the row is written
// again with the next one.
inline void put(float* to, Vec sum, int64_t width, int64_t room) {
  if (room >= kLanes) {
    store_vec(to, sum);
  } else {
    float last[kLanes];
    store_vec(last, sum);
    std::copy_n(last, std::min(kLanes, width), to);
  }
}

// kRows rows of results of a kernel of 3 x 3 with stride S; more than one have stride 1 and share the loads of x.
template <int kRows, int S>
inline __attribute__((always_inline)) void rows_of_three(const float* rows, int64_t row_width, int64_t phase_width,
                                                         const Vec* held, Vec bias, int64_t activation,
                                                         int64_t out_width, float* y, int64_t room) {
  // The last vector of a row is moved back to end with it: the next row may be there already.
  for (int64_t next = 0; next < out_width; next += kLanes) {
    const int64_t column = std::max<int64_t>(0, std::min(next, out_width - kLanes));
    Vec sums[kRows][2];  // of even and of odd taps, so that one sum need not wait for the other
    for (auto& sum : sums) sum[0] = bias, sum[1] = Vec{};
#pragma GCC unroll 4
    for (int a = 0; a < kRows + 2; ++a)
#pragma GCC unroll 3
      for (int b = 0; b < 3; ++b) {
        const Vec x = load_vec(rows + a * row_width + b % S * phase_width + b / S + column);
        for (int r = std::max(0, a - 2); r <= std::min(a, kRows - 1); ++r)
          sums[r][((a - r) * 3 + b) % 2] += held[(a - r) * 3 + b] * x;
      }
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = r * out_width + column;
      put(y + at, act(sums[r][0] + sums[r][1], activation), out_width - column, room - at);
    }
  }
}

// K: the kernel's size, S: the stride; 0 where they are not known here. With both known, a kernel of 3 stays in
// registers for the whole map.
template <int K, int S>
void convolve_map(const Shape& s, const float* padded, const float* weight, float bias, int64_t activation, float* y) {
  const int64_t phase_width = s.phase_width(), row_width = s.row(), out_width = s.out_width;
  const int64_t results = s.out_height * out_width;
  int64_t i = 0;
  if constexpr (K == 3) {
    Vec held[9];
    for (int64_t k = 0; k < 9; ++k) held[k] = splat_vec(weight[k]);
    const auto rows = [&](auto count) {
      constexpr int kRows = decltype(count)::value;
      for (; i + kRows <= s.out_height; i += kRows)
        rows_of_three<kRows, S>(padded + i * S * row_width, row_width, phase_width, held, splat_vec(bias), activation,
                                out_width, y + i * out_width, results - i * out_width);
    };
    if constexpr (S == 1) rows(std::integral_constant<int, 2>{});
    rows(std::integral_constant<int, 1>{});
    return;
  }
  for (; i < s.out_height; ++i) {
    const float* const rows = padded + i * s.stride * row_width;
    for (int64_t column = 0; column < out_width; column += kLanes) {
      Vec sum = splat_vec(bias);
      for (int64_t a = 0; a < s.kernel; ++a)
        for (int64_t b = 0; b < s.kernel; ++b) {
          const Vec x = load_vec(rows + a * row_width + b % s.stride * phase_width + b / s.stride + column);
          sum += splat_vec(weight[a * s.kernel + b]) * x;
        }
      const int64_t at = i * out_width + column;
      put(y + at, act(sum, activation), out_width - column, results - at);
    }
  }
}

// run(integral_constant kernel, integral_constant stride), 0 for those that are not known here.
template <class Run>
void with_kernel(int64_t kernel, int64_t stride, Run&& run) {
  using std::integral_constant;
  if (kernel == 3 && stride == 1) run(integral_constant<int, 3>{}, integral_constant<int, 1>{});
  else if (kernel == 3 && stride == 2) run(integral_constant<int, 3>{}, integral_constant<int, 2>{});
  else run(integral_constant<int, 0>{}, integral_constant<int, 0>{});
}

}  // namespace depthwise
}  // namespace zoo
