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

constexpr int64_t kTokensPerPiece = 16 * 1024;

// The maxima of the scores over every window of every level above 0, within one stratum.
class ScorePyramid {
 public:
  void build(const Pyramid& pyramid, const float* scores, int64_t tokens) {
    for (int level = 1; level < pyramid.levels; ++level) {
      auto& maxima = levels_[static_cast<size_t>(level)];
      const int64_t window = pyramid.windows[level];
      const int64_t ratio = window / pyramid.windows[level - 1];
      maxima.resize(static_cast<size_t>(tokens / window));
      const rules::ScoreKey* finer = level > 1 ? levels_[static_cast<size_t>(level - 1)].data() : nullptr;
      for (int64_t i = 0; i < std::ssize(maxima); ++i) {
        rules::ScoreKey largest = 0;
        for (int64_t child = i * ratio; child < (i + 1) * ratio; ++child) {
          largest = std::max(largest, finer != nullptr ? finer[child] : rules::score_key(scores[child]));
        }
        maxima[static_cast<size_t>(i)] = largest;
      }
    }
  }
  rules::ScoreKey& at(int level, int64_t index) {
    return levels_[static_cast<size_t>(level)][static_cast<size_t>(index)];
  }

 private:
  std::vector<rules::ScoreKey> levels_[kMaxLevels];
};

// Brings the first `count` candidates in picking order by these scores to the front of [first, last).
void pick(std::vector<rules::Candidate>::iterator first, std::vector<rules::Candidate>::iterator last, int64_t count,
          ScorePyramid& scores, int level) {
  if (count == 0 || count == last - first) return;
  for (auto it = first; it != last; ++it) it->key = rules::pick_key(scores.at(level, it->index));
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
  explicit StratumSelector(const Plan& plan) : pyramid_(plan.layout.pyramid), cover_start_(plan.cover_start) {}

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
      query_.build(pyramid_, query_score, tokens);
      key_.build(pyramid_, key_score, tokens);
      if (cover_start_ && stratum.first_entry == 0) cover_start();
    }
    for (int level = coarsest; level > 0; --level) {
      const int64_t parents = std::min(stratum.budget, static_cast<int64_t>(candidates_.size()));
      const int64_t by_query = rules::parents_by_query(parents);
      // Where all become parents the order does not matter.
      if (parents < std::ssize(candidates_)) {
        pick(candidates_.begin(), candidates_.end(), by_query, query_, level);
        pick(candidates_.begin() + by_query, candidates_.end(), parents - by_query, key_, level);
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
      query_.at(level, 0) = rules::kInfinityKey;
      key_.at(level, 0) = rules::kInfinityKey;
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
  ScorePyramid query_, key_;
  std::vector<rules::Candidate> candidates_, children_;
};

// Every token is in: those behind the last full coarsest window, at level 0.
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

void select(const Plan& plan, const float* query_score, const float* key_score, const Selection& selection,
            const Executor& executor) {
  const Layout& layout = plan.layout;
  require(selection.kv_heads >= 1, "kv_heads=", selection.kv_heads, ": at least one is needed");
  require(query_score != nullptr && key_score != nullptr, "scores have no data");
  require(selection.mask != nullptr && selection.prefix != nullptr, "selection has no data");

  // All sequences have the same strata; one more piece of work each is the tail.
  const rules::Strata strata = rules::make_strata(layout.pyramid, layout.tokens, plan.topk.parents(layout.tokens));
  const int64_t coarsest_entries = layout.tokens / layout.pyramid.coarsest();
  const int64_t filled = std::min(strata.count, coarsest_entries);  // the others hold nothing
  const int64_t pieces = filled + 1;
  const int64_t grain = std::max<int64_t>(1, kTokensPerPiece * pieces / layout.tokens);
  executor.parallel_for(0, layout.sequences() * selection.kv_heads * pieces, grain, [&](int64_t first, int64_t last) {
    StratumSelector selector(plan);
    for (int64_t item = first; item < last; ++item) {
      const Sequence sequence = layout.sequence(item / pieces / selection.kv_heads);
      const int64_t head = item / pieces % selection.kv_heads;
      const int64_t start = (sequence.row * selection.kv_heads + head) * layout.tokens + sequence.token_offset;
      if (item % pieces == filled) {
        const int64_t at = start + sequence.tokens - strata.tail;
        select_tail(strata.tail, sequence.entry_offset + strata.tail_place(), selection.mask + at,
                    selection.prefix + at);
        continue;
      }
      const rules::Stratum stratum = strata.at(item % pieces);
      const int64_t at = start + stratum.first_entry * layout.pyramid.coarsest();
      selector.run(stratum, sequence.entry_offset + stratum.place, query_score + at, key_score + at,
                   selection.mask + at, selection.prefix + at);
    }
  });
}

void check_selection(const Layout& layout, const ConstSelection& selection, const Executor& executor) {
  require(selection.kv_heads >= 1, "kv_heads=", selection.kv_heads, ": at least one is needed");
  require(selection.mask != nullptr && selection.prefix != nullptr, "selection has no data");
  executor.parallel_for(0, layout.sequences() * selection.kv_heads, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const Sequence sequence = layout.sequence(item / selection.kv_heads);
      const int64_t head = item % selection.kv_heads;
      const int64_t start = (sequence.row * selection.kv_heads + head) * layout.tokens + sequence.token_offset;
      int64_t place = sequence.entry_offset;
      bool consistent = true;
      for (int64_t token = 0; token < sequence.tokens; ++token) {
        const uint8_t mask = selection.mask[start + token];
        consistent &= selection.prefix[start + token] == place && ends_windows(layout.pyramid, mask, token);
        place += rules::bits_set(mask);
      }
      require(consistent && place == sequence.entry_offset + sequence.entries, "mask and prefix of sequence ",
              item / selection.kv_heads, ", head ", head, " are not a choice of ", sequence.entries,
              " entries from these windows");
    }
  });
}

}  // namespace lighthouse::cpu
