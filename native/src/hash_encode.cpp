// Multi-resolution hash grid (Mueller et al. 2022): features of points in the unit cube, and their gradients.
//
// Going forward, and back to the points, a thread owns points; back to the table it owns levels, whose entries are
// summed in the order of the points. So no result depends on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "zoo/export.hpp"
#include "zoo/lanes.hpp"
#include "zoo/parallel.hpp"
#include "zoo/simd.hpp"

namespace zoo {
namespace {

using Vec = Lanes<float>::Vec;
using Bits = Lanes<float>::Bits;
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef float Pair __attribute__((vector_size(8)));
typedef float Quad __attribute__((vector_size(16)));
typedef double Halves __attribute__((vector_size(16)));  // of a Quad
constexpr int64_t kWidth = Lanes<float>::kCount;

struct Grid {
  const int64_t* resolution;  // [levels] cells on a side
  const int64_t* offset;      // [levels + 1] first entry
  int64_t levels, features;

  bool dense(int64_t level) const {
    const int64_t side = resolution[level] + 1;
    return side * side * side == offset[level + 1] - offset[level];
  }
};

ZOO_INLINE Vec to_floats(Bits v) { return __builtin_convertvector(v, Vec); }

// Cells of kWidth points on one level: entries of the lowest corner's coordinates, and shares of the upper corners.
struct Cells {
  Words part[3][2];  // what each coordinate contributes to the entry, for the lower and the upper corner
  Vec upper[3];
  Words mask;
  bool dense;

  ZOO_INLINE Cells(const Grid& grid, int64_t level, const Vec* point) {
    const auto side = static_cast<int32_t>(grid.resolution[level]);
    dense = grid.dense(level);
    const auto size = static_cast<uint32_t>(grid.offset[level + 1] - grid.offset[level]);
    mask = Words{} + (size - 1);
    const uint32_t hashed[3] = {1u, 2654435761u, 805459861u};
    const uint32_t straight[3] = {1u, static_cast<uint32_t>(side + 1),
                                  static_cast<uint32_t>(side + 1) * static_cast<uint32_t>(side + 1)};
    for (int axis = 0; axis < 3; ++axis) {
      Vec x = point[axis];
      x = x > 0.0f ? x : Vec{};
      x = x < 1.0f ? x : splat_vec(1.0f);
      x *= static_cast<float>(side);
      Bits cell = __builtin_convertvector(x, Bits);
      cell = cell < side - 1 ? cell : Bits{} + (side - 1);
      upper[axis] = x - to_floats(cell);
      const auto factor = dense ? straight[axis] : hashed[axis];
      part[axis][0] = reinterpret_cast<Words>(cell) * factor;
      part[axis][1] = part[axis][0] + factor;
    }
  }

  ZOO_INLINE Words entry(int corner) const {
    const Words x = part[0][corner & 1], y = part[1][corner >> 1 & 1], z = part[2][corner >> 2];
    return dense ? x + y + z : (x ^ y ^ z) & mask;
  }
  ZOO_INLINE Vec share(int axis, int corner) const {
    return corner >> axis & 1 ? upper[axis] : 1.0f - upper[axis];
  }
};

ZOO_INLINE Vec gather_floats(const float* from, Words index) {
#if defined(__AVX512F__)
  return _mm512_i32gather_ps(reinterpret_cast<__m512i>(index), from, 4);
#elif defined(__AVX2__)
  return _mm256_i32gather_ps(from, reinterpret_cast<__m256i>(index), 4);
#else
  Vec v;
  for (int64_t i = 0; i < kWidth; ++i) v[i] = from[index[i]];
  return v;
#endif
}

// The points of `rows` that follow `begin`, at most kWidth, one coordinate after the other; absent ones are zero.
ZOO_INLINE int64_t load_points(const float* points, const int64_t* rows, int64_t begin, int64_t end, Vec* point) {
  const int64_t count = std::min(kWidth, end - begin);
  float lanes[3][kWidth] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int axis = 0; axis < 3; ++axis) lanes[axis][i] = points[3 * rows[begin + i] + axis];
  for (int axis = 0; axis < 3; ++axis) point[axis] = load_vec(lanes[axis]);
  return count;
}

ZOO_INLINE void store_words(uint32_t* to, Words words) { std::memcpy(to, &words, sizeof words); }

// Where the corners of the cells of kWidth points lie in a table of `features` per entry, and what each weighs.
struct Corners {
  float weights[8][kWidth];
  uint32_t entries[8][kWidth];

