// Which tokens attend to one another: the one description that every function asks, made and checked once from lengths
// and settings, before any data is seen. Plain data, passed on whole, to kernels too.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

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
  bool padding = false;  // no text: nothing of it is chosen, its output and gradients are zero
};

// Work on sequences in pieces, none of which lies in two; numbered through, the first sequence's first.
struct Pieces {
  struct At {
    int64_t sequence;
    int64_t piece;  // within the sequence
  };
  constexpr int64_t of(int64_t sequence) const { return starts ? starts[sequence + 1] - starts[sequence] : each; }
  constexpr int64_t before(int64_t sequence) const { return starts ? starts[sequence] : sequence * each; }
  constexpr int64_t total() const { return before(sequences); }
  constexpr int64_t most() const { return each; }  // of any sequence
  constexpr At at(int64_t index) const {
    if (starts == nullptr) {
      const int64_t sequence = index / each;
      return {sequence, index - sequence * each};  // one division
    }
    int64_t first = 0, last = sequences;  // the last that starts at or before it
    while (last - first > 1) {
      const int64_t middle = first + (last - first) / 2;
      (starts[middle] <= index ? first : last) = middle;
    }
    return {first, index - starts[first]};
  }
  int64_t sequences, each;
  const int64_t* starts = nullptr;  // [sequences + 1]; null: closed formulas, every sequence has as many
};

// Pieces with their table, where they need one.
class OwnedPieces : public Pieces {
 public:
  template <class Function>
  OwnedPieces(int64_t count, bool alike, const Function& of) : Pieces{count, alike ? of(0) : 0} {
    if (alike) return;
    table_.assign(1, 0);
    for (int64_t index = 0; index < count; ++index) {
      const int64_t own = of(index);
      each = own > each ? own : each;
      table_.push_back(table_.back() + own);
    }
    starts = table_.data();
  }
  OwnedPieces(const OwnedPieces&) = delete;
  OwnedPieces& operator=(const OwnedPieces&) = delete;

 private:
  std::vector<int64_t> table_;
};

// A sequence of its own length among others, with its strata.
struct Document {
  Sequence sequence;
  Strata strata;
};

// The sequences in [rows, heads, tokens, head_dim], their sub-sequences in [rows, heads, entries, head_dim]: one a row,
// all alike, or documents one behind the other in one row (Documents).
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
  // Of a table that a Documents made, which is only looked at for its sums.
  static Sequences of_table(std::span<const Document> table, const Method& method);

  constexpr bool alike() const { return documents == nullptr; }
  constexpr int64_t count() const { return alike() ? rows : document_count; }
  constexpr Sequence at(int64_t index) const {
    if (!alike()) return documents[index].sequence;
    Sequence sequence = each;
    sequence.row = index;
    return sequence;
  }
  constexpr const Strata& strata(int64_t index) const { return alike() ? each_strata : documents[index].strata; }

  // `of(index)` pieces of work on each sequence.
  template <class Function>
  OwnedPieces pieces(const Function& of) const {
    return {count(), alike(), of};
  }
  int64_t longest() const { return each.tokens; }  // tokens of the longest sequence
  double kept_share() const;                       // the part of the tokens that are in at level 0
  std::string str() const;
  // Closed formulas: the sequence of row `i` is `each` with row=i. Of documents `each` has the most tokens of any.
  Sequence each{};
  Strata each_strata{};
  const Document* documents = nullptr;  // the table's owner is a Documents
  int64_t document_count = 0;
};

// Documents one behind the other in one row (METHOD 7a), padding among them. It owns the table that its `sequences()`
// and all their copies point to, so it must outlive them.
class Documents {
 public:
  // A document, or padding. `row`: of the rows that it came in, from 0 on; a whole number of parents is shared out
  // within each of these by length. A length of 0 is left out.
  struct Length {
    int64_t tokens;
    int64_t row = 0;
    bool padding = false;
  };

  // Throws std::invalid_argument.
  Documents(std::span<const Length> lengths, const Method& method);
  Documents(const Documents&) = delete;
  Documents& operator=(const Documents&) = delete;

  const Sequences& sequences() const { return sequences_; }

 private:
  std::vector<Document> table_;
  Sequences sequences_;
};

}  // namespace lighthouse
