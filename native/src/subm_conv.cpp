// Convolutions and pooling over pair lists (see rulebook.cpp): y[target] += x[source] * W[offset] for every pair.
//
// Gather-GEMM-scatter turned around: a tile of output rows belongs to one thread, which goes through its pairs offset
// by offset and multiplies groups of six gathered rows with a panel of the weights, the sums of 6 x 2 vectors staying
// in registers over all input channels. Nothing is scattered by two threads, no product is stored, and every output
// sums in the order of (offset, channel), whatever the number of threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "zoo/export.hpp"
#include "zoo/lanes.hpp"
#include "zoo/parallel.hpp"

namespace zoo {
namespace {

constexpr int kRows = 6;     // 6 x 2 sums, 2 of the weights and 1 of the input: 15 of 16 AVX2 registers
constexpr int kVectors = 2;

template <class T>
constexpr int64_t kPanel = kVectors * Lanes<T>::kCount;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Pairs grouped by (tile, offset); tile t holds the targets t * tile ... (t + 1) * tile.
struct Pairs {
  const int32_t* source;
  const int32_t* target;
  const int64_t* start;
  int64_t targets, offsets, tile;

  int64_t tiles() const { return (targets + tile - 1) / tile; }
};

// run(tile) for all tiles; whoever is free takes the next.
template <class Run>
void for_tiles(const Pairs& pairs, int64_t threads, Run&& run) {
  const int64_t tiles = pairs.tiles();
  std::atomic<int64_t> next{0};
  parallel_for(std::min(tiles, threads), threads, [&](int64_t, int64_t) {
    for (int64_t t = next++; t < tiles; t = next++) run(t);
  });
}

// Weights W[out, offset, in] as panels P[offset, panel of columns, depth, kPanel columns], zero-padded. Forward the
// columns are output channels and the depth input channels; transposed it is the other way round.
template <class T>
std::vector<T> pack(const T* weight, int64_t out, int64_t offsets, int64_t in, bool transposed, bool flipped,
                    int64_t threads) {
  const int64_t cols = transposed ? in : out, depth = transposed ? out : in;
  const int64_t panels = round_up(cols, kPanel<T>) / kPanel<T>;
  std::vector<T> packed(static_cast<size_t>(offsets * panels * depth * kPanel<T>), T(0));
  parallel_for(offsets * panels, threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t k = p / panels, first = p % panels * kPanel<T>;
      const int64_t offset = flipped ? offsets - 1 - k : k;
      const int64_t width = std::min(kPanel<T>, cols - first);
      T* to = packed.data() + p * depth * kPanel<T>;
      for (int64_t j = 0; j < width; ++j) {
        for (int64_t c = 0; c < depth; ++c) {
          const int64_t o = transposed ? c : first + j, i = transposed ? first + j : c;
          to[c * kPanel<T> + j] = weight[(o * offsets + offset) * in + i];
        }
      }
    }
  });
  return packed;
}