  ZOO_INLINE Corners(const Cells& cells, int64_t features) {
    for (int corner = 0; corner < 8; ++corner) {
      store_vec(weights[corner], cells.share(0, corner) * cells.share(1, corner) * cells.share(2, corner));
      store_words(entries[corner], cells.entry(corner) * static_cast<uint32_t>(features));
    }
  }
};

constexpr int64_t kMostFeatures = 64;

// kFeatures: their number, or 0 where only the grid tells.
template <int64_t kFeatures>
void encode(const Grid& grid, const float* points, const float* table, const int64_t* rows, int64_t begin, int64_t end,
            float* out) {
  const int64_t features = kFeatures > 0 ? kFeatures : grid.features, width = grid.levels * features;
  for (int64_t at = begin; at < end; at += kWidth) {
    Vec point[3];
    const int64_t count = load_points(points, rows, at, end, point);
    for (int64_t level = 0; level < grid.levels; ++level) {
      const Cells cells(grid, level, point);
      const float* own = table + features * grid.offset[level];
      if constexpr (kFeatures == 2) {  // both at once, point by point: a gather costs more than its loads
        const Corners corners(cells, features);
        for (int64_t i = 0; i < count; ++i) {
          Pair sum{};
          for (int corner = 0; corner < 8; ++corner) {
            Pair value;
            std::memcpy(&value, own + corners.entries[corner][i], sizeof value);
            sum += corners.weights[corner][i] * value;
          }
          std::memcpy(out + width * rows[at + i] + features * level, &sum, sizeof sum);
        }
      } else {
        Vec sums[kMostFeatures];
        for (int64_t f = 0; f < features; ++f) sums[f] = Vec{};
        for (int corner = 0; corner < 8; ++corner) {
          const Vec weight = cells.share(0, corner) * cells.share(1, corner) * cells.share(2, corner);
          const Words entry = cells.entry(corner) * static_cast<uint32_t>(features);
          for (int64_t f = 0; f < features; ++f) sums[f] += weight * gather_floats(own + f, entry);
        }
        float lanes[kMostFeatures][kWidth];
        for (int64_t f = 0; f < features; ++f) store_vec(lanes[f], sums[f]);
        for (int64_t i = 0; i < count; ++i) {
          float* to = out + width * rows[at + i] + features * level;
          for (int64_t f = 0; f < features; ++f) to[f] = lanes[f][i];
        }
      }
    }
  }
}

// Derivatives for the coordinates of a point in its cell, of both features at once: along x, then y, then z, what is left
// of the eight corners is halved. `slope[axis]` gets them.
ZOO_INLINE void cell_slopes(const float* own, const Corners& corners, const float (*upper)[kWidth], int64_t lane,
                            Pair* slope) {
  Quad along_x[2], at_x[2];  // of the lower and the upper y; each the pair of the lower z, then that of the upper
  const float x = upper[0][lane], y = upper[1][lane], z = upper[2][lane];
  const auto load = [&](int corner) {  // as two numbers of 64 bits, or the parts would go through memory
    double low, high;
    std::memcpy(&low, own + corners.entries[corner][lane], sizeof low);
    std::memcpy(&high, own + corners.entries[corner + 4][lane], sizeof high);
    return reinterpret_cast<Quad>(Halves{low, high});
  };
  const auto halves = [](Quad both, Pair* low, Pair* high) {
    const auto parts = reinterpret_cast<Halves>(both);
    const double first = parts[0], second = parts[1];
    std::memcpy(low, &first, sizeof first);
    std::memcpy(high, &second, sizeof second);
  };
  for (int side = 0; side < 2; ++side) {
    const Quad low = load(2 * side);
    along_x[side] = load(2 * side + 1) - low;
    at_x[side] = low + x * along_x[side];
  }
  const Quad along_y = at_x[1] - at_x[0];
  Pair low, high;
  halves(along_x[0] + y * (along_x[1] - along_x[0]), &low, &high);
  slope[0] = low + z * (high - low);
  halves(along_y, &low, &high);
  slope[1] = low + z * (high - low);
  halves(at_x[0] + y * along_y, &low, &high);
  slope[2] = high - low;
}

template <int64_t kFeatures>
void to_points(const Grid& grid, const float* points, const float* table, const int64_t* rows, int64_t begin,
               int64_t end, const float* flow, float* grad) {
  const int64_t features = kFeatures > 0 ? kFeatures : grid.features, width = grid.levels * features;
  for (int64_t at = begin; at < end; at += kWidth) {
    Vec point[3], sum[3] = {};
    Pair pairs[3][kWidth] = {};
    const int64_t count = load_points(points, rows, at, end, point);
    for (int64_t level = 0; level < grid.levels; ++level) {
      const Cells cells(grid, level, point);
      const float* own = table + features * grid.offset[level];
      const auto side = static_cast<float>(grid.resolution[level]);
      if constexpr (kFeatures == 2) {  // point by point, as in `encode`
        const Corners corners(cells, features);
        float upper[3][kWidth];
        for (int axis = 0; axis < 3; ++axis) store_vec(upper[axis], cells.upper[axis]);
        for (int64_t i = 0; i < count; ++i) {
          Pair from, slope[3];
          std::memcpy(&from, flow + width * rows[at + i] + features * level, sizeof from);
          cell_slopes(own, corners, upper, i, slope);
          from *= side;
          for (int axis = 0; axis < 3; ++axis) pairs[axis][i] += from * slope[axis];
        }
      } else {
        float lanes[kMostFeatures][kWidth];
        for (int64_t f = 0; f < features; ++f) store_vec(lanes[f], Vec{});
        for (int64_t i = 0; i < count; ++i) {
          const float* from = flow + width * rows[at + i] + features * level;
          for (int64_t f = 0; f < features; ++f) lanes[f][i] = from[f];
        }
        for (int corner = 0; corner < 8; ++corner) {
          const Words entry = cells.entry(corner) * static_cast<uint32_t>(features);
          Vec value{};
          for (int64_t f = 0; f < features; ++f) value += load_vec(lanes[f]) * gather_floats(own + f, entry);
          value *= side;
          for (int axis = 0; axis < 3; ++axis) {
            const Vec across = cells.share((axis + 1) % 3, corner) * cells.share((axis + 2) % 3, corner) * value;
            sum[axis] += corner >> axis & 1 ? across : -across;
          }
        }
      }
    }
    for (int64_t i = 0; i < count; ++i)
      for (int axis = 0; axis < 3; ++axis) {  // what was held at the border does not move
        const float x = point[axis][i];
        const float found = kFeatures == 2 ? pairs[axis][i][0] + pairs[axis][i][1] : sum[axis][i];
        grad[3 * rows[at + i] + axis] = x >= 0.0f && x <= 1.0f ? found : 0.0f;
      }
  }
}

template <int64_t kFeatures>
void to_table(const Grid& grid, int64_t level, const float* points, const int64_t* rows, int64_t count,
              const float* flow, float* grad) {
  const int64_t features = kFeatures > 0 ? kFeatures : grid.features, width = grid.levels * features;
  float* own = grad + features * grid.offset[level];
  for (int64_t at = 0; at < count; at += kWidth) {
    Vec point[3];
    const int64_t here = load_points(points, rows, at, count, point);
    const Cells cells(grid, level, point);
    const Corners corners(cells, features);
    for (int64_t i = 0; i < here; ++i) {
      const float* g = flow + width * rows[at + i] + features * level;
      for (int corner = 0; corner < 8; ++corner) {
        float* to = own + corners.entries[corner][i];
        const float weight = corners.weights[corner][i];
        if constexpr (kFeatures == 2) {  // both at once: reading back what was just written is what limits this
          Pair sum, flow_here;
          std::memcpy(&sum, to, sizeof sum);
          std::memcpy(&flow_here, g, sizeof flow_here);
          sum += weight * flow_here;
          std::memcpy(to, &sum, sizeof sum);
        } else {
          for (int64_t f = 0; f < features; ++f) to[f] += weight * g[f];
        }
      }
    }
  }
}

}  // namespace
}  // namespace zoo

