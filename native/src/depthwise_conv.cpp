// Depthwise convolution on channel-major maps: y[image, c] = bias[c] + x[image, c] * W[c], one kernel per channel.
//
// Beside sparse 1x1 convolutions, which want each channel's map in one piece. A map is first copied with its border of
// zeros, its columns dealt out by their remainder modulo the stride; the taps of a row of results are then plain vector
// loads for every stride, and the copy (a map or less) stays in the second-level cache.
#include "zoo/activation.hpp"
#include "zoo/export.hpp"
#include "zoo/lanes.hpp"
#include "zoo/parallel.hpp"

namespace zoo {
namespace {

using Vec = Lanes<float>::Vec;
constexpr int64_t kLanes = Lanes<float>::kCount;

struct Shape {
  int64_t height, width, out_height, out_width, kernel, stride, padding;

  int64_t padded_height() const { return (out_height - 1) * stride + kernel; }
  // Columns of one remainder that a row of results reads, and what its last vector reads beyond.
  int64_t phase_width() const { return out_width + (kernel - 1) / stride + kLanes; }
  int64_t row() const { return stride * phase_width(); }
};

// padded[i, p, j] = x[i - padding, j * stride + p - padding] inside of x; what is outside is left alone, and so stays
// zero from map to map. S: the stride, 0 where it is not known here.
template <int S>
void deal(const Shape& s, const float* x, float* padded) {
  const int64_t stride = S > 0 ? S : s.stride, phase_width = s.phase_width();
  const int64_t last_row = std::min(s.padded_height(), s.height + s.padding);
  for (int64_t i = s.padding; i < last_row; ++i) {
    const float* const from = x + (i - s.padding) * s.width;
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

template <int K, int S>
void maps(const Shape& s, const float* x, const float* weight, const float* bias, float* y, int64_t channels,
          int64_t activation, int64_t begin, int64_t end) {
  float* const padded = scratch_of<float>(s.padded_height() * s.row(), 0);
  std::fill_n(padded, s.padded_height() * s.row(), 0.0f);
  for (int64_t map = begin; map < end; ++map) {
    const int64_t channel = map % channels;
    deal<S>(s, x + map * s.height * s.width, padded);
    convolve_map<K, S>(s, padded, weight + channel * s.kernel * s.kernel, bias != nullptr ? bias[channel] : 0.0f,
                       activation, y + map * s.out_height * s.out_width);
  }
}

}  // namespace
}  // namespace zoo

// x [images, channels, height, width], weight [channels, kernel, kernel], bias [channels] or null, y [images, channels,
// out_height, out_width], all contiguous; activation: see activation.hpp.
ZOO_EXPORT int64_t zoo_depthwise_conv(const float* x, const float* weight, const float* bias, float* y, int64_t images,
                                   int64_t channels, int64_t height, int64_t width, int64_t out_height,
                                   int64_t out_width, int64_t kernel, int64_t stride, int64_t padding,
                                   int64_t activation, int64_t threads) try {
  using namespace zoo;
  const Shape s{height, width, out_height, out_width, kernel, stride, padding};
  threads = worthwhile(threads, images * channels * out_height * out_width * kernel * kernel / Lanes<float>::kCount);
  parallel_for(images * channels, threads, [&](int64_t begin, int64_t end) {
    if (kernel == 3 && stride == 1) maps<3, 1>(s, x, weight, bias, y, channels, activation, begin, end);
    else if (kernel == 3 && stride == 2) maps<3, 2>(s, x, weight, bias, y, channels, activation, begin, end);
    else maps<0, 0>(s, x, weight, bias, y, channels, activation, begin, end);
  });
  return zoo::kOk;
} ZOO_CATCH
