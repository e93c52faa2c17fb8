// The four verbs of the method on the CPU, and the gradients of two of them.
//
// Shapes: query side [rows, Hq, ...], key side [rows, Hkv, ...], Hq a multiple of Hkv; "tokens" long or "entries" long
// as the layout has it. All views of one call share dtype and head_dim. Outputs are written whole and may not overlap
// inputs. Sums are made in float32 (float64 for float64) in an order that depends on nothing but the layout, so the
// same input gives the same bits for any executor and any CPU of one architecture.
// Errors: std::invalid_argument, before anything is written.
#pragma once

#include "lighthouse/executor.h"
#include "lighthouse/plan.h"
#include "lighthouse/selection.h"
#include "lighthouse/view.h"

namespace lighthouse::cpu {

// Scores of tokens: max over the group of the query's norms, the key's norm (METHOD 2).
// query_score, key_score: [rows, Hkv, tokens] float32 without gaps.
void score(const ConstView& query, const ConstView& key, float* query_score, float* key_score,
           const Executor& executor);

// The choice (METHOD 3), one per key-value head, laid out in causal order (METHOD 4). Exact: no float arithmetic.
void select(const Plan& plan, const float* query_score, const float* key_score, const Selection& selection,
            const Executor& executor);

// Tokens to chosen entries: the mean over each entry's window (METHOD 1).
void gather(const Layout& layout, const ConstView& query, const ConstView& key, const ConstView& value,
            const ConstSelection& selection, const View& query_sub, const View& key_sub, const View& value_sub,
            const Executor& executor);

void gather_backward(const Layout& layout, const ConstView& grad_query_sub, const ConstView& grad_key_sub,
                     const ConstView& grad_value_sub, const ConstSelection& selection, const View& grad_query,
                     const View& grad_key, const View& grad_value, const Executor& executor);

// Chosen entries' outputs back to the tokens they stand for (METHOD 6).
void scatter(const Layout& layout, const ConstView& output_sub, const ConstSelection& selection, const View& output,
             const Executor& executor);

void scatter_backward(const Layout& layout, const ConstView& grad_output, const ConstSelection& selection,
                      const View& grad_output_sub, const Executor& executor);

// Throws unless mask and prefix are a choice that fills the layout's entries exactly: for arrays from outside.
void check_selection(const Layout& layout, const ConstSelection& selection, const Executor& executor);

}  // namespace lighthouse::cpu
