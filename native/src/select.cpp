// The k-th largest magnitude over several tensors, and what is kept or zeroed by it; masks applied in place.
//
// A magnitude is the bit pattern of a float without its sign: as integers these keys have the order of the numbers,
// and everything beyond the key of infinity is a NaN. 32-bit keys are selected in one reading of the data: a small
// sample gives a bracket around the wanted rank, the keys above are counted and those within are collected. Should
// the rank lie outside of the bracket after all (or the key be 16-bit), a radix selection by histograms decides.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "zoo/export.hpp"
#include "zoo/parallel.hpp"

namespace zoo {
namespace {

constexpr int64_t kChunk = 1 << 15;  // entries whose ties are counted together; 128 KiB of floats
constexpr int64_t kSampled = 1 << 16;  // below this many entries the histograms alone are as fast

template <class Bits>
constexpr Bits magnitude(Bits bits) {
  return static_cast<Bits>(bits & (std::numeric_limits<Bits>::max() >> 1));
}

// Tensors as one sequence of `total` entries.
template <class Bits>
struct Sequence {
  Bits* const* data;
  std::vector<int64_t> start;  // of each tensor, and the total

  Sequence(void* const* pointers, const int64_t* counts, int64_t tensors)
      : data(reinterpret_cast<Bits* const*>(pointers)), start(1, 0) {
    for (int64_t t = 0; t < tensors; ++t) start.push_back(start.back() + counts[t]);
  }

  int64_t total() const { return start.back(); }

  // piece(pointer, count, index of the first entry) for the parts of tensors that make up [begin, end).
  template <class Piece>
  void pieces(int64_t begin, int64_t end, Piece&& piece) const {
    auto t = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
    for (; begin < end; ++t) {
      const int64_t stop = std::min(end, start[t + 1]);
      if (stop > begin) piece(data[t] + (begin - start[t]), stop - begin, begin);
      begin = stop;
    }
  }
};

struct Selected {
  int64_t key;    // of the smallest magnitude that is kept
  int64_t ties;   // how many entries with this key are kept
  int64_t equal;  // how many there are
  int64_t nans;   // with any NaN the rest is meaningless
};

template <class Bits>
int64_t count_nans(const Sequence<Bits>& all, Bits infinity, int64_t threads) {
  std::atomic<int64_t> nans{0};
  parallel_for(all.total(), threads, [&](int64_t begin, int64_t end) {
    int64_t found = 0;
    all.pieces(begin, end, [&](const Bits* p, int64_t n, int64_t) {
      for (int64_t i = 0; i < n; ++i) found += magnitude(p[i]) > infinity;
    });
    nans += found;
  });
  return nans;
}

// Digit by digit from the top: a histogram of the next digit of the keys that agree with the digits found so far.
template <class Bits>
Selected select_radix(const Sequence<Bits>& all, Bits infinity, int64_t kept, int64_t threads) {
  const int64_t nans = count_nans(all, infinity, threads);
  if (nans > 0) return {0, 0, 0, nans};
  constexpr int kBits = 8 * sizeof(Bits) - 1;
  constexpr int kDigit = kBits > 16 ? 11 : kBits;
  int64_t prefix = 0, rank = kept;  // the wanted key is the rank-th largest among those with this prefix
  int shift = kBits;
  while (true) {
    const int width = std::min(kDigit, shift);
    const int above = shift;
    shift -= width;
    const int64_t bins = int64_t{1} << width;
    std::vector<std::atomic<int64_t>> counts(bins);
    parallel_for(all.total(), threads, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> own(bins);
      all.pieces(begin, end, [&](const Bits* p, int64_t n, int64_t) {
        for (int64_t i = 0; i < n; ++i) {
          const int64_t key = magnitude(p[i]);
          if (key >> above == prefix) ++own[(key >> shift) & (bins - 1)];
        }
      });
      for (int64_t b = 0; b < bins; ++b) counts[b] += own[b];
    });
    int64_t bin = bins - 1;
    while (counts[bin] < rank) rank -= counts[bin--];
    prefix = prefix << width | bin;
    if (shift == 0) return {prefix, rank, counts[bin], 0};
  }
}

// What one reading of the data says about a bracket low <= key <= high.
struct Bracket {
  uint32_t low, high;
  int64_t above = 0, at_high = 0, at_low = 0;
  uint32_t largest = 0;  // of all keys: tells whether there is a NaN
  std::vector<uint32_t> between;
};

void read_bracket(const uint32_t* p, int64_t n, Bracket& out) {
  const uint32_t low = out.low, high = out.high;
  int64_t i = 0, above = 0, at_high = 0, at_low = 0;
  uint32_t largest = out.largest;
#if defined(__AVX2__)
  const __m256i clear = _mm256_set1_epi32(0x7fffffff), lows = _mm256_set1_epi32(static_cast<int>(low)),
                highs = _mm256_set1_epi32(static_cast<int>(high));
  __m256i most = _mm256_setzero_si256();
  for (; i + 16 <= n; i += 16) {
    __m256i key[2];
    unsigned over[2], upper[2], at_least[2];
    for (int h = 0; h < 2; ++h) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i + 8 * h));
      key[h] = _mm256_and_si256(bits, clear);
      most = _mm256_max_epi32(most, key[h]);
      const auto mask = [](__m256i v) { return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(v))); };
      over[h] = mask(_mm256_cmpgt_epi32(key[h], highs));
      upper[h] = mask(_mm256_cmpgt_epi32(key[h], lows));
      at_least[h] = mask(_mm256_cmpeq_epi32(key[h], lows)) | upper[h];
    }
    const unsigned counted = over[0] | over[1] << 8;
    above += __builtin_popcount(counted);
    unsigned rest = (at_least[0] | at_least[1] << 8) & ~counted;
    while (rest != 0) {
      const uint32_t k = magnitude(p[i + __builtin_ctz(rest)]);
      rest &= rest - 1;
      if (k == high) ++at_high;
      else if (k == low) ++at_low;
      else out.between.push_back(k);
    }
  }
  uint32_t lanes[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), most);
  largest = std::max(largest, *std::max_element(lanes, lanes + 8));
