// Who comes first when parents are picked (METHOD 2 and 3): higher score, NaN after everything, -0 equal to +0, lower
// index among equals. Scores are compared as integers, so no two compilers can disagree.
#pragma once

#include <cstdint>
#include <cstring>

#include "rules/platform.h"

namespace lighthouse::rules {

// A score as an integer that grows with it; NaN is the largest, so that the maximum over a window keeps it.
using Rank = uint32_t;
inline constexpr Rank kNaNRank = 0xFFFFFFFFu;

LIGHTHOUSE_HOST_DEVICE inline Rank rank_of(float score) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof bits);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return kNaNRank;
  if (magnitude == 0) return 0x80000000u;
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

// For picking, NaN comes last instead: the addition wraps it to zero and moves all others up by one.
LIGHTHOUSE_HOST_DEVICE inline uint32_t pick_rank(Rank rank) { return rank + 1u; }

// Entry 0 of a level, when the start is to be covered.
inline constexpr Rank kInfinityRank = 0xFF800000u;

// Of two scores the one that a window holding both has.
LIGHTHOUSE_HOST_DEVICE inline float larger_score(float a, float b) { return rank_of(a) < rank_of(b) ? b : a; }

struct Candidate {
  uint32_t rank;  // pick_rank of its score
  int64_t index;  // within its level
};

LIGHTHOUSE_HOST_DEVICE inline bool picked_before(const Candidate& a, const Candidate& b) {
  return a.rank != b.rank ? a.rank > b.rank : a.index < b.index;
}

// Of n parents, so many are picked by query score; the others by key score among those left.
LIGHTHOUSE_HOST_DEVICE inline int64_t parents_by_query(int64_t parents) { return parents / 2; }

}  // namespace lighthouse::rules
