// What follows from lengths and settings: k, strata, the sub-sequence's length. The one place that knows that all
// sequences have one length; a table of unequal ones enters here.

#include "lighthouse/sequences.h"

#include <limits>
#include <sstream>

#include "core/require.h"
#include "rules/strata.h"

namespace lighthouse {

Sequences Sequences::of_rows(int64_t rows, int64_t tokens, const Method& method) {
  require(rows >= 1, "rows=", rows, ": at least one sequence is needed");
  require(tokens >= 1, "tokens=", tokens, ": at least one token is needed");
  require(tokens <= kMaxCount, "tokens=", tokens, ": at most 2^40");
  const Method checked = method.checked();
  const bool chooses = checked.topk.chooses();
  const int64_t parents = chooses ? checked.topk.parents(tokens) : 0;
  const Strata strata = chooses ? rules::make_strata(checked.pyramid, tokens, parents) : Strata{};
  const int64_t entries = rules::chosen_entries(strata);
  require(entries <= std::numeric_limits<int32_t>::max(), "the sub-sequence of ", tokens, " tokens has ", entries,
          " entries: at most 2^31 - 1; choose larger windows or a smaller select_topk");
  Sequences sequences = of_choice(rows, tokens, entries, checked.pyramid);
  sequences.method = checked;
  sequences.each.parents = parents;
  sequences.each_strata = strata;
  return sequences;
}

Sequences Sequences::of_choice(int64_t rows, int64_t tokens, int64_t entries, const Pyramid& pyramid) {
  Sequences sequences{
      .method = {.pyramid = pyramid, .topk = {0, 0}}, .rows = rows, .tokens = tokens, .entries = entries};
  sequences.each.tokens = tokens;
  sequences.each.entries = entries;
  return sequences;
}

double Sequences::kept_share() const {
  const auto kept = [&](int64_t index) { return rules::chosen_tokens(method.pyramid, strata(index)); };
  return static_cast<double>(pieces(kept).total()) / (static_cast<double>(rows) * static_cast<double>(tokens));
}

std::string Sequences::str() const {
  std::ostringstream text;
  text << "Sequences(rows=" << rows << ", tokens=" << tokens << ", " << method.str() << ", parents=" << each.parents
       << ", strata=" << each_strata.count << ", entries=" << entries << ", kept_share=" << kept_share() << ")";
  return text.str();
}

}  // namespace lighthouse
