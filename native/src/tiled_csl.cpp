// y = x W^T of a weight in Tiled-CSL (Flash-LLM): what is loaded is sparse, what is computed is dense. Each tile of
// 128 x 64 is spread out into the first-level cache and multiplied there, zeros and all.

#include <algorithm>

#include "zoo/check.hpp"
#include "zoo/parallel.hpp"
#include "zoo/simd.hpp"

namespace zoo {
namespace {

constexpr int64_t kTileRows = 128, kTileCols = 64, kPlaces = kTileRows * kTileCols, kWordsAtOnce = 64;

// Words as a dense tile, column after column, so that a product runs along the rows.
void spread(const uint32_t* words, int64_t count, float* tile) {
  std::memset(tile, 0, kPlaces * sizeof(float));
  uint16_t where[kWordsAtOnce];
  f16 values[kWordsAtOnce + 16];
  alignas(64) float wide[kWordsAtOnce + 16];
  for (int64_t first = 0; first < count; first += kWordsAtOnce) {
    const int64_t n = std::min(kWordsAtOnce, count - first);
    uint32_t most = 0;
    for (int64_t j = 0; j < n; ++j) {
      const uint32_t word = words[first + j], place = word >> 16, row = place / kTileCols;
      most = std::max(most, place);
      where[j] = static_cast<uint16_t>(((place % kTileCols) ^ (row % 8 * 8)) * kTileRows + row);
      values[j].bits = static_cast<uint16_t>(word);
    }
    if (most >= kPlaces) throw Failure{kBadIndex};
    for (int64_t j = 0; j < n; j += kLanes) store(wide + j, load(values + j));
    for (int64_t j = 0; j < n; ++j) tile[where[j]] = wide[j];
  }
}

// out[b][row] += sum over columns of x[b][column] * tile[column][row], for B rows of x and V vectors of rows at once.
template <int B, int V>
ZOO_INLINE void multiply(const float* tile, int64_t columns, const float* x, int64_t ldx, float* out) {
  for (int64_t row = 0; row < kTileRows; row += V * kLanes) {
    vf sum[B][V];
    for (int b = 0; b < B; ++b)
      for (int v = 0; v < V; ++v) sum[b][v] = load(out + b * kTileRows + row + v * kLanes);
    for (int64_t c = 0; c < columns; ++c) {
      vf weight[V];
      for (int v = 0; v < V; ++v) weight[v] = load(tile + c * kTileRows + row + v * kLanes);
      for (int b = 0; b < B; ++b) {
        const vf factor = splat(x[b * ldx + c]);
        for (int v = 0; v < V; ++v) sum[b][v] = fma(factor, weight[v], sum[b][v]);
      }
    }
    for (int b = 0; b < B; ++b)
      for (int v = 0; v < V; ++v) store(out + b * kTileRows + row + v * kLanes, sum[b][v]);
  }
}

void multiply_batch(const float* tile, int64_t columns, const float* x, int64_t ldx, int64_t batch, float* out) {
  int64_t b = 0;
  for (; b + 6 <= batch; b += 6) multiply<6, 2>(tile, columns, x + b * ldx, ldx, out + b * kTileRows);
  for (; b + 2 <= batch; b += 2) multiply<2, 4>(tile, columns, x + b * ldx, ldx, out + b * kTileRows);
  for (; b < batch; ++b) multiply<1, 4>(tile, columns, x + b * ldx, ldx, out + b * kTileRows);
}

}  // namespace
}  // namespace zoo

// x [batch, inputs] float; words and the tiles' ends (in fours of words, tiles + 1 of them) of a weight
// [outputs, inputs]; y [batch, outputs] float is written.
ZOO_EXPORT int64_t zoo_tiled_csl(const float* x, const uint32_t* words, int64_t count, const int32_t* ends, float* y,
                              int64_t batch, int64_t inputs, int64_t outputs, int64_t threads) try {
  using namespace zoo;
  const int64_t across = (inputs + kTileCols - 1) / kTileCols, down = (outputs + kTileRows - 1) / kTileRows;
  check_ends(ends, across * down, count / 4);
  if (ends[0] != 0 || 4 * static_cast<int64_t>(ends[across * down]) != count) throw Failure{kBadPointer};
  parallel_for(down, worthwhile(threads, batch * inputs * outputs / 8), [&](int64_t begin, int64_t end) {
    auto* tile = scratch_of<float>(kPlaces, 0);
    auto* out = scratch_of<float>(batch * kTileRows, 1);
    for (int64_t t = begin; t < end; ++t) {
      std::fill_n(out, batch * kTileRows, 0.0f);
      for (int64_t a = 0; a < across; ++a) {
        const int64_t first = 4 * static_cast<int64_t>(ends[t * across + a]);
        spread(words + first, 4 * static_cast<int64_t>(ends[t * across + a + 1]) - first, tile);
        const int64_t columns = std::min(kTileCols, inputs - a * kTileCols);
        multiply_batch(tile, columns, x + a * kTileCols, inputs, batch, out);
      }
      const int64_t rows = std::min(kTileRows, outputs - t * kTileRows);
      for (int64_t b = 0; b < batch; ++b) std::copy_n(out + b * kTileRows, rows, y + b * outputs + t * kTileRows);
    }
  });
  return kOk;
} ZOO_CATCH
