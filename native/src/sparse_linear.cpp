// y = x W^T + bias for a packed W (see packed.hpp), x [batch, cols] and y [batch, rows] in float.
//
// Batch 1 is bound by the bytes of W: csr segments gather x; bitmask segments are expanded in registers, for up to four
// rows of x at a time. A larger batch (csr and blocks) turns x into [cols, tile] panels that stay in the
// caches, so that each kept weight is one broadcast and V fused multiply-adds on a tile of V vectors of the batch.
#include <cmath>

#include "zoo/check.hpp"
#include "zoo/export.hpp"
#include "zoo/parallel.hpp"
#include "zoo/rows.hpp"

namespace zoo {
namespace {

constexpr int64_t kAhead = 2048;    // entries: what is asked for early, as the end of a page stops the processor's own guess
constexpr int64_t kNarrow = 256;    // columns of a panel whose part of a wide tile of x stays in the nearest caches
constexpr int64_t kRowCost = 8;     // what an empty segment costs, in entries, for an even split among threads

ZOO_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

// ---- a few rows of x, no transposition -----------------------------------------------------------------------------

// totals[b] = the sum over a segment of kept weights times row b of xk, which holds the rows of x chunk by chunk: kLanes
// columns of each of the B rows, then the next columns.
// PerByte: kept values of each eight columns where the pattern fixes them (N:M), 0 where the bits must be counted.
// Unless Exact, a number that is not finite may reach a sum to which it does not belong.
template <bool Exact, int PerByte, int B, class T>
ZOO_INLINE void bitmask_segment(const T* values, const uint8_t* bits, int64_t columns, const float* xk, float* totals) {
  constexpr int kChains = B >= 4 ? 1 : 4 / B;
  constexpr int kSteps = 32 / kLanes;  // of a word of mask bits
  vf acc[kChains][B];
  for (int c = 0; c < kChains; ++c)
    for (int b = 0; b < B; ++b) acc[c][b] = zero();
  const auto step = [&](uint32_t key, int chain) {
    const vf weights = Exact ? expand(key, values) : spread(key, values);
    values += PerByte > 0 ? PerByte * kLanes / 8 : __builtin_popcount(key);
    for (int b = 0; b < B; ++b, xk += kLanes) {
      const vf xs = Exact ? load_kept(key >> kKeyShift<T>, xk) : load_beside<T>(key, xk);
      acc[chain][b] = fma(weights, xs, acc[chain][b]);
    }
  };
  uint32_t words[2];
  int64_t k = 0;
  for (; k + 64 <= columns; k += 64) {
    std::memcpy(words, bits + k / 8, 8);
    prefetch(values + kAhead);
    if constexpr (sizeof(T) == 4) prefetch(values + kAhead + 16);  // up to 64 kept values, on average two lines
    if (k % 512 == 0) prefetch(bits + k / 8 + kAhead);
#pragma GCC unroll 8
    for (int s = 0; s < 2 * kSteps; ++s) step(key_at<T>(words[s / kSteps], s % kSteps), s % kChains);
  }
  if (k < columns) std::memcpy(words, bits + k / 8, 8);
  for (int s = 0; k < columns; k += kLanes, ++s) step(key_at<T>(words[s / kSteps], s % kSteps), 0);
  for (int b = 0; b < B; ++b) {
    vf total = acc[0][b];
    for (int c = 1; c < kChains; ++c) total = add(total, acc[c][b]);
    totals[b] = sum(total);
  }
}

template <int PerByte, int B, class T>
void bitmask_rows(const Packed<T>& w, const float* xs, float* y, int64_t from, int64_t to) {
  for (int64_t p = 0; p < w.panels(); ++p) {
    const int64_t columns = std::min(w.panel, w.cols - p * w.panel);
    for (int64_t row = from; row < to; ++row) {
      const int64_t segment = p * w.rows + row;
      const T* values = w.values + w.pointer[segment];
      const uint8_t* bits = static_cast<const uint8_t*>(w.index) + segment * (w.panel / 8);
      const float* xk = xs + p * w.panel * B;
      float totals[B];
      bitmask_segment<false, PerByte, B>(values, bits, columns, xk, totals);
      for (int b = 0; b < B; ++b)
        if (!std::isfinite(totals[b])) {
          bitmask_segment<true, PerByte, B>(values, bits, columns, xk, totals);
          break;
        }
      for (int b = 0; b < B; ++b) y[b * w.rows + row] += totals[b];
    }
  }
}

template <class T>
void csr_vector(const Packed<T>& w, const float* x, float* y, int64_t from, int64_t to) {
  for (int64_t p = 0; p < w.panels(); ++p) {
    const float* xp = x + p * w.panel;
    for (int64_t row = from; row < to; ++row) {
      const int64_t segment = p * w.rows + row;
      const int64_t first = w.pointer[segment], count = w.pointer[segment + 1] - first;
      const T* values = w.values + first;
      const uint16_t* offsets = static_cast<const uint16_t*>(w.index) + first;
      vf sums[2] = {zero(), zero()};
      int64_t j = 0;
      for (; j + 2 * kLanes <= count; j += 2 * kLanes) {
        prefetch(values + j + kAhead);
        prefetch(offsets + j + kAhead);
        for (int c = 0; c < 2; ++c)
          sums[c] = fma(load(values + j + c * kLanes), gather(xp, offsets + j + c * kLanes), sums[c]);
      }
      if (j + kLanes <= count) {
        sums[0] = fma(load(values + j), gather(xp, offsets + j), sums[0]);
        j += kLanes;
      }
      // What lies behind the segment is cut off on both sides: zero times an infinite x would not be zero.
      if (j < count)
        sums[1] = fma(first_lanes(load(values + j), count - j), first_lanes(gather(xp, offsets + j), count - j),
                      sums[1]);
      y[row] += sum(add(sums[0], sums[1]));
    }
  }
}

template <class T>
void rows4_vector(const Packed<T>& w, const float* x, float* y, int64_t from, int64_t to) {
  const int64_t block_rows = (w.rows + 3) / 4;
  for (int64_t p = 0; p < w.panels(); ++p) {
    const float* xp = x + p * w.panel;
    for (int64_t block = from; block < to; ++block) {
      const int64_t segment = p * block_rows + block;
      const int64_t first = w.pointer[segment], count = w.pointer[segment + 1] - first;
      const T* values = w.values + 4 * first;
      const uint16_t* offsets = static_cast<const uint16_t*>(w.index) + first;
      float acc[4][4] = {};
      int64_t j = 0;
      for (; j + 4 <= count; j += 4)
        for (int i = 0; i < 4; ++i)
          for (int r = 0; r < 4; ++r) acc[i][r] += to_float(values[4 * (j + i) + r]) * xp[offsets[j + i]];
      for (; j < count; ++j)
        for (int r = 0; r < 4; ++r) acc[0][r] += to_float(values[4 * j + r]) * xp[offsets[j]];
      const int64_t valid = std::min<int64_t>(4, w.rows - 4 * block);
      for (int64_t r = 0; r < valid; ++r) y[4 * block + r] += (acc[0][r] + acc[1][r]) + (acc[2][r] + acc[3][r]);
    }
  }
}

template <class T>
void columns_vector(const Packed<T>& w, const float* x, float* y, int64_t from, int64_t to) {
  for (int64_t p = 0; p < w.panels(); ++p) {
    const float* xp = x + p * w.panel;
    for (int64_t row = from; row < to; ++row) {
      const int64_t segment = p * w.rows + row;
      const int64_t first = w.pointer[segment], count = w.pointer[segment + 1] - first;
      const T* values = w.values + w.width * first;
      const uint16_t* offsets = static_cast<const uint16_t*>(w.index) + first;
      float acc[16] = {};
      for (int64_t j = 0; j < count; ++j)
        for (int64_t c = 0; c < w.width; c += 4)
          for (int i = 0; i < 4; ++i)
            acc[(c + i) & 15] += to_float(values[j * w.width + c + i]) * xp[offsets[j] + c + i];
      float total = 0;
      for (float part : acc) total += part;
      y[row] += total;
    }
  }
}

// ---- tiles of a larger batch ---------------------------------------------------------------------------------------

// Adds rows [from, to) (block rows for kRows4) of W times the tile: yt[row * width ...] += W xt, width = V * kLanes.
template <int V, class T>
void tile_rows(const Packed<T>& w, int64_t layout, const float* xt, float* yt, int64_t from, int64_t to) {
  constexpr int64_t width = V * kLanes;
  const int64_t segment_rows = layout == kRows4 ? (w.rows + 3) / 4 : w.rows;
  for (int64_t p = 0; p < w.panels(); ++p) {
    const float* xp = xt + p * w.panel * width;
    for (int64_t row = from; row < to; ++row) {
      const int64_t segment = p * segment_rows + row;
      const int64_t first = w.pointer[segment], count = w.pointer[segment + 1] - first;
      const uint16_t* offsets = static_cast<const uint16_t*>(w.index) + first;
      if (layout == kRows4) {
        constexpr int kPart = V % 2 == 0 ? 2 : 1;  // 4 x 2 sums fill the registers
        for (int v = 0; v < V; v += kPart) {
          vf acc[4][kPart];
          float* out = yt + 4 * row * width + v * kLanes;
          for (int r = 0; r < 4; ++r)
            for (int i = 0; i < kPart; ++i) acc[r][i] = load(out + r * width + i * kLanes);
          accumulate_rows4<kPart>(w.values + 4 * first, offsets, count, xp + v * kLanes, width, acc);
          for (int r = 0; r < 4; ++r)
            for (int i = 0; i < kPart; ++i) store(out + r * width + i * kLanes, acc[r][i]);
        }
        continue;
      }
      vf acc[V];
      float* out = yt + row * width;
      for (int v = 0; v < V; ++v) acc[v] = load(out + v * kLanes);
      if (layout == kColumns) {
        accumulate_columns<V>(w.values + w.width * first, offsets, count, w.width, xp, width, acc);
      } else {
        accumulate_row<V>(w.values + first, offsets, count, xp, width, acc);
      }
      for (int v = 0; v < V; ++v) store(out + v * kLanes, acc[v]);
    }
  }
}

template <class T>
void tile_rows_of(int64_t vectors, const Packed<T>& w, int64_t layout, const float* xt, float* yt, int64_t from,
                  int64_t to) {
  switch (vectors) {
    case 1: return tile_rows<1>(w, layout, xt, yt, from, to);
    case 2: return tile_rows<2>(w, layout, xt, yt, from, to);
    case 4: return tile_rows<4>(w, layout, xt, yt, from, to);
    default: return tile_rows<8>(w, layout, xt, yt, from, to);
  }
}

// Vectors of the tile for `batch` remaining columns. 32 columns times a panel of 4096 are 512 KiB of x, a usual
// second-level cache; 64 columns need narrow panels.
int64_t tile_vectors(int64_t batch, int64_t panel) {
  if (panel <= kNarrow && batch > 48) return 64 / kLanes;
  constexpr int64_t kMost = 32 / kLanes;
  int64_t vectors = 1;
  while (vectors < kMost && vectors * kLanes < batch) vectors *= 2;
  return vectors;
}

template <class T>
void batched(const Packed<T>& w, int64_t layout, int64_t entries, const float* x, const float* bias, float* y,
             int64_t batch, int64_t threads) {
  const int64_t step = layout == kRows4 ? 4 : 1;
  const int64_t segment_rows = (w.rows + step - 1) / step;
  for (int64_t b = 0; b < batch;) {
    const int64_t vectors = tile_vectors(batch - b, w.panel), width = vectors * kLanes;
    const int64_t columns = std::min(width, batch - b);
    float* xt = scratch_of<float>(w.cols * width, 0);
    float* yt = scratch_of<float>(segment_rows * step * width, 1);
    parallel_for(w.cols, threads, [&](int64_t from, int64_t to) {
      transpose_in(x + b * w.cols + from, w.cols, columns, to - from, xt + from * width, width);
    });
    parallel_rows(w.pointer, segment_rows, kRowCost, threads, [&](int64_t from, int64_t to) {
      if (b == 0) check_rows(w, layout, entries, from, to);
      const int64_t last = std::min(to * step, w.rows);
      for (int64_t row = from * step; row < to * step; ++row) {
        const vf start = splat(bias != nullptr && row < last ? bias[row] : 0.0f);
        for (int64_t v = 0; v < vectors; ++v) store(yt + row * width + v * kLanes, start);
      }
      tile_rows_of(vectors, w, layout, xt, yt, from, to);
      transpose_out(yt + from * step * width, width, last - from * step, y + b * w.rows + from * step, w.rows,
                    columns);
    });
    b += columns;
  }
}

// ---- choice of the loop --------------------------------------------------------------------------------------------

template <class T, class Rows>
void direct(const Packed<T>& w, int64_t layout, int64_t entries, const float* bias, float* y, int64_t batch,
            int64_t threads, Rows&& rows) {
  const int64_t step = layout == kRows4 ? 4 : 1;
  parallel_rows(w.pointer, (w.rows + step - 1) / step, kRowCost, threads, [&](int64_t from, int64_t to) {
    check_rows(w, layout, entries, from, to);  // by the thread that reads the index next
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t row = from * step; row < std::min(to * step, w.rows); ++row)
        y[b * w.rows + row] = bias != nullptr ? bias[row] : 0.0f;
    rows(from, to);
  });
}

template <int PerByte, class T>
void bitmask_rows_of(int64_t batch, const Packed<T>& w, const float* xs, float* y, int64_t from, int64_t to) {
  switch (batch) {
    case 1: return bitmask_rows<PerByte, 1>(w, xs, y, from, to);
    case 2: return bitmask_rows<PerByte, 2>(w, xs, y, from, to);
    case 3: return bitmask_rows<PerByte, 3>(w, xs, y, from, to);
    default: return bitmask_rows<PerByte, 4>(w, xs, y, from, to);
  }
}

template <class T>
void bitmask_small(const Packed<T>& w, int64_t entries, const float* x, const float* bias, float* y, int64_t batch,
                   int64_t threads) {
  float* xs = scratch_of<float>((w.cols + 63) / 64 * 64 * batch, 0);
  for (int64_t k = 0; k < (w.cols + 63) / 64 * 64; k += kLanes)
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < kLanes; ++i) xs[k * batch + b * kLanes + i] = k + i < w.cols ? x[b * w.cols + k + i] : 0;
  direct(w, kBitmask, entries, bias, y, batch, threads, [&](int64_t from, int64_t to) {
    switch (w.width) {
      case 2: return bitmask_rows_of<2>(batch, w, xs, y, from, to);
      case 4: return bitmask_rows_of<4>(batch, w, xs, y, from, to);
      default: return bitmask_rows_of<0>(batch, w, xs, y, from, to);
    }
  });
}

