// The whole method on the CPU, on plain arrays in host memory: choose, attend within the sub-sequence, and within the
// local window if there is one, by a function of the caller's, write back the sum.
#pragma once

#include <functional>
#include <memory>
#include <optional>

#include "lighthouse/cpu.h"

namespace lighthouse::cpu {

// Plain causal attention on [batch, heads, entries, head_dim]; key and value may have fewer heads. Of documents each is
// a call of its own. What the two share (log-sum-exp, say) is theirs to keep.
struct InnerArgs {
  ConstView query, key, value;
  View output;
  int64_t window = 0;  // entries that each one sees, itself among them; 0: all up to it
};

struct InnerBackwardArgs {
  ConstView query, key, value, output, grad_output;
  View grad_query, grad_key, grad_value;
  int64_t window = 0;
};

struct InnerAttention {
  std::function<void(const InnerArgs&)> forward;
  std::function<void(const InnerBackwardArgs&)> backward;
};

// A causal attention to pass in: any dtype, one row of weights at a time, written to be plain, not fast.
// scale 0 means 1/sqrt(head_dim).
InnerAttention causal_attention(const Executor& executor, double scale = 0.0);

// Scores of the caller's own in place of the norms: [rows, Hkv, tokens] float32 without gaps.
struct Scores {
  const float* query = nullptr;
  const float* key = nullptr;
};

// query and output [rows, Hq, tokens, D], key and value [rows, Hkv, tokens, D].
struct AttentionArgs {
  Sequences sequences;
  ConstView query, key, value;
  View output;
  InnerAttention inner;
  std::optional<Scores> scores = std::nullopt;
};

// The three gradients are filled in whatever strides they have.
struct AttentionBackwardArgs {
  ConstView grad_output;
  View grad_query, grad_key, grad_value;
};

// What the backward needs: the sub-sequence's tensors, the mask and the prefix; nothing as long as the input. With a
// local window also its output, and the memory of query, key and value, which is not copied.
class AttentionState;

// `executor`, what `args.inner` and `args.sequences` refer to and, with a local window, the memory of query, key and
// value must outlive the state.
std::shared_ptr<const AttentionState> attention_forward(const AttentionArgs& args, const Executor& executor);
void attention_backward(const AttentionState& state, const AttentionBackwardArgs& args);

}  // namespace lighthouse::cpu
