// Splats onto an image, tile by tile, front to back, and the sums over pixels that their gradients are made of.
//
// A tile belongs to one thread and meets its splats in the order of their depth. Going back, it writes the sums of each
// splat to a place of their own, to be added up per Gaussian later; so no result depends on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "zoo/export.hpp"
#include "zoo/gaussians.hpp"
#include "zoo/lanes.hpp"
#include "zoo/parallel.hpp"
#include "zoo/simd.hpp"

namespace zoo {
namespace {

using Vec = Lanes<float>::Vec;
using Bits = Lanes<float>::Bits;
constexpr int64_t kWidth = Lanes<float>::kCount;
constexpr int64_t kVectorRows = kWidth / kTile;        // pixel rows in one vector
constexpr int64_t kVectors = kTile / kVectorRows;      // vectors in a tile
constexpr int64_t kPrefetchSplats = 6;

ZOO_INLINE bool any(Bits bits) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(bits)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(bits)) != 0;
#else
  int32_t found = 0;
  for (int64_t i = 0; i < kWidth; ++i) found |= bits[i];
  return found != 0;
#endif
}

// 2^x to 2e-7 of itself, for x in [-126, 126].
ZOO_INLINE Vec exp2_of(Vec x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec shifted = x + kShift;
  const Vec f = x - (shifted - kShift);
  Vec p = splat_vec(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  Bits exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

// to[i] = the sum of the lanes of v[i].
template <int64_t kCount>
ZOO_INLINE void store_sums(const Vec* v, float* to) {
  int64_t i = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
  for (; i + 4 <= kCount; i += 4) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[i], v[i + 1]), _mm256_hadd_ps(v[i + 2], v[i + 3]));
    _mm_storeu_ps(to + i, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
  }
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (i + 2 == kCount) {
    const __m256 pairs = _mm256_hadd_ps(v[i], v[i + 1]);
    const __m128 halves = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
    _mm_storel_pi(reinterpret_cast<__m64*>(to + i), _mm_hadd_ps(halves, halves));
    i += 2;
  }
#endif
  for (; i < kCount; ++i) to[i] = sum_vec<float>(v[i]);
}

struct Image {
  int64_t width, height, channels;
};

// Which Gaussian is drawn in a tile, and where its sums over this tile go.
struct Entry {
  int32_t owner, slot;
};

// One channel of an image, and the floats from a pixel to the next and from a row to the next; null where all is zero.
struct Plane {
  const float* values;
  int64_t along, down;
};

// Where the gradients for some channels of an image lie, as rasterize_native.py says it.
struct Flow {
  const float* values;                    // null where they are zero
  int64_t channels, down, along, across;  // floats from a row, a pixel and a channel to the next
};
static_assert(sizeof(Flow) == 5 * sizeof(int64_t), "the layout is shared with Python");

struct Tile {
  int64_t x, y;  // its first pixel
  int64_t width, height;

  Tile(const Image& image, int64_t index) {
    const int64_t columns = TileGrid(image.width, image.height).columns;
    x = index % columns * kTile, y = index / columns * kTile;
    width = std::min(kTile, image.width - x), height = std::min(kTile, image.height - y);
  }

  // Vector v of a plane of the image, zero outside of it; and back.
  ZOO_INLINE Vec load(const Plane& plane, int64_t v) const {
    float values[kWidth] = {};
    for (int64_t part = 0; part < kVectorRows; ++part) {
      const int64_t row = v * kVectorRows + part;
      const float* from = plane.values + (y + row) * plane.down + x * plane.along;
      if (row >= height) break;
      if (plane.along == 1 && width == kTile) std::memcpy(values + part * kTile, from, kTile * sizeof(float));
      else for (int64_t i = 0; i < width; ++i) values[part * kTile + i] = from[i * plane.along];
    }
    return load_vec(values);
  }
  ZOO_INLINE void store(float* plane, int64_t row_floats, int64_t v, Vec vec) const {
    float values[kWidth];
    store_vec(values, vec);
    for (int64_t part = 0; part < kVectorRows; ++part) {
      const int64_t row = v * kVectorRows + part;
      float* to = plane + (y + row) * row_floats + x;
      if (row >= height) break;
      if (width == kTile) std::memcpy(to, values + part * kTile, kTile * sizeof(float));
      else std::copy(values + part * kTile, values + part * kTile + width, to);
    }
  }
};

