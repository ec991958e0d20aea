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

#include "cpu_vectors.h"

namespace {

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
