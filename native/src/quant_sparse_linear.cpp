// y = x W^T for W in groups of `group` consecutive columns of a row, of which only some are kept, each in four bits with
// a scale and a zero point (the layout of GQSA): w = scale * (q - zero), q in 0..15.
//
// pointer[row] is the first group of a row; columns[g] the group's number along the row; codes[g] group / 2 bytes, the
// first value in the low half of the first byte; scales[g] f16; zeros[g] uint8.
#include "zoo/export.hpp"
#include "zoo/packed.hpp"
#include "zoo/parallel.hpp"

namespace zoo {
namespace {

constexpr int64_t kRowCost = 2;  // what an empty row costs, in groups, for an even split among threads

struct Groups {
  const uint8_t* codes;
  const f16* scales;
  const uint8_t* zeros;
  const uint16_t* columns;
  const int32_t* pointer;
  int64_t rows, cols, group;

  // Lanes i.. of group g, dequantised (a stored four-bit value reads as q - 8).
  ZOO_INLINE vf values(int64_t g, int64_t i, vf scale, vf shift) const {
    return fma(load(reinterpret_cast<const int4*>(codes + (g * group + i) / 2)), scale, shift);
  }
};

// xs holds the rows of x chunk by chunk, kLanes values of each.
template <int B>
void few_rows(const Groups& w, const float* xs, float* y, int64_t from, int64_t to) {
  for (int64_t row = from; row < to; ++row) {
    vf acc[2][B];
    for (int c = 0; c < 2; ++c)
      for (int b = 0; b < B; ++b) acc[c][b] = zero();
    for (int64_t g = w.pointer[row]; g < w.pointer[row + 1]; ++g) {
      const float scale = to_float(w.scales[g]);
      const vf scales = splat(scale), shift = splat((8.0f - static_cast<float>(w.zeros[g])) * scale);
      const float* xk = xs + w.columns[g] * w.group * B;
      for (int64_t i = 0; i < w.group; i += 16)
        for (int c = 0; c < 16 / kLanes; ++c) {
          const vf values = w.values(g, i + c * kLanes, scales, shift);
          for (int b = 0; b < B; ++b, xk += kLanes) acc[c][b] = fma(values, load(xk), acc[c][b]);
        }
    }
    for (int b = 0; b < B; ++b) y[b * w.rows + row] += sum(add(acc[0][b], acc[1][b]));
  }
}

// A tile of V vectors of the batch: a row is dequantised once into `dense` and multiplied as blocks of columns.
template <int V>
void tile_rows(const Groups& w, const float* xt, float* yt, int64_t from, int64_t to) {
  constexpr int64_t width = V * kLanes;
  float* dense = scratch_of<float>(w.cols, 2);
  for (int64_t row = from; row < to; ++row) {
    const int64_t first = w.pointer[row], count = w.pointer[row + 1] - first;
    vf acc[V];
    for (int v = 0; v < V; ++v) acc[v] = load(yt + row * width + v * kLanes);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t g = first + j;
      const float scale = to_float(w.scales[g]);
      const vf scales = splat(scale), shift = splat((8.0f - static_cast<float>(w.zeros[g])) * scale);
      for (int64_t i = 0; i < w.group; i += kLanes) store(dense + i, w.values(g, i, scales, shift));
      const uint16_t start = 0;
      accumulate_columns<V>(dense, &start, 1, w.group, xt + w.columns[g] * w.group * width, width, acc);
    }
    for (int v = 0; v < V; ++v) store(yt + row * width + v * kLanes, acc[v]);
  }
}

void batched(const Groups& w, const float* x, const float* bias, float* y, int64_t batch, int64_t threads) {
  constexpr int kVectors = 32 / kLanes;
  constexpr int64_t width = 32;
  for (int64_t b = 0; b < batch; b += width) {
    const int64_t columns = std::min(width, batch - b);
    float* xt = scratch_of<float>(w.cols * width, 0);
    float* yt = scratch_of<float>(w.rows * width, 1);
    parallel_for(w.cols, threads, [&](int64_t from, int64_t to) {
      transpose_in(x + b * w.cols + from, w.cols, columns, to - from, xt + from * width, width);
    });
    parallel_rows(w.pointer, w.rows, kRowCost, threads, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row)
        for (int v = 0; v < kVectors; ++v)
          store(yt + row * width + v * kLanes, splat(bias != nullptr ? bias[row] : 0.0f));
      tile_rows<kVectors>(w, xt, yt, from, to);
      transpose_out(yt + from * width, width, to - from, y + b * w.rows + from, w.rows, columns);
    });
  }
}

template <int B>
void direct(const Groups& w, const float* x, const float* bias, float* y, int64_t threads) {
  float* xs = scratch_of<float>(w.cols * B, 0);
  for (int64_t k = 0; k < w.cols; k += kLanes)
    for (int b = 0; b < B; ++b) store(xs + k * B + b * kLanes, load(x + b * w.cols + k));
  parallel_rows(w.pointer, w.rows, kRowCost, threads, [&](int64_t from, int64_t to) {
    for (int b = 0; b < B; ++b)
      for (int64_t row = from; row < to; ++row) y[b * w.rows + row] = bias != nullptr ? bias[row] : 0.0f;
    few_rows<B>(w, xs, y, from, to);
  });
}

}  // namespace
}  // namespace zoo

// x [batch, cols] and y [batch, rows] float, contiguous; cols a multiple of group, group a multiple of 16; bias [rows]
// or null.
ZOO_EXPORT void zoo_quant_sparse_linear(const float* x, const void* codes, const void* scales, const void* zeros,
                                        const void* columns, const int32_t* pointer, const float* bias, float* y,
                                        int64_t batch, int64_t rows, int64_t cols, int64_t group, int64_t threads) {
  const zoo::Groups w{static_cast<const uint8_t*>(codes), static_cast<const zoo::f16*>(scales),
                      static_cast<const uint8_t*>(zeros), static_cast<const uint16_t*>(columns), pointer, rows, cols,
                      group};
  switch (batch) {
    case 1: return zoo::direct<1>(w, x, bias, y, threads);
    case 2: return zoo::direct<2>(w, x, bias, y, threads);
    case 3: return zoo::direct<3>(w, x, bias, y, threads);
    case 4: return zoo::direct<4>(w, x, bias, y, threads);
    default: return zoo::batched(w, x, bias, y, batch, threads);
  }
}
