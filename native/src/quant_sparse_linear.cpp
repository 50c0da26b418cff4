// y = x W^T for W in groups of `group` consecutive columns of a row, of which only some are kept, each in four bits with
// a scale and a zero point (the layout of GQSA): w = scale * (q - zero), q in 0..15.
//
// pointer[row] is the first group of a row; columns[g] the group's number along the row; codes[g] group / 2 bytes, the
// first value in the low half of the first byte; scales[g] f16; zeros[g] uint8.
//
// Two kernels: x in fp32, or each row of x rounded to 16 bits, so that two groups are multiplied and summed exactly in
// integers before a scale is needed, in some half of the instructions.
#include <cmath>
#include <limits>

#include "zoo/check.hpp"
#include "zoo/export.hpp"
#include "zoo/groups.hpp"
#include "zoo/parallel.hpp"
#include "zoo/simd.hpp"

namespace zoo {
namespace {

// f(integral_constant 0), ..., f(integral_constant kCount - 1).
template <int kCount, class F>
ZOO_INLINE void each_of(F&& f) {
  if constexpr (kCount > 1) each_of<kCount - 1>(f);
  f(std::integral_constant<int, kCount - 1>{});
}

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

// ---- x in 16 bits ----------------------------------------------------------------------------------------------------

// What a unit of codes is beside where there is only one of two.
alignas(32) constexpr int16_t kNothing[kUnit] = {};

#if defined(__AVX2__)

using Whole = __m256i;  // sixteen times 16 bits: eight of one unit of sixteen, eight of another; or one unit of 32

ZOO_INLINE __m128i bytes_at(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

ZOO_INLINE Whole both(const int16_t* one, const int16_t* other) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(bytes_at(one)), bytes_at(other), 1);
}

// The codes of two units less their zero points: the even ones, then the odd ones.
ZOO_INLINE void split_codes(__m128i bytes, Whole zeros, Whole* out) {
  const __m256i words = _mm256_cvtepu8_epi16(bytes);
  out[0] = _mm256_sub_epi16(_mm256_and_si256(words, _mm256_set1_epi16(15)), zeros);
  out[1] = _mm256_sub_epi16(_mm256_srli_epi16(words, 4), zeros);
}

// sums[b] += scale * (sums of products), eight of them, for rows of x whose units lie one after another.
template <int B>
ZOO_INLINE void add_units(const Whole* codes, const int16_t* one, const int16_t* other, int64_t step, __m256 scale,
                          __m256* sums) {
  for (int b = 0; b < B; ++b, one += kUnit, other += step) {
    const __m256i even = _mm256_madd_epi16(codes[0], both(one, other));
    const __m256i odd = _mm256_madd_epi16(codes[1], both(one + kUnit / 2, other + kUnit / 2));
    sums[b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(even, odd)), scale, sums[b]);
  }
}

// The same for a unit of 32, whose halves are a vector each.
template <int B>
ZOO_INLINE void add_wide(const Whole* codes, const int16_t* one, __m256 scale, __m256* sums) {
  for (int b = 0; b < B; ++b, one += kWide) {
    const auto* x = reinterpret_cast<const __m256i*>(one);
    const __m256i even = _mm256_madd_epi16(codes[0], _mm256_loadu_si256(x));
    const __m256i odd = _mm256_madd_epi16(codes[1], _mm256_loadu_si256(x + 1));
    sums[b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(even, odd)), scale, sums[b]);
  }
}

