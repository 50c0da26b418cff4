// Whether an index stays inside of what a kernel may read. The sums are made in types in which they cannot wrap.
#pragma once

#include <algorithm>
#include <cstring>

#include "zoo/export.hpp"
#include "zoo/packed.hpp"

namespace zoo {

// Refuses segment ends that fall, are negative or go beyond `entries`; ends[0 .. count].
template <class Index>
ZOO_INLINE void check_ends(const Index* ends, int64_t count, int64_t entries) {
  using Unsigned = std::make_unsigned_t<Index>;
  // The top bit tells. Differences of numbers that are not negative cannot wrap, and each number is looked at itself.
  Unsigned bad = static_cast<Unsigned>(ends[0]);
  for (int64_t i = 0; i < count; ++i)
    bad |= static_cast<Unsigned>(ends[i + 1]) | (static_cast<Unsigned>(ends[i + 1]) - static_cast<Unsigned>(ends[i]));
  if (bad >> (8 * sizeof(Index) - 1) || static_cast<int64_t>(ends[count]) > entries) throw Failure{kBadPointer};
}

// Whether each of eight bytes has `wanted` bits set.
ZOO_INLINE bool bytes_have(uint64_t word, uint64_t wanted) {
  constexpr uint64_t kOnes = 0x0101010101010101ull;
  word -= (word >> 1) & (0x55 * kOnes);
  word = (word & (0x33 * kOnes)) + ((word >> 2) & (0x33 * kOnes));
  return ((word + (word >> 4)) & (0x0f * kOnes)) == wanted * kOnes;
}

// One row's mask bits: as many as its values, none beyond `columns`, `per_byte` in each whole byte where that is not 0.
ZOO_INLINE bool bits_fit(const uint8_t* bits, int64_t columns, int64_t count, int64_t per_byte) {
  int64_t found = 0, k = 0;
  bool fits = true;
  uint64_t word;
  for (; k + 64 <= columns; k += 64) {
    std::memcpy(&word, bits + k / 8, 8);
    found += __builtin_popcountll(word);
    if (per_byte > 0) fits &= bytes_have(word, static_cast<uint64_t>(per_byte));
  }
  if (k < columns) {
    std::memcpy(&word, bits + k / 8, 8);
    found += __builtin_popcountll(word);
    fits &= word >> (columns - k) == 0;
    if (per_byte > 0)
      for (int64_t byte = 0; k + 8 * (byte + 1) <= columns; ++byte)
        fits &= __builtin_popcountll(word >> (8 * byte) & 255) == per_byte;
  }
  return fits && found == count;
}

// Rows [from, to) of a packed weight (block rows of kRows4) that has `entries` entries (blocks of block layouts).
template <class T>
void check_rows(const Packed<T>& w, int64_t layout, int64_t entries, int64_t from, int64_t to) {
  const int64_t segment_rows = layout == kRows4 ? (w.rows + 3) / 4 : w.rows;
  for (int64_t p = 0; p < w.panels(); ++p) {
    const int64_t columns = std::min(w.panel, w.cols - p * w.panel);
    const int32_t* ends = w.pointer + p * segment_rows;
    check_ends(ends + from, to - from, entries);
    if (layout == kBitmask) {
      const int64_t per_byte = w.width == 2 || w.width == 4 ? w.width : 0;
      const auto* bits = static_cast<const uint8_t*>(w.index) + (p * segment_rows + from) * (w.panel / 8);
      bool fits = true;
      for (int64_t row = from; row < to; ++row, bits += w.panel / 8) {
        // Of narrow weights only the begin of each row is read, which the processor does not guess.
        for (int64_t k = 0; k < columns; k += 512) __builtin_prefetch(bits + w.panel + k / 8);
        fits &= bits_fit(bits, columns, ends[row + 1] - ends[row], per_byte);
      }
      if (!fits) throw Failure{kBadIndex};
      continue;
    }
    const auto* offsets = static_cast<const uint16_t*>(w.index);
    uint16_t most = 0, all = 0;
    for (int64_t j = ends[from]; j < ends[to]; ++j) {
      most = std::max(most, offsets[j]);
      all |= offsets[j];
    }
    const int64_t width = layout == kColumns ? w.width : 1;
    if (ends[from] < ends[to] && (most + width > columns || (all & (width - 1)) != 0)) throw Failure{kBadIndex};
  }
}

// That the segments begin with the first entry and end with the last, and that what is read behind them is zero.
template <class T>
void check_whole(const Packed<T>& w, int64_t layout, int64_t entries) {
  const int64_t segments = w.panels() * (layout == kRows4 ? (w.rows + 3) / 4 : w.rows);
  if (w.pointer[0] != 0 || w.pointer[segments] != entries) throw Failure{kBadPointer};
  if (layout == kBitmask) return;
  uint16_t all = 0;
  for (int64_t j = entries; j < entries + kOverread; ++j) all |= static_cast<const uint16_t*>(w.index)[j];
  if (all != 0) throw Failure{kBadIndex};
}

}  // namespace zoo
