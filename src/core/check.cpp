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
                const ConstView& like, const ConstSelection& selection) {
  const Sequences& sequences = selection.sequences;
  check_view(argument, whole, like);
  check_view(sub_argument, sub, like);
  check_heads(whole.heads(), selection.kv_heads);
  check_sizes(argument, whole, sequences.rows, whole.heads(), sequences.tokens);
  check_sizes(sub_argument, sub, sequences.rows, whole.heads(), sequences.entries);
  check_arrays(selection);
}

void check_kv_heads(const char* argument, const ConstView& whole, const ConstSelection& selection) {
  check_sizes(argument, whole, selection.sequences.rows, selection.kv_heads, selection.sequences.tokens);
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
  require(selection.sequences.at(0).parents >= 1, "sequences of a choice made elsewhere: Sequences::of_rows is needed");
  require(args.query_score != nullptr && args.key_score != nullptr, "scores have no data");
  check_arrays(selection);
}

void check(const GatherArgs& args) {
  check_pair("query", args.query, "query_sub", args.query_sub, args.query, args.selection);
  check_pair("key", args.key, "key_sub", args.key_sub, args.query, args.selection);
  check_pair("value", args.value, "value_sub", args.value_sub, args.query, args.selection);
  check_kv_heads("key", args.key, args.selection);
  check_kv_heads("value", args.value, args.selection);
}

void check(const GatherBackwardArgs& args) {
  check_pair("grad_query", args.grad_query, "grad_query_sub", args.grad_query_sub, args.grad_query, args.selection);
  check_pair("grad_key", args.grad_key, "grad_key_sub", args.grad_key_sub, args.grad_query, args.selection);
  check_pair("grad_value", args.grad_value, "grad_value_sub", args.grad_value_sub, args.grad_query, args.selection);
  check_kv_heads("grad_key", args.grad_key, args.selection);
  check_kv_heads("grad_value", args.grad_value, args.selection);
}

void check(const ScatterArgs& args) {
  check_pair("output", args.output, "output_sub", args.output_sub, args.output_sub, args.selection);
}

void check(const ScatterBackwardArgs& args) {
  check_pair("grad_output", args.grad_output, "grad_output_sub", args.grad_output_sub, args.grad_output,
             args.selection);
}

}  // namespace lighthouse
