// The oracle: METHOD's text turned into loops, one section at a time, in float64.
// It shares no rule with the fast code: it sorts, it keeps lists of entries, it adds to tokens one by one. Keep it so:
// what is clever here cannot be compared with anything.
#include "lighthouse/reference.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <utility>

namespace lighthouse::reference {
namespace {

using Matrix = std::vector<double>;  // [entries, head_dim] or [entries, entries]

// Tokens count from the sequence's first.
int64_t window(const Method& method, int level) { return method.pyramid.windows[static_cast<size_t>(level)]; }

int64_t first_token(const Method& method, const Entry& entry) { return entry.index * window(method, entry.level); }

int64_t last_token(const Method& method, const Entry& entry) {
  return (entry.index + 1) * window(method, entry.level) - 1;
}

// METHOD 2: the maximum over the window, NaN if it holds one; and METHOD 3's entry 0.
float entry_score(const Method& method, const Entry& entry, const float* token_score) {
  if (method.cover_start && entry.index == 0) return std::numeric_limits<float>::infinity();
  float result = -std::numeric_limits<float>::infinity();
  for (int64_t t = first_token(method, entry); t <= last_token(method, entry); ++t) {
    if (std::isnan(token_score[t])) return token_score[t];
    result = std::max(result, token_score[t]);
  }
  return result;
}

// METHOD 3's order: higher score first, NaN after everything, lower index first among equals. Returns the first
// `count` of `candidates`, which all lie on one level, and removes them.
std::vector<Entry> take_best(const Method& method, const float* token_score, int64_t count,
                             std::vector<Entry>& candidates) {
  std::vector<std::pair<float, Entry>> scored;
  for (const Entry& entry : candidates) scored.emplace_back(entry_score(method, entry, token_score), entry);
  std::sort(scored.begin(), scored.end(), [](const auto& a, const auto& b) {
    const bool a_nan = std::isnan(a.first);
    const bool b_nan = std::isnan(b.first);
    if (a_nan != b_nan) return b_nan;
    if (!a_nan && a.first != b.first) return a.first > b.first;
    return a.second.index < b.second.index;
  });
  std::vector<Entry> best;
  candidates.clear();
  for (const auto& [score, entry] : scored) {
    (static_cast<int64_t>(best.size()) < count ? best : candidates).push_back(entry);
  }
  return best;
}

// METHOD 1: means over the windows of the chosen entries.
Matrix pool(const Method& method, const std::vector<Entry>& entries, int64_t dim, const double* tokens) {
  Matrix pooled(entries.size() * static_cast<size_t>(dim), 0.0);
  for (size_t p = 0; p < entries.size(); ++p) {
    for (int64_t d = 0; d < dim; ++d) {
      double sum = 0.0;
      for (int64_t t = first_token(method, entries[p]); t <= last_token(method, entries[p]); ++t) {
        sum += tokens[t * dim + d];
      }
      pooled[p * static_cast<size_t>(dim) + static_cast<size_t>(d)] =
          sum / static_cast<double>(window(method, entries[p].level));
    }
  }
  return pooled;
}

// METHOD 7: each token gets its share of the gradient of every chosen window it lies in.
void add_pool_gradient(const Method& method, const std::vector<Entry>& entries, int64_t dim, const Matrix& grad_pooled,
                       double* grad_tokens) {
  for (size_t p = 0; p < entries.size(); ++p) {
    for (int64_t t = first_token(method, entries[p]); t <= last_token(method, entries[p]); ++t) {
      for (int64_t d = 0; d < dim; ++d) {
        grad_tokens[t * dim + d] += grad_pooled[p * static_cast<size_t>(dim) + static_cast<size_t>(d)] /
                                    static_cast<double>(window(method, entries[p].level));
      }
    }
  }
}

double dot(const double* a, const double* b, int64_t dim) {
  double sum = 0.0;
  for (int64_t d = 0; d < dim; ++d) sum += a[d] * b[d];
  return sum;
}

// METHOD 5: probabilities of the causal attention, [entries, entries], zero above the diagonal.
Matrix probabilities(const Matrix& query, const Matrix& key, int64_t entries, int64_t dim, double scale) {
  Matrix result(static_cast<size_t>(entries * entries), 0.0);
  for (int64_t i = 0; i < entries; ++i) {
    double* row = result.data() + i * entries;
    double highest = -std::numeric_limits<double>::infinity();
    for (int64_t j = 0; j <= i; ++j) {
      row[j] = scale * dot(query.data() + i * dim, key.data() + j * dim, dim);
      highest = std::max(highest, row[j]);
    }
    double total = 0.0;
    for (int64_t j = 0; j <= i; ++j) {
      row[j] = std::exp(row[j] - highest);
      total += row[j];
    }
    for (int64_t j = 0; j <= i; ++j) row[j] /= total;
  }
  return result;
}

double scale_or_default(double scale, int64_t dim) {
  return scale == 0.0 ? 1.0 / std::sqrt(static_cast<double>(dim)) : scale;
}

}  // namespace

void score(const Sequences& sequences, const Shape& shape, const double* query, const double* key, float* query_score,
           float* key_score) {
  const int64_t tokens = sequences.tokens;
  const int64_t dim = shape.head_dim;
  const int64_t group = shape.query_heads / shape.kv_heads;
  for (int64_t row = 0; row < sequences.rows; ++row) {
    for (int64_t kv_head = 0; kv_head < shape.kv_heads; ++kv_head) {
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t kv_token = (row * shape.kv_heads + kv_head) * tokens + t;
        double highest = 0.0;
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
          const double* q = query + ((row * shape.query_heads + h) * tokens + t) * dim;
          const double norm = std::sqrt(dot(q, q, dim));
          // A NaN stays: it compares false with everything.
          if (!std::isnan(highest) && !(norm <= highest)) highest = norm;
        }
        const double* k = key + kv_token * dim;
        query_score[kv_token] = static_cast<float>(highest);
        key_score[kv_token] = static_cast<float>(std::sqrt(dot(k, k, dim)));
      }
    }
  }
}

