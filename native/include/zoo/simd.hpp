// One vector of floats, as wide as the instruction set that this file is compiled for (8 lanes; 16 with AVX-512),
// with the loads that the kernels need: storage types widened to float, and lanes picked by mask bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define ZOO_INLINE inline __attribute__((always_inline))

namespace zoo {

// Storage types. Arithmetic is always float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

ZOO_INLINE float to_float(float value) { return value; }

ZOO_INLINE float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

ZOO_INLINE float to_float(f16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#elif defined(__aarch64__)
  __fp16 half;
  std::memcpy(&half, &value.bits, 2);
  return static_cast<float>(half);
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 31u, fraction = value.bits & 1023u;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (fraction << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (fraction << 13);
  } else {
    float small = static_cast<float>(fraction) * 0x1p-24f;  // subnormal halves are normal floats
    std::memcpy(&bits, &small, 4);
    bits |= sign;
  }
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
#endif
}

// By how many bits a key of `expand` is moved; see "packed values behind mask bits" below.
template <class T>
constexpr int kKeyShift = 0;

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using vf = __m512;

ZOO_INLINE vf zero() { return _mm512_setzero_ps(); }
ZOO_INLINE vf splat(float v) { return _mm512_set1_ps(v); }
ZOO_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
ZOO_INLINE vf load(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
ZOO_INLINE vf load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
ZOO_INLINE vf load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// kLanes values of four bits, the first in the lowest bits, stored with 8 added.
struct int4 {
  uint8_t pair;
};
ZOO_INLINE vf load(const int4* p) {
  int64_t bits;
  std::memcpy(&bits, p, 8);
  const __m512i words = _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), _mm512_set1_epi64(bits));
  const __m512i shift = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  const __m512i nibble = _mm512_and_si512(_mm512_srlv_epi32(words, shift), _mm512_set1_epi32(15));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(nibble, _mm512_set1_epi32(8)));
}
ZOO_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
ZOO_INLINE vf relu(vf v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }  // of (0, NaN) the second: a NaN stays
ZOO_INLINE vf least(vf a, vf b) { return _mm512_min_ps(a, b); }  // a NaN of b stays
ZOO_INLINE void store(float* p, vf v) { _mm512_storeu_ps(p, v); }
ZOO_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
ZOO_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
ZOO_INLINE float sum(vf v) { return _mm512_reduce_add_ps(v); }

// The first `count` lanes of v, zero in the others.
ZOO_INLINE vf first_lanes(vf v, int64_t count) {
  return _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << count) - 1), v);
}

// Lane i is x[offsets[i]].
ZOO_INLINE vf gather(const float* x, const uint16_t* offsets) {
  return _mm512_i32gather_ps(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(offsets))), x, 4);
}

template <class T>
ZOO_INLINE vf expand(uint32_t key, const T* packed) {
  return _mm512_maskz_expand_ps(static_cast<__mmask16>(key), load(packed));
}
ZOO_INLINE vf load_kept(uint32_t bits, const float* x) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), x);
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using vf = __m256;

