// y = x W^T for W in groups of `group` consecutive columns of a row, of which only some are kept, each in four bits with
// a scale and a zero point (the layout of GQSA): w = scale * (q - zero), q in 0..15.
//
// pointer[row] is the first group of a row; columns[g] the group's number along the row; codes[g] group / 2 bytes, the
// first value in the low half of the first byte; scales[g] f16; zeros[g] uint8.
#include "zoo/check.hpp"
#include "zoo/export.hpp"
#include "zoo/parallel.hpp"
#include "zoo/simd.hpp"

namespace zoo {
namespace {

struct Groups {
  const uint8_t* codes;
  const f16* scales;
  const uint8_t* zeros;
  const uint16_t* columns;
  const int32_t* pointer;
  int64_t rows, cols, group;
};

constexpr int64_t kRowCost = 2;  // what an empty row costs, in groups, for an even split among threads
constexpr int64_t kBlock = 4;    // rows of x for which W is dequantised once; the sums of more do not fit into registers

// By how much a group's codes are scaled and moved: w = code * scale + shift. Computed for a row at a time, since group by
// group that would take longer than the products.
struct Ranges {
  float* scale;
  float* shift;
};

#if defined(__AVX2__) && !defined(__AVX512F__)

// The codes of sixteen columns, 0 to 15, in two vectors in the order of `column_of`, so that one load serves both.
constexpr float kLowest = 0.0f;
ZOO_INLINE void codes_of(const uint8_t* codes, vf* out) {
  int64_t bits;
  std::memcpy(&bits, codes, 8);
  const __m256i words = _mm256_set1_epi64x(bits), four = _mm256_set1_epi32(15);
  const __m256i low = _mm256_srlv_epi32(words, _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12));
  const __m256i high = _mm256_srlv_epi32(words, _mm256_setr_epi32(16, 16, 20, 20, 24, 24, 28, 28));
  out[0] = _mm256_cvtepi32_ps(_mm256_and_si256(low, four));
  out[1] = _mm256_cvtepi32_ps(_mm256_and_si256(high, four));
}
ZOO_INLINE int64_t column_of(int64_t lane) { return lane % 2 * 8 + lane / 2; }

#else

constexpr float kLowest = -8.0f;
ZOO_INLINE void codes_of(const uint8_t* codes, vf* out) {
  for (int c = 0; c < 16 / kLanes; ++c) out[c] = load(reinterpret_cast<const int4*>(codes + c * kLanes / 2));
}
ZOO_INLINE int64_t column_of(int64_t lane) { return lane; }

#endif

ZOO_INLINE void ranges_of(const Groups& w, int64_t first, int64_t count, const Ranges& out) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const vf scale = load(w.scales + first + j);
    const vf zeros = load(reinterpret_cast<const int8_t*>(w.zeros + first + j));
    store(out.scale + j, scale);
    store(out.shift + j, mul(scale, fma(zeros, splat(-1.0f), splat(-kLowest))));
  }
  for (; j < count; ++j) {
    const float scale = to_float(w.scales[first + j]);
    out.scale[j] = scale;
    out.shift[j] = scale * (-kLowest - static_cast<float>(w.zeros[first + j]));
  }
}

// xs holds the rows of x by sixteen columns, in the order of `column_of`, kLanes values of each row.
// kGroup is the size of the groups, or 0 for any.
template <int B, int kGroup>
void few_rows(const Groups& w, const float* xs, float* y, int64_t from, int64_t to) {
  constexpr int kParts = 16 / kLanes;
  constexpr int kTurns = B <= 2 ? 2 : 1;  // groups by turns, so that a sum need not wait for the one before
  const int64_t group = kGroup > 0 ? kGroup : w.group;
  const int64_t most = w.cols / w.group;
  float* buffer = scratch_of<float>(2 * most, 1);
  const Ranges ranges{buffer, buffer + most};
  for (int64_t row = from; row < to; ++row) {
    const int64_t first = w.pointer[row], count = w.pointer[row + 1] - first;
    ranges_of(w, first, count, ranges);
    vf acc[kTurns][kParts][B];
    for (auto& turn : acc)
      for (auto& part : turn)
        for (vf& sum : part) sum = zero();
    const auto add_group = [&](int64_t j, vf (*sums)[B]) {
      const vf scale = splat(ranges.scale[j]), shift = splat(ranges.shift[j]);
      const float* xk = xs + w.columns[first + j] * group * B;
      const uint8_t* codes = w.codes + (first + j) * group / 2;
      for (int64_t i = 0; i < group; i += 16, codes += 8) {
        vf values[kParts];
        codes_of(codes, values);
        for (int c = 0; c < kParts; ++c) {
          const vf value = fma(values[c], scale, shift);
          for (int b = 0; b < B; ++b, xk += kLanes) sums[c][b] = fma(value, load(xk), sums[c][b]);
        }
      }
    };
    int64_t j = 0;
    for (; j + kTurns <= count; j += kTurns)
      for (int turn = 0; turn < kTurns; ++turn) add_group(j + turn, acc[turn]);
    if (j < count) add_group(j, acc[0]);
    for (int b = 0; b < B; ++b) {
      vf total = zero();
      for (const auto& turn : acc)
        for (const auto& part : turn) total = add(total, part[b]);
      y[b * w.rows + row] += sum(total);
    }
  }
}

