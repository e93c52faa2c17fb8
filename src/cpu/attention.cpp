// The whole method around an inner attention of the caller's. What is kept for the backward is of the sub-sequence's
// length alone, but for mask and prefix, and the local window's output where there is one.

#include "lighthouse/attention.h"

#include <cstddef>
#include <cstring>
#include <memory>
#include <vector>

#include "core/check.h"
#include "cpu/rows.h"

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

void copy(const ConstView& source, const View& target) {
  for (int64_t batch = 0; batch < source.batch(); ++batch) {
    for (int64_t head = 0; head < source.heads(); ++head) {
      for (int64_t token = 0; token < source.tokens(); ++token) {
        const auto bytes = static_cast<size_t>(source.head_dim() * size_of(source.dtype));
        visit(source.dtype, [&]<class T>(T*) {
          std::memcpy(target.row<T>(batch, head, token), source.row<T>(batch, head, token), bytes);
        });
      }
    }
  }
}

// Rows that attend to one another: of a whole tensor all, of one of documents those of one.
struct Stretch {
  int64_t first, count;

  template <class AnyView>
  AnyView of(AnyView view) const {
    visit(view.dtype, [&]<class T>(T*) { view.data = view.template row<T>(0, 0, first); });
    view.sizes[2] = count;
    return view;
  }
};

// Stretches of the sub-sequences' entries. Padding has none.
template <class Body>
void for_each_stretch_of_entries(const Sequences& sequences, const Body& body) {
  if (sequences.alike()) return body(Stretch{0, sequences.entries});
  for (int64_t index = 0; index < sequences.count(); ++index) {
    const Sequence sequence = sequences.at(index);
    if (sequence.entries > 0) body(Stretch{sequence.entry_offset, sequence.entries});
  }
}

// Stretches of tokens, and of padding.
template <class Body, class Padding>
void for_each_stretch_of_tokens(const Sequences& sequences, const Body& body, const Padding& padding) {
  if (sequences.alike()) return body(Stretch{0, sequences.tokens});
  for (int64_t index = 0; index < sequences.count(); ++index) {
    const Sequence sequence = sequences.at(index);
    const Stretch stretch{sequence.token_offset, sequence.tokens};
    sequence.padding ? padding(stretch) : body(stretch);
  }
}

void clear(const View& view) {
  for (int64_t batch = 0; batch < view.batch(); ++batch) {
    for (int64_t head = 0; head < view.heads(); ++head) {
      for (int64_t token = 0; token < view.tokens(); ++token) {
        const auto bytes = static_cast<size_t>(view.head_dim() * size_of(view.dtype));
        visit(view.dtype, [&]<class T>(T*) { std::memset(view.row<T>(batch, head, token), 0, bytes); });
      }
    }
  }
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
  Buffer query_sub, key_sub, value_sub, output_sub;
  ConstView query, key, value;  // the caller's; their memory is read with a local window alone
  Buffer local_output;
  std::vector<uint8_t> mask;
  std::vector<int32_t> prefix;

  bool chooses() const { return sequences.entries > 0; }  // not with select_topk 0, nor of padding alone
  int64_t local_window() const { return sequences.method.local_window; }
  ConstSelection selection() const { return {sequences, key.heads(), mask.data(), prefix.data()}; }
};

namespace {

void choose(AttentionState& state, const std::optional<Scores>& given) {
  const int64_t kv_heads = state.key.heads();
  const auto count = static_cast<size_t>(state.sequences.rows * kv_heads * state.sequences.tokens);
  state.mask.resize(count);
  state.prefix.resize(count);
  std::vector<float> norms;
  Scores scores = given.value_or(Scores{});
  if (!given) {
    norms.resize(2 * count);
    scores = {norms.data(), norms.data() + count};
    run(ScoreArgs{state.query, state.key, norms.data(), norms.data() + count}, *state.executor);
  }
  run(SelectArgs{.query_score = scores.query,
                 .key_score = scores.key,
                 .selection = {state.sequences, kv_heads, state.mask.data(), state.prefix.data()}},
      *state.executor);
}

void attend_in_sub_sequences(AttentionState& state) {
  state.query_sub = sub_buffer(state.sequences, state.query);
  state.key_sub = sub_buffer(state.sequences, state.key);
  state.value_sub = sub_buffer(state.sequences, state.value);
  state.output_sub = sub_buffer(state.sequences, state.query);
  run(GatherArgs{.query = state.query,
                 .key = state.key,
                 .value = state.value,
                 .selection = state.selection(),
                 .query_sub = state.query_sub,
                 .key_sub = state.key_sub,
                 .value_sub = state.value_sub},
      *state.executor);
  for_each_stretch_of_entries(state.sequences, [&](const Stretch& stretch) {
    state.inner.forward({.query = stretch.of(ConstView(state.query_sub)),
                         .key = stretch.of(ConstView(state.key_sub)),
                         .value = stretch.of(ConstView(state.value_sub)),
                         .output = stretch.of(View(state.output_sub))});
  });
}

void attend_locally(AttentionState& state) {
  state.local_output = Buffer(state.query.dtype, state.query.sizes);
  for_each_stretch_of_tokens(
      state.sequences,
      [&](const Stretch& stretch) {
        state.inner.forward({.query = stretch.of(state.query),
                             .key = stretch.of(state.key),
                             .value = stretch.of(state.value),
                             .output = stretch.of(View(state.local_output)),
                             .window = state.local_window()});
      },
      [&](const Stretch& padding) { clear(padding.of(View(state.local_output))); });
}

}  // namespace

