// The whole method on plain arrays: choose, attend within the sub-sequence by a function of the caller's, write back.
#pragma once

#include <functional>
#include <memory>
#include <optional>

#include "lighthouse/cpu.h"

namespace lighthouse {

// Plain causal attention on [batch, heads, entries, head_dim]; key and value may have fewer heads. What the two share
// (log-sum-exp, say) is theirs to keep.
struct InnerAttention {
  std::function<void(const ConstView& query, const ConstView& key, const ConstView& value, const View& output)> forward;
  std::function<void(const ConstView& query, const ConstView& key, const ConstView& value, const ConstView& output,
                     const ConstView& grad_output, const View& grad_query, const View& grad_key,
                     const View& grad_value)>
      backward;
};

// Scores of the caller's own in place of the norms: [rows, Hkv, tokens] float32 without gaps.
struct Scores {
  const float* query = nullptr;
  const float* key = nullptr;
};

// What the backward needs: the sub-sequence's tensors, the mask and the prefix. Nothing as long as the input.
class AttentionState;

// query [rows, Hq, tokens, D], key and value [rows, Hkv, tokens, D], output like query. `executor` and what `inner`
// refers to must outlive the state.
std::shared_ptr<const AttentionState> attention_forward(const Plan& plan, const ConstView& query, const ConstView& key,
                                                        const ConstView& value, const View& output,
                                                        const InnerAttention& inner, const Executor& executor,
                                                        std::optional<Scores> scores = std::nullopt);

// Fills the three gradients, in whatever strides they have.
void attention_backward(const AttentionState& state, const ConstView& grad_output, const View& grad_query,
                        const View& grad_key, const View& grad_value);

// A causal attention for the CPU to pass in: any dtype, one row of weights at a time, written to be plain, not fast.
// scale 0 means 1/sqrt(head_dim).
InnerAttention causal_attention(const Executor& executor, double scale = 0.0);

}  // namespace lighthouse
