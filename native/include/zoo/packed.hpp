// The packed weight W [rows, cols] of sparse_linear and sparse_conv1x1, and the inner products over its segments.
//
// The columns are cut into panels. A segment holds the kept entries of one row (or block row) in one panel; segments
// are stored panel after panel, and in a panel row after row: segment = panel_number * segment_rows + segment_row.
// pointer[segment] is the first of its entries in `values` (counted in blocks for block layouts).
//   bitmask: panel / 8 bytes per segment, bit c of them = column c of the panel is kept (bit 0 is the lowest);
//   csr:     a uint16 column inside the panel per entry;
//   block 4x1: the same per block of four rows, four values per block; block 1xC: the first of C columns per block.
#pragma once

#include <type_traits>

#include "zoo/activation.hpp"
#include "zoo/simd.hpp"

namespace zoo {

enum Layout : int64_t { kBitmask = 0, kCsr = 1, kRows4 = 2, kColumns = 3 };
enum ValueType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

template <class T>
struct Packed {
  const T* values;
  const void* index;
  const int32_t* pointer;
  int64_t rows, cols, panel;
  int64_t width;  // kColumns: columns per block; kBitmask: 2 or 4 kept values in each eight columns, or any other number

  int64_t panels() const { return (cols + panel - 1) / panel; }
};

// visit(T{}) with the C++ type of a value type code.
template <class Visit>
ZOO_INLINE void with_type(int64_t type, Visit&& visit) {
  if (type == kFloat32) visit(float{});
  else if (type == kBFloat16) visit(bf16{});
  else visit(f16{});
}

// acc[v] += sum over entries of value * x[offset * stride + v * kLanes ...]: one row of W times a tile of V vectors.
template <int V, class T>
ZOO_INLINE void accumulate_row(const T* values, const uint16_t* offsets, int64_t count, const float* x, int64_t stride,
                               vf* acc) {
  constexpr int kChains = V >= 4 ? 1 : 4 / V;  // enough independent sums to hide the latency of fma
  vf part[kChains][V];
  for (int v = 0; v < V; ++v) part[0][v] = acc[v];
  for (int c = 1; c < kChains; ++c)
    for (int v = 0; v < V; ++v) part[c][v] = zero();
  int64_t j = 0;
  for (; j + kChains <= count; j += kChains)
    for (int c = 0; c < kChains; ++c) {
      const vf value = splat(to_float(values[j + c]));
      const float* row = x + offsets[j + c] * stride;
      for (int v = 0; v < V; ++v) part[c][v] = fma(value, load(row + v * kLanes), part[c][v]);
    }
  for (; j < count; ++j) {
    const vf value = splat(to_float(values[j]));
    const float* row = x + offsets[j] * stride;
    for (int v = 0; v < V; ++v) part[0][v] = fma(value, load(row + v * kLanes), part[0][v]);
  }
  for (int v = 0; v < V; ++v) {
    acc[v] = part[0][v];
    for (int c = 1; c < kChains; ++c) acc[v] = add(acc[v], part[c][v]);
  }
}

// The same for blocks of four rows that share a column; acc[r][v], values[4 * block + r].
template <int V, class T>
ZOO_INLINE void accumulate_rows4(const T* values, const uint16_t* offsets, int64_t count, const float* x,
                                 int64_t stride, vf (*acc)[V]) {
  vf part[4][V];  // a local copy, so that the sums stay in registers
  for (int r = 0; r < 4; ++r)
    for (int v = 0; v < V; ++v) part[r][v] = acc[r][v];
  for (int64_t j = 0; j < count; ++j) {
    const float* row = x + offsets[j] * stride;
    vf column[V];
    for (int v = 0; v < V; ++v) column[v] = load(row + v * kLanes);
    for (int r = 0; r < 4; ++r) {
      const vf value = splat(to_float(values[4 * j + r]));
      for (int v = 0; v < V; ++v) part[r][v] = fma(value, column[v], part[r][v]);
    }
  }
  for (int r = 0; r < 4; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = part[r][v];
}

// The same for blocks of `width` consecutive columns.
template <int V, class T>
ZOO_INLINE void accumulate_columns(const T* values, const uint16_t* offsets, int64_t count, int64_t width,
                                   const float* x, int64_t stride, vf* acc) {
  vf part[V];
  for (int v = 0; v < V; ++v) part[v] = acc[v];
  for (int64_t j = 0; j < count; ++j) {
    const float* row = x + offsets[j] * stride;
    for (int64_t c = 0; c < width; ++c, ++values, row += stride) {
      const vf value = splat(to_float(*values));
      for (int v = 0; v < V; ++v) part[v] = fma(value, load(row + v * kLanes), part[v]);
    }
  }
  for (int v = 0; v < V; ++v) acc[v] = part[v];
}

// Vectors of a piece of a map: those of 128 channels fill the first-level cache.
constexpr int kPieceVectors = kLanes == 16 ? 5 : 8;

// Calls body(std::integral_constant<int, vectors>).
template <class Body>
ZOO_INLINE void with_vectors(int64_t vectors, Body&& body) {
  switch (vectors) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 5: return body(std::integral_constant<int, 5>{});
    case 6: return body(std::integral_constant<int, 6>{});
    case 7: return body(std::integral_constant<int, 7>{});
    default: return body(std::integral_constant<int, 8>{});
  }
}

ZOO_INLINE vf activated(vf sum, int64_t activation) {
  if (activation == kNone) return sum;
  return activation == kRelu ? relu(sum) : least(splat(6.0f), relu(sum));
}

// Transposes x [batch, count] (row stride `ldx`) into out [count, width], columns batch..width-1 zero.
void transpose_in(const float* x, int64_t ldx, int64_t batch, int64_t count, float* out, int64_t width);
// Transposes in [count, width] into y [batch, count] (row stride `ldy`).
void transpose_out(const float* in, int64_t width, int64_t count, float* y, int64_t ldy, int64_t batch);

}  // namespace zoo