struct Pixels {  // offsets of the lanes of a tile from its first pixel
  Vec x, y[kVectors];
  Pixels() {
    for (int64_t lane = 0; lane < kWidth; ++lane) {
      x[lane] = static_cast<float>(lane % kTile);
      for (int64_t v = 0; v < kVectors; ++v) y[v][lane] = static_cast<float>(v * kVectorRows + lane / kTile);
    }
  }
};

// A splat in the coordinates of a tile: log2 of its alpha at pixel (x, y) is flat(x) + y (skew(x) + bend y).
struct Local {
  Vec flat, skew;
  float x, y, bend;      // the centre of the splat, from that of the first pixel
  int32_t begin, end;    // vectors that its contour may touch
  const float* channel;  // its channels

  ZOO_INLINE void place(const Splat& splat, const Tile& tile, const Pixels& pixels, int32_t first, int32_t last) {
    const double dx = static_cast<double>(tile.x) + 0.5 - splat.u, dy = static_cast<double>(tile.y) + 0.5 - splat.v;
    x = static_cast<float>(-dx), y = static_cast<float>(-dy);
    const auto level = static_cast<float>(splat.level + dx * (splat.a * dx + splat.b * dy) + splat.c * dy * dy);
    const auto along = static_cast<float>(2 * splat.a * dx + splat.b * dy);
    const auto down = static_cast<float>(2 * splat.c * dy + splat.b * dx);
    flat = level + pixels.x * (along + static_cast<float>(splat.a) * pixels.x);
    skew = down + static_cast<float>(splat.b) * pixels.x;
    bend = static_cast<float>(splat.c);
    constexpr auto kMost = static_cast<float>(kTile);
    constexpr auto kRows = static_cast<int32_t>(kVectorRows);
    const float low = std::min(std::max(y - splat.extent_y, -1.0f), kMost);
    const float high = std::min(std::max(y + splat.extent_y, -1.0f), kMost);
    begin = std::max(static_cast<int32_t>(low + 0.999f) / kRows, first);
    end = std::max(std::min((static_cast<int32_t>(high + 1.001f) + kRows - 1) / kRows, last), begin);
    channel = reinterpret_cast<const float*>(&splat + 1);
  }
};

// The vectors of a tile that light still reaches, and the light per pixel.
struct Light {
  Vec left[kVectors];
  int32_t begin = 0, end = kVectors;

  explicit Light(const Tile& tile) {
    const Vec full = splat_vec(1.0f);
    for (int64_t v = 0; v < kVectors; ++v) left[v] = full;
    if (tile.width == kTile && tile.height == kTile) return;
    float lanes[kTile * kTile] = {};
    for (int64_t row = 0; row < tile.height; ++row) std::fill_n(lanes + row * kTile, tile.width, 1.0f);
    for (int64_t v = 0; v < kVectors; ++v) left[v] = load_vec(lanes + v * kWidth);
  }

  // False where no light is left in the tile.
  ZOO_INLINE bool look() {
    while (begin < end && !any(left[begin] >= kOpaque)) ++begin;
    while (begin < end && !any(left[end - 1] >= kOpaque)) --end;
    return begin < end;
  }
};

ZOO_INLINE const Splat& splat_of(const float* records, int64_t stride, Entry entry) {
  return *reinterpret_cast<const Splat*>(records + stride * entry.owner);
}

