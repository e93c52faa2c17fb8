// The whole method around an inner attention of the caller's. What is kept for the backward is of the sub-sequence's
// length alone, but for mask and prefix.

#include "lighthouse/attention.h"

#include <cstddef>
#include <memory>
#include <vector>

#include "core/check.h"

namespace lighthouse::cpu {
namespace {

// A tensor without gaps that owns its memory; not cleared.
class Buffer {
 public:
  Buffer() = default;
  Buffer(DType dtype, std::array<int64_t, 4> sizes)
      : memory_(new std::byte[static_cast<size_t>(sizes[0] * sizes[1] * sizes[2] * sizes[3] * size_of(dtype))]),
        view_{memory_.get(), dtype, sizes, contiguous_strides(sizes)} {}
  operator View() const { return view_; }
  operator ConstView() const { return view_; }

 private:
  std::unique_ptr<std::byte[]> memory_;
  View view_;
};

Buffer sub_buffer(const Sequences& sequences, const ConstView& like) {
  return {like.dtype, {sequences.rows, like.heads(), sequences.entries, like.head_dim()}};
}

void check_whole(const char* argument, const ConstView& view, const ConstView& like, int64_t heads,
                 const Sequences& sequences) {
  check_view(argument, view, like);
  check_sizes(argument, view, sequences.rows, heads, sequences.tokens);
}

}  // namespace

class AttentionState {
 public:
  Sequences sequences;
  InnerAttention inner;
  const Executor* executor;
  Buffer query, key, value, output;
  std::vector<uint8_t> mask;
  std::vector<int32_t> prefix;
  int64_t kv_heads;

  ConstSelection selection() const { return {sequences, kv_heads, mask.data(), prefix.data()}; }
};

std::shared_ptr<const AttentionState> attention_forward(const AttentionArgs& args, const Executor& executor) {
  const Sequences& sequences = args.sequences;
  const int64_t kv_heads = args.key.heads();
  check_whole("query", args.query, args.query, args.query.heads(), sequences);
  check_whole("key", args.key, args.query, kv_heads, sequences);
  check_whole("value", args.value, args.query, kv_heads, sequences);
  check_whole("output", args.output, args.query, args.query.heads(), sequences);
  check_heads(args.query.heads(), kv_heads);
  require(args.inner.forward != nullptr, "inner.forward is empty: a causal attention is needed");

  const auto count = static_cast<size_t>(sequences.rows * kv_heads * sequences.tokens);
  auto state = std::make_shared<AttentionState>();
  state->sequences = sequences;
  state->inner = args.inner;
  state->executor = &executor;
  state->kv_heads = kv_heads;
  state->mask.resize(count);
  state->prefix.resize(count);

  std::vector<float> norms;
  Scores scores = args.scores.value_or(Scores{});
  if (!args.scores) {
    norms.resize(2 * count);
    scores = {norms.data(), norms.data() + count};
    run(ScoreArgs{args.query, args.key, norms.data(), norms.data() + count}, executor);
  }
  run(SelectArgs{.query_score = scores.query,
                 .key_score = scores.key,
                 .selection = {sequences, kv_heads, state->mask.data(), state->prefix.data()}},
      executor);

  state->query = sub_buffer(sequences, args.query);
  state->key = sub_buffer(sequences, args.key);
  state->value = sub_buffer(sequences, args.value);
  state->output = sub_buffer(sequences, args.query);
  run(GatherArgs{.query = args.query,
                 .key = args.key,
                 .value = args.value,
                 .selection = state->selection(),
                 .query_sub = state->query,
                 .key_sub = state->key,
                 .value_sub = state->value},
      executor);
  args.inner.forward({.query = state->query, .key = state->key, .value = state->value, .output = state->output});
  run(ScatterArgs{.output_sub = state->output, .selection = state->selection(), .output = args.output}, executor);
  return state;
}

void attention_backward(const AttentionState& state, const AttentionBackwardArgs& args) {
  require(state.inner.backward != nullptr, "inner.backward is empty: the gradient of the inner attention is needed");
  const ConstView like = state.query;
  check_whole("grad_output", args.grad_output, like, like.heads(), state.sequences);
  check_whole("grad_query", args.grad_query, like, like.heads(), state.sequences);
  check_whole("grad_key", args.grad_key, like, state.kv_heads, state.sequences);
  check_whole("grad_value", args.grad_value, like, state.kv_heads, state.sequences);

  const Buffer grad_output_sub = sub_buffer(state.sequences, state.output);
  run(
      ScatterBackwardArgs{
          .grad_output = args.grad_output, .selection = state.selection(), .grad_output_sub = grad_output_sub},
      *state.executor);
  const Buffer grad_query_sub = sub_buffer(state.sequences, state.query);
  const Buffer grad_key_sub = sub_buffer(state.sequences, state.key);
  const Buffer grad_value_sub = sub_buffer(state.sequences, state.value);
  state.inner.backward({.query = state.query,
                        .key = state.key,
                        .value = state.value,
                        .output = state.output,
                        .grad_output = grad_output_sub,
                        .grad_query = grad_query_sub,
                        .grad_key = grad_key_sub,
                        .grad_value = grad_value_sub});
  run(GatherBackwardArgs{.grad_query_sub = grad_query_sub,
                         .grad_key_sub = grad_key_sub,
                         .grad_value_sub = grad_value_sub,
                         .selection = state.selection(),
                         .grad_query = args.grad_query,
                         .grad_key = args.grad_key,
                         .grad_value = args.grad_value},
      *state.executor);
}

}  // namespace lighthouse::cpu
