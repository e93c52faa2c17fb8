// The two walks over windows (windows.h): a piece of work is some whole coarsest windows of one head of one sequence.
// Counted in units u = token + reach, so that no entry's sum and no token is shared between pieces.

#include "cpu/windows.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/rows.h"
#include "rules/strata.h"

namespace lighthouse::cpu {
namespace {

constexpr int64_t kTokensPerWalk = 64;  // at least; enough to make a piece of work worth its start

// Mask and prefix of one sequence and key-value head.
struct Choice {
  const uint8_t* mask;
  const int32_t* prefix;
  int64_t tokens;

  bool has(int level, int64_t window, int64_t index) const {
    if (index < 0) return false;
    const int64_t last = rules::last_token(window, index);
    return last < tokens && rules::is_chosen(mask[last], level);
  }
  int64_t place(int level, int64_t window, int64_t index) const {
    const int64_t last = rules::last_token(window, index);
    return rules::place(mask[last], prefix[last], level);
  }
};

// The rows of one head of a view.
template <class T>
struct HeadRows {
  T* data = nullptr;
  int64_t stride = 0;
  T* operator[](int64_t row) const { return data + row * stride; }
};

template <class T, class AnyView>
auto rows_of(const AnyView& view, int64_t row, int64_t head, int64_t first) {
  return HeadRows{view.template row<T>(row, head, first), view.strides[2]};
}

template <class T>
AccumulatorOf<T> divisor(rules::WindowRule rule, int64_t window) {
  return rule.mean ? static_cast<AccumulatorOf<T>>(window) : 1;
}

// Sums the windows of one head within units [begin, end).
template <class T>
class WindowSummer {
  using A = AccumulatorOf<T>;

 public:
  static constexpr bool kSums = true;

  WindowSummer(const Pyramid& pyramid, rules::WindowRule rule, int64_t head_dim)
      : pyramid_(pyramid),
        rule_(rule),
        n_(head_dim),
        piece_(pyramid.levels > 1 ? rules::piece_length(pyramid.windows[1], rules::kLongestSum) : 0),
        sums_(static_cast<size_t>(pyramid.levels * head_dim)) {}

  void run(const Choice& choice, HeadRows<const T> tokens, HeadRows<T> entries, HeadRows<const T>, int64_t begin,
           int64_t end) {
    const int64_t shift = static_cast<int64_t>(rule_.reach);
    const int64_t step = pyramid_.levels > 1 ? pyramid_.windows[1] : end - begin;
    for (int64_t u = begin; u < end; u += step) {
      const int64_t first = std::max<int64_t>(0, u - shift);
      const int64_t last = std::min(choice.tokens, u + step - shift);
      if (first >= last) break;
      for (int64_t token = first; token < last; ++token) {
        if (rules::is_chosen(choice.mask[token], 0)) {
          std::memcpy(entries[rules::place(choice.mask[token], choice.prefix[token], 0)], tokens[token],
                      static_cast<size_t>(n_) * sizeof(T));
        }
      }
      if (pyramid_.levels > 1) {
        if (piece_ == step) {
          row_.add_rows(sum(1), tokens[first], tokens.stride, last - first, n_);
        } else {
          add_in_pieces(tokens, first, last, shift);
        }
        finish_windows(choice, entries, u + step, u + step >= std::min(end, choice.tokens + shift));
      }
    }
  }

 private:
  A* sum(int level) { return sums_.data() + level * n_; }

  void add_in_pieces(HeadRows<const T> tokens, int64_t first, int64_t last, int64_t shift) {
    while (first < last) {
      const int64_t next = std::min(last, ((first + shift) / piece_ + 1) * piece_ - shift);
      row_.add_rows(sum(0), tokens[first], tokens.stride, next - first, n_);
      row_.add(sum(1), sum(0), n_);
      std::fill(sum(0), sum(0) + n_, A{0});
      first = next;
    }
  }

  // Writes out and passes on every window that ends at unit `at`; at the last one also those cut short.
  void finish_windows(const Choice& choice, HeadRows<T> entries, int64_t at, bool last) {
    for (int level = 1; level < pyramid_.levels; ++level) {
      const int64_t window = pyramid_.windows[level];
      if (at % window != 0 && !last) return;
      const int64_t index = (at - 1) / window - static_cast<int64_t>(rule_.reach);
      if (choice.has(level, window, index)) {
        row_.store_quotient(entries[choice.place(level, window, index)], sum(level), divisor<T>(rule_, window), n_);
      }
      if (level + 1 < pyramid_.levels) row_.add(sum(level + 1), sum(level), n_);
      std::fill(sum(level), sum(level) + n_, A{0});
    }
  }

  const Pyramid& pyramid_;
  rules::WindowRule rule_;
  int64_t n_;
  int64_t piece_;        // of a window of level 1
  std::vector<A> sums_;  // [levels, head_dim]; the open window of each level, of 0 its piece; zero between runs
  const RowFunctions<T>& row_ = rows().of<T>();
};

// Spreads entries over the tokens of one head within units [begin, end).
template <class T>
class WindowSpreader {
  using A = AccumulatorOf<T>;

 public:
  static constexpr bool kSums = false;

  WindowSpreader(const Pyramid& pyramid, rules::WindowRule rule, int64_t head_dim)
      : pyramid_(pyramid),
        rule_(rule),
        n_(head_dim),
        bases_(static_cast<size_t>((pyramid.levels + 1) * head_dim)),
        sum_(static_cast<size_t>(head_dim)),
        narrowed_(static_cast<size_t>(head_dim)) {}

