// y = x W^T for W in four-bit groups in panels (panels.hpp), each unit of x rounded to eight bits.
//
// A panel goes through its columns of groups: a column's x stays in registers while its blocks of eight groups, one of each
// of eight rows, are unpacked, multiplied and summed in integers, a lane for each row; scale, zero point and step of x cost
// one operation for eight groups. That leaves a list of products of the rows that keep the group. Eight rows at a time they
// are brought to their places by one permutation, which eight bits of the mask choose, and added.
#include <cmath>
#include <limits>

#include "zoo/check.hpp"
#include "zoo/export.hpp"
#include "zoo/panels.hpp"
#include "zoo/parallel.hpp"

namespace zoo {
namespace {

constexpr int64_t kMaskBytes = kPanelRows / 8;
constexpr int64_t kTogether = 4;  // rows of x for which codes are unpacked once
constexpr int64_t kAhead = 4096;  // bytes of codes: the processor alone reads four streams at half to two thirds of this speed
constexpr float kMost = 127.0f;

// The products of one column's groups: one for each row that keeps it. A permutation reads eight at any place.
using List = float[kPanelRows + kBlockGroups];
using Sums = float[kPanelRows];

// What the rows of x have in one column of groups.
template <int B>
struct Column {
  const int8_t* values[B];
  const float* steps[B];
  const float* sums[B];
};

float zero_of(const Panels& w, int64_t lane) { return static_cast<float>(w.zeros[lane / 2] >> lane % 2 * 4 & 15); }

#if defined(__AVX2__)

// places[bits][i]: which of the kept rows the row i is; the sign tells those that are not kept.
struct Places {
  alignas(32) int32_t of[256][8];
  Places() {
    for (int bits = 0; bits < 256; ++bits)
      for (int i = 0, next = 0; i < 8; ++i)
        of[bits][i] = bits >> i & 1 ? next++ : std::numeric_limits<int32_t>::min();
  }
};
const Places places;

// The products of `count` blocks into out[b], or added to what is there. U is the size of a unit.
template <int U, int B, bool kAdd>
ZOO_INLINE void multiply_blocks(const Panels& w, int64_t first, int64_t count, int64_t units, const Column<B>& x,
                                float* const* out) {
  const __m256i four = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const uint8_t* codes = w.codes + first * w.group * kBlockGroups / 2;
  for (int64_t block = 0; block < count; ++block) {
    int32_t eight;
    std::memcpy(&eight, w.zeros + (first + block) * kBlockGroups / 2, 4);
    const __m256i moved = _mm256_srlv_epi32(_mm256_set1_epi32(eight), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    const __m256 zeros = _mm256_cvtepi32_ps(_mm256_and_si256(moved, _mm256_set1_epi32(15)));
    const auto* halves = reinterpret_cast<const __m128i*>(w.scales + (first + block) * kBlockGroups);
    const __m256 scales = _mm256_cvtph_ps(_mm_loadu_si128(halves));
    __m256 sums[B] = {};
    for (int64_t unit = 0; unit < units; ++unit, codes += U * kBlockGroups / 2) {
      __m256i parts[U / 4];
      for (int line = 0; line < U / 16; ++line) _mm_prefetch(codes + kAhead + 64 * line, _MM_HINT_T0);
      for (int i = 0; i < U / 8; ++i) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes) + i);
        parts[2 * i] = _mm256_and_si256(both, four);
        parts[2 * i + 1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), four);
      }
      for (int b = 0; b < B; ++b) {
        __m256i whole[U / 4];  // |sum of four| <= 8 * 15 * 127, which fits
        for (int i = 0; i < U / 4; ++i) {
          int32_t some;
          std::memcpy(&some, x.values[b] + unit * U + 4 * i, 4);
          whole[i] = _mm256_maddubs_epi16(parts[i], _mm256_set1_epi32(some));
        }
        for (int half = U / 8; half > 0; half /= 2)
          for (int i = 0; i < half; ++i) whole[i] = _mm256_add_epi16(whole[i], whole[i + half]);
        const __m256 products = _mm256_cvtepi32_ps(_mm256_madd_epi16(whole[0], ones));
        const __m256 step = _mm256_broadcast_ss(x.steps[b] + unit), sum = _mm256_broadcast_ss(x.sums[b] + unit);
        const __m256 here = _mm256_mul_ps(_mm256_fnmadd_ps(zeros, sum, products), step);  // the difference is exact
        sums[b] = unit == 0 ? here : _mm256_add_ps(sums[b], here);
      }
    }
    for (int b = 0; b < B; ++b) {
      float* place = out[b] + block * kBlockGroups;
      const __m256 before = kAdd ? _mm256_loadu_ps(place) : _mm256_setzero_ps();
      _mm256_storeu_ps(place, kAdd ? _mm256_fmadd_ps(sums[b], scales, before) : _mm256_mul_ps(sums[b], scales));
    }
  }
}

