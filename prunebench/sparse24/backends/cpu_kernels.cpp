// Products by a packed 2:4 matrix, and by a dense 16-bit matrix, for 1 to 8 tokens on a CPU.
//
// Compiled by cpu_build.py, once per instruction set, with the flags that select a section below.
//
// A product by few tokens is bound by the bytes of the weights. The packed form has, per 32 weights,
// 16 values of 16 bits and 32 bits that say which weights they are: 36 bytes instead of 64. A step
// expands the values of kStep weights to their places, in registers, and multiplies them by the
// inputs of all tokens, with sums in float32. Rows are split over threads, and a row is summed by
// one thread in one order: the number of threads does not change the result.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

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

// ---------------------------------------------------------------- rows

// Bytes of values that are fetched ahead: a step takes longer than its share of the latency of memory.
constexpr ptrdiff_t kAhead = 4096;

inline void fetch(const void* from, ptrdiff_t ahead) {
#if defined(__GNUC__)
  __builtin_prefetch((const char*)from + ahead);  // never faults, also behind the end
#else
  (void)from, (void)ahead;
#endif
}

// A row of weights, step by step; the last step of a row whose width kStep does not divide reads a
// copy that is filled up with zeros.
struct PackedRow {
  const uint16_t* values;
  const uint8_t* mask;
  Raw step(ptrdiff_t at) const {
    fetch(values + at / 2, kAhead);
    fetch(mask + at / 8, kAhead / 4);
    return expand(values + at / 2, mask + at / 8);
  }
  Raw last(ptrdiff_t at, ptrdiff_t width) const {
    uint16_t some[kStep / 2] = {};
    uint8_t bits[kStep / 8] = {};
    std::memcpy(some, values + at / 2, size_t(width - at));  // (width - at) / 2 values of 2 bytes
    std::memcpy(bits, mask + at / 8, size_t(width - at + 7) / 8);
    return expand(some, bits);
  }
};

struct DenseRow {
  const uint16_t* weights;
  Raw step(ptrdiff_t at) const {
    fetch(weights + at, kAhead);
    return load(weights + at);
  }
  Raw last(ptrdiff_t at, ptrdiff_t width) const {
    uint16_t some[kStep] = {};
    std::memcpy(some, weights + at, size_t(width - at) * 2);
    return load(some);
  }
};

// A matrix [rows, width]; for a dense one `values` are all weights, and there is no mask.
struct Matrix {
  const uint16_t* values;
  const uint8_t* mask;
  ptrdiff_t rows, width, mask_stride;

  template <class Row>
  Row row(ptrdiff_t n) const;
};
template <>
inline PackedRow Matrix::row<PackedRow>(ptrdiff_t n) const {
  return {values + n * (width / 2), mask + n * mask_stride};
}
template <>
inline DenseRow Matrix::row<DenseRow>(ptrdiff_t n) const {
  return {values + n * width};
}

template <Type type>
constexpr bool kPlainInputs = kDot && type == kBFloat16;

// Weights as `add` takes them.
template <Type type>
inline auto weights_of(Raw raw) {
  if constexpr (kPlainInputs<type>)
    return raw;
  else
    return widen<type>(raw);
}

// The products of one row with the inputs of all tokens; `stride` is between tokens of x.
template <class Row, Type type, int tokens, class Input>
inline void multiply_row(const Row& row, ptrdiff_t width, const Input* x, ptrdiff_t stride,
                         float* out) {
  // Several sums for few tokens: an addition waits for the one before it.
  constexpr int chains = tokens == 1 ? 8 : tokens == 2 ? 4 : tokens <= 4 ? 2 : 1;
  Sums sums[tokens][chains];
  for (auto& token : sums)
    for (auto& sum : token) sum = zero();
  ptrdiff_t at = 0;
  for (; at + chains * kStep <= width; at += chains * kStep)
    for (int c = 0; c < chains; ++c) {
      const auto w = weights_of<type>(row.step(at + c * kStep));
      for (int t = 0; t < tokens; ++t)
        sums[t][c] = add(sums[t][c], w, x + t * stride + at + c * kStep);
    }
  for (; at < width; at += kStep) {
    const auto w = weights_of<type>(at + kStep <= width ? row.step(at) : row.last(at, width));
    for (int t = 0; t < tokens; ++t) sums[t][0] = add(sums[t][0], w, x + t * stride + at);
  }
  for (int t = 0; t < tokens; ++t) {
    for (int c = 1; c < chains; ++c) sums[t][0] = plus(sums[t][0], sums[t][c]);
    out[t] = total(sums[t][0]);
  }
}

template <class Row, Type type, int tokens, class Input>
void multiply_rows(const Matrix& matrix, const Input* x, ptrdiff_t stride, const uint16_t* bias,
                   uint16_t* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (ptrdiff_t n = 0; n < matrix.rows; ++n) {
    float sums[tokens];
    multiply_row<Row, type, tokens>(matrix.row<Row>(n), matrix.width, x, stride, sums);
    for (int t = 0; t < tokens; ++t) {
      const float sum = bias ? sums[t] + to_float(bias[n], type) : sums[t];
      out[t * matrix.rows + n] = round_to(sum, type);
    }
  }
}