// Splats that are placed in a tile together, and what is to be computed of them: whatever waits for a splat's place, or for
// how many vectors it touches, waits once for all of them.
struct Block {
  static constexpr int64_t kMost = 8;
  Local splats[kMost];
  int64_t count, pairs;
  uint8_t pair[kMost * kVectors + 8];  // a splat and one of its vectors: kVectors * splat + vector

  ZOO_INLINE void place(const float* records, int64_t stride, const Entry* begin, const Entry* end, const Tile& tile,
                        const Pixels& pixels, const Light& light) {
    count = std::min(kMost, end - begin), pairs = 0;
    for (int64_t k = 0; k < count; ++k) {
      if (begin + k + kMost < end) {
        const char* next = reinterpret_cast<const char*>(records + stride * begin[k + kMost].owner);
        __builtin_prefetch(next);
        __builtin_prefetch(next + 64);
      }
      Local& local = splats[k];
      local.place(splat_of(records, stride, begin[k]), tile, pixels, light.begin, light.end);
      const uint64_t from = static_cast<uint64_t>(kVectors * k + local.begin);
      const uint64_t run = 0x0706050403020100u + 0x0101010101010101u * from;  // little endian: from, from + 1 ...
      std::memcpy(pair + pairs, &run, sizeof run);
      pairs += local.end - local.begin;
    }
  }
};

// kChannels: their number, or 0 where only `image` tells. sums: [channels, kVectors].
template <int64_t kChannels>
void draw_tile(const Image& image, const Tile& tile, const float* records, const Entry* begin, const Entry* end,
               Vec* sums, float* out) {
  const int64_t channels = kChannels > 0 ? kChannels : image.channels, stride = record_floats(channels);
  const Pixels pixels;
  Light light(tile);
  for (int64_t k = 0; k < channels * kVectors; ++k) sums[k] = Vec{};
  Block block;
  for (const Entry* entry = begin; entry < end && light.look(); entry += block.count) {
    block.place(records, stride, entry, end, tile, pixels, light);
    for (int64_t at = 0; at < block.pairs; ++at) {
      const Local& local = block.splats[block.pair[at] / kVectors];
      const int64_t v = block.pair[at] % kVectors;
      const Vec y = pixels.y[v], level = local.flat + y * (local.skew + local.bend * y);
      Vec alpha = exp2_of(level);
      alpha = alpha < kAlphaMax ? alpha : splat_vec(kAlphaMax);
      alpha = level >= kLevelMin ? alpha : Vec{};
      const Vec weight = alpha * light.left[v];
      light.left[v] = light.left[v] - weight;
      for (int64_t k = 0; k < channels; ++k) sums[k * kVectors + v] += weight * local.channel[k];
    }
  }
  const int64_t plane = image.width * image.height;
  for (int64_t v = 0; v < kVectors; ++v) {
    for (int64_t k = 0; k < channels; ++k) tile.store(out + k * plane, image.width, v, sums[k * kVectors + v]);
    tile.store(out + channels * plane, image.width, v, 1.0f - light.left[v]);
  }
}