#endif
  for (; i < n; ++i) {
    const uint32_t k = magnitude(p[i]);
    largest = std::max(largest, k);
    if (k > high) ++above;
    else if (k == high) ++at_high;
    else if (k > low) out.between.push_back(k);
    else at_low += k == low;
  }
  out.largest = largest;
  out.above += above;
  out.at_high += at_high;
  out.at_low += at_low;
}

// Ranks to either side of the wanted one, in a sample of the keys: four standard deviations of the sampled rank.
Bracket sample_bracket(const Sequence<uint32_t>& all, int64_t kept) {
  const double total = static_cast<double>(all.total());
  const int64_t size = static_cast<int64_t>(std::pow(total, 2.0 / 3.0));
  std::vector<uint32_t> sample(size);
  uint64_t state = 0x9e3779b97f4a7c15u;
  const double part = total / static_cast<double>(size);
  size_t tensor = 0;
  for (int64_t i = 0; i < size; ++i) {  // one entry at random out of each of `size` equal parts
    state = state * 6364136223846793005u + 1442695040888963407u;
    const double place = (static_cast<double>(i) + static_cast<double>(state >> 11) * 0x1p-53) * part;
    const int64_t index = std::min(static_cast<int64_t>(place), all.total() - 1);
    while (index >= all.start[tensor + 1]) ++tensor;
    sample[i] = magnitude(all.data[tensor][index - all.start[tensor]]);
  }
  const double share = static_cast<double>(kept) / total;
  const int64_t middle = static_cast<int64_t>(share * size);
  const int64_t margin = 2 + static_cast<int64_t>(4 * std::sqrt(size * share * (1 - share)));
  Bracket bracket;
  const auto largest = [&](int64_t rank) {
    std::nth_element(sample.begin(), sample.begin() + rank, sample.end(), std::greater<uint32_t>());
    return sample[rank];
  };
  bracket.high = middle > margin ? largest(middle - margin) : 0x7fffffff;
  bracket.low = middle + margin < size ? largest(middle + margin) : 0;
  return bracket;
}

