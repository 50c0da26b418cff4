// Pointwise convolution with a packed W [out channels, in channels] (csr or rows4, see packed.hpp) on channel-major
// maps: y[image, o, :] = bias[o] + sum of w[o, c] * x[image, c, :].
//
// A map is taken in pieces. The piece of x is first copied together, channel after channel: in the map itself each
// channel lies on a memory page of its own, and every kept weight would wait for another page to be looked up. Then a
// tile of its pixels stays in registers while the kept weights of an output channel (or of four) pass by. Tiles are of
// 8, 4, 2 or 1 vectors (2 or 1 for four channels at a time); the last one is moved back so that it ends with the piece,
// and overlaps the one before: 7 x 7 maps need no scalar tail.
#include "zoo/export.hpp"
#include "zoo/packed.hpp"
#include "zoo/parallel.hpp"

namespace zoo {
namespace {

constexpr int64_t kPiece = 64;   // pixels of a piece of a map, a multiple of eight vectors
constexpr int64_t kRowCost = 4;  // what an empty row costs, in entries, for an even split among threads

template <class T>
struct Job {
  Packed<T> w;
  const float* bias;
  const float* x;  // a piece of one image, [channels, pixels]
  float* y;        // the same piece of the result, in a map of `ldy` pixels
  int64_t pixels, ldy;
  bool relu;
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
    for (int v = 0; v < V; ++v) store(job.y + row * job.ldy + pixel + v * kLanes, job.relu ? relu(acc[v]) : acc[v]);
  }
}

// One block of four channels, V vectors of pixels; x: those pixels alone, channel after channel.
template <int V, class T>
ZOO_INLINE void rows4_tile(const Job<T>& job, const float* x, int64_t pixel, int64_t block) {
  const Packed<T>& w = job.w;
  const int64_t block_rows = (w.rows + 3) / 4, valid = std::min<int64_t>(4, w.rows - 4 * block);
  vf acc[4][V];
  for (int64_t r = 0; r < 4; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = splat(job.bias != nullptr && r < valid ? job.bias[4 * block + r] : 0.0f);
  for (int64_t p = 0; p < w.panels(); ++p) {
    const int64_t segment = p * block_rows + block, first = w.pointer[segment];
    accumulate_rows4<V>(w.values + 4 * first, static_cast<const uint16_t*>(w.index) + first,
                        w.pointer[segment + 1] - first, x + p * w.panel * V * kLanes, V * kLanes, acc);
  }
  for (int64_t r = 0; r < valid; ++r)
    for (int v = 0; v < V; ++v)
      store(job.y + (4 * block + r) * job.ldy + pixel + v * kLanes, job.relu ? relu(acc[r][v]) : acc[r][v]);
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

// All pixels of a piece for rows [from, to); pixels >= kLanes.
template <class T>
void piece_rows(const Job<T>& job, int64_t from, int64_t to) {
  for (int64_t pixel = 0; pixel < job.pixels;) {
    const int64_t vectors = next_tile(job.pixels, 8, &pixel);
    if (vectors == 8) rows_tile<8>(job, pixel, from, to);
    else if (vectors == 4) rows_tile<4>(job, pixel, from, to);
    else if (vectors == 2) rows_tile<2>(job, pixel, from, to);
    else rows_tile<1>(job, pixel, from, to);
    pixel += vectors * kLanes;
  }
}

// Tiles of a piece for blocks of four channels: pixels [pixel, pixel + vectors * kLanes).
struct Tile {
  int64_t pixel, vectors;
  float* x;
};

// The same for blocks of four rows. x is copied tile by tile: a tile of a piece that is kept channel after channel
// would lie in a quarter of the first-level cache only. Where all tiles fit into that cache, a block meets them one
// after the other; else a tile stays while as many weights pass by as the second-level cache holds.
template <class T>
void piece_blocks(const Job<T>& job, const float* map, int64_t map_pixels, float* memory, int64_t from, int64_t to) {
  constexpr int64_t kFirstLevel = 32 << 10, kWeights = 96 << 10, kMostTiles = kPiece / kLanes + 1;
  const Packed<T>& w = job.w;
  Tile tiles[kMostTiles];
  int64_t count = 0;
  for (int64_t pixel = 0; pixel < job.pixels; ++count) {
    const int64_t vectors = next_tile(job.pixels, 2, &pixel);
    tiles[count] = {pixel, vectors, memory};
    memory += w.cols * vectors * kLanes;
    pixel += vectors * kLanes;
  }
  for (int64_t c = 0; c < w.cols; ++c)
    for (int64_t t = 0; t < count; ++t)
      for (int64_t v = 0; v < tiles[t].vectors; ++v)
        store(tiles[t].x + (c * tiles[t].vectors + v) * kLanes,
              load(map + c * map_pixels + tiles[t].pixel + v * kLanes));
  const int64_t block_bytes = (w.pointer[w.panels() * ((w.rows + 3) / 4)] * 18) / ((w.rows + 3) / 4) + 1;
  const bool fits = w.cols * job.pixels * static_cast<int64_t>(sizeof(float)) <= kFirstLevel;
  const int64_t step = fits ? 1 : std::max<int64_t>(1, kWeights / block_bytes);
  for (int64_t first = from; first < to; first += step)
    for (int64_t t = 0; t < count; ++t)
      for (int64_t block = first; block < std::min(to, first + step); ++block) {
        if (tiles[t].vectors == 2) rows4_tile<2>(job, tiles[t].x, tiles[t].pixel, block);
        else rows4_tile<1>(job, tiles[t].x, tiles[t].pixel, block);
      }
}

// Piece `number` of the map x [cols, pixels], for rows [from, to) of y [rows, pixels].
template <class T>
void run_piece(const Packed<T>& w, bool blocks, bool relu, const float* bias, const float* x, float* y,
               int64_t pixels, int64_t number, int64_t from, int64_t to) {
  int64_t start = number * kPiece;
  const int64_t width = std::min(std::max<int64_t>(kLanes, pixels - start), kPiece);
  start = std::min(start, pixels - width);
  float* piece = scratch_of<float>(w.cols * (width + 2 * kLanes), 0);  // the last tile may overlap the one before
  const Job<T> job{w, bias, piece, y + start, width, pixels, relu};
  if (blocks) {
    piece_blocks(job, x + start, pixels, piece, from, to);
    return;
  }
  for (int64_t c = 0; c < w.cols; ++c)
    std::memcpy(piece + c * width, x + c * pixels + start, static_cast<size_t>(width) * sizeof(float));
  piece_rows(job, from, to);
}

}  // namespace
}  // namespace zoo

// x [images, cols, pixels] and y [images, rows, pixels] float, contiguous; pixels >= 16; bias [rows] or null; W of
// layout csr or rows4, values of `type`; relu: negative results become zero.
ZOO_EXPORT void zoo_sparse_conv1x1(const float* x, const void* values, const void* index, const int32_t* pointer,
                                   const float* bias, float* y, int64_t images, int64_t pixels, int64_t rows,
                                   int64_t cols, int64_t panel, int64_t layout, int64_t type, int64_t relu,
                                   int64_t threads) {
  const bool blocks = layout == zoo::kRows4;
  const int64_t segment_rows = blocks ? (rows + 3) / 4 : rows;
  const int64_t pieces = (pixels + zoo::kPiece - 1) / zoo::kPiece;
  zoo::with_type(type, [&](auto tag) {
    using T = decltype(tag);
    const zoo::Packed<T> w{static_cast<const T*>(values), index, pointer, rows, cols, panel, 1};
    const auto run = [&](int64_t item, int64_t from, int64_t to) {
      const int64_t image = item / pieces;
      zoo::run_piece(w, blocks, relu != 0, bias, x + image * cols * pixels, y + image * rows * pixels, pixels,
                     item % pieces, from, to);
    };
    threads = zoo::worthwhile(threads, pointer[w.panels() * segment_rows] * images * (pixels / zoo::kLanes));
    // Few pieces are shared by rows; each thread then copies them for itself.
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
}
