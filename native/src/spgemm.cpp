// Sparse times sparse, row by row (Gustavson): C[i, :] = sum over entries k of row i of A of A[i, k] * B[k, :].
//
// Two passes: the first counts the entries of every row, so that the result is allocated once and exactly (pages of
// memory cost more than arithmetic here), the second writes them. Rows are cut into chunks of about equal work
// (multiplications), and each row is summed by one thread in a private accumulator: a dense row whose occupied
// columns are marked in a bitmap, which also puts them in order, or, where a row has far fewer products than the
// bitmap has words, a hash table.
#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "zoo/export.hpp"
#include "zoo/parallel.hpp"

namespace zoo {
namespace {

// The dense accumulator is used where a row has at least one product per this many columns (benchmarks/spgemm.py).
constexpr int64_t kColumnsPerProduct = 256;
// Its bitmap is scanned where there is a product per this many columns, eight per word; else its columns are listed.
constexpr int64_t kColumnsScanned = 8;
constexpr int64_t kDenseColumns = int64_t{1} << 26;
constexpr int64_t kMinChunk = int64_t{1} << 16, kMaxChunk = int64_t{1} << 22;  // multiplications

template <class T, class Index>
struct Csr {
  const Index* crow;
  const Index* col;
  const T* value;
};

uint64_t word_of(int64_t col) { return static_cast<uint64_t>(col) >> 6; }
uint64_t bit_of(int64_t col) { return uint64_t{1} << (static_cast<uint64_t>(col) & 63); }

// A row of `cols` sums and a bit per column that has one. Both are clear between rows.
template <class T, class Index>
class DenseRow {
 public:
  DenseRow(int64_t cols, bool with_sums) : sums_(with_sums ? cols : 0), words_((cols + 63) / 64) {}

  void mark(Index col) { words_[word_of(col)] |= bit_of(col); }

  void add(Index col, T product) {
    sums_[col] += product;
    mark(col);
  }

  // Clears the marks; returns how many there were.
  int64_t count() {
    int64_t marked = 0;
    for (uint64_t& word : words_) {
      marked += __builtin_popcountll(word);
      word = 0;
    }
    return marked;
  }

  // Moves the sums out in order of their columns.
  void take(bool, Index* col, T* value) {
    int64_t count = 0;
    for (size_t w = 0; w < words_.size(); ++w) {
      uint64_t word = words_[w];
      if (word == 0) continue;
      words_[w] = 0;
      const int64_t base = static_cast<int64_t>(w) << 6;
      for (; word != 0; word &= word - 1) {
        const int64_t c = base + __builtin_ctzll(word);
        col[count] = static_cast<Index>(c);
        value[count++] = sums_[c];
        sums_[c] = 0;
      }
    }
  }

 private:
  template <class U, class I>
  friend class ListedRow;
  std::vector<T> sums_;
  std::vector<uint64_t> words_;
};

// The same for rows with few sums per word, where scanning words would be guesswork for the branch predictor: columns
// are listed as they are met, and the number of marks before a column is its place in the result.
template <class T, class Index>
class ListedRow {
 public:
  void bind(DenseRow<T, Index>* row, int64_t products) {
    row_ = row;
    if (static_cast<int64_t>(cols_.size()) <= products) cols_.resize(products + 1);
  }

  void mark(Index col) {
    uint64_t& word = row_->words_[word_of(col)];
    cols_[count_] = col;
    count_ += (word & bit_of(col)) == 0;
    word |= bit_of(col);
  }

  void add(Index col, T product) {
    row_->sums_[col] += product;
    mark(col);
  }

  int64_t count() {
    for (int64_t i = 0; i < count_; ++i) row_->words_[word_of(cols_[i])] = 0;
    return std::exchange(count_, 0);
  }

  void take(bool sorted, Index* col, T* value) {
    if (sorted) {
      before_.resize(row_->words_.size());
      uint32_t marks = 0;
      for (size_t w = 0; w < before_.size(); ++w) {
        before_[w] = marks;
        marks += static_cast<uint32_t>(__builtin_popcountll(row_->words_[w]));
      }
    }
    for (int64_t i = 0; i < count_; ++i) {
      const Index c = cols_[i];
      const uint64_t w = word_of(c);
      const int64_t place =
          sorted ? before_[w] + __builtin_popcountll(row_->words_[w] & (bit_of(c) - 1)) : i;
      col[place] = c;
      value[place] = std::exchange(row_->sums_[c], T(0));
    }
    count();
  }

