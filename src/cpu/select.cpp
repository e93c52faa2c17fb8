// The choice (METHOD 3), stratum by stratum: each is laid out by itself, because its place in the sub-sequence follows
// from lengths alone.

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/check.h"
#include "lighthouse/cpu.h"
#include "rules/order.h"
#include "rules/picking.h"
#include "rules/strata.h"

namespace lighthouse::cpu {
namespace {

constexpr int64_t kTokensPerGrain = 16 * 1024;

// The ranks of the largest scores over every window of every level above 0, within one stratum.
class RankPyramid {
 public:
  void build(const Pyramid& pyramid, const float* scores, int64_t tokens) {
    for (int level = 1; level < pyramid.levels; ++level) {
      auto& maxima = levels_[static_cast<size_t>(level)];
      const int64_t window = pyramid.windows[level];
      const int64_t ratio = window / pyramid.windows[level - 1];
      maxima.resize(static_cast<size_t>(tokens / window));
      const rules::Rank* finer = level > 1 ? levels_[static_cast<size_t>(level - 1)].data() : nullptr;
      for (int64_t i = 0; i < std::ssize(maxima); ++i) {
        rules::Rank largest = 0;
        for (int64_t child = i * ratio; child < (i + 1) * ratio; ++child) {
          largest = std::max(largest, finer != nullptr ? finer[child] : rules::rank_of(scores[child]));
        }
        maxima[static_cast<size_t>(i)] = largest;
      }
    }
  }
  rules::Rank& at(int level, int64_t index) { return levels_[static_cast<size_t>(level)][static_cast<size_t>(index)]; }

 private:
  std::vector<rules::Rank> levels_[kMaxLevels];
};

// Brings the first `count` candidates in picking order by these ranks to the front of [first, last).
void pick(std::vector<rules::Candidate>::iterator first, std::vector<rules::Candidate>::iterator last, int64_t count,
          RankPyramid& ranks, int level) {
  if (count == 0 || count == last - first) return;
  for (auto it = first; it != last; ++it) it->rank = rules::pick_rank(ranks.at(level, it->index));
  std::nth_element(first, first + count, last, rules::picked_before);
}

void number_places(const uint8_t* mask, int32_t* prefix, int64_t tokens, int64_t place) {
  for (int64_t token = 0; token < tokens; ++token) {
    prefix[token] = static_cast<int32_t>(place);
    place += rules::bits_set(mask[token]);
  }
}

class StratumSelector {
 public:
  explicit StratumSelector(const Method& method) : pyramid_(method.pyramid), cover_start_(method.cover_start) {}

  // All arrays start at the stratum's first token; `place` is that of its first entry in the row.
  void run(const rules::Stratum& stratum, int64_t place, const float* query_score, const float* key_score,
           uint8_t* mask, int32_t* prefix) {
    const int coarsest = pyramid_.levels - 1;
    const int64_t tokens = stratum.entries * pyramid_.coarsest();
    std::memset(mask, 0, static_cast<size_t>(tokens));
    candidates_.clear();
    for (int64_t i = 0; i < stratum.entries; ++i) candidates_.push_back({0, i});
    choose(mask, coarsest);
    if (coarsest > 0) {
      query_ranks_.build(pyramid_, query_score, tokens);
      key_ranks_.build(pyramid_, key_score, tokens);
      if (cover_start_ && stratum.first_entry == 0) cover_start();
    }
    for (int level = coarsest; level > 0; --level) {
      const int64_t parents = std::min(stratum.budget, static_cast<int64_t>(candidates_.size()));
      const int64_t by_query = rules::parents_by_query(parents);
      // Where all become parents the order does not matter.
      if (parents < std::ssize(candidates_)) {
        pick(candidates_.begin(), candidates_.end(), by_query, query_ranks_, level);
        pick(candidates_.begin() + by_query, candidates_.end(), parents - by_query, key_ranks_, level);
      }
      candidates_.resize(static_cast<size_t>(parents));
      replace_by_children(level);
      choose(mask, level - 1);
    }
    number_places(mask, prefix, tokens, place);
  }

 private:
  void cover_start() {
    for (int level = 1; level < pyramid_.levels; ++level) {
      query_ranks_.at(level, 0) = rules::kInfinityRank;
      key_ranks_.at(level, 0) = rules::kInfinityRank;
    }
  }

  void choose(uint8_t* mask, int level) {
    for (const auto& candidate : candidates_) {
      uint8_t& byte = mask[rules::last_token(pyramid_.windows[level], candidate.index)];
      byte = static_cast<uint8_t>(byte | 1u << level);
    }
  }

