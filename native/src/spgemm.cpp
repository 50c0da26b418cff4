// Sparse times sparse, row by row (Gustavson): C[i, :] = sum over entries k of row i of A of A[i, k] * B[k, :].
//
// Two passes: the first counts the entries of every row, so that the result is allocated once and exactly (pages of
// memory cost more than arithmetic here), the second writes them. Small products are written in one pass, into room for
// as many entries as there are multiplications, and then moved together. Rows are cut into chunks of about equal work
// (multiplications), and each row is summed by one thread. It looks up where in the row a column stands: in an array
// over all columns or, where a row has far fewer products than there are columns, in a hash table. Neither is ever
// cleared: what an earlier row left there is smaller than anything that this row writes. Rows that are to be sorted
// and have many entries are summed over all columns instead, with a flag per column that has a sum.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>
#include <vector>

#include "zoo/export.hpp"
#include "zoo/parallel.hpp"

namespace zoo {
namespace {

// Wider matrices use the array over all columns only for rows with a product per kColumnsPerProduct columns; still
// wider ones always hash.
constexpr int64_t kNarrow = int64_t{1} << 22, kColumnsPerProduct = 256, kWidest = int64_t{1} << 26;
// Entries are counted by flags where there is a product per this many columns.
constexpr int64_t kColumnsFlagged = 8;
// Sorting: rows of up to kRanked entries by comparing all with all, others by the flags of their columns if there is
// an entry per kColumnsScanned of these, else digit by digit.
constexpr int64_t kRanked = 128, kColumnsScanned = 160;
constexpr int64_t kAhead = 4;  // rows of B fetched before they are needed
constexpr int64_t kMinChunk = int64_t{1} << 16, kMaxChunk = int64_t{1} << 22;  // multiplications

template <class T, class Index>
struct Csr {
  const Index* crow;
  const Index* col;
  const T* value;
};

// A place per column, in an array. A place below the row's first one is left over from an earlier row.
template <class Index>
struct ArrayPlaces {
  Index* places;
  Index& operator()(Index col, Index) const { return places[col]; }
};

// The same by open addressing with linear probing, in a table at least twice as large as the row can need.
template <class Index>
struct HashPlaces {
  struct Slot {
    Index col, place;
  };
  Slot* slots;
  int shift;
  uint64_t mask;

  uint64_t start(Index col) const { return static_cast<uint64_t>(col) * 0x9e3779b97f4a7c15u >> shift; }

  Index& operator()(Index col, Index first) const {
    uint64_t at = start(col);
    while (slots[at].place >= first && slots[at].col != col) at = (at + 1) & mask;
    slots[at].col = col;
    return slots[at].place;
  }
};

// How a row finds the place of a column. kAuto takes the faster one; the others are for comparing them.
enum Accumulator : int64_t { kAuto = 0, kArray = 1, kHash = 2 };

// What a thread keeps from row to row; everything is as large as the rows so far needed.
template <class T, class Index>
struct State {
  int64_t accumulator;
  explicit State(int64_t chosen) : accumulator(chosen) {}

  std::vector<Index> places;
  std::vector<typename HashPlaces<Index>::Slot> slots;
  std::vector<T> sums;
  std::vector<uint8_t> flags;
  std::vector<Index> cols, swapped_cols;
  std::vector<T> values, swapped_values;

  ArrayPlaces<Index> array_of(int64_t width) {
    if (places.empty()) places.assign(width, Index(-1));
    return {places.data()};
  }

  // use(lookup) for a row of the given number of products, at most `entries` of them at different columns.
  template <class Use>
  void with_places(int64_t products, int64_t entries, int64_t width, Use&& use) {
    const bool dense = width <= kNarrow || (width <= kWidest && products * kColumnsPerProduct >= width);
    if (accumulator == kAuto ? dense : accumulator == kArray) use(array_of(width));
    else use(hash_of(entries));
  }

  HashPlaces<Index> hash_of(int64_t entries) {
    int bits = 4;
    while ((int64_t{1} << bits) < 2 * entries) ++bits;
    if (slots.size() < size_t{1} << bits) slots.assign(size_t{1} << bits, {Index(-1), Index(-1)});
    return {slots.data(), 64 - bits, (uint64_t{1} << bits) - 1};
  }

