// 3D Gaussians to ellipses on an image plane, with spherical-harmonic colours, and the way back for gradients.
//
// Every Gaussian belongs to one thread. The gradient of a Gaussian is summed from its tiles in the order of the tiles,
// so no result depends on the number of threads.
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "zoo/export.hpp"
#include "zoo/gaussians.hpp"
#include "zoo/lanes.hpp"
#include "zoo/parallel.hpp"
#include "zoo/simd.hpp"
#include "zoo/spherical.hpp"

namespace zoo {

Span tile_rows(const Splat& splat, int64_t height) {
  constexpr double kSlack = 1e-3;  // of a pixel: more than the rounding of a float pixel position
  const double low = std::ceil(splat.v - splat.extent_y - 0.5 - kSlack);
  const double high = std::floor(splat.v + splat.extent_y - 0.5 + kSlack);
  if (!(high >= 0 && low <= static_cast<double>(height - 1) && low <= high)) return {0, 0};
  const auto first = static_cast<int64_t>(std::max(low, 0.0));
  const auto last = static_cast<int64_t>(std::min(high, static_cast<double>(height - 1)));
  return {first / kTile, last / kTile + 1};
}

Span tile_columns(const Splat& splat, int64_t tile_row, int64_t width) {
  constexpr double kSlack = 1e-3;
  const double scale = 1.0 / splat.extent_y;
  const double above = (static_cast<double>(tile_row * kTile) + 0.5 - splat.v) * scale;
  const double below = above + static_cast<double>(kTile - 1) * scale;
  const auto reach = [&](double sign) {  // the farthest point of the ellipse to one side, between the two heights
    double y = sign * splat.tilt;
    y = std::min(std::max(y, std::max(above, -1.0)), std::min(below, 1.0));
    return splat.extent_x * (splat.tilt * y + sign * splat.upright * std::sqrt(std::max(0.0, 1.0 - y * y)));
  };
  const double low = std::ceil(splat.u + reach(-1.0) - 0.5 - kSlack);
  const double high = std::floor(splat.u + reach(1.0) - 0.5 + kSlack);
  if (!(high >= 0 && low <= static_cast<double>(width - 1) && low <= high)) return {0, 0};
  const auto first = static_cast<int64_t>(std::max(low, 0.0));
  const auto last = static_cast<int64_t>(std::min(high, static_cast<double>(width - 1)));
  return {first / kTile, last / kTile + 1};
}

std::vector<int64_t> first_entries(const int32_t* tiles, int64_t count) {
  std::vector<int64_t> first(static_cast<size_t>(count + 1));
  for (int64_t i = 0; i < count; ++i) first[static_cast<size_t>(i + 1)] = first[static_cast<size_t>(i)] + tiles[i];
  return first;
}

namespace {

// The camera as Python lays it out: 22 doubles.
struct View {
  double rotation[9], translation[3];
  double fx, fy, cx, cy;
  double near, far, eps2d;
  double centre[3];
};
static_assert(sizeof(View) == 22 * sizeof(double), "the layout is shared with Python");

struct Scene {
  const float *means, *quats, *scales, *opacities;
  const float* sh;      // [count, bases, 3], or null
  const float* values;  // [count, channels], or null
  const float* shift;   // [count, 2] pixels added to the projected means, or null
  int64_t count, bases, channels, width, height;
  bool antialiased;

