// Names and sizes of the element types. A new one is added here, in both devices' `visit` and to the CPU's rows.

#include "lighthouse/view.h"

#include <cstddef>

namespace lighthouse {

const char* name(DType dtype) {
  static constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};
  return kNames[static_cast<size_t>(dtype)];
}

int64_t size_of(DType dtype) {
  static constexpr int64_t kSizes[] = {4, 8, 2, 2};
  return kSizes[static_cast<size_t>(dtype)];
}

std::array<int64_t, 4> contiguous_strides(const std::array<int64_t, 4>& sizes) {
  return {sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1};
}

}  // namespace lighthouse