// False when the bracket missed the wanted rank, or there is a NaN.
bool select_sampled(const Sequence<uint32_t>& all, uint32_t infinity, int64_t kept, int64_t threads,
                    Selected* selected) {
  const Bracket bracket = sample_bracket(all, kept);
  std::vector<Bracket> parts(std::max<int64_t>(threads, 1), bracket);
  const int64_t count = static_cast<int64_t>(parts.size());
  parallel_for(count, threads, [&](int64_t from, int64_t to) {
    const int64_t begin = all.total() * from / count, end = all.total() * to / count;
    all.pieces(begin, end, [&](const uint32_t* p, int64_t n, int64_t) { read_bracket(p, n, parts[from]); });
  });
  Bracket sum = bracket;
  for (Bracket& part : parts) {
    if (part.largest > infinity) return false;
    sum.above += part.above;
    sum.at_high += part.at_high;
    sum.at_low += part.at_low;
    sum.between.insert(sum.between.end(), part.between.begin(), part.between.end());
  }
  int64_t rank = kept - sum.above;
  if (rank <= 0) return false;
  if (rank <= sum.at_high) {
    *selected = {sum.high, rank, sum.at_high, 0};
    return true;
  }
  rank -= sum.at_high;
  const int64_t inside = static_cast<int64_t>(sum.between.size());
  if (rank <= inside) {
    const auto wanted = sum.between.begin() + (rank - 1);
    std::nth_element(sum.between.begin(), wanted, sum.between.end(), std::greater<uint32_t>());
    const uint32_t key = *wanted;
    const auto larger = std::count_if(sum.between.begin(), wanted, [key](uint32_t k) { return k > key; });
    *selected = {key, rank - larger, std::count(sum.between.begin(), sum.between.end(), key), 0};
    return true;
  }
  rank -= inside;
  *selected = {sum.low, rank, sum.at_low, 0};
  return rank <= sum.at_low;
}

Selected select(const Sequence<uint32_t>& all, uint32_t infinity, int64_t kept, int64_t threads) {
  Selected selected;
  if (all.total() >= kSampled && select_sampled(all, infinity, kept, threads, &selected)) return selected;
  return select_radix(all, infinity, kept, threads);
}

Selected select(const Sequence<uint16_t>& all, uint16_t infinity, int64_t kept, int64_t threads) {
  return select_radix(all, infinity, kept, threads);
}

// edit(pointer, count, index of the first entry, keep) for every piece; keep(bits) tells whether an entry is kept and
// must be asked once per entry, in order: of those equal to the key only the first `ties` of the sequence are.
template <class Bits, class Edit>
void for_kept(const Sequence<Bits>& all, const Selected& s, int64_t threads, Edit&& edit) {
  const int64_t chunks = (all.total() + kChunk - 1) / kChunk;
  const Bits key = static_cast<Bits>(s.key);
  std::vector<int64_t> equal_before(chunks + 1, 0);
  if (s.ties < s.equal) {
    parallel_for(chunks, threads, [&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c) {
        int64_t equal = 0;
        all.pieces(c * kChunk, std::min(all.total(), (c + 1) * kChunk), [&](const Bits* p, int64_t n, int64_t) {
          for (int64_t i = 0; i < n; ++i) equal += magnitude(p[i]) == key;
        });
        equal_before[c + 1] = equal;
      }
    });
    for (int64_t c = 0; c < chunks; ++c) equal_before[c + 1] += equal_before[c];
  }
  parallel_for(chunks, threads, [&](int64_t from, int64_t to) {
    for (int64_t c = from; c < to; ++c) {
      int64_t quota = s.ties - equal_before[c];  // ties that are still kept in this chunk
      const bool all_ties = s.ties == s.equal || equal_before[c + 1] <= s.ties;
      all.pieces(c * kChunk, std::min(all.total(), (c + 1) * kChunk), [&](Bits* p, int64_t n, int64_t first) {
        if (all_ties || quota <= 0) {
          const Bits least = all_ties ? key : static_cast<Bits>(key + 1);
          edit(p, n, first, [least](Bits bits) { return magnitude(bits) >= least; });
        } else {
          edit(p, n, first, [key, &quota](Bits bits) {
            return magnitude(bits) > key || (magnitude(bits) == key && quota-- > 0);
          });
        }
      });
    }
  });
}

