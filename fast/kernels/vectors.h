// Vectors of 16 floats with AVX-512, of 8 with AVX2, of 4 elsewhere: loading and storing, elementary functions, sums of products.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

// LANES is what a register holds: compilers split wider vectors through memory. CHOOSE is for what they do not translate well.
#ifdef __AVX512F__
constexpr int LANES = 16, REGISTERS = 32;
#define CHOOSE(avx512, avx2, other) avx512
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#define CHOOSE(avx512, avx2, other) avx2
#else
#ifdef __aarch64__
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif
#define CHOOSE(avx512, avx2, other) other
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float stored_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint8_t byte_vec __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int64_t len;

constexpr int whole_vectors(int n) { return (n + LANES - 1) / LANES * LANES; }  // n, rounded up

#define UNROLL _Pragma("GCC unroll 32")
#define ROLLED _Pragma("GCC unroll 1")  // for loops that spill registers when they are unrolled
#define INLINE inline __attribute__((always_inline))

INLINE ivec bits(vec x) { ivec b; memcpy(&b, &x, sizeof b); return b; }
INLINE vec floats(ivec b) { vec x; memcpy(&x, &b, sizeof x); return x; }
INLINE vec all(float x) { return x - vec{}; }
INLINE vec load(const float* p) { return *reinterpret_cast<const stored_vec*>(p); }
INLINE void store(float* p, vec x) { *reinterpret_cast<stored_vec*>(p) = x; }
INLINE ivec widened(const uint8_t* p) {
  return CHOOSE(ivec(_mm512_maskz_cvtepu8_epi32(-1, _mm_loadu_si128((const __m128i*)p))),
                ivec(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))),
                __builtin_convertvector(*reinterpret_cast<const byte_vec*>(p), ivec));
}
INLINE void narrowed(uint8_t* p, ivec x) {  // numbers from 0 to 255
  CHOOSE(_mm512_mask_cvtepi32_storeu_epi8(p, -1, __m512i(x)),
         const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(__m256i(x)), _mm256_extracti128_si256(__m256i(x), 1));
         _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(half, half)),
         *reinterpret_cast<byte_vec*>(p) = __builtin_convertvector(x, byte_vec));
}
INLINE vec numbers(ivec x) {
  return CHOOSE(__builtin_convertvector(x, vec), vec(_mm256_cvtepi32_ps(__m256i(x))), __builtin_convertvector(x, vec));
}
INLINE ivec integers(vec x) {  // rounds towards zero
  return CHOOSE(__builtin_convertvector(x, ivec), ivec(_mm256_cvttps_epi32(__m256(x))), __builtin_convertvector(x, ivec));
}
INLINE vec keep(ivec mask, vec x) { return floats(mask & bits(x)); }
INLINE vec relu(vec x) { return x < 0 ? vec{} : x; }  // keeps NaN
// The largest, with its index, 0 to 3, in at; or, KNOWN, the one that at says. Of equal numbers the first wins, and NaN wins
// over all, as in PyTorch.
template <bool KNOWN>
INLINE vec maximum(vec a, vec b, vec c, vec d, ivec& at) {
  if (KNOWN) return at == 0 ? a : at == 1 ? b : at == 2 ? c : d;
  at = ivec{};
  const vec rest[] = {b, c, d};
  UNROLL for (int k = 0; k < 3; k++) {
    const ivec won = (rest[k] > a) | (rest[k] != rest[k]);
    a = won ? rest[k] : a;
    at = won ? (ivec{} + k + 1) : at;
  }
  return a;
}
INLINE vec permuted(vec x, ivec at) {
#ifdef __aarch64__
  return vec(vqtbl1q_u8(uint8x16_t(x), uint8x16_t(at * 0x04040404 + 0x03020100)));  // four bytes a number
#else
  [[maybe_unused]] vec y = {};
  for (int k = 0; k < LANES; k++) y[k] = x[at[k] % LANES];
  return CHOOSE(vec(_mm512_maskz_permutexvar_ps(-1, __m512i(at), __m512(x))),
                vec(_mm256_permutevar8x32_ps(__m256(x), __m256i(at))), y);
#endif
}
// repeated: four numbers in each group of four lanes. chosen: within each group, the numbers at the indices at, 0 to 3.
INLINE vec repeated(const float* p) {
  return CHOOSE(vec(_mm512_maskz_broadcast_f32x4(-1, _mm_loadu_ps(p))), vec(_mm256_broadcast_ps((const __m128*)p)), load(p));
}
INLINE vec chosen(vec x, ivec at) {
  return CHOOSE(vec(_mm512_maskz_permutevar_ps(-1, __m512(x), __m512i(at))), vec(_mm256_permutevar_ps(__m256(x), __m256i(at))),
                permuted(x, at));
}
INLINE double sum(vec x) {
  double s = 0;
  for (int k = 0; k < LANES; k++) s += x[k];
  return s;
}