  int64_t colours() const { return sh == nullptr ? 0 : 3; }
  int64_t drawn() const { return colours() + channels + 1; }  // and the depth
};

using Reals = Lanes<double>::Vec;  // a number of each of a few Gaussians, which are computed together
using Truths = Lanes<double>::Bits;
constexpr int64_t kGroup = Lanes<double>::kCount;

ZOO_INLINE Reals root(Reals x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_pd(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_pd(x);
#else
  for (int64_t lane = 0; lane < kGroup; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
#endif
}

// Which Gaussians: `count` of them from the first; the lanes after those hold the last once more.
struct Group {
  int64_t index[kGroup], count;

  Group(int64_t first, int64_t end) : count(std::min(kGroup, end - first)) {
    for (int64_t lane = 0; lane < kGroup; ++lane) index[lane] = first + std::min(lane, count - 1);
  }
  // Column k of rows of `width` floats.
  ZOO_INLINE Reals load(const float* rows, int64_t width, int64_t k) const {
    Reals out;
    for (int64_t lane = 0; lane < kGroup; ++lane) out[lane] = rows[width * index[lane] + k];
    return out;
  }
};

// Gaussians seen by a camera, with all that their gradients need.
struct Projection {
  Reals p[3];              // the means in camera coordinates
  Reals r[9], m[9], w[9];  // the rotation, rotation * scales, and that in camera coordinates
  Reals scale[3];
  Reals quat[4], length;   // of unit length, and its length before
  Reals slope[2];          // x/z and y/z, held within 1.3 times the field of view
  Truths held[2];
  Reals j[6], t[6];        // Jacobian of the projection, and t = j w: the covariance is t t^T
  Reals xx, xy, yy;        // covariance with eps2d added
  Reals det, det_bare;     // its determinant, and that before eps2d was added
  Reals compensation;      // factor of the opacity
};

template <class A>
ZOO_INLINE void multiply(const A* a, const Reals* b, int rows, Reals* out) {  // [rows, 3] times [3, 3]
  for (int i = 0; i < rows; ++i)
    for (int k = 0; k < 3; ++k)
      out[3 * i + k] = a[3 * i] * b[k] + a[3 * i + 1] * b[3 + k] + a[3 * i + 2] * b[6 + k];
}

ZOO_INLINE void rotation_of(const Reals* q, Reals* r) {
  const Reals w = q[0], x = q[1], y = q[2], z = q[3];
  r[0] = 1.0 - 2.0 * (y * y + z * z), r[1] = 2.0 * (x * y - w * z), r[2] = 2.0 * (x * z + w * y);
  r[3] = 2.0 * (x * y + w * z), r[4] = 1.0 - 2.0 * (x * x + z * z), r[5] = 2.0 * (y * z - w * x);
  r[6] = 2.0 * (x * z - w * y), r[7] = 2.0 * (y * z + w * x), r[8] = 1.0 - 2.0 * (x * x + y * y);
}

// False where a Gaussian cannot be seen: outside the depths, or flat on the plane.
Truths project(const Scene& scene, const View& view, const Group& group, Projection& out) {
  const Reals mean[3] = {group.load(scene.means, 3, 0), group.load(scene.means, 3, 1), group.load(scene.means, 3, 2)};
  for (int row = 0; row < 3; ++row) {
    const double* r = view.rotation + 3 * row;
    out.p[row] = r[0] * mean[0] + r[1] * mean[1] + r[2] * mean[2] + view.translation[row];
  }
  const Reals z = out.p[2];
  Reals squares{};
  for (int k = 0; k < 4; ++k) {
    out.quat[k] = group.load(scene.quats, 4, k);
    squares += out.quat[k] * out.quat[k];
  }
  out.length = root(squares);
  for (int k = 0; k < 4; ++k) out.quat[k] /= out.length;
  rotation_of(out.quat, out.r);
  for (int k = 0; k < 3; ++k) out.scale[k] = group.load(scene.scales, 3, k);
  for (int k = 0; k < 9; ++k) out.m[k] = out.r[k] * out.scale[k % 3];
  multiply(view.rotation, out.m, 3, out.w);
  const double focal[2] = {view.fx, view.fy}, centre[2] = {view.cx, view.cy};
  const double size[2] = {static_cast<double>(scene.width), static_cast<double>(scene.height)};
  for (int k = 0; k < 6; ++k) out.j[k] = Reals{};
  for (int axis = 0; axis < 2; ++axis) {
    const double margin = 0.15 * size[axis] / focal[axis];
    const double low = -(centre[axis] / focal[axis] + margin);
    const double high = (size[axis] - centre[axis]) / focal[axis] + margin;
    Reals slope = out.p[axis] / z;
    out.held[axis] = (slope < low) | (slope > high);
    slope = slope < low ? splat_vec(low) : slope;
    slope = slope > high ? splat_vec(high) : slope;
    out.slope[axis] = slope;
    out.j[3 * axis + axis] = focal[axis] / z;
    out.j[3 * axis + 2] = -focal[axis] * slope / z;
  }
  multiply(out.j, out.w, 2, out.t);
  const Reals* t = out.t;
  const Reals xx = t[0] * t[0] + t[1] * t[1] + t[2] * t[2], yy = t[3] * t[3] + t[4] * t[4] + t[5] * t[5];
  out.xy = t[0] * t[3] + t[1] * t[4] + t[2] * t[5];
  out.det_bare = xx * yy - out.xy * out.xy;
  out.xx = xx + view.eps2d, out.yy = yy + view.eps2d;
  out.det = out.xx * out.yy - out.xy * out.xy;
  out.compensation = splat_vec(1.0);
  if (scene.antialiased) {
    const Reals ratio = out.det_bare / out.det;
    out.compensation = root(ratio > 0.0 ? ratio : Reals{});
  }
  return (z > view.near) & (z < view.far) & (out.det > 0.0);
}

bool all_finite(const float* values, int64_t count) {
  uint32_t wrong = 0;
  for (int64_t k = 0; k < count; ++k) {
    uint32_t bits;
    std::memcpy(&bits, values + k, sizeof bits);
    wrong |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return wrong == 0;
}

Status check(const Scene& scene, int64_t i) {
  const bool finite = all_finite(scene.means + 3 * i, 3) && all_finite(scene.quats + 4 * i, 4) &&
                      all_finite(scene.scales + 3 * i, 3) && all_finite(scene.opacities + i, 1) &&
                      all_finite(scene.sh + 3 * scene.bases * i, scene.sh == nullptr ? 0 : 3 * scene.bases) &&
                      all_finite(scene.values + scene.channels * i, scene.channels) &&
                      all_finite(scene.shift + 2 * i, scene.shift == nullptr ? 0 : 2);
  if (!finite) return kNotFinite;
  const float* q = scene.quats + 4 * i;
  return q[0] == 0 && q[1] == 0 && q[2] == 0 && q[3] == 0 ? kNoRotation : kDone;
}

// Unit vector from the camera to the Gaussian, and the distance.
double direction(const Scene& scene, const View& view, int64_t i, double* unit) {
  double squares = 0;
  for (int k = 0; k < 3; ++k) {
    unit[k] = scene.means[3 * i + k] - view.centre[k];
    squares += unit[k] * unit[k];
  }
  const double distance = std::sqrt(squares);
  for (int k = 0; k < 3; ++k) unit[k] /= distance;
  return distance;
}

// What a projection says of the ellipses of its Gaussians; see Splat.
struct Ellipses {
  Reals u, v, a, b, c, level, extent_x, extent_y, tilt, upright, depth, opacity;
  Truths seen;

  Ellipses(const Scene& scene, const View& view, const Group& group) {
    Projection s;
    seen = project(scene, view, group, s);
    constexpr double kLog2e = 1.4426950408889634;
    opacity = group.load(scene.opacities, 1, 0);
    seen = seen & (opacity >= kAlphaMin);
    opacity *= s.compensation;
    seen = seen & (opacity >= kAlphaMin);
    for (int64_t lane = 0; lane < kGroup; ++lane) level[lane] = seen[lane] ? std::log2(opacity[lane]) : 0.0;
    const Reals reach = 2.0 * (level - std::log2(kAlphaMin)) / kLog2e;
    depth = s.p[2];
    u = view.fx * s.p[0] / depth + view.cx;
    v = view.fy * s.p[1] / depth + view.cy;
    if (scene.shift != nullptr) u += group.load(scene.shift, 2, 0), v += group.load(scene.shift, 2, 1);
    const Reals norm = -0.5 * kLog2e / s.det, product = s.xx * s.yy;
    a = norm * s.yy, b = -2.0 * norm * s.xy, c = norm * s.xx;
    extent_x = root(reach * s.xx), extent_y = root(reach * s.yy);
    tilt = s.xy / root(product), upright = root(s.det / product);
  }

  Splat splat(int64_t lane) const {
    const auto narrow = [lane](Reals x) { return static_cast<float>(x[lane]); };
    return {u[lane],          v[lane],          a[lane],      b[lane],        c[lane], level[lane],
            narrow(extent_x), narrow(extent_y), narrow(tilt), narrow(upright)};
  }
};

// Number of tiles that Gaussian i touches, which is in this lane; writes its record.
int64_t emit(const Scene& scene, const View& view, int64_t i, const Ellipses& found, int64_t lane, float* record,
             double& depth, Cover& cover) {
  if (!found.seen[lane]) return 0;
  const Splat splat = found.splat(lane);
  std::memcpy(record, &splat, sizeof splat);
  if (!(splat.extent_y > 0)) return 0;  // the contour is a point
  int64_t tiles = 0;
  const Span rows = tile_rows(splat, scene.height);
  const bool kept = rows.end - rows.begin <= Cover::kRows && std::max(scene.width, scene.height) <= Cover::kMost * kTile;
  cover.row = static_cast<uint16_t>(rows.begin);
  cover.rows = static_cast<uint16_t>(kept ? rows.end - rows.begin : Cover::kRows + 1);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const Span columns = tile_columns(splat, row, scene.width);
    tiles += columns.end - columns.begin;
    if (!kept) continue;
    cover.columns[row - rows.begin][0] = static_cast<uint16_t>(columns.begin);
    cover.columns[row - rows.begin][1] = static_cast<uint16_t>(columns.end);
  }
  if (tiles == 0) return 0;
  float* channel = record + kSplatFloats;
  if (scene.sh != nullptr) {
    double unit[3];
    direction(scene, view, i, unit);
    float basis[kMostBases];
    sh_bases(scene.bases, static_cast<float>(unit[0]), static_cast<float>(unit[1]), static_cast<float>(unit[2]),
             basis);
    for (int k = 0; k < 3; ++k) {
      float colour = 0.5f;
      for (int64_t n = 0; n < scene.bases; ++n) colour += basis[n] * scene.sh[3 * (scene.bases * i + n) + k];
      *channel++ = std::max(colour, 0.0f);
    }
  }
  for (int64_t k = 0; k < scene.channels; ++k) *channel++ = scene.values[scene.channels * i + k];
  *channel = static_cast<float>(found.depth[lane]);
  depth = found.depth[lane];
  return tiles;
}

struct Gradients {
  float *means, *quats, *scales, *opacities, *sh, *values, *shift;

  void clear(const Scene& scene, int64_t i) const {
    const auto zero = [i](float* rows, int64_t width) {
      if (rows != nullptr) std::fill_n(rows + width * i, width, 0.0f);
    };
    zero(means, 3), zero(quats, 4), zero(scales, 3), zero(opacities, 1), zero(sh, 3 * scene.bases);
    zero(values, scene.channels), zero(shift, 2);
  }
};

// Adds to `point`, a gradient for the mean, what the colour's dependence on the direction brings.
void colour_backward(const Scene& scene, const View& view, int64_t i, const double* flow, float* grad_sh,
                     double* point) {
  double unit[3];
  const double distance = direction(scene, view, i, unit);
  const auto along = [&unit](int axis) {
    Quad parts = {static_cast<float>(unit[axis]), 0.0f, 0.0f, 0.0f};
    parts[axis + 1] = 1.0f;
    return Slope{parts};
  };
  Slope basis[kMostBases];
  sh_bases(scene.bases, along(0), along(1), along(2), basis);
  const float* sh = scene.sh + 3 * scene.bases * i;
  Quad colour[3] = {};  // each with its derivatives
  for (int64_t n = 0; n < scene.bases; ++n)
    for (int k = 0; k < 3; ++k) colour[k] += sh[3 * n + k] * basis[n].parts;
  Quad turn{};
  float pull[3];
  for (int k = 0; k < 3; ++k) {
    pull[k] = colour[k][0] < -0.5f ? 0.0f : static_cast<float>(flow[k]);
    turn += pull[k] * colour[k];
  }
  for (int64_t n = 0; n < scene.bases; ++n)
    for (int k = 0; k < 3; ++k) grad_sh[3 * n + k] = pull[k] * basis[n].parts[0];
  double radial = 0;
  for (int axis = 0; axis < 3; ++axis) radial += static_cast<double>(turn[axis + 1]) * unit[axis];
  for (int axis = 0; axis < 3; ++axis)
    point[axis] += (static_cast<double>(turn[axis + 1]) - radial * unit[axis]) / distance;
}

// From the sums over pixels of some Gaussians (see kMoments, then their channels) to the gradients of their rows; only of
// the lanes that are `wanted`.
void pull_back(const Scene& scene, const View& view, const Group& group, const Reals* sums, const bool* wanted,
               const Gradients& grad) {
  Projection s;
  project(scene, view, group, s);
  const Reals mass = sums[0], mx = sums[1], my = sums[2], mxx = sums[3], mxy = sums[4], myy = sums[5];
  const Reals *flow = sums + kMoments, to_opacity = mass / group.load(scene.opacities, 1, 0);
  const Reals pa = s.yy / s.det, pb = -s.xy / s.det, pc = s.xx / s.det;
  const Reals gx = pa * mx + pb * my, gy = pb * mx + pc * my;  // for the projected mean
  // For the covariance with eps2d, xy for the single number. Inverse: P M P / 2 with P the inverse covariance.
  const Reals a0 = pa * mxx + pb * mxy, a1 = pa * mxy + pb * myy;
  const Reals b0 = pb * mxx + pc * mxy, b1 = pb * mxy + pc * myy;
  Reals xx = 0.5 * (a0 * pa + a1 * pb), xy = a0 * pb + a1 * pc, yy = 0.5 * (b0 * pb + b1 * pc);
  if (scene.antialiased) {  // alpha also scales with sqrt(det_bare / det), whose logarithm gets the mass
    const Reals bare_xx = s.xx - view.eps2d, bare_yy = s.yy - view.eps2d;
    xx += 0.5 * mass * (bare_yy / s.det_bare - s.yy / s.det);
    yy += 0.5 * mass * (bare_xx / s.det_bare - s.xx / s.det);
    xy += mass * (s.xy / s.det - s.xy / s.det_bare);
  }
  Reals dt[6], dj[6] = {}, dw[9], dm[9], dp[3];
  for (int k = 0; k < 3; ++k) {
    dt[k] = 2.0 * xx * s.t[k] + xy * s.t[3 + k];
    dt[3 + k] = 2.0 * yy * s.t[3 + k] + xy * s.t[k];
  }
  for (int row = 0; row < 2; ++row)
    for (int k = 0; k < 3; ++k)
      for (int n = 0; n < 3; ++n) dj[3 * row + k] += dt[3 * row + n] * s.w[3 * k + n];
  for (int k = 0; k < 3; ++k)
    for (int n = 0; n < 3; ++n) dw[3 * k + n] = s.j[k] * dt[n] + s.j[3 + k] * dt[3 + n];
  for (int k = 0; k < 3; ++k)
    for (int n = 0; n < 3; ++n)
      dm[3 * k + n] = view.rotation[k] * dw[n] + view.rotation[3 + k] * dw[3 + n] + view.rotation[6 + k] * dw[6 + n];
  const double focal[2] = {view.fx, view.fy};
  const Reals z = s.p[2], pull[2] = {gx, gy};
  dp[2] = flow[scene.drawn() - 1];
  for (int axis = 0; axis < 2; ++axis) {
    const Reals slant = -focal[axis] / z * dj[3 * axis + 2];  // gradient for the held slope
    const Reals turned = s.held[axis] ? Reals{} : slant / z;
    dp[axis] = pull[axis] * focal[axis] / z + turned;
    dp[2] -= pull[axis] * focal[axis] * s.p[axis] / (z * z);
    dp[2] -= focal[axis] / (z * z) * (dj[3 * axis + axis] - dj[3 * axis + 2] * s.slope[axis]);
    dp[2] -= turned * s.slope[axis];
  }
  Reals point[3], scale[3], d[9];
  for (int k = 0; k < 3; ++k)
    point[k] = view.rotation[k] * dp[0] + view.rotation[3 + k] * dp[1] + view.rotation[6 + k] * dp[2];
  for (int k = 0; k < 3; ++k) {
    scale[k] = s.r[k] * dm[k] + s.r[3 + k] * dm[3 + k] + s.r[6 + k] * dm[6 + k];
    for (int row = 0; row < 3; ++row) d[3 * row + k] = dm[3 * row + k] * s.scale[k];
  }
  const Reals w = s.quat[0], x = s.quat[1], y = s.quat[2], q = s.quat[3];
  const Reals dq[4] = {
      2.0 * (x * (d[7] - d[5]) + y * (d[2] - d[6]) + q * (d[3] - d[1])),
      2.0 * (-2.0 * x * (d[4] + d[8]) + y * (d[1] + d[3]) + q * (d[2] + d[6]) + w * (d[7] - d[5])),
      2.0 * (x * (d[1] + d[3]) - 2.0 * y * (d[0] + d[8]) + q * (d[5] + d[7]) + w * (d[2] - d[6])),
      2.0 * (x * (d[2] + d[6]) + y * (d[5] + d[7]) - 2.0 * q * (d[0] + d[4]) + w * (d[3] - d[1])),
  };
  const Reals along = dq[0] * w + dq[1] * x + dq[2] * y + dq[3] * q;
  Reals quat[4];
  for (int k = 0; k < 4; ++k) quat[k] = (dq[k] - along * s.quat[k]) / s.length;
  for (int64_t lane = 0; lane < group.count; ++lane) {
    if (!wanted[lane]) continue;
    const int64_t i = group.index[lane];
    const auto store = [lane, i](const Reals* from, int64_t width, float* rows) {
      for (int64_t k = 0; k < width; ++k) rows[width * i + k] = static_cast<float>(from[k][lane]);
    };
    if (scene.sh != nullptr) {
      const double of_colour[3] = {flow[0][lane], flow[1][lane], flow[2][lane]};
      double turn[3] = {};
      colour_backward(scene, view, i, of_colour, grad.sh + 3 * scene.bases * i, turn);
      for (int k = 0; k < 3; ++k) point[k][lane] += turn[k];
    }
    store(point, 3, grad.means), store(quat, 4, grad.quats), store(scale, 3, grad.scales);
    store(&to_opacity, 1, grad.opacities), store(flow + scene.colours(), scene.channels, grad.values);
    if (grad.shift == nullptr) continue;
    store(pull, 2, grad.shift);
  }
}

Scene scene_of(const float* means, const float* quats, const float* scales, const float* opacities, const float* sh,
               const float* values, const float* shift, const int64_t* sizes) {
  return {means,    quats,    scales,   opacities, sh,       values,       shift,
          sizes[0], sizes[1], sizes[2], sizes[3],  sizes[4], sizes[5] != 0};
}

}  // namespace
}  // namespace zoo

using namespace zoo;

// sizes: count, bases, channels, width, height, antialiased. Writes a record, a depth, a number of tiles and which they are
// per Gaussian; result: {status, index of the first Gaussian at fault, tiles of all}.
ZOO_EXPORT int64_t zoo_rasterize_project(const float* means, const float* quats, const float* scales,
                                         const float* opacities, const float* sh, const float* values,
                                         const float* shift, const double* camera, const int64_t* sizes, float* records, double* depths,
                                         int32_t* tiles, uint16_t* covers, int64_t* result, int64_t threads) try {
  const Scene scene = scene_of(means, quats, scales, opacities, sh, values, shift, sizes);
  const View& view = *reinterpret_cast<const View*>(camera);
  const int64_t stride = record_floats(scene.drawn());
  std::atomic<int64_t> fault{scene.count};
  parallel_for(scene.count, worthwhile(threads, 64 * scene.count), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kGroup) {
      const Group group(first, end);
      const Ellipses found(scene, view, group);
      for (int64_t lane = 0; lane < group.count; ++lane) {
        const int64_t i = first + lane;
        if (check(scene, i) == kDone) {
          auto& cover = reinterpret_cast<Cover*>(covers)[i];
          tiles[i] = static_cast<int32_t>(emit(scene, view, i, found, lane, records + stride * i, depths[i], cover));
          continue;
        }
        int64_t seen = fault.load();
        while (i < seen && !fault.compare_exchange_weak(seen, i)) {
        }
        tiles[i] = 0;
      }
    }
  });
  const bool good = fault.load() == scene.count;
  result[0] = good ? kDone : check(scene, fault.load());
  result[1] = fault.load(), result[2] = 0;
  for (int64_t i = 0; i < scene.count; ++i) result[2] += tiles[i];
  return kOk;
} ZOO_CATCH

