// What every verb asks of its views, on every device.
#pragma once

#include "core/require.h"
#include "lighthouse/plan.h"
#include "lighthouse/selection.h"
#include "lighthouse/view.h"

namespace lighthouse {

inline void check_view(const char* argument, const ConstView& view, const ConstView& like) {
  require(view.dtype == like.dtype, argument, " has dtype ", name(view.dtype), ", the first tensor ", name(like.dtype),
          ": all must share one");
  require(view.head_dim() == like.head_dim(), argument, " has head_dim ", view.head_dim(), ", the first tensor ",
          like.head_dim(), ": all must share one");
  for (int64_t size : view.sizes) require(size >= 1, argument, " is empty: every size must be at least 1");
  require(view.strides[3] == 1 || view.head_dim() == 1, argument, " has last stride ", view.strides[3],
          ": 1 is needed; copy it first");
  require(view.data != nullptr, argument, " has no data");
}

inline void check_sizes(const char* argument, const ConstView& view, int64_t rows, int64_t heads, int64_t length) {
  require(view.batch() == rows && view.heads() == heads && view.tokens() == length, argument, " has sizes [",
          view.batch(), ", ", view.heads(), ", ", view.tokens(), ", ", view.head_dim(), "]: [", rows, ", ", heads, ", ",
          length, ", head_dim] is needed");
}

inline void check_heads(int64_t query_heads, int64_t kv_heads) {
  require(kv_heads >= 1 && query_heads % kv_heads == 0, "key has ", kv_heads, " heads, query ", query_heads,
          ": the query heads must be a multiple of the key heads");
}

// A tensor of the whole sequence and its part of the sub-sequence, either being the other's source.
inline void check_pair(const char* argument, const ConstView& whole, const char* sub_argument, const ConstView& sub,
                       const ConstView& like, const Layout& layout, const ConstSelection& selection) {
  check_view(argument, whole, like);
  check_view(sub_argument, sub, like);
  check_heads(whole.heads(), selection.kv_heads);
  check_sizes(argument, whole, layout.rows, whole.heads(), layout.tokens);
  check_sizes(sub_argument, sub, layout.rows, whole.heads(), layout.entries);
  require(selection.mask != nullptr && selection.prefix != nullptr, "selection has no data");
}

}  // namespace lighthouse
