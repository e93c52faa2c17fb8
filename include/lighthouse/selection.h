// The whole choice: one byte and one integer per token (METHOD 4).
#pragma once

#include <cstdint>

namespace lighthouse {

// Both arrays are [rows, kv_heads, tokens] without gaps. Bit l of mask[t] says that the entry of level l whose window
// ends at t is chosen; prefix[t] is the place of the first such entry in the row's sub-sequence.
template <class Mask, class Prefix>
struct BasicSelection {
  Mask* mask = nullptr;
  Prefix* prefix = nullptr;
  int64_t kv_heads = 0;
};

using Selection = BasicSelection<uint8_t, int32_t>;

struct ConstSelection : BasicSelection<const uint8_t, const int32_t> {
  ConstSelection() = default;
  ConstSelection(const uint8_t* masks, const int32_t* prefixes, int64_t heads)
      : BasicSelection{masks, prefixes, heads} {}
  ConstSelection(const Selection& selection) : BasicSelection{selection.mask, selection.prefix, selection.kv_heads} {}
};

}  // namespace lighthouse