using namespace zoo;

// rows: the points to encode; of the others nothing is read or written. out: [points, levels * features].
ZOO_EXPORT int64_t zoo_hash_encode(const float* points, const float* table, const int64_t* rows, int64_t count,
                                   const int64_t* resolution, const int64_t* offset, int64_t levels, int64_t features,
                                   float* out, int64_t threads) try {
  const Grid grid{resolution, offset, levels, features};
  const int64_t blocks = (count + kWidth - 1) / kWidth;
  parallel_for(blocks, worthwhile(threads, 16 * count * levels), [&](int64_t begin, int64_t end) {
    const auto run = features == 2 ? encode<2> : encode<0>;
    run(grid, points, table, rows, begin * kWidth, std::min(end * kWidth, count), out);
  });
  return kOk;
} ZOO_CATCH

// Either gradient may be null; both are zero where this is called.
ZOO_EXPORT int64_t zoo_hash_encode_backward(const float* points, const float* table, const int64_t* rows,
                                            int64_t count, const int64_t* resolution, const int64_t* offset,
                                            int64_t levels, int64_t features, const float* flow, float* grad_points,
                                            float* grad_table, int64_t threads) try {
  const Grid grid{resolution, offset, levels, features};
  const int64_t blocks = (count + kWidth - 1) / kWidth, team = worthwhile(threads, 16 * count * levels);
  if (grad_points != nullptr)
    parallel_for(blocks, team, [&](int64_t begin, int64_t end) {
      const auto run = features == 2 ? to_points<2> : to_points<0>;
      run(grid, points, table, rows, begin * kWidth, std::min(end * kWidth, count), flow, grad_points);
    });
  if (grad_table != nullptr)
    parallel_for(levels, team, [&](int64_t begin, int64_t end) {
      const auto run = features == 2 ? to_table<2> : to_table<0>;
      for (int64_t level = begin; level < end; ++level) run(grid, level, points, rows, count, flow, grad_table);
    });
  return kOk;
} ZOO_CATCH
