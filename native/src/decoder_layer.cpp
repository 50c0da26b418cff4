// One token through a decoder layer: what stands between the products takes as long as they do when each step of it is a call
// of its own. Norm, rotation and attention alone, for weights of any kind; and all of a layer whose weights are kept four-bit
// groups in panels.
//
// A weight is seventeen numbers: its kind, rows, cols, eight of its kind, and the thresholds of its inputs and (of W_gate) of
// the activation behind it: address or 0, type, and 1 if there is one for each, 0 if one for all. Of its kind:
//   of panels: the addresses of codes, scales, zeros, masks and pointer, blocks, group;
//   of a dense weight: the address of its values, their type;
//   of a packed one: the addresses of values, index and pointer, entries, panel, layout, width, type.
#include <algorithm>
#include <cmath>
#include <limits>

#include "zoo/export.hpp"
#include "zoo/panels.hpp"
#include "zoo/parallel.hpp"
#include "zoo/rows.hpp"

namespace zoo {
namespace {

constexpr int64_t kNumbers = 17;
constexpr int64_t kInputs = 11, kActivation = 14;  // where its thresholds are
constexpr int64_t kMostProducts = 3;  // that share a row of x
enum Kind : int64_t { kPanels = 0, kDense = 1, kPacked = 2 };

template <class T>
const T* at(int64_t address) {
  return reinterpret_cast<const T*>(static_cast<uintptr_t>(address));
}

int64_t rows_of(const int64_t* list, int64_t which) { return list[which * kNumbers + 1]; }
int64_t cols_of(const int64_t* list, int64_t which) { return list[which * kNumbers + 2]; }

// x where |x| is above a threshold, else zero; a NaN stays.
struct Threshold {
  const void* values;
  int64_t type, each;

  explicit Threshold(const int64_t* numbers) : values(at<void>(numbers[0])), type(numbers[1]), each(numbers[2]) {}
  void apply(const float* x, int64_t count, float* out) const {
    with_type(type, [&](auto kind) {
      const auto* t = static_cast<const decltype(kind)*>(values);
      for (int64_t i = 0; i < count; ++i) out[i] = std::fabs(x[i]) <= to_float(t[i * each]) ? 0.0f : x[i];
    });
  }
};


// The products of one row of x by some weights of a list, into places[i].
void multiply(const int64_t* list, int64_t first, int64_t count, const float* x, float* const* places, int64_t threads) {
  Product products[kMostProducts];
  DenseRows dense[kMostProducts];
  int64_t of_panels = 0, of_rows = 0;
  Rounded rounded[2];  // by units of 16 and of 32
  bool done[2] = {};
  const int64_t bytes = rounded_bytes(cols_of(list, first));
  auto* memory = static_cast<uint8_t*>(scratch(2 * bytes, 2));
  float* kept = scratch_of<float>(kMostProducts * cols_of(list, first), 4);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* n = list + (first + i) * kNumbers;
    const int64_t rows = n[1], cols = n[2];
    const float* own = x;
    const Threshold threshold{n + kInputs};
    if (threshold.values != nullptr) {
      threshold.apply(x, cols, kept + i * cols);
      own = kept + i * cols;
    }
    if (n[0] == kDense) {
      dense[of_rows++] = {own, at<void>(n[3]), nullptr, places[i], rows, cols, n[4]};
    } else if (n[0] == kPacked) {
      multiply_sparse(own, at<void>(n[3]), at<void>(n[4]), at<int32_t>(n[5]), nullptr, places[i], 1, n[6], rows, cols, n[7], n[8],
                      n[9], n[10], threads);
    } else {
      const Panels w = panels_of(at<void>(n[3]), at<void>(n[4]), at<void>(n[5]), at<void>(n[6]), at<int32_t>(n[7]), n[8], rows,
                                 cols, n[9]);
      const int64_t wide = w.unit() == 32;
      if (own != x) {
        auto* apart = static_cast<uint8_t*>(scratch(kMostProducts * bytes, 5)) + i * bytes;
        products[of_panels++] = {w, round_row(own, cols, w.unit(), apart), places[i]};
        continue;
      }
      if (!done[wide]) rounded[wide] = round_row(x, cols, w.unit(), memory + wide * bytes), done[wide] = true;
      products[of_panels++] = {w, rounded[wide], places[i]};
    }
  }
  if (of_panels > 0) multiply_rows(products, of_panels, threads);
  if (of_rows > 0) multiply_dense(dense, of_rows, threads);
}

template <class T>
float dot(const float* a, const T* b, int64_t count) {
  vf sums[2] = {zero(), zero()};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    sums[0] = fma(load(a + i), load(b + i), sums[0]);
    sums[1] = fma(load(a + i + kLanes), load(b + i + kLanes), sums[1]);
  }
  float total = sum(add(sums[0], sums[1]));
  for (; i < count; ++i) total += a[i] * to_float(b[i]);
  return total;
}