  // Room for the entries of a row, and for eight more columns, as they are read and written eight at once.
  void reserve(int64_t entries) {
    if (static_cast<int64_t>(values.size()) >= entries) return;
    cols.resize(entries + 8);
    values.resize(entries);
  }

  uint8_t* flags_of(int64_t width) {
    if (flags.empty()) flags.assign((width + 7) / 8 * 8, 0);
    return flags.data();
  }
};

// use(entry of A, entry of B) for all products of a row.
template <class T, class Index, class Use>
inline __attribute__((always_inline)) void for_products(const Csr<T, Index>& a, const Csr<T, Index>& b, int64_t row,
                                                        Use&& use) {
  const Index* const __restrict inner = a.col;
  const Index* const __restrict starts = b.crow;
  for (int64_t e = a.crow[row], stop = a.crow[row + 1]; e < stop; ++e) {
    const int64_t k = inner[e];
    // Rows of B lie all over the place, and a wrong guess at the end of each keeps the processor from looking ahead.
    if (e + kAhead < stop) {
      const int64_t next = starts[inner[e + kAhead]];
      __builtin_prefetch(b.col + next);
      if (b.value != nullptr) __builtin_prefetch(b.value + next);
    }
    for (int64_t f = starts[k], last = starts[k + 1]; f < last; ++f) use(e, f);
  }
}

template <class T, class Index>
__attribute__((noinline)) int64_t count_flagged(State<T, Index>& state, const Csr<T, Index>& a, const Csr<T, Index>& b, int64_t row,
                      int64_t width) {
  uint8_t* const __restrict flags = state.flags_of(width);
  for_products(a, b, row, [=, b_col = b.col](int64_t, int64_t f) { flags[b_col[f]] = 1; });
  int64_t count = 0;
  for (size_t at = 0; at < state.flags.size(); at += 8) {
    uint64_t word;
    std::memcpy(&word, flags + at, 8);
    count += __builtin_popcountll(word);
  }
  std::fill(state.flags.begin(), state.flags.end(), uint8_t{0});
  return count;
}

// The number of different columns in a row; the places serve as stamps that bear the number of the row.
template <class T, class Index, class Places>
__attribute__((noinline)) int64_t count_met(const Places lookup, const Csr<T, Index>& a, const Csr<T, Index>& b,
                                            int64_t row) {
  const Places places = lookup;
  const Index stamp = static_cast<Index>(row);
  int64_t count = 0;
  for_products(a, b, row, [&, b_col = b.col](int64_t, int64_t f) {
    Index& place = places(b_col[f], stamp);
    count += place < stamp;
    place = stamp;
  });
  return count;
}

// The entries of a row in the order in which their columns are met, and their number. No branch asks whether a column is new, since it
// would be guessed wrong too often: seen from the row's first place, one left over is beyond all places so far.
template <class T, class Index, class Places>
__attribute__((noinline)) int64_t sum_row(const Places lookup, const Csr<T, Index>& a, const Csr<T, Index>& b,
                                          int64_t row, Index first, Index* __restrict cols, T* __restrict values) {
  using Unsigned = std::make_unsigned_t<Index>;
  const Index* const __restrict b_col = b.col;
  const T* const __restrict b_value = b.value;
  const Places places = lookup;
  Unsigned count = 0;
  for_products(a, b, row, [&, factors = a.value](int64_t e, int64_t f) {
    const Index c = b_col[f];
    Index& place = places(c, first);
    const Unsigned known = static_cast<Unsigned>(place) - static_cast<Unsigned>(first);
    const Unsigned at = known < count ? known : count;
    count += at == count;
    place = first + static_cast<Index>(at);
    cols[at] = c;
    values[at] += factors[e] * b_value[f];
  });
  return count;
}

// kSet[mask] lists the bits that are set in it.
struct SetBits {
  uint8_t at[256][8];
  constexpr SetBits() : at() {
    for (int mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (int bit = 0; bit < 8; ++bit)
        if ((mask >> bit) & 1) at[mask][count++] = static_cast<uint8_t>(bit);
    }
  }
};
constexpr SetBits kSet{};

// The entries of a row in the order of their columns, by a sum and a flag for every column; returns their number.
template <class T, class Index>
__attribute__((noinline)) int64_t sum_row_flagged(State<T, Index>& state, const Csr<T, Index>& a,
                                                  const Csr<T, Index>& b, int64_t row, int64_t width, int64_t bound,
                                                  Index* __restrict cols, T* __restrict values) {
  uint8_t* const __restrict flags = state.flags_of(width);
  if (state.sums.empty()) state.sums.assign(width, T(0));
  T* const __restrict sums = state.sums.data();
  for_products(a, b, row, [=, factors = a.value, b_col = b.col, b_value = b.value](int64_t e, int64_t f) {
    const int64_t c = b_col[f];
    sums[c] += factors[e] * b_value[f];
    flags[c] = 1;
  });
  state.reserve(bound);
  Index* const __restrict list = state.cols.data();
  int64_t entries = 0;
  for (int64_t base = 0; base < width; base += 8) {
    uint64_t word;
    std::memcpy(&word, flags + base, 8);
    const uint64_t mask = word * 0x0102040810204080u >> 56;  // byte i becomes bit i (bytes are 0 or 1)
    for (int i = 0; i < 8; ++i) list[entries + i] = static_cast<Index>(base) + kSet.at[mask][i];
    entries += __builtin_popcountll(mask);
  }
  for (int64_t i = 0; i < entries; ++i) {
    const Index c = list[i];
    cols[i] = c;
    values[i] = sums[c];
    sums[c] = 0;
    flags[c] = 0;
  }
  return entries;
}

// Sorts a short row: the place of an entry is the number of columns below its own. `from_cols` is readable up to a
// multiple of eight.
template <class T, class Index>
void sort_by_rank(int64_t entries, const Index* from_cols, const T* from_values, Index* cols, T* values) {
  constexpr int kLanes = 32 / sizeof(Index);
  typedef Index Vec __attribute__((vector_size(32)));
  for (int64_t i = 0; i < entries; i += kLanes) {
    Vec own, rank{};
    std::memcpy(&own, from_cols + i, sizeof own);
    for (int64_t j = 0; j < entries; ++j) rank -= (Vec{} + from_cols[j]) < own;  // true is -1
    for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, entries - i); ++lane) {
      cols[rank[lane]] = from_cols[i + lane];
      values[rank[lane]] = from_values[i + lane];
    }
  }
}