// The functions below have relative errors below 1e-6 and keep NaN. Instructions of AVX-512 and AVX2 halve their running time.
INLINE vec at_least(vec x, float limit) {
  return CHOOSE(vec(_mm512_max_ps(__m512(all(limit)), __m512(x))), vec(_mm256_max_ps(__m256(all(limit)), __m256(x))),
                x < limit ? all(limit) : x);
}
INLINE vec at_most(vec x, float limit) {
  return CHOOSE(vec(_mm512_min_ps(__m512(all(limit)), __m512(x))), vec(_mm256_min_ps(__m256(all(limit)), __m256(x))),
                x > limit ? all(limit) : x);
}
INLINE vec times_power_of_two(vec x, vec n) {  // n is a whole number from -126 to 127
  [[maybe_unused]] const vec power = floats((integers(n) + 127) << 23);
  return CHOOSE(vec(_mm512_scalef_ps(__m512(x), __m512(n))), x * power, x * power);
}
INLINE vec reciprocal(vec x) {  // an estimate and one Newton step
  const vec y = CHOOSE(vec(_mm512_maskz_rcp14_ps(-1, __m512(x))), vec(_mm256_rcp_ps(__m256(x))), 1.0f / x);
  return LANES == 4 ? y : y * (2.0f - x * y);
}
INLINE vec exponential(vec x) {  // for |x| <= 87
  const vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
  const vec r = x - n * 0.693147180560f;
  vec p = all(1.9875691e-4f);
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665795e-2f;
  p = p * r + 1.6666666e-1f;
  p = p * r + 0.5f;
  return times_power_of_two(p * r * r + r + 1.0f, n);
}
INLINE vec sigmoid(vec x) { return reciprocal(1.0f + exponential(-at_most(at_least(x, -87.0f), 87.0f))); }
INLINE vec hyperbolic_tangent(vec x) {  // a quotient of polynomials; beyond 7.9 it is 1 to within 3e-7
  x = at_most(at_least(x, -7.9f), 7.9f);
  const vec square = x * x;
  vec p = all(-2.76076847742355e-16f);
  p = p * square + 2.00018790482477e-13f;
  p = p * square - 8.60467152213735e-11f;
  p = p * square + 5.12229709037114e-08f;
  p = p * square + 1.48572235717979e-05f;
  p = p * square + 6.37261928875436e-04f;
  p = p * square + 4.89352455891786e-03f;
  vec q = all(1.19825839466702e-06f);
  q = q * square + 1.18534705686654e-04f;
  q = q * square + 2.26843463243900e-03f;
  q = q * square + 4.89352518554385e-03f;
  return x * p * reciprocal(q);
}
INLINE vec gate(vec x) { return 0.5f + 0.5f * hyperbolic_tangent(0.5f * x); }  // sigmoid with an absolute error of 1e-7

// Sums parts [n, size] over n, from first to last.
void total(const std::vector<double>& parts, len n, len size, double* result) {
  std::memset(result, 0, size * sizeof(double));
  for (len b = 0; b < n; b++)
    for (len k = 0; k < size; k++) result[k] += parts[b * size + k];
}

// Size of the block of sums that add_products keeps in registers.
constexpr int ROWS = REGISTERS == 32 ? 4 : 2, COLUMNS = 6;

// Adds to sums [rows, columns, LANES] the products of each row of a [rows, width] with each row of z [columns, width], lane by
// lane. rows, columns and width are multiples of ROWS, COLUMNS and LANES. If a is z, the sums are symmetric, and blocks that
// lie entirely below the diagonal are left out.
INLINE void add_products(const float* a, int rows, const float* z, int columns, int width, float* sums) {
  for (int r = 0; r < rows; r += ROWS)
    for (int k = a == z ? r / COLUMNS * COLUMNS : 0; k < columns; k += COLUMNS) {
      vec s[ROWS][COLUMNS];
      UNROLL for (int p = 0; p < ROWS; p++)
        UNROLL for (int q = 0; q < COLUMNS; q++) s[p][q] = load(sums + ((r + p) * columns + k + q) * LANES);
      for (int at = 0; at < width; at += LANES) {
        vec left[ROWS];
        UNROLL for (int p = 0; p < ROWS; p++) left[p] = load(a + (r + p) * width + at);
        UNROLL for (int q = 0; q < COLUMNS; q++) {
          const vec right = load(z + (k + q) * width + at);
          UNROLL for (int p = 0; p < ROWS; p++) s[p][q] += left[p] * right;
        }
      }
      UNROLL for (int p = 0; p < ROWS; p++)
        UNROLL for (int q = 0; q < COLUMNS; q++) store(sums + ((r + p) * columns + k + q) * LANES, s[p][q]);
    }
}

}  // namespace