 private:
  DenseRow<T, Index>* row_ = nullptr;
  std::vector<Index> cols_;
  std::vector<uint32_t> before_;
  int64_t count_ = 0;
};

// Open addressing with linear probing; the table is at least twice as large as a row can need, so probing ends.
template <class T, class Index>
class HashRow {
 public:
  void reserve(int64_t entries) {
    int bits = 4;
    while ((int64_t{1} << bits) < 2 * entries) ++bits;
    if (bits > bits_) {
      slots_.assign(size_t{1} << bits, Slot{-1, 0});
      bits_ = bits;
    }
    shift_ = 64 - bits;  // a small row stays in a small part of the table
    mask_ = (uint64_t{1} << bits) - 1;
  }

  void mark(Index col) { add(col, T(0)); }

  void add(Index col, T product) {
    uint64_t at = static_cast<uint64_t>(col) * 0x9e3779b97f4a7c15u >> shift_;
    while (true) {
      Slot& slot = slots_[at];
      if (slot.col == col) {
        slot.sum += product;
        return;
      }
      if (slot.col < 0) {
        slot = {col, product};
        used_.push_back(at);
        return;
      }
      at = (at + 1) & mask_;
    }
  }

  int64_t count() {
    const int64_t marked = static_cast<int64_t>(used_.size());
    for (const uint64_t at : used_) slots_[at].col = -1;
    used_.clear();
    return marked;
  }

  void take(bool sorted, Index* col, T* value) {
    if (sorted) std::sort(used_.begin(), used_.end(), [this](uint64_t a, uint64_t b) {
      return slots_[a].col < slots_[b].col;
    });
    int64_t count = 0;
    for (const uint64_t at : used_) {
      col[count] = slots_[at].col;
      value[count++] = slots_[at].sum;
      slots_[at].col = -1;
    }
    used_.clear();
  }

 private:
  struct Slot {
    Index col;
    T sum;
  };
  std::vector<Slot> slots_;
  std::vector<uint64_t> used_;
  int bits_ = 0, shift_ = 0;
  uint64_t mask_ = 0;
};

// work[i] = multiplications in the rows before i; 64-bit, since they overflow 32 bits long before the entries do.
template <class T, class Index>
std::vector<int64_t> count_work(const Csr<T, Index>& a, const Csr<T, Index>& b, int64_t rows, int64_t threads) {
  std::vector<int64_t> work(rows + 1, 0);
  parallel_rows(a.crow, rows, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t sum = 0;
      for (int64_t e = a.crow[row]; e < a.crow[row + 1]; ++e) sum += b.crow[a.col[e] + 1] - b.crow[a.col[e]];
      work[row + 1] = sum;
    }
  });
  for (int64_t row = 0; row < rows; ++row) work[row + 1] += work[row];
  return work;
}

// row(first, last) for ranges of rows of about equal work; whoever is free takes the next one, since who computes a row
// changes nothing about it. `make()` gives the private state of a thread.
template <class Make, class Rows>
void for_chunks(const std::vector<int64_t>& work, int64_t threads, Make&& make, Rows&& rows) {
  const int64_t total = static_cast<int64_t>(work.size()) - 1;
  const int64_t size = std::clamp(work[total] / (16 * std::max<int64_t>(threads, 1)), kMinChunk, kMaxChunk);
  std::vector<int64_t> first(1, 0);
  while (first.back() < total) {
    const auto stop = std::upper_bound(work.begin(), work.end(), work[first.back()] + size) - work.begin() - 1;
    first.push_back(std::max<int64_t>(first.back() + 1, stop));
  }
  const int64_t chunks = static_cast<int64_t>(first.size()) - 1;
  std::atomic<int64_t> next{0};
  parallel_for(std::min(chunks, threads), threads, [&](int64_t, int64_t) {
    auto state = make();
    for (int64_t c = next++; c < chunks; c = next++) rows(state, first[c], first[c + 1]);
  });
}

template <class T, class Index>
struct Accumulators {
  std::unique_ptr<DenseRow<T, Index>> dense;
  ListedRow<T, Index> listed;
  HashRow<T, Index> hash;
};

// use(accumulator) with the accumulator that suits a row of `products` products.
template <class T, class Index, class Use>
inline void with_row(Accumulators<T, Index>& state, int64_t products, int64_t cols, bool sums, Use&& use) {
  if (cols <= kDenseColumns && products * kColumnsPerProduct >= cols) {
    if (!state.dense) state.dense = std::make_unique<DenseRow<T, Index>>(cols, sums);
    if (products * kColumnsScanned >= cols) {
      use(*state.dense);
    } else {
      state.listed.bind(state.dense.get(), products);
      use(state.listed);
    }
  } else {
    state.hash.reserve(std::min(products, cols));
    use(state.hash);
  }
}