// Sorts state.cols and state.values into cols and values, eight bits of the columns at a time.
template <class T, class Index>
void sort_by_digits(State<T, Index>& state, int64_t entries, int64_t width, Index* cols, T* values) {
  state.swapped_cols.resize(state.cols.size());
  state.swapped_values.resize(state.values.size());
  for (int shift = 0; shift == 0 || (width - 1) >> shift > 0; shift += 8) {
    int64_t start[257] = {};
    for (int64_t i = 0; i < entries; ++i) ++start[((state.cols[i] >> shift) & 255) + 1];
    for (int d = 0; d < 256; ++d) start[d + 1] += start[d];
    for (int64_t i = 0; i < entries; ++i) {
      const int64_t to = start[(state.cols[i] >> shift) & 255]++;
      state.swapped_cols[to] = state.cols[i];
      state.swapped_values[to] = state.values[i];
    }
    state.cols.swap(state.swapped_cols);
    state.values.swap(state.swapped_values);
  }
  std::copy_n(state.cols.data(), entries, cols);
  std::copy_n(state.values.data(), entries, values);
}

// work[i] = multiplications in the rows before i; 64-bit, since they overflow 32 bits long before the entries do.
template <class Index>
void count_work(const Index* crow, const Index* col, const Index* b_crow, int64_t rows, int64_t threads,
                int64_t* work) {
  work[0] = 0;
  parallel_rows(crow, rows, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t sum = 0;
      for (int64_t e = crow[row]; e < crow[row + 1]; ++e) sum += b_crow[col[e] + 1] - b_crow[col[e]];
      work[row + 1] = sum;
    }
  });
  for (int64_t row = 0; row < rows; ++row) work[row + 1] += work[row];
}

