// Which input site meets which output site at which kernel offset, found by coordinates.
//
// Sites are rows (batch, coordinates...) of int32. A table finds the row of a coordinate: a dense grid where the space
// is small for the number of sites, else a hash table. The result is a neighbour table [sites, offsets] of rows or -1,
// which is then cut into pair lists by (tile of target sites, offset), the order in which the convolutions want them.
#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "zoo/export.hpp"
#include "zoo/parallel.hpp"

namespace zoo {
namespace {

constexpr int kMaxDims = 3;
constexpr int64_t kGridPerSite = 64;  // a dense grid may have this many cells per site: 256 bytes, a hash has 32 to 64

struct Space {
  int64_t dims, batch;
  int64_t shape[kMaxDims];

  Space(int64_t dimensions, int64_t batch_size, const int64_t* extents) : dims(dimensions), batch(batch_size) {
    std::copy_n(extents, dims, shape);
  }

  int64_t volume() const {
    int64_t cells = batch;
    for (int64_t d = 0; d < dims; ++d) cells *= shape[d];
    return cells;
  }

  bool holds(const int32_t* site) const {
    bool inside = site[0] >= 0 && site[0] < batch;
    for (int64_t d = 0; d < dims; ++d) inside &= site[d + 1] >= 0 && site[d + 1] < shape[d];
    return inside;
  }

  int64_t key(int64_t sample, const int64_t* place) const {
    int64_t k = sample;
    for (int64_t d = 0; d < dims; ++d) k = k * shape[d] + place[d];
    return k;
  }

  int64_t key(const int32_t* site) const {
    int64_t k = site[0];
    for (int64_t d = 0; d < dims; ++d) k = k * shape[d] + site[d + 1];
    return k;
  }
};

// Row of a site by its key.
class SiteTable {
 public:
  SiteTable(int64_t volume, int64_t sites) {
    if (volume <= std::max<int64_t>(kGridPerSite * sites, 1 << 16)) {
      grid_.assign(static_cast<size_t>(volume), -1);
      return;
    }
    int bits = 4;
    while ((int64_t{1} << bits) < 2 * sites) ++bits;
    shift_ = 64 - bits;
    mask_ = (uint64_t{1} << bits) - 1;
    slots_.assign(size_t{1} << bits, Slot{-1, -1});
  }

  // The row that already has this key, or -1 after entering it.
  int32_t insert(int64_t key, int32_t row) {
    if (!grid_.empty()) {
      if (grid_[key] >= 0) return grid_[key];
      grid_[key] = row;
      return -1;
    }
    for (uint64_t at = slot(key);; at = (at + 1) & mask_) {
      if (slots_[at].key == key) return slots_[at].row;
      if (slots_[at].key < 0) {
        slots_[at] = {key, row};
        return -1;
      }
    }
  }

  int32_t find(int64_t key) const {
    if (!grid_.empty()) return grid_[key];
    for (uint64_t at = slot(key);; at = (at + 1) & mask_) {
      if (slots_[at].key == key) return slots_[at].row;
      if (slots_[at].key < 0) return -1;
    }
  }

 private:
  struct Slot {
    int64_t key;
    int32_t row;
  };

  uint64_t slot(int64_t key) const { return static_cast<uint64_t>(key) * 0x9e3779b97f4a7c15u >> shift_; }

  std::vector<int32_t> grid_;
  std::vector<Slot> slots_;
  int shift_ = 0;
  uint64_t mask_ = 0;
};

// A kernel of extents size, its offsets numbered row-major: input = output * stride - padding + offset * dilation.
struct Kernel {
  int64_t dims, offsets = 1;
  int64_t size[kMaxDims], stride[kMaxDims], padding[kMaxDims], dilation[kMaxDims];

  // geometry: size, stride, padding and dilation, `dimensions` numbers each.
  Kernel(int64_t dimensions, const int64_t* geometry) : dims(dimensions) {
    std::copy_n(geometry, dims, size);
    std::copy_n(geometry + dims, dims, stride);
    std::copy_n(geometry + 2 * dims, dims, padding);
    std::copy_n(geometry + 3 * dims, dims, dilation);
    for (int64_t d = 0; d < dims; ++d) offsets *= size[d];
  }

  void offset(int64_t number, int64_t* at) const {
    for (int64_t d = dims - 1; d >= 0; --d) {
      at[d] = number % size[d];
      number /= size[d];
    }
  }