template <class T>
void run(const Packed<T>& w, int64_t layout, int64_t entries, const float* x, const float* bias, float* y,
         int64_t batch, int64_t threads) {
  if (layout == kBitmask) return bitmask_small(w, entries, x, bias, y, batch, threads);
  if (batch > 1) return batched(w, layout, entries, x, bias, y, batch, threads);
  direct(w, layout, entries, bias, y, 1, threads, [&](int64_t from, int64_t to) {
    if (layout == kCsr) csr_vector(w, x, y, from, to);
    else if (layout == kRows4) rows4_vector(w, x, y, from, to);
    else columns_vector(w, x, y, from, to);
  });
}

}  // namespace

void multiply_sparse(const float* x, const void* values, const void* index, const int32_t* pointer, const float* bias, float* y,
                     int64_t batch, int64_t entries, int64_t rows, int64_t cols, int64_t panel, int64_t layout, int64_t width,
                     int64_t type, int64_t threads) {
  if (batch == 0 || rows == 0) return;
  with_type(type, [&](auto tag) {
    using T = decltype(tag);
    const Packed<T> w{static_cast<const T*>(values), index, pointer, rows, cols, panel, width};
    check_whole(w, layout, entries);
    const int64_t steps = entries * ((batch + kLanes - 1) / kLanes);
    run(w, layout, entries, x, bias, y, batch, worthwhile(threads, steps));
  });
}

}  // namespace zoo

