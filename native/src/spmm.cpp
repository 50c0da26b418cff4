// Products of a CSR matrix (a graph's adjacency) with a dense matrix of features, and their gradients.
//
// Every output row belongs to one thread and sums its entries in storage order, so the result does not depend on the
// number of threads. The features are cut into blocks whose sums stay in registers while the entries of a row go by;
// the rows of x that come next are prefetched, since their addresses are known and otherwise each is a cache miss.
#include <algorithm>
#include <atomic>
#include <limits>
#include <type_traits>
#include <vector>

#include "zoo/export.hpp"
#include "zoo/lanes.hpp"
#include "zoo/parallel.hpp"

namespace zoo {
namespace {

constexpr int64_t kRowCost = 2;    // an empty row costs about as much as two entries
constexpr int64_t kPrefetch = 8;  // entries ahead
constexpr int64_t kCacheLine = 64;

// The entries of a CSR matrix. Weight of entry e: 1, weight[e] or weight[order[e]].
template <class T, class Index>
struct Entries {
  const Index* crow;
  const Index* col;
  const T* weight;
  const Index* order;
  int64_t count;

  T weight_of(int64_t e) const { return weight == nullptr ? T(1) : weight[order == nullptr ? e : order[e]]; }
};

// Always inlined: GCC takes a function that only prefetches for one without effect and drops calls of it.
template <int V, class T>
inline __attribute__((always_inline)) void prefetch_row(const T* row) {
  const char* next = reinterpret_cast<const char*>(row);
  for (int64_t byte = 0; byte < V * kVectorBytes; byte += kCacheLine) __builtin_prefetch(next + byte);
}

// Largest weight * x[col] and the position (within the row) of the first entry that has it; a NaN is largest.
template <int V, class T, class Index>
inline void max_block(const Entries<T, Index>& a, int64_t row, const T* x, int64_t features, T* out, int32_t* arg) {
  using Vec = typename Lanes<T>::Vec;
  using Bits = typename Lanes<T>::Bits;
  using Lane = std::conditional_t<std::is_same<T, float>::value, int32_t, int64_t>;
  constexpr int64_t lanes = Lanes<T>::kCount;
  const int64_t begin = a.crow[row], end = a.crow[row + 1];
  Vec best[V] = {};
  Bits at[V];
  for (int v = 0; v < V; ++v) at[v] = Bits{} - 1;
  for (int64_t e = begin; e < end; ++e) {
    prefetch_row<V>(x + static_cast<int64_t>(a.col[std::min(e + kPrefetch, a.count - 1)]) * features);
    const T* from = x + static_cast<int64_t>(a.col[e]) * features;
    const Vec weight = splat_vec<T>(a.weight_of(e));
    const Bits position = Bits{} + static_cast<Lane>(e - begin);
    for (int v = 0; v < V; ++v) {
      const Vec message = weight * load_vec(from + v * lanes);
      const Bits take = (message > best[v]) | ((message != message) & (best[v] == best[v])) | (at[v] < 0);
      best[v] = take ? message : best[v];
      at[v] = take ? position : at[v];
    }
  }
  for (int v = 0; v < V; ++v) {
    store_vec(out + v * lanes, best[v]);
    for (int64_t i = 0; i < lanes; ++i) arg[v * lanes + i] = static_cast<int32_t>(at[v][i]);
  }
}

template <class T, class Index>
void sum_narrow(const Entries<T, Index>& a, int64_t row, const T* x, int64_t features, bool mean, T* out) {
  const int64_t begin = a.crow[row], end = a.crow[row + 1];
  T acc[Lanes<T>::kCount] = {};
  for (int64_t e = begin; e < end; ++e)
    for (int64_t f = 0; f < features; ++f)
      acc[f] += a.weight_of(e) * x[static_cast<int64_t>(a.col[e]) * features + f];
  const T scale = mean && end > begin ? T(1) / static_cast<T>(end - begin) : T(1);
  for (int64_t f = 0; f < features; ++f) out[f] = acc[f] * scale;
}

template <class T, class Index>
void max_narrow(const Entries<T, Index>& a, int64_t row, const T* x, int64_t features, T* out, int32_t* arg) {
  for (int64_t f = 0; f < features; ++f) {
    T best = 0;
    int32_t at = -1;
    for (int64_t e = a.crow[row]; e < a.crow[row + 1]; ++e) {
      const T message = a.weight_of(e) * x[static_cast<int64_t>(a.col[e]) * features + f];
      if (at < 0 || message > best || (message != message && best == best)) {
        best = message;
        at = static_cast<int32_t>(e - a.crow[row]);
      }
    }
    out[f] = best;
    arg[f] = at;
  }
}

// Calls block(width, offset) for pieces of 16, 8, 4, 2 and 1 vectors that cover [0, features). The last piece overlaps its
// neighbour when the width is no multiple of a vector: the shared columns get the same value twice.
template <class T, class Block>
inline void cover(int64_t features, Block&& block) {
  constexpr int64_t lanes = Lanes<T>::kCount;
  int64_t f = 0;
  for (; f + 16 * lanes <= features; f += 16 * lanes) block(std::integral_constant<int, 16>(), f);
  if (f + 8 * lanes <= features) block(std::integral_constant<int, 8>(), f), f += 8 * lanes;
  if (f + 4 * lanes <= features) block(std::integral_constant<int, 4>(), f), f += 4 * lanes;
  if (f + 2 * lanes <= features) block(std::integral_constant<int, 2>(), f), f += 2 * lanes;
  if (f + lanes <= features) block(std::integral_constant<int, 1>(), f), f += lanes;
  if (f < features) block(std::integral_constant<int, 1>(), features - lanes);
}

// V vectors of features of rows [begin, end); x and out begin with those features. kWhole: they are all there are, and
// the place of a row is found without a multiplication.
template <int V, bool kWhole, int kWeights, class T, class Index>
void sum_rows(const Entries<T, Index>& a, const T* x, int64_t width, int64_t begin, int64_t end, bool mean, T* out) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t lanes = Lanes<T>::kCount;
  const int64_t features = kWhole ? V * lanes : width;
  const int64_t last_entry = a.count - 1;
  int64_t e = a.crow[begin];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = e, last = a.crow[row + 1];
    Vec acc[V] = {};
    for (; e < last; ++e) {
      prefetch_row<V>(x + static_cast<int64_t>(a.col[std::min(e + kPrefetch, last_entry)]) * features);
      const T* from = x + static_cast<int64_t>(a.col[e]) * features;
      const Vec weight = splat_vec<T>(kWeights == 0 ? T(1) : a.weight[kWeights == 1 ? e : a.order[e]]);
      for (int v = 0; v < V; ++v) {
        if (kWeights == 0) acc[v] += load_vec(from + v * lanes);
        else acc[v] += weight * load_vec(from + v * lanes);
      }
    }
    if (mean && last > first) {
      const T scale = T(1) / static_cast<T>(last - first);
      for (int v = 0; v < V; ++v) acc[v] *= scale;
    }
    for (int v = 0; v < V; ++v) store_vec(out + row * features + v * lanes, acc[v]);
  }
}

