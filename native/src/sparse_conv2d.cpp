// Convolution with a packed W [out channels, in channels x kernel x kernel] (csr or rows4, see packed.hpp) on
// channel-major maps: y[image, o] = bias[o] + residual[image, o] + sum over kept (c, a, b) of w * x[image, c] moved by
// (a, b).
//
// The results of a map lie, row after row, at a distance of `pitch` columns, so many that the zeros which border a row of
// x on the right border the next row on the left. A weight then meets the results of any number of rows at one constant
// offset, and the convolution is the pointwise one (sparse_conv1x1.cpp): a piece of kPieceVectors vectors of results stays
// in registers while the kept weights pass by. What a piece meets of a channel is its window, copied together with those
// of the other channels of a panel, which fill the first-level cache. Under a stride, columns and rows are dealt out by
// their remainders (phases), each with a window of its own. The index holds offsets into the windows of a panel
// (shared/ops/sparse_conv2d.py). Columns beyond the width of a result are computed and not stored.
#include "zoo/check.hpp"
#include "zoo/export.hpp"
#include "zoo/packed.hpp"
#include "zoo/parallel.hpp"

namespace zoo {
namespace {

constexpr int64_t kRowCost = 4;  // what an empty row costs, in entries, for an even split among threads
constexpr int64_t kSums = 4096;  // floats of sums between two panels: half of the first-level cache
constexpr int kMostOfBlocks = 2;  // vectors of four channels at once, whose sums fill the registers

struct Maps {
  int64_t height, width, out_height, out_width, kernel, stride, padding, pitch, window;

