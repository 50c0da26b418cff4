// Gaussians on an image plane: what the projection hands to the tiles (zoo_rasterize_*).
//
// Projection is computed in double: whether a pixel lies inside the 1/255 contour, and which of two Gaussians is nearer,
// must come out as in the float64 definition, since either shows as a step in the image. Pixels are computed in float.
#pragma once

#include <cstdint>
#include <vector>

namespace zoo {

constexpr int64_t kTile = 8;                    // pixels on a side of a tile
constexpr double kAlphaMin = 1.0 / 255.0;       // a smaller alpha is dropped
constexpr float kAlphaMax = 0.999f;             // a larger one is cut
constexpr float kLevelMin = -7.99435343686f;    // log2(kAlphaMin)
constexpr float kOpaque = 1e-6f;                // what less light than this reaches is not drawn
constexpr int64_t kMoments = 6;                 // sums over pixels that the gradient of a Gaussian's shape is made of

// A projected Gaussian; its channels follow it in memory. alpha = 2^(level + a dx^2 + b dx dy + c dy^2), with (dx, dy)
// the pixel's centre minus (u, v). The contour alpha = 1/255 is an ellipse that reaches extent_x and extent_y from its
// centre; tilt is the correlation of x and y, upright the square root of 1 - tilt^2.
// The form is in double, as a Gaussian far larger than the image subtracts great numbers.
struct Splat {
  double u, v;
  double a, b, c, level;
  float extent_x, extent_y, tilt, upright;
};
constexpr int64_t kSplatFloats = sizeof(Splat) / sizeof(float);

// Floats from one record to the next: the splat and its channels, in whole quarters of a cache line.
constexpr int64_t record_floats(int64_t channels) { return kSplatFloats + (channels + 3) / 4 * 4; }

struct TileGrid {
  int64_t columns, rows;
  TileGrid(int64_t width, int64_t height) : columns((width + kTile - 1) / kTile), rows((height + kTile - 1) / kTile) {}
  int64_t count() const { return columns * rows; }
};

// Half-open ranges of the tiles that a splat's contour touches. Compiled once, so that counting and filling agree.
struct Span {
  int64_t begin, end;
};
Span tile_rows(const Splat& splat, int64_t height);
Span tile_columns(const Splat& splat, int64_t tile_row, int64_t width);

// The tiles of a splat, so that they are found once; of one that reaches over more than kRows rows they are found again.
struct Cover {
  static constexpr int64_t kRows = 3, kMost = 65535;
  uint16_t row, rows;  // rows > kRows: not kept
  uint16_t columns[kRows][2];

  // body(row of tiles, its columns).
  template <class Body>
  void each(const Splat& splat, int64_t width, int64_t height, Body&& body) const {
    if (rows <= kRows) {
      for (int64_t k = 0; k < rows; ++k) body(row + k, Span{columns[k][0], columns[k][1]});
      return;
    }
    const Span all = tile_rows(splat, height);
    for (int64_t at = all.begin; at < all.end; ++at) body(at, tile_columns(splat, at, width));
  }
};
static_assert(sizeof(Cover) == 16, "rasterize_native.py makes room for them");

// The first entry of each Gaussian in their order, and the number of all.
std::vector<int64_t> first_entries(const int32_t* tiles, int64_t count);

// What is wrong with a Gaussian; shared/ops/rasterize_native.py has the same numbers.
enum Status : int64_t { kDone = 0, kNotFinite = 1, kNoRotation = 2 };

}  // namespace zoo
