#include "cpu/windows.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/rows.h"
#include "rules/strata.h"

namespace lighthouse::cpu {
namespace {

constexpr int64_t kTokensPerBlock = 64;  // at least; enough to make a piece of work worth its start

// Tokens that one piece of work covers, in units u = token + reach: whole coarsest windows, so that no entry's sum
// and no token is shared between pieces.
int64_t block_length(const Pyramid& pyramid) {
  return rules::ceil_div(kTokensPerBlock, pyramid.coarsest()) * pyramid.coarsest();
}

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
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

template <class T>
Rows<const T> rows_of(const ConstView& view, int64_t row, int64_t head, int64_t first) {
  return {row_at<T>(view, row, head, first), view.strides[2]};
}

template <class T>
Rows<T> rows_of(const View& view, int64_t row, int64_t head, int64_t first) {
  return {row_at<T>(view, row, head, first), view.strides[2]};
}

template <class T>
AccumulatorOf<T> divisor(WindowRule rule, int64_t window) {
  return rule.weight == Weight::mean ? static_cast<AccumulatorOf<T>>(window) : 1;
}

// Sums the windows of one head within units [begin, end).
template <class T>
class WindowSummer {
  using A = AccumulatorOf<T>;

 public:
  WindowSummer(const Pyramid& pyramid, WindowRule rule, int64_t head_dim)
      : pyramid_(pyramid),
        rule_(rule),
        n_(head_dim),
        piece_(pyramid.levels > 1 ? rules::piece_length(pyramid.windows[1], rules::kLongestSum) : 0),
        sums_(static_cast<size_t>(pyramid.levels * head_dim)) {}

  void run(const Choice& choice, Rows<const T> tokens, Rows<T> entries, int64_t begin, int64_t end) {
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

  void add_in_pieces(Rows<const T> tokens, int64_t first, int64_t last, int64_t shift) {
    while (first < last) {
      const int64_t next = std::min(last, ((first + shift) / piece_ + 1) * piece_ - shift);
      row_.add_rows(sum(0), tokens[first], tokens.stride, next - first, n_);
      row_.add(sum(1), sum(0), n_);
      std::fill(sum(0), sum(0) + n_, A{0});
      first = next;
    }
  }

  // Writes out and passes on every window that ends at unit `at`; at the last one also those cut short.
  void finish_windows(const Choice& choice, Rows<T> entries, int64_t at, bool last) {
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
  WindowRule rule_;
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
  WindowSpreader(const Pyramid& pyramid, WindowRule rule, int64_t head_dim)
      : pyramid_(pyramid),
        rule_(rule),
        n_(head_dim),
        bases_(static_cast<size_t>((pyramid.levels + 1) * head_dim)),
        narrowed_(static_cast<size_t>(head_dim)) {}

  void run(const Choice& choice, Rows<const T> entries, Rows<T> tokens, int64_t begin, int64_t end) {
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
      if (rules::is_chosen(choice.mask[token], 0)) {
        const int64_t place = rules::place(choice.mask[token], choice.prefix[token], 0);
        row_.store_sum(tokens[token], base_[1], entries[place], n_);
      } else {
        std::memcpy(tokens[token], narrowed_.data(), static_cast<size_t>(n_) * sizeof(T));
      }
    }
  }

 private:
  // base_[l] is the sum of what levels l and coarser give to this token; made anew from the coarsest level whose
  // window begins here.
  void refresh(const Choice& choice, Rows<const T> entries, int64_t token, bool all) {
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
  WindowRule rule_;
  int64_t n_;
  std::vector<A> bases_;     // [levels + 1, head_dim]; the last is zero
  std::vector<T> narrowed_;  // base_[1] in the stored type
  const A* base_[kMaxLevels + 1] = {};
  const RowFunctions<T>& row_ = rows().of<T>();
};

// Calls body(tensor, sequence, head, begin, end) for every block of every head of every tensor, in parallel.
template <class Tensors, class Body>
void for_each_block(const Layout& layout, WindowRule rule, const Tensors& tensors, const Executor& executor,
                    const Body& body) {
  const int64_t length = block_length(layout.pyramid);
  const int64_t blocks = rules::ceil_div(layout.tokens + static_cast<int64_t>(rule.reach), length);
  int64_t heads = 0;
  for (const auto& tensor : tensors) heads += tensor.tokens.heads();
  const int64_t numbers = std::min(length, layout.tokens) * tensors[0].tokens.head_dim();
  const int64_t grain = std::max<int64_t>(1, kNumbersPerPiece / numbers);
  executor.parallel_for(0, layout.sequences() * heads * blocks, grain, [&](int64_t first, int64_t last) {
    body([&](const auto& work) {
      for (int64_t item = first; item < last; ++item) {
        // Heads change fastest: rows of all heads of a token are often neighbours in memory.
        const Sequence sequence = layout.sequence(item / (heads * blocks));
        int64_t head = item % heads;
        size_t tensor = 0;
        while (head >= tensors[tensor].tokens.heads()) head -= tensors[tensor++].tokens.heads();
        const int64_t begin = item / heads % blocks * length;
        work(tensors[tensor], sequence, head, begin, begin + length);
      }
    });
  });
}

Choice choice_of(const Layout& layout, const ConstSelection& selection, const Sequence& sequence, int64_t head,
                 int64_t heads) {
  const int64_t kv_head = head / (heads / selection.kv_heads);
  const int64_t start = (sequence.row * selection.kv_heads + kv_head) * layout.tokens + sequence.token_offset;
  return {selection.mask + start, selection.prefix + start, sequence.tokens};
}

}  // namespace

void sum_windows(const Layout& layout, WindowRule rule, std::span<const TokensToEntries> tensors,
                 const ConstSelection& selection, const Executor& executor) {
  visit(tensors[0].tokens.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_each_block(layout, rule, tensors, executor, [&](const auto& each) {
      WindowSummer<T> summer(layout.pyramid, rule, tensors[0].tokens.head_dim());
      each([&](const TokensToEntries& tensor, const Sequence& sequence, int64_t head, int64_t begin, int64_t end) {
        summer.run(choice_of(layout, selection, sequence, head, tensor.tokens.heads()),
                   rows_of<T>(tensor.tokens, sequence.row, head, sequence.token_offset),
                   rows_of<T>(tensor.entries, sequence.row, head, 0), begin, end);
      });
    });
  });
}

void spread_windows(const Layout& layout, WindowRule rule, std::span<const EntriesToTokens> tensors,
                    const ConstSelection& selection, const Executor& executor) {
  visit(tensors[0].tokens.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_each_block(layout, rule, tensors, executor, [&](const auto& each) {
      WindowSpreader<T> spreader(layout.pyramid, rule, tensors[0].tokens.head_dim());
      each([&](const EntriesToTokens& tensor, const Sequence& sequence, int64_t head, int64_t begin, int64_t end) {
        spreader.run(choice_of(layout, selection, sequence, head, tensor.tokens.heads()),
                     rows_of<T>(tensor.entries, sequence.row, head, 0),
                     rows_of<T>(tensor.tokens, sequence.row, head, sequence.token_offset), begin, end);
      });
    });
  });
}

}  // namespace lighthouse::cpu
