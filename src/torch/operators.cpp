// The operators torch.ops.lighthouse.*: thin calls into the core. Fake versions and autograd are joined in Python.
// `documents` is a table that the operator of this name made; without one every row is a sequence.

#include <optional>
#include <tuple>

#include "torch/devices.h"

namespace lighthouse::bindings {
namespace {

// The one place where a choice comes in, and is looked at where the device allows it.
template <class Device>
ConstSelection checked_selection(const Device& device, const Tensor& mask, const Tensor& prefix,
                                 const std::vector<int64_t>& windows, int64_t length,
                                 const std::optional<Tensor>& documents) {
  device.check("mask", mask);
  device.check("prefix", prefix);
  ConstSelection selection = selection_of(mask, prefix, windows, length);
  if (documents) selection.sequences = sequences_of(*documents, selection.sequences);
  require(mask.size(0) >= 1 && mask.size(2) >= 1, "mask is empty: every size must be at least 1");
  device.check_selection(selection);
  return selection;
}

// The view of a tensor on the device that is worked on.
template <class Device>
View view_on(const Device& device, const char* argument, const Tensor& tensor) {
  device.check(argument, tensor);
  return view_of(argument, tensor);
}

std::array<int64_t, 4> resized(const Tensor& tensor, int64_t length) {
  return {tensor.size(0), tensor.size(1), length, tensor.size(3)};
}

Tensor empty_scores(const Tensor& key) {
  const std::array<int64_t, 3> sizes{key.size(0), key.size(1), key.size(2)};
  return torch::stable::new_empty(key, sizes, ScalarType::Float);
}

template <class Device>
std::tuple<Tensor, Tensor> score(Tensor query, Tensor key) {
  const Device device(query);
  const View query_view = view_of("query", query), key_view = view_on(device, "key", key);
  Tensor query_score = empty_scores(key), key_score = empty_scores(key);
  device.run(ScoreArgs{.query = query_view,
                       .key = key_view,
                       .query_score = static_cast<float*>(query_score.data_ptr()),
                       .key_score = static_cast<float*>(key_score.data_ptr())});
  return {query_score, key_score};
}

Sequences described(int64_t rows, int64_t tokens, const Method& method, const std::optional<Tensor>& documents) {
  if (!documents) return Sequences::of_rows(rows, tokens, method);
  return sequences_of(*documents, {.method = method.checked(), .rows = rows, .tokens = tokens});
}

template <class Device>
std::tuple<Tensor, Tensor> select(Tensor query_score, Tensor key_score, std::vector<int64_t> windows,
                                  int64_t topk_numerator, int64_t topk_denominator, bool cover_start,
                                  std::optional<Tensor> documents) {
  const Device device(query_score);
  device.check("key_score", key_score);
  require_same_sizes("query_score", query_score, "key_score", key_score);
  const auto* query_data = data_of<float>("query_score", query_score, ScalarType::Float, "float32");
  const auto* key_data = data_of<float>("key_score", key_score, ScalarType::Float, "float32");
  const Method method{.pyramid = Pyramid::from_windows(windows),
                      .topk = topk_of(topk_numerator, topk_denominator),
                      .cover_start = cover_start};
  const Sequences sequences = described(query_score.size(0), query_score.size(2), method, documents);
  Tensor mask = torch::stable::new_empty(query_score, query_score.sizes(), ScalarType::Byte);
  Tensor prefix = torch::stable::new_empty(query_score, query_score.sizes(), ScalarType::Int);
  device.run(SelectArgs{.query_score = query_data,
                        .key_score = key_data,
                        .selection = {.sequences = sequences,
                                      .kv_heads = query_score.size(1),
                                      .mask = static_cast<uint8_t*>(mask.data_ptr()),
                                      .prefix = static_cast<int32_t*>(prefix.data_ptr())}});
  return {mask, prefix};
}

// What is added to an output, as a view; without one, of no data.
template <class Device>
ConstView added_view(const Device& device, const char* argument, const std::optional<Tensor>& tensor) {
  return tensor ? ConstView(view_on(device, argument, *tensor)) : ConstView();
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> gather(Tensor query, Tensor key, Tensor value, Tensor mask, Tensor prefix,
                                          std::vector<int64_t> windows, int64_t length,
                                          std::optional<Tensor> documents) {
  const Device device(query);
  const View query_view = view_of("query", query), key_view = view_on(device, "key", key),
             value_view = view_on(device, "value", value);
  const ConstSelection selection = checked_selection(device, mask, prefix, windows, length, documents);
  Tensor query_sub = empty_in_order(resized(query, length), kHeadsFirst, query);
  Tensor key_sub = empty_in_order(resized(key, length), kHeadsFirst, key);
  Tensor value_sub = empty_in_order(resized(value, length), kHeadsFirst, value);
  device.run(GatherArgs{.query = query_view,
                        .key = key_view,
                        .value = value_view,
                        .selection = selection,
                        .query_sub = view_of("query_sub", query_sub),
                        .key_sub = view_of("key_sub", key_sub),
                        .value_sub = view_of("value_sub", value_sub)});
  return {query_sub, key_sub, value_sub};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> gather_backward(Tensor grad_query_sub, Tensor grad_key_sub, Tensor grad_value_sub,
                                                   Tensor mask, Tensor prefix, std::vector<int64_t> windows,
                                                   std::vector<int64_t> query_order, std::vector<int64_t> key_order,
                                                   std::vector<int64_t> value_order, std::optional<Tensor> added_query,
                                                   std::optional<Tensor> added_key, std::optional<Tensor> added_value,
                                                   std::optional<Tensor> documents) {
  const Device device(grad_query_sub);
  const View query_view = view_of("grad_query_sub", grad_query_sub),
             key_view = view_on(device, "grad_key_sub", grad_key_sub),
             value_view = view_on(device, "grad_value_sub", grad_value_sub);
  const ConstSelection selection = checked_selection(device, mask, prefix, windows, query_view.tokens(), documents);
  const auto empty = [&](const Tensor& sub, const char* argument, const std::vector<int64_t>& order) {
    return empty_in_order(resized(sub, mask.size(2)), order_of(argument, order), sub);
  };
  Tensor grad_query = empty(grad_query_sub, "query_order", query_order);
  Tensor grad_key = empty(grad_key_sub, "key_order", key_order);
  Tensor grad_value = empty(grad_value_sub, "value_order", value_order);
  device.run(GatherBackwardArgs{.grad_query_sub = query_view,
                                .grad_key_sub = key_view,
                                .grad_value_sub = value_view,
                                .selection = selection,
                                .grad_query = view_of("grad_query", grad_query),
                                .grad_key = view_of("grad_key", grad_key),
                                .grad_value = view_of("grad_value", grad_value),
                                .added_query = added_view(device, "added_query", added_query),
                                .added_key = added_view(device, "added_key", added_key),
                                .added_value = added_view(device, "added_value", added_value)});
  return {grad_query, grad_key, grad_value};
}

template <class Device>
Tensor scatter(Tensor output_sub, Tensor mask, Tensor prefix, std::vector<int64_t> windows, std::optional<Tensor> added,
               std::optional<Tensor> documents) {
  const Device device(output_sub);
  const View sub_view = view_of("output_sub", output_sub);
  const ConstSelection selection = checked_selection(device, mask, prefix, windows, sub_view.tokens(), documents);
  Tensor output = empty_in_order(resized(output_sub, mask.size(2)), kTokensFirst, output_sub);
  device.run(ScatterArgs{.output_sub = sub_view,
                         .selection = selection,
                         .output = view_of("output", output),
                         .added = added_view(device, "added", added)});
  return output;
}

template <class Device>
Tensor scatter_backward(Tensor grad_output, Tensor mask, Tensor prefix, std::vector<int64_t> windows, int64_t length,
                        std::vector<int64_t> order, std::optional<Tensor> documents) {
  const Device device(grad_output);
  const View grad_view = view_of("grad_output", grad_output);
  const ConstSelection selection = checked_selection(device, mask, prefix, windows, length, documents);
  Tensor grad_output_sub = empty_in_order(resized(grad_output, length), order_of("order", order), grad_output);
  device.run(ScatterBackwardArgs{.grad_output = grad_view,
                                 .selection = selection,
                                 .grad_output_sub = view_of("grad_output_sub", grad_output_sub)});
  return grad_output_sub;
}

// Score, select and gather in one, for less launching; what they hand on needs no look.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> choose_and_gather(Tensor query, Tensor key, Tensor value,
                                                                     std::vector<int64_t> windows,
                                                                     int64_t topk_numerator, int64_t topk_denominator,
                                                                     bool cover_start, int64_t length) {
  const Device device(query);
  const View query_view = view_of("query", query), key_view = view_on(device, "key", key),
             value_view = view_on(device, "value", value);
  const Sequences sequences = Sequences::of_rows(key_view.batch(), key_view.tokens(),
                                                 {.pyramid = Pyramid::from_windows(windows),
                                                  .topk = topk_of(topk_numerator, topk_denominator),
                                                  .cover_start = cover_start});
  require(length == sequences.entries, "length=", length, ": the sub-sequence of ", sequences.tokens, " tokens has ",
          sequences.entries, " entries");
  Tensor query_score = empty_scores(key), key_score = empty_scores(key);
  Tensor mask = torch::stable::new_empty(query_score, query_score.sizes(), ScalarType::Byte);
  Tensor prefix = torch::stable::new_empty(query_score, query_score.sizes(), ScalarType::Int);
  Tensor query_sub = empty_in_order(resized(query, length), kHeadsFirst, query);
  Tensor key_sub = empty_in_order(resized(key, length), kHeadsFirst, key);
  Tensor value_sub = empty_in_order(resized(value, length), kHeadsFirst, value);
  auto* const query_norms = static_cast<float*>(query_score.data_ptr());
  auto* const key_norms = static_cast<float*>(key_score.data_ptr());
  const Selection selection{.sequences = sequences,
                            .kv_heads = key_view.heads(),
                            .mask = static_cast<uint8_t*>(mask.data_ptr()),
                            .prefix = static_cast<int32_t*>(prefix.data_ptr())};
  device.run(ScoreArgs{.query = query_view, .key = key_view, .query_score = query_norms, .key_score = key_norms});
  device.run(SelectArgs{.query_score = query_norms, .key_score = key_norms, .selection = selection});
  device.run(GatherArgs{.query = query_view,
                        .key = key_view,
                        .value = value_view,
                        .selection = selection,
                        .query_sub = view_of("query_sub", query_sub),
                        .key_sub = view_of("key_sub", key_sub),
                        .value_sub = view_of("value_sub", value_sub)});
  return {query_sub, key_sub, value_sub, mask, prefix};
}

// The table of documents, from `lengths` [documents, 3]: tokens, the row that it came in, whether it is padding.
Tensor documents(Tensor lengths, std::vector<int64_t> windows, int64_t topk_numerator, int64_t topk_denominator) {
  require(lengths.dim() == 2 && lengths.size(1) == 3 && lengths.scalar_type() == ScalarType::Long &&
              lengths.is_contiguous(),
          "lengths must be a contiguous int64 tensor [documents, 3]");
  const auto* const numbers = static_cast<const int64_t*>(lengths.data_ptr());
  std::vector<Documents::Length> all;
  for (int64_t i = 0; i < lengths.size(0); ++i) {
    all.push_back({.tokens = numbers[3 * i], .row = numbers[3 * i + 1], .padding = numbers[3 * i + 2] != 0});
  }
  // What is chosen does not depend on the local window; without any, a topk of 0 would be refused.
  const Documents made(all, {.pyramid = Pyramid::from_windows(windows),
                             .topk = topk_of(topk_numerator, topk_denominator),
                             .local_window = 1});
  return table_of(made, lengths);
}

template <class Device, class Library>
void register_on(Library& library) {
  library.impl("score", TORCH_BOX(&score<Device>));
  library.impl("select", TORCH_BOX(&lighthouse::bindings::select<Device>));
  library.impl("choose_and_gather", TORCH_BOX(&choose_and_gather<Device>));
  library.impl("gather", TORCH_BOX(&gather<Device>));
  library.impl("gather_backward", TORCH_BOX(&gather_backward<Device>));
  library.impl("scatter", TORCH_BOX(&scatter<Device>));
  library.impl("scatter_backward", TORCH_BOX(&scatter_backward<Device>));
}

}  // namespace
}  // namespace lighthouse::bindings

// topk: the number of parents per level where topk_denominator is 0, else that share of the tokens. `length` is S.
// On a GPU mask, prefix and length are trusted: they must be of one choice.
// `*_order`: a gradient's dimensions from the slowest in memory to the fastest.
STABLE_TORCH_LIBRARY(lighthouse, library) {
  library.def("documents(Tensor lengths, int[] windows, int topk_numerator, int topk_denominator) -> Tensor");
  library.def("score(Tensor query, Tensor key) -> (Tensor query_score, Tensor key_score)");
  library.def(
      "select(Tensor query_score, Tensor key_score, int[] windows, int topk_numerator, int topk_denominator, "
      "bool cover_start, Tensor? documents=None) -> (Tensor mask, Tensor prefix)");
  library.def(
      "choose_and_gather(Tensor query, Tensor key, Tensor value, int[] windows, int topk_numerator, "
      "int topk_denominator, bool cover_start, SymInt length)"
      " -> (Tensor query_sub, Tensor key_sub, Tensor value_sub, Tensor mask, Tensor prefix)");
  library.def(
      "gather(Tensor query, Tensor key, Tensor value, Tensor mask, Tensor prefix, int[] windows, SymInt length, "
      "Tensor? documents=None)"
      " -> (Tensor query_sub, Tensor key_sub, Tensor value_sub)");
  library.def(
      "gather_backward(Tensor grad_query_sub, Tensor grad_key_sub, Tensor grad_value_sub, Tensor mask, Tensor prefix, "
      "int[] windows, int[] query_order, int[] key_order, int[] value_order, Tensor? added_query=None, "
      "Tensor? added_key=None, Tensor? added_value=None, Tensor? documents=None)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  library.def(
      "scatter(Tensor output_sub, Tensor mask, Tensor prefix, int[] windows, Tensor? added=None, "
      "Tensor? documents=None) -> Tensor");
  library.def(
      "scatter_backward(Tensor grad_output, Tensor mask, Tensor prefix, int[] windows, SymInt length, int[] order, "
      "Tensor? documents=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lighthouse, CPU, library) {
  library.impl("documents", TORCH_BOX(&lighthouse::bindings::documents));
  lighthouse::bindings::register_on<lighthouse::bindings::Cpu>(library);
}

// What the CUDA kernels were compiled for, as CMake spells it; empty without them.
extern "C" [[gnu::visibility("default")]] const char* lighthouse_cuda_architectures() {
#if defined(LIGHTHOUSE_CUDA)
  return LIGHTHOUSE_CUDA_ARCHITECTURES;
#else
  return "";
#endif
}

#if defined(LIGHTHOUSE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lighthouse, CUDA, library) {
  lighthouse::bindings::register_on<lighthouse::bindings::Cuda>(library);
}
#endif
