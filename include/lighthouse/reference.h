// The oracle: the method in plain loops and float64, straight from METHOD's text and sharing no rule with the fast
// code. Slow by design. Everything else here is compared with it.
//
// Arrays are without gaps: query, output [rows, Hq, tokens, D]; key, value [rows, Hkv, tokens, D]; scores
// [rows, Hkv, tokens].
#pragma once

#include <cstdint>
#include <vector>

#include "lighthouse/sequences.h"

namespace lighthouse::reference {

struct Entry {
  int level;
  int64_t index;
  bool operator==(const Entry&) const = default;
};

struct Shape {
  int64_t query_heads, kv_heads, head_dim;
};

// Norms as float32, a group's maximum for the query.
void score(const Sequences& sequences, const Shape& shape, const double* query, const double* key, float* query_score,
           float* key_score);

// The entries of one sequence in causal order, for one key-value head. Scores: of its first token and on.
std::vector<Entry> select(const Method& method, const Sequence& sequence, const float* query_score,
                          const float* key_score);

struct AttentionArgs {
  Sequences sequences;
  Shape shape;
  const double *query, *key, *value;
  const float *query_score, *key_score;
  double scale = 0.0;  // 0 means 1/sqrt(D)
};

// Lighthouse attention with the choice made from the given scores, and the local window's part.
void attention(const AttentionArgs& args, double* output);

// Its gradients, by the chain rule over the same loops.
void attention_backward(const AttentionArgs& args, const double* grad_output, double* grad_query, double* grad_key,
                        double* grad_value);

}  // namespace lighthouse::reference
