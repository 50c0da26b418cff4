// Between [batch, features], the layout of torch, and [features, batch], in which a batch is a vector.
#include "zoo/packed.hpp"

namespace zoo {
namespace {

// Transposes a full 8 x 8 block.
ZOO_INLINE void transpose8(const float* in, int64_t ldi, float* out, int64_t ldo) {
#if defined(__AVX2__)
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * ldi);
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int h = 0; h < 2; ++h) {
    r[4 * h + 0] = _mm256_shuffle_ps(t[4 * h], t[4 * h + 2], 0x44);
    r[4 * h + 1] = _mm256_shuffle_ps(t[4 * h], t[4 * h + 2], 0xee);
    r[4 * h + 2] = _mm256_shuffle_ps(t[4 * h + 1], t[4 * h + 3], 0x44);
    r[4 * h + 3] = _mm256_shuffle_ps(t[4 * h + 1], t[4 * h + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * ldo, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * ldo, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
#else
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) out[j * ldo + i] = in[i * ldi + j];
#endif
}

// out[j * ldo + i] = in[i * ldi + j] for i < rows, j < cols.
void transpose(const float* in, int64_t ldi, int64_t rows, int64_t cols, float* out, int64_t ldo) {
  int64_t j = 0;
  for (; j + 8 <= cols; j += 8) {
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8) transpose8(in + i * ldi + j, ldi, out + j * ldo + i, ldo);
    for (; i < rows; ++i)
      for (int c = 0; c < 8; ++c) out[(j + c) * ldo + i] = in[i * ldi + j + c];
  }
  for (; j < cols; ++j)
    for (int64_t i = 0; i < rows; ++i) out[j * ldo + i] = in[i * ldi + j];
}

}  // namespace

void transpose_in(const float* x, int64_t ldx, int64_t batch, int64_t count, float* out, int64_t width) {
  transpose(x, ldx, batch, count, out, width);
  if (batch < width)
    for (int64_t k = 0; k < count; ++k)
      std::memset(out + k * width + batch, 0, static_cast<size_t>(width - batch) * sizeof(float));
}

void transpose_out(const float* in, int64_t width, int64_t count, float* y, int64_t ldy, int64_t batch) {
  transpose(in, width, count, batch, y, ldy);
}

}  // namespace zoo