  // Calls hit(offset number, key of the output) for every output site that an input site reaches.
  template <class Hit>
  void reached(const int32_t* site, const Space& out, Hit&& hit) const {
    int64_t at[kMaxDims], place[kMaxDims];
    for (int64_t k = 0; k < offsets; ++k) {
      offset(k, at);
      bool inside = true;
      for (int64_t d = 0; d < dims && inside; ++d) {
        const int64_t position = site[d + 1] + padding[d] - at[d] * dilation[d];
        place[d] = position / stride[d];
        inside = position >= 0 && position % stride[d] == 0 && place[d] < out.shape[d];
      }
      if (inside) hit(k, out.key(site[0], place));
    }
  }
};

}  // namespace
}  // namespace zoo

using namespace zoo;

// problem: {0}; {1, row}: that row lies outside of the space; {2, row, other}: both rows are the same site.
ZOO_EXPORT int64_t zoo_sites_check(const int32_t* sites, int64_t number, int64_t dims, int64_t batch,
                                const int64_t* shape, int64_t* problem) try {
  const Space space(dims, batch, shape);
  problem[0] = 0;
  for (int64_t row = 0; row < number; ++row) {
    if (space.holds(sites + row * (dims + 1))) continue;
    problem[0] = 1;
    problem[1] = row;
    return kOk;
  }
  SiteTable table(space.volume(), number);
  for (int64_t row = 0; row < number; ++row) {
    const int32_t other = table.insert(space.key(sites + row * (dims + 1)), static_cast<int32_t>(row));
    if (other < 0) continue;
    problem[0] = 2;
    problem[1] = other;
    problem[2] = row;
    return kOk;
  }
  return zoo::kOk;
} ZOO_CATCH

// neighbours[row, k]: the row of the site at offset (k - centre) * dilation, or -1. Sizes are odd. Sites are checked.
ZOO_EXPORT int64_t zoo_submanifold_neighbours(const int32_t* sites, int64_t number, int64_t dims, int64_t batch,
                                           const int64_t* shape, const int64_t* geometry, int64_t threads,
                                           int32_t* neighbours) try {
  const Space space(dims, batch, shape);
  const Kernel kernel(dims, geometry);
  SiteTable table(space.volume(), number);
  for (int64_t row = 0; row < number; ++row) table.insert(space.key(sites + row * (dims + 1)), static_cast<int32_t>(row));
  // Moving by an offset adds the same to every key; the offset K - 1 - k undoes the offset k.
  const int64_t offsets = kernel.offsets, half = offsets / 2;
  std::vector<int64_t> step(half), move(half * kMaxDims);
  for (int64_t k = 0; k < half; ++k) {
    int64_t at[kMaxDims];
    kernel.offset(k, at);
    for (int64_t d = 0; d < dims; ++d) {
      move[k * kMaxDims + d] = (at[d] - kernel.size[d] / 2) * kernel.dilation[d];
      step[k] = step[k] * shape[d] + move[k * kMaxDims + d];
    }
  }
  parallel_for(number, threads, [&](int64_t begin, int64_t end) {
    std::fill(neighbours + begin * offsets, neighbours + end * offsets, -1);
  });
  // Every entry is written by one row only: the pair (row, k) and its mirror image are found once.
  parallel_for(number, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t* site = sites + row * (dims + 1);
      const int64_t key = space.key(site);
      neighbours[row * offsets + half] = static_cast<int32_t>(row);
      for (int64_t k = 0; k < half; ++k) {
        bool inside = true;
        for (int64_t d = 0; d < dims; ++d) {
          const int64_t place = site[d + 1] + move[k * kMaxDims + d];
          inside &= place >= 0 && place < shape[d];
        }
        if (!inside) continue;
        const int32_t other = table.find(key + step[k]);
        if (other < 0) continue;
        neighbours[row * offsets + k] = other;
        neighbours[other * offsets + (offsets - 1 - k)] = static_cast<int32_t>(row);
      }
    }
  });
  return zoo::kOk;
} ZOO_CATCH

