// Products of one row of x with dense and packed weights, as dense_row, sparse_linear and decoder_layer share them.
#pragma once

#include "zoo/packed.hpp"

namespace zoo {

// y = W x + bias, W [rows, cols] of a value type, row by row; bias [rows] or null.
struct DenseRows {
  const float* x;
  const void* values;
  const float* bias;
  float* y;
  int64_t rows, cols, type;
};

// All of them in one parallel region; a result does not depend on the threads or on the other products.
void multiply_dense(const DenseRows* products, int64_t count, int64_t threads);

// y = x W^T + bias as zoo_sparse_linear says.
void multiply_sparse(const float* x, const void* values, const void* index, const int32_t* pointer, const float* bias, float* y,
                     int64_t batch, int64_t entries, int64_t rows, int64_t cols, int64_t panel, int64_t layout, int64_t width,
                     int64_t type, int64_t threads);

}  // namespace zoo
