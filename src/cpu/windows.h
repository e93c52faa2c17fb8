// The two directions between tokens and chosen entries. Pooling and the write-back's gradient sum windows of tokens
// into entries; the write-back and pooling's gradient spread entries over windows of tokens. The pairs differ only in
// which windows and in whether a mean or a sum is meant (rules::WindowRule).
#pragma once

#include <span>

#include "core/check.h"
#include "lighthouse/executor.h"
#include "rules/order.h"

namespace lighthouse::cpu {

// target[place] = sum or mean of the source's tokens in its window, added in the order of rules/order.h however the
// work is cut.
void sum_windows(std::span<const Pair> pairs, const ConstSelection& selection, rules::WindowRule rule,
                 const Executor& executor);

// target[t] = sum of the source's entries whose windows reach t, from the coarsest level to the finest, and then of
// added[t].
void spread_windows(std::span<const Pair> pairs, const ConstSelection& selection, rules::WindowRule rule,
                    const Executor& executor);

}  // namespace lighthouse::cpu
