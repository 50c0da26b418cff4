// 3D Gaussians to ellipses on an image plane, with spherical-harmonic colours, and the way back for gradients.
//
// Every Gaussian belongs to one thread. The gradient of a Gaussian is summed from its tiles in the order of the tiles,
// so no result depends on the number of threads.
#include <atomic>
#include <cmath>
#include <vector>

#include "zoo/export.hpp"
#include "zoo/gaussians.hpp"
#include "zoo/parallel.hpp"
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

// One Gaussian seen by a camera, with all that its gradient needs.
struct Projection {
  double p[3];              // the mean in camera coordinates
  double r[9], m[9], w[9];  // the rotation, rotation * scales, and that in camera coordinates
  double quat[4], length;   // of unit length, and its length before
  double slope[2];          // x/z and y/z, held within 1.3 times the field of view
  bool held[2];
  double j[6], t[6];        // Jacobian of the projection, and t = j w: the covariance is t t^T
  double xx, xy, yy;        // covariance with eps2d added
  double det, det_bare;     // its determinant, and that before eps2d was added
  double compensation;      // factor of the opacity
};

void multiply(const double* a, const double* b, int rows, double* out) {  // [rows, 3] times [3, 3]
  for (int i = 0; i < rows; ++i)
    for (int k = 0; k < 3; ++k)
      out[3 * i + k] = a[3 * i] * b[k] + a[3 * i + 1] * b[3 + k] + a[3 * i + 2] * b[6 + k];
}

void rotation_of(const double* q, double* r) {
  const double w = q[0], x = q[1], y = q[2], z = q[3];
  r[0] = 1 - 2 * (y * y + z * z), r[1] = 2 * (x * y - w * z), r[2] = 2 * (x * z + w * y);
  r[3] = 2 * (x * y + w * z), r[4] = 1 - 2 * (x * x + z * z), r[5] = 2 * (y * z - w * x);
  r[6] = 2 * (x * z - w * y), r[7] = 2 * (y * z + w * x), r[8] = 1 - 2 * (x * x + y * y);
}

// False where the Gaussian cannot be seen: outside the depths, or flat on the plane.
bool project(const Scene& scene, const View& view, int64_t i, Projection& out) {
  for (int row = 0; row < 3; ++row) {
    const double* r = view.rotation + 3 * row;
    const float* mean = scene.means + 3 * i;
    out.p[row] = r[0] * mean[0] + r[1] * mean[1] + r[2] * mean[2] + view.translation[row];
  }
  const double z = out.p[2];
  if (!(z > view.near && z < view.far)) return false;
  double squares = 0;
  for (int k = 0; k < 4; ++k) squares += static_cast<double>(scene.quats[4 * i + k]) * scene.quats[4 * i + k];
  out.length = std::sqrt(squares);
  for (int k = 0; k < 4; ++k) out.quat[k] = scene.quats[4 * i + k] / out.length;
  rotation_of(out.quat, out.r);
  for (int k = 0; k < 9; ++k) out.m[k] = out.r[k] * scene.scales[3 * i + k % 3];
  multiply(view.rotation, out.m, 3, out.w);
  const double focal[2] = {view.fx, view.fy}, centre[2] = {view.cx, view.cy};
  const double size[2] = {static_cast<double>(scene.width), static_cast<double>(scene.height)};
  for (int k = 0; k < 6; ++k) out.j[k] = 0;
  for (int axis = 0; axis < 2; ++axis) {
    const double margin = 0.15 * size[axis] / focal[axis];
    const double low = -(centre[axis] / focal[axis] + margin);
    const double high = (size[axis] - centre[axis]) / focal[axis] + margin;
    const double slope = out.p[axis] / z;
    out.held[axis] = slope < low || slope > high;
    out.slope[axis] = std::min(std::max(slope, low), high);
    out.j[3 * axis + axis] = focal[axis] / z;
    out.j[3 * axis + 2] = -focal[axis] * out.slope[axis] / z;
  }
  multiply(out.j, out.w, 2, out.t);
  const double* t = out.t;
  const double xx = t[0] * t[0] + t[1] * t[1] + t[2] * t[2], yy = t[3] * t[3] + t[4] * t[4] + t[5] * t[5];
  out.xy = t[0] * t[3] + t[1] * t[4] + t[2] * t[5];
  out.det_bare = xx * yy - out.xy * out.xy;
  out.xx = xx + view.eps2d, out.yy = yy + view.eps2d;
  out.det = out.xx * out.yy - out.xy * out.xy;
  out.compensation = scene.antialiased ? std::sqrt(std::max(out.det_bare / out.det, 0.0)) : 1.0;
  return out.det > 0;
}

