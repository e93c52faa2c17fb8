// A plain inner attention: everything widened first, then one row of weights at a time. Its trap is its memory: the
// widened tensors, and a row of weights for each thread.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/rows.h"
#include "lighthouse/attention.h"

namespace lighthouse::cpu {
namespace {

// A tensor's numbers, widened and without gaps: [batch, heads, tokens, head_dim].
template <class A>
struct Wide {
  std::vector<A> numbers;
  int64_t heads, tokens, head_dim;

  A* row(int64_t batch, int64_t head, int64_t token) {
    return numbers.data() + ((batch * heads + head) * tokens + token) * head_dim;
  }
  const A* row(int64_t batch, int64_t head, int64_t token) const {
    return const_cast<Wide*>(this)->row(batch, head, token);
  }
};

template <class A>
Wide<A> zeros_like(const ConstView& view) {
  return {std::vector<A>(static_cast<size_t>(view.batch() * view.heads() * view.tokens() * view.head_dim())),
          view.heads(), view.tokens(), view.head_dim()};
}

template <class Body>
void for_each_row(const ConstView& view, const Executor& executor, const Body& body) {
  executor.parallel_for(0, view.batch() * view.heads() * view.tokens(), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      body(i / view.tokens() / view.heads(), i / view.tokens() % view.heads(), i % view.tokens());
    }
  });
}

template <class T>
auto widened(const ConstView& view, const Executor& executor) {
  auto wide = zeros_like<AccumulatorOf<T>>(view);
  for_each_row(view, executor, [&](int64_t batch, int64_t head, int64_t token) {
    const T* row = view.row<T>(batch, head, token);
    rows().of<T>().add_rows(wide.row(batch, head, token), row, 0, 1, view.head_dim());
  });
  return wide;
}

template <class T, class A>
void store(const View& view, const Wide<A>& wide, const Executor& executor) {
  for_each_row(view, executor, [&](int64_t batch, int64_t head, int64_t token) {
    T* row = view.row<T>(batch, head, token);
    rows().of<T>().store_quotient(row, wide.row(batch, head, token), A{1}, view.head_dim());
  });
}

template <class A>
A dot(const A* a, const A* b, int64_t n) {
  A sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <class A>
void add_scaled(A* out, A factor, const A* row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] += factor * row[i];
}

int64_t first_seen(int64_t token, int64_t window) { return window > 0 ? std::max<int64_t>(0, token - window + 1) : 0; }

// Weights of one query row over the keys from `first` up to it, and the log of their sum before normalisation.
template <class A>
A softmax_row(const A* query, const Wide<A>& key, int64_t batch, int64_t head, int64_t first, int64_t token, A scale,
              std::vector<A>& weights) {
  weights.resize(static_cast<size_t>(token - first + 1));
  A largest = -std::numeric_limits<A>::infinity();
  for (int64_t j = first; j <= token; ++j) {
    A& weight = weights[static_cast<size_t>(j - first)];
    weight = scale * dot(query, key.row(batch, head, j), key.head_dim);
    largest = std::max(largest, weight);
  }
  A sum = 0;
  for (A& weight : weights) sum += weight = std::exp(weight - largest);
  for (A& weight : weights) weight /= sum;
  return largest + std::log(sum);
}

template <class T>
void causal_forward(const InnerArgs& args, double scale, const Executor& executor) {
  using A = AccumulatorOf<T>;
  const auto q = widened<T>(args.query, executor), k = widened<T>(args.key, executor);
  const auto v = widened<T>(args.value, executor);
  auto out = zeros_like<A>(args.query);
  const int64_t group = q.heads / k.heads;
  for_each_row(args.query, executor, [&](int64_t batch, int64_t head, int64_t token) {
    thread_local std::vector<A> weights;
    const int64_t seen = first_seen(token, args.window);
    softmax_row(q.row(batch, head, token), k, batch, head / group, seen, token, static_cast<A>(scale), weights);
    for (int64_t j = seen; j <= token; ++j) {
      add_scaled(out.row(batch, head, token), weights[static_cast<size_t>(j - seen)], v.row(batch, head / group, j),
                 v.head_dim);
    }
  });
  store<T>(args.output, out, executor);
}