template <class T, class Index>
void spmm_sum(const Entries<T, Index>& a, const T* x, int64_t rows, int64_t features, bool mean, T* out,
              int64_t threads) {
  constexpr int64_t lanes = Lanes<T>::kCount;
  parallel_rows(a.crow, rows, kRowCost, threads, [&](int64_t begin, int64_t end) {
    const auto sum = [&](auto width, auto whole, int64_t f, int64_t from, int64_t to) {
      constexpr int V = width();
      constexpr bool kWhole = whole();
      if (a.weight == nullptr) sum_rows<V, kWhole, 0>(a, x + f, features, from, to, mean, out + f);
      else if (a.order == nullptr) sum_rows<V, kWhole, 1>(a, x + f, features, from, to, mean, out + f);
      else sum_rows<V, kWhole, 2>(a, x + f, features, from, to, mean, out + f);
    };
    const auto all = [&](auto width) { sum(width, std::true_type(), 0, begin, end); };
    if (features == lanes) return all(std::integral_constant<int, 1>());
    if (features == 2 * lanes) return all(std::integral_constant<int, 2>());
    if (features == 4 * lanes) return all(std::integral_constant<int, 4>());
    if (features == 8 * lanes) return all(std::integral_constant<int, 8>());
    if (features == 16 * lanes) return all(std::integral_constant<int, 16>());
    if (features > lanes) {  // row by row: what a row of x brings along is met while it is near
      for (int64_t row = begin; row < end; ++row)
        cover<T>(features, [&](auto width, int64_t f) { sum(width, std::false_type(), f, row, row + 1); });
      return;
    }
    for (int64_t row = begin; row < end; ++row) sum_narrow(a, row, x, features, mean, out + row * features);
  });
}