std::vector<Entry> select(const Method& method, const Sequence& sequence, const float* query_score,
                          const float* key_score) {
  if (sequence.parents == 0) return {};  // select_topk=0, padding
  const int64_t tokens = sequence.tokens;
  const int coarsest = method.pyramid.levels - 1;
  const int64_t coarse_entries = tokens / window(method, coarsest);                           // M
  const int64_t parents = sequence.parents;                                                   // k
  const int64_t strata = std::max<int64_t>(1, parents / 128 + (parents % 128 != 0 ? 1 : 0));  // T

  std::vector<Entry> chosen;
  for (int64_t i = 0; i < coarse_entries; ++i) {
    chosen.push_back({coarsest, i});
  }

  int64_t next = 0;
  for (int64_t j = 0; j < strata; ++j) {
    const int64_t size = coarse_entries / strata + (j < coarse_entries % strata ? 1 : 0);
    const int64_t budget = parents / strata + (j < parents % strata ? 1 : 0);
    if (size == 0) break;  // and so are all strata after it
    std::vector<Entry> candidates;
    for (int64_t i = next; i < next + size; ++i) {
      candidates.push_back({coarsest, i});
    }
    next += size;
    for (int level = coarsest; level >= 1; --level) {
      const int64_t count = std::min(budget, static_cast<int64_t>(candidates.size()));
      const std::vector<Entry> by_query = take_best(method, query_score, count / 2, candidates);
      const std::vector<Entry> by_key = take_best(method, key_score, count - count / 2, candidates);
      std::vector<Entry> children;
      for (const std::vector<Entry>* some : {&by_query, &by_key}) {
        for (const Entry& parent : *some) {
          const int64_t ratio = window(method, level) / window(method, level - 1);
          for (int64_t c = 0; c < ratio; ++c) {
            children.push_back({level - 1, parent.index * ratio + c});
          }
        }
      }
      chosen.insert(chosen.end(), children.begin(), children.end());
      candidates = std::move(children);
    }
  }

  for (int64_t t = coarse_entries * window(method, coarsest); t < tokens; ++t) {
    chosen.push_back({0, t});
  }

  // METHOD 4: by (last token, level).
  std::sort(chosen.begin(), chosen.end(), [&](const Entry& a, const Entry& b) {
    return std::pair(last_token(method, a), a.level) < std::pair(last_token(method, b), b.level);
  });
  return chosen;
}

namespace {

// One sequence of one key-value head: its choice, its pooled keys and values, and where its numbers are.
struct Chosen {
  const AttentionArgs& args;
  Sequence sequence;
  int64_t kv_head;
  int64_t dim = args.shape.head_dim;
  int64_t group = args.shape.query_heads / args.shape.kv_heads;
  double scale = scale_or_default(args.scale, dim);
  int64_t kv_token = first_token_of(args.shape.kv_heads, kv_head);
  std::vector<Entry> entries =
      select(args.sequences.method, sequence, args.query_score + kv_token, args.key_score + kv_token);
  int64_t count = static_cast<int64_t>(entries.size());
  Matrix key = pooled(args.key + kv_token * dim);
  Matrix value = pooled(args.value + kv_token * dim);