  int64_t side() const { return std::min(kernel, stride); }
  int64_t span() const { return side() * side() * window; }  // floats of a channel's windows
  int64_t vectors() const { return ((out_height - 1) * pitch + out_width + kLanes - 1) / kLanes; }
};

// A run of results of a piece: `count` of them from `from` in the piece, to be stored at `to` in the map.
struct Run {
  int64_t from, to, count;
};

template <class T>
struct Job {
  Packed<T> w;  // columns and panels are counted in floats of windows
  const float *bias, *residual;
  float* y;  // maps of so many pixels
  int64_t pixels;
  int64_t activation;
};

struct Piece {
  const float* x;  // the windows
  float* sums;     // those of a row of W, between two panels
  int64_t vectors, runs;
  Run run[kPieceVectors * 16];
};

// The windows of one channel for results [start, start + window): what is outside of x is zero.
void deal(const Maps& s, const float* x, int64_t start, float* windows) {
  std::fill_n(windows, s.span(), 0.0f);
  const int64_t first_row = start / s.pitch, last_row = (start + s.window - 1) / s.pitch;
  for (int64_t a = 0; a < s.side(); ++a)
    for (int64_t b = 0; b < s.side(); ++b, windows += s.window) {
      // columns j with 0 <= j * stride + b - padding < width, of those that a result reads
      const int64_t lo = (std::max<int64_t>(s.padding - b, 0) + s.stride - 1) / s.stride;
      const int64_t hi = std::min((s.width + s.padding - b + s.stride - 1) / s.stride,
                                  s.out_width + (s.kernel - 1 - b) / s.stride);
      for (int64_t row = first_row; row <= last_row; ++row) {
        const int64_t y = row * s.stride + a - s.padding;
        if (y < 0 || y >= s.height) continue;
        const int64_t from = std::max(row * s.pitch + lo, start), to = std::min(row * s.pitch + hi, start + s.window);
        const float* source = x + y * s.width + (from - row * s.pitch) * s.stride + b - s.padding;
        float* place = windows + from - start;
        if (s.stride == 1)
          for (int64_t n = 0; n < to - from; ++n) place[n] = source[n];
        else
          for (int64_t n = 0; n < to - from; ++n) place[n] = source[n * s.stride];
      }
    }
}

// Stores a piece's results of one channel. What a vector writes beyond its run, the next run writes again; beyond the
// last, nothing may be written.
template <class T>
void put(const Job<T>& job, const Piece& piece, int64_t row, const float* line) {
  float* y = job.y + row * job.pixels;
  const float* residual = job.residual != nullptr ? job.residual + row * job.pixels : nullptr;
  const Run& last = piece.run[piece.runs - 1];
  const int64_t end = last.to + last.count;
  for (const Run* run = piece.run; run < piece.run + piece.runs; ++run) {
    for (int64_t n = 0; n < run->count; n += kLanes) {
      const int64_t to = run->to + n, room = end - to;
      vf sum = load(line + run->from + n);
      if (room >= kLanes) {
        if (residual != nullptr) sum = add(sum, load(residual + to));
        store(y + to, activated(sum, job.activation));
        continue;
      }
      float some[kLanes] = {};
      if (residual != nullptr) std::copy(residual + to, residual + end, some);
      store(some, activated(add(sum, load(some)), job.activation));
      std::copy(some, some + room, y + to);
    }
  }
}

// Rows [from, to) of W in one panel.
template <int V, class T>
void rows_piece(const Job<T>& job, const Piece& piece, int64_t panel, int64_t from, int64_t to) {
  const Packed<T>& w = job.w;
  const bool starts = panel == 0, ends = panel + 1 == w.panels();
  float line[(V + 1) * kLanes];
  for (int64_t row = from; row < to; ++row) {
    float* sum = ends ? line : piece.sums + (row - from) * V * kLanes;
    const float* before = piece.sums + (row - from) * V * kLanes;
    vf acc[V];
    for (int v = 0; v < V; ++v)
      acc[v] = starts ? splat(job.bias != nullptr ? job.bias[row] : 0.0f) : load(before + v * kLanes);
    const int64_t segment = panel * w.rows + row, first = w.pointer[segment];
    accumulate_row<V>(w.values + first, static_cast<const uint16_t*>(w.index) + first, w.pointer[segment + 1] - first,
                      piece.x + panel * w.panel, 1, acc);
    for (int v = 0; v < V; ++v) store(sum + v * kLanes, acc[v]);
    if (ends) put(job, piece, row, line);
  }
}

// V vectors from vector `at` of a piece, for four rows of W.
template <int V, class T>
ZOO_INLINE void block_part(const Job<T>& job, const Piece& piece, int64_t panel, int64_t block, int64_t at,
                           const float* before, float* sums, int64_t step) {
  const Packed<T>& w = job.w;
  vf acc[4][V];
  for (int64_t r = 0; r < 4; ++r)
    for (int v = 0; v < V; ++v) {
      const bool biased = job.bias != nullptr && 4 * block + r < w.rows;
      acc[r][v] = panel == 0 ? splat(biased ? job.bias[4 * block + r] : 0.0f)
                             : load(before + r * step + (at + v) * kLanes);
    }
  const int64_t segment = panel * ((w.rows + 3) / 4) + block, first = w.pointer[segment];
  accumulate_rows4<V>(w.values + 4 * first, static_cast<const uint16_t*>(w.index) + first,
                      w.pointer[segment + 1] - first, piece.x + panel * w.panel + at * kLanes, 1, acc);
  for (int64_t r = 0; r < 4; ++r)
    for (int v = 0; v < V; ++v) store(sums + r * step + (at + v) * kLanes, acc[r][v]);
}

// Blocks [from, to) of four rows of W in one panel.
template <class T>
void blocks_piece(const Job<T>& job, const Piece& piece, int64_t panel, int64_t from, int64_t to) {
  const bool ends = panel + 1 == job.w.panels();
  const int64_t step = piece.vectors * kLanes, kept = 4 * step;
  float lines[4 * kPieceVectors * kLanes + kLanes];
  for (int64_t block = from; block < to; ++block) {
    const float* before = piece.sums + (block - from) * kept;
    float* sums = ends ? lines : piece.sums + (block - from) * kept;
    int64_t at = 0;
    for (; at + kMostOfBlocks <= piece.vectors; at += kMostOfBlocks)
      block_part<kMostOfBlocks>(job, piece, panel, block, at, before, sums, step);
    for (; at < piece.vectors; ++at) block_part<1>(job, piece, panel, block, at, before, sums, step);
    for (int64_t r = 0; ends && r < std::min<int64_t>(4, job.w.rows - 4 * block); ++r)
      put(job, piece, 4 * block + r, lines + r * step);
  }
}

int64_t pieces_of(const Maps& maps) { return (maps.vectors() + kPieceVectors - 1) / kPieceVectors; }

// Piece `number` of the map x [channels, height, width] for rows [from, to) of W (blocks of four where `blocks`).
template <class T>
void run_piece(const Job<T>& job, const Maps& maps, bool blocks, const float* map, int64_t number, int64_t from,
               int64_t to) {
  const int64_t vectors = maps.vectors(), pieces = pieces_of(maps), start = vectors * number / pieces;
  const int64_t span = maps.span(), channels = job.w.cols / span;
  Piece piece;
  piece.vectors = vectors * (number + 1) / pieces - start;
  float* x = scratch_of<float>(job.w.cols + kPieceVectors * kLanes, 0);
  for (int64_t c = 0; c < channels; ++c) deal(maps, map + c * maps.height * maps.width, start * kLanes, x + c * span);
  std::fill_n(x + job.w.cols, kPieceVectors * kLanes, 0.0f);
  piece.x = x;
  // So many rows of W pass by together that their sums stay in the first-level cache from panel to panel.
  const int64_t sums = (blocks ? 4 : 1) * piece.vectors * kLanes, step = std::max<int64_t>(1, kSums / sums);
  piece.sums = scratch_of<float>(std::min(step, to - from) * sums, 1);
  piece.runs = 0;
  const int64_t first = start * kLanes, end = first + piece.vectors * kLanes;
  for (int64_t i = first / maps.pitch; i < maps.out_height && i * maps.pitch < end; ++i) {
    const int64_t begin = std::max(i * maps.pitch, first), stop = std::min(i * maps.pitch + maps.out_width, end);
    const int64_t place = i * maps.out_width + begin - i * maps.pitch;
    if (begin >= stop) continue;
    if (piece.runs > 0 && maps.pitch == maps.out_width) piece.run[0].count += stop - begin;
    else piece.run[piece.runs++] = {begin - first, place, stop - begin};
  }
  if (piece.runs == 0) return;
  for (int64_t row = from; row < to; row += step)
    for (int64_t panel = 0; panel < job.w.panels(); ++panel) {
      const int64_t last = std::min(row + step, to);
      if (blocks) blocks_piece(job, piece, panel, row, last);
      else
        with_vectors(piece.vectors, [&](auto number_of) {
          rows_piece<decltype(number_of)::value>(job, piece, panel, row, last);
        });
    }
}

}  // namespace
}  // namespace zoo