  void replace_by_children(int level) {
    const int64_t ratio = pyramid_.windows[level] / pyramid_.windows[level - 1];
    children_.clear();
    for (const auto& parent : candidates_) {
      for (int64_t child = parent.index * ratio; child < (parent.index + 1) * ratio; ++child) {
        children_.push_back({0, child});
      }
    }
    std::swap(candidates_, children_);
  }

  const Pyramid& pyramid_;
  bool cover_start_;
  RankPyramid query_ranks_, key_ranks_;
  std::vector<rules::Candidate> candidates_, children_;
};

// No token is in.
void select_nothing(int64_t tokens, int64_t place, uint8_t* mask, int32_t* prefix) {
  std::memset(mask, 0, static_cast<size_t>(tokens));
  number_places(mask, prefix, tokens, place);
}

// Every token is in: those after the last full coarsest window, at level 0.
void select_tail(int64_t tokens, int64_t place, uint8_t* mask, int32_t* prefix) {
  std::memset(mask, 1, static_cast<size_t>(tokens));
  number_places(mask, prefix, tokens, place);
}

// Whether windows of all the levels in the mask end at this token.
bool ends_windows(const Pyramid& pyramid, uint8_t mask, int64_t token) {
  for (int level = 1; mask >> level != 0; ++level) {
    if (!rules::is_chosen(mask, level)) continue;
    if (level >= pyramid.levels || (token + 1) % pyramid.windows[level] != 0) return false;
  }
  return true;
}

}  // namespace

void run(const SelectArgs& args, const Executor& executor) {
  check(args);
  const Selection& selection = args.selection;
  const Sequences& sequences = selection.sequences;
  const Pyramid& pyramid = sequences.method.pyramid;

  // For each head of a sequence the strata that hold anything, and the tail.
  const auto pieces =
      sequences.pieces([&](int64_t index) { return selection.kv_heads * (sequences.strata(index).filled + 1); });
  const int64_t tokens = sequences.rows * selection.kv_heads * sequences.tokens;
  const int64_t grain = std::max<int64_t>(1, kTokensPerGrain * pieces.total() / tokens);
  executor.parallel_for(0, pieces.total(), grain, [&](int64_t first, int64_t last) {
    StratumSelector selector(sequences.method);
    for (int64_t item = first; item < last; ++item) {
      const auto [index, piece] = pieces.at(item);
      const Sequence sequence = sequences.at(index);
      const Strata& strata = sequences.strata(index);
      const int64_t start = selection.start(sequence, piece / (strata.filled + 1));
      if (sequence.padding) {
        select_nothing(sequence.tokens, sequence.entry_offset, selection.mask + start, selection.prefix + start);
        continue;
      }
      if (piece % (strata.filled + 1) == strata.filled) {
        const int64_t at = start + sequence.tokens - strata.tail;
        select_tail(strata.tail, sequence.entry_offset + rules::tail_place(strata), selection.mask + at,
                    selection.prefix + at);
        continue;
      }
      const rules::Stratum stratum = rules::stratum_at(strata, piece % (strata.filled + 1));
      const int64_t at = start + stratum.first_entry * pyramid.coarsest();
      selector.run(stratum, sequence.entry_offset + stratum.place, args.query_score + at, args.key_score + at,
                   selection.mask + at, selection.prefix + at);
    }
  });
}

void check_selection(const ConstSelection& selection, const Executor& executor) {
  const Sequences& sequences = selection.sequences;
  require(selection.kv_heads >= 1, "kv_heads=", selection.kv_heads, ": at least one is needed");
  require(selection.mask != nullptr && selection.prefix != nullptr, "selection has no data");
  executor.parallel_for(0, sequences.count() * selection.kv_heads, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const Sequence sequence = sequences.at(item / selection.kv_heads);
      const int64_t head = item % selection.kv_heads;
      const int64_t start = selection.start(sequence, head);
      int64_t place = sequence.entry_offset;
      bool consistent = true;
      for (int64_t token = 0; token < sequence.tokens; ++token) {
        const uint8_t mask = selection.mask[start + token];
        consistent &= selection.prefix[start + token] == place && ends_windows(sequences.method.pyramid, mask, token);
        place += rules::bits_set(mask);
      }
      require(consistent && place == sequence.entry_offset + sequence.entries, "mask and prefix of sequence ",
              item / selection.kv_heads, ", head ", head, " are not a choice of ", sequence.entries,
              " entries from these windows");
    }
  });
}

}  // namespace lighthouse::cpu
