// The oracle: the method in plain loops and float64, straight from METHOD's text and sharing no rule with the fast
// code. Slow by design. Everything else here is compared with it.
//
// Arrays are without gaps: query, output [rows, Hq, tokens, D]; key, value [rows, Hkv, tokens, D]; scores
// [rows, Hkv, tokens].
#pragma once

#include <cstdint>
#include <vector>

#include "lighthouse/plan.h"

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
void score(const Plan& plan, const Shape& shape, const double* query, const double* key, float* query_score,
           float* key_score);

// The entries of one sequence in causal order, for one key-value head. Scores: [tokens] of that row and head.
std::vector<Entry> select(const Plan& plan, const float* query_score, const float* key_score);

// Lighthouse attention with the choice made from the given scores; scale 0 means 1/sqrt(D).
void attention(const Plan& plan, const Shape& shape, const double* query, const double* key, const double* value,
               const float* query_score, const float* key_score, double scale, double* output);

// Its gradients, by the chain rule over the same loops.
void attention_backward(const Plan& plan, const Shape& shape, const double* query, const double* key,
                        const double* value, const float* query_score, const float* key_score, double scale,
                        const double* grad_output, double* grad_query, double* grad_key, double* grad_value);

}  // namespace lighthouse::reference
