// The inner loops over one row of head_dim numbers, compiled once per instruction set and chosen at run time.
// T is the stored type, A the type sums are made in.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "lighthouse/view.h"

namespace lighthouse::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
using AccumulatorOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Plain functions on plain pointers: nothing of one instruction set can leak into code that runs on another.
template <class T, class A = AccumulatorOf<T>>
struct RowFunctions {
  float (*norm)(const T* row, int64_t n);                                             // ||row||_2
  void (*add_rows)(A* sum, const T* rows, int64_t stride, int64_t count, int64_t n);  // sum += each row
  void (*add)(A* sum, const A* other, int64_t n);                                     // sum += other
  void (*store_quotient)(T* row, const A* sum, A divisor, int64_t n);                 // row = sum / divisor
  void (*add_quotient)(A* out, const A* base, const T* row, A divisor, int64_t n);    // out = base + row / divisor
  void (*store_sum)(T* out, const A* base, const T* row, int64_t n);                  // out = base + row
};

struct RowTable {
  const char* instruction_set;
  RowFunctions<float> f32;
  RowFunctions<double> f64;
  RowFunctions<BFloat16> bf16;
  RowFunctions<Half> f16;

  template <class T>
  const RowFunctions<T>& of() const {
    if constexpr (std::is_same_v<T, float>) return f32;
    if constexpr (std::is_same_v<T, double>) return f64;
    if constexpr (std::is_same_v<T, BFloat16>) return bf16;
    if constexpr (std::is_same_v<T, Half>) return f16;
  }
};

extern const RowTable kRowsBase;
#if defined(LIGHTHOUSE_X86)
extern const RowTable kRowsAvx2;
extern const RowTable kRowsAvx512;
#endif

// All that this CPU can run, slowest first; the last is the one in use. They give the same bits.
std::vector<const RowTable*> available_rows();
const RowTable& rows();

// Below this many numbers a second thread costs more than it brings.
inline constexpr int64_t kNumbersPerPiece = 64 * 1024;

// Calls function with a null pointer of the element type: the one place where a dtype becomes a type.
template <class Function>
void visit(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float32:
      return function(static_cast<float*>(nullptr));
    case DType::float64:
      return function(static_cast<double*>(nullptr));
    case DType::bfloat16:
      return function(static_cast<BFloat16*>(nullptr));
    case DType::float16:
      return function(static_cast<Half*>(nullptr));
  }
}

}  // namespace lighthouse::cpu