// x [images, channels, height, width], residual (or null) and y [images, rows, out_height, out_width] float,
// contiguous; bias [rows] or null; W of layout csr or rows4 with offsets into windows of `window` floats, in panels of
// so many channels; activation: see activation.hpp.
ZOO_EXPORT int64_t zoo_sparse_conv2d(const float* x, const void* values, const void* index, const int32_t* pointer,
                                     const float* bias, const float* residual, float* y, int64_t images,
                                     int64_t channels, int64_t height, int64_t width, int64_t rows, int64_t out_height,
                                     int64_t out_width, int64_t kernel, int64_t stride, int64_t padding, int64_t pitch,
                                     int64_t window, int64_t panel, int64_t entries, int64_t layout, int64_t type,
                                     int64_t activation, int64_t threads) try {
  const zoo::Maps maps{height, width, out_height, out_width, kernel, stride, padding, pitch, window};
  const bool blocks = layout == zoo::kRows4;
  const int64_t segment_rows = blocks ? (rows + 3) / 4 : rows, pieces = zoo::pieces_of(maps);
  const int64_t pixels = out_height * out_width, span = maps.span();
  zoo::with_type(type, [&](auto tag) {
    using T = decltype(tag);
    const zoo::Packed<T> w{static_cast<const T*>(values), index, pointer, rows, channels * span, panel * span, 1};
    const auto run = [&](int64_t item, int64_t from, int64_t to) {
      const int64_t image = item / pieces;
      const float* added = residual != nullptr ? residual + image * rows * pixels : nullptr;
      const zoo::Job<T> job{w, bias, added, y + image * rows * pixels, pixels, activation};
      zoo::run_piece(job, maps, blocks, x + image * channels * height * width, item % pieces, from, to);
    };
    zoo::check_whole(w, layout, entries);
    zoo::check_rows(w, layout, entries, 0, segment_rows);
    threads = zoo::worthwhile(threads, entries * images * maps.vectors());
    // Few pieces are shared by rows; each thread then copies the windows for itself.
    if (images * pieces >= 4 * threads) {
      zoo::parallel_for(images * pieces, threads, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) run(item, 0, segment_rows);
      });
      return;
    }
    zoo::parallel_rows(pointer, segment_rows, zoo::kRowCost, threads, [&](int64_t from, int64_t to) {
      for (int64_t item = 0; item < images * pieces; ++item) run(item, from, to);
    });
  });
  return zoo::kOk;
} ZOO_CATCH