// sums[row] += the products of the rows that the mask names, in their order.
template <int B>
ZOO_INLINE void add_kept(const uint8_t* mask, const List* lists, Sums* sums) {
  int64_t at = 0;
  for (int64_t byte = 0; byte < kMaskBytes; ++byte) {
    const __m256i index = _mm256_load_si256(reinterpret_cast<const __m256i*>(places.of[mask[byte]]));
    for (int b = 0; b < B; ++b) {
      const __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps(lists[b] + at), index);
      const __m256 kept = _mm256_blendv_ps(moved, _mm256_setzero_ps(), _mm256_castsi256_ps(index));
      _mm256_store_ps(sums[b] + 8 * byte, _mm256_add_ps(_mm256_load_ps(sums[b] + 8 * byte), kept));
    }
    at += __builtin_popcount(mask[byte]);
  }
}

#else

template <int U, int B, bool kAdd>
void multiply_blocks(const Panels& w, int64_t first, int64_t count, int64_t units, const Column<B>& x, float* const* out) {
  for (int64_t lane = 0; lane < count * kBlockGroups; ++lane) {
    const int64_t block = first + lane / kBlockGroups;
    const uint8_t* codes = w.codes + block * w.group * kBlockGroups / 2 + lane % kBlockGroups * 4;
    for (int b = 0; b < B; ++b) {
      float total = 0.0f;
      for (int64_t unit = 0; unit < units; ++unit) {
        int32_t whole = 0;
        for (int64_t i = 0; i < U; ++i) {
          const uint8_t both = codes[(unit * U + i) / 8 * 32 + i % 4];
          whole += (i % 8 < 4 ? both & 15 : both >> 4) * x.values[b][unit * U + i];
        }
        const float zeros = zero_of(w, first * kBlockGroups + lane) * x.sums[b][unit];
        total += (static_cast<float>(whole) - zeros) * x.steps[b][unit];
      }
      total *= to_float(w.scales[first * kBlockGroups + lane]);
      out[b][lane] = kAdd ? out[b][lane] + total : total;
    }
  }
}

template <int B>
void add_kept(const uint8_t* mask, const List* lists, Sums* sums) {
  for (int64_t row = 0, at = 0; row < kPanelRows; ++row)
    if (mask[row / 8] >> row % 8 & 1) {
      for (int b = 0; b < B; ++b) sums[b][row] += lists[b][at];
      ++at;
    }
}

#endif

// The products of blocks with a group of x as it is.
void multiply_exactly(const Panels& w, int64_t first, int64_t count, const float* x, float* out) {
  for (int64_t lane = 0; lane < count * kBlockGroups; ++lane) {
    const uint8_t* codes = w.codes + (first + lane / kBlockGroups) * w.group * kBlockGroups / 2 + lane % kBlockGroups * 4;
    const float zero = zero_of(w, first * kBlockGroups + lane), scale = to_float(w.scales[first * kBlockGroups + lane]);
    float total = 0.0f;
    for (int64_t i = 0; i < w.group; ++i) {
      const uint8_t both = codes[i / 8 * 32 + i % 4];
      total += (static_cast<float>(i % 8 < 4 ? both & 15 : both >> 4) - zero) * scale * x[i];
    }
    out[lane] = total;
  }
}

bool rounds(const float* steps, int64_t units) {
  bool all = true;
  for (int64_t unit = 0; unit < units; ++unit) all &= !std::isnan(steps[unit]);
  return all;
}