// x [batch, cols] and y [batch, rows] float, contiguous; bias [rows] or null; values of `type` and csr columns padded by
// kOverread entries; pointer int32 [panels * segment rows + 1], up to `entries` (blocks of block layouts). The bitmask layout takes a batch of 1 to 4; its `width`
// is the kept values per eight columns where an N:M pattern fixes them (2 or 4), otherwise 1.
ZOO_EXPORT int64_t zoo_sparse_linear(const float* x, const void* values, const void* index, const int32_t* pointer,
                                  const float* bias, float* y, int64_t batch, int64_t entries, int64_t rows,
                                     int64_t cols, int64_t panel, int64_t layout, int64_t width, int64_t type,
                                     int64_t threads) try {
  zoo::multiply_sparse(x, values, index, pointer, bias, y, batch, entries, rows, cols, panel, layout, width, type, threads);
  return zoo::kOk;
} ZOO_CATCH

// The same csr weight in panels of `narrow` columns, which divides `panel`: values of `bytes` each and index are written
// with kOverread entries of padding, narrow_pointer has ceil(cols / narrow) * rows + 1 entries.
ZOO_EXPORT int64_t zoo_csr_narrow(const void* values, const uint16_t* index, const int32_t* pointer, void* narrow_values,
                               uint16_t* narrow_index, int32_t* narrow_pointer, int64_t rows, int64_t cols,
                               int64_t panel, int64_t narrow, int64_t bytes) try {
  const int64_t panels = (cols + panel - 1) / panel, parts = (cols + narrow - 1) / narrow;
  const int64_t entries = pointer[panels * rows];  // checked, as is the index
  const auto for_each = [&](auto&& visit) {  // visit(entry, narrow segment, column in the narrow panel)
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t j = pointer[p * rows + row]; j < pointer[p * rows + row + 1]; ++j)
          visit(j, (p * (panel / narrow) + index[j] / narrow) * rows + row, index[j] % narrow);
  };
  std::memset(narrow_pointer, 0, static_cast<size_t>(parts * rows + 1) * sizeof(int32_t));
  for_each([&](int64_t, int64_t segment, int64_t) { ++narrow_pointer[segment + 1]; });
  for (int64_t i = 0; i < parts * rows; ++i) narrow_pointer[i + 1] += narrow_pointer[i];
  const auto fill = [&](auto tag) {
    using V = decltype(tag);
    const auto* from = static_cast<const V*>(values);
    auto* to = static_cast<V*>(narrow_values);
    for_each([&](int64_t j, int64_t segment, int64_t column) {  // each pointer moves to the end of its segment
      const int32_t at = narrow_pointer[segment]++;
      to[at] = from[j];
      narrow_index[at] = static_cast<uint16_t>(column);
    });
    for (int64_t i = entries; i < entries + zoo::kOverread; ++i) to[i] = 0, narrow_index[i] = 0;
  };
  if (bytes == 4) fill(uint32_t{});
  else fill(uint16_t{});
  for (int64_t i = parts * rows; i > 0; --i) narrow_pointer[i] = narrow_pointer[i - 1];
  narrow_pointer[0] = 0;
  return zoo::kOk;
} ZOO_CATCH
