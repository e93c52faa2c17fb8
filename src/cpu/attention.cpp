// The whole method around an inner attention of the caller's, and a plain inner attention.

#include "lighthouse/attention.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <memory>
#include <vector>

#include "core/check.h"
#include "cpu/rows.h"

namespace lighthouse {
namespace {

// A tensor without gaps that owns its memory; not cleared.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, std::array<int64_t, 4> sizes)
      : memory_(new std::byte[static_cast<size_t>(sizes[0] * sizes[1] * sizes[2] * sizes[3] * size_of(dtype))]),
        view_{memory_.get(), dtype, sizes, contiguous_strides(sizes)} {}
  const View& view() const { return view_; }

 private:
  std::unique_ptr<std::byte[]> memory_;
  View view_;
};

Tensor sub_tensor(const Layout& layout, const ConstView& whole) {
  return {whole.dtype, {layout.rows, whole.heads(), layout.entries, whole.head_dim()}};
}

}  // namespace

class AttentionState {
 public:
  Layout layout;
  InnerAttention inner;
  const Executor* executor;
  Tensor query, key, value, output;
  std::vector<uint8_t> mask;
  std::vector<int32_t> prefix;
  int64_t kv_heads;

  ConstSelection selection() const { return {mask.data(), prefix.data(), kv_heads}; }
};

std::shared_ptr<const AttentionState> attention_forward(const Plan& plan, const ConstView& query, const ConstView& key,
                                                        const ConstView& value, const View& output,
                                                        const InnerAttention& inner, const Executor& executor,
                                                        std::optional<Scores> scores) {
  const Layout& layout = plan.layout;
  check_view("query", query, query);
  check_view("key", key, query);
  check_view("value", value, query);
  check_view("output", output, query);
  check_heads(query.heads(), key.heads());
  check_sizes("query", query, layout.rows, query.heads(), layout.tokens);
  check_sizes("key", key, layout.rows, key.heads(), layout.tokens);
  check_sizes("value", value, layout.rows, key.heads(), layout.tokens);
  check_sizes("output", output, layout.rows, query.heads(), layout.tokens);
  require(inner.forward != nullptr, "inner.forward is empty: a causal attention is needed");

  const auto count = static_cast<size_t>(layout.rows * key.heads() * layout.tokens);
  auto state = std::make_shared<AttentionState>();
  state->layout = layout;
  state->inner = inner;
  state->executor = &executor;
  state->kv_heads = key.heads();
  state->mask.resize(count);
  state->prefix.resize(count);

  std::vector<float> query_score, key_score;
  if (!scores) {
    query_score.resize(count);
    key_score.resize(count);
    cpu::score(query, key, query_score.data(), key_score.data(), executor);
    scores = Scores{query_score.data(), key_score.data()};
  }
  cpu::select(plan, scores->query, scores->key, {state->mask.data(), state->prefix.data(), state->kv_heads}, executor);

  state->query = sub_tensor(layout, query);
  state->key = sub_tensor(layout, key);
  state->value = sub_tensor(layout, value);
  state->output = sub_tensor(layout, query);
  cpu::gather(layout, query, key, value, state->selection(), state->query.view(), state->key.view(),
              state->value.view(), executor);
  inner.forward(state->query.view(), state->key.view(), state->value.view(), state->output.view());
  cpu::scatter(layout, state->output.view(), state->selection(), output, executor);
  return state;
}

void attention_backward(const AttentionState& state, const ConstView& grad_output, const View& grad_query,
                        const View& grad_key, const View& grad_value) {
  require(state.inner.backward != nullptr, "inner.backward is empty: the gradient of the inner attention is needed");
  const ConstView like = state.query.view();
  const auto check = [&](const char* argument, const ConstView& view, int64_t heads) {
    check_view(argument, view, like);
    check_sizes(argument, view, state.layout.rows, heads, state.layout.tokens);
  };
  check("grad_output", grad_output, like.heads());
  check("grad_query", grad_query, like.heads());
  check("grad_key", grad_key, state.kv_heads);
  check("grad_value", grad_value, state.kv_heads);
  const Tensor grad_output_sub = sub_tensor(state.layout, state.output.view());
  cpu::scatter_backward(state.layout, grad_output, state.selection(), grad_output_sub.view(), *state.executor);
  const Tensor grad_query_sub = sub_tensor(state.layout, state.query.view());
  const Tensor grad_key_sub = sub_tensor(state.layout, state.key.view());
  const Tensor grad_value_sub = sub_tensor(state.layout, state.value.view());
  state.inner.backward(state.query.view(), state.key.view(), state.value.view(), state.output.view(),
                       grad_output_sub.view(), grad_query_sub.view(), grad_key_sub.view(), grad_value_sub.view());
  cpu::gather_backward(state.layout, grad_query_sub.view(), grad_key_sub.view(), grad_value_sub.view(),
                       state.selection(), grad_query, grad_key, grad_value, *state.executor);
}

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
  auto wide = zeros_like<cpu::AccumulatorOf<T>>(view);
  for_each_row(view, executor, [&](int64_t batch, int64_t head, int64_t token) {
    const T* row = cpu::row_at<T>(view, batch, head, token);
    cpu::rows().of<T>().add_rows(wide.row(batch, head, token), row, 0, 1, view.head_dim());
  });
  return wide;
}

