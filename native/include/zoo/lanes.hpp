// Vectors of float or double in the compiler's own vector types: the same source gives SSE, NEON, AVX2 or AVX-512
// code, whichever this file is compiled for.
#pragma once

#include <cstdint>
#include <cstring>

namespace zoo {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#else
constexpr int64_t kVectorBytes = 32;
#endif

// Lanes<T>::Vec holds kCount values; comparisons of Vecs give a Bits of the same width (all ones: true).
template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t kCount = kVectorBytes / 4;
};

template <>
struct Lanes<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t kCount = kVectorBytes / 8;
};

template <class T>
inline __attribute__((always_inline)) typename Lanes<T>::Vec load_vec(const T* from) {
  typename Lanes<T>::Vec vec;
  std::memcpy(&vec, from, sizeof vec);
  return vec;
}

template <class T>
inline __attribute__((always_inline)) void store_vec(T* to, typename Lanes<T>::Vec vec) {
  std::memcpy(to, &vec, sizeof vec);
}

// All lanes the same. (x - 0 is x for every x, so this compiles to a broadcast; x + 0 would not.)
template <class T>
inline __attribute__((always_inline)) typename Lanes<T>::Vec splat_vec(T value) {
  return value - typename Lanes<T>::Vec{};
}

template <class T>
inline __attribute__((always_inline)) T sum_vec(typename Lanes<T>::Vec vec) {
  T total = vec[0];
  for (int64_t i = 1; i < Lanes<T>::kCount; ++i) total += vec[i];
  return total;
}

}  // namespace zoo