// row(first, last) for ranges of rows of about equal work; whoever is free takes the next one, since who computes a row
// changes nothing about it. `make()` gives the private state of a thread.
template <class Make, class Rows>
void for_chunks(const int64_t* work, int64_t total, int64_t threads, Make&& make, Rows&& rows) {
  const int64_t size = std::clamp(work[total] / (16 * std::max<int64_t>(threads, 1)), kMinChunk, kMaxChunk);
  std::vector<int64_t> first(1, 0);
  while (first.back() < total) {
    const auto stop = std::upper_bound(work, work + total + 1, work[first.back()] + size) - work - 1;
    first.push_back(std::max<int64_t>(first.back() + 1, stop));
  }
  const int64_t chunks = static_cast<int64_t>(first.size()) - 1;
  std::atomic<int64_t> next{0};
  parallel_for(std::min(chunks, threads), threads, [&](int64_t, int64_t) {
    auto state = make();
    for (int64_t c = next++; c < chunks; c = next++) rows(state, first[c], first[c + 1]);
  });
}

// counts[i] = entries of row i of the product.
template <class T, class Index>
void count_entries(const Csr<T, Index>& a, const Csr<T, Index>& b, const int64_t* work, int64_t rows, int64_t width,
                   int64_t accumulator, int64_t threads, int64_t* counts) {
  const auto make = [=] { return State<T, Index>(accumulator); };
  for_chunks(work, rows, threads, make, [&](State<T, Index>& state, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t products = work[row + 1] - work[row];
      if (accumulator != kHash && products * kColumnsFlagged >= width && width <= kWidest) {
        counts[row] = products == 0 ? 0 : count_flagged(state, a, b, row, width);
        continue;
      }
      state.with_places(products, std::min(products, width), width, [&](const auto& places) {
        counts[row] = count_met(places, a, b, row);
      });
    }
  });
}

// A row of at most `bound` entries, in the order of their columns if `sorted`; returns how many it has.
template <class T, class Index>
int64_t multiply_row(State<T, Index>& state, const Csr<T, Index>& a, const Csr<T, Index>& b, int64_t row, int64_t width,
                     bool sorted, Index first, int64_t bound, int64_t products, Index* cols, T* values) {
  if (state.accumulator != kHash && sorted && bound > kRanked && bound * kColumnsScanned >= width && width <= kWidest)
    return sum_row_flagged(state, a, b, row, width, bound, cols, values);
  if (sorted) state.reserve(bound);
  int64_t entries = 0;
  T* const sums = sorted ? state.values.data() : values;
  std::fill_n(sums, bound, T(0));
  state.with_places(products, bound, width, [&](const auto& places) {
    entries = sum_row(places, a, b, row, first, sorted ? state.cols.data() : cols, sums);
  });
  if (!sorted) return entries;
  if (entries <= kRanked) sort_by_rank(entries, state.cols.data(), state.values.data(), cols, values);
  else sort_by_digits(state, entries, width, cols, values);
  return entries;
}

// Row i is written from start[i] on, where there is room up to start[i + 1]; its entries go to counts[i], if asked for.
template <class T, class Index, class Start>
void multiply(const Csr<T, Index>& a, const Csr<T, Index>& b, const int64_t* work, int64_t rows, int64_t width,
              bool sorted, int64_t accumulator, const Start* start, Index* col, T* value, int64_t* counts,
              int64_t threads) {
  const auto make = [=] { return State<T, Index>(accumulator); };
  for_chunks(work, rows, threads, make, [&](State<T, Index>& state, int64_t begin, int64_t end) {
    if (!sorted && accumulator != kHash && width <= kNarrow) {  // many short rows: as little as possible for each
      const ArrayPlaces<Index> places = state.array_of(width);
      std::fill(value + start[begin], value + start[end], T(0));
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = start[row];
        const int64_t entries = sum_row(places, a, b, row, static_cast<Index>(first), col + first, value + first);
        if (counts != nullptr) counts[row] = entries;
      }
      return;
    }
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = start[row], bound = std::min<int64_t>(start[row + 1] - first, width);
      const int64_t entries =
          bound == 0 ? 0
                     : multiply_row(state, a, b, row, width, sorted, static_cast<Index>(first), bound,
                                    work[row + 1] - work[row], col + first, value + first);
      if (counts != nullptr) counts[row] = entries;
    }
  });
}