ZOO_INLINE float total_of(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// Words of the zero points a (eight times) and b from a vector that holds eight zero points twice.
template <char a, char b>
ZOO_INLINE Whole zeros_of(__m256i eight) {
  constexpr char n = -1;
  return _mm256_shuffle_epi8(eight, _mm256_setr_epi8(a, n, a, n, a, n, a, n, a, n, a, n, a, n, a, n, b, n, b, n, b, n, b,
                                                     n, b, n, b, n, b, n, b, n));
}

ZOO_INLINE __m256i words_at(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// What `check` does, row by row, just before a row is used: a pass over the whole index would read it twice from memory.
ZOO_INLINE void check_row(const Groups& w, int64_t first, int64_t count) {
  if (count == 0) return;
  const auto* columns = reinterpret_cast<const int16_t*>(w.columns + first);
  const uint8_t* zeros = w.zeros + first;
  // If they rise from 0 or more to the last that there is, none lies outside.
  bool good = columns[0] >= 0 && columns[count - 1] < w.cols / w.group;
  if (count <= 32) {
    for (int64_t j = 1; j < count; ++j) good &= columns[j] > columns[j - 1];
    for (int64_t j = 0; j < count; ++j) good &= zeros[j] <= 15;
  } else {
    __m256i rise = _mm256_set1_epi16(-1), bits = _mm256_setzero_si256();
    const auto look = [&](int64_t j) {
      rise = _mm256_and_si256(rise, _mm256_cmpgt_epi16(words_at(columns + j), words_at(columns + j - 1)));
    };
    for (int64_t j = 1; j + 16 < count; j += 16) look(j);
    look(count - 16);
    for (int64_t j = 0; j + 32 < count; j += 32) bits = _mm256_or_si256(bits, words_at(zeros + j));
    bits = _mm256_or_si256(bits, words_at(zeros + count - 32));
    good &= _mm256_movemask_epi8(rise) == -1 && _mm256_testz_si256(bits, _mm256_set1_epi8(-16));
  }
  if (!good) throw Failure{kBadIndex};
}

// kGroup is the size of the groups, 16 or 32, of which eight are taken at a time; or 0 for any.
template <int B, int kGroup>
void few_rounded(const Groups& w, const int16_t* xs, const float* steps, const float* bias, float* y, int64_t from,
                 int64_t to) {
  constexpr int kTurns = B <= 2 ? 2 : 1;  // sums by turns, so that one need not wait for the one before
  const int64_t unit = unit_of(w);
  for (int64_t row = from; row < to; ++row) {
    const int64_t first = w.pointer[row], count = w.pointer[row + 1] - first;
    check_row(w, first, count);
    const uint8_t* codes = w.codes + first * w.group / 2;
    const uint16_t* columns = w.columns + first;
    __m256 sums[kTurns][B];
    for (auto& turn : sums)
      for (__m256& sum : turn) sum = _mm256_setzero_ps();
    Whole values[2];
    int64_t j = 0;
    if constexpr (kGroup != 0) {
      for (; j + 8 <= count; j += 8, codes += 4 * kGroup) {
        int64_t bytes;
        std::memcpy(&bytes, w.zeros + first + j, 8);
        const __m256i zeros = _mm256_set1_epi64x(bytes);
        const __m128i halves = bytes_at(w.scales + first + j);
        if constexpr (kGroup == kUnit) {
          // Scales 0, 2, 4, 6 in the lower half and 1, 3, 5, 7 in the upper one, as the sums of pairs need them.
          const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
          const __m256 scales = _mm256_cvtph_ps(_mm_shuffle_epi8(halves, order));
          each_of<4>([&](auto number) {
            constexpr int n = decltype(number)::value;
            split_codes(bytes_at(codes + 16 * n), zeros_of<2 * n, 2 * n + 1>(zeros), values);
            const int16_t *one = xs + columns[j + 2 * n] * kUnit * B, *other = xs + columns[j + 2 * n + 1] * kUnit * B;
            add_units<B>(values, one, other, kUnit, _mm256_permute_ps(scales, 0x55 * n), sums[n % kTurns]);
          });
        } else {
          const __m256 scales = _mm256_cvtph_ps(halves);
          const __m256 half[] = {_mm256_permute2f128_ps(scales, scales, 0x00), _mm256_permute2f128_ps(scales, scales, 0x11)};
          each_of<8>([&](auto number) {
            constexpr int n = decltype(number)::value;
            split_codes(bytes_at(codes + 16 * n), zeros_of<n, n>(zeros), values);
            const __m256 scale = _mm256_permute_ps(half[n / 4], 0x55 * (n % 4));
            add_wide<B>(values, xs + columns[j + n] * kWide * B, scale, sums[n % kTurns]);
          });
        }
      }
    }
    for (; j < count; ++j) {
      const __m256 scale = _mm256_set1_ps(to_float(w.scales[first + j]));
      const Whole zeros = _mm256_set1_epi16(w.zeros[first + j]);
      const int16_t* one = xs + columns[j] * w.group * B;
      for (int64_t i = 0; i < w.group; i += unit, codes += unit / 2, one += unit * B) {
        if (unit == kWide) {
          split_codes(bytes_at(codes), zeros, values);
          add_wide<B>(values, one, scale, sums[(j + i / kWide) % kTurns]);
        } else {
          split_codes(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)), zeros, values);
          add_units<B>(values, one, kNothing, 0, scale, sums[(j + i / kUnit) % kTurns]);
        }
      }
    }
    for (int b = 0; b < B; ++b) {
      __m256 total = sums[0][b];
      if constexpr (kTurns == 2) total = _mm256_add_ps(total, sums[1][b]);
      y[b * w.rows + row] = total_of(total) * steps[b] + (bias != nullptr ? bias[row] : 0.0f);
    }
  }
}

