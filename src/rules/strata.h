// How the coarsest level is cut into strata, and how many entries each contributes (METHOD 3).
// Remainders of entries and budget go to the first strata, so there are at most three kinds of strata and every
// size and offset is a sum of three products.
#pragma once

#include <cstdint>
#include <iterator>

#include "lighthouse/sequences.h"
#include "rules/platform.h"

namespace lighthouse::rules {

inline constexpr int64_t kParentsPerStratum = 128;

LIGHTHOUSE_HOST_DEVICE inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LIGHTHOUSE_HOST_DEVICE inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
LIGHTHOUSE_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Stratum {
  int64_t first_entry;  // of the coarsest level, counted from the sequence's start
  int64_t entries;      // of the coarsest level
  int64_t budget;       // parents per level
  int64_t place;        // of its first chosen entry, counted from the sequence's first
};

LIGHTHOUSE_HOST_DEVICE inline Stratum stratum_at(const Strata& strata, int64_t index) {
  Stratum stratum{0, 0, 0, 0};
  for (const Strata::Kind& kind : strata.kinds) {
    const int64_t before = smaller(index, kind.count);
    stratum.first_entry += before * kind.entries;
    stratum.place += before * kind.length;
    stratum.entries = kind.entries;
    stratum.budget = kind.budget;
    index -= before;
    if (before < kind.count) break;
  }
  return stratum;
}

// The place of the tail's first token.
LIGHTHOUSE_HOST_DEVICE inline int64_t tail_place(const Strata& strata) {
  int64_t total = 0;
  for (const Strata::Kind& kind : strata.kinds) total += kind.count * kind.length;
  return total;
}

// Entries of `level` that a stratum puts into the sub-sequence: all of the coarsest, below that the children of
// parents.
inline int64_t chosen_at_level(const Pyramid& pyramid, int64_t coarsest_entries, int64_t budget, int level) {
  int64_t chosen = coarsest_entries;
  for (int l = pyramid.levels - 1; l > level; --l) {
    chosen = smaller(budget, chosen) * (pyramid.windows[l] / pyramid.windows[l - 1]);
  }
  return chosen;
}

// The length of the sub-sequence, and how many of its entries are tokens.
inline int64_t chosen_entries(const Strata& strata) { return tail_place(strata) + strata.tail; }

inline int64_t chosen_tokens(const Pyramid& pyramid, const Strata& strata) {
  int64_t total = strata.tail;
  for (const auto& kind : strata.kinds) total += kind.count * chosen_at_level(pyramid, kind.entries, kind.budget, 0);
  return total;
}

inline Strata make_strata(const Pyramid& pyramid, int64_t tokens, int64_t parents) {
  const int64_t coarsest_entries = tokens / pyramid.coarsest();
  Strata strata{};
  strata.tail = tokens - coarsest_entries * pyramid.coarsest();
  strata.count = larger(1, ceil_div(parents, kParentsPerStratum));
  strata.filled = smaller(strata.count, coarsest_entries);

  const int64_t more_entries = coarsest_entries % strata.count;  // the first so many have one entry more
  const int64_t more_budget = parents % strata.count;            // and the first so many one parent more
  const int64_t ends[] = {smaller(more_entries, more_budget), larger(more_entries, more_budget), strata.count};
  int64_t begin = 0;
  for (size_t i = 0; i < std::size(ends); ++i) {
    Strata::Kind& kind = strata.kinds[i];
    kind.count = ends[i] - begin;
    kind.entries = coarsest_entries / strata.count + (begin < more_entries ? 1 : 0);
    kind.budget = parents / strata.count + (begin < more_budget ? 1 : 0);
    for (int level = 0; level < pyramid.levels; ++level) {
      kind.length += chosen_at_level(pyramid, kind.entries, kind.budget, level);
    }
    begin = ends[i];
  }
  return strata;
}

}  // namespace lighthouse::rules