template <class Row, Type type, class Input>
void multiply_tokens(const Matrix& matrix, const Input* x, ptrdiff_t stride, int tokens,
                     const uint16_t* bias, uint16_t* out, int threads) {
  switch (tokens) {
#define CASE(count) \
  case count:       \
    return multiply_rows<Row, type, count>(matrix, x, stride, bias, out, threads);
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
  }
}

// Inputs [tokens, width] as `add` reads them, filled up with zeros to whole steps.
template <class Row, Type type>
void multiply_as(const Matrix& matrix, const uint16_t* x, int tokens, const uint16_t* bias,
                 uint16_t* out, int threads) {
  const ptrdiff_t width = matrix.width, padded = (width + kStep - 1) / kStep * kStep;
  if constexpr (kPlainInputs<type>) {
    if (padded == width)
      return multiply_tokens<Row, type>(matrix, x, width, tokens, bias, out, threads);
    std::vector<uint16_t> filled(size_t(tokens) * padded);
    for (int t = 0; t < tokens; ++t)
      std::memcpy(&filled[t * padded], x + t * width, size_t(width) * 2);
    multiply_tokens<Row, type>(matrix, filled.data(), padded, tokens, bias, out, threads);
  } else {
    // float16 is widened in order, see `widen`
    constexpr bool split = kSplit && type == kBFloat16;
    std::vector<float> wide(size_t(tokens) * padded);
    for (int t = 0; t < tokens; ++t)
      for (ptrdiff_t k = 0; k < width; ++k) {
        const ptrdiff_t in = k % kStep;
        const ptrdiff_t place = split ? k - in + in / 2 + (in % 2 ? kStep / 2 : 0) : k;
        wide[t * padded + place] = to_float(x[t * width + k], type);
      }
    multiply_tokens<Row, type>(matrix, wide.data(), padded, tokens, bias, out, threads);
  }
}

template <class Row>
void multiply(const Matrix& matrix, int type, const uint16_t* x, int tokens, const uint16_t* bias,
              uint16_t* out, int threads) {
  if (type == kBFloat16)
    multiply_as<Row, kBFloat16>(matrix, x, tokens, bias, out, threads);
  else
    multiply_as<Row, kFloat16>(matrix, x, tokens, bias, out, threads);
}

}  // namespace

// ---------------------------------------------------------------- called by cpu.py

extern "C" {

struct Sparse24Matrix {
  const uint16_t* values;  // [rows, width / 2]: the kept weights
  const uint8_t* mask;     // [rows, mask_stride]: bit j of byte i is set if weight 8 i + j is kept
  int64_t rows, width, mask_stride;
  int32_t type;  // 0: bfloat16, 1: float16
};

// out [tokens, rows] = x [tokens, width] @ matrix.T + bias [rows], for 1 to 8 tokens; bias or null.
void sparse24_multiply(const Sparse24Matrix* m, const uint16_t* x, int tokens, const uint16_t* bias,
                       uint16_t* out, int threads) {
  const Matrix matrix{m->values, m->mask, ptrdiff_t(m->rows), ptrdiff_t(m->width),
                      ptrdiff_t(m->mask_stride)};
  multiply<PackedRow>(matrix, m->type, x, tokens, bias, out, threads);
}

// The same with all weights stored, [rows, width]: what the 16 bits alone buy.
void dense16_multiply(const Sparse24Matrix* m, const uint16_t* x, int tokens, const uint16_t* bias,
                      uint16_t* out, int threads) {
  const Matrix matrix{m->values, nullptr, ptrdiff_t(m->rows), ptrdiff_t(m->width), 0};
  multiply<DenseRow>(matrix, m->type, x, tokens, bias, out, threads);
}

// Writes all weights to out [rows, width].
void sparse24_unpack(const Sparse24Matrix* m, uint16_t* out, int threads) {
  const Matrix matrix{m->values, m->mask, ptrdiff_t(m->rows), ptrdiff_t(m->width),
                      ptrdiff_t(m->mask_stride)};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (ptrdiff_t n = 0; n < matrix.rows; ++n) {
    const PackedRow row = matrix.row<PackedRow>(n);
    uint16_t* to = out + n * matrix.width;
    ptrdiff_t at = 0;
    for (; at + kStep <= matrix.width; at += kStep) store(to + at, row.step(at));
    if (at < matrix.width) {
      uint16_t some[kStep];
      store(some, row.last(at, matrix.width));
      std::memcpy(to + at, some, size_t(matrix.width - at) * 2);
    }
  }
}

// Sums 64-bit words: the speed of reading memory, beside which products are to be seen.
uint64_t read_words(const uint64_t* words, int64_t count, int threads) {
  uint64_t sum = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += words[i];
  return sum;
}

int has_threads() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

}  // extern "C"