#else

void check_row(const Groups& w, int64_t first, int64_t count) {
  for (int64_t j = first; j < first + count; ++j) {
    const int64_t column = w.columns[j], before = j > first ? w.columns[j - 1] : -1;
    if (column <= before || column >= w.cols / w.group || w.zeros[j] > 15) throw Failure{kBadIndex};
  }
}

template <int B, int kGroup>
void few_rounded(const Groups& w, const int16_t* xs, const float* steps, const float* bias, float* y, int64_t from,
                 int64_t to) {
  const int64_t size = unit_of(w);
  for (int64_t row = from; row < to; ++row)
    for (int b = 0; b < B; ++b) {
      float total = 0.0f;
      check_row(w, w.pointer[row], w.pointer[row + 1] - w.pointer[row]);
      for (int64_t j = w.pointer[row]; j < w.pointer[row + 1]; ++j) {
        const uint8_t* codes = w.codes + j * w.group / 2;
        const int16_t* one = xs + w.columns[j] * w.group * B + b * size;
        const int32_t zero = w.zeros[j];
        for (int64_t unit = 0; unit < w.group; unit += size, codes += size / 2, one += size * B) {
          int32_t whole = 0;
          for (int64_t i = 0; i < size / 2; ++i)
            whole += ((codes[i] & 15) - zero) * one[i] + ((codes[i] >> 4) - zero) * one[i + size / 2];
          total += to_float(w.scales[j]) * static_cast<float>(whole);
        }
      }
      y[b * w.rows + row] = total * steps[b] + (bias != nullptr ? bias[row] : 0.0f);
    }
}

#endif

// xs as round_row left the rows of x; those that could not be rounded are left to the other kernel.
template <int B>
void rounded(const Groups& w, int64_t entries, const float* x, const int16_t* xs, const float* steps,
             const float* bias, float* y, int64_t threads) {
  parallel_rows(w.pointer, w.rows, kRowCost, threads, [&](int64_t from, int64_t to) {
    check_ends(w.pointer + from, to - from, entries);
    switch (w.group) {
      case kUnit: return few_rounded<B, kUnit>(w, xs, steps, bias, y, from, to);
      case kWide: return few_rounded<B, kWide>(w, xs, steps, bias, y, from, to);
      default: few_rounded<B, 0>(w, xs, steps, bias, y, from, to);
    }
  });
  for (int b = 0; b < B; ++b)
    if (steps[b] == 0.0f) direct<1>(w, entries, true, x + b * w.cols, bias, y + b * w.rows, threads);
}

