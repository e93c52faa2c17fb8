// The four verbs of the method and the gradients of two of them: what each takes, on every device. cpu::run and
// cuda::run carry them out.
//
// Shapes: query side [rows, Hq, ...], key side [rows, Hkv, ...], Hq a multiple of Hkv; a tensor of whole sequences has
// `tokens` rows a head, one of their sub-sequences (_sub) `entries`. All views of one call share dtype and head_dim.
// Scores are [rows, Hkv, tokens] float32 without gaps. Outputs come last; they are written whole and may not overlap
// inputs. What is `added`, a local window's part (METHOD 5a), is added to a sum as its last term, before the one
// rounding.
#pragma once

#include "lighthouse/selection.h"
#include "lighthouse/view.h"

namespace lighthouse {

// Scores of tokens: max over the group of the query's norms, the key's norm (METHOD 2).
struct ScoreArgs {
  ConstView query, key;
  float* query_score = nullptr;
  float* key_score = nullptr;
};

// The choice (METHOD 3), one per key-value head, laid out in causal order (METHOD 4). Exact: no float arithmetic.
struct SelectArgs {
  const float* query_score = nullptr;
  const float* key_score = nullptr;
  Selection selection;
};

// Tokens to chosen entries: the mean over each entry's window (METHOD 1).
struct GatherArgs {
  ConstView query, key, value;
  ConstSelection selection;
  View query_sub, key_sub, value_sub;
};

struct GatherBackwardArgs {
  ConstView grad_query_sub, grad_key_sub, grad_value_sub;
  ConstSelection selection;
  View grad_query, grad_key, grad_value;
  ConstView added_query = {}, added_key = {}, added_value = {};  // like the gradients; all, or none
};

// Chosen entries' outputs back to the tokens they stand for (METHOD 6).
struct ScatterArgs {
  ConstView output_sub;
  ConstSelection selection;
  View output;
  ConstView added = {};  // like the output, or nothing
};

struct ScatterBackwardArgs {
  ConstView grad_output;
  ConstSelection selection;
  View grad_output_sub;
};

}  // namespace lighthouse
