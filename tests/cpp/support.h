// Problems for the tests, and what they are compared with: choices of the oracle, plain float64 loops over lists of
// entries. Arrays of double are without gaps: [rows, heads, tokens or entries, head_dim].
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>

#include "lighthouse/cpu.h"
#include "lighthouse/reference.h"
#include "tensors.h"

namespace lighthouse::test {

using reference::Entry;
using reference::Shape;

// A test case with a name to say.
struct Named {
  const char* name;
};

inline std::ostream& operator<<(std::ostream& out, const Named& named) { return out << named.name; }

// GoogleTest's name of it.
inline constexpr auto case_name = [](const auto& info) { return std::string(info.param.name); };

// --- problems -------------------------------------------------------------------------------------------------------

inline Pyramid pyramid(const std::vector<int64_t>& windows) { return Pyramid::from_windows(windows); }

inline Sequences sequences_of(int64_t rows, int64_t tokens, const Pyramid& pyramid, const TopK& topk,
                              bool cover_start = true, int64_t local_window = 0) {
  return Sequences::of_rows(
      rows, tokens, {.pyramid = pyramid, .topk = topk, .cover_start = cover_start, .local_window = local_window});
}

enum class ScoreKind { random, few_values, all_equal, nan, infinite, signed_zeros, rising, all_nan };

inline constexpr ScoreKind kScoreKinds[] = {ScoreKind::random, ScoreKind::few_values, ScoreKind::all_equal,
                                            ScoreKind::nan,    ScoreKind::infinite,   ScoreKind::signed_zeros,
                                            ScoreKind::rising, ScoreKind::all_nan};

inline const char* name(ScoreKind kind) {
  static constexpr const char* kNames[] = {"random",   "few_values",   "all_equal", "nan",
                                           "infinite", "signed_zeros", "rising",    "all_nan"};
  return kNames[static_cast<size_t>(kind)];
}

inline std::vector<float> make_scores(ScoreKind kind, int64_t count, Random& random) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  std::vector<float> scores(static_cast<size_t>(count));
  for (size_t i = 0; i < scores.size(); ++i) {
    const auto value = static_cast<float>(random.normal());
    const int64_t die = random.below(8);
    switch (kind) {
      case ScoreKind::random:
        scores[i] = value;
        break;
      case ScoreKind::few_values:
        scores[i] = static_cast<float>(die % 3);
        break;
      case ScoreKind::all_equal:
        scores[i] = 1.0F;
        break;
      case ScoreKind::nan:
        scores[i] = die == 0 ? kNan : die == 1 ? -kNan : value;
        break;
      case ScoreKind::infinite:
        scores[i] = die < 2 ? kInf : die < 6 ? -kInf : die < 7 ? value : kNan;
        break;
      case ScoreKind::signed_zeros:
        scores[i] = die < 4 ? 0.0F : die < 7 ? -0.0F : -1.0F;
        break;
      case ScoreKind::rising:
        scores[i] = static_cast<float>(i);
        break;
      case ScoreKind::all_nan:
        scores[i] = kNan;
        break;
    }
  }
  return scores;
}

// One choice per sequence and key-value head: the oracle's entries, and the mask and prefix that say the same, written
// down from the sorted list.
struct Choice {
  Sequences sequences;
  int64_t kv_heads = 0;
  std::vector<std::vector<Entry>> entries;
  std::vector<uint8_t> mask;
  std::vector<int32_t> prefix;

  operator ConstSelection() const { return {sequences, kv_heads, mask.data(), prefix.data()}; }
};

inline int64_t window(const Sequences& sequences, const Entry& entry) {
  return sequences.method.pyramid.windows.at(static_cast<size_t>(entry.level));
}

inline int64_t last_token(const Sequences& sequences, const Entry& entry) {
  return (entry.index + 1) * window(sequences, entry) - 1;
}

