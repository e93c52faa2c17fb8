// How the coarsest level is cut into strata, and how many entries each contributes (METHOD 3).
// Remainders of entries and budget go to the first strata, so there are at most three kinds of strata and every
// size and offset is a sum of three products.
#pragma once

#include <cstdint>

#include "lighthouse/pyramid.h"
#include "rules/platform.h"

namespace lighthouse::rules {

inline constexpr int64_t kParentsPerStratum = 128;
inline constexpr int kStratumKinds = 3;

LIGHTHOUSE_HOST_DEVICE inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LIGHTHOUSE_HOST_DEVICE inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
LIGHTHOUSE_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Stratum {
  int64_t first_entry;  // of the coarsest level, counted from the sequence's start
  int64_t entries;      // of the coarsest level
  int64_t budget;       // parents per level
  int64_t place;        // of its first chosen entry, counted from the sequence's first
};

// Entries of `level` that a stratum puts into the sub-sequence: all of the coarsest, below that the children of
// parents.
LIGHTHOUSE_HOST_DEVICE inline int64_t chosen_at_level(const Pyramid& pyramid, int64_t coarsest_entries, int64_t budget,
                                                      int level) {
  int64_t chosen = coarsest_entries;
  for (int l = pyramid.levels - 1; l > level; --l) {
    chosen = smaller(budget, chosen) * (pyramid.windows[l] / pyramid.windows[l - 1]);
  }
  return chosen;
}

LIGHTHOUSE_HOST_DEVICE inline int64_t chosen_in_stratum(const Pyramid& pyramid, int64_t coarsest_entries,
                                                        int64_t budget) {
  int64_t total = 0;
  for (int level = 0; level < pyramid.levels; ++level) {
    total += chosen_at_level(pyramid, coarsest_entries, budget, level);
  }
  return total;
}

struct Strata {
  struct Kind {
    int64_t count;    // strata of this kind
    int64_t entries;  // of the coarsest level, each
    int64_t budget;   // each
    int64_t length;   // chosen entries, each
  };
  Kind kinds[kStratumKinds];
  int64_t count;  // T
  int64_t tail;   // tokens behind the last full coarsest window

  LIGHTHOUSE_HOST_DEVICE Stratum at(int64_t index) const {
    Stratum stratum{0, 0, 0, 0};
    for (const Kind& kind : kinds) {
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
  LIGHTHOUSE_HOST_DEVICE int64_t tail_place() const {
    int64_t total = 0;
    for (const Kind& kind : kinds) total += kind.count * kind.length;
    return total;
  }

  LIGHTHOUSE_HOST_DEVICE int64_t length() const { return tail_place() + tail; }

  LIGHTHOUSE_HOST_DEVICE int64_t chosen_tokens(const Pyramid& pyramid) const {
    int64_t total = tail;
    for (const Kind& kind : kinds) total += kind.count * chosen_at_level(pyramid, kind.entries, kind.budget, 0);
    return total;
  }
};

LIGHTHOUSE_HOST_DEVICE inline Strata make_strata(const Pyramid& pyramid, int64_t tokens, int64_t parents) {
  const int64_t coarsest_window = pyramid.windows[pyramid.levels - 1];
  const int64_t coarsest_entries = tokens / coarsest_window;
  Strata strata{};
  strata.tail = tokens - coarsest_entries * coarsest_window;
  strata.count = larger(1, ceil_div(parents, kParentsPerStratum));

  const int64_t more_entries = coarsest_entries % strata.count;  // the first so many have one entry more
  const int64_t more_budget = parents % strata.count;            // and the first so many one parent more
  const int64_t ends[kStratumKinds] = {smaller(more_entries, more_budget), larger(more_entries, more_budget),
                                       strata.count};
  int64_t begin = 0;
  for (int i = 0; i < kStratumKinds; ++i) {
    Strata::Kind& kind = strata.kinds[i];
    kind.count = ends[i] - begin;
    kind.entries = coarsest_entries / strata.count + (begin < more_entries ? 1 : 0);
    kind.budget = parents / strata.count + (begin < more_budget ? 1 : 0);
    kind.length = chosen_in_stratum(pyramid, kind.entries, kind.budget);
    begin = ends[i];
  }
  return strata;
}

}  // namespace lighthouse::rules