// weight * x / rms(x)
void normalise(const float* x, const float* weight, float epsilon, int64_t count, float* out) {
  const float factor = 1.0f / std::sqrt(dot(x, x, count) / static_cast<float>(count) + epsilon);
  for (int64_t i = 0; i < count; ++i) out[i] = weight[i] * (x[i] * factor);
}

// Pairs (i, i + half) of each head turned by an angle.
void rotate(float* heads, int64_t count, int64_t size, const float* cosine, const float* sine) {
  const int64_t half = size / 2;
  for (int64_t h = 0; h < count; ++h, heads += size)
    for (int64_t i = 0; i < half; ++i) {
      const float one = heads[i], other = heads[i + half];
      heads[i] = one * cosine[i] - other * sine[i];
      heads[i + half] = other * cosine[i + half] + one * sine[i + half];
    }
}

// e^x to about 1e-7, without a branch, for the compiler to vectorise; a NaN becomes a number.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

// Keys and values are [kv_heads, count, size] with any strides of the first two.
struct Cache {
  int64_t count, key_head, key_token, value_head, value_token;
};

// out = softmax(scale * q K^T) V for one head.
template <class T>
void attend(const float* q, const T* keys, const T* values, const Cache& cache, int64_t size, float scale,
            float* scores, float* out) {
  float most = -std::numeric_limits<float>::infinity(), every = 0.0f;
  for (int64_t t = 0; t < cache.count; ++t) {
    scores[t] = scale * dot(q, keys + t * cache.key_token, size);
    most = std::max(most, scores[t]);
    every += scores[t];
  }
  if (!std::isfinite(every)) {  // infinities of both signs, or NaN
    std::fill_n(out, size, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  for (int64_t t = 0; t < cache.count; ++t) scores[t] = exponential(scores[t] - most);
  float total = 0.0f;
  std::fill_n(out, size, 0.0f);
  for (int64_t t = 0; t < cache.count; ++t) {
    const float share = scores[t];
    const T* value = values + t * cache.value_token;
    total += share;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(out + i, fma(splat(share), load(value + i), load(out + i)));
    for (; i < size; ++i) out[i] += share * to_float(value[i]);
  }
  for (int64_t i = 0; i < size; ++i) out[i] /= total;
}

// out[h] = the attention of head h of q, for keys and values of a value type; heads of q share those of the cache in turn.
void attend_heads(const float* q, const void* keys, const void* values, int64_t type, const Cache& cache, int64_t heads,
                  int64_t kv_heads, int64_t size, float scale, float* out, int64_t threads) {
  parallel_for(heads, worthwhile(threads, heads * cache.count * size / kLanes), [&](int64_t from, int64_t to) {
    float* scores = scratch_of<float>(cache.count, 0);
    for (int64_t h = from; h < to; ++h) {
      const int64_t kv = h * kv_heads / heads;
      with_type(type, [&](auto kind) {
        using T = decltype(kind);
        const T* key = static_cast<const T*>(keys) + kv * cache.key_head;
        const T* value = static_cast<const T*>(values) + kv * cache.value_head;
        attend(q + h * size, key, value, cache, size, scale, scores, out + h * size);
      });
    }
  });
}

}  // namespace
}  // namespace zoo

// out = norm * x / sqrt(mean(x^2) + epsilon), all [count].
ZOO_EXPORT int64_t zoo_token_norm(const float* x, const float* norm, float* out, int64_t count, double epsilon) try {
  zoo::normalise(x, norm, static_cast<float>(epsilon), count, out);
  return zoo::kOk;
} ZOO_CATCH

