// Pointwise convolution with a packed W [out channels, in channels] (csr or rows4, see packed.hpp) on channel-major
// maps: y[image, o, :] = bias[o] + sum of w[o, c] * x[image, c, :].
//
// A tile of pixels stays in registers while the kept weights of an output channel (or of four) pass by. Tiles are of
// 8, 4, 2 or 1 vectors (2 or 1 for four channels at a time); the last one is moved back so that it ends with the map, and overlaps the one before: 7 x 7 maps
// need no scalar tail.
#include "zoo/export.hpp"
#include "zoo/packed.hpp"
#include "zoo/parallel.hpp"

namespace zoo {
namespace {

constexpr int64_t kRowCost = 4;  // what an empty row costs, in entries, for an even split among threads

template <class T>
struct Job {
  Packed<T> w;
  int64_t layout;
  const float* bias;
  const float* x;  // one image
  float* y;
  int64_t pixels;
};

template <int V, class T>
void rows_tile(const Job<T>& job, int64_t pixel, int64_t from, int64_t to) {
  const Packed<T>& w = job.w;
  for (int64_t row = from; row < to; ++row) {
    vf acc[V];
    for (int v = 0; v < V; ++v) acc[v] = splat(job.bias != nullptr ? job.bias[row] : 0.0f);
    for (int64_t p = 0; p < w.panels(); ++p) {
      const int64_t segment = p * w.rows + row, first = w.pointer[segment];
      accumulate_row<V>(w.values + first, static_cast<const uint16_t*>(w.index) + first, w.pointer[segment + 1] - first,
                        job.x + p * w.panel * job.pixels + pixel, job.pixels, acc);
    }
    for (int v = 0; v < V; ++v) store(job.y + row * job.pixels + pixel + v * kLanes, acc[v]);
  }
}

template <int V, class T>
void rows4_tile(const Job<T>& job, int64_t pixel, int64_t from, int64_t to) {
  const Packed<T>& w = job.w;
  const int64_t block_rows = (w.rows + 3) / 4;
  for (int64_t block = from; block < to; ++block) {
    const int64_t valid = std::min<int64_t>(4, w.rows - 4 * block);
    vf acc[4][V];
    for (int64_t r = 0; r < 4; ++r)
      for (int v = 0; v < V; ++v)
        acc[r][v] = splat(job.bias != nullptr && r < valid ? job.bias[4 * block + r] : 0.0f);
    for (int64_t p = 0; p < w.panels(); ++p) {
      const int64_t segment = p * block_rows + block, first = w.pointer[segment];
      accumulate_rows4<V>(w.values + 4 * first, static_cast<const uint16_t*>(w.index) + first,
                          w.pointer[segment + 1] - first, job.x + p * w.panel * job.pixels + pixel, job.pixels, acc);
    }
    for (int64_t r = 0; r < valid; ++r)
      for (int v = 0; v < V; ++v) store(job.y + (4 * block + r) * job.pixels + pixel + v * kLanes, acc[r][v]);
  }
}

// All pixels of one image for rows (or blocks of four) [from, to); pixels >= kLanes.
template <class T>
void image_rows(const Job<T>& job, int64_t from, int64_t to) {
  for (int64_t pixel = 0; pixel < job.pixels;) {
    const int64_t vectors = (job.pixels - pixel) / kLanes;
    if (vectors == 0) pixel = job.pixels - kLanes;
    if (job.layout == kRows4) {
      if (vectors >= 2) rows4_tile<2>(job, pixel, from, to), pixel += 2 * kLanes;
      else rows4_tile<1>(job, pixel, from, to), pixel += kLanes;
    } else {
      if (vectors >= 8) rows_tile<8>(job, pixel, from, to), pixel += 8 * kLanes;
      else if (vectors >= 4) rows_tile<4>(job, pixel, from, to), pixel += 4 * kLanes;
      else if (vectors >= 2) rows_tile<2>(job, pixel, from, to), pixel += 2 * kLanes;
      else rows_tile<1>(job, pixel, from, to), pixel += kLanes;
    }
  }
}

}  // namespace
}  // namespace zoo

// x [images, cols, pixels] and y [images, rows, pixels] float, contiguous; pixels >= 16; bias [rows] or null; W of
// layout csr or rows4, values of `type`.
ZOO_EXPORT void zoo_sparse_conv1x1(const float* x, const void* values, const void* index, const int32_t* pointer,
                                   const float* bias, float* y, int64_t images, int64_t pixels, int64_t rows,
                                   int64_t cols, int64_t panel, int64_t layout, int64_t type, int64_t threads) {
  const int64_t segment_rows = layout == zoo::kRows4 ? (rows + 3) / 4 : rows;
  zoo::with_type(type, [&](auto tag) {
    using T = decltype(tag);
    const zoo::Packed<T> w{static_cast<const T*>(values), index, pointer, rows, cols, panel, 1};
    zoo::parallel_rows(pointer, segment_rows, zoo::kRowCost, threads, [&](int64_t from, int64_t to) {
      for (int64_t image = 0; image < images; ++image)
        zoo::image_rows(zoo::Job<T>{w, layout, bias, x + image * cols * pixels, y + image * rows * pixels, pixels}, from,
                        to);
    });
  });
}