// sums[r][0 .. panel) += sum over c of rows[r][c] * panel[c][0 .. panel).
template <int R, class T>
inline void multiply_group(const T* const* rows, const T* panel, int64_t depth, T* const* sums, int64_t column) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t lanes = Lanes<T>::kCount;
  Vec acc[R][kVectors];
  const T* x[R];
  for (int r = 0; r < R; ++r) {
    x[r] = rows[r];
    for (int v = 0; v < kVectors; ++v) acc[r][v] = load_vec(sums[r] + column + v * lanes);
  }
  for (int64_t c = 0; c < depth; ++c) {
    Vec w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = load_vec(panel + c * kPanel<T> + v * lanes);
    for (int r = 0; r < R; ++r) {
      const Vec value = splat_vec<T>(x[r][c]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] += value * w[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) store_vec(sums[r] + column + v * lanes, acc[r][v]);
}

template <class T>
void multiply_rows(int64_t count, const T* const* rows, const T* panel, int64_t depth, T* const* sums, int64_t column) {
  switch (count) {
    case 6: multiply_group<6>(rows, panel, depth, sums, column); break;
    case 5: multiply_group<5>(rows, panel, depth, sums, column); break;
    case 4: multiply_group<4>(rows, panel, depth, sums, column); break;
    case 3: multiply_group<3>(rows, panel, depth, sums, column); break;
    case 2: multiply_group<2>(rows, panel, depth, sums, column); break;
    default: multiply_group<1>(rows, panel, depth, sums, column); break;
  }
}

// y[target, cols] = bias + sum over pairs of x[source, depth] * W.
template <class T>
void convolve(const Pairs& pairs, const T* x, const T* weight, const T* bias, int64_t out, int64_t in,
              bool transposed, bool flipped, T* y, int64_t threads) {
  const int64_t cols = transposed ? in : out, depth = transposed ? out : in;
  const int64_t padded = round_up(cols, kPanel<T>);
  const std::vector<T> packed = pack(weight, out, pairs.offsets, in, transposed, flipped, threads);
  for_tiles(pairs, threads, [&](int64_t t) {
    const int64_t first = t * pairs.tile, last = std::min(pairs.targets, first + pairs.tile);
    // Whole panels are summed in place; else in a buffer with room for the zero columns.
    T* const sums = padded == cols ? y + first * cols : scratch_of<T>((last - first) * padded, 0);
    for (int64_t row = 0; row < last - first; ++row) {
      if (bias != nullptr) std::copy_n(bias, cols, sums + row * padded);
      else std::fill_n(sums + row * padded, cols, T(0));
      std::fill(sums + row * padded + cols, sums + (row + 1) * padded, T(0));
    }
    for (int64_t k = 0; k < pairs.offsets; ++k) {
      const int64_t begin = pairs.start[t * pairs.offsets + k], end = pairs.start[t * pairs.offsets + k + 1];
      for (int64_t column = 0; column < padded; column += kPanel<T>) {
        const T* panel = packed.data() + (k * padded + column) * depth;
        for (int64_t p = begin; p < end; p += kRows) {
          const int64_t count = std::min<int64_t>(kRows, end - p);
          const T* rows[kRows];
          T* to[kRows];
          for (int64_t r = 0; r < count; ++r) {
            rows[r] = x + pairs.source[p + r] * depth;
            to[r] = sums + (pairs.target[p + r] - first) * padded;
          }
          multiply_rows(count, rows, panel, depth, to, column);
        }
      }
    }
    if (padded != cols)
      for (int64_t row = 0; row < last - first; ++row) std::copy_n(sums + row * padded, cols, y + (first + row) * cols);
  });
}

// sums[o][0 .. panel) += sum over pairs of grads[p][o] * rows[p][column ...], for R output channels at once.
template <int R, class T>
inline void weight_group(int64_t count, const T* const* grads, const T* const* rows, int64_t column, T* sums,
                         int64_t stride) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t lanes = Lanes<T>::kCount;
  Vec acc[R][kVectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) acc[r][v] = load_vec(sums + r * stride + v * lanes);
  for (int64_t p = 0; p < count; ++p) {
    Vec value[kVectors];
    for (int v = 0; v < kVectors; ++v) value[v] = load_vec(rows[p] + column + v * lanes);
    for (int r = 0; r < R; ++r) {
      const Vec grad = splat_vec<T>(grads[p][r]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] += grad * value[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) store_vec(sums + r * stride + v * lanes, acc[r][v]);
}

// The rows that one segment of pairs multiplies: of the gradient (from an output channel on) and of the input. Input
// columns beyond the last whole panel are copied to where a whole panel may be read.
template <class T>
struct Gathered {
  std::vector<const T*> grads, rows, tail_rows;
  std::vector<T> tails;

  void gather(const Pairs& pairs, int64_t segment, const T* x, const T* grad, int64_t out, int64_t in) {
    const int64_t begin = pairs.start[segment], count = pairs.start[segment + 1] - begin;
    const int64_t whole = in / kPanel<T> * kPanel<T>;
    rows.resize(count);
    grads.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = x + pairs.source[begin + i] * in;
      grads[i] = grad + pairs.target[begin + i] * out;
    }
    if (whole == in) return;
    tails.assign(count * kPanel<T>, T(0));
    tail_rows.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      std::copy(rows[i] + whole, rows[i] + in, tails.data() + i * kPanel<T>);
      tail_rows[i] = tails.data() + i * kPanel<T> - whole;
    }
  }

  void advance(int64_t channels) {
    for (auto& g : grads) g += channels;
  }
};