// flow: [channels + 1]; work: channels + 2 rows of kVectors, and a vector per channel.
// partial: [entries, kMoments + channels].
template <int64_t kChannels>
void trace_tile(const Image& image, const Tile& tile, const float* records, const Entry* begin, const Entry* end,
                const float* out, const Plane* flow, Vec* work, float* partial) {
  const int64_t channels = kChannels > 0 ? kChannels : image.channels, stride = record_floats(channels);
  const int64_t sums = kMoments + channels, plane = image.width * image.height;
  const Pixels pixels;
  Light light(tile);
  Vec* grad = work;                                 // [channels, kVectors], for the image
  Vec* covered = work + channels * kVectors;        // for the alpha
  Vec* behind = covered + kVectors;                 // what lies behind, weighed by its gradients
  Vec few[kChannels > 0 ? kChannels : 1];           // in registers where their number is known
  Vec* sum = kChannels > 0 ? few : behind + kVectors;  // [channels], of one splat
  for (int64_t v = 0; v < kVectors; ++v) behind[v] = Vec{};
  for (int64_t k = 0; k <= channels; ++k) {
    const Plane seen{out + k * plane, 1, image.width};
    for (int64_t v = 0; v < kVectors; ++v) {
      const Vec g = flow[k].values == nullptr ? Vec{} : tile.load(flow[k], v);
      if (flow[k].values != nullptr) behind[v] += g * tile.load(seen, v);
      grad[k * kVectors + v] = g;  // the last plane is `covered`
    }
  }
  Block block;
  const Entry* entry = begin;
  for (; entry < end && light.look(); entry += block.count) {
    block.place(records, stride, entry, end, tile, pixels, light);
    for (int64_t n = 0; n < block.count; ++n) {
      const Local& local = block.splats[n];
      Vec mass{}, mass_y{}, mass_yy{};
      for (int64_t k = 0; k < channels; ++k) sum[k] = Vec{};
      for (int64_t v = local.begin; v < local.end; ++v) {
        const Vec y = pixels.y[v], level = local.flat + y * (local.skew + local.bend * y);
        Vec alpha = exp2_of(level);
        const Bits cut = alpha >= kAlphaMax;
        alpha = cut ? splat_vec(kAlphaMax) : alpha;
        alpha = level >= kLevelMin ? alpha : Vec{};
        const Vec weight = alpha * light.left[v];
        light.left[v] = light.left[v] - weight;
        Vec value = covered[v];
        for (int64_t k = 0; k < channels; ++k) {
          const Vec g = grad[k * kVectors + v];
          value += g * local.channel[k];
          sum[k] += weight * g;
        }
        value *= weight;
        const Vec rest = behind[v] - value;
        behind[v] = rest;
        Vec change = value - rest * alpha / (1.0f - alpha);
        change = cut ? Vec{} : change;
        mass += change;
        const Vec dy = y - local.y, change_y = change * dy;
        mass_y += change_y;
        mass_yy += change_y * dy;
      }
      float* to = partial + sums * entry[n].slot;
      const Vec dx = pixels.x - local.x, mass_x = mass * dx;
      const Vec moments[kMoments] = {mass, mass_x, mass_y, mass_x * dx, mass_y * dx, mass_yy};
      if constexpr (kChannels > 0) {
        Vec all[kMoments + kChannels];
        for (int64_t k = 0; k < kMoments; ++k) all[k] = moments[k];
        for (int64_t k = 0; k < kChannels; ++k) all[kMoments + k] = sum[k];
        store_sums<kMoments + kChannels>(all, to);
      } else {
        store_sums<kMoments>(moments, to);
        for (int64_t k = 0; k < channels; ++k) store_sums<1>(sum + k, to + kMoments + k);
      }
    }
  }
  for (; entry < end; ++entry) std::fill_n(partial + sums * entry->slot, sums, 0.0f);
}

// The Gaussians that are drawn, nearest first; of two at the same depth that of the lower index.
std::vector<int32_t> by_depth(const double* depths, const int32_t* tiles, int64_t count) {
  struct Item {
    uint32_t key;
    int32_t index;
  };
  std::vector<Item> items;
  uint32_t low = ~0u, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (tiles[i] == 0) continue;
    const auto depth = static_cast<float>(depths[i]);
    uint32_t key;  // positive floats are ordered like their bits
    std::memcpy(&key, &depth, sizeof key);
    low = std::min(low, key), high = std::max(high, key);
    items.push_back({key, static_cast<int32_t>(i)});
  }
  constexpr int kDigit = 11;
  std::vector<Item> other(items.size());
  for (int shift = 0; !items.empty() && shift < 32 && (high - low) >> shift != 0; shift += kDigit) {
    size_t place[(1 << kDigit) + 1] = {};
    const auto digit = [&](const Item& item) { return ((item.key - low) >> shift) & ((1u << kDigit) - 1); };
    for (const Item& item : items) ++place[digit(item) + 1];
    for (int d = 0; d < 1 << kDigit; ++d) place[d + 1] += place[d];
    for (const Item& item : items) other[place[digit(item)]++] = item;
    items.swap(other);
  }
  for (size_t begin = 0; begin < items.size();) {  // equal as floats, not as doubles
    size_t end = begin + 1;
    while (end < items.size() && items[end].key == items[begin].key) ++end;
    if (end > begin + 1)
      std::stable_sort(items.begin() + static_cast<int64_t>(begin), items.begin() + static_cast<int64_t>(end),
                       [&](const Item& a, const Item& b) { return depths[a.index] < depths[b.index]; });
    begin = end;
  }
  std::vector<int32_t> order(items.size());
  for (size_t k = 0; k < items.size(); ++k) order[k] = items[k].index;
  return order;
}

