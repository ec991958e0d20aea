// The instruction sets of cpu_kernels.cpp: 16-bit numbers, and vectors of them.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

enum Type { kBFloat16 = 0, kFloat16 = 1 };

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00)  // infinity, NaN
    return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // The exponent is moved by a product, which also makes subnormal halves normal.
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * from_bits(0x77800000)));  // 2^112
}

uint16_t float_to_half(float value) {
  const uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (magnitude < 0x38800000)                         // subnormal: units of 2^-24, rounded by
    return sign | uint16_t(to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f));  // the addition
  return sign | uint16_t((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

float to_float(uint16_t value, Type type) {
  return type == kBFloat16 ? from_bits(uint32_t(value) << 16) : half_to_float(value);
}

uint16_t round_to(float value, Type type) {
  if (type == kFloat16) return float_to_half(value);
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // NaN
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);                 // nearest, ties to even
}

// Where the values of two groups go: for a byte of the mask, the source of each of 16 bytes, for
// pshufb and tbl; 0x80 gives a zero.
struct Shuffles {
  alignas(64) uint8_t of[256][16];
  constexpr Shuffles() : of() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int weight = 0; weight < 8; ++weight) {
        const bool kept = mask >> weight & 1;
        of[mask][2 * weight] = uint8_t(kept ? next++ : 0x80);
        of[mask][2 * weight + 1] = uint8_t(kept ? next++ : 0x80);
      }
    }
  }
};
[[maybe_unused]] constexpr Shuffles kShuffles;

// ---------------------------------------------------------------- instruction sets
//
// Each section has: Raw, kStep weights of 16 bits; expand and load, which make it; store; Wide<type>,
// the same as numbers; Sums, partial sums of a row; add, which multiplies and adds; total. kSplit:
// whether a step's inputs are stored as its even ones, then its odd ones. kDot: whether bfloat16
// inputs are read as they are.

#if defined(__AVX512VBMI2__)

constexpr int kStep = 32;
constexpr bool kSplit = true;
using Raw = __m512i;
using Sums = __m512;

inline Raw expand(const uint16_t* values, const uint8_t* mask) {
  uint32_t bits;
  std::memcpy(&bits, mask, 4);
  const __m256i sixteen = _mm256_loadu_si256((const __m256i*)values);
  return _mm512_maskz_expand_epi16(bits, _mm512_castsi256_si512(sixteen));
}
inline Raw load(const uint16_t* weights) { return _mm512_loadu_si512(weights); }
inline void store(uint16_t* out, Raw raw) { _mm512_storeu_si512(out, raw); }
inline Sums zero() { return _mm512_setzero_ps(); }
inline Sums plus(Sums a, Sums b) { return _mm512_add_ps(a, b); }
inline float total(Sums sums) { return _mm512_reduce_add_ps(sums); }

struct Floats {
  __m512 first, second;
};
template <Type type>
inline Floats widen(Raw raw) {
  if constexpr (type == kFloat16)
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(raw)),
            _mm512_cvtph_ps(_mm512_extracti64x4_epi64(raw, 1))};
  // The even weights, and the odd ones: bfloat16 is the upper half of a float.
  return {_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(int(0xffff0000))))};
}
inline Sums add(Sums sums, Floats w, const float* x) {
  sums = _mm512_fmadd_ps(w.first, _mm512_loadu_ps(x), sums);
  return _mm512_fmadd_ps(w.second, _mm512_loadu_ps(x + 16), sums);
}