  int64_t first_token_of(int64_t heads, int64_t head) const {
    return (sequence.row * heads + head) * args.sequences.tokens + sequence.token_offset;
  }
  Matrix pooled(const double* tokens) const { return pool(args.sequences.method, entries, dim, tokens); }
  // METHOD 6: the tokens e .. e + w - 1, those below N.
  int64_t first_reached(int64_t i) const { return last_token(args.sequences.method, entries[static_cast<size_t>(i)]); }
  int64_t end_of_reached(int64_t i) const {
    const int64_t width = window(args.sequences.method, entries[static_cast<size_t>(i)].level);
    return std::min(first_reached(i) + width, sequence.tokens);
  }
};

template <class Body>
void for_each_choice(const AttentionArgs& args, const Body& body) {
  for (int64_t index = 0; index < args.sequences.count(); ++index) {
    for (int64_t kv_head = 0; kv_head < args.shape.kv_heads; ++kv_head) {
      body(Chosen{.args = args, .sequence = args.sequences.at(index), .kv_head = kv_head});
    }
  }
}

// METHOD 5a: one token of one query head, and the tokens that it sees.
struct LocalRow {
  int64_t query;      // the token's row in [rows, Hq, tokens]
  int64_t first_key;  // the first seen token's row in [rows, Hkv, tokens]
  Matrix weights;     // of the tokens from there on
  double scale;
};

template <class Body>
void for_each_local_row(const AttentionArgs& args, const Body& body) {
  const int64_t window = args.sequences.method.local_window;
  const int64_t dim = args.shape.head_dim;
  const int64_t group = args.shape.query_heads / args.shape.kv_heads;
  for (int64_t index = 0; window > 0 && index < args.sequences.count(); ++index) {
    const Sequence sequence = args.sequences.at(index);
    if (sequence.padding) continue;
    for (int64_t h = 0; h < args.shape.query_heads; ++h) {
      for (int64_t t = 0; t < sequence.tokens; ++t) {
        const int64_t first = std::max<int64_t>(0, t - window + 1);
        const auto row = [&](int64_t heads, int64_t head, int64_t token) {
          return (sequence.row * heads + head) * args.sequences.tokens + sequence.token_offset + token;
        };
        LocalRow local{.query = row(args.shape.query_heads, h, t),
                       .first_key = row(args.shape.kv_heads, h / group, first),
                       .weights = {},
                       .scale = scale_or_default(args.scale, dim)};
        double highest = -std::numeric_limits<double>::infinity();
        for (int64_t j = 0; j <= t - first; ++j) {
          const double logit =
              local.scale * dot(args.query + local.query * dim, args.key + (local.first_key + j) * dim, dim);
          local.weights.push_back(logit);
          highest = std::max(highest, logit);
        }
        double total = 0.0;
        for (double& weight : local.weights) total += weight = std::exp(weight - highest);
        for (double& weight : local.weights) weight /= total;
        body(local);
      }
    }
  }
}

void add_local_attention(const AttentionArgs& args, double* output) {
  const int64_t dim = args.shape.head_dim;
  for_each_local_row(args, [&](const LocalRow& local) {
    for (size_t j = 0; j < local.weights.size(); ++j) {
      const double* value = args.value + (local.first_key + static_cast<int64_t>(j)) * dim;
      for (int64_t d = 0; d < dim; ++d) output[local.query * dim + d] += local.weights[j] * value[d];
    }
  });
}

void add_local_gradient(const AttentionArgs& args, const double* grad_output, double* grad_query, double* grad_key,
                        double* grad_value) {
  const int64_t dim = args.shape.head_dim;
  for_each_local_row(args, [&](const LocalRow& local) {
    const double* grad = grad_output + local.query * dim;
    std::vector<double> grad_weights;
    double mean = 0.0;  // of them under the row's weights
    for (size_t j = 0; j < local.weights.size(); ++j) {
      grad_weights.push_back(dot(grad, args.value + (local.first_key + static_cast<int64_t>(j)) * dim, dim));
      mean += local.weights[j] * grad_weights[j];
    }
    for (size_t j = 0; j < local.weights.size(); ++j) {
      const int64_t key = (local.first_key + static_cast<int64_t>(j)) * dim;
      const double grad_logit = local.weights[j] * (grad_weights[j] - mean) * local.scale;
      for (int64_t d = 0; d < dim; ++d) {
        grad_value[key + d] += local.weights[j] * grad[d];
        grad_query[local.query * dim + d] += grad_logit * args.key[key + d];
        grad_key[key + d] += grad_logit * args.query[local.query * dim + d];
      }
    }
  });
}

}  // namespace