template <class T, class A>
void store(const View& view, const Wide<A>& wide, const Executor& executor) {
  for_each_row(view, executor, [&](int64_t batch, int64_t head, int64_t token) {
    T* row = cpu::row_at<T>(view, batch, head, token);
    cpu::rows().of<T>().store_quotient(row, wide.row(batch, head, token), A{1}, view.head_dim());
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

// Weights of one query row over the keys up to it, and the log of their sum before normalisation.
template <class A>
A softmax_row(const A* query, const Wide<A>& key, int64_t batch, int64_t head, int64_t token, A scale,
              std::vector<A>& weights) {
  weights.resize(static_cast<size_t>(token + 1));
  A largest = -std::numeric_limits<A>::infinity();
  for (int64_t j = 0; j <= token; ++j) {
    A& weight = weights[static_cast<size_t>(j)];
    weight = scale * dot(query, key.row(batch, head, j), key.head_dim);
    largest = std::max(largest, weight);
  }
  A sum = 0;
  for (A& weight : weights) sum += weight = std::exp(weight - largest);
  for (A& weight : weights) weight /= sum;
  return largest + std::log(sum);
}

template <class T>
void causal_forward(const ConstView& query, const ConstView& key, const ConstView& value, const View& output,
                    double scale, const Executor& executor) {
  using A = cpu::AccumulatorOf<T>;
  const auto q = widened<T>(query, executor), k = widened<T>(key, executor), v = widened<T>(value, executor);
  auto out = zeros_like<A>(query);
  const int64_t group = q.heads / k.heads;
  for_each_row(query, executor, [&](int64_t batch, int64_t head, int64_t token) {
    thread_local std::vector<A> weights;
    softmax_row(q.row(batch, head, token), k, batch, head / group, token, static_cast<A>(scale), weights);
    for (int64_t j = 0; j <= token; ++j) {
      add_scaled(out.row(batch, head, token), weights[static_cast<size_t>(j)], v.row(batch, head / group, j),
                 v.head_dim);
    }
  });
  store<T>(output, out, executor);
}

template <class T>
void causal_backward(const ConstView& query, const ConstView& key, const ConstView& value, const ConstView& output,
                     const ConstView& grad_output, const View& grad_query, const View& grad_key, const View& grad_value,
                     double scale_double, const Executor& executor) {
  using A = cpu::AccumulatorOf<T>;
  const A scale = static_cast<A>(scale_double);
  const auto q = widened<T>(query, executor), k = widened<T>(key, executor), v = widened<T>(value, executor);
  const auto out = widened<T>(output, executor), d_out = widened<T>(grad_output, executor);
  auto dq = zeros_like<A>(query), dk = zeros_like<A>(key), dv = zeros_like<A>(key);
  const int64_t group = q.heads / k.heads, n = q.head_dim;

  // By query row: its log-sum-exp, the part of the gradient common to its weights, and its own gradient.
  std::vector<A> log_sum(static_cast<size_t>(query.batch() * q.heads * q.tokens)), common(log_sum.size());
  const auto index = [&](int64_t batch, int64_t head, int64_t token) {
    return static_cast<size_t>((batch * q.heads + head) * q.tokens + token);
  };
  for_each_row(query, executor, [&](int64_t batch, int64_t head, int64_t token) {
    thread_local std::vector<A> weights;
    const size_t at = index(batch, head, token);
    const A* d_row = d_out.row(batch, head, token);
    log_sum[at] = softmax_row(q.row(batch, head, token), k, batch, head / group, token, scale, weights);
    common[at] = dot(d_row, out.row(batch, head, token), n);
    for (int64_t j = 0; j <= token; ++j) {
      const A d_weight = dot(d_row, v.row(batch, head / group, j), n) - common[at];
      add_scaled(dq.row(batch, head, token), scale * weights[static_cast<size_t>(j)] * d_weight,
                 k.row(batch, head / group, j), n);
    }
  });

  // By key row, over all query rows of its group behind it: no two pieces of work share a sum.
  for_each_row(key, executor, [&](int64_t batch, int64_t kv_head, int64_t token) {
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int64_t i = token; i < q.tokens; ++i) {
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
  store<T>(grad_query, dq, executor);
  store<T>(grad_key, dk, executor);
  store<T>(grad_value, dv, executor);
}

double scale_or_default(double scale, int64_t head_dim) {
  return scale != 0.0 ? scale : 1.0 / std::sqrt(static_cast<double>(head_dim));
}

}  // namespace

InnerAttention causal_attention(const Executor& executor, double scale) {
  return {[&executor, scale](const ConstView& query, const ConstView& key, const ConstView& value, const View& output) {
            cpu::visit(query.dtype, [&](auto* type) {
              using T = std::remove_pointer_t<decltype(type)>;
              causal_forward<T>(query, key, value, output, scale_or_default(scale, query.head_dim()), executor);
            });
          },
          [&executor, scale](const ConstView& query, const ConstView& key, const ConstView& value,
                             const ConstView& output, const ConstView& grad_output, const View& grad_query,
                             const View& grad_key, const View& grad_value) {
            cpu::visit(query.dtype, [&](auto* type) {
              using T = std::remove_pointer_t<decltype(type)>;
              causal_backward<T>(query, key, value, output, grad_output, grad_query, grad_key, grad_value,
                                 scale_or_default(scale, query.head_dim()), executor);
            });
          }};
}

}  // namespace lighthouse
