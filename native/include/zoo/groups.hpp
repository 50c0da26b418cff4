// Weights of kept four-bit groups, and their product with one row of x that is rounded to 16 bits: what
// quant_sparse_linear and decoder_layer share.
#pragma once

#include <cstdint>

#include "zoo/simd.hpp"

namespace zoo {

struct Groups {
  const uint8_t* codes;
  const f16* scales;
  const uint8_t* zeros;
  const uint16_t* columns;
  const int32_t* pointer;
  int64_t rows, cols, group;
};

// Raises where the pointer does not begin with 0 and end with `entries`; all else of the index is checked where it is read.
Groups groups_of(const void* codes, const void* scales, const void* zeros, const void* columns, const int32_t* pointer,
                 int64_t entries, int64_t rows, int64_t cols, int64_t group);

// Rounded, each unit of a row of x lies as x[0], x[2] ..., then x[1], x[3] ..., as the low and the high halves of the bytes
// of the codes come. A unit is as many codes as are multiplied at a time: two groups of 16, one of 32.
constexpr int64_t kUnit = 16, kWide = 32;
inline int64_t unit_of(const Groups& w) { return w.group % kWide == 0 ? kWide : kUnit; }

// Rounds a row of x to multiples of the returned step, unit after unit, `stride` apart. Where that cannot be done, since the
// row holds an infinity or a NaN or nothing greater than next to 0, it returns 0 and writes zeros.
float round_row(const float* x, int64_t cols, int16_t* out, int64_t unit, int64_t stride);

// y = W x for one row of x and what round_row made of it.
void multiply_row(const Groups& w, int64_t entries, const float* x, const int16_t* xs, float step, float* y,
                  int64_t threads);

}  // namespace zoo
