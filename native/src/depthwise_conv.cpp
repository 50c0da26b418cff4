// Depthwise convolution on channel-major maps: y[image, c] = bias[c] + x[image, c] * W[c], one kernel per channel.
//
// Beside sparse 1x1 convolutions, which want each channel's map in one piece. A map is first copied with its border of
// zeros, its columns dealt out by their remainder modulo the stride; the taps of a row of results are then plain vector
// loads for every stride, and the copy (a map or less) stays in the second-level cache.
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

// padded[i, p, j] = x[i - padding, j * stride + p - padding], zero outside.
void deal(const Shape& s, const float* x, float* padded) {
  std::fill_n(padded, s.padded_height() * s.row(), 0.0f);
  const int64_t first_row = std::min(s.padding, s.padded_height());
  const int64_t last_row = std::min(s.padded_height(), s.height + s.padding);
  for (int64_t i = first_row; i < last_row; ++i) {
    const float* from = x + (i - s.padding) * s.width;
    for (int64_t p = 0; p < s.stride; ++p) {
      float* to = padded + i * s.row() + p * s.phase_width();
      // the first j with j * stride + p >= padding, and how many columns there are from there
      const int64_t j = s.padding > p ? (s.padding - p + s.stride - 1) / s.stride : 0;
      const int64_t column = j * s.stride + p - s.padding;
      if (column >= s.width) continue;
      const int64_t count = std::min((s.width - column + s.stride - 1) / s.stride, s.phase_width() - j);
      if (s.stride == 1) std::copy_n(from + column, std::max<int64_t>(count, 0), to + j);
      else
        for (int64_t n = 0; n < count; ++n) to[j + n] = from[column + n * s.stride];
    }
  }
}

template <int K>
inline Vec taps(const Shape& s, const float* rows, const float* weight, Vec sum, int64_t column) {
  const int64_t kernel = K > 0 ? K : s.kernel;
  for (int64_t a = 0; a < kernel; ++a)
    for (int64_t b = 0; b < kernel; ++b) {
      const float* from = rows + a * s.row() + b % s.stride * s.phase_width() + b / s.stride;
      sum += splat_vec(weight[a * kernel + b]) * load_vec(from + column);
    }
  return sum;
}

template <int K>
void convolve_map(const Shape& s, const float* padded, const float* weight, float bias, bool relu, float* y) {
  for (int64_t i = 0; i < s.out_height; ++i) {
    const float* rows = padded + i * s.stride * s.row();
    float* to = y + i * s.out_width;
    for (int64_t column = 0; column < s.out_width; column += kLanes) {
      Vec sum = taps<K>(s, rows, weight, splat_vec(bias), column);
      if (relu) sum = sum < Vec{} ? Vec{} : sum;  // a NaN stays
      if (column + kLanes <= s.out_width) {
        store_vec(to + column, sum);
      } else {
        float last[kLanes];
        store_vec(last, sum);
        std::copy_n(last, s.out_width - column, to + column);
      }
    }
  }
}

}  // namespace
}  // namespace zoo

// x [images, channels, height, width], weight [channels, kernel, kernel], bias [channels] or null, y [images, channels,
// out_height, out_width], all contiguous; relu: negative results become zero.
ZOO_EXPORT void zoo_depthwise_conv(const float* x, const float* weight, const float* bias, float* y, int64_t images,
                                   int64_t channels, int64_t height, int64_t width, int64_t out_height,
                                   int64_t out_width, int64_t kernel, int64_t stride, int64_t padding, int64_t relu,
                                   int64_t threads) {
  using namespace zoo;
  const Shape s{height, width, out_height, out_width, kernel, stride, padding};
  parallel_for(images * channels, threads, [&](int64_t begin, int64_t end) {
    float* padded = scratch_of<float>(s.padded_height() * s.row(), 0);
    for (int64_t map = begin; map < end; ++map) {
      const int64_t channel = map % channels;
      const float* own = weight + channel * kernel * kernel;
      const float start = bias != nullptr ? bias[channel] : 0.0f;
      float* to = y + map * out_height * out_width;
      deal(s, x + map * height * width, padded);
      if (kernel == 3) convolve_map<3>(s, padded, own, start, relu != 0, to);
      else if (kernel == 5) convolve_map<5>(s, padded, own, start, relu != 0, to);
      else convolve_map<0>(s, padded, own, start, relu != 0, to);
    }
  });
}