// grad_weight[o, k, i] = sum over pairs of offset k of grad[target, o] * x[source, i]. A thread owns some blocks of
// output channels at some offsets. It goes through the tiles once, so that their rows stay in the cache for all of
// its offsets, and sums in the order of the tiles.
template <class T>
void convolve_grad_weight(const Pairs& pairs, const T* x, const T* grad, int64_t out, int64_t in, T* grad_weight,
                          int64_t threads) {
  constexpr int64_t kBlock = 4 * kRows;
  const int64_t padded = round_up(in, kPanel<T>), whole = in / kPanel<T> * kPanel<T>;
  const int64_t units = (out + kBlock - 1) / kBlock * pairs.offsets;  // unit: block * offsets + offset
  std::vector<int64_t> work(units + 1, 0);
  for (int64_t t = 0; t < pairs.tiles(); ++t)
    for (int64_t k = 0; k < pairs.offsets; ++k)
      work[k + 1] += pairs.start[t * pairs.offsets + k + 1] - pairs.start[t * pairs.offsets + k];
  for (int64_t u = pairs.offsets; u < units; ++u) work[u + 1] = work[u + 1 - pairs.offsets];
  for (int64_t u = 0; u < units; ++u) work[u + 1] += work[u];
  parallel_rows(work.data(), units, 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<T> sums((end - begin) * kBlock * padded, T(0));
    Gathered<T> gathered;
    for (int64_t t = 0; t < pairs.tiles(); ++t) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t first = unit / pairs.offsets * kBlock, width = std::min(kBlock, out - first);
        const int64_t segment = t * pairs.offsets + unit % pairs.offsets;
        const int64_t count = pairs.start[segment + 1] - pairs.start[segment];
        if (count == 0) continue;
        gathered.gather(pairs, segment, x, grad + first, out, in);
        for (int64_t o = 0; o < width; o += kRows) {
          const int64_t channels = std::min<int64_t>(kRows, width - o);
          const T* const* grads = gathered.grads.data();
          for (int64_t column = 0; column < padded; column += kPanel<T>) {
            const T* const* from = (column < whole ? gathered.rows : gathered.tail_rows).data();
            T* to = sums.data() + ((unit - begin) * kBlock + o) * padded + column;
            switch (channels) {
              case 6: weight_group<6>(count, grads, from, column, to, padded); break;
              case 5: weight_group<5>(count, grads, from, column, to, padded); break;
              case 4: weight_group<4>(count, grads, from, column, to, padded); break;
              case 3: weight_group<3>(count, grads, from, column, to, padded); break;
              case 2: weight_group<2>(count, grads, from, column, to, padded); break;
              default: weight_group<1>(count, grads, from, column, to, padded); break;
            }
          }
          gathered.advance(channels);
        }
      }
    }
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit / pairs.offsets * kBlock, k = unit % pairs.offsets;
      for (int64_t o = 0; o < std::min(kBlock, out - first); ++o)
        std::copy_n(sums.data() + ((unit - begin) * kBlock + o) * padded, in,
                    grad_weight + ((first + o) * pairs.offsets + k) * in);
    }
  });
}