  void run(const Choice& choice, HeadRows<const T> entries, HeadRows<T> tokens, HeadRows<const T> added, int64_t begin,
           int64_t end) {
    const int64_t shift = static_cast<int64_t>(rule_.reach);
    const int64_t first = std::max<int64_t>(0, begin - shift);
    const int64_t last = std::min(choice.tokens, end - shift);
    base_[pyramid_.levels] = bases_.data() + pyramid_.levels * n_;  // zeros
    const int64_t finest = pyramid_.levels > 1 ? pyramid_.windows[1] : last - first;
    int64_t next = first;  // the token at which a window begins
    for (int64_t token = first; token < last; ++token) {
      if (token == next) {
        refresh(choice, entries, token, token == first);
        next = (token + shift) / finest * finest + finest - shift;
      }
      const bool chosen = rules::is_chosen(choice.mask[token], 0);
      const T* entry = chosen ? entries[rules::place(choice.mask[token], choice.prefix[token], 0)] : nullptr;
      if (added.data != nullptr) {
        if (chosen) row_.add_quotient(sum_.data(), base_[1], entry, A{1}, n_);
        row_.store_sum(tokens[token], chosen ? sum_.data() : base_[1], added[token], n_);
      } else if (chosen) {
        row_.store_sum(tokens[token], base_[1], entry, n_);
      } else {
        std::memcpy(tokens[token], narrowed_.data(), static_cast<size_t>(n_) * sizeof(T));
      }
    }
  }

 private:
  // base_[l] is the sum of what levels l and coarser give to this token; made anew from the coarsest level whose
  // window begins here.
  void refresh(const Choice& choice, HeadRows<const T> entries, int64_t token, bool all) {
    const int64_t u = token + static_cast<int64_t>(rule_.reach);
    int level = pyramid_.levels - 1;
    if (!all) {
      while (level > 1 && u % pyramid_.windows[level] != 0) --level;
    }
    for (; level >= 1; --level) {
      const int64_t window = pyramid_.windows[level];
      const int64_t index = rules::entry_reaching(rule_.reach, window, token);
      base_[level] = base_[level + 1];
      if (choice.has(level, window, index)) {
        A* own = bases_.data() + level * n_;
        row_.add_quotient(own, base_[level + 1], entries[choice.place(level, window, index)], divisor<T>(rule_, window),
                          n_);
        base_[level] = own;
      }
    }
    row_.store_quotient(narrowed_.data(), base_[1], A{1}, n_);
  }

  const Pyramid& pyramid_;
  rules::WindowRule rule_;
  int64_t n_;
  std::vector<A> bases_;     // [levels + 1, head_dim]; the last is zero
  std::vector<A> sum_;       // of one token
  std::vector<T> narrowed_;  // base_[1] in the stored type
  const A* base_[kMaxLevels + 1] = {};
  const RowFunctions<T>& row_ = rows().of<T>();
};

// Every piece of work, in parallel, each thread with a walker of its own.
template <template <class> class Walker>
void walk(std::span<const Pair> pairs, const ConstSelection& selection, rules::WindowRule rule,
          const Executor& executor) {
  const Sequences& sequences = selection.sequences;
  const Pyramid& pyramid = sequences.method.pyramid;
  const int64_t length = rules::ceil_div(kTokensPerWalk, pyramid.coarsest()) * pyramid.coarsest();
  const int64_t head_dim = pairs[0].source.head_dim();
  int64_t heads = 0;
  for (const Pair& pair : pairs) heads += pair.source.heads();
  const auto pieces = sequences.pieces(
      [&](int64_t index) { return rules::pieces_of(sequences.at(index).tokens, rule.reach, length) * heads; });
  const int64_t grain = std::max<int64_t>(1, kNumbersPerPiece / (std::min(length, sequences.longest()) * head_dim));
  visit(pairs[0].source.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    executor.parallel_for(0, pieces.total(), grain, [&](int64_t first, int64_t last) {
      Walker<T> walker(pyramid, rule, head_dim);
      for (int64_t item = first; item < last; ++item) {
        const auto [index, piece] = pieces.at(item);
        const Sequence sequence = sequences.at(index);
        // Heads change fastest: rows of all heads of a token are often neighbours in memory.
        int64_t head = piece % heads;
        size_t which = 0;
        while (head >= pairs[which].source.heads()) head -= pairs[which++].source.heads();
        const auto& [source, target, added] = pairs[which];
        const int64_t start = selection.start(sequence, head / (source.heads() / selection.kv_heads));
        const int64_t begin = piece / heads * length;
        const int64_t tokens_at = sequence.token_offset, entries_at = 0;  // places count within the row
        walker.run({selection.mask + start, selection.prefix + start, sequence.tokens},
                   rows_of<T>(source, sequence.row, head, Walker<T>::kSums ? tokens_at : entries_at),
                   rows_of<T>(target, sequence.row, head, Walker<T>::kSums ? entries_at : tokens_at),
                   added.data == nullptr ? HeadRows<const T>{} : rows_of<T>(added, sequence.row, head, tokens_at),
                   begin, begin + length);
      }
    });
  });
}

}  // namespace

void sum_windows(std::span<const Pair> pairs, const ConstSelection& selection, rules::WindowRule rule,
                 const Executor& executor) {
  walk<WindowSummer>(pairs, selection, rule, executor);
}

void spread_windows(std::span<const Pair> pairs, const ConstSelection& selection, rules::WindowRule rule,
                    const Executor& executor) {
  walk<WindowSpreader>(pairs, selection, rule, executor);
}

}  // namespace lighthouse::cpu
