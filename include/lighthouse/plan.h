// What follows from lengths and settings alone, before any data is seen: where the sequences lie, how long their
// sub-sequences are. Checked once when made, plain data afterwards, passed on whole.
#pragma once

#include <cstdint>
#include <string>

#include "lighthouse/pyramid.h"

namespace lighthouse {

// Tokens that attend to one another and to no others: a row of the batch. Offsets count within the row.
struct Sequence {
  int64_t row;           // index into the batch
  int64_t token_offset;  // its first token; windows are counted from here
  int64_t tokens;
  int64_t entry_offset;  // the place of its first entry in the row's sub-sequence
  int64_t entries;       // the length of its sub-sequence
};

// Where sequences lie in [rows, heads, tokens, head_dim] and in [rows, heads, entries, head_dim].
struct Layout {
  Pyramid pyramid;
  int64_t rows = 0;
  int64_t tokens = 0;   // per row
  int64_t entries = 0;  // per row: S

  constexpr int64_t sequences() const { return rows; }
  constexpr Sequence sequence(int64_t index) const { return {index, 0, tokens, 0, entries}; }
};

struct Plan {
  Layout layout;
  TopK topk;
  bool cover_start = true;  // entry 0 of every level above 0 is always a parent

  int64_t length() const { return layout.entries; }
  double kept_share() const;  // the part of the tokens that are in at level 0
  std::string str() const;
};

// `rows` sequences of `tokens` tokens each. Throws std::invalid_argument.
Plan make_plan(int64_t rows, int64_t tokens, const Pyramid& pyramid, const TopK& topk, bool cover_start = true);

}  // namespace lighthouse
