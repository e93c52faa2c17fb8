// Where a row of a view begins.
#pragma once

#include <type_traits>

#include "lighthouse/view.h"
#include "rules/platform.h"

namespace lighthouse {

// The first number of one token of one head.
template <class T, class Pointer>
LIGHTHOUSE_HOST_DEVICE inline auto* row_at(const BasicView<Pointer>& view, int64_t batch, int64_t head, int64_t token) {
  using Number = std::conditional_t<std::is_same_v<Pointer, void*>, T, const T>;
  return static_cast<Number*>(view.data) + batch * view.strides[0] + head * view.strides[1] + token * view.strides[2];
}

}  // namespace lighthouse
