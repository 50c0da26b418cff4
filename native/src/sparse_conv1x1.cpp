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

constexpr int64_t kPiece = 64;   // pixels of a piece of the map, a multiple of two vectors
constexpr int64_t kRowCost = 4;  // what an empty row costs, in entries, for an even split among threads

template <class T>
struct Job {
  Packed<T> w;
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

// One block of four channels, V vectors of pixels.
template <int V, class T>
ZOO_INLINE void rows4_tile(const Job<T>& job, int64_t pixel, int64_t block) {
  const Packed<T>& w = job.w;
  const int64_t block_rows = (w.rows + 3) / 4, valid = std::min<int64_t>(4, w.rows - 4 * block);
  vf acc[4][V];
  for (int64_t r = 0; r < 4; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = splat(job.bias != nullptr && r < valid ? job.bias[4 * block + r] : 0.0f);
  for (int64_t p = 0; p < w.panels(); ++p) {
    const int64_t segment = p * block_rows + block, first = w.pointer[segment];
    accumulate_rows4<V>(w.values + 4 * first, static_cast<const uint16_t*>(w.index) + first,
                        w.pointer[segment + 1] - first, job.x + p * w.panel * job.pixels + pixel, job.pixels, acc);
  }
  for (int64_t r = 0; r < valid; ++r)
    for (int v = 0; v < V; ++v) store(job.y + (4 * block + r) * job.pixels + pixel + v * kLanes, acc[r][v]);
}

// Where the next tile of at most `most` vectors begins, and its vectors: the last one is moved back.
ZOO_INLINE int64_t next_tile(int64_t pixels, int64_t most, int64_t* pixel) {
  int64_t vectors = std::min(most, (pixels - *pixel) / kLanes);
  if (vectors == 0) {
    *pixel = pixels - kLanes;
    return 1;
  }
  while (vectors & (vectors - 1)) vectors &= vectors - 1;  // the largest power of two in it
  return vectors;
}

// All pixels of one image for rows [from, to); pixels >= kLanes.
template <class T>
void image_rows(const Job<T>& job, int64_t from, int64_t to) {
  for (int64_t pixel = 0; pixel < job.pixels;) {
    const int64_t vectors = next_tile(job.pixels, 8, &pixel);
    if (vectors == 8) rows_tile<8>(job, pixel, from, to);
    else if (vectors == 4) rows_tile<4>(job, pixel, from, to);
    else if (vectors == 2) rows_tile<2>(job, pixel, from, to);
    else rows_tile<1>(job, pixel, from, to);
    pixel += vectors * kLanes;
  }
}

// The same for blocks of four rows. A block goes through a wide piece of the map in tiles of two vectors, so that its
// weights are read from the first-level cache and whole lines of x are used while they are there.
template <class T>
void image_blocks(const Job<T>& job, int64_t from, int64_t to) {
  for (int64_t start = 0; start < job.pixels; start += kPiece) {
    const int64_t end = std::min(start + kPiece, job.pixels);
    for (int64_t block = from; block < to; ++block)
      for (int64_t pixel = start; pixel < end;) {
        const int64_t vectors = next_tile(job.pixels, 2, &pixel);
        if (vectors == 2) rows4_tile<2>(job, pixel, block);
        else rows4_tile<1>(job, pixel, block);
        pixel += vectors * kLanes;
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
      for (int64_t image = 0; image < images; ++image) {
        const zoo::Job<T> job{w, bias, x + image * cols * pixels, y + image * rows * pixels, pixels};
        if (layout == zoo::kRows4) zoo::image_blocks(job, from, to);
        else zoo::image_rows(job, from, to);
      }
    });
  });
}
