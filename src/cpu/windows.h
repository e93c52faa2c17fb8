// The two directions between tokens and chosen entries. Pooling and the write-back's gradient sum windows of tokens
// into entries; the write-back and pooling's gradient spread entries over windows of tokens. The pairs differ only in
// which windows (rules::Reach) and in whether a mean or a sum is meant.
#pragma once

#include <span>

#include "lighthouse/executor.h"
#include "lighthouse/plan.h"
#include "lighthouse/selection.h"
#include "lighthouse/view.h"
#include "rules/order.h"

namespace lighthouse::cpu {

enum class Weight { sum, mean };  // mean: over the window's full length

struct WindowRule {
  rules::Reach reach;
  Weight weight;
};

inline constexpr WindowRule kPooling{rules::Reach::pooled, Weight::mean};
inline constexpr WindowRule kWriteBack{rules::Reach::written, Weight::sum};

struct TokensToEntries {
  ConstView tokens;
  View entries;
};

struct EntriesToTokens {
  ConstView entries;
  View tokens;
};

// entries[place] = sum or mean of the tokens of its window, added in the order of rules/order.h however the work is
// cut.
void sum_windows(const Layout& layout, WindowRule rule, std::span<const TokensToEntries> tensors,
                 const ConstSelection& selection, const Executor& executor);

// tokens[t] = sum of the entries whose windows reach t, from the coarsest level to the finest.
void spread_windows(const Layout& layout, WindowRule rule, std::span<const EntriesToTokens> tensors,
                    const ConstSelection& selection, const Executor& executor);

}  // namespace lighthouse::cpu