template <int B>
void round_and_multiply(const Groups& w, int64_t entries, const float* x, const float* bias, float* y, int64_t threads) {
  int16_t* xs = scratch_of<int16_t>(w.cols * B, 2);
  float steps[B];
  const int64_t unit = unit_of(w);
  for (int b = 0; b < B; ++b) steps[b] = round_row(x + b * w.cols, w.cols, xs + b * unit, unit, unit * B);
  rounded<B>(w, entries, x, xs, steps, bias, y, threads);
}

template <bool kRounded>
void in_blocks(const Groups& w, int64_t entries, const float* x, const float* bias, float* y, int64_t batch,
               int64_t threads) {
  threads = worthwhile(threads, entries * w.group);
  for (int64_t b = 0; b < batch; b += kBlock) {
    const auto block = [&](auto size) {
      constexpr int kSize = decltype(size)::value;
      if constexpr (kRounded) round_and_multiply<kSize>(w, entries, x + b * w.cols, bias, y + b * w.rows, threads);
      else direct<kSize>(w, entries, b > 0, x + b * w.cols, bias, y + b * w.rows, threads);
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

constexpr float kMost = 32767.0f;

float round_row(const float* x, int64_t cols, int16_t* out, int64_t unit, int64_t stride) {
  uint32_t most = 0;  // of numbers without their sign; those that are not finite are the greatest as integers, too
  for (int64_t k = 0; k < cols; ++k) {
    uint32_t bits;
    std::memcpy(&bits, x + k, 4);
    most = std::max(most, bits & 0x7fffffffu);
  }
  float magnitude;
  std::memcpy(&magnitude, &most, 4);
  const float factor = kMost / magnitude;
  if (most >= 0x7f800000u || !(factor <= std::numeric_limits<float>::max())) {
    for (int64_t k = 0; k < cols; k += unit) std::fill_n(out + k / unit * stride, unit, int16_t{0});
    return 0.0f;
  }
  for (int64_t k = 0; k < cols; k += kUnit) {  // a unit of 32 has its even ones in two pieces
    int16_t whole[kUnit], *at = out + k / unit * stride + k % unit / 2;
    for (int64_t i = 0; i < kUnit; ++i) whole[i] = static_cast<int16_t>(std::nearbyint(x[k + i] * factor));
    for (int64_t i = 0; i < kUnit / 2; ++i) at[i] = whole[2 * i], at[i + unit / 2] = whole[2 * i + 1];
  }
  return magnitude / kMost;
}

Groups groups_of(const void* codes, const void* scales, const void* zeros, const void* columns, const int32_t* pointer,
                 int64_t entries, int64_t rows, int64_t cols, int64_t group) {
  if (pointer[0] != 0 || pointer[rows] != entries) throw Failure{kBadPointer};
  return {static_cast<const uint8_t*>(codes), static_cast<const f16*>(scales), static_cast<const uint8_t*>(zeros),
          static_cast<const uint16_t*>(columns), pointer, rows, cols, group};
}

void multiply_row(const Groups& w, int64_t entries, const float* x, const int16_t* xs, float step, float* y,
                  int64_t threads) {
  rounded<1>(w, entries, x, xs, &step, nullptr, y, worthwhile(threads, entries * w.group));
}

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
  const zoo::Groups w = zoo::groups_of(codes, scales, zeros, columns, pointer, entries, rows, cols, group);
  zoo::in_blocks<false>(w, entries, x, bias, y, batch, threads);
  return zoo::kOk;
} ZOO_CATCH

// The same with each row of x rounded to 16 bits.
ZOO_EXPORT int64_t zoo_quant_rounded_linear(const float* x, const void* codes, const void* scales, const void* zeros,
                                            const void* columns, const int32_t* pointer, const float* bias, float* y,
                                            int64_t batch, int64_t entries, int64_t rows, int64_t cols, int64_t group,
                                            int64_t threads) try {
  const zoo::Groups w = zoo::groups_of(codes, scales, zeros, columns, pointer, entries, rows, cols, group);
  zoo::in_blocks<true>(w, entries, x, bias, y, batch, threads);
  return zoo::kOk;
} ZOO_CATCH
