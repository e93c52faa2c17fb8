// Which tokens attend to one another: the one description that every function asks, made and checked once from lengths
// and settings, before any data is seen. Plain data, passed on whole, to kernels too.
#pragma once

#include <cstdint>
#include <string>

#include "lighthouse/method.h"

namespace lighthouse {

// How a sequence's coarsest level is cut into strata (METHOD 3); at most three kinds of them, in this order.
struct Strata {
  struct Kind {
    int64_t count;    // strata of this kind
    int64_t entries;  // of the coarsest level, each
    int64_t budget;   // parents per level, each
    int64_t length;   // chosen entries, each
  };
  Kind kinds[3];
  int64_t count;   // T
  int64_t filled;  // the first so many hold entries
  int64_t tail;    // tokens after the last full coarsest window
};

// Tokens that attend to one another and to no others. Windows, strata, tail and covered start count from its first
// token; offsets count within the row.
struct Sequence {
  int64_t row;           // index into the batch
  int64_t token_offset;  // its first token
  int64_t tokens;
  int64_t entry_offset;  // the place of its first entry in the row's sub-sequence
  int64_t entries;       // the length of its sub-sequence
  int64_t parents;       // k
};

// Work on sequences in pieces, none of which lies in two; numbered through, the first sequence's first.
struct Pieces {
  struct At {
    int64_t sequence;
    int64_t piece;  // within the sequence
  };
  constexpr int64_t of(int64_t) const { return each; }
  constexpr int64_t before(int64_t sequence) const { return sequence * each; }
  constexpr int64_t total() const { return sequences * each; }
  constexpr int64_t most() const { return each; }  // of any sequence
  constexpr At at(int64_t index) const {
    const int64_t sequence = index / each;
    return {sequence, index - sequence * each};  // one division
  }
  int64_t sequences, each;  // closed formulas: every sequence has as many
};

// The sequences in [rows, heads, tokens, head_dim], their sub-sequences in [rows, heads, entries, head_dim].
struct Sequences {
  Method method;
  int64_t rows = 0;
  int64_t tokens = 0;   // of a row
  int64_t entries = 0;  // of a row: S

  // A sequence per row, each of `tokens` tokens; without entries where nothing is chosen (select_topk 0). Throws
  // std::invalid_argument.
  static Sequences of_rows(int64_t rows, int64_t tokens, const Method& method);
  // As of_rows, for a choice made elsewhere: k and strata are not known and zero, and `select` refuses it.
  static Sequences of_choice(int64_t rows, int64_t tokens, int64_t entries, const Pyramid& pyramid);

  constexpr int64_t count() const { return rows; }
  constexpr Sequence at(int64_t index) const {
    Sequence sequence = each;
    sequence.row = index;
    return sequence;
  }
  constexpr const Strata& strata(int64_t) const { return each_strata; }

  // `of(index)` pieces of work on each sequence.
  template <class Function>
  Pieces pieces(const Function& of) const {
    return {count(), of(0)};
  }
  int64_t longest() const { return each.tokens; }  // tokens of the longest sequence
  double kept_share() const;                       // the part of the tokens that are in at level 0
  std::string str() const;
  // Closed formulas: the sequence of row `i` is `each` with row=i.
  Sequence each{};
  Strata each_strata{};
};

}  // namespace lighthouse