template <class T>
void causal_backward(const InnerBackwardArgs& args, double scale_double, const Executor& executor) {
  using A = AccumulatorOf<T>;
  const A scale = static_cast<A>(scale_double);
  const auto q = widened<T>(args.query, executor), k = widened<T>(args.key, executor);
  const auto v = widened<T>(args.value, executor), d_out = widened<T>(args.grad_output, executor);
  auto dq = zeros_like<A>(args.query), dk = zeros_like<A>(args.key), dv = zeros_like<A>(args.key);
  const int64_t group = q.heads / k.heads, n = q.head_dim;

  // By query row: its log-sum-exp, the part of the gradient common to its weights, and its own gradient.
  std::vector<A> log_sum(static_cast<size_t>(args.query.batch() * q.heads * q.tokens)), common(log_sum.size());
  const auto index = [&](int64_t batch, int64_t head, int64_t token) {
    return static_cast<size_t>((batch * q.heads + head) * q.tokens + token);
  };
  for_each_row(args.query, executor, [&](int64_t batch, int64_t head, int64_t token) {
    thread_local std::vector<A> weights, d_weights;
    const size_t at = index(batch, head, token);
    const A* d_row = d_out.row(batch, head, token);
    const int64_t seen = first_seen(token, args.window);
    log_sum[at] = softmax_row(q.row(batch, head, token), k, batch, head / group, seen, token, scale, weights);
    d_weights.resize(weights.size());
    A mean = 0;  // from the weights and not from the output, which is rounded
    for (size_t j = 0; j < weights.size(); ++j) {
      d_weights[j] = dot(d_row, v.row(batch, head / group, seen + static_cast<int64_t>(j)), n);
      mean += weights[j] * d_weights[j];
    }
    common[at] = mean;
    for (size_t j = 0; j < weights.size(); ++j) {
      add_scaled(dq.row(batch, head, token), scale * weights[j] * (d_weights[j] - mean),
                 k.row(batch, head / group, seen + static_cast<int64_t>(j)), n);
    }
  });

  // By key row, over all query rows of its group that see it: no two pieces of work share a sum.
  for_each_row(args.key, executor, [&](int64_t batch, int64_t kv_head, int64_t token) {
    const int64_t end = args.window > 0 && args.window < q.tokens - token ? token + args.window : q.tokens;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int64_t i = token; i < end; ++i) {
        const size_t at = index(batch, head, i);
        const A* d_row = d_out.row(batch, head, i);
        const A* q_row = q.row(batch, head, i);
        const A weight = std::exp(scale * dot(q_row, k.row(batch, kv_head, token), n) - log_sum[at]);
        const A d_weight = dot(d_row, v.row(batch, kv_head, token), n) - common[at];
        add_scaled(dv.row(batch, kv_head, token), weight, d_row, n);
        add_scaled(dk.row(batch, kv_head, token), scale * weight * d_weight, q_row, n);
      }
    }
  });
  store<T>(args.grad_query, dq, executor);
  store<T>(args.grad_key, dk, executor);
  store<T>(args.grad_value, dv, executor);
}

}  // namespace

InnerAttention causal_attention(const Executor& executor, double scale) {
  const auto typed = [&executor, scale](const auto& args, const auto& function) {
    const double factor = scale != 0.0 ? scale : 1.0 / std::sqrt(static_cast<double>(args.query.head_dim()));
    visit(args.query.dtype, [&](auto* type) { function(type, args, factor, executor); });
  };
  return {.forward =
              [typed](const InnerArgs& inner) {
                typed(inner, []<class T>(T*, const auto&... args) { causal_forward<T>(args...); });
              },
          .backward =
              [typed](const InnerBackwardArgs& inner) {
                typed(inner, []<class T>(T*, const auto&... args) { causal_backward<T>(args...); });
              }};
}

}  // namespace lighthouse::cpu