template <class T, class Index>
void spmm_max(const Entries<T, Index>& a, const T* x, int64_t rows, int64_t features, T* out, int32_t* arg,
              int64_t threads) {
  parallel_rows(a.crow, rows, kRowCost, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* to = out + row * features;
      int32_t* at = arg + row * features;
      if (features < Lanes<T>::kCount) {
        max_narrow(a, row, x, features, to, at);
        continue;
      }
      cover<T>(features, [&](auto width, int64_t f) {
        constexpr int narrower = width() > 4 ? 4 : width();  // values and positions need twice the registers
        for (int64_t part = 0; part < width(); part += narrower) {
          const int64_t g = f + part * Lanes<T>::kCount;
          max_block<narrower>(a, row, x + g, features, to + g, at + g);
        }
      });
    }
  });
}

// Gradient of spmm_max for x. A thread owns a range of features of every row, since rows of x are shared by rows of
// the output; the order of the sums is that of the output's rows.
template <class T, class Index>
void spmm_max_grad_x(const Entries<T, Index>& a, const T* grad, const int32_t* arg, int64_t rows, int64_t cols,
                     int64_t features, T* grad_x, int64_t threads) {
  parallel_for(features, threads, [&](int64_t begin, int64_t end) {
    for (int64_t node = 0; node < cols; ++node)
      std::fill(grad_x + node * features + begin, grad_x + node * features + end, T(0));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t f = begin; f < end; ++f) {
        const int32_t at = arg[row * features + f];
        if (at < 0) continue;
        const int64_t e = a.crow[row] + at;
        grad_x[static_cast<int64_t>(a.col[e]) * features + f] += a.weight_of(e) * grad[row * features + f];
      }
    }
  });
}

template <class T, class Index>
void spmm_max_grad_weight(const Entries<T, Index>& a, const T* grad, const int32_t* arg, const T* x, int64_t rows,
                          int64_t features, T* grad_weight, int64_t threads) {
  parallel_rows(a.crow, rows, features, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      std::fill(grad_weight + a.crow[row], grad_weight + a.crow[row + 1], T(0));
      for (int64_t f = 0; f < features; ++f) {
        const int32_t at = arg[row * features + f];
        if (at < 0) continue;
        const int64_t e = a.crow[row] + at;
        grad_weight[e] += grad[row * features + f] * x[static_cast<int64_t>(a.col[e]) * features + f];
      }
    }
  });
}

template <class T>
inline T dot(const T* a, const T* b, int64_t features) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t lanes = Lanes<T>::kCount;
  Vec acc[4] = {};
  int64_t f = 0;
  for (; f + 4 * lanes <= features; f += 4 * lanes)
    for (int v = 0; v < 4; ++v) acc[v] += load_vec(a + f + v * lanes) * load_vec(b + f + v * lanes);
  for (; f + lanes <= features; f += lanes) acc[0] += load_vec(a + f) * load_vec(b + f);
  T total = sum_vec<T>((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; f < features; ++f) total += a[f] * b[f];
  return total;
}

template <class T, class Index>
void sddmm(const Index* crow, const Index* col, const T* a, const T* b, int64_t rows, int64_t features, T* out,
           int64_t threads) {
  const Entries<T, Index> entries{crow, col, nullptr, nullptr, static_cast<int64_t>(crow[rows])};
  parallel_rows(crow, rows, kRowCost, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t e = crow[row]; e < crow[row + 1]; ++e) {
        if (e + kPrefetch < entries.count) {
          const char* next = reinterpret_cast<const char*>(b + static_cast<int64_t>(col[e + kPrefetch]) * features);
          const int64_t bytes = std::min<int64_t>(features * static_cast<int64_t>(sizeof(T)), 512);
          for (int64_t byte = 0; byte < bytes; byte += kCacheLine) __builtin_prefetch(next + byte);
        }
        out[e] = dot(a + row * features, b + static_cast<int64_t>(col[e]) * features, features);
      }
    }
  });
}

