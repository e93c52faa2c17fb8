// The row functions' text, included by one file per instruction set.
// Everything here is in an unnamed namespace and calls nothing of the standard library: a shared inline function
// compiled for AVX-512 could otherwise be the copy that the linker keeps for all.
// Sums run in an order of their own, the same for every instruction set: 16 lanes, then halves.

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "cpu/rows.h"

namespace lighthouse::cpu {
namespace {

constexpr int64_t kChunk = 64;  // numbers widened at a time
constexpr int64_t kLanes = 16;  // of a norm's sum of squares

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(BFloat16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

// Round to nearest even; NaN stays NaN.
inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded)};
}

inline float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) {  // infinity, NaN (made quiet, as the hardware does)
    const uint32_t quiet = magnitude > 0x7C00u ? 0x400000u : 0u;
    return bits_to_float(sign | 0x7F800000u | quiet | (magnitude & 0x3FFu) << 13);
  }
  if (magnitude < 0x400u) {  // zero, subnormal: a multiple of 2^-24, exact in float32
    const float scaled = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return bits_to_float(sign | float_to_bits(scaled));
  }
  return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
}

// Round to nearest even, subnormals included; NaN stays NaN.
inline Half to_half(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu))};
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // 65,520 and above
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the multiple of 2^-24 in the low bits
    const uint32_t shifted = float_to_bits(bits_to_float(magnitude) + 0.5f);
    return {static_cast<uint16_t>(sign | (shifted - 0x3F000000u))};
  }
  const uint32_t rounded = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  return {static_cast<uint16_t>(sign | rounded)};
}

// A row as numbers to calculate with: itself, or a widened copy in the buffer.
inline const float* widen(const float* row, float*, int64_t) { return row; }
inline const double* widen(const double* row, double*, int64_t) { return row; }

inline const float* widen(const BFloat16* __restrict row, float* __restrict buffer, int64_t n) {
  for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(row[i]);
  return buffer;
}

inline const float* widen(const Half* __restrict row, float* __restrict buffer, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i));
    _mm512_storeu_ps(buffer + i, _mm512_maskz_cvtph_ps(0xFFFF, packed));
  }
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i));
    _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(packed));
  }
#endif
  for (; i < n; ++i) buffer[i] = to_float(row[i]);
  return buffer;
}

inline void narrow(float* __restrict row, const float* __restrict values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = values[i];
}

inline void narrow(double* __restrict row, const double* __restrict values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = values[i];
}

inline void narrow(BFloat16* __restrict row, const float* __restrict values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = to_bfloat16(values[i]);
}

inline void narrow(Half* __restrict row, const float* __restrict values, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const __m256i packed = _mm512_maskz_cvtps_ph(0xFFFF, _mm512_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + i), packed);
  }
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i packed = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + i), packed);
  }
#endif
  for (; i < n; ++i) row[i] = to_half(values[i]);
}

inline int64_t chunk_length(int64_t start, int64_t n) { return n - start < kChunk ? n - start : kChunk; }

inline float square_root(float value) { return __builtin_sqrtf(value); }
inline double square_root(double value) { return __builtin_sqrt(value); }

template <int64_t half, class A>
void add_halves(A* lanes) {
  for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
}

template <class T, class A>
float norm(const T* row, int64_t n) {
  alignas(64) A buffer[kChunk];
  alignas(64) A lanes[kLanes] = {};
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t length = chunk_length(start, n);
    const A* values = widen(row + start, buffer, length);
    int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane] * values[i + lane];
    }
    for (int64_t lane = 0; i + lane < length; ++lane) lanes[lane] += values[i + lane] * values[i + lane];
  }
  add_halves<8>(lanes);
  add_halves<4>(lanes);
  add_halves<2>(lanes);
  add_halves<1>(lanes);
  return static_cast<float>(square_root(lanes[0]));
}

template <class A>
void add(A* __restrict sum, const A* __restrict other, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += other[i];
}

template <class T, class A>
void add_rows(A* sum, const T* rows, int64_t stride, int64_t count, int64_t n) {
  alignas(64) A buffer[kChunk];
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t length = chunk_length(start, n);
    for (int64_t r = 0; r < count; ++r) add(sum + start, widen(rows + r * stride + start, buffer, length), length);
  }
}

template <class T, class A>
void store_quotient(T* row, const A* __restrict sum, A divisor, int64_t n) {
  alignas(64) A buffer[kChunk];
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t length = chunk_length(start, n);
    for (int64_t i = 0; i < length; ++i) buffer[i] = sum[start + i] / divisor;
    narrow(row + start, buffer, length);
  }
}

template <class T, class A>
void add_quotient(A* __restrict out, const A* __restrict base, const T* row, A divisor, int64_t n) {
  alignas(64) A buffer[kChunk];
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t length = chunk_length(start, n);
    const A* values = widen(row + start, buffer, length);
    for (int64_t i = 0; i < length; ++i) out[start + i] = base[start + i] + values[i] / divisor;
  }
}

template <class T, class A>
void store_sum(T* out, const A* __restrict base, const T* row, int64_t n) {
  alignas(64) A widened[kChunk];
  alignas(64) A buffer[kChunk];
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t length = chunk_length(start, n);
    const A* values = widen(row + start, widened, length);
    for (int64_t i = 0; i < length; ++i) buffer[i] = base[start + i] + values[i];
    narrow(out + start, buffer, length);
  }
}

template <class T, class A>
constexpr RowFunctions<T, A> row_functions() {
  return {norm<T, A>, add_rows<T, A>, add<A>, store_quotient<T, A>, add_quotient<T, A>, store_sum<T, A>};
}

}  // namespace
}  // namespace lighthouse::cpu