// out = [q, k] with pairs of each head turned; q [queries], k [keys], both multiples of size; cosine, sine [size].
ZOO_EXPORT int64_t zoo_token_rotate(const float* q, const float* k, const float* cosine, const float* sine, float* out,
                                    int64_t queries, int64_t keys, int64_t size) try {
  std::copy_n(q, queries, out);
  std::copy_n(k, keys, out + queries);
  zoo::rotate(out, (queries + keys) / size, size, cosine, sine);
  return zoo::kOk;
} ZOO_CATCH

// out = softmax(scale q K^T) V, q and out [heads * size]; keys and values of a value type, as for zoo_decoder_outputs.
ZOO_EXPORT int64_t zoo_token_attend(const float* q, const void* keys, const void* values, int64_t type, float* out,
                                    int64_t heads, int64_t kv_heads, int64_t size, int64_t count, int64_t key_head,
                                    int64_t key_token, int64_t value_head, int64_t value_token, double scale,
                                    int64_t threads) try {
  const zoo::Cache cache{count, key_head, key_token, value_head, value_token};
  zoo::attend_heads(q, keys, values, type, cache, heads, kv_heads, size, static_cast<float>(scale), out, threads);
  return zoo::kOk;
} ZOO_CATCH

// out = [q, k, v] of the normalised x, q and k rotated. weights: W_q, W_k, W_v; norm [cols]; cosine, sine [size].
ZOO_EXPORT int64_t zoo_decoder_inputs(const float* x, const int64_t* weights, const float* norm, const float* epsilon,
                                      const float* cosine, const float* sine, float* out, int64_t size,
                                      int64_t threads) try {
  using namespace zoo;
  const int64_t cols = cols_of(weights, 0), queries = rows_of(weights, 0), keys = rows_of(weights, 1);
  float* normed = scratch_of<float>(cols, 3);
  normalise(x, norm, epsilon[0], cols, normed);
  float* const places[] = {out, out + queries, out + queries + keys};
  multiply(weights, 0, 3, normed, places, threads);
  rotate(out, (queries + keys) / size, size, cosine, sine);
  return kOk;
} ZOO_CATCH

// y = h + W_down (silu(W_gate n) * W_up n), n = norm(h), h = x + W_o attention(q, keys, values). Keys and values are of a
// value type. weights: W_o, W_gate, W_up, W_down; numbers: epsilon, the scale of scores.
ZOO_EXPORT int64_t zoo_decoder_outputs(const float* x, const float* q, const void* keys, const void* values, int64_t type,
                                       const int64_t* weights, const float* norm, const float* numbers, float* y,
                                       int64_t heads, int64_t kv_heads, int64_t size, int64_t count, int64_t key_head,
                                       int64_t key_token, int64_t value_head, int64_t value_token, int64_t threads) try {
  using namespace zoo;
  const Cache cache{count, key_head, key_token, value_head, value_token};
  const int64_t inner = heads * size, cols = rows_of(weights, 0), wide = rows_of(weights, 1);
  const int64_t most = std::max({inner, cols, wide});
  float* attended = scratch_of<float>(3 * most, 3);  // also the gate
  float *normed = attended + most, *up = normed + most;
  attend_heads(q, keys, values, type, cache, heads, kv_heads, size, numbers[1], attended, threads);
  multiply(weights, 0, 1, attended, &y, threads);
  for (int64_t i = 0; i < cols; ++i) y[i] += x[i];
  normalise(y, norm, numbers[0], cols, normed);
  float* const places[] = {attended, up};
  multiply(weights, 1, 2, normed, places, threads);
  for (int64_t i = 0; i < wide; ++i) attended[i] /= 1.0f + exponential(-attended[i]);
  if (const Threshold closed{weights + kNumbers + kActivation}; closed.values != nullptr) {
    closed.apply(attended, wide, attended);
    for (int64_t i = 0; i < wide; ++i) up[i] = attended[i] == 0.0f ? 0.0f : up[i];  // whatever it is
  }
  for (int64_t i = 0; i < wide; ++i) up[i] *= attended[i];
  multiply(weights, 3, 1, up, &normed, threads);
  for (int64_t i = 0; i < cols; ++i) y[i] += normed[i];
  return kOk;
} ZOO_CATCH