#if defined(__AVX512BF16__)
constexpr bool kDot = true;
inline Sums add(Sums sums, Raw w, const uint16_t* x) {
  return _mm512_dpbf16_ps(sums, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
}
#else
constexpr bool kDot = false;
#endif

#elif defined(__AVX2__)

constexpr int kStep = 16;
constexpr bool kSplit = true, kDot = false;
using Raw = __m256i;
using Sums = __m256;

inline Raw expand(const uint16_t* values, const uint8_t* mask) {
  // 8 values are those of 4 groups: the first 4 go to the lower lane, the last 4 to the upper one.
  const __m128i eight = _mm_loadu_si128((const __m128i*)values);
  const __m256i lanes = _mm256_permute4x64_epi64(_mm256_castsi128_si256(eight), 0x10);
  const __m128i low = _mm_load_si128((const __m128i*)kShuffles.of[mask[0]]);
  const __m128i high = _mm_load_si128((const __m128i*)kShuffles.of[mask[1]]);
  return _mm256_shuffle_epi8(lanes, _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
}
inline Raw load(const uint16_t* weights) { return _mm256_loadu_si256((const __m256i*)weights); }
inline void store(uint16_t* out, Raw raw) { _mm256_storeu_si256((__m256i*)out, raw); }
inline Sums zero() { return _mm256_setzero_ps(); }
inline Sums plus(Sums a, Sums b) { return _mm256_add_ps(a, b); }
inline float total(Sums sums) {
  float parts[8];
  _mm256_storeu_ps(parts, sums);
  return ((parts[0] + parts[4]) + (parts[1] + parts[5])) +
         ((parts[2] + parts[6]) + (parts[3] + parts[7]));
}

struct Floats {
  __m256 first, second;
};
template <Type type>
inline Floats widen(Raw raw) {
  if constexpr (type == kFloat16)
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(raw)),
            _mm256_cvtph_ps(_mm256_extracti128_si256(raw, 1))};
  return {_mm256_castsi256_ps(_mm256_slli_epi32(raw, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(int(0xffff0000))))};
}
inline Sums add(Sums sums, Floats w, const float* x) {
  sums = _mm256_fmadd_ps(w.first, _mm256_loadu_ps(x), sums);
  return _mm256_fmadd_ps(w.second, _mm256_loadu_ps(x + 8), sums);
}

#elif defined(__ARM_NEON)

constexpr int kStep = 8;
constexpr bool kSplit = false, kDot = false;
using Raw = uint16x8_t;
using Sums = float32x4_t;

inline Raw expand(const uint16_t* values, const uint8_t* mask) {
  const uint8x16_t four = vreinterpretq_u8_u16(vcombine_u16(vld1_u16(values), vdup_n_u16(0)));
  return vreinterpretq_u16_u8(vqtbl1q_u8(four, vld1q_u8(kShuffles.of[*mask])));
}
inline Raw load(const uint16_t* weights) { return vld1q_u16(weights); }
inline void store(uint16_t* out, Raw raw) { vst1q_u16(out, raw); }
inline Sums zero() { return vdupq_n_f32(0); }
inline Sums plus(Sums a, Sums b) { return vaddq_f32(a, b); }
inline float total(Sums sums) { return vaddvq_f32(sums); }

struct Floats {
  float32x4_t first, second;
};
template <Type type>
inline Floats widen(Raw raw) {
  if constexpr (type == kFloat16)
    return {vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(raw))),
            vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(raw)))};
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(raw), 16)),
          vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(raw), 16))};
}
inline Sums add(Sums sums, Floats w, const float* x) {
  sums = vfmaq_f32(sums, w.first, vld1q_f32(x));
  return vfmaq_f32(sums, w.second, vld1q_f32(x + 4));
}

#else  // any CPU

constexpr int kStep = 8;
constexpr bool kSplit = false, kDot = false;
struct Raw {
  uint16_t of[8];
};
struct Sums {
  float of[8];
};

inline Raw expand(const uint16_t* values, const uint8_t* mask) {
  Raw raw;
  for (int i = 0, next = 0; i < 8; ++i) raw.of[i] = (*mask >> i & 1) ? values[next++] : 0;
  return raw;
}
inline Raw load(const uint16_t* weights) {
  Raw raw;
  std::memcpy(raw.of, weights, sizeof raw.of);
  return raw;
}
inline void store(uint16_t* out, Raw raw) { std::memcpy(out, raw.of, sizeof raw.of); }
inline Sums zero() { return Sums{}; }
inline Sums plus(Sums a, Sums b) {
  for (int i = 0; i < 8; ++i) a.of[i] += b.of[i];
  return a;
}
inline float total(Sums sums) {
  float sum = 0;
  for (float part : sums.of) sum += part;
  return sum;
}

struct Floats {
  float of[8];
};
template <Type type>
inline Floats widen(Raw raw) {
  Floats wide;
  for (int i = 0; i < 8; ++i) wide.of[i] = to_float(raw.of[i], type);
  return wide;
}
inline Sums add(Sums sums, Floats w, const float* x) {
  for (int i = 0; i < 8; ++i) sums.of[i] += w.of[i] * x[i];
  return sums;
}

#endif

}  // namespace