// Depthwise: W[offset, channel].
template <class T>
void depthwise(const Pairs& pairs, const T* x, const T* weight, const T* bias, int64_t channels, bool flipped, T* y,
               int64_t threads) {
  for_tiles(pairs, threads, [&](int64_t t) {
    const int64_t first = t * pairs.tile, last = std::min(pairs.targets, first + pairs.tile);
    for (int64_t row = first; row < last; ++row) {
      if (bias != nullptr) std::copy_n(bias, channels, y + row * channels);
      else std::fill_n(y + row * channels, channels, T(0));
    }
    for (int64_t k = 0; k < pairs.offsets; ++k) {
      const T* w = weight + (flipped ? pairs.offsets - 1 - k : k) * channels;
      for (int64_t p = pairs.start[t * pairs.offsets + k]; p < pairs.start[t * pairs.offsets + k + 1]; ++p) {
        const T* from = x + pairs.source[p] * channels;
        T* to = y + pairs.target[p] * channels;
        for (int64_t c = 0; c < channels; ++c) to[c] += w[c] * from[c];
      }
    }
  });
}

template <class T>
void depthwise_grad_weight(const Pairs& pairs, const T* x, const T* grad, int64_t channels, T* grad_weight,
                           int64_t threads) {
  parallel_for(pairs.offsets, threads, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      T* sums = grad_weight + k * channels;
      std::fill_n(sums, channels, T(0));
      for (int64_t t = 0; t < pairs.tiles(); ++t) {
        for (int64_t p = pairs.start[t * pairs.offsets + k]; p < pairs.start[t * pairs.offsets + k + 1]; ++p) {
          const T* from = x + pairs.source[p] * channels;
          const T* flow = grad + pairs.target[p] * channels;
          for (int64_t c = 0; c < channels; ++c) sums[c] += flow[c] * from[c];
        }
      }
    }
  });
}

// Largest value per channel and the source row that has it; the first offset wins a tie, a NaN is largest.
template <class T>
void max_pool(const Pairs& pairs, const T* x, int64_t channels, T* y, int32_t* arg, int64_t threads) {
  for_tiles(pairs, threads, [&](int64_t t) {
    const int64_t first = t * pairs.tile, last = std::min(pairs.targets, first + pairs.tile);
    std::fill(y + first * channels, y + last * channels, T(0));
    std::fill(arg + first * channels, arg + last * channels, -1);
    for (int64_t k = 0; k < pairs.offsets; ++k) {
      for (int64_t p = pairs.start[t * pairs.offsets + k]; p < pairs.start[t * pairs.offsets + k + 1]; ++p) {
        const T* from = x + pairs.source[p] * channels;
        T* to = y + pairs.target[p] * channels;
        int32_t* at = arg + pairs.target[p] * channels;
        for (int64_t c = 0; c < channels; ++c) {
          const bool take = at[c] < 0 || from[c] > to[c] || (from[c] != from[c] && to[c] == to[c]);
          to[c] = take ? from[c] : to[c];
          at[c] = take ? pairs.source[p] : at[c];
        }
      }
    }
  });
}

// `pairs` of the opposite direction: sources are outputs of the pooling, targets its inputs.
template <class T>
void max_pool_grad(const Pairs& pairs, const T* grad, const int32_t* arg, int64_t channels, T* grad_x,
                   int64_t threads) {
  for_tiles(pairs, threads, [&](int64_t t) {
    const int64_t first = t * pairs.tile, last = std::min(pairs.targets, first + pairs.tile);
    std::fill(grad_x + first * channels, grad_x + last * channels, T(0));
    for (int64_t p = pairs.start[t * pairs.offsets]; p < pairs.start[(t + 1) * pairs.offsets]; ++p) {
      const T* flow = grad + pairs.source[p] * channels;
      const int32_t* at = arg + pairs.source[p] * channels;
      T* to = grad_x + pairs.target[p] * channels;
      for (int64_t c = 0; c < channels; ++c) to[c] += at[c] == pairs.target[p] ? flow[c] : T(0);
    }
  });
}

template <class Op>
void typed(int64_t bytes, Op&& op) {
  if (bytes == 4) op(float());
  else op(double());
}

}  // namespace
}  // namespace zoo

using namespace zoo;