bool all_finite(const float* values, int64_t count) {
  float sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += values[k] * 0.0f;
  return sum == 0.0f;
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

// Number of tiles that Gaussian i touches; writes its record.
int64_t emit(const Scene& scene, const View& view, int64_t i, float* record, double& depth, Cover& cover) {
  Projection seen;
  if (scene.opacities[i] < kAlphaMin || !project(scene, view, i, seen)) return 0;
  const double opacity = scene.opacities[i] * seen.compensation;
  if (!(opacity >= kAlphaMin)) return 0;
  constexpr double kLog2e = 1.4426950408889634;
  const double level = std::log2(opacity), reach = 2.0 * (level - std::log2(kAlphaMin)) / kLog2e;
  auto& splat = *reinterpret_cast<Splat*>(record);
  splat.u = view.fx * seen.p[0] / seen.p[2] + view.cx;
  splat.v = view.fy * seen.p[1] / seen.p[2] + view.cy;
  if (scene.shift != nullptr) splat.u += scene.shift[2 * i], splat.v += scene.shift[2 * i + 1];
  const double norm = -0.5 * kLog2e / seen.det;
  splat.a = norm * seen.yy, splat.b = -2.0 * norm * seen.xy, splat.c = norm * seen.xx;
  splat.level = level;
  splat.extent_x = static_cast<float>(std::sqrt(reach * seen.xx));
  splat.extent_y = static_cast<float>(std::sqrt(reach * seen.yy));
  splat.tilt = static_cast<float>(seen.xy / std::sqrt(seen.xx * seen.yy));
  splat.upright = static_cast<float>(std::sqrt(seen.det / (seen.xx * seen.yy)));
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
  *channel = static_cast<float>(seen.p[2]);
  depth = seen.p[2];
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
  Slope basis[kMostBases];
  sh_bases(scene.bases, Slope{static_cast<float>(unit[0]), {1, 0, 0}}, Slope{static_cast<float>(unit[1]), {0, 1, 0}},
           Slope{static_cast<float>(unit[2]), {0, 0, 1}}, basis);
  const float* sh = scene.sh + 3 * scene.bases * i;
  double turn[3] = {};
  for (int k = 0; k < 3; ++k) {
    float colour = 0.5f;
    for (int64_t n = 0; n < scene.bases; ++n) colour += basis[n].value * sh[3 * n + k];
    const auto f = static_cast<float>(colour < 0 ? 0.0 : flow[k]);
    for (int64_t n = 0; n < scene.bases; ++n) {
      grad_sh[3 * n + k] = f * basis[n].value;
      for (int axis = 0; axis < 3; ++axis) turn[axis] += static_cast<double>(f * sh[3 * n + k] * basis[n].slope[axis]);
    }
  }
  const double along = turn[0] * unit[0] + turn[1] * unit[1] + turn[2] * unit[2];
  for (int axis = 0; axis < 3; ++axis) point[axis] += (turn[axis] - along * unit[axis]) / distance;
}

// From the sums over pixels of one Gaussian (see kMoments, then its channels) to the gradients of its row.
void pull_back(const Scene& scene, const View& view, int64_t i, const double* sums, const Gradients& grad) {
  Projection s;
  project(scene, view, i, s);
  const double mass = sums[0], mx = sums[1], my = sums[2], mxx = sums[3], mxy = sums[4], myy = sums[5];
  const double *flow = sums + kMoments, opacity = scene.opacities[i];
  grad.opacities[i] = static_cast<float>(mass / opacity);
  double xx = 0, xy = 0, yy = 0;  // gradient for the covariance with eps2d; xy for the single number
  const double pa = s.yy / s.det, pb = -s.xy / s.det, pc = s.xx / s.det;
  const double gx = pa * mx + pb * my, gy = pb * mx + pc * my;  // for the projected mean
  {  // inverse: P M P / 2 with P the inverse covariance
    const double a0 = pa * mxx + pb * mxy, a1 = pa * mxy + pb * myy;
    const double b0 = pb * mxx + pc * mxy, b1 = pb * mxy + pc * myy;
    xx = 0.5 * (a0 * pa + a1 * pb);
    xy = a0 * pb + a1 * pc;
    yy = 0.5 * (b0 * pb + b1 * pc);
  }
  if (scene.antialiased) {  // alpha also scales with sqrt(det_bare / det), whose logarithm gets the mass
    const double bare_xx = s.xx - view.eps2d, bare_yy = s.yy - view.eps2d;
    xx += 0.5 * mass * (bare_yy / s.det_bare - s.yy / s.det);
    yy += 0.5 * mass * (bare_xx / s.det_bare - s.xx / s.det);
    xy += mass * (s.xy / s.det - s.xy / s.det_bare);
  }
  double dt[6], dj[6] = {}, dw[9], dm[9], dp[3];
  for (int k = 0; k < 3; ++k) {
    dt[k] = 2 * xx * s.t[k] + xy * s.t[3 + k];
    dt[3 + k] = 2 * yy * s.t[3 + k] + xy * s.t[k];
  }
  for (int row = 0; row < 2; ++row)
    for (int k = 0; k < 3; ++k)
      for (int n = 0; n < 3; ++n) dj[3 * row + k] += dt[3 * row + n] * s.w[3 * k + n];
  for (int k = 0; k < 3; ++k)
    for (int n = 0; n < 3; ++n) dw[3 * k + n] = s.j[k] * dt[n] + s.j[3 + k] * dt[3 + n];
  for (int k = 0; k < 3; ++k)
    for (int n = 0; n < 3; ++n)
      dm[3 * k + n] = view.rotation[k] * dw[n] + view.rotation[3 + k] * dw[3 + n] + view.rotation[6 + k] * dw[6 + n];
  const double z = s.p[2], focal[2] = {view.fx, view.fy}, pull[2] = {gx, gy};
  dp[2] = flow[scene.drawn() - 1];
  for (int axis = 0; axis < 2; ++axis) {
    const double slant = -focal[axis] / z * dj[3 * axis + 2];  // gradient for the held slope
    dp[axis] = pull[axis] * focal[axis] / z + (s.held[axis] ? 0.0 : slant / z);
    dp[2] -= pull[axis] * focal[axis] * s.p[axis] / (z * z);
    dp[2] -= focal[axis] / (z * z) * (dj[3 * axis + axis] - dj[3 * axis + 2] * s.slope[axis]);
    if (!s.held[axis]) dp[2] -= slant * s.slope[axis] / z;
  }
  double point[3];
  for (int k = 0; k < 3; ++k)
    point[k] = view.rotation[k] * dp[0] + view.rotation[3 + k] * dp[1] + view.rotation[6 + k] * dp[2];
  if (scene.sh != nullptr) colour_backward(scene, view, i, flow, grad.sh + 3 * scene.bases * i, point);
  for (int64_t k = 0; k < scene.channels; ++k)
    grad.values[scene.channels * i + k] = static_cast<float>(flow[scene.colours() + k]);
  double d[9];
  for (int k = 0; k < 3; ++k) {
    double along = 0;
    for (int row = 0; row < 3; ++row) along += s.r[3 * row + k] * dm[3 * row + k];
    grad.scales[3 * i + k] = static_cast<float>(along);
    for (int row = 0; row < 3; ++row) d[3 * row + k] = dm[3 * row + k] * scene.scales[3 * i + k];
  }
  const double w = s.quat[0], x = s.quat[1], y = s.quat[2], q = s.quat[3];
  const double dq[4] = {
      2 * (x * (d[7] - d[5]) + y * (d[2] - d[6]) + q * (d[3] - d[1])),
      2 * (-2 * x * (d[4] + d[8]) + y * (d[1] + d[3]) + q * (d[2] + d[6]) + w * (d[7] - d[5])),
      2 * (x * (d[1] + d[3]) - 2 * y * (d[0] + d[8]) + q * (d[5] + d[7]) + w * (d[2] - d[6])),
      2 * (x * (d[2] + d[6]) + y * (d[5] + d[7]) - 2 * q * (d[0] + d[4]) + w * (d[3] - d[1])),
  };
  const double along = dq[0] * w + dq[1] * x + dq[2] * y + dq[3] * q;
  for (int k = 0; k < 4; ++k) grad.quats[4 * i + k] = static_cast<float>((dq[k] - along * s.quat[k]) / s.length);
  for (int k = 0; k < 3; ++k) grad.means[3 * i + k] = static_cast<float>(point[k]);
  if (grad.shift != nullptr) {
    grad.shift[2 * i] = static_cast<float>(gx);
    grad.shift[2 * i + 1] = static_cast<float>(gy);
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
    for (int64_t i = begin; i < end; ++i) {
      if (check(scene, i) != kDone) {
        int64_t seen = fault.load();
        while (i < seen && !fault.compare_exchange_weak(seen, i)) {
        }
        tiles[i] = 0;
        continue;
      }
      tiles[i] = static_cast<int32_t>(emit(scene, view, i, records + stride * i, depths[i],
                                           reinterpret_cast<Cover*>(covers)[i]));
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
  std::vector<double> sums(static_cast<size_t>(width * team));  // before any thread starts: it may throw
  const std::vector<int64_t> first = first_entries(tiles, scene.count);
  parallel_for(team, team, [&](int64_t from, int64_t to) {
    for (int64_t part = from; part < to; ++part) {
      double* sum = sums.data() + width * part;
      for (int64_t i = scene.count * part / team; i < scene.count * (part + 1) / team; ++i) {
        if (tiles[i] == 0) {
          grad.clear(scene, i);
          continue;
        }
        for (int64_t k = 0; k < width; ++k) sum[k] = 0;
        for (int64_t e = first[static_cast<size_t>(i)]; e < first[static_cast<size_t>(i + 1)]; ++e)
          for (int64_t k = 0; k < width; ++k) sum[k] += static_cast<double>(partial[e * width + k]);
        pull_back(scene, view, i, sum, grad);
      }
    }
  });
  return kOk;
} ZOO_CATCH
