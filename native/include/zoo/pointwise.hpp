// The product of a packed W [out channels, in channels] (csr or rows4, see packed.hpp) with channel-major maps, which
// sparse_conv1x1 and separable_conv share.
//
// A map is taken in pieces of kPieceVectors vectors at most. Their pixels are first copied together, channel after channel:
// in the map itself each channel lies on a memory page of its own, and every kept weight would wait for another page to
// be looked up. Then the sums of the piece (for four channels at a time: of a tile of two vectors) stay in registers
// while the kept weights pass by. The last vector of a map is moved back so that it ends with the map, and overlaps the
// one before: 7 x 7 maps need no scalar tail. In narrow panels the part of x that the weights meet stays in the
// first-level cache. Maps of three vectors or more are cut into pieces of three or more, for which a sum is one chain of
// additions: panels of any width then give the same bits.
#pragma once

#include <algorithm>
#include <type_traits>

#include "zoo/packed.hpp"
#include "zoo/parallel.hpp"

namespace zoo {
namespace pointwise {

constexpr int kMostOfBlocks = 2;             // vectors of a tile of it for four channels, whose sums fill the registers
constexpr int64_t kFirstLevel = 32 << 10, kWeights = 96 << 10;  // bytes of x and of weights that stay in the caches
constexpr int64_t kRowCost = 4;  // what an empty row costs, in entries, for an even split among threads

template <class T>
struct Job {
  Packed<T> w;
  const float *bias, *residual;
  float* y;
  int64_t pixels, panels, activation;
  int64_t x_step, y_step;  // floats from channel to channel, of x, and of y and the residual
  int64_t first;           // the channel that y begins with
};

// Some vectors of the pixels of a map, one after the other.
struct Tile {
  int64_t pixel, vectors, last;  // the first pixel of the first and of the last vector, which may be moved back
  float* x;                      // the pixels, channel after channel

  template <int V>
  ZOO_INLINE int64_t at(int v) const {
    return v + 1 < V ? pixel + v * kLanes : last;
  }
};

// Where the sums of a tile come from and go to on their way through the panels of W: they begin with the bias, lie in
// `memory` (`step` floats per row, the first for row `first`) between two panels, and end in y. One panel needs no memory.
struct Sums {
  int64_t panel;
  float* memory;
  int64_t step, first;

