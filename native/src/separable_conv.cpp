// A sparse 1x1 convolution (which may be missing), a depthwise one and a sparse 1x1 one on channel-major maps, in one pass:
// the blocks of MobileNets. Apart, the three read and write wide maps three times over, which takes longer than their
// products.
//
// Results are computed in bands of rows. A band's results of the depthwise convolution stay in the second-level cache until
// the last convolution takes them; what these meet of the first one's is computed some channels at a time, rows that two
// bands meet twice. Where an image has too few bands for the threads, it is one band, and the threads share its channels.
// Sums are made in the order of the three kernels, so that the bits are those of the three, one after the other.
#include "zoo/check.hpp"
#include "zoo/depthwise.hpp"
#include "zoo/export.hpp"
#include "zoo/pointwise.hpp"

namespace zoo {
namespace {

constexpr int64_t kKept = 256 << 10;      // bytes of results of the depthwise convolution that stay in a near cache
constexpr int64_t kExpanded = 192 << 10;   // bytes of results of the first one at a time
constexpr int64_t kLeastRows = 7;         // of a band that is made for the sake of threads

// A packed weight and its bias as ten numbers: addresses of values, index, pointer and bias, then entries, rows, cols, panel,
// layout, activation.
template <class T>
struct Layer {
  Packed<T> w;
  const float* bias;
  int64_t entries, layout, activation;

  explicit Layer(const int64_t* n)
      : w{at<T>(n[0]), at<void>(n[1]), at<int32_t>(n[2]), n[5], n[6], n[7], 1},
        bias(at<float>(n[3])), entries(n[4]), layout(n[8]), activation(n[9]) {}

  template <class U>
  static const U* at(int64_t address) {
    return reinterpret_cast<const U*>(static_cast<uintptr_t>(address));
  }

  bool blocks() const { return layout == kRows4; }
  int64_t segment_rows() const { return blocks() ? (w.rows + 3) / 4 : w.rows; }

  void check() const {
    check_whole(w, layout, entries);
    check_rows(w, layout, entries, 0, segment_rows());
  }
};

template <class T>
struct Work {
  const Layer<T>* expand;  // null where the depthwise convolution takes x itself
  const Layer<T>& project;
  const float *kernels, *bias;  // of the depthwise convolution
  int64_t hidden, activation;   // its channels
  depthwise::Shape whole;

  int64_t inputs() const { return expand != nullptr ? expand->w.cols : hidden; }
  int64_t pixels() const { return whole.height * whole.width; }
  int64_t results() const { return whole.out_height * whole.out_width; }

