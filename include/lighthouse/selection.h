// The whole choice: one byte and one integer per token (METHOD 4), and the sequences that it was made for.
#pragma once

#include <cstdint>

#include "lighthouse/sequences.h"

namespace lighthouse {

// Both arrays are [rows, kv_heads, tokens] without gaps. Bit l of mask[t] says that the entry of level l whose window
// ends at t is chosen; prefix[t] is the place of the first such entry in the row's sub-sequence.
template <class Mask, class Prefix>
struct BasicSelection {
  Sequences sequences;
  int64_t kv_heads = 0;
  Mask* mask = nullptr;
  Prefix* prefix = nullptr;

  // Where a sequence's first token is in the arrays.
  constexpr int64_t start(const Sequence& sequence, int64_t kv_head) const {
    return (sequence.row * kv_heads + kv_head) * sequences.tokens + sequence.token_offset;
  }
};

using Selection = BasicSelection<uint8_t, int32_t>;

struct ConstSelection : BasicSelection<const uint8_t, const int32_t> {
  ConstSelection() = default;
  ConstSelection(const Sequences& of, int64_t heads, const uint8_t* masks, const int32_t* prefixes)
      : BasicSelection{of, heads, masks, prefixes} {}
  ConstSelection(const Selection& selection)
      : BasicSelection{selection.sequences, selection.kv_heads, selection.mask, selection.prefix} {}
};

}  // namespace lighthouse
