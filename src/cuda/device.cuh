// What the kernels share: columns of 16 bytes, where a block stands, and the error when a launch fails.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/require.h"
#include "lighthouse/cuda.h"
#include "rules/strata.h"

namespace lighthouse::cuda {

inline void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  std::string message = std::string(what) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) {
    message += "; build lighthouse for this GPU: set CMake's LIGHTHOUSE_CUDA_ARCHITECTURES";
  } else if (error == cudaErrorInsufficientDriver || error == cudaErrorUnsupportedPtxVersion) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    message += "; built with CUDA " + std::to_string(CUDART_VERSION / 1000) + ", driver for CUDA " +
               std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) + ": update the driver";
  }
  throw std::runtime_error(message);
}

inline void require_alike(const Sequences& sequences) {
  require(sequences.alike(), "documents of their own lengths in one row are computed on the CPU alone so far");
}

// A part of a row that one thread moves: kWidth numbers of T, in one access.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Column {
  T numbers[kWidth];
};

template <class T, int kWidth>
__device__ inline Column<T, kWidth> no_column() {
  Column<T, kWidth> column;
  memset(&column, 0, sizeof column);
  return column;
}

// Sums of columns are made in float32.
template <int kWidth>
struct Sum {
  float numbers[kWidth] = {};
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

// Two numbers of 16 bits in a word; the first is the lower half.
template <class T>
__device__ inline float2 widen_word(uint32_t word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
  } else {
    __half2 pair;
    memcpy(&pair, &word, sizeof pair);
    return __half22float2(pair);
  }
}

template <class T>
__device__ inline uint32_t narrow_word(float first, float second) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    memcpy(&word, &pair, sizeof word);
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    memcpy(&word, &pair, sizeof word);
  }
  return word;
}

template <class T>
__device__ inline T narrow(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// Numbers of 16 bits go through registers in pairs: one by one they would take a register each.
template <class T, int kWidth>
inline constexpr bool kInPairs = sizeof(T) == 2 && kWidth % 2 == 0;

template <class T, int kWidth>
__device__ inline Sum<kWidth> widened(const Column<T, kWidth>& column) {
  Sum<kWidth> sum;
  if constexpr (kInPairs<T, kWidth>) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 2) {
      uint32_t word;
      memcpy(&word, &column.numbers[i], sizeof word);
      const float2 pair = widen_word<T>(word);
      sum.numbers[i] = pair.x;
      sum.numbers[i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum.numbers[i] = widen(column.numbers[i]);
  }
  return sum;
}

template <class T, int kWidth>
__device__ inline Column<T, kWidth> narrowed(const Sum<kWidth>& sum) {
  Column<T, kWidth> column;
  if constexpr (kInPairs<T, kWidth>) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 2) {
      const uint32_t word = narrow_word<T>(sum.numbers[i], sum.numbers[i + 1]);
      memcpy(&column.numbers[i], &word, sizeof word);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) column.numbers[i] = narrow<T>(sum.numbers[i]);
  }
  return column;
}

template <int kWidth>
__device__ inline void add(Sum<kWidth>& sum, const Sum<kWidth>& other) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum.numbers[i] += other.numbers[i];
}

// Division by a window's length, or by one.
struct Divisor {
  float value = 1.0f;
  float reciprocal = 1.0f;  // 0 unless multiplying by it gives the same bits
};

inline Divisor divisor_of(int64_t length) {
  const bool exact = (length & (length - 1)) == 0;
  return {static_cast<float>(length), exact ? 1.0f / static_cast<float>(length) : 0.0f};
}

template <int kWidth>
__device__ inline Sum<kWidth> operator/(Sum<kWidth> sum, const Divisor& divisor) {
  if (divisor.reciprocal != 0.0f) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum.numbers[i] *= divisor.reciprocal;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum.numbers[i] = __fdiv_rn(sum.numbers[i], divisor.value);
  }
  return sum;
}

template <class T, int kWidth>
__device__ inline Column<T, kWidth> load(const T* pointer) {
  if constexpr (sizeof(T) * kWidth == 16) {
    // By the read-only path, so that loads can be made ahead of stores.
    const int4 raw = __ldg(reinterpret_cast<const int4*>(pointer));
    Column<T, kWidth> column;
    memcpy(&column, &raw, sizeof raw);
    return column;
  } else {
    return *reinterpret_cast<const Column<T, kWidth>*>(pointer);
  }
}

template <class T, int kWidth>
__device__ inline void store(T* pointer, const Column<T, kWidth>& column) {
  if constexpr (sizeof(T) * kWidth == 16) {
    // Known to be global memory: what is held of shared memory need not be read again after it.
    int4 raw;
    memcpy(&raw, &column, sizeof raw);
    __stcg(reinterpret_cast<int4*>(pointer), raw);
  } else {
    *reinterpret_cast<Column<T, kWidth>*>(pointer) = column;
  }
}

// Blocks over [rows, pieces, heads]. Heads are the fastest, so that blocks that run together share stretches of
// [batch, tokens, heads, head_dim]. Launches cannot have more blocks than this along the slower two: kernels go on in
// steps of the grid.
inline constexpr int64_t kMostBlocks = 65535;

inline dim3 grid_over(int64_t heads, int64_t pieces, int64_t rows) {
  require(heads <= 0x7FFFFFFF, heads, " heads: more than one launch can take");
  return dim3(static_cast<unsigned>(heads), static_cast<unsigned>(std::min(pieces, kMostBlocks)),
              static_cast<unsigned>(std::min(rows, kMostBlocks)));
}

// Calls function with a null pointer of the element type; the CUDA side's one place where a dtype becomes a type.
template <class Function>
void visit(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float32:
      return function(static_cast<float*>(nullptr));
    case DType::bfloat16:
      return function(static_cast<__nv_bfloat16*>(nullptr));
    case DType::float16:
      return function(static_cast<__half*>(nullptr));
    case DType::float64:
      break;
  }
  require(false, "dtype float64 on a CUDA device: float32, bfloat16 or float16 is needed; float64 runs on the CPU");
}

// Whether every row of the view can be read in accesses of 16 bytes.
inline bool is_aligned(const ConstView& view) {
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0) return false;
  for (size_t i = 0; i < 3; ++i) {
    if (view.sizes[i] > 1 && view.strides[i] * size_of(view.dtype) % 16 != 0) return false;
  }
  return true;
}

// Calls function with the element type and the numbers per column that all the views' rows can be read in.
template <class Function>
void with_column(std::span<const ConstView> views, const Function& function) {
  const ConstView& first = views.front();
  const int64_t head_dim = first.head_dim();
  require(head_dim % kHeadDimStep == 0 && kHeadDimStep <= head_dim && head_dim <= kMaxHeadDim, "head_dim=", head_dim,
          ": on a CUDA device a multiple of ", kHeadDimStep, " up to ", kMaxHeadDim, " is needed");
  const bool aligned = std::all_of(views.begin(), views.end(), is_aligned);
  visit(first.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (aligned) {
      function(type, std::integral_constant<int, 16 / sizeof(T)>());
    } else {
      function(type, std::integral_constant<int, 1>());
    }
  });
}

}  // namespace lighthouse::cuda
