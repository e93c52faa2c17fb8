// What follows from lengths and settings: k, strata, the sub-sequence's length, the places of documents.

#include "lighthouse/sequences.h"

#include <algorithm>
#include <limits>
#include <sstream>

#include "core/require.h"
#include "rules/strata.h"

namespace lighthouse {
namespace {

__extension__ typedef __int128 Wide;

void require_entries(int64_t entries, int64_t tokens) {
  require(entries <= std::numeric_limits<int32_t>::max(), "the sub-sequence of ", tokens, " tokens has ", entries,
          " entries: at most 2^31 - 1; choose larger windows or a smaller select_topk");
}

// k of a document: of a whole number for its row its part by length, of a share that of its own tokens.
int64_t parents_of(const TopK& topk, int64_t tokens, int64_t row_tokens) {
  if (!topk.chooses()) return 0;
  if (topk.denominator != 0) return topk.parents(tokens);
  return std::max<int64_t>(1, static_cast<int64_t>(Wide{topk.numerator} * tokens / row_tokens));
}

}  // namespace

Sequences Sequences::of_rows(int64_t rows, int64_t tokens, const Method& method) {
  require(rows >= 1, "rows=", rows, ": at least one sequence is needed");
  require(tokens >= 1, "tokens=", tokens, ": at least one token is needed");
  require(tokens <= kMaxCount, "tokens=", tokens, ": at most 2^40");
  const Method checked = method.checked();
  const bool chooses = checked.topk.chooses();
  const int64_t parents = chooses ? checked.topk.parents(tokens) : 0;
  const Strata strata = chooses ? rules::make_strata(checked.pyramid, tokens, parents) : Strata{};
  const int64_t entries = rules::chosen_entries(strata);
  require_entries(entries, tokens);
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

Documents::Documents(std::span<const Length> lengths, const Method& method) {
  const Method checked = method.checked();
  std::vector<int64_t> row_tokens;  // without padding
  for (const auto& [tokens, row, padding] : lengths) {
    require(tokens >= 0, "a document has ", tokens, " tokens: at least 0");
    require(tokens <= kMaxCount, "a document has ", tokens, " tokens: at most 2^40");
    require(0 <= row && row < std::ssize(lengths), "a document is of row ", row, ": rows are counted from 0 on");
    if (row >= std::ssize(row_tokens)) row_tokens.resize(static_cast<size_t>(row) + 1);
    if (!padding) row_tokens[static_cast<size_t>(row)] += tokens;
  }
  Sequences& all = sequences_;
  for (const auto& [tokens, row, padding] : lengths) {
    if (tokens == 0) continue;
    Document document{.sequence = {.row = 0,
                                   .token_offset = all.tokens,
                                   .tokens = tokens,
                                   .entry_offset = all.entries,
                                   .entries = 0,
                                   .parents = 0,
                                   .padding = padding},
                      .strata = {}};
    if (!padding && checked.topk.chooses()) {
      Sequence& sequence = document.sequence;
      sequence.parents = parents_of(checked.topk, tokens, row_tokens[static_cast<size_t>(row)]);
      document.strata = rules::make_strata(checked.pyramid, tokens, sequence.parents);
      sequence.entries = rules::chosen_entries(document.strata);
    }
    table_.push_back(document);
    all.tokens += tokens;
    all.entries += document.sequence.entries;
    require(all.tokens <= kMaxCount, "the documents have ", all.tokens, " tokens and more: at most 2^40");
    require_entries(all.entries, all.tokens);
  }
  all = Sequences::of_table(table_, checked);
}

Sequences Sequences::of_table(std::span<const Document> table, const Method& method) {
  require(!table.empty(), "no document has a token: at least one is needed");
  Sequences all{.method = method, .rows = 1, .documents = table.data(), .document_count = std::ssize(table)};
  for (const auto& [sequence, strata] : table) {
    all.tokens = std::max(all.tokens, sequence.token_offset + sequence.tokens);
    all.entries = std::max(all.entries, sequence.entry_offset + sequence.entries);
    all.each.tokens = std::max(all.each.tokens, sequence.tokens);
  }
  return all;
}

double Sequences::kept_share() const {
  const auto kept = [&](int64_t index) { return rules::chosen_tokens(method.pyramid, strata(index)); };
  const auto text = [&](int64_t index) { return at(index).padding ? 0 : at(index).tokens; };
  return static_cast<double>(pieces(kept).total()) / static_cast<double>(pieces(text).total());
}

std::string Sequences::str() const {
  std::ostringstream text;
  text << "Sequences(rows=" << rows << ", tokens=" << tokens << ", " << method.str();
  if (alike()) {
    text << ", parents=" << each.parents << ", strata=" << each_strata.count;
  } else {
    text << ", documents=" << count();
  }
  text << ", entries=" << entries << ", kept_share=" << kept_share() << ")";
  return text.str();
}

}  // namespace lighthouse
