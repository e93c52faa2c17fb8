// What every verb asks of its arguments, the same on every device; and, for those that move rows between tokens and
// entries, the pairs of tensors that they move.
#pragma once

#include <array>

#include "core/require.h"
#include "lighthouse/verbs.h"

namespace lighthouse {

// Throw std::invalid_argument naming argument, rule and value. Nothing that a view points to is looked at.
void check(const ScoreArgs& args);
void check(const SelectArgs& args);
void check(const GatherArgs& args);
void check(const GatherBackwardArgs& args);
void check(const ScatterArgs& args);
void check(const ScatterBackwardArgs& args);

// Their parts. `like`: whose dtype and head_dim the view must have.
void check_view(const char* argument, const ConstView& view, const ConstView& like);
void check_sizes(const char* argument, const ConstView& view, int64_t rows, int64_t heads, int64_t length);
void check_heads(int64_t query_heads, int64_t kv_heads);

struct Pair {
  ConstView source;
  View target;
  ConstView added = {};  // like the target, added to what is written there; no data: nothing
};

inline std::array<Pair, 3> pairs_of(const GatherArgs& args) {
  return {{{args.query, args.query_sub}, {args.key, args.key_sub}, {args.value, args.value_sub}}};
}
inline std::array<Pair, 3> pairs_of(const GatherBackwardArgs& args) {
  return {{{args.grad_query_sub, args.grad_query, args.added_query},
           {args.grad_key_sub, args.grad_key, args.added_key},
           {args.grad_value_sub, args.grad_value, args.added_value}}};
}
inline std::array<Pair, 1> pairs_of(const ScatterArgs& args) { return {{{args.output_sub, args.output, args.added}}}; }
inline std::array<Pair, 1> pairs_of(const ScatterBackwardArgs& args) {
  return {{{args.grad_output, args.grad_output_sub}}};
}

}  // namespace lighthouse