// Lists the splats of every tile, nearest first. Threads share `order`; what a thread lists comes after what the threads
// before it do, whatever their number.
void fill_tiles(const Image& image, const float* records, const Cover* covers, const int32_t* tiles,
                const std::vector<int32_t>& order, int64_t gaussians, int64_t* pointer, Entry* entries, int64_t threads) {
  const TileGrid grid(image.width, image.height);
  const int64_t stride = record_floats(image.channels), count = static_cast<int64_t>(order.size());
  const int64_t team = worthwhile(threads, 16 * count);
  struct Listed {
    int32_t tile;
    Entry entry;
  };
  const std::vector<int64_t> first = first_entries(tiles, gaussians);
  std::vector<int64_t> starts(static_cast<size_t>(count + 1)), next(static_cast<size_t>(team * grid.count()));
  for (int64_t k = 0; k < count; ++k)
    starts[static_cast<size_t>(k + 1)] = starts[static_cast<size_t>(k)] + tiles[order[static_cast<size_t>(k)]];
  const std::unique_ptr<Listed[]> lists(new Listed[static_cast<size_t>(starts.back())]);  // in the order of depth
  const auto parts = [&](auto&& body) {
    parallel_for(team, team, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part)
        body(next.data() + part * grid.count(), count * part / team, count * (part + 1) / team);
    });
  };
  parts([&](int64_t* here, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int32_t owner = order[static_cast<size_t>(k)];
      if (k + kPrefetchSplats < end) __builtin_prefetch(covers + order[static_cast<size_t>(k + kPrefetchSplats)]);
      Listed* to = lists.get() + starts[static_cast<size_t>(k)];
      auto slot = static_cast<int32_t>(first[static_cast<size_t>(owner)]);
      covers[owner].each(splat_of(records, stride, {owner, 0}), image.width, image.height, [&](int64_t row, Span columns) {
        for (int64_t tile = row * grid.columns + columns.begin; tile < row * grid.columns + columns.end; ++tile) {
          ++here[tile];
          *to++ = {static_cast<int32_t>(tile), {owner, slot++}};
        }
      });
    }
  });
  int64_t total = 0;
  for (int64_t tile = 0; tile < grid.count(); ++tile) {
    pointer[tile] = total;
    for (int64_t part = 0; part < team; ++part) {
      int64_t& place = next[static_cast<size_t>(part * grid.count() + tile)];
      const int64_t here = place;
      place = total;
      total += here;
    }
  }
  pointer[grid.count()] = total;
  parts([&](int64_t* place, int64_t begin, int64_t end) {
    for (int64_t k = starts[static_cast<size_t>(begin)]; k < starts[static_cast<size_t>(end)]; ++k)
      entries[place[lists[static_cast<size_t>(k)].tile]++] = lists[static_cast<size_t>(k)].entry;
  });
}

constexpr int64_t kTileCost = 8;  // an empty tile costs about as much as so many splats

