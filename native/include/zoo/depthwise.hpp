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

// padded[i, p, j] = x[first * stride + i - padding, j * stride + p - padding] inside of x, whose rows from begin() on are
// given; what is outside is left alone, and so stays zero from map to map. S: the stride, 0 where it is not known here.
template <int S>
void deal(const Shape& s, const float* x, float* padded) {
  const int64_t stride = S > 0 ? S : s.stride, phase_width = s.phase_width();
  const int64_t begin = s.begin(), end = s.end(), offset = s.padding - s.first * stride;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = row + offset;
    const float* const from = x + (row - begin) * s.width;
    for (int64_t p = 0; p < stride; ++p) {
      // the first j with j * stride + p >= padding, and how many columns there are from there
      const int64_t first = (std::max<int64_t>(s.padding - p, 0) + stride - 1) / stride;
      const int64_t column = first * stride + p - s.padding;
      const int64_t there = column < s.width ? (s.width - column + stride - 1) / stride : 0;
      const int64_t count = std::min(there, phase_width - first);
      float* const to = padded + (i * stride + p) * phase_width + first;
      for (int64_t n = 0; n < count; ++n) to[n] = from[column + n * stride];
    }
  }
}

// K: the kernel's size, S: the stride; 0 where they are not known here. With both known, a kernel of 3 stays in
// registers for the whole map.
template <int K, int S>
void convolve_map(const Shape& s, const float* padded, const float* weight, float bias, int64_t activation, float* y) {
  const int64_t kernel = K > 0 ? K : s.kernel, stride = S > 0 ? S : s.stride;
  const int64_t phase_width = s.phase_width(), row_width = s.row(), out_width = s.out_width;
  Vec held[K == 3 ? 9 : 1];
  if constexpr (K == 3)
    for (int64_t k = 0; k < 9; ++k) held[k] = splat_vec(weight[k]);
  for (int64_t i = 0; i < s.out_height; ++i) {
    const float* const rows = padded + i * stride * row_width;
    float* const to = y + i * out_width;
    for (int64_t column = 0; column < out_width; column += kLanes) {
      Vec sum = splat_vec(bias);
      for (int64_t a = 0; a < kernel; ++a)
        for (int64_t b = 0; b < kernel; ++b) {
          const Vec x = load_vec(rows + a * row_width + b % stride * phase_width + b / stride + column);
          if constexpr (K == 3) sum += held[a * 3 + b] * x;
          else sum += splat_vec(weight[a * kernel + b]) * x;
        }
      if (activation != kNone) sum = sum < Vec{} ? Vec{} : sum;  // a NaN stays
      if (activation == kRelu6) sum = sum > splat_vec(6.0f) ? splat_vec(6.0f) : sum;
      // What runs over the end of a row is written again with the next rows.
      if (i * out_width + column + kLanes <= s.out_height * out_width) {
        store_vec(to + column, sum);
      } else {
        float last[kLanes];
        store_vec(last, sum);
        std::copy_n(last, std::min(kLanes, out_width - column), to + column);
      }
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
