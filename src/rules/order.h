// Where a chosen entry stands and which tokens it reaches (METHOD 1, 4 and 6). Tokens count from the sequence's start.
#pragma once

#include <cstdint>

#include "rules/platform.h"
#include "rules/strata.h"

namespace lighthouse::rules {

LIGHTHOUSE_HOST_DEVICE inline int bits_set(uint32_t byte) { return __builtin_popcount(byte); }

LIGHTHOUSE_HOST_DEVICE inline int64_t last_token(int64_t window, int64_t index) { return (index + 1) * window - 1; }

LIGHTHOUSE_HOST_DEVICE inline bool is_chosen(uint8_t mask, int level) { return (mask >> level) & 1; }

// The place of the entry of `level` whose window ends at the token that has this mask and prefix.
LIGHTHOUSE_HOST_DEVICE inline int64_t place(uint8_t mask, int32_t prefix, int level) {
  return int64_t{prefix} + bits_set(mask & ((1u << level) - 1u));
}

// The two ways between tokens and entries differ by one token: a window of w tokens is pooled into the entry that ends
// with it, and the entry's output goes to the w tokens from its last one on. Counted as u = token + kReach, both
// cut the tokens at multiples of w.
enum class Reach : int { pooled = 0, written = 1 };

// Which windows, and whether what is meant is their mean, over the full length, or their sum.
struct WindowRule {
  Reach reach;
  bool mean;
};

inline constexpr WindowRule kPooling{Reach::pooled, true};
inline constexpr WindowRule kWriteBack{Reach::written, false};

// So many pieces of `length` hold a sequence counted in u.
LIGHTHOUSE_HOST_DEVICE inline int64_t pieces_of(int64_t tokens, Reach reach, int64_t length) {
  return ceil_div(tokens + static_cast<int64_t>(reach), length);
}

// The only entry of a level that token t is pooled into, or that writes to it; negative where there is none.
LIGHTHOUSE_HOST_DEVICE inline int64_t entry_reaching(Reach reach, int64_t window, int64_t token) {
  const int64_t shift = static_cast<int64_t>(reach);
  return (token + shift) / window - shift;
}

// The order of additions is a rule too: all devices give the same bits. A window of level 1 is added up token by token,
// one of more than kLongestSum tokens piece by piece first; a window of a coarser level is the sum of the finer ones'
// sums, in order.
inline constexpr int64_t kLongestSum = 64;
inline constexpr int64_t kShortestPiece = 8;   // shorter ones cost more than long ones: a window of 67, say,
inline constexpr int64_t kLongestPiece = 512;  // is then one piece

// The pieces of a window: all of one length, the longest up to `longest` that divides it.
LIGHTHOUSE_HOST_DEVICE inline int64_t piece_length(int64_t window, int64_t longest) {
  int64_t piece = smaller(window, longest);
  while (window % piece != 0) --piece;
  return piece < kShortestPiece && window <= kLongestPiece ? window : piece;
}

}  // namespace lighthouse::rules
