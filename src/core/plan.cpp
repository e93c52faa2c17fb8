#include "lighthouse/plan.h"

#include <algorithm>
#include <limits>
#include <sstream>

#include "core/require.h"
#include "rules/strata.h"

namespace lighthouse {

Plan make_plan(int64_t rows, int64_t tokens, const Pyramid& pyramid, const TopK& topk, bool cover_start) {
  require(rows >= 1, "rows=", rows, ": at least one sequence is needed");
  require(tokens >= 1, "tokens=", tokens, ": at least one token is needed");
  require(tokens <= int64_t{1} << 40, "tokens=", tokens, ": at most 2^40");  // keeps every product in 64 bits
  // Both structs are plain data: check again what was not made by their own functions.
  const Pyramid checked =
      Pyramid::from_windows({pyramid.windows.data(), static_cast<size_t>(std::max(0, pyramid.levels))});
  const TopK checked_topk =
      topk.denominator == 0 ? TopK::count(topk.numerator) : TopK::share(topk.numerator, topk.denominator);
  const int64_t entries = rules::make_strata(checked, tokens, checked_topk.parents(tokens)).length();
  require(entries <= std::numeric_limits<int32_t>::max(), "the sub-sequence of ", tokens, " tokens has ", entries,
          " entries: at most 2^31 - 1; choose larger windows or a smaller select_topk");
  return {Layout{checked, rows, tokens, entries}, checked_topk, cover_start};
}

double Plan::kept_share() const {
  const auto strata = rules::make_strata(layout.pyramid, layout.tokens, topk.parents(layout.tokens));
  return static_cast<double>(strata.chosen_tokens(layout.pyramid)) / static_cast<double>(layout.tokens);
}

std::string Plan::str() const {
  const auto strata = rules::make_strata(layout.pyramid, layout.tokens, topk.parents(layout.tokens));
  std::ostringstream text;
  text << "Plan(rows=" << layout.rows << ", tokens=" << layout.tokens << ", windows=[" << layout.pyramid.str()
       << "], select_topk=" << topk.str() << ", parents=" << topk.parents(layout.tokens) << ", strata=" << strata.count
       << ", entries=" << layout.entries << ", kept_share=" << kept_share()
       << ", cover_start=" << (cover_start ? "true" : "false") << ")";
  return text.str();
}

}  // namespace lighthouse