// Of the hash tables that rows would use: lookups, slots looked at, and the most for one lookup.
template <class Index>
void count_probes(const Csr<float, Index>& a, const Csr<float, Index>& b, const int64_t* work, int64_t rows,
                  int64_t width, int64_t* counts) {
  State<float, Index> state(kHash);
  std::fill_n(counts, 3, int64_t{0});
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t products = work[row + 1] - work[row];
    const HashPlaces<Index> table = state.hash_of(std::min(products, width));
    const Index stamp = static_cast<Index>(row);
    for_products(a, b, row, [&](int64_t, int64_t f) {
      const Index col = b.col[f];
      int64_t looked = 1;
      for (uint64_t at = table.start(col); table.slots[at].place >= stamp && table.slots[at].col != col;
           at = (at + 1) & table.mask)
        ++looked;
      table(col, stamp) = stamp;
      ++counts[0];
      counts[1] += looked;
      counts[2] = std::max(counts[2], looked);
    });
  }
}

// out[e] = sum over j of G[i, j] * B[k, j] for every entry e = (i, k) of the pattern: rows of G become dense one by one.
template <class T, class Index>
void sampled(const Csr<T, Index>& pattern, const Csr<T, Index>& g, const Csr<T, Index>& b, int64_t rows, int64_t cols,
             T* out, int64_t threads) {
  std::vector<int64_t> work(rows + 1);
  count_work(pattern.crow, pattern.col, b.crow, rows, threads, work.data());
  parallel_rows(work.data(), rows, 8, threads, [&](int64_t begin, int64_t end) {
    std::vector<T> dense(cols, T(0));
    for (int64_t row = begin; row < end; ++row) {
      if (pattern.crow[row] == pattern.crow[row + 1]) continue;
      for (int64_t e = g.crow[row]; e < g.crow[row + 1]; ++e) dense[g.col[e]] += g.value[e];
      for (int64_t e = pattern.crow[row]; e < pattern.crow[row + 1]; ++e) {
        const int64_t k = pattern.col[e];
        T sum = 0;
        for (int64_t f = b.crow[k]; f < b.crow[k + 1]; ++f) sum += dense[b.col[f]] * b.value[f];
        out[e] = sum;
      }
      for (int64_t e = g.crow[row]; e < g.crow[row + 1]; ++e) dense[g.col[e]] = 0;
    }
  });
}

template <class Op>
void typed(int64_t value_bytes, int64_t index_bytes, Op&& op) {
  if (value_bytes == 4 && index_bytes == 4) op(float(), int32_t());
  else if (value_bytes == 4) op(float(), int64_t());
  else if (index_bytes == 4) op(double(), int32_t());
  else op(double(), int64_t());
}

template <class T, class Index>
Csr<T, Index> csr(const void* crow, const void* col, const void* value) {
  return {static_cast<const Index*>(crow), static_cast<const Index*>(col), static_cast<const T*>(value)};
}

}  // namespace
}  // namespace zoo

using namespace zoo;

// work[0 .. rows]: multiplications in the rows before each row.
ZOO_EXPORT int64_t zoo_spgemm_work(const void* a_crow, const void* a_col, const void* b_crow, int64_t rows,
                                int64_t index_bytes, int64_t threads, int64_t* work) try {
  typed(4, index_bytes, [&](auto, auto index) {
    using Index = decltype(index);
    count_work(static_cast<const Index*>(a_crow), static_cast<const Index*>(a_col), static_cast<const Index*>(b_crow),
               rows, threads, work);
  });
  return zoo::kOk;
} ZOO_CATCH

ZOO_EXPORT int64_t zoo_spgemm_count(const void* a_crow, const void* a_col, const void* b_crow, const void* b_col,
                                 const int64_t* work, int64_t rows, int64_t cols, int64_t accumulator,
                                 int64_t index_bytes, int64_t threads, int64_t* counts) try {
  typed(4, index_bytes, [&](auto, auto index) {
    using Index = decltype(index);
    count_entries(csr<float, Index>(a_crow, a_col, nullptr), csr<float, Index>(b_crow, b_col, nullptr), work, rows,
                  cols, accumulator, threads, counts);
  });
  return zoo::kOk;
} ZOO_CATCH

