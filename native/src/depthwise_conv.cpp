// Depthwise convolution on channel-major maps: y[image, c] = bias[c] + x[image, c] * W[c], one kernel per channel.
//
// Beside sparse 1x1 convolutions, which want each channel's map in one piece.
#include "zoo/depthwise.hpp"
#include "zoo/export.hpp"
#include "zoo/parallel.hpp"

namespace zoo {
namespace {

template <int K, int S>
void maps(const depthwise::Shape& s, const float* x, const float* weight, const float* bias, float* y, int64_t channels,
          int64_t activation, int64_t begin, int64_t end) {
  float* const padded = scratch_of<float>(s.padded_height() * s.row(), 0);
  std::fill_n(padded, s.padded_height() * s.row(), 0.0f);
  for (int64_t map = begin; map < end; ++map) {
    const int64_t channel = map % channels;
    depthwise::deal<S>(s, x + map * s.height * s.width, padded);
    depthwise::convolve_map<K, S>(s, padded, weight + channel * s.kernel * s.kernel,
                                  bias != nullptr ? bias[channel] : 0.0f, activation,
                                  y + map * s.out_height * s.out_width);
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
  const depthwise::Shape s{height, width, out_height, out_width, kernel, stride, padding};
  threads = worthwhile(threads, images * channels * out_height * out_width * kernel * kernel / Lanes<float>::kCount);
  parallel_for(images * channels, threads, [&](int64_t begin, int64_t end) {
    depthwise::with_kernel(kernel, stride, [&](auto size, auto step) {
      maps<decltype(size)::value, decltype(step)::value>(s, x, weight, bias, y, channels, activation, begin, end);
    });
  });
  return zoo::kOk;
} ZOO_CATCH
