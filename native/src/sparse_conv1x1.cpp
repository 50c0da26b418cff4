// Pointwise convolution with a packed W [out channels, in channels] (csr or rows4, see packed.hpp) on channel-major
// maps: y[image, o, :] = bias[o] + sum of w[o, c] * x[image, c, :].
#include "zoo/check.hpp"
#include "zoo/export.hpp"
#include "zoo/pointwise.hpp"


// x [images, cols, pixels] and y [images, rows, pixels] float, contiguous; pixels >= 16; bias [rows] or null; W of
// layout csr or rows4, values of `type`; residual: of the shape of y, or null; activation: see activation.hpp.
ZOO_EXPORT int64_t zoo_sparse_conv1x1(const float* x, const void* values, const void* index, const int32_t* pointer,
                                      const float* bias, const float* residual, float* y, int64_t images,
                                      int64_t pixels, int64_t entries, int64_t rows, int64_t cols, int64_t panel,
                                      int64_t layout, int64_t type, int64_t activation, int64_t threads) try {
  const bool blocks = layout == zoo::kRows4;
  const int64_t segment_rows = blocks ? (rows + 3) / 4 : rows;
  const int64_t pieces = zoo::pointwise::pieces_of(pixels);
  zoo::with_type(type, [&](auto tag) {
    using T = decltype(tag);
    const zoo::Packed<T> w{static_cast<const T*>(values), index, pointer, rows, cols, panel, 1};
    const auto run = [&](int64_t item, int64_t from, int64_t to) {
      const int64_t image = item / pieces;
      const float* added = residual != nullptr ? residual + image * rows * pixels : nullptr;
      const zoo::pointwise::Job<T> job{w,          bias,   added,  y + image * rows * pixels, pixels, w.panels(),
                                       activation, pixels, pixels, 0};
      zoo::pointwise::run_piece(job, blocks, x + image * cols * pixels, item % pieces, from, to);
    };
    zoo::check_whole(w, layout, entries);
    zoo::check_rows(w, layout, entries, 0, segment_rows);
    threads = zoo::worthwhile(threads, entries * images * (pixels / zoo::kLanes));
    // Few pieces are shared by rows; each thread then copies them for itself.
    if (images * pieces >= 4 * threads) {
      zoo::parallel_for(images * pieces, threads, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) run(item, 0, segment_rows);
      });
      return;
    }
    zoo::parallel_rows(pointer, segment_rows, zoo::pointwise::kRowCost, threads, [&](int64_t from, int64_t to) {
      for (int64_t item = 0; item < images * pieces; ++item) run(item, from, to);
    });
  });
  return zoo::kOk;
} ZOO_CATCH