// weight [out, offsets, in]. transposed: y has `in` channels and x has `out`, the gradient for the input; flipped: the
// offsets count backwards, as they do when the pairs of a submanifold convolution are read the other way round.
ZOO_EXPORT int64_t zoo_sparse_conv(const int32_t* source, const int32_t* target, const int64_t* start, const void* x,
                                const void* weight, const void* bias, void* y, int64_t targets, int64_t offsets,
                                int64_t tile, int64_t out, int64_t in, int64_t transposed, int64_t flipped,
                                int64_t bytes, int64_t threads) try {
  typed(bytes, [&](auto value) {
    using T = decltype(value);
    convolve(Pairs{source, target, start, targets, offsets, tile}, static_cast<const T*>(x),
             static_cast<const T*>(weight), static_cast<const T*>(bias), out, in, transposed != 0, flipped != 0,
             static_cast<T*>(y), threads);
  });
  return zoo::kOk;
} ZOO_CATCH

ZOO_EXPORT int64_t zoo_sparse_conv_grad_weight(const int32_t* source, const int32_t* target, const int64_t* start,
                                            const void* x, const void* grad, void* grad_weight, int64_t targets,
                                            int64_t offsets, int64_t tile, int64_t out, int64_t in, int64_t bytes,
                                            int64_t threads) try {
  typed(bytes, [&](auto value) {
    using T = decltype(value);
    convolve_grad_weight(Pairs{source, target, start, targets, offsets, tile}, static_cast<const T*>(x),
                         static_cast<const T*>(grad), out, in, static_cast<T*>(grad_weight), threads);
  });
  return zoo::kOk;
} ZOO_CATCH

// weight [offsets, channels].
ZOO_EXPORT int64_t zoo_sparse_depthwise(const int32_t* source, const int32_t* target, const int64_t* start, const void* x,
                                     const void* weight, const void* bias, void* y, int64_t targets, int64_t offsets,
                                     int64_t tile, int64_t channels, int64_t flipped, int64_t bytes, int64_t threads) try {
  typed(bytes, [&](auto value) {
    using T = decltype(value);
    depthwise(Pairs{source, target, start, targets, offsets, tile}, static_cast<const T*>(x),
              static_cast<const T*>(weight), static_cast<const T*>(bias), channels, flipped != 0, static_cast<T*>(y),
              threads);
  });
  return zoo::kOk;
} ZOO_CATCH

ZOO_EXPORT int64_t zoo_sparse_depthwise_grad_weight(const int32_t* source, const int32_t* target, const int64_t* start,
                                                 const void* x, const void* grad, void* grad_weight, int64_t targets,
                                                 int64_t offsets, int64_t tile, int64_t channels, int64_t bytes,
                                                 int64_t threads) try {
  typed(bytes, [&](auto value) {
    using T = decltype(value);
    depthwise_grad_weight(Pairs{source, target, start, targets, offsets, tile}, static_cast<const T*>(x),
                          static_cast<const T*>(grad), channels, static_cast<T*>(grad_weight), threads);
  });
  return zoo::kOk;
} ZOO_CATCH

ZOO_EXPORT int64_t zoo_sparse_max_pool(const int32_t* source, const int32_t* target, const int64_t* start, const void* x,
                                    void* y, int32_t* arg, int64_t targets, int64_t offsets, int64_t tile,
                                    int64_t channels, int64_t bytes, int64_t threads) try {
  typed(bytes, [&](auto value) {
    using T = decltype(value);
    max_pool(Pairs{source, target, start, targets, offsets, tile}, static_cast<const T*>(x), channels,
             static_cast<T*>(y), arg, threads);
  });
  return zoo::kOk;
} ZOO_CATCH

ZOO_EXPORT int64_t zoo_sparse_max_pool_grad(const int32_t* source, const int32_t* target, const int64_t* start,
                                         const void* grad, const int32_t* arg, void* grad_x, int64_t targets,
                                         int64_t offsets, int64_t tile, int64_t channels, int64_t bytes,
                                         int64_t threads) try {
  typed(bytes, [&](auto value) {
    using T = decltype(value);
    max_pool_grad(Pairs{source, target, start, targets, offsets, tile}, static_cast<const T*>(grad), arg, channels,
                  static_cast<T*>(grad_x), threads);
  });
  return zoo::kOk;
} ZOO_CATCH