// counts[0 .. 3): lookups, slots looked at and the most for one lookup, if all rows used the hash table.
ZOO_EXPORT int64_t zoo_spgemm_probes(const void* a_crow, const void* a_col, const void* b_crow, const void* b_col,
                                  const int64_t* work, int64_t rows, int64_t cols, int64_t index_bytes,
                                  int64_t* counts) try {
  typed(4, index_bytes, [&](auto, auto index) {
    using Index = decltype(index);
    count_probes(csr<float, Index>(a_crow, a_col, nullptr), csr<float, Index>(b_crow, b_col, nullptr), work, rows, cols,
                 counts);
  });
  return zoo::kOk;
} ZOO_CATCH

// crow: where each row of the product starts, the prefix sum of what zoo_spgemm_count gave. Null: the product stays in
// scratch memory, where each row starts at its work[row], until zoo_spgemm_pack fetches it from the same thread; counts
// tells how many entries the rows have.
ZOO_EXPORT int64_t zoo_spgemm(const void* a_crow, const void* a_col, const void* a_value, const void* b_crow,
                           const void* b_col, const void* b_value, const int64_t* work, const void* crow, void* col,
                           void* value, int64_t* counts, int64_t rows, int64_t cols, int64_t sorted,
                           int64_t accumulator, int64_t value_bytes, int64_t index_bytes, int64_t threads) try {
  typed(value_bytes, index_bytes, [&](auto v, auto index) {
    using T = decltype(v);
    using Index = decltype(index);
    const Csr<T, Index> a = csr<T, Index>(a_crow, a_col, a_value), b = csr<T, Index>(b_crow, b_col, b_value);
    const auto run = [&](const auto* start, Index* to_col, T* to_value) {
      multiply(a, b, work, rows, cols, sorted != 0, accumulator, start, to_col, to_value, counts, threads);
    };
    if (crow == nullptr) {
      run(work, scratch_of<Index>(work[rows], 0), scratch_of<T>(work[rows], 1));
      return;
    }
    const Index* const start = static_cast<const Index*>(crow);
    expect_large(col, start[rows] * index_bytes);
    expect_large(value, start[rows] * value_bytes);
    run(start, static_cast<Index*>(col), static_cast<T*>(value));
  });
  return zoo::kOk;
} ZOO_CATCH

// Moves the rows that zoo_spgemm left in scratch memory to where crow says.
ZOO_EXPORT int64_t zoo_spgemm_pack(const int64_t* work, const void* crow, void* col, void* value, int64_t rows,
                                int64_t value_bytes, int64_t index_bytes, int64_t threads) try {
  typed(value_bytes, index_bytes, [&](auto v, auto index) {
    using T = decltype(v);
    using Index = decltype(index);
    const Index* const start = static_cast<const Index*>(crow);
    const Index* const from_col = scratch_of<Index>(work[rows], 0);
    const T* const from_value = scratch_of<T>(work[rows], 1);
    parallel_rows(start, rows, 8, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t count = start[row + 1] - start[row];
        std::copy_n(from_col + work[row], count, static_cast<Index*>(col) + start[row]);
        std::copy_n(from_value + work[row], count, static_cast<T*>(value) + start[row]);
      }
    });
  });
  return zoo::kOk;
} ZOO_CATCH

ZOO_EXPORT int64_t zoo_spgemm_sampled(const void* p_crow, const void* p_col, const void* g_crow, const void* g_col,
                                   const void* g_value, const void* b_crow, const void* b_col, const void* b_value,
                                   void* out, int64_t rows, int64_t cols, int64_t value_bytes, int64_t index_bytes,
                                   int64_t threads) try {
  typed(value_bytes, index_bytes, [&](auto value, auto index) {
    using T = decltype(value);
    using Index = decltype(index);
    sampled(csr<T, Index>(p_crow, p_col, nullptr), csr<T, Index>(g_crow, g_col, g_value),
            csr<T, Index>(b_crow, b_col, b_value), rows, cols, static_cast<T*>(out), threads);
  });
  return zoo::kOk;
} ZOO_CATCH