ZOO_INLINE vf zero() { return _mm256_setzero_ps(); }
ZOO_INLINE vf splat(float v) { return _mm256_set1_ps(v); }
ZOO_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
ZOO_INLINE vf load(const bf16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
ZOO_INLINE vf load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
ZOO_INLINE vf load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// kLanes values of four bits, the first in the lowest bits, stored with 8 added.
struct int4 {
  uint8_t pair;
};
ZOO_INLINE vf load(const int4* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  const __m256i nibble = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(bits), shift), _mm256_set1_epi32(15));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(nibble, _mm256_set1_epi32(8)));
}
ZOO_INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
ZOO_INLINE vf relu(vf v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }  // of (0, NaN) the second: a NaN stays
ZOO_INLINE vf least(vf a, vf b) { return _mm256_min_ps(a, b); }  // a NaN of b stays
ZOO_INLINE void store(float* p, vf v) { _mm256_storeu_ps(p, v); }
ZOO_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
ZOO_INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
ZOO_INLINE float sum(vf v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// The first `count` lanes of v, zero in the others.
ZOO_INLINE vf first_lanes(vf v, int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i wanted = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  return _mm256_and_ps(v, _mm256_castsi256_ps(wanted));
}

// Lane i is x[offsets[i]]. Eight scalar loads beat the gather instruction (Zen 3: 10 cycles), and two offsets are read
// at once, as loads are what limits this.
ZOO_INLINE vf gather(const float* x, const uint16_t* offsets) {
  const auto four = [&](const uint16_t* o) {
    uint32_t low, high;
    std::memcpy(&low, o, 4);
    std::memcpy(&high, o + 2, 4);
    __m128 v = _mm_load_ss(x + (low & 0xffff));
    v = _mm_insert_ps(v, _mm_load_ss(x + (low >> 16)), 0x10);
    v = _mm_insert_ps(v, _mm_load_ss(x + (high & 0xffff)), 0x20);
    return _mm_insert_ps(v, _mm_load_ss(x + (high >> 16)), 0x30);
  };
  return _mm256_set_m128(four(offsets + 4), four(offsets));
}

// Controls of the permutations that put packed values where the set bits of a byte are.
//   f32:  per lane, which of the next eight values, with the sign bit set where the lane's bit is;
//   bf16: bytes of eight floats from the same 16 bytes, each value into an upper half; 0x80 makes a zero;
//   f16:  the same for eight halves, widened afterwards.
struct SpreadTable {
  alignas(64) uint8_t f32[256][8];
  alignas(64) uint8_t bf16[256][32];
  alignas(64) uint8_t f16[256][16];
  constexpr SpreadTable() : f32(), bf16(), f16() {
    for (uint32_t bits = 0; bits < 256; ++bits) {
      uint32_t seen = 0;
      for (uint32_t lane = 0; lane < 8; ++lane) {
        const bool set = (bits >> lane) & 1;
        f32[bits][lane] = static_cast<uint8_t>(set ? 0x80 | seen : 0);
        for (uint32_t byte = 0; byte < 4; ++byte)
          bf16[bits][4 * lane + byte] = static_cast<uint8_t>(set && byte >= 2 ? 2 * seen + byte - 2 : 0x80);
        for (uint32_t byte = 0; byte < 2; ++byte)
          f16[bits][2 * lane + byte] = static_cast<uint8_t>(set ? 2 * seen + byte : 0x80);
        seen += set;
      }
    }
  }
};
inline constexpr SpreadTable kSpread{};

template <>
inline constexpr int kKeyShift<bf16> = 5;  // a key of floats is an index: addresses scale by 8
template <>
inline constexpr int kKeyShift<f16> = 4;

ZOO_INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
ZOO_INLINE __m256i lanes_of(uint32_t bits) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSpread.f32[bits])));
}

// As `expand`, but lanes without a bit hold any of the values.
ZOO_INLINE vf permuted(uint32_t key, const float* packed) {
  vf values = load(packed);
  asm("" : "+x"(values));  // in a register: a permutation from memory takes twice as long (Zen 3)
  return _mm256_permutevar8x32_ps(values, lanes_of(key));
}
ZOO_INLINE vf expand(uint32_t key, const float* packed) {
  return _mm256_blendv_ps(zero(), permuted(key, packed), _mm256_castsi256_ps(lanes_of(key)));
}
ZOO_INLINE vf expand(uint32_t key, const bf16* packed) {
  const auto* control = reinterpret_cast<const __m256i*>(kSpread.bf16[0] + key);
  return _mm256_castsi256_ps(
      _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load16(packed)), _mm256_load_si256(control)));
}
ZOO_INLINE vf expand(uint32_t key, const f16* packed) {
  return _mm256_cvtph_ps(_mm_shuffle_epi8(load16(packed), load16(kSpread.f16[0] + key)));
}
ZOO_INLINE vf load_kept(uint32_t bits, const float* x) { return _mm256_maskload_ps(x, lanes_of(bits)); }