// Groups of a row rise, so that none is there twice and no row has more than fit: in all groups one after another, as many
// do not rise as between two rows. (Rows are too short for a loop of their own.)
void check(const Groups& w, int64_t from, int64_t to, int64_t entries) {
  check_ends(w.pointer + from, to - from, entries);
  const int64_t begin = w.pointer[from], end = w.pointer[to], limit = w.cols / w.group;
  if (begin == end) return;
  int64_t falls = 0, between = 0;
  uint16_t most = w.columns[begin];
  for (int64_t j = begin + 1; j < end;) {
    uint16_t few = 0;  // a short sum, so that it is done for many groups at a time
    for (const int64_t stop = std::min(j + 4096, end); j < stop; ++j) {
      few += static_cast<uint16_t>(w.columns[j] <= w.columns[j - 1]);
      most = std::max(most, w.columns[j]);
    }
    falls += few;
  }
  uint8_t zeros = 0;
  for (int64_t j = begin; j < end; ++j) zeros |= w.zeros[j];
  for (int64_t row = from + 1; row < to; ++row) {
    const int64_t at = w.pointer[row];
    between += at > w.pointer[row - 1] && at < end && w.columns[at] <= w.columns[at - 1];
  }
  if (falls != between || most >= limit || zeros > 15) throw Failure{kBadIndex};
}

template <int B>
void direct(const Groups& w, int64_t entries, bool checked, const float* x, const float* bias, float* y,
            int64_t threads) {
  float* xs = scratch_of<float>(w.cols * B, 0);
  float* place = xs;
  for (int64_t k = 0; k < w.cols; k += 16)
    for (int64_t part = 0; part < 16; part += kLanes)
      for (int b = 0; b < B; ++b, place += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane) place[lane] = x[b * w.cols + k + column_of(part + lane)];
  parallel_rows(w.pointer, w.rows, kRowCost, threads, [&](int64_t from, int64_t to) {
    if (!checked) check(w, from, to, entries);  // by the thread that reads the index next
    for (int b = 0; b < B; ++b)
      for (int64_t row = from; row < to; ++row) y[b * w.rows + row] = bias != nullptr ? bias[row] : 0.0f;
    if (w.group == 16) few_rows<B, 16>(w, xs, y, from, to);
    else few_rows<B, 0>(w, xs, y, from, to);
  });
}

void in_blocks(const Groups& w, int64_t entries, const float* x, const float* bias, float* y, int64_t batch,
               int64_t threads) {
  threads = worthwhile(threads, entries * w.group);
  for (int64_t b = 0; b < batch; b += kBlock) {
    const auto block = [&](auto size) {
      direct<decltype(size)::value>(w, entries, b > 0, x + b * w.cols, bias, y + b * w.rows, threads);
    };
    switch (batch - b) {
      case 1: block(std::integral_constant<int, 1>{}); break;
      case 2: block(std::integral_constant<int, 2>{}); break;
      case 3: block(std::integral_constant<int, 3>{}); break;
      default: block(std::integral_constant<int, kBlock>{});
    }
  }
}

}  // namespace
}  // namespace zoo

// The parts of a weight of groups, as zoo_quant_sparse_linear takes them.
ZOO_EXPORT int64_t zoo_groups_check(const void* zeros, const void* columns, const int32_t* pointer, int64_t entries,
                                    int64_t rows, int64_t cols, int64_t group) try {
  if (pointer[0] != 0 || pointer[rows] != entries) throw zoo::Failure{zoo::kBadPointer};
  const zoo::Groups w{nullptr, nullptr, static_cast<const uint8_t*>(zeros), static_cast<const uint16_t*>(columns),
                      pointer, rows, cols, group};
  zoo::check(w, 0, rows, entries);
  return zoo::kOk;
} ZOO_CATCH

// x [batch, cols] and y [batch, rows] float, contiguous; cols a multiple of group, group a multiple of 16; bias [rows]
// or null.
ZOO_EXPORT int64_t zoo_quant_sparse_linear(const float* x, const void* codes, const void* scales, const void* zeros,
                                           const void* columns, const int32_t* pointer, const float* bias, float* y,
                                           int64_t batch, int64_t entries, int64_t rows, int64_t cols, int64_t group,
                                           int64_t threads) try {
  if (pointer[0] != 0 || pointer[rows] != entries) throw zoo::Failure{zoo::kBadPointer};
  const zoo::Groups w{static_cast<const uint8_t*>(codes), static_cast<const zoo::f16*>(scales),
                      static_cast<const uint8_t*>(zeros), static_cast<const uint16_t*>(columns), pointer, rows, cols, group};
  zoo::in_blocks(w, entries, x, bias, y, batch, threads);
  return zoo::kOk;
} ZOO_CATCH