// keys: distinct keys, in order, of the output sites that any input reaches; there is room for
// number * product of ceil(size / (stride / gcd(stride, dilation))).
ZOO_EXPORT int64_t zoo_conv_sites(const int32_t* sites, int64_t number, int64_t dims, int64_t batch,
                               const int64_t* out_shape, const int64_t* geometry, int64_t* keys, int64_t* count) try {
  const Space out(dims, batch, out_shape);
  const Kernel kernel(dims, geometry);
  *count = 0;
  if (out.volume() <= kGridPerSite * 32 * number) {  // a bit per cell
    std::vector<uint64_t> marks(static_cast<size_t>(out.volume() / 64 + 1));
    for (int64_t row = 0; row < number; ++row)
      kernel.reached(sites + row * (dims + 1), out,
                     [&](int64_t, int64_t key) { marks[key >> 6] |= uint64_t{1} << (key & 63); });
    for (size_t w = 0; w < marks.size(); ++w)
      for (uint64_t word = marks[w]; word != 0; word &= word - 1)
        keys[(*count)++] = static_cast<int64_t>(w << 6) + __builtin_ctzll(word);
    return kOk;
  }
  for (int64_t row = 0; row < number; ++row)
    kernel.reached(sites + row * (dims + 1), out, [&](int64_t, int64_t key) { keys[(*count)++] = key; });
  std::sort(keys, keys + *count);
  *count = std::unique(keys, keys + *count) - keys;
  return zoo::kOk;
} ZOO_CATCH

// Neighbour tables of a convolution in both directions: forward[output, k] = input, backward[input, k] = output.
// The outputs may be fewer than the inputs reach.
ZOO_EXPORT int64_t zoo_conv_neighbours(const int32_t* sites, int64_t number, const int64_t* out_keys, int64_t outputs,
                                    int64_t dims, int64_t batch, const int64_t* out_shape, const int64_t* geometry,
                                    int64_t threads, int32_t* forward, int32_t* backward) try {
  const Space out(dims, batch, out_shape);
  const Kernel kernel(dims, geometry);
  const int64_t offsets = kernel.offsets;
  SiteTable table(out.volume(), outputs);
  for (int64_t o = 0; o < outputs; ++o) table.insert(out_keys[o], static_cast<int32_t>(o));
  std::fill(forward, forward + outputs * offsets, -1);
  std::fill(backward, backward + number * offsets, -1);
  parallel_for(number, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      kernel.reached(sites + row * (dims + 1), out, [&](int64_t k, int64_t key) {
        const int32_t o = table.find(key);
        if (o < 0) return;  // not among the outputs that were asked for
        backward[row * offsets + k] = o;
        forward[o * offsets + k] = static_cast<int32_t>(row);  // one input per output and offset: no two write here
      });
    }
  });
  return zoo::kOk;
} ZOO_CATCH

// total: entries of a neighbour table that are not -1.
ZOO_EXPORT int64_t zoo_pairs_total(const int32_t* neighbours, int64_t entries, int64_t threads, int64_t* total) try {
  std::atomic<int64_t> sum{0};
  parallel_for(entries, threads, [&](int64_t begin, int64_t end) {
    int64_t found = 0;
    for (int64_t i = begin; i < end; ++i) found += neighbours[i] >= 0;
    sum += found;
  });
  *total = sum;
  return zoo::kOk;
} ZOO_CATCH

// counts[tile, k]: neighbours that the targets of a tile (`tile` consecutive rows) have at offset k.
ZOO_EXPORT int64_t zoo_pairs_count(const int32_t* neighbours, int64_t targets, int64_t offsets, int64_t tile,
                                int64_t threads, int64_t* counts) try {
  parallel_for((targets + tile - 1) / tile, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      int64_t* own = counts + t * offsets;
      std::fill(own, own + offsets, 0);
      for (int64_t row = t * tile; row < std::min(targets, (t + 1) * tile); ++row)
        for (int64_t k = 0; k < offsets; ++k) own[k] += neighbours[row * offsets + k] >= 0;
    }
  });
  return zoo::kOk;
} ZOO_CATCH

// Pairs (source, target) of segment (tile, k), by rising target: start[t * offsets + k] ... start[t * offsets + k + 1].
ZOO_EXPORT int64_t zoo_pairs_fill(const int32_t* neighbours, int64_t targets, int64_t offsets, int64_t tile,
                               const int64_t* start, int64_t threads, int32_t* source, int32_t* target) try {
  parallel_for((targets + tile - 1) / tile, threads, [&](int64_t begin, int64_t end) {
    // Gathered without branches (whether there is a neighbour is anybody's guess), with room for one stray entry.
    std::vector<int32_t> from(tile + 1), to(tile + 1);
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t k = 0; k < offsets; ++k) {
        int64_t count = 0;
        for (int64_t row = t * tile; row < std::min(targets, (t + 1) * tile); ++row) {
          from[count] = neighbours[row * offsets + k];
          to[count] = static_cast<int32_t>(row);
          count += from[count] >= 0;
        }
        std::copy_n(from.begin(), count, source + start[t * offsets + k]);
        std::copy_n(to.begin(), count, target + start[t * offsets + k]);
      }
    }
  });
  return zoo::kOk;
} ZOO_CATCH
