// Checks of indices and digests of contents, for what is kept beyond a call (shared/ops/cache.py).
#include "zoo/check.hpp"

#include <atomic>
#include <limits>

#include "zoo/parallel.hpp"

namespace zoo {
namespace {

constexpr int64_t kPerStep = 16;  // entries that are looked at in a step of `worthwhile`

template <class Index>
void check_csr(const Index* crow, const Index* col, int64_t rows, int64_t cols, int64_t entries, int64_t threads) {
  if (crow[0] != 0 || crow[rows] != entries) throw Failure{kBadPointer};
  parallel_for(rows, worthwhile(threads, rows / kPerStep),
               [&](int64_t begin, int64_t end) { check_ends(crow + begin, end - begin, entries); });
  using Unsigned = std::make_unsigned_t<Index>;
  const Unsigned last = static_cast<Unsigned>(std::min<int64_t>(cols - 1, std::numeric_limits<Index>::max()));
  parallel_for(entries, worthwhile(threads, entries / kPerStep), [&](int64_t begin, int64_t end) {
    Unsigned bad = 0;
    for (int64_t e = begin; e < end; ++e) {
      const Unsigned c = static_cast<Unsigned>(col[e]);
      bad |= c | (last - c);  // neither is negative, so that the difference cannot wrap
    }
    if (bad >> (8 * sizeof(Index) - 1)) throw Failure{kBadIndex};
  });
}

// Whether all of `count` numbers lie in [first, limit).
bool within(const int32_t* numbers, int64_t count, int64_t first, int64_t limit) {
  int32_t least = std::numeric_limits<int32_t>::max(), most = std::numeric_limits<int32_t>::min();
  for (int64_t i = 0; i < count; ++i) {
    least = std::min(least, numbers[i]);
    most = std::max(most, numbers[i]);
  }
  return count == 0 || (least >= first && most < limit);
}

template <class Bits>
bool finite(const Bits* numbers, int64_t count, Bits infinity) {
  const Bits magnitude = static_cast<Bits>(~Bits{0}) >> 1;
  Bits most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max<Bits>(most, numbers[i] & magnitude);
  return most < infinity;
}

// Sixteen sums of words side by side, after XXH3: each adds its neighbour's words as they are, so that no change of one
// word is lost, and the product of the two halves of its own, which were mixed with a key that counts the blocks, so that
// places differ. At the end all are folded into one number (as wyhash does).
class Digest {
 public:
  explicit Digest(uint64_t seed) {
    for (uint64_t i = 0; i < kWords; ++i) {
      sums_[i] = seed + kKeys[i % 4] * (2 * i + 1);
      keys_[i] = kKeys[(i + 1) % 4] * (2 * i + 3);
    }
  }
  // Whole blocks of each row, and then what is left of all rows, one after the other.
  void add(const uint8_t* data, int64_t rows, int64_t bytes, int64_t stride) {
    const int64_t blocks = bytes / kBytes, left = bytes - blocks * kBytes;
    if (blocks > 0) add_blocks(data, rows, blocks, stride);
    if (left == 0) return;
    uint8_t rest[2 * kBytes];
    int64_t filled = 0;
    for (int64_t row = 0; row < rows; ++row) {
      std::memcpy(rest + filled, data + row * stride + blocks * kBytes, static_cast<size_t>(left));
      filled += left;
      if (filled < kBytes) continue;
      add_blocks(rest, 1, 1, 0);
      filled -= kBytes;
      std::memmove(rest, rest + kBytes, static_cast<size_t>(filled));
    }
    std::memset(rest + filled, 0, static_cast<size_t>(kBytes - filled));
    add_blocks(rest, 1, 1, 0);
  }
  uint64_t result() const {
    uint64_t all = kKeys[3];
    for (const uint64_t sum : sums_) all = fold(all ^ kKeys[1], sum ^ kKeys[2]);
    return all;
  }

 private:
  static constexpr int64_t kWords = 16, kBytes = 8 * kWords;
  static constexpr uint64_t kKeys[4] = {0x9e3779b97f4a7c15ull, 0xe7037ed1a0b428dbull, 0x8ebc6af09c88c6e3ull,
                                        0x589965cc75374cc3ull};
  uint64_t sums_[kWords], keys_[kWords];

  static uint64_t fold(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  }
#if defined(__AVX2__)
  void add_blocks(const uint8_t* first, int64_t rows, int64_t blocks, int64_t stride) {
    constexpr int kVectors = kBytes / 32;
    __m256i sums[kVectors], keys[kVectors];
    const auto at = [](auto* words, int i) { return reinterpret_cast<const __m256i*>(words) + i; };
    for (int i = 0; i < kVectors; ++i) {
      sums[i] = _mm256_loadu_si256(at(sums_, i));
      keys[i] = _mm256_loadu_si256(at(keys_, i));
    }
    const __m256i step = _mm256_set1_epi64x(static_cast<int64_t>(kKeys[0]));
    for (int64_t row = 0; row < rows; ++row) {
      const uint8_t* data = first + row * stride;
      for (int64_t block = 0; block < blocks; ++block, data += kBytes)
        for (int i = 0; i < kVectors; ++i) {
          const __m256i words = _mm256_loadu_si256(at(data, i)), mixed = _mm256_xor_si256(words, keys[i]);
          sums[i] = _mm256_add_epi64(sums[i], _mm256_shuffle_epi32(words, 0x4e));
          sums[i] = _mm256_add_epi64(sums[i], _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32)));
          keys[i] = _mm256_add_epi64(keys[i], step);
        }
    }
    for (int i = 0; i < kVectors; ++i) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums_) + i, sums[i]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(keys_) + i, keys[i]);
    }
  }
