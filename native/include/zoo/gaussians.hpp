// Gaussians on an image plane: what the projection hands to the tiles (zoo_rasterize_*).
//
// Projection is computed in double: whether a pixel lies inside the 1/255 contour, and which of two Gaussians is nearer,
// must come out as in the float64 definition, since either shows as a step in the image. Pixels are computed in float.
#pragma once

#include <cstdint>

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

// What is wrong with a Gaussian; shared/ops/rasterize_native.py has the same numbers.
enum Status : int64_t { kDone = 0, kNotFinite = 1, kNoRotation = 2 };

}  // namespace zoo