// `partial` has, for each tile of each Gaussian in the order of Gaussians, its sums over the pixels of that tile.
ZOO_EXPORT int64_t zoo_rasterize_pull_back(const float* means, const float* quats, const float* scales,
                                        const float* opacities, const float* sh, const float* values,
                                        const float* shift, const double* camera, const int64_t* sizes,
                                        const int32_t* tiles, const float* partial,
                                        float* grad_means, float* grad_quats, float* grad_scales, float* grad_opacities,
                                        float* grad_sh, float* grad_values, float* grad_shift, int64_t threads) try {
  const Scene scene = scene_of(means, quats, scales, opacities, sh, values, shift, sizes);
  const View& view = *reinterpret_cast<const View*>(camera);
  const Gradients grad{grad_means, grad_quats, grad_scales, grad_opacities, grad_sh, grad_values, grad_shift};
  const int64_t width = kMoments + scene.drawn(), team = worthwhile(threads, 64 * scene.count);
  struct alignas(64) Line {
    double lane[8];
  };
  const int64_t lines = (width * kGroup + 7) / 8;
  std::vector<Line> memory(static_cast<size_t>(lines * team));  // before any thread starts: it may throw
  const std::vector<int64_t> first = first_entries(tiles, scene.count);
  parallel_for(team, team, [&](int64_t from, int64_t to) {
    for (int64_t part = from; part < to; ++part) {
      Reals* sums = reinterpret_cast<Reals*>(memory.data() + lines * part);
      const int64_t end = scene.count * (part + 1) / team;
      for (int64_t at = scene.count * part / team; at < end; at += kGroup) {
        const Group group(at, end);
        bool wanted[kGroup] = {}, any = false;
        for (int64_t k = 0; k < width; ++k) sums[k] = Reals{};
        for (int64_t lane = 0; lane < group.count; ++lane) {
          const int64_t i = at + lane;
          wanted[lane] = tiles[i] != 0;
          any = any || wanted[lane];
          if (!wanted[lane]) grad.clear(scene, i);
          for (int64_t e = first[static_cast<size_t>(i)]; e < first[static_cast<size_t>(i + 1)]; ++e)
            for (int64_t k = 0; k < width; ++k) sums[k][lane] += static_cast<double>(partial[e * width + k]);
        }
        if (any) pull_back(scene, view, group, sums, wanted, grad);
      }
    }
  });
  return kOk;
} ZOO_CATCH
