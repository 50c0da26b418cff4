// Weights of kept four-bit groups in panels of rows, and their product with rows of x that are rounded to eight bits: what
// quant_panel_linear and decoder_layer share.
#pragma once

#include <cstdint>

#include "zoo/simd.hpp"

namespace zoo {

constexpr int64_t kPanelRows = 256;
constexpr int64_t kBlockGroups = 8;  // one in each lane of a vector

// w = scale * (code - zero). A panel is 256 rows; in it, by groups of columns one after another, stand the groups that its
// rows keep, in blocks of eight (the last of a column of groups may be partly unused).
//
// masks[panel][column] are 256 bits, a bit for each row that keeps the group; pointer[panel] is the panel's first block.
// scales [blocks][8] and zeros [blocks][4] belong to the eight rows of a block, two zero points in a byte, the first in its
// lower half. codes [blocks][group / 8][8][4]: byte k of row r in piece i has code 8 i + k of that row in its lower half and
// code 8 i + 4 + k in its upper one.
struct Panels {
  const uint8_t* codes;
  const f16* scales;
  const uint8_t* zeros;
  const uint8_t* masks;
  const int32_t* pointer;
  int64_t blocks, rows, cols, group;

  int64_t panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
  // Codes that are multiplied and summed in integers, and have one step of x: 16 or 32.
  int64_t unit() const { return group % 32 == 0 ? 32 : 16; }
};

// Raises where the pointer does not begin with 0 and end with `blocks`; all else of the index is checked where it is read.
Panels panels_of(const void* codes, const void* scales, const void* zeros, const void* masks, const int32_t* pointer,
                 int64_t blocks, int64_t rows, int64_t cols, int64_t group);

// A row of x in eight bits: x = step * value, with a step for each unit, and the sum of its values. A unit that holds an
// infinity or a NaN, or nothing greater than next to 0, has the step NaN and is multiplied as it is.
struct Rounded {
  const float* x;
  int8_t* values;
  float* steps;
  float* sums;
};

// Bytes that round_row wants for a row of so many columns: a multiple of 64.
int64_t rounded_bytes(int64_t cols);

Rounded round_row(const float* x, int64_t cols, int64_t unit, void* memory);

// One product of several that share a row of x; y [rows].
struct Product {
  Panels w;
  Rounded x;
  float* y;
};

// All of them in one parallel region.
void multiply_rows(const Product* products, int64_t count, int64_t threads);

}  // namespace zoo