#else

// GCC and Clang vectors: two NEON registers on aarch64, whatever there is elsewhere.
constexpr int kLanes = 8;
typedef float vf __attribute__((vector_size(32)));

ZOO_INLINE vf zero() { return vf{}; }
ZOO_INLINE vf splat(float v) { return vf{v, v, v, v, v, v, v, v}; }
ZOO_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
ZOO_INLINE vf load(const T* p) {
  vf v;
  for (int i = 0; i < 8; ++i) v[i] = to_float(p[i]);
  return v;
}
ZOO_INLINE vf load(const int8_t* p) {
  vf v;
  for (int i = 0; i < 8; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}
// kLanes values of four bits, the first in the lowest bits, stored with 8 added.
struct int4 {
  uint8_t pair;
};
ZOO_INLINE vf load(const int4* p) {
  vf v;
  for (int i = 0; i < 8; ++i) v[i] = static_cast<float>(((p[i / 2].pair >> (4 * (i % 2))) & 15) - 8);
  return v;
}
ZOO_INLINE vf mul(vf a, vf b) { return a * b; }
ZOO_INLINE vf relu(vf v) { return v < vf{} ? vf{} : v; }
ZOO_INLINE vf least(vf a, vf b) { return a < b ? a : b; }
ZOO_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
ZOO_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
ZOO_INLINE vf add(vf a, vf b) { return a + b; }
ZOO_INLINE float sum(vf v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

ZOO_INLINE vf first_lanes(vf v, int64_t count) {
  for (int64_t i = count; i < 8; ++i) v[i] = 0;
  return v;
}
ZOO_INLINE vf gather(const float* x, const uint16_t* offsets) {
  vf v;
  for (int i = 0; i < 8; ++i) v[i] = x[offsets[i]];
  return v;
}

template <class T>
ZOO_INLINE vf expand(uint32_t key, const T* packed) {
  vf v{};
  int next = 0;
  for (int i = 0; i < 8; ++i)
    if ((key >> i) & 1) v[i] = to_float(packed[next++]);
  return v;
}
ZOO_INLINE vf load_kept(uint32_t bits, const float* x) {
  vf v{};
  for (int i = 0; i < 8; ++i)
    if ((bits >> i) & 1) v[i] = x[i];
  return v;
}

#endif

// ---- packed values behind mask bits --------------------------------------------------------------------------------
//
// Each instruction set above has, for the mask bits of kLanes lanes:
//   expand(key, packed):  lane i is the next unread packed value where bit i is set, and zero elsewhere;
//   load_kept(bits, x):   x where the bit is set, zero elsewhere.
// A key is the bits times the size of a table entry (1 << kKeyShift), so that it is an offset and its population the
// number of values.

// spread and load_beside: one of the two may leave any number where there is no bit and the other a zero, so that their
// product is that of expand and load_kept where all numbers are finite.
template <class T>
ZOO_INLINE vf spread(uint32_t key, const T* packed) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) return permuted(key, packed);
#endif
  return expand(key, packed);
}
template <class T>
ZOO_INLINE vf load_beside([[maybe_unused]] uint32_t key, const float* x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) return load_kept(key, x);
#endif
  return load(x);
}

// The key of lanes [step * kLanes, ...) of 32 mask bits.
template <class T>
ZOO_INLINE uint32_t key_at(uint32_t word, int step) {
  constexpr uint32_t kBits = (1u << kLanes) - 1;
  const int turn = kLanes * step;
  if constexpr (kKeyShift<T> == 0) return (word >> turn) & kBits;
  const uint64_t wide = static_cast<uint64_t>(word) << kKeyShift<T>;  // a rotation and a mask: one instruction each
  return static_cast<uint32_t>((wide >> turn) | (wide << ((64 - turn) & 63))) & (kBits << kKeyShift<T>);
}

// Values and columns are read kLanes at a time, so both arrays must end in this many entries of padding (zeros).
constexpr int kOverread = 16;

}  // namespace zoo