#else
  void add_blocks(const uint8_t* first, int64_t rows, int64_t blocks, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t block = 0; block < blocks; ++block) {
        uint64_t words[kWords];
        std::memcpy(words, first + row * stride + block * kBytes, kBytes);
        for (int64_t i = 0; i < kWords; ++i) {
          const uint64_t mixed = words[i] ^ keys_[i];
          sums_[i] += words[i ^ 1] + (mixed & 0xffffffffull) * (mixed >> 32);
          keys_[i] += kKeys[0];
        }
      }
  }
#endif
};

}  // namespace
}  // namespace zoo

using namespace zoo;

// crow rises from 0 to `entries`, columns lie in [0, cols).
ZOO_EXPORT int64_t zoo_csr_check(const void* crow, const void* col, int64_t rows, int64_t cols, int64_t entries,
                                 int64_t index_bytes, int64_t threads) try {
  if (index_bytes == 4)
    check_csr(static_cast<const int32_t*>(crow), static_cast<const int32_t*>(col), rows, cols, entries, threads);
  else
    check_csr(static_cast<const int64_t*>(crow), static_cast<const int64_t*>(col), rows, cols, entries, threads);
  return kOk;
} ZOO_CATCH

// Pairs (source, target) in segments of (tile of targets, offset): sources in [0, sources), targets in their tile and
// rising in their segment, as the sums of several are kept side by side.
ZOO_EXPORT int64_t zoo_pairs_check(const int32_t* source, const int32_t* target, const int64_t* start, int64_t pairs,
                                   int64_t offsets, int64_t sources, int64_t targets, int64_t tile,
                                   int64_t threads) try {
  const int64_t tiles = (targets + tile - 1) / tile;
  if (start[0] != 0 || start[tiles * offsets] != pairs) throw Failure{kBadPointer};
  check_ends(start, tiles * offsets, pairs);
  parallel_for(tiles, worthwhile(threads, pairs / kPerStep), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t from = start[t * offsets], count = start[(t + 1) * offsets] - from;
      if (!within(source + from, count, 0, sources) ||
          !within(target + from, count, t * tile, std::min(targets, (t + 1) * tile)))
        throw Failure{kBadIndex};
      bool rises = true;
      for (int64_t k = t * offsets; k < (t + 1) * offsets; ++k)
        for (int64_t i = start[k] + 1; i < start[k + 1]; ++i) rises &= target[i] > target[i - 1];
      if (!rises) throw Failure{kBadIndex};
    }
  });
  return kOk;
} ZOO_CATCH

// A packed weight, as zoo_sparse_linear takes it.
ZOO_EXPORT int64_t zoo_packed_check(const void* index, const int32_t* pointer, int64_t entries, int64_t rows,
                                    int64_t cols, int64_t panel, int64_t layout, int64_t width, int64_t threads) try {
  const Packed<float> w{nullptr, index, pointer, rows, cols, panel, width};
  check_whole(w, layout, entries);
  const int64_t segment_rows = layout == kRows4 ? (rows + 3) / 4 : rows;
  parallel_for(segment_rows, worthwhile(threads, entries / kPerStep),
               [&](int64_t from, int64_t to) { check_rows(w, layout, entries, from, to); });
  if (layout == kBitmask && cols > 0 && cols < panel) {  // bytes that no kernel reads are none of a wider weight either
    const auto* bits = static_cast<const uint8_t*>(index);
    uint8_t all = 0;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t byte = (cols + 63) / 64 * 8; byte < panel / 8; ++byte) all |= bits[row * (panel / 8) + byte];
    if (all != 0) throw Failure{kBadIndex};
  }
  return kOk;
} ZOO_CATCH

// A number that changes with the content of `rows` times `bytes` bytes, `stride` bytes apart.
ZOO_EXPORT int64_t zoo_digest(const void* data, int64_t rows, int64_t bytes, int64_t stride, int64_t seed) {
  Digest digest(static_cast<uint64_t>(seed));
  digest.add(static_cast<const uint8_t*>(data), rows, bytes, stride);
  return static_cast<int64_t>(digest.result());
}

// 1 where none of `count` floating-point numbers of `bytes` each is infinite or NaN; `infinity`: its bits.
ZOO_EXPORT int64_t zoo_finite(const void* numbers, int64_t count, int64_t bytes, int64_t infinity) {
  if (bytes == 4) return finite(static_cast<const uint32_t*>(numbers), count, static_cast<uint32_t>(infinity));
  if (bytes == 2) return finite(static_cast<const uint16_t*>(numbers), count, static_cast<uint16_t>(infinity));
  return finite(static_cast<const uint64_t*>(numbers), count, static_cast<uint64_t>(infinity));
}