template <class Op>
void typed(int64_t bytes, Op&& op) {
  if (bytes == 4) op(uint32_t());
  else op(uint16_t());
}

template <class Bits>
void mask_range(Bits* data, const uint8_t* mask, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) data[i] &= static_cast<Bits>(-static_cast<int64_t>(mask[i]));
}

}  // namespace
}  // namespace zoo

using namespace zoo;

// result: {key of the kept-th largest magnitude, ties to keep, ties there are, NaNs}; with NaNs only the last is set.
// 1 <= kept <= sum of counts. `bytes` per value: 4 (float) or 2 (half, bfloat16); `infinity` is the key of infinity.
ZOO_EXPORT int64_t zoo_kth_magnitude(void* const* tensors, const int64_t* counts, int64_t number, int64_t kept,
                                  int64_t bytes, int64_t infinity, int64_t threads, int64_t* result) try {
  typed(bytes, [&](auto bits) {
    using Bits = decltype(bits);
    const Sequence<Bits> all(tensors, counts, number);
    const Selected selected = select(all, static_cast<Bits>(infinity), kept, threads);
    result[0] = selected.key;
    result[1] = selected.ties;
    result[2] = selected.equal;
    result[3] = selected.nans;
  });
  return zoo::kOk;
} ZOO_CATCH

// Zeroes in place whatever is not kept.
ZOO_EXPORT int64_t zoo_keep_selected(void* const* tensors, const int64_t* counts, int64_t number, int64_t key,
                                  int64_t ties, int64_t equal, int64_t bytes, int64_t threads) try {
  typed(bytes, [&](auto bits) {
    using Bits = decltype(bits);
    const Sequence<Bits> all(tensors, counts, number);
    for_kept(all, {key, ties, equal, 0}, threads, [](Bits* p, int64_t n, int64_t, auto keep) {
      for (int64_t i = 0; i < n; ++i) p[i] = keep(p[i]) ? p[i] : Bits{0};
    });
  });
  return zoo::kOk;
} ZOO_CATCH

// mask: one byte per entry of the whole sequence, 1 where it is kept.
ZOO_EXPORT int64_t zoo_mark_selected(void* const* tensors, const int64_t* counts, int64_t number, int64_t key,
                                  int64_t ties, int64_t equal, int64_t bytes, int64_t threads, uint8_t* mask) try {
  typed(bytes, [&](auto bits) {
    using Bits = decltype(bits);
    const Sequence<Bits> all(tensors, counts, number);
    for_kept(all, {key, ties, equal, 0}, threads, [mask](Bits* p, int64_t n, int64_t first, auto keep) {
      for (int64_t i = 0; i < n; ++i) mask[first + i] = keep(p[i]) ? 1 : 0;
    });
  });
  return zoo::kOk;
} ZOO_CATCH

// Zeroes, in each of several tensors of `count` entries, those where the mask is 0: the mask is read once for all.
ZOO_EXPORT int64_t zoo_apply_mask(void* const* tensors, const int64_t* bytes, int64_t number, const uint8_t* mask,
                               int64_t count, int64_t threads) try {
  const int64_t chunks = (count + kChunk - 1) / kChunk;
  parallel_for(chunks, threads, [&](int64_t from, int64_t to) {
    for (int64_t c = from; c < to; ++c) {
      const int64_t begin = c * kChunk, end = std::min(count, begin + kChunk);
      for (int64_t t = 0; t < number; ++t) {
        if (bytes[t] == 4) mask_range(static_cast<uint32_t*>(tensors[t]), mask, begin, end);
        else if (bytes[t] == 2) mask_range(static_cast<uint16_t*>(tensors[t]), mask, begin, end);
        else mask_range(static_cast<uint64_t*>(tensors[t]), mask, begin, end);
      }
    }
  });
  return zoo::kOk;
} ZOO_CATCH