// counts[i] = entries of row i of the product.
template <class T, class Index>
void count_entries(const Csr<T, Index>& a, const Csr<T, Index>& b, int64_t rows, int64_t cols, int64_t threads,
                   int64_t* counts) {
  const std::vector<int64_t> work = count_work(a, b, rows, threads);
  const auto make = [] { return Accumulators<T, Index>(); };
  for_chunks(work, threads, make, [&](Accumulators<T, Index>& state, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t products = work[row + 1] - work[row];
      counts[row] = 0;
      if (products == 0) continue;
      with_row(state, products, cols, false, [&](auto& marks) {
        for (int64_t e = a.crow[row], stop = a.crow[row + 1]; e < stop; ++e) {
          const int64_t k = a.col[e];
          for (int64_t f = b.crow[k], last = b.crow[k + 1]; f < last; ++f) marks.mark(b.col[f]);
        }
        counts[row] = marks.count();
      });
    }
  });
}

template <class T, class Index>
void multiply(const Csr<T, Index>& a, const Csr<T, Index>& b, int64_t rows, int64_t cols, bool sorted, const Index* crow,
              Index* col, T* value, int64_t threads) {
  const std::vector<int64_t> work = count_work(a, b, rows, threads);
  const auto make = [] { return Accumulators<T, Index>(); };
  for_chunks(work, threads, make, [&](Accumulators<T, Index>& state, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t products = work[row + 1] - work[row];
      if (products == 0) continue;
      with_row(state, products, cols, true, [&](auto& sums) {
        for (int64_t e = a.crow[row], stop = a.crow[row + 1]; e < stop; ++e) {
          const T factor = a.value[e];
          const int64_t k = a.col[e];
          for (int64_t f = b.crow[k], last = b.crow[k + 1]; f < last; ++f) sums.add(b.col[f], factor * b.value[f]);
        }
        sums.take(sorted, col + crow[row], value + crow[row]);
      });
    }
  });
}

// out[e] = sum over j of G[i, j] * B[k, j] for every entry e = (i, k) of the pattern: rows of G become dense one by one.
template <class T, class Index>
void sampled(const Csr<T, Index>& pattern, const Csr<T, Index>& g, const Csr<T, Index>& b, int64_t rows, int64_t cols,
             T* out, int64_t threads) {
  const std::vector<int64_t> work = count_work(pattern, b, rows, threads);
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

ZOO_EXPORT void zoo_spgemm_count(const void* a_crow, const void* a_col, const void* b_crow, const void* b_col,
                                 int64_t rows, int64_t cols, int64_t index_bytes, int64_t threads, int64_t* counts) {
  typed(4, index_bytes, [&](auto, auto index) {
    using Index = decltype(index);
    count_entries(csr<float, Index>(a_crow, a_col, nullptr), csr<float, Index>(b_crow, b_col, nullptr), rows, cols,
                  threads, counts);
  });
}

// crow: the prefix sum of what zoo_spgemm_count gave.
ZOO_EXPORT void zoo_spgemm(const void* a_crow, const void* a_col, const void* a_value, const void* b_crow,
                           const void* b_col, const void* b_value, const void* crow, void* col, void* value,
                           int64_t rows, int64_t cols, int64_t sorted, int64_t value_bytes, int64_t index_bytes,
                           int64_t threads) {
  typed(value_bytes, index_bytes, [&](auto v, auto index) {
    using T = decltype(v);
    using Index = decltype(index);
    multiply(csr<T, Index>(a_crow, a_col, a_value), csr<T, Index>(b_crow, b_col, b_value), rows, cols, sorted != 0,
             static_cast<const Index*>(crow), static_cast<Index*>(col), static_cast<T*>(value), threads);
  });
}

ZOO_EXPORT void zoo_spgemm_sampled(const void* p_crow, const void* p_col, const void* g_crow, const void* g_col,
                                   const void* g_value, const void* b_crow, const void* b_col, const void* b_value,
                                   void* out, int64_t rows, int64_t cols, int64_t value_bytes, int64_t index_bytes,
                                   int64_t threads) {
  typed(value_bytes, index_bytes, [&](auto value, auto index) {
    using T = decltype(value);
    using Index = decltype(index);
    sampled(csr<T, Index>(p_crow, p_col, nullptr), csr<T, Index>(g_crow, g_col, g_value),
            csr<T, Index>(b_crow, b_col, b_value), rows, cols, static_cast<T*>(out), threads);
  });
}