// The rows of a panel that keep a group. Refuses bits beyond the last row.
int64_t kept_rows(const uint8_t* mask, int64_t rows) {
  int64_t count = 0;
  for (int64_t byte = 0; byte < kMaskBytes; byte += 8) {
    uint64_t word;
    std::memcpy(&word, mask + byte, 8);
    count += __builtin_popcountll(word);
  }
  if (rows < kPanelRows) {
    int64_t within = 0;
    for (int64_t row = 0; row < rows; ++row) within += mask[row / 8] >> row % 8 & 1;
    if (within != count) throw Failure{kBadIndex};
  }
  return count;
}

// y[b][the panel's rows] for B rows of x. kUnits is 1 where a group is one unit, or 0.
template <int U, int kUnits, int B>
void multiply_panel(const Panels& w, int64_t panel, const Rounded* rows, const float* bias, float* const* y) {
  const int64_t units = kUnits > 0 ? kUnits : w.group / U, columns = w.cols / w.group;
  const int64_t here = std::min(kPanelRows, w.rows - panel * kPanelRows), end = w.pointer[panel + 1];
  int64_t at = w.pointer[panel];
  if (at < 0 || end < at || end > w.blocks) throw Failure{kBadPointer};
  alignas(64) List lists[B];
  alignas(64) Sums sums[B] = {};
  for (int64_t column = 0; column < columns; ++column) {
    const uint8_t* mask = w.masks + (panel * columns + column) * kMaskBytes;
    const int64_t kept = kept_rows(mask, here), count = (kept + kBlockGroups - 1) / kBlockGroups;
    if (count > end - at) throw Failure{kBadPointer};
    Column<B> x;
    bool rounded = true;
    for (int b = 0; b < B; ++b) {
      x.values[b] = rows[b].values + column * w.group;
      x.steps[b] = rows[b].steps + column * units;
      x.sums[b] = rows[b].sums + column * units;
      rounded &= rounds(x.steps[b], units);
    }
    float* out[B];
    if (rounded && kept == here) {  // the list is the panel
      for (int b = 0; b < B; ++b) out[b] = sums[b];
      multiply_blocks<U, B, true>(w, at, count, units, x, out);
    } else {
      for (int b = 0; b < B; ++b) out[b] = lists[b];
      multiply_blocks<U, B, false>(w, at, count, units, x, out);
      for (int b = 0; b < B; ++b)
        if (!rounds(x.steps[b], units)) multiply_exactly(w, at, count, rows[b].x + column * w.group, lists[b]);
      add_kept<B>(mask, lists, sums);
    }
    at += count;
  }
  if (at != end) throw Failure{kBadPointer};
  for (int b = 0; b < B; ++b)
    for (int64_t row = 0; row < here; ++row) {
      const int64_t place = panel * kPanelRows + row;
      y[b][place] = sums[b][row] + (bias != nullptr ? bias[place] : 0.0f);
    }
}

template <int B>
void panel_of_any(const Panels& w, int64_t panel, const Rounded* rows, const float* bias, float* const* y) {
  switch (w.group) {
    case 16: return multiply_panel<16, 1, B>(w, panel, rows, bias, y);
    case 32: return multiply_panel<32, 1, B>(w, panel, rows, bias, y);
  }
  if (w.unit() == 32) multiply_panel<32, 0, B>(w, panel, rows, bias, y);
  else multiply_panel<16, 0, B>(w, panel, rows, bias, y);
}

int64_t steps_of(const Panels& w) { return w.blocks * kBlockGroups * w.group / 4; }

}  // namespace

Panels panels_of(const void* codes, const void* scales, const void* zeros, const void* masks, const int32_t* pointer,
                 int64_t blocks, int64_t rows, int64_t cols, int64_t group) {
  const Panels w{static_cast<const uint8_t*>(codes), static_cast<const f16*>(scales), static_cast<const uint8_t*>(zeros),
                 static_cast<const uint8_t*>(masks), pointer, blocks, rows, cols, group};
  if (pointer[0] != 0 || pointer[w.panels()] != blocks) throw Failure{kBadPointer};
  return w;
}

int64_t rounded_bytes(int64_t cols) { return (cols + 8 * (cols / 16) + 63) / 64 * 64; }