  ZOO_INLINE float* of(int64_t row) const { return memory == nullptr ? nullptr : memory + (row - first) * step; }
};

// Stores the sums of a channel in a tile.
template <int V, class T>
ZOO_INLINE void finish(const Job<T>& job, const Tile& tile, int64_t row, const vf* acc) {
  const int64_t at = (row - job.first) * job.y_step;
  for (int v = 0; v < V; ++v) {
    const int64_t place = at + tile.at<V>(v);
    const vf sum = job.residual != nullptr ? add(acc[v], load(job.residual + place)) : acc[v];
    store(job.y + place, activated(sum, job.activation));
  }
}

// A panel of channels [from, to), V vectors of pixels; x: those pixels of the panel's columns, channel after channel.
template <int V, class T>
void rows_tile(const Job<T>& job, const Tile& tile, const float* x, const Sums& sums, int64_t from, int64_t to) {
  const Packed<T>& w = job.w;
  const bool starts = sums.panel == 0, ends = sums.panel + 1 == job.panels;
  for (int64_t row = from; row < to; ++row) {
    float* sum = sums.of(row);
    vf acc[V];
    for (int v = 0; v < V; ++v)
      acc[v] = starts ? splat(job.bias != nullptr ? job.bias[row] : 0.0f) : load(sum + v * kLanes);
    const int64_t segment = sums.panel * w.rows + row, first = w.pointer[segment];
    accumulate_row<V>(w.values + first, static_cast<const uint16_t*>(w.index) + first, w.pointer[segment + 1] - first,
                      x, V * kLanes, acc);
    if (ends) finish<V>(job, tile, row, acc);
    else
      for (int v = 0; v < V; ++v) store(sum + v * kLanes, acc[v]);
  }
}

// The same for a block of four channels; kCount: its entries where they are known.
template <int V, int kCount, class T>
ZOO_INLINE void block_tile(const Job<T>& job, const Tile& tile, const float* x, const Sums& sums, int64_t block) {
  const Packed<T>& w = job.w;
  const bool starts = sums.panel == 0, ends = sums.panel + 1 == job.panels;
  const int64_t valid = ends ? std::min<int64_t>(4, w.rows - 4 * block) : 4;
  float* sum = sums.of(4 * block);
  vf acc[4][V];
  for (int64_t r = 0; r < 4; ++r)
    for (int v = 0; v < V; ++v) {
      const bool biased = job.bias != nullptr && 4 * block + r < w.rows;
      acc[r][v] = starts ? splat(biased ? job.bias[4 * block + r] : 0.0f) : load(sum + r * sums.step + v * kLanes);
    }
  const int64_t segment = sums.panel * ((w.rows + 3) / 4) + block, first = w.pointer[segment];
  accumulate_rows4<V>(w.values + 4 * first, static_cast<const uint16_t*>(w.index) + first,
                      kCount >= 0 ? kCount : w.pointer[segment + 1] - first, x, V * kLanes, acc);
  for (int64_t r = 0; r < valid; ++r) {
    if (ends) finish<V>(job, tile, 4 * block + r, acc[r]);
    else
      for (int v = 0; v < V; ++v) store(sum + r * sums.step + v * kLanes, acc[r][v]);
  }
}

template <int V, class T>
void blocks_tile(const Job<T>& job, const Tile& tile, const float* x, const Sums& sums, int64_t from, int64_t to) {
  for (int64_t block = from; block < to; ++block) block_tile<V, -1>(job, tile, x, sums, block);
}

// All tiles of a piece for blocks [from, to) of four channels, of one panel. How many entries a block has is hard to
// guess, so it is asked once for all tiles.
template <class T>
void blocks_by_count(const Job<T>& job, const Tile* tiles, int64_t count, int64_t from, int64_t to) {
  for (int64_t block = from; block < to; ++block) {
    const auto all = [&](auto entries) {
      constexpr int kCount = decltype(entries)::value;
      for (const Tile* tile = tiles; tile < tiles + count; ++tile) {
        const Sums sums{0, nullptr, 0, 0};
        if (tile->vectors == 2) block_tile<2, kCount>(job, *tile, tile->x, sums, block);
        else block_tile<1, kCount>(job, *tile, tile->x, sums, block);
      }
    };
    switch (job.w.pointer[block + 1] - job.w.pointer[block]) {
      case 0: all(std::integral_constant<int, 0>{}); break;
      case 1: all(std::integral_constant<int, 1>{}); break;
      case 2: all(std::integral_constant<int, 2>{}); break;
      case 3: all(std::integral_constant<int, 3>{}); break;
      case 4: all(std::integral_constant<int, 4>{}); break;
      default: all(std::integral_constant<int, -1>{});
    }
  }
}

inline int64_t vectors_of(int64_t pixels) { return (pixels + kLanes - 1) / kLanes; }
inline int64_t pieces_of(int64_t pixels) { return (vectors_of(pixels) + kPieceVectors - 1) / kPieceVectors; }

// Piece `number` of the map x [cols, pixels], whose channels lie x_step apart, for rows [from, to) (blocks of four rows where `blocks`). Where all tiles of
// x fit into the first-level cache, a block meets them one after the other; else a tile stays while as many weights pass
// by as the second-level cache holds.
template <class T>
void run_piece(const Job<T>& job, bool blocks, const float* map, int64_t number, int64_t from, int64_t to) {
  const Packed<T>& w = job.w;
  const int64_t vectors = vectors_of(job.pixels), pieces = pieces_of(job.pixels);
  const int64_t start = vectors * number / pieces, held = vectors * (number + 1) / pieces - start;
  const int64_t most = blocks ? kMostOfBlocks : kPieceVectors, count = (held + most - 1) / most;
  float* memory = scratch_of<float>(w.cols * held * kLanes, 0);
  Tile tiles[(kPieceVectors + 1) / kMostOfBlocks];
  for (int64_t t = 0; t < count; ++t) {
    const int64_t begin = start + held * t / count, end = start + held * (t + 1) / count;
    tiles[t] = {begin * kLanes, end - begin, std::min((end - 1) * kLanes, job.pixels - kLanes), memory};
    memory += w.cols * (end - begin) * kLanes;
  }
  for (int64_t c = 0; c < w.cols; ++c)
    for (int64_t t = 0; t < count; ++t) {
      const Tile& tile = tiles[t];
      float* x = tile.x + c * tile.vectors * kLanes;
      for (int64_t v = 0; v + 1 < tile.vectors; ++v)
        store(x + v * kLanes, load(map + c * job.x_step + tile.pixel + v * kLanes));
      store(x + (tile.vectors - 1) * kLanes, load(map + c * job.x_step + tile.last));
    }
  const int64_t segment_rows = blocks ? (w.rows + 3) / 4 : w.rows;
  const int64_t entry_bytes = (blocks ? 4 : 1) * static_cast<int64_t>(sizeof(T)) + 2;
  const int64_t row_bytes = w.pointer[job.panels * segment_rows] * entry_bytes / segment_rows + 1;
  const bool fits = w.cols * held * kLanes * static_cast<int64_t>(sizeof(float)) <= kFirstLevel;
  if (blocks && fits && job.panels == 1) return blocks_by_count(job, tiles, count, from, to);
  const int64_t step = count == 1 && job.panels == 1 ? to - from : std::max<int64_t>(1, kWeights / row_bytes);
  const int64_t most_sums = std::min(step, to - from) * (blocks ? 4 : 1) * most * kLanes;
  float* memory_of_sums = job.panels > 1 ? scratch_of<float>(most_sums, 1) : nullptr;
  for (int64_t first = from; first < to; first += step)
    for (int64_t t = 0; t < count; ++t)
      for (int64_t panel = 0; panel < job.panels; ++panel) {
        const Tile& tile = tiles[t];
        const int64_t last = std::min(to, first + step);
        const float* x = tile.x + panel * w.panel * tile.vectors * kLanes;
        const Sums sums{panel, memory_of_sums, tile.vectors * kLanes, first * (blocks ? 4 : 1)};
        with_vectors(tile.vectors, [&](auto number_of) {
          constexpr int V = decltype(number_of)::value;
          if (!blocks) {
            rows_tile<V>(job, tile, x, sums, first, last);
          } else if constexpr (V <= kMostOfBlocks) {
            blocks_tile<V>(job, tile, x, sums, first, last);
          }
        });
      }
}

}  // namespace pointwise
}  // namespace zoo
