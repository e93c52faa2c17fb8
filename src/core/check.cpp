// The checks of the verbs' arguments. They look at sizes and pointers alone: what mask and prefix hold is checked where
// it comes from outside (cpu::check_selection).

#include "core/check.h"

namespace lighthouse {
namespace {

void check_arrays(const ConstSelection& selection) {
  require(selection.mask != nullptr && selection.prefix != nullptr, "selection has no data");
}

// A tensor of whole sequences and its part of the sub-sequences, either being the other's source.
void check_pair(const char* argument, const ConstView& whole, const char* sub_argument, const ConstView& sub,
                const ConstView& like, int64_t heads, const ConstSelection& selection) {
  check_view(argument, whole, like);
  check_view(sub_argument, sub, like);
  check_heads(whole.heads(), selection.kv_heads);
  check_sizes(argument, whole, selection.sequences.rows, heads, selection.sequences.tokens);
  check_sizes(sub_argument, sub, selection.sequences.rows, heads, selection.sequences.entries);
  check_arrays(selection);
}

// What is added to an output; all or none of a call's.
void check_added(const char* argument, const ConstView& added, const ConstView& output, bool expected) {
  require((added.data != nullptr) == expected, argument,
          " is missing or too much: all of a call's are needed, or none");
  if (!expected) return;
  check_view(argument, added, output);
  check_sizes(argument, added, output.batch(), output.heads(), output.tokens());
}

}  // namespace

void check_view(const char* argument, const ConstView& view, const ConstView& like) {
  require(view.dtype == like.dtype, argument, " has dtype ", name(view.dtype), ", the first tensor ", name(like.dtype),
          ": all must share one");
  require(view.head_dim() == like.head_dim(), argument, " has head_dim ", view.head_dim(), ", the first tensor ",
          like.head_dim(), ": all must share one");
  for (int64_t size : view.sizes) require(size >= 1, argument, " is empty: every size must be at least 1");
  require(view.strides[3] == 1 || view.head_dim() == 1, argument, " has last stride ", view.strides[3],
          ": 1 is needed; copy it first");
  require(view.data != nullptr, argument, " has no data");
}

void check_sizes(const char* argument, const ConstView& view, int64_t rows, int64_t heads, int64_t length) {
  require(view.batch() == rows && view.heads() == heads && view.tokens() == length, argument, " has sizes [",
          view.batch(), ", ", view.heads(), ", ", view.tokens(), ", ", view.head_dim(), "]: [", rows, ", ", heads, ", ",
          length, ", head_dim] is needed");
}

void check_heads(int64_t query_heads, int64_t kv_heads) {
  require(kv_heads >= 1 && query_heads % kv_heads == 0, "key has ", kv_heads, " heads, query ", query_heads,
          ": the query heads must be a multiple of the key heads");
}

void check(const ScoreArgs& args) {
  check_view("query", args.query, args.query);
  check_view("key", args.key, args.query);
  check_heads(args.query.heads(), args.key.heads());
  check_sizes("key", args.key, args.query.batch(), args.key.heads(), args.query.tokens());
  require(args.query_score != nullptr && args.key_score != nullptr, "scores have no data");
}

void check(const SelectArgs& args) {
  const Selection& selection = args.selection;
  require(selection.kv_heads >= 1, "kv_heads=", selection.kv_heads, ": at least one is needed");
  require(selection.sequences.method.topk.chooses(),
          "sequences without parents, of a choice made elsewhere or with select_topk=0: there is nothing to select");
  require(args.query_score != nullptr && args.key_score != nullptr, "scores have no data");
  check_arrays(selection);
}

void check(const GatherArgs& args) {
  const auto& [query, key, value, selection, query_sub, key_sub, value_sub] = args;
  check_pair("query", query, "query_sub", query_sub, query, query.heads(), selection);
  check_pair("key", key, "key_sub", key_sub, query, selection.kv_heads, selection);
  check_pair("value", value, "value_sub", value_sub, query, selection.kv_heads, selection);
}

void check(const GatherBackwardArgs& args) {
  const auto& [query_sub, key_sub, value_sub, selection, query, key, value, added_query, added_key, added_value] = args;
  check_pair("grad_query", query, "grad_query_sub", query_sub, query, query.heads(), selection);
  check_pair("grad_key", key, "grad_key_sub", key_sub, query, selection.kv_heads, selection);
  check_pair("grad_value", value, "grad_value_sub", value_sub, query, selection.kv_heads, selection);
  const bool adds = added_query.data != nullptr;
  check_added("added_query", added_query, query, adds);
  check_added("added_key", added_key, key, adds);
  check_added("added_value", added_value, value, adds);
}

void check(const ScatterArgs& args) {
  const ConstView sub = args.output_sub;
  check_pair("output", args.output, "output_sub", sub, sub, args.output.heads(), args.selection);
  check_added("added", args.added, args.output, args.added.data != nullptr);
}

void check(const ScatterBackwardArgs& args) {
  const ConstView whole = args.grad_output;
  check_pair("grad_output", whole, "grad_output_sub", args.grad_output_sub, whole, whole.heads(), args.selection);
}

}  // namespace lighthouse
