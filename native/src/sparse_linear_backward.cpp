// Gradients of y = x W^T for a csr W (see packed.hpp): grad_x = grad_y W, and for each kept weight
// grad_value = sum over the batch of grad_y[b, row] * x[b, col].
#include "zoo/check.hpp"
#include "zoo/export.hpp"
#include "zoo/packed.hpp"
#include "zoo/parallel.hpp"

namespace zoo {
namespace {

constexpr int kVectors = 32 / kLanes;
constexpr int64_t kWidth = 32;  // columns of the batch per tile

// One panel: it alone writes its rows of gxt [cols, kWidth] and its entries of grad_values. Either may be null.
template <class T>
void panel_backward(const Packed<T>& w, int64_t panel, const float* xt, const float* gyt, float* gxt,
                    float* grad_values) {
  const int64_t start = panel * w.panel * kWidth;
  for (int64_t row = 0; row < w.rows; ++row) {
    const int64_t segment = panel * w.rows + row;
    vf gy[kVectors];
    for (int v = 0; v < kVectors; ++v) gy[v] = load(gyt + row * kWidth + v * kLanes);
    for (int64_t j = w.pointer[segment]; j < w.pointer[segment + 1]; ++j) {
      const int64_t at = start + static_cast<const uint16_t*>(w.index)[j] * kWidth;
      if (gxt != nullptr) {
        const vf value = splat(to_float(w.values[j]));
        for (int v = 0; v < kVectors; ++v)
          store(gxt + at + v * kLanes, fma(value, gy[v], load(gxt + at + v * kLanes)));
      }
      if (grad_values != nullptr) {
        vf products = zero();
        for (int v = 0; v < kVectors; ++v) products = fma(gy[v], load(xt + at + v * kLanes), products);
        grad_values[j] += sum(products);
      }
    }
  }
}

template <class T>
void backward(const Packed<T>& w, const float* x, const float* grad_y, float* grad_x, float* grad_values,
              int64_t batch, int64_t threads) {
  for (int64_t b = 0; b < batch; b += kWidth) {
    const int64_t columns = std::min(kWidth, batch - b);
    float* xt = grad_values != nullptr ? scratch_of<float>(w.cols * kWidth, 0) : nullptr;
    float* gyt = scratch_of<float>(w.rows * kWidth, 1);
    float* gxt = grad_x != nullptr ? scratch_of<float>(w.cols * kWidth, 2) : nullptr;
    parallel_for(w.rows, threads, [&](int64_t from, int64_t to) {
      transpose_in(grad_y + b * w.rows + from, w.rows, columns, to - from, gyt + from * kWidth, kWidth);
    });
    parallel_for(w.panels(), threads, [&](int64_t first, int64_t last) {
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t from = panel * w.panel, count = std::min(w.panel, w.cols - from);
        if (xt != nullptr) transpose_in(x + b * w.cols + from, w.cols, columns, count, xt + from * kWidth, kWidth);
        if (gxt != nullptr) std::memset(gxt + from * kWidth, 0, static_cast<size_t>(count * kWidth) * sizeof(float));
        panel_backward(w, panel, xt, gyt, gxt, grad_values);
        if (gxt != nullptr)
          transpose_out(gxt + from * kWidth, kWidth, count, grad_x + b * w.cols + from, w.cols, columns);
      }
    });
  }
}

}  // namespace
}  // namespace zoo

// grad_x [batch, cols] is overwritten, grad_values (one float per stored value) is added to; either may be null.
ZOO_EXPORT int64_t zoo_sparse_linear_backward(const float* x, const float* grad_y, const void* values, const void* index,
                                           const int32_t* pointer, float* grad_x, float* grad_values, int64_t batch,
                                              int64_t entries, int64_t rows, int64_t cols, int64_t panel, int64_t type,
                                              int64_t threads) try {
  if (batch == 0 || rows == 0 || cols == 0) return zoo::kOk;
  zoo::with_type(type, [&](auto tag) {
    using T = decltype(tag);
    const zoo::Packed<T> w{static_cast<const T*>(values), index, pointer, rows, cols, panel, 1};
    zoo::check_whole(w, zoo::kCsr, entries);
    zoo::check_rows(w, zoo::kCsr, entries, 0, rows);
    zoo::backward(w, x, grad_y, grad_x, grad_values, batch, threads);
  });
  return zoo::kOk;
} ZOO_CATCH