void attention(const AttentionArgs& args, double* output) {
  std::fill_n(output, args.sequences.rows * args.shape.query_heads * args.sequences.tokens * args.shape.head_dim, 0.0);
  for_each_choice(args, [&](const Chosen& chosen) {
    const int64_t dim = chosen.dim, count = chosen.count;
    for (int64_t h = chosen.kv_head * chosen.group; h < (chosen.kv_head + 1) * chosen.group; ++h) {
      const int64_t offset = chosen.first_token_of(args.shape.query_heads, h) * dim;
      const Matrix p = probabilities(chosen.pooled(args.query + offset), chosen.key, count, dim, chosen.scale);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t d = 0; d < dim; ++d) {
          double result = 0.0;
          for (int64_t j = 0; j <= i; ++j) {
            result += p[static_cast<size_t>(i * count + j)] * chosen.value[static_cast<size_t>(j * dim + d)];
          }
          for (int64_t t = chosen.first_reached(i); t < chosen.end_of_reached(i); ++t) {
            output[offset + t * dim + d] += result;
          }
        }
      }
    }
  });
  add_local_attention(args, output);
}

void attention_backward(const AttentionArgs& args, const double* grad_output, double* grad_query, double* grad_key,
                        double* grad_value) {
  const Method& method = args.sequences.method;
  const int64_t size = args.sequences.rows * args.sequences.tokens * args.shape.head_dim;
  std::fill_n(grad_query, size * args.shape.query_heads, 0.0);
  std::fill_n(grad_key, size * args.shape.kv_heads, 0.0);
  std::fill_n(grad_value, size * args.shape.kv_heads, 0.0);

  for_each_choice(args, [&](const Chosen& chosen) {
    const int64_t dim = chosen.dim, count = chosen.count;
    const Matrix &k = chosen.key, &v = chosen.value;
    Matrix grad_k(k.size(), 0.0);
    Matrix grad_v(v.size(), 0.0);
    for (int64_t h = chosen.kv_head * chosen.group; h < (chosen.kv_head + 1) * chosen.group; ++h) {
      const int64_t offset = chosen.first_token_of(args.shape.query_heads, h) * dim;
      const Matrix q = chosen.pooled(args.query + offset);
      const Matrix p = probabilities(q, k, count, dim, chosen.scale);

      Matrix grad_o(q.size(), 0.0);  // of the write-back
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t t = chosen.first_reached(i); t < chosen.end_of_reached(i); ++t) {
          for (int64_t d = 0; d < dim; ++d) {
            grad_o[static_cast<size_t>(i * dim + d)] += grad_output[offset + t * dim + d];
          }
        }
      }

      Matrix grad_q(q.size(), 0.0);
      for (int64_t i = 0; i < count; ++i) {
        std::vector<double> grad_p(static_cast<size_t>(i + 1));
        double mean = 0.0;  // of grad_p under the row's probabilities
        for (int64_t j = 0; j <= i; ++j) {
          const double weight = p[static_cast<size_t>(i * count + j)];
          grad_p[static_cast<size_t>(j)] = dot(grad_o.data() + i * dim, v.data() + j * dim, dim);
          mean += weight * grad_p[static_cast<size_t>(j)];
          for (int64_t d = 0; d < dim; ++d) {
            grad_v[static_cast<size_t>(j * dim + d)] += weight * grad_o[static_cast<size_t>(i * dim + d)];
          }
        }
        for (int64_t j = 0; j <= i; ++j) {
          const double grad_logit =
              p[static_cast<size_t>(i * count + j)] * (grad_p[static_cast<size_t>(j)] - mean) * chosen.scale;
          for (int64_t d = 0; d < dim; ++d) {
            grad_q[static_cast<size_t>(i * dim + d)] += grad_logit * k[static_cast<size_t>(j * dim + d)];
            grad_k[static_cast<size_t>(j * dim + d)] += grad_logit * q[static_cast<size_t>(i * dim + d)];
          }
        }
      }
      add_pool_gradient(method, chosen.entries, dim, grad_q, grad_query + offset);
    }
    add_pool_gradient(method, chosen.entries, dim, grad_k, grad_key + chosen.kv_token * dim);
    add_pool_gradient(method, chosen.entries, dim, grad_v, grad_value + chosen.kv_token * dim);
  });
  add_local_gradient(args, grad_output, grad_query, grad_key, grad_value);
}

}  // namespace lighthouse::reference