std::shared_ptr<const AttentionState> attention_forward(const AttentionArgs& args, const Executor& executor) {
  const Sequences& sequences = args.sequences;
  const int64_t kv_heads = args.key.heads();
  check_whole("query", args.query, args.query, args.query.heads(), sequences);
  check_whole("key", args.key, args.query, kv_heads, sequences);
  check_whole("value", args.value, args.query, kv_heads, sequences);
  check_whole("output", args.output, args.query, args.query.heads(), sequences);
  check_heads(args.query.heads(), kv_heads);
  require(args.inner.forward != nullptr, "inner.forward is empty: a causal attention is needed");

  auto state = std::make_shared<AttentionState>();
  state->sequences = sequences;
  state->inner = args.inner;
  state->executor = &executor;
  state->query = args.query;
  state->key = args.key;
  state->value = args.value;
  if (state->local_window() > 0 || !state->chooses()) attend_locally(*state);
  if (!state->chooses()) {
    copy(state->local_output, args.output);
    return state;
  }
  choose(*state, args.scores);
  attend_in_sub_sequences(*state);
  run(ScatterArgs{.output_sub = state->output_sub,
                  .selection = state->selection(),
                  .output = args.output,
                  .added = state->local_output},
      executor);
  return state;
}

void attention_backward(const AttentionState& state, const AttentionBackwardArgs& args) {
  require(state.inner.backward != nullptr, "inner.backward is empty: the gradient of the inner attention is needed");
  check_whole("grad_output", args.grad_output, state.query, state.query.heads(), state.sequences);
  check_whole("grad_query", args.grad_query, state.query, state.query.heads(), state.sequences);
  check_whole("grad_key", args.grad_key, state.query, state.key.heads(), state.sequences);
  check_whole("grad_value", args.grad_value, state.query, state.key.heads(), state.sequences);

  // Where something is chosen too, the local window's gradients are what gather's gradient adds to its own.
  Buffer local_query, local_key, local_value;
  if (state.local_window() > 0 || !state.chooses()) {
    const auto target = [&](Buffer& buffer, const View& whole) -> View {
      if (!state.chooses()) return whole;
      buffer = Buffer(whole.dtype, whole.sizes);
      return buffer;
    };
    const View grad_query = target(local_query, args.grad_query), grad_key = target(local_key, args.grad_key),
               grad_value = target(local_value, args.grad_value);
    for_each_stretch_of_tokens(
        state.sequences,
        [&](const Stretch& stretch) {
          state.inner.backward({.query = stretch.of(state.query),
                                .key = stretch.of(state.key),
                                .value = stretch.of(state.value),
                                .output = stretch.of(ConstView(state.local_output)),
                                .grad_output = stretch.of(args.grad_output),
                                .grad_query = stretch.of(grad_query),
                                .grad_key = stretch.of(grad_key),
                                .grad_value = stretch.of(grad_value),
                                .window = state.local_window()});
        },
        [&](const Stretch& padding) {
          for (const View& gradient : {grad_query, grad_key, grad_value}) clear(padding.of(gradient));
        });
  }
  if (!state.chooses()) return;

  const Buffer grad_output_sub = sub_buffer(state.sequences, state.query);
  run(
      ScatterBackwardArgs{
          .grad_output = args.grad_output, .selection = state.selection(), .grad_output_sub = grad_output_sub},
      *state.executor);
  const Buffer grad_query_sub = sub_buffer(state.sequences, state.query);
  const Buffer grad_key_sub = sub_buffer(state.sequences, state.key);
  const Buffer grad_value_sub = sub_buffer(state.sequences, state.value);
  for_each_stretch_of_entries(state.sequences, [&](const Stretch& stretch) {
    state.inner.backward({.query = stretch.of(ConstView(state.query_sub)),
                          .key = stretch.of(ConstView(state.key_sub)),
                          .value = stretch.of(ConstView(state.value_sub)),
                          .output = stretch.of(ConstView(state.output_sub)),
                          .grad_output = stretch.of(ConstView(grad_output_sub)),
                          .grad_query = stretch.of(View(grad_query_sub)),
                          .grad_key = stretch.of(View(grad_key_sub)),
                          .grad_value = stretch.of(View(grad_value_sub))});
  });
  run(GatherBackwardArgs{.grad_query_sub = grad_query_sub,
                         .grad_key_sub = grad_key_sub,
                         .grad_value_sub = grad_value_sub,
                         .selection = state.selection(),
                         .grad_query = args.grad_query,
                         .grad_key = args.grad_key,
                         .grad_value = args.grad_value,
                         .added_query = local_query,
                         .added_key = local_key,
                         .added_value = local_value},
      *state.executor);
}

}  // namespace lighthouse::cpu