// Where a sequence's first token is in arrays [rows, heads, tokens].
inline int64_t start_of(const Sequences& sequences, const Sequence& sequence, int64_t heads, int64_t head) {
  return (sequence.row * heads + head) * sequences.tokens + sequence.token_offset;
}

template <class Body>
void each_sequence_and_head(const Sequences& sequences, int64_t heads, const Body& body) {
  for (int64_t index = 0; index < sequences.count(); ++index) {
    for (int64_t head = 0; head < heads; ++head) {
      body(sequences.at(index), head);
    }
  }
}

inline Choice oracle_choice(const Sequences& sequences, int64_t kv_heads, const std::vector<float>& query_score,
                            const std::vector<float>& key_score) {
  Choice choice{.sequences = sequences, .kv_heads = kv_heads, .entries = {}, .mask = {}, .prefix = {}};
  choice.mask.assign(static_cast<size_t>(sequences.rows * kv_heads * sequences.tokens), 0);
  choice.prefix.assign(choice.mask.size(), 0);
  each_sequence_and_head(sequences, kv_heads, [&](const Sequence& sequence, int64_t head) {
    const int64_t start = start_of(sequences, sequence, kv_heads, head);
    choice.entries.push_back(
        reference::select(sequences.method, sequence, query_score.data() + start, key_score.data() + start));
    const std::vector<Entry>& entries = choice.entries.back();
    for (const Entry& entry : entries) {
      const auto at = static_cast<size_t>(start + last_token(sequences, entry));
      choice.mask[at] = static_cast<uint8_t>(choice.mask[at] | 1 << entry.level);
    }
    size_t place = 0;
    for (int64_t t = 0; t < sequence.tokens; ++t) {
      while (place < entries.size() && last_token(sequences, entries[place]) < t) {
        ++place;
      }
      choice.prefix[static_cast<size_t>(start + t)] =
          static_cast<int32_t>(sequence.entry_offset + static_cast<int64_t>(place));
    }
  });
  return choice;
}

struct Problem : Named {
  int64_t rows, query_heads, kv_heads, tokens, head_dim;
  std::vector<int64_t> windows;
  TopK topk;
  bool cover_start = true;
  int64_t local_window = 0;

  Sequences sequences() const { return sequences_of(rows, tokens, pyramid(windows), topk, cover_start, local_window); }
  Shape shape() const { return {query_heads, kv_heads, head_dim}; }
  Sizes query_sizes() const { return {rows, query_heads, tokens, head_dim}; }
  Sizes kv_sizes() const { return {rows, kv_heads, tokens, head_dim}; }
  Sizes query_sub_sizes() const { return {rows, query_heads, sequences().entries, head_dim}; }
  Sizes kv_sub_sizes() const { return {rows, kv_heads, sequences().entries, head_dim}; }
  Choice random_choice(Random& random) const {
    const std::vector<float> query_score = make_scores(ScoreKind::random, rows * kv_heads * tokens, random);
    const std::vector<float> key_score = make_scores(ScoreKind::random, rows * kv_heads * tokens, random);
    return oracle_choice(sequences(), kv_heads, query_score, key_score);
  }
};

// What one chosen entry does to one row of tokens, for all entries: body(row of tokens, row of entries, weight).
// Written back, entries stand for tokens from their last one on, pooled for their own window.
template <class Body>
void each_pair(const Choice& choice, int64_t heads, bool write_back, const Body& body) {
  const Sequences& sequences = choice.sequences;
  size_t next = 0;
  each_sequence_and_head(sequences, choice.kv_heads, [&](const Sequence& sequence, int64_t kv_head) {
    const std::vector<Entry>& entries = choice.entries[next++];
    const int64_t group = heads / choice.kv_heads;
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
      const int64_t start = start_of(sequences, sequence, heads, h);
      const int64_t first_entry = (sequence.row * heads + h) * sequences.entries + sequence.entry_offset;
      for (size_t place = 0; place < entries.size(); ++place) {
        const int64_t width = window(sequences, entries[place]);
        const int64_t last = last_token(sequences, entries[place]);
        const int64_t from = write_back ? last : last + 1 - width;
        for (int64_t t = from; t < std::min(from + width, sequence.tokens); ++t) {
          body(start + t, first_entry + static_cast<int64_t>(place),
               write_back ? 1.0 : 1.0 / static_cast<double>(width));
        }
      }
    }
  });
}