Rounded round_row(const float* x, int64_t cols, int64_t unit, void* memory) {
  auto* steps = static_cast<float*>(memory);
  float* sums = steps + cols / 16;
  auto* values = reinterpret_cast<int8_t*>(sums + cols / 16);
  for (int64_t k = 0; k < cols; k += unit) {
    uint32_t most = 0;  // of numbers without their sign; those that are not finite are the greatest as integers, too
    for (int64_t i = k; i < k + unit; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, 4);
      most = std::max(most, bits & 0x7fffffffu);
    }
    float magnitude;
    std::memcpy(&magnitude, &most, 4);
    float factor = kMost / magnitude, step = magnitude / kMost;
    if (most >= 0x7f800000u || !(factor <= std::numeric_limits<float>::max()))
      factor = 0.0f, step = most == 0 ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    int32_t sum = 0;
    for (int64_t i = k; i < k + unit; ++i) {
      const float scaled = x[i] * factor;
      const auto whole = static_cast<int32_t>(std::nearbyint(scaled == scaled ? scaled : 0.0f));
      values[i] = static_cast<int8_t>(whole);
      sum += whole;
    }
    steps[k / unit] = step;
    sums[k / unit] = static_cast<float>(sum);
  }
  return {x, values, steps, sums};
}

void multiply_rows(const Product* products, int64_t count, int64_t threads) {
  int64_t panels = 0, steps = 0;
  for (int64_t i = 0; i < count; ++i) panels += products[i].w.panels(), steps += steps_of(products[i].w);
  parallel_for(panels, worthwhile(threads, steps), [&](int64_t from, int64_t to) {
    const Product* product = products;
    for (int64_t panel = 0, at = 0; at < to; ++at, ++panel) {
      while (panel == product->w.panels()) ++product, panel = 0;
      if (at >= from) panel_of_any<1>(product->w, panel, &product->x, nullptr, &product->y);
    }
  });
}

}  // namespace zoo

// Whether an index fits, as zoo_quant_panel_linear takes it.
ZOO_EXPORT int64_t zoo_panels_check(const void* masks, const int32_t* pointer, int64_t blocks, int64_t rows, int64_t cols,
                                    int64_t group) try {
  using namespace zoo;
  const Panels w = panels_of(nullptr, nullptr, nullptr, masks, pointer, blocks, rows, cols, group);
  const int64_t columns = cols / group;
  for (int64_t panel = 0; panel < w.panels(); ++panel) {
    int64_t at = pointer[panel];
    for (int64_t column = 0; column < columns; ++column) {
      const uint8_t* mask = w.masks + (panel * columns + column) * kMaskBytes;
      at += (kept_rows(mask, std::min(kPanelRows, rows - panel * kPanelRows)) + kBlockGroups - 1) / kBlockGroups;
    }
    if (at != pointer[panel + 1]) throw Failure{kBadPointer};
  }
  return kOk;
} ZOO_CATCH

// x [batch, cols] and y [batch, rows] float, contiguous; cols a multiple of group, group a multiple of 16; bias [rows]
// or null.
ZOO_EXPORT int64_t zoo_quant_panel_linear(const float* x, const void* codes, const void* scales, const void* zeros,
                                          const void* masks, const int32_t* pointer, const float* bias, float* y,
                                          int64_t batch, int64_t blocks, int64_t rows, int64_t cols, int64_t group,
                                          int64_t threads) try {
  using namespace zoo;
  const Panels w = panels_of(codes, scales, zeros, masks, pointer, blocks, rows, cols, group);
  const int64_t bytes = rounded_bytes(cols);
  auto* memory = static_cast<uint8_t*>(scratch(batch * bytes + 64, 2));
  auto* rounded = scratch_of<Rounded>(batch, 1);
  for (int64_t b = 0; b < batch; ++b) rounded[b] = round_row(x + b * cols, cols, w.unit(), memory + b * bytes);
  parallel_for(w.panels(), worthwhile(threads, steps_of(w) * batch), [&](int64_t from, int64_t to) {
    for (int64_t panel = from; panel < to; ++panel)
      for (int64_t b = 0; b < batch; b += kTogether) {
        float* out[kTogether];
        for (int64_t i = 0; i < kTogether; ++i) out[i] = y + (b + i) * rows;
        switch (batch - b) {
          case 1: panel_of_any<1>(w, panel, rounded + b, bias, out); break;
          case 2: panel_of_any<2>(w, panel, rounded + b, bias, out); break;
          case 3: panel_of_any<3>(w, panel, rounded + b, bias, out); break;
          default: panel_of_any<kTogether>(w, panel, rounded + b, bias, out);
        }
      }
  });
  return kOk;
} ZOO_CATCH
