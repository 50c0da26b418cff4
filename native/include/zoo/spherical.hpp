// Real spherical harmonics up to degree 4, in the order and with the signs of 3D Gaussian splatting.
//
// The recurrences are those of Sloan, "Efficient Spherical Harmonic Evaluation" (JCGT 2013).
#pragma once

#include <cstdint>

namespace zoo {

constexpr int64_t kMostBases = 25;

// A number and its derivatives for the three coordinates of the direction, in one vector: {value, d/dx, d/dy, d/dz}.
typedef float Quad __attribute__((vector_size(16)));
struct Slope {
  Quad parts;
};
inline Slope operator+(Slope a, Slope b) { return {a.parts + b.parts}; }
inline Slope operator-(Slope a, Slope b) { return {a.parts - b.parts}; }
inline Slope operator*(Slope a, Slope b) {
  const Quad change = {0.0f, a.parts[1], a.parts[2], a.parts[3]};
  return {a.parts[0] * b.parts + b.parts[0] * change};
}
inline Slope operator*(float a, Slope b) { return {a * b.parts}; }
inline Slope operator+(Slope a, float b) { return {a.parts + Quad{b, 0.0f, 0.0f, 0.0f}}; }
inline void constant(float value, float& out) { out = value; }
inline void constant(float value, Slope& out) { out = {Quad{value, 0.0f, 0.0f, 0.0f}}; }

// The first `bases` (1, 4, 9, 16 or 25) of the harmonics at the unit vector (x, y, z).
template <class S>
inline void sh_bases(int64_t bases, S x, S y, S z, S* out) {
  constant(0.2820947917738781f, out[0]);
  if (bases <= 1) return;
  out[1] = -0.48860251190292f * y;
  out[2] = 0.48860251190292f * z;
  out[3] = -0.48860251190292f * x;
  if (bases <= 4) return;
  const S zz = z * z, cos2 = x * x - y * y, sin2 = 2.0f * (x * y);
  const S order1 = -1.092548430592079f * z;
  const S band2 = 0.9461746957575601f * zz + -0.3153915652525201f;
  out[4] = 0.5462742152960395f * sin2;
  out[5] = order1 * y;
  out[6] = band2;
  out[7] = order1 * x;
  out[8] = 0.5462742152960395f * cos2;
  if (bases <= 9) return;
  const S cos3 = x * cos2 - y * sin2, sin3 = x * sin2 + y * cos2;
  const S near1 = -2.285228997322329f * zz + 0.4570457994644658f, near2 = 1.445305721320277f * z;
  const S band3 = z * (1.865881662950577f * zz + -1.119528997770346f);
  out[9] = -0.5900435899266435f * sin3;
  out[10] = near2 * sin2;
  out[11] = near1 * y;
  out[12] = band3;
  out[13] = near1 * x;
  out[14] = near2 * cos2;
  out[15] = -0.5900435899266435f * cos3;
  if (bases <= 16) return;
  const S cos4 = x * cos3 - y * sin3, sin4 = x * sin3 + y * cos3;
  const S far1 = z * (-4.683325804901025f * zz + 2.007139630671868f);
  const S far2 = 3.31161143515146f * zz + -0.47308734787878f, far3 = -1.770130769779931f * z;
  out[16] = 0.6258357354491763f * sin4;
  out[17] = far3 * sin3;
  out[18] = far2 * sin2;
  out[19] = far1 * y;
  out[20] = 1.984313483298443f * (z * band3) - 1.006230589874905f * band2;
  out[21] = far1 * x;
  out[22] = far2 * cos2;
  out[23] = far3 * cos3;
  out[24] = 0.6258357354491763f * cos4;
}

}  // namespace zoo