// to[entry] += weight * from[token], or the other way round.
inline Values sum_to_entries(const Choice& choice, int64_t heads, int64_t dim, bool write_back, const Values& tokens) {
  Values entries(static_cast<size_t>(choice.sequences.rows * heads * choice.sequences.entries * dim), 0.0);
  each_pair(choice, heads, write_back, [&](int64_t token, int64_t entry, double weight) {
    for (int64_t d = 0; d < dim; ++d) {
      entries.at(static_cast<size_t>(entry * dim + d)) += weight * tokens.at(static_cast<size_t>(token * dim + d));
    }
  });
  return entries;
}

inline Values sum_to_tokens(const Choice& choice, int64_t heads, int64_t dim, bool write_back, const Values& entries) {
  Values tokens(static_cast<size_t>(choice.sequences.rows * heads * choice.sequences.tokens * dim), 0.0);
  each_pair(choice, heads, write_back, [&](int64_t token, int64_t entry, double weight) {
    for (int64_t d = 0; d < dim; ++d) {
      tokens.at(static_cast<size_t>(token * dim + d)) += weight * entries.at(static_cast<size_t>(entry * dim + d));
    }
  });
  return tokens;
}

inline Values plain_gather(const Choice& choice, int64_t heads, int64_t dim, const Values& x) {
  return sum_to_entries(choice, heads, dim, false, x);
}
inline Values plain_gather_backward(const Choice& choice, int64_t heads, int64_t dim, const Values& grad) {
  return sum_to_tokens(choice, heads, dim, false, grad);
}
inline Values plain_scatter(const Choice& choice, int64_t heads, int64_t dim, const Values& x) {
  return sum_to_tokens(choice, heads, dim, true, x);
}
inline Values plain_scatter_backward(const Choice& choice, int64_t heads, int64_t dim, const Values& grad) {
  return sum_to_entries(choice, heads, dim, true, grad);
}

// Runs the pieces one after another from the end, each as short as the contract allows: a host pool at its worst.
class BackwardExecutor final : public Executor {
 public:
  void parallel_for(int64_t begin, int64_t end, int64_t grain,
                    const std::function<void(int64_t, int64_t)>& body) const override {
    if (begin >= end) {
      return;
    }
    grain = std::max<int64_t>(grain, 1);
    for (int64_t first = begin + (end - begin - 1) / grain * grain; first >= begin; first -= grain) {
      body(first, std::min(end, first + grain));
    }
  }
};

// The executors under which every result must have the same bits.
inline std::vector<std::pair<std::string, std::shared_ptr<const Executor>>> executors() {
  return {{"one thread", std::make_shared<ThreadExecutor>(1)},
          {"two threads", std::make_shared<ThreadExecutor>(2)},
          {"three threads", std::make_shared<ThreadExecutor>(3)},
          {"seven threads", std::make_shared<ThreadExecutor>(7)},
          {"backward in small pieces", std::make_shared<BackwardExecutor>()}};
}

// Runs `work`, which must throw std::invalid_argument with each of `words` in its message.
inline void expect_refused(const std::function<void()>& work, const std::vector<std::string_view>& words) {
  try {
    work();
  } catch (const std::invalid_argument& error) {
    for (const std::string_view word : words) {
      EXPECT_NE(std::string_view(error.what()).find(word), std::string_view::npos)
          << "\"" << error.what() << "\" does not say \"" << word << "\"";
    }
    return;
  }
  FAIL() << "nothing was thrown";
}

}  // namespace lighthouse::test