  depthwise::Shape band(int64_t number, int64_t bands) const {
    depthwise::Shape s = whole;
    s.first = whole.out_height * number / bands;
    s.out_height = whole.out_height * (number + 1) / bands - s.first;
    return s;
  }
};

// All pieces of maps of `job.pixels` pixels for rows [from, to) of W (blocks of four where there are such).
template <class T>
void multiply(const pointwise::Job<T>& job, bool blocks, const float* x, int64_t from, int64_t to) {
  const int64_t pieces = pointwise::pieces_of(job.pixels);
  for (int64_t piece = 0; piece < pieces; ++piece) pointwise::run_piece(job, blocks, x, piece, from, to);
}

// Rows `s` of the depthwise convolution's channels [from, to) for the image x; `from` is a multiple of four. The results of a
// channel are `step` floats from those of the next.
template <class T>
void deepen(const Work<T>& work, const depthwise::Shape& s, const float* x, int64_t from, int64_t to, float* results,
            int64_t step) {
  const int64_t begin = s.begin(), pixels = (s.end() - begin) * s.width, size = s.kernel * s.kernel;
  const int64_t padded_floats = s.padded_height() * s.row();
  float* const padded = scratch_of<float>(padded_floats, 2);
  std::fill_n(padded, padded_floats, 0.0f);
  const auto convolve = [&](int64_t channel, const float* map) {
    depthwise::with_kernel(s.kernel, s.stride, [&](auto kernel, auto stride) {
      constexpr int K = decltype(kernel)::value, S = decltype(stride)::value;
      depthwise::deal<S>(s, map, padded);
      depthwise::convolve_map<K, S>(s, padded, work.kernels + channel * size,
                                    work.bias != nullptr ? work.bias[channel] : 0.0f, work.activation,
                                    results + channel * step);
    });
  };
  x += begin * s.width;
  if (work.expand == nullptr) {
    for (int64_t channel = from; channel < to; ++channel) convolve(channel, x + channel * work.pixels());
    return;
  }
  const Layer<T>& layer = *work.expand;
  const int64_t apart = (pixels + kLanes - 1) / kLanes * kLanes + kLanes;
  const int64_t chunk = std::max<int64_t>(4, kExpanded / (apart * static_cast<int64_t>(sizeof(float))) / 4 * 4);
  float* const expanded = scratch_of<float>(std::min(chunk, to - from + 3) * apart, 3);
  const int64_t rows = layer.blocks() ? 4 : 1;
  for (int64_t first = from; first < to; first += chunk) {
    const int64_t last = std::min(first + chunk, to);
    // y is moved back so that channel `first` comes to lie at its begin
    const pointwise::Job<T> job{layer.w, layer.bias, nullptr, expanded, pixels, layer.w.panels(), layer.activation,
                                work.pixels(), apart, first};
    multiply(job, layer.blocks(), x, first / rows, (last + rows - 1) / rows);
    for (int64_t channel = first; channel < last; ++channel) convolve(channel, expanded + (channel - first) * apart);
  }
}

// How the last convolution takes the results of rows `s`, from one image to another.
template <class T>
pointwise::Job<T> ending(const Work<T>& work, const depthwise::Shape& s, const float* residual, float* y, int64_t step) {
  const int64_t start = s.first * s.out_width;
  return {work.project.w, work.project.bias, residual != nullptr ? residual + start : nullptr, y + start,
          s.out_height * s.out_width, work.project.w.panels(), work.project.activation, step, work.results(), 0};
}

int64_t apart(const depthwise::Shape& s) { return (s.out_height * s.out_width + kLanes - 1) / kLanes * kLanes + kLanes; }

template <class T>
void run(const Work<T>& work, const float* x, const float* residual, float* y, int64_t images, int64_t threads) {
  const depthwise::Shape& s = work.whole;
  const int64_t image_x = work.inputs() * work.pixels(), image_y = work.project.w.rows * work.results();
  int64_t floats = work.hidden * work.results();
  if (work.expand != nullptr) floats = std::max(floats, work.hidden * work.pixels() / 2);
  const int64_t bytes = floats * static_cast<int64_t>(sizeof(float));
  // Three vectors at least, see pointwise.hpp.
  const int64_t most = std::max<int64_t>(1, s.out_height / ((2 * kLanes + s.out_width) / s.out_width));
  int64_t bands = std::clamp<int64_t>((bytes + kKept - 1) / kKept, 1, most);
  const int64_t wanted = (4 * threads + images - 1) / images;
  if (bands < wanted && s.out_height >= kLeastRows * wanted) bands = std::min(wanted, most);
  const bool blocks = work.project.blocks();
  const auto added = [&](int64_t image) { return residual != nullptr ? residual + image * image_y : nullptr; };
  if (threads <= 1 || bands >= wanted) {
    parallel_for(images * bands, threads, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t image = item / bands;
        const depthwise::Shape band = work.band(item % bands, bands);
        const int64_t step = apart(band);
        float* const results = scratch_of<float>(work.hidden * step, 4);
        deepen(work, band, x + image * image_x, 0, work.hidden, results, step);
        multiply(ending(work, band, added(image), y + image * image_y, step), blocks, results, 0,
                 work.project.segment_rows());
      }
    });
    return;
  }
  const int64_t step = apart(s), pieces = pointwise::pieces_of(work.results());
  float* const results = scratch_of<float>(work.hidden * step, 4);
  for (int64_t image = 0; image < images; ++image) {
    parallel_for((work.hidden + 3) / 4, threads, [&](int64_t begin, int64_t end) {
      deepen(work, s, x + image * image_x, 4 * begin, std::min(4 * end, work.hidden), results, step);
    });
    const pointwise::Job<T> job = ending(work, s, added(image), y + image * image_y, step);
    if (pieces >= 4 * threads) {
      parallel_for(pieces, threads, [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; ++piece)
          pointwise::run_piece(job, blocks, results, piece, 0, work.project.segment_rows());
      });
    } else {
      parallel_rows(work.project.w.pointer, work.project.segment_rows(), pointwise::kRowCost, threads,
                    [&](int64_t from, int64_t to) { multiply(job, blocks, results, from, to); });
    }
  }
}

}  // namespace
}  // namespace zoo

// x [images, inputs, height, width], kernels [hidden, kernel, kernel], bias [hidden] or null, residual (or null) and y
// [images, outputs, out_height, out_width], contiguous; expand (or null) and project as in Layer, of values of `type`, csr or
// rows4; twice the padding less than the kernel; results of 33 pixels or more; activation: see activation.hpp.
ZOO_EXPORT int64_t zoo_separable_conv(const float* x, const int64_t* expand, const float* kernels, const float* bias,
                                      const int64_t* project, const float* residual, float* y, int64_t images,
                                      int64_t height, int64_t width, int64_t hidden, int64_t out_height,
                                      int64_t out_width, int64_t kernel, int64_t stride, int64_t padding,
                                      int64_t activation, int64_t type, int64_t threads) try {
  using namespace zoo;
  with_type(type, [&](auto tag) {
    using T = decltype(tag);
    const Layer<T> last(project);
    last.check();
    const Layer<T> first(expand != nullptr ? expand : project);
    if (expand != nullptr) first.check();
    const depthwise::Shape shape{height, width, out_height, out_width, kernel, stride, padding};
    const Work<T> work{expand != nullptr ? &first : nullptr, last, kernels, bias, hidden, activation, shape};
    const int64_t steps = (expand != nullptr ? first.entries * work.pixels() : 0) +
                          (hidden * kernel * kernel + last.entries) * work.results();
    run(work, x, residual, y, images, worthwhile(threads, images * (steps / kLanes)));
  });
  return zoo::kOk;
} ZOO_CATCH