// body(tile's index, working memory of `vectors` for this thread); throws std::bad_alloc before any thread starts.
template <class Body>
void over_tiles(const Image& image, const int64_t* pointer, int64_t vectors, int64_t threads, Body&& body) {
  const int64_t tiles = TileGrid(image.width, image.height).count();
  const int64_t team = std::min(worthwhile(threads, 16 * (pointer[tiles] + tiles)), tiles);
  struct alignas(64) Line {
    float lane[16];
  };
  const int64_t lines = (vectors * kWidth + 15) / 16;
  std::vector<Line> work(static_cast<size_t>(lines * team));
  // A share of the tiles per thread, as parallel_rows cuts them, each with its own working memory.
  std::vector<int64_t> cuts(static_cast<size_t>(team + 1), tiles);
  const auto cost = [&](int64_t tile) { return pointer[tile] + kTileCost * tile; };
  for (int64_t part = 0, tile = 0; part < team; ++part) {
    while (tile < tiles && cost(tile) * team < cost(tiles) * part) ++tile;
    cuts[static_cast<size_t>(part)] = tile;
  }
  parallel_for(team, team, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Vec* own = reinterpret_cast<Vec*>(work.data() + lines * part);
      for (int64_t tile = cuts[static_cast<size_t>(part)]; tile < cuts[static_cast<size_t>(part + 1)]; ++tile)
        body(tile, own);
    }
  });
}

}  // namespace
}  // namespace zoo

using namespace zoo;

// sizes: count, width, height, channels (depth included). pointer: [tiles + 1], filled here; entries: 2 int32 for each;
// image: [channels + 1, height, width], the last plane alpha.
ZOO_EXPORT int64_t zoo_rasterize_draw(const float* records, const double* depths, const int32_t* tiles,
                                   const uint16_t* covers, const int64_t* sizes, int64_t* pointer, int32_t* entries,
                                   float* image, int64_t threads) try {
  const Image size{sizes[1], sizes[2], sizes[3]};
  auto* list = reinterpret_cast<Entry*>(entries);
  fill_tiles(size, records, reinterpret_cast<const Cover*>(covers), tiles, by_depth(depths, tiles, sizes[0]), sizes[0],
             pointer, list, threads);
  over_tiles(size, pointer, size.channels * kVectors, threads, [&](int64_t index, Vec* work) {
    const Tile tile(size, index);
    const auto draw = size.channels == 4 ? draw_tile<4> : draw_tile<0>;
    draw(size, tile, records, list + pointer[index], list + pointer[index + 1], work, image);
  });
  return kOk;
} ZOO_CATCH

// flows: `parts` of them, for all channels in their order, alpha last. partial: [entries, kMoments + channels], written
// whole.
ZOO_EXPORT int64_t zoo_rasterize_trace(const float* records, const int64_t* sizes, const int64_t* pointer,
                                    const int32_t* entries, const float* image, const void* flows, int64_t parts,
                                    float* partial, int64_t threads) try {
  const Image size{sizes[1], sizes[2], sizes[3]};
  const auto* list = reinterpret_cast<const Entry*>(entries);
  const int64_t vectors = (size.channels + 2) * kVectors + size.channels;
  std::vector<Plane> planes;
  for (const Flow* flow = static_cast<const Flow*>(flows); parts > 0; ++flow, --parts)
    for (int64_t k = 0; k < flow->channels; ++k)
      planes.push_back({flow->values == nullptr ? nullptr : flow->values + k * flow->across, flow->along, flow->down});
  over_tiles(size, pointer, vectors, threads, [&](int64_t index, Vec* work) {
    if (pointer[index] == pointer[index + 1]) return;
    const Tile tile(size, index);
    const auto trace = size.channels == 4 ? trace_tile<4> : trace_tile<0>;
    trace(size, tile, records, list + pointer[index], list + pointer[index + 1], image, planes.data(), work, partial);
  });
  return kOk;
} ZOO_CATCH