// Counting sort of the entries by column: row and position of each entry, in the order of the transposed matrix.
template <class Index>
void transpose(const Index* crow, const Index* col, int64_t rows, int64_t cols, Index* t_crow, Index* t_col,
               Index* t_order) {
  const int64_t count = crow[rows];
  std::fill(t_crow, t_crow + cols + 1, Index(0));
  for (int64_t e = 0; e < count; ++e) ++t_crow[col[e] + 1];
  for (int64_t c = 0; c < cols; ++c) t_crow[c + 1] += t_crow[c];
  std::vector<Index> next(t_crow, t_crow + cols);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t e = crow[row]; e < crow[row + 1]; ++e) {
      const Index to = next[col[e]]++;
      t_col[to] = static_cast<Index>(row);
      t_order[to] = static_cast<Index>(e);
    }
  }
}

// Calls op(value type, index type) for the widths in bytes that Python names.
template <class Op>
void typed(int64_t value_bytes, int64_t index_bytes, Op&& op) {
  if (value_bytes == 4 && index_bytes == 4) op(float(), int32_t());
  else if (value_bytes == 4) op(float(), int64_t());
  else if (index_bytes == 4) op(double(), int32_t());
  else op(double(), int64_t());
}

}  // namespace
}  // namespace zoo

using namespace zoo;

// reduce: 0 sum, 1 mean, 2 max (which alone writes `arg`). `weight` and `order` may be null.
ZOO_EXPORT int64_t zoo_spmm(const void* crow, const void* col, const void* weight, const void* order, const void* x,
                         void* out, int32_t* arg, int64_t rows, int64_t features, int64_t entries, int64_t reduce,
                         int64_t value_bytes, int64_t index_bytes, int64_t threads) try {
  typed(value_bytes, index_bytes, [&](auto value, auto index) {
    using T = decltype(value);
    using Index = decltype(index);
    const Entries<T, Index> a{static_cast<const Index*>(crow), static_cast<const Index*>(col),
                              static_cast<const T*>(weight), static_cast<const Index*>(order), entries};
    if (reduce == 2)
      spmm_max(a, static_cast<const T*>(x), rows, features, static_cast<T*>(out), arg, threads);
    else
      spmm_sum(a, static_cast<const T*>(x), rows, features, reduce == 1, static_cast<T*>(out), threads);
  });
  return zoo::kOk;
} ZOO_CATCH

// Either gradient may be null.
ZOO_EXPORT int64_t zoo_spmm_max_backward(const void* crow, const void* col, const void* weight, const void* x,
                                      const void* grad, const int32_t* arg, void* grad_x, void* grad_weight,
                                      int64_t rows, int64_t cols, int64_t features, int64_t value_bytes,
                                      int64_t index_bytes, int64_t threads) try {
  typed(value_bytes, index_bytes, [&](auto value, auto index) {
    using T = decltype(value);
    using Index = decltype(index);
    const Entries<T, Index> a{static_cast<const Index*>(crow), static_cast<const Index*>(col),
                              static_cast<const T*>(weight), nullptr, 0};
    const T* g = static_cast<const T*>(grad);
    if (grad_x) spmm_max_grad_x(a, g, arg, rows, cols, features, static_cast<T*>(grad_x), threads);
    if (grad_weight)
      spmm_max_grad_weight(a, g, arg, static_cast<const T*>(x), rows, features, static_cast<T*>(grad_weight), threads);
  });
  return zoo::kOk;
} ZOO_CATCH

ZOO_EXPORT int64_t zoo_sddmm(const void* crow, const void* col, const void* a, const void* b, void* out, int64_t rows,
                          int64_t features, int64_t value_bytes, int64_t index_bytes, int64_t threads) try {
  typed(value_bytes, index_bytes, [&](auto value, auto index) {
    using T = decltype(value);
    using Index = decltype(index);
    sddmm(static_cast<const Index*>(crow), static_cast<const Index*>(col), static_cast<const T*>(a),
          static_cast<const T*>(b), rows, features, static_cast<T*>(out), threads);
  });
  return zoo::kOk;
} ZOO_CATCH

ZOO_EXPORT int64_t zoo_csr_transpose(const void* crow, const void* col, void* t_crow, void* t_col, void* t_order,
                                  int64_t rows, int64_t cols, int64_t index_bytes) try {
  typed(4, index_bytes, [&](auto, auto index) {
    using Index = decltype(index);
    transpose(static_cast<const Index*>(crow), static_cast<const Index*>(col), rows, cols,
              static_cast<Index*>(t_crow), static_cast<Index*>(t_col), static_cast<Index*>(t_order));
  });
  return zoo::kOk;
} ZOO_CATCH
